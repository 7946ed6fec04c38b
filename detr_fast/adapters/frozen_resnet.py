"""Residual blocks with frozen batch norms, as detectors train their ResNets: in 16 bits on a GPU channels last, and between two
convolutions one pass over the features (`ops.channel_affine`) for norm, residual sum and ReLU.

Under autocast the originals multiply 16-bit features by fp32 scales, so that all between two convolutions is fp32. Blocks are those of
transformers (DETR-like and RT-DETR), timm and torchvision, norms theirs and the original repositories', both known by their code
(`base.fingerprint`).
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Module

from detr_fast.adapters.base import Adapter, Scriptable, fingerprint, joined, joined_of, kind_of, why_not_switch
from detr_fast.nn.bare import is_bare
from detr_fast.nn.forked import Forked, forks
from detr_fast.nn.frozen_norms import scales_and_shifts
from detr_fast.ops.bottlenecks import as_bottleneck, is_product
from detr_fast.ops.bottlenecks_autograd import Chain
from detr_fast.ops.bottlenecks_choice import asked_for
from detr_fast.ops.boundary import wants_grad
from detr_fast.ops.channel_affine import channel_affine
from detr_fast.ops.pointwise_affine import pointwise_affine
from detr_fast.situation import situation


class _Names(NamedTuple):
    """Of the attributes that hold a block's convolutions and norms, its activations, and what must do nothing."""

    pairs: tuple[tuple[str, str], ...]
    activations: tuple[str, ...]
    idle: tuple[str, ...] = ()


def _numbered(count: int, activations: tuple[str, ...], idle: tuple[str, ...] = ()) -> _Names:
    return _Names(tuple((f"conv{n}", f"bn{n}") for n in range(1, count + 1)), activations, idle)


_TIMM = ("drop_block", "aa", "se", "drop_path")
# By the fingerprint of a block's forward. transformers' blocks hold theirs in `layer`.
_BLOCKS: dict[str, _Names | None] = {
    "0a0273c300d2f08d": None,  # transformers' ResNetBasicLayer, ResNetBottleNeckLayer, and RT-DETR's
    "a49305fdf60fb52e": _numbered(3, ("act1", "act2", "act3"), _TIMM),  # timm's Bottleneck
    "be7f89776e4024a3": _numbered(2, ("act1", "act2"), _TIMM),  # timm's BasicBlock
    "f8a53868f8a42b83": _numbered(3, ("relu",)),  # torchvision's Bottleneck
    "0cef0592e5fdab7a": _numbered(2, ("relu",)),  # torchvision's BasicBlock
}
# By the fingerprint of a norm's forward: its epsilon; None where it is its attribute `eps`.
_NORMS: dict[str, float | None] = {
    "92472a7d6b248f08": 1e-5,  # DetrFrozenBatchNorm2d, and its copies in 13 models
    "d4088fbe4de5ef35": None,  # torchvision's
    "00c23b5991a5ed00": 1e-5,  # of the repositories of DETR, Conditional DETR, DINO, …
    "76c3a0f9249ced6f": None,  # and of Deformable DETR
}
_CONVOLUTION = "82085fbdac0669ce"  # transformers' ResNetConvLayer
_SHORTCUT = "005830e033a0ece9"  # its ResNetShortCut
Pair = tuple[nn.Conv2d, Module]


class _Parts(NamedTuple):
    """pool: what comes before the shortcut's convolution; shortcut: None for the block's input itself."""

    main: list[Pair]
    pool: Module | None
    shortcut: Pair | None


class FrozenResidualBlock(Scriptable):
    """relu(shortcut(x) + the last of norm(conv(…)))."""

    detr_fast_names: _Names | None

    @classmethod
    def attributes_for(cls, original: type[Module]) -> dict[str, Any]:
        return {"detr_fast_names": _BLOCKS[_print_of(original)]}

    def forward(self: Any, x: Tensor) -> Tensor:
        """As the original's, which runs in fp32, on a CPU, under compilers, and where a part was wrapped or hooked since."""
        dtype = _dtype(self, x)
        parts = None if dtype is None else _parts(self)
        if parts is None:
            return super().forward(x)  # type: ignore[misc,no-any-return]
        x = x.to(dtype, memory_format=torch.channels_last)
        pairs = parts.main if parts.shortcut is None else [*parts.main, parts.shortcut]
        norms = [norm for _, norm in pairs]
        scales, shifts = scales_and_shifts(norms, [_epsilon(norm) for norm in norms])
        last = len(parts.main) - 1
        if parts.shortcut is not None:  # where two norms meet in a sum, their shifts are one
            shifts[last] = shifts[last] + shifts.pop()
        if parts.pool is None:
            convs = [conv for conv, _ in pairs]
            y = Chain().one_node(x, [as_bottleneck(convs, [conv.weight for conv in convs], scales, shifts)])
            if y is not None:
                return y
        y = residual = x
        for n, (conv, _) in enumerate(parts.main):
            beside: tuple[Tensor | None, ...] = ()
            if n == last:
                beside = (residual, None)
                if parts.shortcut is not None:
                    pooled = residual if parts.pool is None else parts.pool(residual)
                    beside = _convolved(parts.shortcut[0], pooled), scales[-1]
            if is_product(conv) and not wants_grad(y, conv.weight, *beside):
                y = pointwise_affine(y, conv.weight, scales[n], shifts[n], *beside)
                continue
            if n == 0 and forks(conv, x):
                y, residual = Forked.apply(x, conv.weight.to(dtype))
            else:
                y = _convolved(conv, y)
            y = channel_affine(y, scales[n], shifts[n], *beside)
        return y


