# mypy: allow-incomplete-defs
"""Multi-scale deformable attention: each query reads a few points of each level of features, between pixels.

    out[b, q, h] = sum over points k of weight[b, q, h, k] * value of k's level and of head h, at location[b, q, h, k]

A location is (x, y) in units of its level's width and height: pixel (column, row) lies at ((column + 1/2) / width, (row + 1/2) /
height), between pixels values are interpolated linearly, and what lies outside of a level is zero.

The same programs take what models compute locations and weights of: a reference point or box, offsets from it, and logits, whose
softmax over a query's points they compute. Levels' sizes are numbers, or lie on the device, where the host need not know them.

One program takes a block of queries of one image and head, and goes over their points. A corner's row, the channels of a head, is
read at once. The backward reads the corners again, sums dout * corner over channels for the gradients of weights and locations,
and adds to the corners' gradients by atomics, in fp32 and in no fixed order. Arithmetic is fp32.
Source: Zhu et al., 2020, arXiv:2010.04159 (Deformable DETR), section 4.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .configs import DEFORMABLE_FEW, deformable_config
from .deformable_backward import deformable_attention_backward_kernel
from .deformable_points import (
    cell,
    is_there,
    level_size,
    load_point,
    load_reference,
    peak_of,
    place_of,
    share_of,
    softmax_share,
)
from .entry import Budget, Entry
from .launch import Variant, empty, jit, launch, pointer, tl
from .overlap import wait_for_previous
from .rows import MAX_PLANS, Plan, address_of, arriving_rows, run_length, run_pointers

MAX_LEVELS = 6
MAX_HEAD_DIM = 256
MAX_ELEMENTS = (1 << 31) - 1  # of one image's values and locations: offsets within an image are 32 bits

Level = tuple[int, int, int]  # height, width, points
Wanted = tuple[bool, bool, bool, bool]  # gradients: value's, location's, weight's, reference's
Sizes = tuple[int, ...]  # images, rows, heads, channels, queries


class Form(NamedTuple):
    """What beside values, locations and weights a program reads: a reference's coordinates and dtype, and levels' sizes."""

    coordinates: int = 0
    dtype: torch.dtype | None = None
    shapes: bool = False


PLAIN = Form()


@jit
def deformable_attention_kernel(
    value_ptr,
    location_ptr,
    weight_ptr,
    reference_ptr,
    shapes_ptr,
    out_ptr,
    rows: tl.int32,
    queries: tl.int32,
    heads: tl.int32,
    channels: tl.int32,
    points: tl.int32,
    height_0: tl.int32,
    width_0: tl.int32,
    points_0: tl.int32,
    height_1: tl.int32,
    width_1: tl.int32,
    points_1: tl.int32,
    height_2: tl.int32,
    width_2: tl.int32,
    points_2: tl.int32,
    height_3: tl.int32,
    width_3: tl.int32,
    points_3: tl.int32,
    height_4: tl.int32,
    width_4: tl.int32,
    points_4: tl.int32,
    height_5: tl.int32,
    width_5: tl.int32,
    points_5: tl.int32,
    reference_image: tl.int64,
    reference_query: tl.int64,
    reference_level: tl.int64,
    spread: tl.float32,
    LEVELS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_E: tl.constexpr,
    FULL: tl.constexpr,
    VEC: tl.constexpr,
    COORDINATES: tl.constexpr,
):
    """value (B, rows, heads, channels), location (B, queries, heads, points, 2), weight (B, queries, heads, points) -> out (B, queries, heads, channels).

    With references (B, queries, levels, COORDINATES), what is called location are offsets from them, and what is called weight logits.
    """
    wait_for_previous()
    heights = (height_0, height_1, height_2, height_3, height_4, height_5)
    widths = (width_0, width_1, width_2, width_3, width_4, width_5)
    counts = (points_0, points_1, points_2, points_3, points_4, points_5)
    image, head, query, exists, column, inside = place_of(queries, heads, channels, BLOCK_Q, BLOCK_E, FULL, VEC)
    row_size = heads * channels
    value_ptr += image * rows * row_size + head * channels
    location_ptr += image * queries * heads * points * 2
    weight_ptr += image * queries * heads * points
    base = (query * heads + head) * points
    if reference_ptr is not None:
        reference_ptr += image * reference_image
        peak = peak_of(weight_ptr, base, exists, points)
        shares = tl.zeros((BLOCK_Q,), tl.float32)
    total = tl.zeros((BLOCK_Q, BLOCK_E), tl.float32)
    first, begun, right = 0, 0, True
    for level in tl.static_range(LEVELS):
        height, width, fits = level_size(shapes_ptr, level, heights[level], widths[level], rows - first)
        right = right & fits
        if reference_ptr is not None:
            from_x, from_y, step_x, step_y = load_reference(
                reference_ptr + query.to(tl.int64) * reference_query + level * reference_level,
                exists,
                height,
                width,
                spread / tl.maximum(counts[level], 1),
                COORDINATES,
            )
        for k in range(begun, begun + counts[level]):
            point = base + k
            x, y, weight = load_point(location_ptr, weight_ptr, point, exists)
            if reference_ptr is not None:
                x, y = from_x + x * step_x, from_y + y * step_y
                weight = softmax_share(weight, peak)
                shares += weight
            else:
                x, y = x * width - 0.5, y * height - 0.5
            x0, ahead = cell(x, width)
            y0, below = cell(y, height)
            row = first + y0 * width + x0
            for corner in tl.static_range(4):
                there = is_there(x0 + corner % 2, width) & is_there(y0 + corner // 2, height)
                share = share_of(ahead, corner % 2) * share_of(below, corner // 2)
                start = (row + (corner // 2) * width + corner % 2) * row_size
                pointers = run_pointers(value_ptr, start[:, None], column, VEC)
                found = tl.load(pointers, mask=there[:, None] & inside, other=0.0).to(tl.float32)
                total += (weight * share)[:, None] * found
        first += height * width
        begun += counts[level]
    if reference_ptr is not None:
        total /= tl.where(exists & (points > 0), shares, 1.0)[:, None]
    if shapes_ptr is not None:
        total = tl.where(right & (first == rows), total, float("nan"))
    start = (query * heads + head) * channels
    pointers = run_pointers(out_ptr + image * queries * row_size, start[:, None], column, VEC)
    tl.store(pointers, total.to(out_ptr.dtype.element_ty), mask=exists[:, None] & inside)


def deformable_attention_forward(
    value: Tensor,
    location: Tensor,
    weight: Tensor,
    levels: tuple[Level, ...],
    dtype: torch.dtype,
    reference: Tensor | None = None,
    shapes: Tensor | None = None,
    spread: float = 0.0,
) -> Tensor:
    """out (B, Q, H, E) in `dtype`.

    value (B, S, H, E), location (B, Q, H, K, 2) and weight (B, Q, H, K) in fp16, bf16 or fp32, each its own. levels: height, width
    and points of each, which are S = Σ height · width rows and K = Σ points, level after level. shapes: heights and widths int64 (L, 2)
    on the device, in place of those in `levels`; where they do not make S rows, out is NaN.

    reference (B, Q, L, 2 or 4): then location holds offsets from it, in pixels, or in `spread` / points of a level times its width and
    height, and weight logits, whose softmax over all K points are the weights.
    """
    value, location, weight = (t.contiguous() for t in (value, location, weight))
    out = empty((*location.shape[:3], value.shape[-1]), dtype, value.device)
    dtypes = value.dtype, location.dtype, weight.dtype, dtype
    sizes = location.shape[0], *value.shape[1:], location.shape[1]
    addresses = (address_of(value) | address_of(out)) % 16
    reference, shapes, steps, form = _form(reference, shapes)
    plan = _plan_forward(sizes, levels, dtypes, addresses, form)
    launch(plan.variant, plan.grid, value, location, weight, reference, shapes, out, *plan.sizes, *steps, spread)
    return out


def deformable_attention_backward(
    dout: Tensor,
    value: Tensor,
    location: Tensor,
    weight: Tensor,
    levels: tuple[Level, ...],
    wanted: Wanted,
    reference: Tensor | None = None,
    shapes: Tensor | None = None,
    spread: float = 0.0,
) -> tuple[Tensor | None, ...]:
    """Gradients for value, location, weight and reference, in their dtypes, those that are wanted; the value's not deterministic."""
    dout, value, location, weight = (t.contiguous() for t in (dout, value, location, weight))
    dout, _ = arriving_rows(dout)
    dvalue = torch.zeros(value.shape, dtype=torch.float32, device=value.device) if wanted[0] else None
    dlocation, dweight = (
        empty(t.shape, t.dtype, t.device) if want else None for t, want in zip((location, weight), wanted[1:])
    )
    parts = None  # of the reference's gradient, which all heads add to
    if wanted[3] and reference is not None:
        owners = *location.shape[:3], len(levels), reference.shape[-1]
        parts = empty(owners, torch.float32, value.device) if weight.numel() else value.new_zeros(owners).float()
    if dout.numel() and weight.numel() and any(wanted):
        dtypes = dout.dtype, value.dtype, location.dtype, weight.dtype
        sizes = location.shape[0], *value.shape[1:], location.shape[1]
        addresses = (address_of(dout) | address_of(value) | address_of(dvalue)) % 16
        strided, shapes, steps, form = _form(reference, shapes)
        plan = _plan_backward(sizes, levels, dtypes, wanted, addresses, form)
        read = dout, value, location, weight, strided, shapes
        launch(plan.variant, plan.grid, *read, dvalue, dlocation, dweight, parts, *plan.sizes, *steps, spread)
    dreference = None
    if parts is not None and reference is not None:
        dreference = parts.sum(2)
        if reference.shape[2] < len(levels):  # one for all levels
            dreference = dreference.sum(2, keepdim=True)
        dreference = dreference.to(reference.dtype)
    return None if dvalue is None else dvalue.to(value.dtype), dlocation, dweight, dreference


