"""Multi-scale deformable attention: the contract, its eager reference, its Triton kernels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from detr_fast import dispatch
from detr_fast.dispatch import Call, Implementation, Op, Situation, TritonImplementation
from detr_fast.kernels import deformable_attention as kernels
from detr_fast.kernels.deformable_attention import MAX_ELEMENTS, MAX_HEAD_DIM, MAX_LEVELS, Level
from detr_fast.kernels.launch import compile_launches
from detr_fast.kernels.rows import MAX_PLANS
from detr_fast.ops import regimes
from detr_fast.ops.boundary import SEVERAL_DEVICES, define, double_backward, followed, on_one_device, wants_grad
from detr_fast.ops.layouts import Layouts, aligned, key, layouts, rehearsed

Levels = tuple[Level, ...]


def deformable_attention(
    value: Tensor,
    shapes: Sequence[tuple[int, int]],
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
    Returns (B, Q, H, E) in the dtype that value and weights promote to. The kernel computes in fp32, PyTorch in the dtype that all
    promote to. The value's gradient is added up in no fixed order on a GPU; under `torch.use_deterministic_algorithms(True)`
    PyTorch's indexing does it.
    Raises ValueError where the shapes do not fit, TypeError for integers; BackendError as `use_backend` says.
    Source: arXiv:2010.04159, section 4.1.
    """
    arguments = arguments_of(value, shapes, locations, weights, points)
    if not (dispatch.intervening or value.is_cuda):
        return _eager(*arguments)
    return DEFORMABLE_ATTENTION(*arguments)  # type: ignore[no-any-return]


def arguments_of(
    value: Tensor,
    shapes: Sequence[tuple[int, int]],
    locations: Tensor,
    weights: Tensor,
    points: Sequence[int] | None,
) -> tuple[Tensor, Tensor, Tensor, Levels]:
    """What implementations take: value, locations (B, Q, H, K, 2), weights (B, Q, H, K), and height, width and points of each level.

    Raises ValueError where the shapes do not fit, and TypeError for integers, in which the result would be cut off.
    """
    if not (value.is_floating_point() and locations.is_floating_point() and weights.is_floating_point()):
        raise TypeError(
            f"got value of {value.dtype}, locations of {locations.dtype} and weights of {weights.dtype}; "
            "expected floating-point tensors: convert them first, as by value.float()"
        )
    given = (
        value.shape,
        tuple((_whole(height), _whole(width)) for height, width in shapes),
        locations.shape,
        weights.shape,
        None if points is None else tuple(map(_whole, points)),
    )
    if followed():  # where sizes may be symbols
        levels = _levels(*given)
    else:
        levels = _known_levels(*given)
    if weights.ndim > 4:
        locations, weights = locations.flatten(3, -2), weights.flatten(3)
    return value, locations, weights, levels


def _whole(size: Any) -> int:
    """A number of what may be NumPy's or a tensor, which may be written to later; a compiler's symbol stays one."""
    return size if isinstance(size, (int, torch.SymInt)) else int(size)  # type: ignore[return-value]


def _levels(
    value: torch.Size,
    shapes: tuple[Any, ...],
    locations: torch.Size,
    weights: torch.Size,
    points: tuple[int, ...] | None,
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
        or pixels != sum(height * width for height, width, _ in levels)
        or locations != (*weights, 2)
        or len(weights) < 4
        or (weights[0], weights[2], weights[3:].numel()) != (images, heads, sum(n for _, _, n in levels))
    ):
        named = "" if points is None else f" and {list(points)} points"
        raise ValueError(
            f"got value {tuple(value)}, levels {list(shapes)}{named}, locations {tuple(locations)} and weights {tuple(weights)}; "
            "expected (B, S, H, E) with S = Σ height · width, (B, Q, H, L, P, 2) and (B, Q, H, L, P) for L levels, or "
            "(B, Q, H, K, 2) and (B, Q, H, K) with points of each level, K in all"
        )
    return levels


_known_levels = lru_cache(maxsize=MAX_PLANS)(_levels)  # which takes 10 µs