def _convolved(conv: nn.Conv2d, x: Tensor) -> Tensor:
    return conv._conv_forward(x, conv.weight, None)


def _dtype(block: Any, x: Any) -> torch.dtype | None:
    """That of the features, if it has 16 bits on a GPU, or one of its ops was asked for by name, and nothing compiles, traces or transforms."""
    if not (isinstance(x, Tensor) and (x.is_cuda or asked_for())) or x.ndim != 4:
        return None
    if torch.compiler.is_compiling() or situation(x.device.type).transform is not None:
        return None
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    else:
        dtype = x.dtype if next(block.parameters()).dtype == x.dtype else torch.float32
    return dtype if dtype.itemsize == 2 else None


def _parts(block: Any) -> _Parts | None:
    """None where the block's parts are not exactly what is known, or have to be called."""
    if not _is_bare_throughout(block):
        return None
    names = block.detr_fast_names
    main, pool, shortcut = _layered(block) if names is None else _attributes(block, names)
    pairs = [] if main is None else [*main, *([] if shortcut is None else [shortcut])]
    if main is None or not pairs or not all(map(_is_pair, pairs)):
        return None
    if pool is not None and type(pool) is not nn.AvgPool2d:
        return None
    return _Parts(main, pool, shortcut)


def _is_bare_throughout(module: Module) -> bool:
    """`is_bare` of it and all below it; `Module.modules` takes twice as long, and this is asked in every forward."""
    return is_bare(module) and all(part is None or _is_bare_throughout(part) for part in module._modules.values())


Found = tuple[Any, Any, Any]  # main, pool and shortcut; None, None, None where it is another block
_NOTHING: Found = (None, None, None)


def _attributes(block: Any, names: _Names) -> Found:
    """timm's and torchvision's."""
    if any(type(getattr(block, name)) is not nn.ReLU for name in names.activations):
        return _NOTHING
    if any(type(getattr(block, name, None)) not in (type(None), nn.Identity) for name in names.idle):
        return _NOTHING
    main = [(getattr(block, conv), getattr(block, norm)) for conv, norm in names.pairs]
    downsample = block.downsample
    if downsample is None:
        return main, None, None
    if type(downsample) is not nn.Sequential or len(downsample) not in (2, 3):
        return _NOTHING
    pool = downsample[0] if len(downsample) == 3 else None
    return main, None if type(pool) is nn.Identity else pool, (downsample[-2], downsample[-1])


def _layered(block: Any) -> Found:
    """transformers'."""
    layers = list(block.layer) if type(block.layer) is nn.Sequential else []
    if (
        not layers
        or any(_print_of(type(one)) != _CONVOLUTION for one in layers)
        or type(block.activation) is not nn.ReLU
    ):
        return _NOTHING
    *before, last = layers
    if any(type(one.activation) is not nn.ReLU for one in before) or type(last.activation) is not nn.Identity:
        return _NOTHING
    main = [(one.convolution, one.normalization) for one in layers]
    pool, shortcut = None, block.shortcut
    if type(shortcut) is nn.Sequential and len(shortcut) == 2:
        pool, shortcut = shortcut
    if type(shortcut) is nn.Identity and pool is None:
        return main, None, None
    if _print_of(type(shortcut)) != _SHORTCUT:
        return _NOTHING
    return main, pool, (shortcut.convolution, shortcut.normalization)


def _is_pair(pair: Any) -> bool:
    conv, norm = pair
    return type(conv) is nn.Conv2d and conv.bias is None and _is_norm(type(norm))


def _epsilon(norm: Any) -> float:
    known = _NORMS[_by_code(type(norm).forward)]
    return float(norm.eps) if known is None else known


def _is_norm(kind: type[Module]) -> bool:
    return _by_code(kind.forward) in _NORMS


def _print_of(kind: type[Module]) -> str:
    """The fingerprint of a class's forward; of what is none of these libraries', an empty one."""
    return _by_code(kind.forward) if kind.__module__.startswith(("transformers.", "timm.", "torchvision.")) else ""


@cache
def _by_code(forward: Any) -> str:
    return fingerprint(forward) or ""


class FrozenResNets(Adapter):
    """Blocks by code that is known, whose norms are frozen."""

    @classmethod
    def consider(cls, module: Module) -> type[Module] | str | None:
        kind = kind_of(module)
        if isinstance(module, FrozenResidualBlock) or _print_of(kind) not in _BLOCKS:
            return None
        if not any(_is_norm(type(part)) for part in module.modules()):
            return None  # whose norms learn
        return why_not_switch(module) or joined(FrozenResidualBlock, kind, kind)

    @classmethod
    def describe(cls, replacement: type[Module]) -> str:
        return f"detr_fast.ops.channel_affine ({joined_of(replacement).__name__})"
