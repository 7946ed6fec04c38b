"""torchvision's ResNets as backbones, with batch norms that are frozen and folded into the convolutions before them."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from detr_fast import nn, ops
from detr_fast.models.casting import autocast_dtype, cast_groups
from detr_fast.models.weight_files import WeightsError, list_problems, read_safetensors, unpickle
from detr_fast.nn.bare import is_bare
from detr_fast.nn.forked import Forked, forks
from detr_fast.nn.frozen_norms import scales_and_shifts
from detr_fast.ops.bottlenecks import Bottleneck as Block
from detr_fast.ops.bottlenecks import as_bottleneck, is_product
from detr_fast.ops.bottlenecks_autograd import Chain
from detr_fast.ops.bottlenecks_choice import asked_for
from detr_fast.ops.boundary import wants_grad
from detr_fast.ops.resnet_stem import RESNET_STEM
from detr_fast.situation import situation


class FrozenBatchNorm2d(nn.Module):
    """Batch norm with fixed statistics and a fixed affine map: y = x * scale + shift for each channel."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Weights of a real batch norm also count its batches, which nothing here needs.
        state_dict.pop(prefix + "num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """Both (C,)."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return scale, self.bias - self.running_mean * scale

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = (t.view(1, -1, 1, 1) for t in self.scale_and_shift())
        return torch.addcmul(shift, x, scale)


def conv_norm(conv: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
    """norm(conv(x)); a frozen norm is folded into the weights, which saves two passes over the feature map.

    Folding is legal only for a plain convolution without bias that nobody listens to; otherwise both run one by one.
    """
    if type(conv) is not nn.Conv2d or type(norm) is not FrozenBatchNorm2d or conv.bias is not None:
        return norm(conv(x))
    if not (is_bare(conv) and is_bare(norm)):
        return norm(conv(x))
    scale, shift = norm.scale_and_shift()
    return conv._conv_forward(x, conv.weight * scale.view(-1, 1, 1, 1), shift)


def _shortcut(block: BasicBlock | Bottleneck, x: Tensor) -> Tensor:
    downsample = block.downsample
    if downsample is None:
        return x
    return conv_norm(downsample[0], downsample[1], x) if is_bare(downsample) else downsample(x)


class FoldingBasicBlock(BasicBlock):
    """torchvision's, through conv_norm."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(conv_norm(self.conv1, self.bn1, x))
        y = conv_norm(self.conv2, self.bn2, y)
        return self.relu(y + _shortcut(self, x))


class FoldingBottleneck(Bottleneck):
    """torchvision's, through conv_norm."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(conv_norm(self.conv1, self.bn1, x))
        y = self.relu(conv_norm(self.conv2, self.bn2, y))
        y = conv_norm(self.conv3, self.bn3, y)
        return self.relu(y + _shortcut(self, x))


_DEPTHS = {FoldingBasicBlock: (1, 2), FoldingBottleneck: (1, 2, 3)}  # the numbers of a block's convolutions
_PARTS = {*_DEPTHS, nn.Conv2d, FrozenBatchNorm2d, nn.ReLU, nn.MaxPool2d, nn.Sequential}
_SHAPES: dict[str, tuple[type[BasicBlock | Bottleneck], list[int]]] = {
    "resnet18": (FoldingBasicBlock, [2, 2, 2, 2]),
    "resnet34": (FoldingBasicBlock, [3, 4, 6, 3]),
    "resnet50": (FoldingBottleneck, [3, 4, 6, 3]),
    "resnet101": (FoldingBottleneck, [3, 4, 23, 3]),
}


class ResNetBody(nn.Module):
    """A ResNet up to its last feature map, with torchvision's parameter names.

    Args:
        name: "resnet18", "resnet34", "resnet50" or "resnet101".
        dilation: dilate the last stage rather than stride.
        weights: what load_resnet_weights reads; None for random ones.
        frozen: FrozenBatchNorm2d rather than real batch norms.
    """

    def __init__(self, name: str, dilation: bool, weights: str | Path | None, frozen: bool) -> None:
        super().__init__()
        block, blocks = _SHAPES[name]
        norm = FrozenBatchNorm2d if frozen else nn.BatchNorm2d
        resnet = ResNet(block, blocks, replace_stride_with_dilation=[False, False, dilation], norm_layer=norm)
        self.channels = resnet.fc.in_features
        self.conv1 = resnet.conv1
        self.bn1 = resnet.bn1
        self.relu = resnet.relu
        self.maxpool = resnet.maxpool
        self.layer1 = resnet.layer1
        self.layer2 = resnet.layer2
        self.layer3 = resnet.layer3
        self.layer4 = resnet.layer4
        if weights is not None:
            self._load(load_resnet_weights(name, weights), f"{name}'s weights {str(weights)!r}")

    def _load(self, state: dict[str, Tensor], source: str) -> None:
        state = {key: tensor for key, tensor in state.items() if not key.startswith("fc.")}
        own = {key: tensor for key, tensor in self.state_dict().items() if not key.endswith("num_batches_tracked")}
        wrong = {key for key in own.keys() & state.keys() if own[key].shape != state[key].shape}
        problems = [
            list_problems("lack", own.keys() - state.keys(), own),
            list_problems("have other shapes for", wrong, own),
        ]
        if any(problems):
            raise WeightsError(f"{source} {' and '.join(filter(None, problems))}; give those of this ResNet")
        self.load_state_dict(state, strict=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, channels, H/32, W/32), or /16 with dilation; rounded up.

        In 16 bits on a GPU, features are channels last.
        """
        dtype = autocast_dtype(x.device) or self.conv1.weight.dtype
        wanted = x.is_cuda or asked_for() or RESNET_STEM.requested is not None
        if wanted and dtype.itemsize == 2 and _is_eager(x) and self._is_plain():
            return self._channels_last(x, dtype)
        x = self.maxpool(self.relu(conv_norm(self.conv1, self.bn1, x)))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))

    def _is_plain(self) -> bool:
        """Whether all parts are what this class made of them, and nobody listens to one."""
        return all(
            type(module) in _PARTS and is_bare(module) for module in self.modules() if module is not self
        ) and all(conv.bias is None for conv in self.modules() if isinstance(conv, nn.Conv2d))

    def _channels_last(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Convolutions as tensor cores want them, and between two of them one pass over the features."""
        stages = [[self.conv1, self.bn1], *([*stage] for stage in self._stages())]
        norms = [part for part in self.modules() if isinstance(part, FrozenBatchNorm2d)]
        affine: Affine = dict(zip(norms, zip(*scales_and_shifts(norms, [norm.eps for norm in norms]))))
        # Where two norms meet in a sum, their shifts are one.
        ends = [b for stage in self._stages() for b in stage if b.downsample is not None]
        closing = [getattr(b, f"bn{_DEPTHS[type(b)][-1]}") for b in ends]
        sums = torch._foreach_add([affine[n][1] for n in closing], [affine[b.downsample[1]][1] for b in ends])
        affine |= {n: (affine[n][0], shift) for n, shift in zip(closing, sums)}
        convs = [[c for part in stage for c in part.modules() if isinstance(c, nn.Conv2d)] for stage in stages]
        casts = cast_groups([[c.weight for c in stage] for stage in convs], dtype, channels_last=True)
        weights: dict[nn.Module, Tensor] = dict(zip(chain(*convs), chain(*casts)))
        x = ops.resnet_stem(x, weights[self.conv1], *affine[self.bn1])
        links = Chain()
        for stage in self._stages():
            x = _run_stage(x, [*stage], weights, affine, links)
        return x

    def _stages(self) -> tuple[Any, ...]:
        return self.layer1, self.layer2, self.layer3, self.layer4


Affine = dict[nn.Module, tuple[Tensor, Tensor]]  # of each norm, its scale and shift


def _run_stage(x: Tensor, blocks: list[Any], weights: dict[nn.Module, Tensor], affine: Affine, links: Chain) -> Tensor:
    """A stage's blocks, channels last: what trains of it as one node of autograd's, where that is worth it."""
    while blocks and not wants_grad(x, *(weights[conv] for conv, _ in _pairs(blocks[0]))):
        x, blocks = _run_parts(x, blocks[0], weights, affine), blocks[1:]
    y = links.one_node(x, [_tensors(block, weights, affine) for block in blocks])
    if y is not None:
        return y
    for block in blocks:
        x = _run_parts(x, block, weights, affine)
    return x


def _run_parts(x: Tensor, block: Any, weights: dict[nn.Module, Tensor], affine: Affine) -> Tensor:
    residual, y = x, x
    pairs, depth = _pairs(block), len(_DEPTHS[type(block)])
    for n, (conv, norm) in enumerate(pairs[:depth]):
        beside: tuple[Tensor | None, ...] = ()
        if n == depth - 1:
            beside = (residual, None)
            for shortcut, behind in pairs[depth:]:
                beside = shortcut._conv_forward(residual, weights[shortcut], None), affine[behind][0]
        if is_product(conv) and not wants_grad(y, weights[conv], *beside):
            y = ops.pointwise_affine(y, weights[conv], *affine[norm], *beside)
            continue
        if n == 0 and forks(conv, x):
            y, residual = Forked.apply(x, weights[conv])
        else:
            y = conv._conv_forward(y, weights[conv], None)
        y = ops.channel_affine(y, *affine[norm], *beside)
    return y


def _pairs(block: Any) -> list[tuple[Any, Any]]:
    """A block's convolutions and their norms, those of its shortcut last."""
    pairs = [(getattr(block, f"conv{n}"), getattr(block, f"bn{n}")) for n in _DEPTHS[type(block)]]
    return pairs if block.downsample is None else [*pairs, tuple(block.downsample)]


def _tensors(block: Any, weights: dict[nn.Module, Tensor], affine: Affine) -> Block | None:
    """None where it is no bottleneck that `one_node` takes."""
    pairs = _pairs(block)
    scales, shifts = zip(*(affine[norm] for _, norm in pairs))
    return as_bottleneck([conv for conv, _ in pairs], [weights[conv] for conv, _ in pairs], scales, shifts[:3])


def _is_eager(x: Tensor) -> bool:
    """Whether nothing compiles, traces or transforms what runs on x: such would not follow into our nodes of autograd's."""
    return not torch.compiler.is_compiling() and situation(x.device.type).transform is None


def load_resnet_weights(name: str, weights: str | Path) -> dict[str, Tensor]:
    """torchvision's weights by their name, such as "IMAGENET1K_V1", or a file with a torchvision ResNet's state_dict.

    Raises:
        ValueError: neither such a name nor a file.
        WeightsError: the file is damaged, or the download failed.
    """
    if Path(weights).is_file():
        return read_safetensors(Path(weights))[0] if Path(weights).suffix == ".safetensors" else unpickle(Path(weights))
    known = torchvision.models.get_model_weights(name)
    if str(weights) not in known.__members__:  # DEFAULT is among them
        raise ValueError(
            f"got weights_backbone={str(weights)!r}: no such file, and torchvision's {name} knows only "
            f"{', '.join(known.__members__)}"
        )
    entry = known[str(weights)]
    try:
        return entry.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:  # no network, a full disk, or a file with the wrong hash
        raise WeightsError(
            f"cannot download {name}'s weights {str(weights)!r} ({error}); fetch {entry.url} elsewhere and give the file"
        ) from None