@dataclass(frozen=True)
class DeformableAttentionCall(Call):
    sizes: tuple[int, ...]  # images, pixels, heads, channels, queries, points
    levels: Levels
    dtypes: tuple[torch.dtype, torch.dtype]  # of locations and weights
    wanted: tuple[bool, bool, bool]  # which of value, locations and weights need a gradient
    one_device: bool
    layouts: Layouts

    def shapes(self) -> str:
        images, pixels, heads, channels, queries, points = self.sizes
        name = str(self.dtype).removeprefix("torch.")
        return f"({images}, {queries}, {heads}, {channels}) of {pixels} pixels, {points} points {name}"


def _signature(value: Tensor, locations: Tensor, weights: Tensor, levels: Levels) -> tuple[Any, ...]:
    return key(value), key(locations), key(weights), levels


def _describe(
    value: Tensor, locations: Tensor, weights: Tensor, levels: Levels, *, situation: Situation
) -> DeformableAttentionCall:
    return DeformableAttentionCall(
        device=value.device,
        architecture=dispatch.architecture(value.device),
        dtype=value.dtype,
        tensor_type=dispatch.tensor_type((value, locations, weights)),
        needs_grad=wants_grad(value, locations, weights),
        situation=situation,
        sizes=(*value.shape, locations.shape[1], weights.shape[-1]),
        levels=levels,
        dtypes=(locations.dtype, weights.dtype),
        wanted=(wants_grad(value), wants_grad(locations), wants_grad(weights)),
        one_device=on_one_device(value, locations, weights),
        layouts=layouts(situation, value, locations, weights),
    )


class TritonDeformableAttention(TritonImplementation):
    def why_not(self, call: DeformableAttentionCall) -> str | None:
        _, pixels, heads, channels, queries, points = call.sizes
        if not call.one_device:
            return SEVERAL_DEVICES
        if any(dtype not in self.dtypes for dtype in call.dtypes):
            return f"locations and weights of {call.dtypes}: it takes bfloat16, float16, float32"
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
        if call.situation.regime == "compiled":
            return "under torch.compile Inductor fuses the samples by itself, and nothing was measured"
        if regimes.find("deformable_attention", call.architecture) is None:
            return None  # unmeasured; but it is one launch where eager makes a dozen and more, over tensors as large as all samples
        return regimes.advice("deformable_attention", call, _bytes(call))

    def note(self, call: DeformableAttentionCall) -> str | None:
        return regimes.note("deformable_attention", call)

    def compiled_key(self, call: DeformableAttentionCall) -> Any:
        return call.device, len(call.levels), call.sizes[3], call.dtype, call.dtypes, call.wanted, aligned(call.layouts)

    def prepare(self, call: DeformableAttentionCall) -> None:
        compile_launches(lambda: self.rehearse(call), call.device)

    def rehearse(self, call: DeformableAttentionCall) -> None:
        """Forward, and backward where a gradient is needed, of such a call on meta tensors."""
        value, locations, weights = rehearsed(call.layouts)
        out = kernels.deformable_attention_forward(value, locations, weights, call.levels, _result(value, weights))
        if call.needs_grad:
            kernels.deformable_attention_backward(out, value, locations, weights, call.levels, call.wanted)

    def run(self, value: Tensor, locations: Tensor, weights: Tensor, levels: Levels) -> Tensor:
        return _forward(value, locations, weights, [n for level in levels for n in level])


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


def _bytes(call: DeformableAttentionCall) -> int:
    """Of all samples: what a query reads, and eager writes."""
    images, _, heads, channels, queries, points = call.sizes
    return images * queries * heads * points * channels * call.dtype.itemsize


def _result(value: Tensor, weights: Tensor) -> torch.dtype:
    return torch.promote_types(value.dtype, weights.dtype)


