# mypy: allow-incomplete-defs
"""What deformable attention's kernels share: a program's queries, levels and points, the pixels around a point, and a point's weight."""

from __future__ import annotations

from .launch import jit, tl
from .rows import column_block


@jit
def place_of(
    queries, heads, channels, BLOCK_Q: tl.constexpr, BLOCK_E: tl.constexpr, FULL: tl.constexpr, VEC: tl.constexpr
):
    """A program's image (int64) and head; its queries, and which exist; channels, and which exist."""
    blocks = tl.cdiv(queries, BLOCK_Q)
    problem, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    query = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    column, inside, _ = column_block(channels, BLOCK_E, FULL, VEC)
    return (problem // heads).to(tl.int64), problem % heads, query, query < queries, column, inside


@jit
def level_size(shapes_ptr, level, height, width, left):
    """A level's height and width, from the device where they lie there, and whether it fits into the rows that are left; else it has none."""
    fits = True
    if shapes_ptr is not None:
        high, wide = tl.load(shapes_ptr + 2 * level), tl.load(shapes_ptr + 2 * level + 1)
        fits = (high >= 0) & (wide >= 0) & (high < 1 << 31) & (wide < 1 << 31) & (high * wide <= left)
        height, width = tl.where(fits, high, 0).to(tl.int32), tl.where(fits, wide, 0).to(tl.int32)
    return height, width, fits


@jit
def load_point(location_ptr, weight_ptr, point, exists):
    """x, y and weight of a point of each query, fp32; outside of all levels where there is no query."""
    x = tl.load(location_ptr + point * 2, mask=exists, other=-1.0).to(tl.float32)
    y = tl.load(location_ptr + point * 2 + 1, mask=exists, other=-1.0).to(tl.float32)
    return x, y, tl.load(weight_ptr + point, mask=exists, other=0.0).to(tl.float32)


@jit
def load_reference(pointers, exists, height, width, extent, COORDINATES: tl.constexpr):
    """Column and row of each query's reference, outside of the level where there is no query, and how many pixels an offset of 1 goes, fp32."""
    x = tl.load(pointers, mask=exists, other=-3.0).to(tl.float32) * width - 0.5
    y = tl.load(pointers + 1, mask=exists, other=-3.0).to(tl.float32) * height - 0.5
    step_x, step_y = 1.0, 1.0
    if COORDINATES == 4:  # of a box
        step_x = tl.load(pointers + 2, mask=exists, other=0.0).to(tl.float32) * (extent * width)
        step_y = tl.load(pointers + 3, mask=exists, other=0.0).to(tl.float32) * (extent * height)
    return x, y, step_x, step_y


@jit
def peak_of(logit_ptr, base, exists, points):
    """The largest of each query's logits, in bits, as `softmax_share` takes it."""
    # One by one, as points are read later: a block of logits has another layout, in which the compiler works out all points again.
    peak = tl.where(exists, float("-inf"), 0.0)
    for k in range(points):
        logit = tl.load(logit_ptr + base + k, mask=exists, other=0.0).to(tl.float32)
        peak = tl.maximum(peak, logit * 1.4426950408889634)
    return peak


@jit
def softmax_share(logit, peak):
    """exp(logit) over that of the largest."""
    return tl.exp2(logit * 1.4426950408889634 - peak)


@jit
def cell(position, size):
    """The pixel at or before a position in pixels, in [-2, size + 1], and how far behind it that is, which stays NaN."""
    pixel = tl.floor(tl.minimum(tl.maximum(position, -2.0), size + 1.0))  # of NaN -2
    position = tl.maximum(position, -2.0, propagate_nan=tl.PropagateNan.ALL)
    position = tl.minimum(position, size + 1.0, propagate_nan=tl.PropagateNan.ALL)
    return pixel.to(tl.int32), position - pixel


@jit
def is_there(pixel, size):
    return (pixel >= 0) & (pixel < size)


@jit
def share_of(way, AFTER: tl.constexpr):
    """What the pixel before, or after, has in a value that is `way` behind the one before."""
    return way if AFTER else 1.0 - way
