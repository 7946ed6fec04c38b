"""Deformable attention's kernels as ops of PyTorch's: forward and backward, each an op of its own.

sizes: height, width and points of each level, one after the other; where `shapes` hold heights and widths on the device, those are 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from detr_fast.kernels import deformable_attention as kernels
from detr_fast.ops.boundary import define, double_backward, wants_grad
from detr_fast.ops.deformable_eager import Levels, by_indexing, located, result_of, sized

Maybe = Tensor | None


def _triples(sizes: Sequence[int]) -> Levels:
    return tuple((sizes[i], sizes[i + 1], sizes[i + 2]) for i in range(0, len(sizes), 3))


_promoted = cache(torch.promote_types)  # which is an operation: launchers that call none are repeated at less cost


def _run_forward(
    value: Tensor,
    locations: Tensor,
    weights: Tensor,
    references: Maybe,
    shapes: Maybe,
    sizes: Sequence[int],
    spread: float,
) -> Tensor:
    dtype = _promoted(value.dtype, weights.dtype)
    given = references, shapes, spread
    return kernels.deformable_attention_forward(value, locations, weights, _triples(sizes), dtype, *given)


def _fake_forward(value: Tensor, locations: Tensor, weights: Tensor, *rest: Any) -> Tensor:
    return value.new_empty((*weights.shape[:3], value.shape[-1]), dtype=result_of(value, weights))


def _run_backward(
    dout: Tensor,
    value: Tensor,
    locations: Tensor,
    weights: Tensor,
    references: Maybe,
    shapes: Maybe,
    sizes: Sequence[int],
    spread: float,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    asked = wanted[0], wanted[1], wanted[2], wanted[3]
    rest = references, shapes, spread
    found = kernels.deformable_attention_backward(dout, value, locations, weights, _triples(sizes), asked, *rest)
    first, second, third, fourth = (value.new_empty(0) if g is None else g for g in found)
    return first, second, third, fourth


def _fake_backward(
    dout: Tensor,
    value: Tensor,
    locations: Tensor,
    weights: Tensor,
    references: Maybe,
    shapes: Maybe,
    sizes: Sequence[int],
    spread: float,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    given = value, locations, weights, references
    first, second, third, fourth = (
        value.new_empty(0) if t is None or not want else t.new_empty(t.shape) for t, want in zip(given, wanted)
    )
    return first, second, third, fourth


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        locations: Tensor,
        weights: Tensor,
        references: Maybe,
        shapes: Maybe,
        sizes: list[int],
        spread: float,
    ) -> Tensor:
        out: Tensor = _forward.below(value, locations, weights, references, shapes, sizes, spread)
        ctx.save_for_backward(value, locations, weights, references, shapes)
        ctx.sizes, ctx.spread = sizes, spread
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:
        wanted = list(ctx.needs_input_grad[:4])
        found = _backward(dout, *ctx.saved_tensors, ctx.sizes, ctx.spread, wanted)
        return *(g if want else None for g, want in zip(found, wanted)), None, None, None


class _Backward(torch.autograd.Function):
    """The first backward; its own backward is eager."""

    @staticmethod
    def forward(
        ctx: Any,
        dout: Tensor,
        value: Tensor,
        locations: Tensor,
        weights: Tensor,
        references: Maybe,
        shapes: Maybe,
        sizes: list[int],
        spread: float,
        wanted: list[bool],
    ) -> Any:
        ctx.save_for_backward(dout, value, locations, weights, references, shapes)
        ctx.sizes, ctx.spread, ctx.wanted = sizes, spread, wanted
        ctx.set_materialize_grads(False)
        return _backward.below(dout, value, locations, weights, references, shapes, sizes, spread, wanted)

    @staticmethod
    def backward(ctx: Any, *upstream: Maybe) -> Any:
        dout, *inputs, shapes = ctx.saved_tensors
        levels = sized(_triples(ctx.sizes), shapes)

        def reference(value: Tensor, locations: Tensor, weights: Tensor, references: Maybe) -> Tensor:
            if references is not None:
                locations, weights = located(references, locations, weights, levels, ctx.spread)
            return by_indexing(value, locations, weights, levels)

        d_dout, found = double_backward(reference, inputs, dout, ctx.wanted, upstream)
        return d_dout, *found, None, None, None, None


def _autograd_forward(value: Tensor, locations: Tensor, weights: Tensor, references: Maybe, *rest: Any) -> Any:
    call = _Forward.apply if wants_grad(value, locations, weights, references) else _forward.below
    return call(value, locations, weights, references, *rest)


def _autograd_backward(
    dout: Tensor, value: Tensor, locations: Tensor, weights: Tensor, references: Maybe, *rest: Any
) -> Any:
    call = _Backward.apply if wants_grad(dout, value, locations, weights, references) else _backward.below
    return call(dout, value, locations, weights, references, *rest)


_forward = define(
    "deformable_attention(Tensor value, Tensor locations, Tensor weights, Tensor? references, Tensor? shapes, int[] sizes, "
    "float spread) -> Tensor",
    run=_run_forward,
    fake=_fake_forward,
    autograd=_autograd_forward,
)
_backward = define(
    "deformable_attention_backward(Tensor dout, Tensor value, Tensor locations, Tensor weights, Tensor? references, "
    "Tensor? shapes, int[] sizes, float spread, bool[4] wanted) -> (Tensor, Tensor, Tensor, Tensor)",
    run=_run_backward,
    fake=_fake_backward,
    autograd=_autograd_backward,
)


def deformable_attention_of(
    value: Tensor,
    locations: Tensor,
    weights: Tensor,
    levels: Levels,
    references: Maybe,
    shapes: Maybe,
    spread: float,
) -> Tensor:
    """By the kernels."""
    sizes = [n for level in levels for n in level]
    out: Tensor = _forward(value, locations, weights, references, shapes, sizes, spread)
    return out


def gradients_of(
    dout: Tensor, value: Tensor, locations: Tensor, weights: Tensor, levels: Levels, shapes: Maybe
) -> tuple[Tensor, Tensor, Tensor]:
    """Of value, locations and weights, by the kernel, without a forward."""
    sizes = [n for level in levels for n in level]
    wanted = [True, True, True, False]
    first, second, third, _ = _backward(dout, value, locations, weights, None, shapes, sizes, 0.0, wanted)
    return first, second, third