def _eager(value: Tensor, locations: Tensor, weights: Tensor, levels: Levels) -> Tensor:
    """By PyTorch's grid_sample; where that has no deterministic backward, or no forward-mode derivative, by indexing."""
    deterministic = value.is_cuda and torch.are_deterministic_algorithms_enabled()
    if (deterministic and wants_grad(value, locations, weights)) or forward_ad._current_level >= 0:
        return _by_indexing(value, locations, weights, levels)
    if not (value.numel() and weights.numel()):  # which grid_sample refuses
        nothing = sum(t.flatten()[:0].sum() for t in (value, locations, weights))  # 0, whatever they hold
        return nothing.expand(*weights.shape[:3], value.shape[-1]).to(_result(value, weights)).contiguous()  # type: ignore[union-attr]
    images, _, heads = weights.shape[:3]
    dtype = torch.promote_types(value.dtype, locations.dtype)
    planes = value.permute(0, 2, 3, 1).flatten(0, 1).to(dtype)  # (B · H, E, S)
    # Of an infinite place grid_sample makes 0 · inf. No pixel is read farther than half a level outside.
    grid = (2 * locations.to(dtype) - 1).clamp(-3.0, 3.0).transpose(1, 2).flatten(0, 1)  # (B · H, Q, K, 2)
    sizes = [height * width for height, width, _ in levels]
    samples = []
    for plane, places, (height, width, n) in zip(
        planes.split(sizes, -1), grid.split([n for *_, n in levels], 2), levels
    ):
        if height * width == 0:
            samples.append(plane.new_zeros(*plane.shape[:2], places.shape[1], n))
            continue
        image = plane.unflatten(-1, (height, width))
        samples.append(F.grid_sample(image, places, mode="bilinear", padding_mode="zeros", align_corners=False))
    share = weights.transpose(1, 2).flatten(0, 1)[:, None]  # (B · H, 1, Q, K)
    out = (torch.cat(samples, -1) * share).sum(-1)  # (B · H, E, Q)
    return out.unflatten(0, (images, heads)).permute(0, 3, 1, 2).to(_result(value, weights)).contiguous()


def _by_indexing(value: Tensor, locations: Tensor, weights: Tensor, levels: Levels) -> Tensor:
    """The same by indexing, whose backward is deterministic, and has a backward of its own."""
    dtype = torch.promote_types(torch.promote_types(value.dtype, locations.dtype), torch.float32)
    images, _, heads, _ = value.shape

    def per_point(numbers: Iterable[int], kind: torch.dtype) -> Tensor:
        """One number of each level, as often as it has points; written by the device, so that a CUDA graph may hold it."""
        pairs = zip(numbers, levels)
        return torch.cat([torch.full((n,), number, dtype=kind, device=value.device) for number, (*_, n) in pairs])

    heights, widths = zip(*(level[:2] for level in levels))
    first = per_point(accumulate((h * w for h, w, _ in levels[:-1]), initial=0), torch.int64)
    size = torch.stack([per_point(widths, dtype), per_point(heights, dtype)], -1)
    # As far outside as any: what is farther, infinitely, would be NaN.
    position = (locations.to(dtype) * size - 0.5).clamp(min=-2.0).minimum(size + 1.0)
    pixel = position.detach().floor()
    way = position - pixel
    image = torch.arange(images, device=value.device)[:, None, None, None]
    head = torch.arange(heads, device=value.device)[:, None]
    out: Any = 0
    for right in (0, 1):
        for below in (0, 1):
            corner = torch.stack([pixel[..., 0] + right, pixel[..., 1] + below], -1)
            there = ((corner >= 0) & (corner < size)).all(-1)
            x, y = torch.where(there[..., None], corner, 0.0).long().unbind(-1)
            row = torch.where(there, first + y * size[:, 0].long() + x, 0)
            share = (way[..., 0] if right else 1 - way[..., 0]) * (way[..., 1] if below else 1 - way[..., 1])
            found = value.to(dtype)[image, row, head]  # (B, Q, H, K, E)
            out = out + ((share * there * weights.to(dtype))[..., None] * found).sum(-2)
    return out.to(_result(value, weights))  # type: ignore[no-any-return]