def _form(
    reference: Tensor | None, shapes: Tensor | None
) -> tuple[Tensor | None, Tensor | None, tuple[int, int, int], Form]:
    """Both as they are read, how far apart the reference's images, queries and levels lie, and what programs depend on of both."""
    shapes = None if shapes is None else shapes.contiguous()
    if reference is None:
        return None, shapes, (0, 0, 0), Form(shapes=shapes is not None)
    if reference.stride(-1) != 1:
        reference = reference.contiguous()
    image, query, level, _ = reference.stride()
    form = Form(reference.shape[-1], reference.dtype, shapes is not None)
    return reference, shapes, (image, query, level if reference.shape[2] > 1 else 0), form


@lru_cache(maxsize=MAX_PLANS)
def _plan_forward(
    sizes: Sizes, levels: tuple[Level, ...], dtypes: tuple[torch.dtype, ...], offset: int, form: Form
) -> Plan:
    images, _, heads, channels, queries = sizes
    vector = run_length(min(dtypes[0].itemsize, dtypes[3].itemsize), channels, offset)
    few = images * heads * queries < DEFORMABLE_FEW
    return _plan(forward_variant(len(levels), channels, dtypes, vector, few, form), sizes, levels)


@lru_cache(maxsize=MAX_PLANS)
def _plan_backward(
    sizes: Sizes,
    levels: tuple[Level, ...],
    dtypes: tuple[torch.dtype, ...],
    wanted: Wanted,
    offset: int,
    form: Form,
) -> Plan:
    channels = sizes[3]
    vector = run_length(min(dtypes[0].itemsize, dtypes[1].itemsize), channels, offset)
    return _plan(backward_variant(len(levels), channels, dtypes, wanted, vector, form), sizes, levels)


