# mypy: allow-incomplete-defs
"""Multi-scale deformable attention: each query reads a few points of each level of features, between pixels.

    out[b, q, h] = sum over points k of weight[b, q, h, k] * value of k's level and of head h, at location[b, q, h, k]

A location is (x, y) in units of its level's width and height: pixel (column, row) lies at ((column + 1/2) / width, (row + 1/2) /
height), between pixels values are interpolated linearly, and what lies outside of a level is zero.

One program takes a block of queries of one image and head, and goes over their points. A corner's row, the channels of a head, is
read at once. The backward reads the corners again, sums dout * corner over channels for the gradients of weights and locations,
and adds to the corners' gradients by atomics, in fp32 and in no fixed order. Arithmetic is fp32.
Source: Zhu et al., 2020, arXiv:2010.04159 (Deformable DETR), section 4.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, lru_cache, partial

import torch
from torch import Tensor

from .configs import DEFORMABLE_FEW, deformable_config
from .entry import Budget, Entry
from .launch import Variant, empty, jit, launch, pointer, tl
from .overlap import wait_for_previous
from .rows import MAX_PLANS, Plan, address_of, arriving_rows, column_block, run_length, run_pointers

MAX_LEVELS = 6
MAX_HEAD_DIM = 256
MAX_ELEMENTS = (1 << 31) - 1  # of one image's values and locations: offsets within an image are 32 bits

Level = tuple[int, int, int]  # height, width, points


@jit
def deformable_attention_kernel(
    value_ptr,
    location_ptr,
    weight_ptr,
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
    LEVELS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_E: tl.constexpr,
    FULL: tl.constexpr,
    VEC: tl.constexpr,
):
    """value (B, rows, heads, channels), location (B, queries, heads, points, 2), weight (B, queries, heads, points) -> out (B, queries, heads, channels)."""
    wait_for_previous()
    heights = (height_0, height_1, height_2, height_3, height_4, height_5)
    widths = (width_0, width_1, width_2, width_3, width_4, width_5)
    counts = (points_0, points_1, points_2, points_3, points_4, points_5)
    image, head, query, exists, column, inside = _place(queries, heads, channels, BLOCK_Q, BLOCK_E, FULL, VEC)
    row_size = heads * channels
    value_ptr += image * rows * row_size + head * channels
    location_ptr += image * queries * heads * points * 2
    weight_ptr += image * queries * heads * points
    base = (query * heads + head) * points
    total = tl.zeros((BLOCK_Q, BLOCK_E), tl.float32)
    first, begun = 0, 0
    for level in tl.static_range(LEVELS):
        height, width = heights[level], widths[level]
        for k in range(begun, begun + counts[level]):
            point = base + k
            x, y, weight = _load_point(location_ptr, weight_ptr, point, exists)
            x0, right = _cell(x, width)
            y0, below = _cell(y, height)
            row = first + y0 * width + x0
            for corner in tl.static_range(4):
                there = _is_there(x0 + corner % 2, width) & _is_there(y0 + corner // 2, height)
                share = _share(right, corner % 2) * _share(below, corner // 2)
                start = (row + (corner // 2) * width + corner % 2) * row_size
                pointers = run_pointers(value_ptr, start[:, None], column, VEC)
                found = tl.load(pointers, mask=there[:, None] & inside, other=0.0).to(tl.float32)
                total += (weight * share)[:, None] * found
        first += height * width
        begun += counts[level]
    start = (query * heads + head) * channels
    pointers = run_pointers(out_ptr + image * queries * row_size, start[:, None], column, VEC)
    tl.store(pointers, total.to(out_ptr.dtype.element_ty), mask=exists[:, None] & inside)


@jit
def deformable_attention_backward_kernel(
    dout_ptr,
    value_ptr,
    location_ptr,
    weight_ptr,
    dvalue_ptr,
    dlocation_ptr,
    dweight_ptr,
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
    LEVELS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_E: tl.constexpr,
    FULL: tl.constexpr,
    VEC: tl.constexpr,
):
    """dout (B, queries, heads, channels) -> dvalue, fp32, added to; dlocation and dweight; each may be left out."""
    wait_for_previous()
    heights = (height_0, height_1, height_2, height_3, height_4, height_5)
    widths = (width_0, width_1, width_2, width_3, width_4, width_5)
    counts = (points_0, points_1, points_2, points_3, points_4, points_5)
    image, head, query, exists, column, inside = _place(queries, heads, channels, BLOCK_Q, BLOCK_E, FULL, VEC)
    row_size = heads * channels
    values = image * rows * row_size + head * channels
    place = image * queries * heads * points
    location_ptr += place * 2
    weight_ptr += place
    start = (query * heads + head) * channels
    arriving = run_pointers(dout_ptr + image * queries * row_size, start[:, None], column, VEC)
    dout = tl.load(arriving, mask=exists[:, None] & inside, other=0.0).to(tl.float32)
    base = (query * heads + head) * points
    first, begun = 0, 0
    for level in tl.static_range(LEVELS):
        height, width = heights[level], widths[level]
        for k in range(begun, begun + counts[level]):
            point = base + k
            x, y, weight = _load_point(location_ptr, weight_ptr, point, exists)
            x0, right = _cell(x, width)
            y0, below = _cell(y, height)
            row = first + y0 * width + x0
            dx = tl.zeros((BLOCK_Q,), tl.float32)
            dy = tl.zeros((BLOCK_Q,), tl.float32)
            dweight = tl.zeros((BLOCK_Q,), tl.float32)
            for corner in tl.static_range(4):
                there = _is_there(x0 + corner % 2, width) & _is_there(y0 + corner // 2, height)
                there = there[:, None] & inside
                across, down = _share(right, corner % 2), _share(below, corner // 2)
                begin = ((row + (corner // 2) * width + corner % 2) * row_size)[:, None]
                if dvalue_ptr is not None:
                    grown = (weight * across * down)[:, None] * dout
                    pointers = run_pointers(dvalue_ptr + values, begin, column, VEC)
                    tl.atomic_add(pointers, grown, mask=there, sem="relaxed")
                if dweight_ptr is not None or dlocation_ptr is not None:
                    found = tl.load(run_pointers(value_ptr + values, begin, column, VEC), mask=there, other=0.0)
                    product = tl.sum(found.to(tl.float32) * dout, axis=1)
                    dweight += across * down * product
                    dx += (down if corner % 2 == 1 else -down) * product
                    dy += (across if corner // 2 == 1 else -across) * product
            if dweight_ptr is not None:
                tl.store(dweight_ptr + place + point, dweight.to(dweight_ptr.dtype.element_ty), mask=exists)
            if dlocation_ptr is not None:
                coordinate = dlocation_ptr + place * 2 + point * 2
                element = dlocation_ptr.dtype.element_ty
                tl.store(coordinate, (dx * weight * width).to(element), mask=exists)
                tl.store(coordinate + 1, (dy * weight * height).to(element), mask=exists)
        first += height * width
        begun += counts[level]


@jit
def _place(
    queries, heads, channels, BLOCK_Q: tl.constexpr, BLOCK_E: tl.constexpr, FULL: tl.constexpr, VEC: tl.constexpr
):
    """A program's image (int64) and head; its queries, and which exist; channels, and which exist."""
    blocks = tl.cdiv(queries, BLOCK_Q)
    problem, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    query = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    column, inside, _ = column_block(channels, BLOCK_E, FULL, VEC)
    return (problem // heads).to(tl.int64), problem % heads, query, query < queries, column, inside


@jit
def _load_point(location_ptr, weight_ptr, point, exists):
    """x, y and weight of a point of each query, fp32; outside of all levels where there is no query."""
    x = tl.load(location_ptr + point * 2, mask=exists, other=-1.0).to(tl.float32)
    y = tl.load(location_ptr + point * 2 + 1, mask=exists, other=-1.0).to(tl.float32)
    return x, y, tl.load(weight_ptr + point, mask=exists, other=0.0).to(tl.float32)


@jit
def _cell(x, size):
    """The pixel at or before a coordinate, in [-2, size + 1], and how far behind it that is, which stays NaN."""
    position = x * size - 0.5
    pixel = tl.floor(tl.minimum(tl.maximum(position, -2.0), size + 1.0))  # of NaN -2
    position = tl.maximum(position, -2.0, propagate_nan=tl.PropagateNan.ALL)
    position = tl.minimum(position, size + 1.0, propagate_nan=tl.PropagateNan.ALL)
    return pixel.to(tl.int32), position - pixel


@jit
def _is_there(pixel, size):
    return (pixel >= 0) & (pixel < size)


@jit
def _share(way, AFTER: tl.constexpr):
    """What the pixel before, or after, has in a value that is `way` behind the one before."""
    return way if AFTER else 1.0 - way


def deformable_attention_forward(
    value: Tensor, location: Tensor, weight: Tensor, levels: tuple[Level, ...], dtype: torch.dtype
) -> Tensor:
    """out (B, Q, H, E) in `dtype`.

    value (B, S, H, E), location (B, Q, H, K, 2) and weight (B, Q, H, K) in fp16, bf16 or fp32, each its own. levels: height, width
    and points of each, which are S = Σ height · width rows and K = Σ points, level after level.
    """
    value, location, weight = (t.contiguous() for t in (value, location, weight))
    out = empty((*location.shape[:3], value.shape[-1]), dtype, value.device)
    dtypes = value.dtype, location.dtype, weight.dtype, dtype
    sizes = location.shape[0], *value.shape[1:], location.shape[1]
    addresses = (address_of(value) | address_of(out)) % 16
    plan = _plan_forward(sizes, levels, dtypes, addresses)
    launch(plan.variant, plan.grid, value, location, weight, out, *plan.sizes)
    return out


def deformable_attention_backward(
    dout: Tensor,
    value: Tensor,
    location: Tensor,
    weight: Tensor,
    levels: tuple[Level, ...],
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients for value, location and weight, in their dtypes, those that are wanted; the value's not deterministic."""
    dout, value, location, weight = (t.contiguous() for t in (dout, value, location, weight))
    dout, _ = arriving_rows(dout)
    dvalue = torch.zeros(value.shape, dtype=torch.float32, device=value.device) if wanted[0] else None
    dlocation, dweight = (
        empty(t.shape, t.dtype, t.device) if want else None for t, want in zip((location, weight), wanted[1:])
    )
    if dout.numel() and weight.numel() and any(wanted):
        dtypes = dout.dtype, value.dtype, location.dtype, weight.dtype
        sizes = location.shape[0], *value.shape[1:], location.shape[1]
        addresses = (address_of(dout) | address_of(value) | address_of(dvalue)) % 16
        plan = _plan_backward(sizes, levels, dtypes, wanted, addresses)
        launch(plan.variant, plan.grid, dout, value, location, weight, dvalue, dlocation, dweight, *plan.sizes)
    return None if dvalue is None else dvalue.to(value.dtype), dlocation, dweight


Sizes = tuple[int, ...]  # images, rows, heads, channels, queries


@lru_cache(maxsize=MAX_PLANS)
def _plan_forward(sizes: Sizes, levels: tuple[Level, ...], dtypes: tuple[torch.dtype, ...], offset: int) -> Plan:
    images, _, heads, channels, queries = sizes
    vector = run_length(min(dtypes[0].itemsize, dtypes[3].itemsize), channels, offset)
    few = images * heads * queries < DEFORMABLE_FEW
    return _plan(forward_variant(len(levels), channels, dtypes, vector, few), sizes, levels)


@lru_cache(maxsize=MAX_PLANS)
def _plan_backward(
    sizes: Sizes,
    levels: tuple[Level, ...],
    dtypes: tuple[torch.dtype, ...],
    wanted: tuple[bool, bool, bool],
    offset: int,
) -> Plan:
    channels = sizes[3]
    vector = run_length(min(dtypes[0].itemsize, dtypes[1].itemsize), channels, offset)
    return _plan(backward_variant(len(levels), channels, dtypes, wanted, vector), sizes, levels)


def _plan(variant: Variant, sizes: Sizes, levels: tuple[Level, ...]) -> Plan:
    images, rows, heads, channels, queries = sizes
    grid = (images * heads * -(-queries // int(variant.constants["BLOCK_Q"])),)
    points = sum(level[2] for level in levels)
    absent = (0,) * (3 * (MAX_LEVELS - len(levels)))
    return Plan(variant, grid, (rows, queries, heads, channels, points, *(n for one in levels for n in one), *absent))


@cache
def forward_variant(
    levels: int, channels: int, dtypes: tuple[torch.dtype, ...], vector: int, few: bool = False
) -> Variant:
    """The program for so many levels and channels a head; dtypes: of value, location, weight and out; few: whether queries are under DEFORMABLE_FEW."""
    return _variant(deformable_attention_kernel, levels, channels, dtypes, vector, few)


@cache
def backward_variant(
    levels: int,
    channels: int,
    dtypes: tuple[torch.dtype, ...],
    wanted: tuple[bool, bool, bool],
    vector: int,
) -> Variant:
    """The program of the backward; dtypes: of dout, value, location and weight."""
    results = (torch.float32, *dtypes[2:])
    tensors = (*dtypes, *(dtype if want else None for dtype, want in zip(results, wanted)))
    # Four channels a lane, 16 bytes of what is added, and one warp: programs of two layouts, or of more warps, exchange more.
    return _variant(deformable_attention_backward_kernel, levels, channels, tensors, min(vector, 4), True)


def _variant(
    kernel: object,
    levels: int,
    channels: int,
    tensors: tuple[torch.dtype | None, ...],
    vector: int,
    few: bool,
) -> Variant:
    config = deformable_config(channels, vector, few)
    sizes = ["i32"] * (5 + 3 * MAX_LEVELS)
    shape = {"BLOCK_Q": config.rows, "BLOCK_E": config.columns, "FULL": config.columns == channels, "VEC": vector}
    constants = {"LEVELS": levels, **shape}
    return Variant(kernel, (*map(pointer, tensors), *sizes), constants, config.num_warps)


def catalog_entries() -> Iterator[Entry]:
    bf16, fp32 = torch.bfloat16, torch.float32
    op, given, example = "deformable_attention", (bf16, bf16, fp32, bf16), partial(_example, bf16)
    forward = forward_variant(4, 32, (bf16, fp32, bf16, bf16), 8, True)
    yield Entry(op, f"{op}_forward", forward, 8 * 32, Budget(72, 0, 64, 0), example)
    backward = backward_variant(4, 32, given, (True, True, True), 8)
    yield Entry(op, f"{op}_backward", backward, 8 * 32, Budget(168, 1024, 96, 1024), example)


def _example(dtype: torch.dtype, device: torch.device) -> Callable[[], tuple[Tensor, ...]]:
    """Two images, two heads of 32 channels, four levels of 2 points; queries in two blocks, some of their points outside."""
    levels = ((3, 5, 2), (2, 3, 2), (2, 2, 2), (1, 1, 2))
    value, dout = (torch.randn(2, n, 2, 32, device=device).to(dtype) for n in (26, 11))
    location = torch.rand(2, 11, 2, 8, 2, device=device) * 1.4 - 0.2
    weight = torch.rand(2, 11, 2, 8, device=device).to(dtype)

    def call() -> tuple[Tensor, ...]:
        out = deformable_attention_forward(value, location, weight, levels, dtype)
        found = deformable_attention_backward(dout, value, location, weight, levels, (True, True, True))
        return (out, *(t for t in found if t is not None))

    return call
