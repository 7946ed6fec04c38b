"""Multi-scale deformable attention: the contract, its eager reference, its Triton kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from detr_fast import dispatch
from detr_fast.dispatch import Call, Implementation, Op, Situation, TritonImplementation
from detr_fast.kernels import deformable_attention as kernels
from detr_fast.kernels.deformable_attention import MAX_ELEMENTS, MAX_HEAD_DIM, MAX_LEVELS
from detr_fast.kernels.launch import compile_launches
from detr_fast.kernels.rows import MAX_PLANS
from detr_fast.ops import regimes
from detr_fast.ops.boundary import SEVERAL_DEVICES, followed, integers, on_one_device, wants_grad
from detr_fast.ops.deformable_autograd import deformable_attention_of
from detr_fast.ops.deformable_eager import Levels, eager, located, result_of
from detr_fast.ops.layouts import Layouts, aligned, key, layouts, rehearsed

Shapes = Sequence[tuple[int, int]] | Tensor


def deformable_attention(
    value: Tensor,
    shapes: Shapes,
    locations: Tensor,
    weights: Tensor,
    points: Sequence[int] | None = None,
) -> Tensor:
    """What each query reads at a few points of each level of features: Σ weight · value at location, over all points.

    A location is (x, y), in units of its level's width and height: (0, 0) is the upper left corner of the first pixel, (1, 1) the
    lower right one of the last, and values are interpolated between the centers of pixels. What lies outside is zero and has no
    gradient, however far: infinitely, too, as the original's CUDA code has it, where `grid_sample` gives NaN. NaN stays NaN.

    Shapes: value (B, S, H, E), the levels' pixels row by row and level after level; shapes (height, width) of each level, with
    S = Σ height · width; locations (B, Q, H, L, P, 2) and weights (B, Q, H, L, P), or, with `points` for each level,
    (B, Q, H, K, 2) and (B, Q, H, K), where K = Σ points. Weights are taken as they are: a softmax is the caller's.
    shapes may be a tensor of integers (L, 2), too. Where it lies on a GPU with the value, the kernel reads it there and the host
    does not wait; it then can't be checked, and where it does not make S the result is NaN. PyTorch's form waits for it.
    Returns (B, Q, H, E) in the dtype that value and weights promote to. The kernel computes in fp32, PyTorch in the dtype that all
    promote to. The value's gradient is added up in no fixed order on a GPU; under `torch.use_deterministic_algorithms(True)`
    PyTorch's indexing does it.
    Raises ValueError where the shapes do not fit, TypeError for integers; BackendError as `use_backend` says.
    Source: arXiv:2010.04159, section 4.1.
    """
    arguments = arguments_of(value, shapes, locations, weights, points)
    return _run(*arguments)


def deformable_attention_from_offsets(
    value: Tensor,
    shapes: Shapes,
    references: Tensor,
    offsets: Tensor,
    logits: Tensor,
    points: Sequence[int] | None = None,
    spread: float = 0.5,
) -> Tensor:
    """`deformable_attention` at offsets from reference points or boxes, weighed by a softmax, all in one launch.

    Shapes: references (B, Q, L, 2) or (B, Q, L, 4), or with L = 1 the same for all levels; offsets and logits as the locations and
    weights of `deformable_attention`, which this computes: the softmax of the logits over all of a query's points, and

        references (x, y):         location = (x, y) + offset / (width, height) of the level: offsets are in pixels
        references (x, y, w, h):   location = (x, y) + offset · (w, h) · spread / points of the level

    as Deformable DETR does. Returns (B, Q, H, E) in the dtype that value and logits promote to; shapes, gradients and errors are
    `deformable_attention`'s, which also says what else holds. The kernel computes in fp32 and keeps neither locations nor weights.
    Source: arXiv:2010.04159, section 4.1 and appendix A.3.
    """
    arguments = arguments_of(value, shapes, offsets, logits, points, references, spread)
    return _run(*arguments)


def _run(value: Tensor, *rest: Any) -> Tensor:
    if not (dispatch.intervening or value.is_cuda):
        return _eager(value, *rest)
    return DEFORMABLE_ATTENTION(value, *rest)  # type: ignore[no-any-return]


Arguments = tuple[Tensor, Tensor, Tensor, Levels, Tensor | None, Tensor | None, float]


def arguments_of(
    value: Tensor,
    shapes: Shapes,
    locations: Tensor,
    weights: Tensor,
    points: Sequence[int] | None,
    references: Tensor | None = None,
    spread: float = 0.0,
) -> Arguments:
    """What implementations take: value, locations (B, Q, H, K, 2) or offsets, weights (B, Q, H, K) or logits, height, width and points of
    each level, references, shapes where they are the device's (int64; heights and widths of levels are 0 then), and spread.

    Raises ValueError where the shapes do not fit, and TypeError for integers, in which the result would be cut off.
    """
    floating = value, locations, weights, *(() if references is None else (references,))
    if not all(t.is_floating_point() for t in floating):
        names = "value", "locations", "weights", "references"
        given = ", ".join(f"{name} of {t.dtype}" for name, t in zip(names, floating))
        raise TypeError(f"got {given}; expected floating-point tensors: convert them first, as by value.float()")
    there: Tensor | None = None
    if isinstance(shapes, Tensor):
        if shapes.ndim != 2 or shapes.shape[1] != 2:
            raise ValueError(f"got shapes {tuple(shapes.shape)}; expected (L, 2): height and width of each level")
        (shapes,) = integers(shapes=shapes)
        if shapes.device == value.device and (value.is_cuda or dispatch.intervening):
            there = shapes
    sizes = (
        value.shape,
        ((0, 0),) * len(shapes)
        if there is not None
        else tuple((_whole(height), _whole(width)) for height, width in shapes),
        locations.shape,
        weights.shape,
        None if points is None else tuple(map(_whole, points)),
        None if references is None else references.shape,
        there is None,
    )
    if followed():  # where sizes may be symbols
        levels = _levels(*sizes)
    else:
        levels = _known_levels(*sizes)
    if weights.ndim > 4:
        locations, weights = locations.flatten(3, -2), weights.flatten(3)
    return value, locations, weights, levels, references, there, spread


def _whole(size: Any) -> int:
    """A number of what may be NumPy's or a tensor, which may be written to later; a compiler's symbol stays one."""
    return size if isinstance(size, (int, torch.SymInt)) else int(size)  # type: ignore[return-value]


def _levels(
    value: torch.Size,
    shapes: tuple[Any, ...],
    locations: torch.Size,
    weights: torch.Size,
    points: tuple[int, ...] | None,
    references: torch.Size | None,
    known: bool,
) -> Levels:
    if points is None and len(weights) == 5 and weights[3] == len(shapes):
        points = (weights[4],) * len(shapes)
    levels = tuple((height, width, n) for (height, width), n in zip(shapes, points or ()))
    images, pixels, heads = value[:3] if len(value) == 4 else (-1, -1, -1)
    if (
        points is None
        or not levels
        or not len(points) == len(shapes) == len(levels)
        or min(map(min, levels)) < 0
        or (known and pixels != sum(height * width for height, width, _ in levels))
        or locations != (*weights, 2)
        or len(weights) < 4
        or (weights[0], weights[2], weights[3:].numel()) != (images, heads, sum(n for _, _, n in levels))
    ):
        named = "" if points is None else f" and {list(points)} points"
        sizes = list(shapes) if known else f"{len(shapes)} on the device"
        raise ValueError(
            f"got value {tuple(value)}, levels {sizes}{named}, locations {tuple(locations)} and weights {tuple(weights)}; "
            "expected (B, S, H, E) with S = Σ height · width, (B, Q, H, L, P, 2) and (B, Q, H, L, P) for L levels, or "
            "(B, Q, H, K, 2) and (B, Q, H, K) with points of each level, K in all"
        )
    if references is not None and (
        len(references) != 4
        or references[:2] != weights[:2]
        or references[2] not in (1, len(levels))
        or references[3] not in (2, 4)
    ):
        raise ValueError(
            f"got references {tuple(references)}; expected ({weights[0]}, {weights[1]}, {len(levels)} levels or 1, 2 or 4): "
            "x and y, or x, y, width and height"
        )
    return levels


_known_levels = lru_cache(maxsize=MAX_PLANS)(_levels)  # which takes 10 µs


@dataclass(frozen=True)
class DeformableAttentionCall(Call):
    sizes: tuple[int, ...]  # images, pixels, heads, channels, queries, points
    levels: Levels
    dtypes: tuple[torch.dtype, ...]  # of locations and weights, and of references
    wanted: kernels.Wanted  # which of value, locations, weights and references need a gradient
    coordinates: int  # of references; 0 without
    sizes_on_device: bool
    one_device: bool
    layouts: Layouts

    def shapes(self) -> str:
        images, pixels, heads, channels, queries, points = self.sizes
        name = str(self.dtype).removeprefix("torch.")
        what = "offsets" if self.coordinates else "points"
        return f"({images}, {queries}, {heads}, {channels}) of {pixels} pixels, {points} {what} {name}"


def _signature(
    value: Tensor,
    locations: Tensor,
    weights: Tensor,
    levels: Levels,
    references: Tensor | None,
    shapes: Tensor | None,
    spread: float,
) -> tuple[Any, ...]:
    return key(value), key(locations), key(weights), levels, key(references), key(shapes)


def _describe(
    value: Tensor,
    locations: Tensor,
    weights: Tensor,
    levels: Levels,
    references: Tensor | None,
    shapes: Tensor | None,
    spread: float,
    *,
    situation: Situation,
) -> DeformableAttentionCall:
    given = value, locations, weights, references
    read = locations, weights, references
    return DeformableAttentionCall(
        device=value.device,
        architecture=dispatch.architecture(value.device),
        dtype=value.dtype,
        tensor_type=dispatch.tensor_type(tuple(t for t in (*given, shapes) if t is not None)),
        needs_grad=wants_grad(*given),
        situation=situation,
        sizes=(*value.shape, locations.shape[1], weights.shape[-1]),
        levels=levels,
        dtypes=tuple(t.dtype for t in read if t is not None),
        wanted=(wants_grad(value), wants_grad(locations), wants_grad(weights), wants_grad(references)),
        coordinates=0 if references is None else references.shape[-1],
        sizes_on_device=shapes is not None,
        one_device=on_one_device(*given, shapes),
        layouts=layouts(situation, *given, shapes),
    )


class TritonDeformableAttention(TritonImplementation):
    def why_not(self, call: DeformableAttentionCall) -> str | None:
        _, pixels, heads, channels, queries, points = call.sizes
        if not call.one_device:
            return SEVERAL_DEVICES
        if any(dtype not in self.dtypes for dtype in call.dtypes):
            names = "locations, weights and references" if call.coordinates else "locations and weights"
            return f"{names} of {call.dtypes}: it takes bfloat16, float16, float32"
        if len(call.levels) > MAX_LEVELS:
            return f"{len(call.levels)} levels: it takes 1 to {MAX_LEVELS}"
        if not 1 <= channels <= MAX_HEAD_DIM:
            return f"head dimension {channels}: it takes 1 to {MAX_HEAD_DIM}"
        if max(pixels * heads * channels, queries * heads * max(channels, 2 * points)) > MAX_ELEMENTS:
            return "an image's values or locations are over 2^31 elements"
        if call.situation.deterministic and call.wanted[0]:
            return (
                "the value's gradient is added up in any order, which torch.use_deterministic_algorithms(True) forbids"
            )
        return None

    def advice(self, call: DeformableAttentionCall) -> str | None:
        if call.sizes_on_device:
            return None  # eager would have the host wait for them
        if call.situation.regime == "compiled":
            return "under torch.compile Inductor fuses the samples by itself, and nothing was measured"
        if regimes.find(_regime(call), call.architecture) is None:
            return None  # unmeasured; but it is one launch where eager makes a dozen and more, over tensors as large as all samples
        return regimes.advice(_regime(call), call, _bytes(call))

    def note(self, call: DeformableAttentionCall) -> str | None:
        return regimes.note(_regime(call), call)

    def compiled_key(self, call: DeformableAttentionCall) -> Any:
        form = call.coordinates, call.sizes_on_device
        programs = len(call.levels), call.sizes[3], call.dtype, call.dtypes, call.wanted, form
        return call.device, *programs, aligned(call.layouts[:3])

    def prepare(self, call: DeformableAttentionCall) -> None:
        compile_launches(lambda: self.rehearse(call), call.device)

    def rehearse(self, call: DeformableAttentionCall) -> None:
        """Forward, and backward where a gradient is needed, of such a call on meta tensors."""
        value, locations, weights, references, shapes = rehearsed(call.layouts)
        given, more = (value, locations, weights, call.levels), {"reference": references, "shapes": shapes}
        out = kernels.deformable_attention_forward(*given, result_of(value, weights), **more)
        if call.needs_grad:
            kernels.deformable_attention_backward(out, *given, call.wanted, **more)

    def run(self, *arguments: Any) -> Tensor:
        return deformable_attention_of(*arguments)


class EagerDeformableAttention(Implementation):
    name = "eager"

    def run(self, *arguments: Any) -> Tensor:
        return _eager(*arguments)


DEFORMABLE_ATTENTION = Op(
    "deformable_attention",
    signature=_signature,
    describe=_describe,
    implementations=(TritonDeformableAttention(), EagerDeformableAttention()),
)


def _regime(call: DeformableAttentionCall) -> str:
    return "deformable_attention_from_offsets" if call.coordinates else "deformable_attention"


def _bytes(call: DeformableAttentionCall) -> int:
    """Of all samples: what a query reads, and eager writes."""
    images, _, heads, channels, queries, points = call.sizes
    return images * queries * heads * points * channels * call.dtype.itemsize


def _eager(
    value: Tensor,
    locations: Tensor,
    weights: Tensor,
    levels: Levels,
    references: Tensor | None,
    shapes: Tensor | None,
    spread: float,
) -> Tensor:
    if shapes is not None:
        sizes = value.shape, tuple(map(tuple, shapes.tolist())), locations.shape, weights.shape
        levels = _levels(*sizes, tuple(n for *_, n in levels), None, True)
    if references is None:
        return eager(value, locations, weights, levels)
    dtype = result_of(value, weights)
    return eager(value, *located(references, locations, weights, levels, spread), levels).to(dtype)
