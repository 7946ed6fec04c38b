"""What modules with deformable attention share: their offsets and logits, and the one launch that samples by them.

Whether a kernel takes the call is asked before anything is projected: where none does their own code runs, which projects by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from detr_fast.adapters.blocks import is_dispatched
from detr_fast.dispatch import TritonImplementation
from detr_fast.nn.stand_ins import stand_in
from detr_fast.ops.boundary import wants_grad
from detr_fast.ops.deformable_attention import DEFORMABLE_ATTENTION, Arguments, arguments_of
from detr_fast.ops.products import autocast_dtype

Taken = tuple[TritonImplementation, Arguments]  # a kernel, and what it was asked about


def _taken(value: Tensor, shapes: Any, locations: Tensor, weights: Tensor, points: Any, *around: Any) -> Taken | None:
    """The kernel for such a call, or None where PyTorch's operations are to run."""
    try:
        arguments = arguments_of(value, shapes, locations, weights, points, *around)
    except (TypeError, ValueError):  # of other shapes or dtypes than we know: theirs says what is wrong, if anything is
        return None
    chosen = DEFORMABLE_ATTENTION.choose(*arguments)
    return (chosen, arguments) if isinstance(chosen, TritonImplementation) else None


def sampled(
    value: Tensor, shapes: Any, locations: Tensor, weights: Tensor, points: Sequence[int] | None = None
) -> Tensor | None:
    """`ops.deformable_attention` as (B, Q, H · E); None where PyTorch's operations are to run."""
    taken = _taken(value, shapes, locations, weights, points) if is_dispatched(value) else None
    if taken is None:
        return None
    kernel, arguments = taken
    return kernel.run(*arguments).flatten(2)  # type: ignore[no-any-return]


def taken_around(
    module: Any,
    query: Tensor,
    memory: Tensor,
    references: Tensor,
    shapes: Any,
    points: Sequence[int] | None = None,
    spread: float = 0.5,
    *,
    position: Tensor | None = None,
    projected: bool = True,
) -> Taken | None:
    """Whether a kernel takes what a module with `sampling_offsets` and `attention_weights` is to sample for its queries.

    query (B, Q, C), which position will be added to; memory (B, S, C), projected by `value_proj` or not; points: of each level where
    they are not `n_points`.
    """
    heads, points = module.n_heads, points or [module.n_points] * module.n_levels
    rows, width = (*query.shape[:-1], heads, sum(points)), memory.shape[-1] // heads
    values = (*memory.shape[:-1], heads, width)
    value = _product(memory, values, module.value_proj) if projected else memory.unflatten(-1, (heads, width))
    offsets = _product(query, (*rows, 2), module.sampling_offsets, position)
    logits = _product(query, rows, module.attention_weights, position)
    return _taken(value, shapes, offsets, logits, points, references, spread)


def _product(x: Tensor, shape: tuple[int, ...], linear: Any, added: Tensor | None = None) -> Tensor:
    """In place of linear(x + added), of this shape."""
    grad = wants_grad(x, added) or (torch.is_grad_enabled() and any(p.requires_grad for p in linear.parameters()))
    stride = tuple(prod(shape[i:]) for i in range(1, len(shape) + 1))
    return stand_in(x, shape, stride, autocast_dtype(x) or x.dtype, grad)


def sampled_around(
    module: Any, taken: Taken, query: Tensor, value: Tensor, padding: Tensor | None, references: Tensor
) -> Tensor:
    """What `taken_around` said that a kernel takes, as (B, Q, H · E); value (B, S, C), of which padding (B, S), True there, is zero."""
    kernel, (*expected, levels, _, there, spread) = taken
    if padding is not None:
        value = value.masked_fill(padding[..., None], 0.0)
    heads, count = module.n_heads, sum(n for *_, n in levels)
    found = (
        value.unflatten(-1, (heads, -1)),
        module.sampling_offsets(query).unflatten(-1, (heads, count, 2)),
        module.attention_weights(query).unflatten(-1, (heads, count)),
    )
    # A projection that somebody put there may give another dtype than a Linear: then it is asked again, not projected again.
    run = DEFORMABLE_ATTENTION if any(map(_differ, found, expected)) else kernel.run
    return run(*found, levels, references, there, spread).flatten(2)  # type: ignore[no-any-return]


def _differ(one: Tensor, other: Tensor) -> bool:
    return (type(one), one.shape, one.dtype) != (type(other), other.shape, other.dtype)
