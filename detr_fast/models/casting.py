"""Weights that autocast would cast one by one where they are used: here many are cast in one launch, as their gradients.

A DETR has some 170 weights and biases that 16-bit products read, and a launch for each, or two with its gradient, takes
longer than the bytes do; so does one for each layer, whose million elements are too few for a large GPU. Values are the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from detr_fast import nn, ops
from detr_fast.nn.bare import has_hooks, is_bare
from detr_fast.nn.casts import known_casts
from detr_fast.ops.cast_together import is_one_launch

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
    `nn.casts`), each module's cast together, or all of them. The modules keep their parameters.

    What is more than a plain fp32 parameter (sharded, quantised, parametrised), or what a hook may change, is not cast here.
    """
    dtype = autocast_dtype(device)
    # Kept: they are known by their ids.
    parameters = [] if dtype is None else [_parameters(group, device) for group in groups]
    casts = chain.from_iterable(cast_groups(parameters, dtype))
    with known_casts(dict(zip(map(id, chain.from_iterable(parameters)), casts))):
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


def cast_groups(
    groups: Sequence[Sequence[Tensor]], dtype: torch.dtype | None, channels_last: bool = False
) -> list[list[Tensor]]:
    """`ops.cast_together` of each group, one by one, that gradients of the last need not wait for the first. Where one launch of ours casts
    them, in a captured step, which exchanges no gradients with other processes, all at once: the GPU has no pauses between them.
    """
    if dtype is None:
        return [list(group) for group in groups]
    together = [tensor for group in groups for tensor in group]
    if is_one_launch(together, dtype, channels_last):
        cast = iter(ops.cast_together(together, dtype, channels_last))
        return [[next(cast) for _ in group] for group in groups]
    return [ops.cast_together(group, dtype, channels_last) for group in groups]