def _plan(variant: Variant, sizes: Sizes, levels: tuple[Level, ...]) -> Plan:
    images, rows, heads, channels, queries = sizes
    grid = (images * heads * -(-queries // int(variant.constants["BLOCK_Q"])),)
    points = sum(level[2] for level in levels)
    absent = (0,) * (3 * (MAX_LEVELS - len(levels)))
    return Plan(variant, grid, (rows, queries, heads, channels, points, *(n for one in levels for n in one), *absent))


@cache
def forward_variant(
    levels: int,
    channels: int,
    dtypes: tuple[torch.dtype, ...],
    vector: int,
    few: bool = False,
    form: Form = PLAIN,
) -> Variant:
    """The program for so many levels and channels a head; dtypes: of value, location, weight and out; few: whether queries are under DEFORMABLE_FEW."""
    tensors = (*dtypes[:3], *_read(form), dtypes[3])
    # Of boxes, four levels and narrow heads read one by one ptxas would spill 8 bytes for 96 registers; it takes 108 to 114.
    crowded = vector == 1 and channels <= 16 and form.coordinates == 4 and levels == 4 and not (few or form.shapes)
    registers = 128 if crowded else 0
    return _variant(deformable_attention_kernel, levels, channels, tensors, vector, few, form, registers)


@cache
def backward_variant(
    levels: int,
    channels: int,
    dtypes: tuple[torch.dtype, ...],
    wanted: Wanted,
    vector: int,
    form: Form = PLAIN,
) -> Variant:
    """The program of the backward; dtypes: of dout, value, location and weight."""
    results = (torch.float32, *dtypes[2:], torch.float32)
    made = (dtype if want else None for dtype, want in zip(results, wanted))
    tensors = (*dtypes, *_read(form), *made)
    # Four channels a lane, 16 bytes of what is added, and one warp: programs of two layouts, or of more warps, exchange more.
    shape = min(vector, 4), True, form
    # ptxas would take 96 of the 108 registers that the reference's gradient needs, and spill.
    registers = 255 if wanted[3] else 0
    return _variant(deformable_attention_backward_kernel, levels, channels, tensors, *shape, registers)


def _read(form: Form) -> tuple[torch.dtype | None, torch.dtype | None]:
    return form.dtype, torch.int64 if form.shapes else None


def _variant(
    kernel: object,
    levels: int,
    channels: int,
    tensors: tuple[torch.dtype | None, ...],
    vector: int,
    few: bool,
    form: Form,
    registers: int = 0,
) -> Variant:
    config = deformable_config(channels, vector, few)
    numbers = (*["i32"] * (5 + 3 * MAX_LEVELS), *["i64"] * 3, "fp32")
    shape = {"BLOCK_Q": config.rows, "BLOCK_E": config.columns, "FULL": config.columns == channels, "VEC": vector}
    constants = {"LEVELS": levels, **shape, "COORDINATES": form.coordinates}
    return Variant(kernel, (*map(pointer, tensors), *numbers), constants, config.num_warps, registers=registers)


def catalog_entries() -> Iterator[Entry]:
    bf16, fp32 = torch.bfloat16, torch.float32
    op, given, example = "deformable_attention", (bf16, bf16, fp32, bf16), partial(_example, bf16, False)
    forward = forward_variant(4, 32, (bf16, fp32, bf16, bf16), 8, True)
    yield Entry(op, f"{op}_forward", forward, 8 * 32, Budget(72, 0, 64, 0), example)
    backward = backward_variant(4, 32, given, (True, True, True, False), 8)
    yield Entry(op, f"{op}_backward", backward, 8 * 32, Budget(168, 1024, 104, 1024), example)
    boxes, fused = Form(4, fp32, True), partial(_example, bf16, True)
    forward = forward_variant(4, 32, (bf16, bf16, bf16, bf16), 8, True, boxes)
    yield Entry(op, f"{op}_offsets_forward", forward, 8 * 32, Budget(96, 0, 64, 0), fused)
    backward = backward_variant(4, 32, (bf16,) * 4, (True,) * 4, 8, boxes)
    yield Entry(op, f"{op}_offsets_backward", backward, 8 * 32, Budget(168, 2048, 152, 2048), fused)


def _example(dtype: torch.dtype, fused: bool, device: torch.device) -> Callable[[], tuple[Tensor, ...]]:
    """Two images, two heads of 32 channels, four levels of 4 points; queries in two blocks, some of their points outside.

    fused: offsets from boxes, logits, and levels' sizes from the device.
    """
    levels = ((3, 5, 4), (2, 3, 4), (2, 2, 4), (1, 1, 4))
    value, dout = (torch.randn(2, n, 2, 32, device=device).to(dtype) for n in (26, 11))
    location = torch.rand(2, 11, 2, 16, 2, device=device) * 1.4 - 0.2
    weight = torch.rand(2, 11, 2, 16, device=device).to(dtype)
    given: dict[str, Any] = {}
    if fused:
        location = location.to(dtype)
        shapes = torch.tensor([level[:2] for level in levels], device=device)
        given = {"reference": torch.rand(2, 11, 4, 4, device=device), "shapes": shapes, "spread": 0.5}

    def call() -> tuple[Tensor, ...]:
        out = deformable_attention_forward(value, location, weight, levels, dtype, **given)
        wanted = True, True, True, fused
        found = deformable_attention_backward(dout, value, location, weight, levels, wanted, **given)
        return (out, *(t for t in found if t is not None))

    return call