# ---------------------------------------------------------------------------------------------------------------------
# Registration: forward and backward are ops of their own. sizes: height, width and points of each level, one after the other.


def _triples(sizes: Sequence[int]) -> Levels:
    return tuple((sizes[i], sizes[i + 1], sizes[i + 2]) for i in range(0, len(sizes), 3))


_promoted = cache(torch.promote_types)  # which is an operation: launchers that call none are repeated at less cost


def _run_forward(value: Tensor, locations: Tensor, weights: Tensor, sizes: Sequence[int]) -> Tensor:
    return kernels.deformable_attention_forward(
        value, locations, weights, _triples(sizes), _promoted(value.dtype, weights.dtype)
    )


def _fake_forward(value: Tensor, locations: Tensor, weights: Tensor, sizes: Sequence[int]) -> Tensor:
    return value.new_empty((*weights.shape[:3], value.shape[-1]), dtype=_result(value, weights))


def _run_backward(
    dout: Tensor, value: Tensor, locations: Tensor, weights: Tensor, sizes: Sequence[int], wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    given = _triples(sizes), (wanted[0], wanted[1], wanted[2])
    found = kernels.deformable_attention_backward(dout, value, locations, weights, *given)
    dvalue, dlocations, dweights = (
        t.new_empty(0) if g is None else g for g, t in zip(found, (value, locations, weights))
    )
    return dvalue, dlocations, dweights


def _fake_backward(
    dout: Tensor, value: Tensor, locations: Tensor, weights: Tensor, sizes: Sequence[int], wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    dvalue, dlocations, dweights = (
        t.new_empty(t.shape if want else 0) for t, want in zip((value, locations, weights), wanted)
    )
    return dvalue, dlocations, dweights


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, locations: Tensor, weights: Tensor, sizes: list[int]) -> Tensor:
        ctx.save_for_backward(value, locations, weights)
        ctx.sizes = sizes
        return _forward.below(value, locations, weights, sizes)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:
        wanted = list(ctx.needs_input_grad[:3])
        found = _backward(dout, *ctx.saved_tensors, ctx.sizes, wanted)
        return *(g if want else None for g, want in zip(found, wanted)), None


class _Backward(torch.autograd.Function):
    """The first backward; its own backward is eager."""

    @staticmethod
    def forward(
        ctx: Any, dout: Tensor, value: Tensor, locations: Tensor, weights: Tensor, sizes: list[int], wanted: list[bool]
    ) -> Any:
        ctx.save_for_backward(dout, value, locations, weights)
        ctx.sizes, ctx.wanted = sizes, wanted
        ctx.set_materialize_grads(False)
        return _backward.below(dout, value, locations, weights, sizes, wanted)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> Any:
        dout, *inputs = ctx.saved_tensors

        def reference(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
            return _by_indexing(value, locations, weights, _triples(ctx.sizes))

        d_dout, found = double_backward(reference, inputs, dout, ctx.wanted, upstream)
        return d_dout, *found, None, None


def _autograd_forward(value: Tensor, locations: Tensor, weights: Tensor, sizes: list[int]) -> Any:
    call = _Forward.apply if wants_grad(value, locations, weights) else _forward.below
    return call(value, locations, weights, sizes)


def _autograd_backward(dout: Tensor, value: Tensor, locations: Tensor, weights: Tensor, *rest: Any) -> Any:
    call = _Backward.apply if wants_grad(dout, value, locations, weights) else _backward.below
    return call(dout, value, locations, weights, *rest)


_forward = define(
    "deformable_attention(Tensor value, Tensor locations, Tensor weights, int[] sizes) -> Tensor",
    run=_run_forward,
    fake=_fake_forward,
    autograd=_autograd_forward,
)
_backward = define(
    "deformable_attention_backward(Tensor dout, Tensor value, Tensor locations, Tensor weights, int[] sizes, bool[3] wanted) "
    "-> (Tensor, Tensor, Tensor)",
    run=_run_backward,
    fake=_fake_backward,
    autograd=_autograd_backward,
)
