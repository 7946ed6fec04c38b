"""Weights that autocast would cast one by one where they are used: here many are cast in one launch, as their gradients.

A DETR has some 170 weights and biases that 16-bit products read, and a launch for each, or two with its gradient, takes
longer than the bytes do; so does one for each layer, whose million elements are too few for a large GPU. Values are the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from detr_fast import nn
from detr_fast.nn.bare import has_hooks, is_bare
from detr_fast.nn.casts import known_casts
from detr_fast.ops.boundary import wants_grad
from detr_fast.ops.products import is_batch

_CLASSES = {nn.Linear, NonDynamicallyQuantizableLinear, nn.MultiheadAttention}
_NAMES = {"weight", "bias", "in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight"}


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast computes products in on such a device; None where it is off, or where a compiler sees to casts."""
    if device.type == "meta" or torch.compiler.is_compiling() or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


@contextmanager
def cast_weights(groups: Iterable[torch.nn.Module], device: torch.device) -> Iterator[None]:
    """Inside the block, in this thread, products in these modules find their weights as autocast would cast them (see
    `nn.casts`), each module's cast together. The modules keep their parameters.

    What is more than a plain fp32 parameter (sharded, quantised, parametrised), or what a hook may change, is not cast here.
    """
    dtype = autocast_dtype(device)
    parameters: list[Tensor] = []  # kept: they are known by their ids
    casts: list[Tensor] = []
    for group in () if dtype is None else groups:
        own = _parameters(group, device)
        parameters += own
        casts += cast_together(own, dtype)
    with known_casts(dict(zip(map(id, parameters), casts))):
        yield


def _parameters(group: torch.nn.Module, device: torch.device) -> list[Tensor]:
    """Those of a module's products; none where a hook sees what runs between them."""
    modules = list(group.modules())
    if any(map(has_hooks, modules)):
        return []
    return [
        parameter
        for module in modules
        if type(module) in _CLASSES and is_bare(module)
        for name, parameter in module._parameters.items()
        if name in _NAMES and type(parameter) is torch.nn.Parameter
        if parameter.dtype == torch.float32 and parameter.device == device
    ]


def cast_together(tensors: Sequence[Tensor], dtype: torch.dtype | None, channels_last: bool = False) -> list[Tensor]:
    """The tensors in another dtype, by few launches, as is their backward; channels_last: those of four dimensions so."""
    if dtype is None:
        return list(tensors)
    found: list[Tensor] = [*tensors]
    for trained in (False, True):
        chosen = [i for i, tensor in enumerate(tensors) if wants_grad(tensor) == trained]
        settings: Any = (dtype, channels_last, *(tensors[i] for i in chosen))
        for i, cast in zip(chosen, _Cast.apply(*settings) if trained and chosen else _copies(*settings)):
            found[i] = cast
    return found


class _Cast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, channels_last: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.dtype = tensors[0].dtype
        ctx.last = [t.ndim == 4 and not t.is_contiguous() for t in tensors]
        return _copies(dtype, channels_last, *tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        found: list[Tensor | None] = [None] * len(gradients)
        # As their parameters lie in memory, else autograd would copy them once more.
        for last in (False, True):
            chosen = [i for i, g in enumerate(gradients) if g is not None and ctx.last[i] == last]
            for i, cast in zip(chosen, _copies(ctx.dtype, last, *(gradients[i] for i in chosen))):
                found[i] = cast
        return None, None, *found


def _copies(dtype: torch.dtype, channels_last: bool, *tensors: Any) -> tuple[Tensor, ...]:
    """Contiguous copies, or those of four dimensions channels last: in one launch, but for what is to be laid otherwise."""
    if wants_grad(*tensors) or is_batch(*tensors):
        return tuple(tensor.to(dtype) for tensor in tensors)
    made, sources, targets = [], [], []
    for tensor in tensors:
        last = channels_last and tensor.ndim == 4
        layout = torch.channels_last if last else torch.contiguous_format
        copy = torch.empty(tensor.shape, dtype=dtype, device=tensor.device, memory_format=layout)
        made.append(copy)
        if copy.is_contiguous() and tensor.is_contiguous():  # of a 1×1 convolution, in either format
            sources.append(tensor.view(-1))
            targets.append(copy.view(-1))
        else:
            copy.copy_(tensor)
    if targets:
        torch._foreach_copy_(targets, sources)
    return tuple(made)
