# mypy: allow-incomplete-defs
"""Where each pixel lies in the visible part of its image, as sines and cosines: one launch from the padding mask.

    y[n, i, j] = visible pixels of column j, rows 0 to i,   x[n, i, j] = visible pixels of row i, columns 0 to j
    normalised: y = (y + shift) / (y of the last row + 1e-6) * scale,   x alike
    out[n, i, j] = (wave(y, 0), wave(y, 1), ..., wave(x, 0), wave(x, 1), ...),   F channels each
    wave(p, k) = sin(p / temperature**(2 (k // 2) / F)), for odd k the cosine

Counting is cheap where a program needs few columns: each reads its columns and its row. So nothing is written but the result.
Source: Carion et al., 2020, arXiv:2005.12872, section A.4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache, partial

import torch
from torch import Tensor

from .entry import Budget, Entry
from .launch import Variant, compile_variant, empty, jit, launch, pointer, tl
from .overlap import wait_for_previous

MAX_GRID = 65_535  # images, and rows
MAX_IMAGE = 1 << 31  # elements: offsets inside an image are 32 bits wide
MAX_FEATURES = 2048


@jit
def wave(angle, quarters):
    """sin(angle + quarters * pi / 2), of angles up to some ten thousands, to 2**-23.

    Whole quarters of a turn are taken off in three parts, the first two of which are exact. What is left is in [-pi/4, pi/4], for
    which there are polynomials of sine and cosine. Source: S. L. Moshier, Cephes, single/sinf.c.
    """
    turned = tl.floor(angle * 0.6366197723675814 + 0.5)
    rest = angle - turned * 1.5703125
    rest -= turned * 4.837512969970703125e-4
    rest -= turned * 7.54978995489188216e-8
    square = rest * rest
    sine = ((square * -1.9515295891e-4 + 8.3321608736e-3) * square - 1.6666654611e-1) * square * rest + rest
    cosine = ((square * 2.443315711809948e-5 - 1.388731625493765e-3) * square + 4.166664568298827e-2) * square * square
    cosine += 1.0 - 0.5 * square
    quadrant = (turned - 4.0 * tl.floor(turned * 0.25)).to(tl.int32) + quarters
    value = tl.where(quadrant % 2 == 0, sine, cosine)
    return tl.where((quadrant & 2) == 0, value, -value)


@jit
def sine_positions_kernel(
    mask_ptr,
    out_ptr,
    image_stride: tl.int64,
    row_stride: tl.int32,
    column_stride: tl.int32,
    height: tl.int32,
    width: tl.int32,
    scale: tl.float32,
    shift: tl.float32,
    rate: tl.float32,
    padding: tl.int32,
    FEATURES: tl.constexpr,
    NORMALIZED: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """BLOCK_J columns of a row a program. rate: 2 log2(temperature) / FEATURES. padding: what the mask says of it, 1 or 0."""
    wait_for_previous()
    j = tl.program_id(0) * BLOCK_J + tl.arange(0, BLOCK_J)
    i = tl.program_id(1)
    image = tl.program_id(2).to(tl.int64)
    mask_ptr += image * image_stride

    y = tl.zeros((BLOCK_J,), tl.int32)
    rows = tl.zeros((BLOCK_J,), tl.int32)
    for start in range(0, height, BLOCK_N):
        row = start + tl.arange(0, BLOCK_N)[:, None]
        inside = (row < height) & (j < width)[None, :]
        said = tl.load(mask_ptr + row * row_stride + j[None, :] * column_stride, mask=inside, other=0).to(tl.int32)
        visible = tl.where(inside & (said != padding), 1, 0)
        rows += tl.sum(visible, axis=0)
        y += tl.sum(tl.where(row <= i, visible, 0), axis=0)
    x = tl.zeros((BLOCK_J,), tl.int32)
    columns = tl.zeros((BLOCK_J,), tl.int32)
    for start in range(0, width, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)[None, :]
        place = mask_ptr + i * row_stride + column * column_stride
        said = tl.load(place, mask=column < width, other=0).to(tl.int32)
        visible = tl.where((column < width) & (said != padding), 1, 0)
        columns += tl.sum(visible, axis=1)
        x += tl.sum(tl.where(column <= j[:, None], visible, 0), axis=1)

    y_position, x_position = y.to(tl.float32), x.to(tl.float32)
    if NORMALIZED:
        y_position = (y_position + shift) / (rows.to(tl.float32) + 1e-6) * scale
        x_position = (x_position + shift) / (columns.to(tl.float32) + 1e-6) * scale

    c = tl.arange(0, BLOCK_C)[None, :]
    of_row = c < FEATURES
    k = tl.where(of_row, c, c - FEATURES)
    angle = tl.where(of_row, y_position[:, None], x_position[:, None]) * tl.exp2((k // 2).to(tl.float32) * -rate)
    value = wave(angle, k % 2)
    inside = (j < width)[:, None] & (c < 2 * FEATURES)
    pointers = out_ptr + (image * height + i) * width * (2 * FEATURES) + (j[:, None] * (2 * FEATURES) + c)
    tl.store(pointers, value.to(out_ptr.dtype.element_ty), mask=inside)


def sine_positions(
    mask: Tensor,
    features: int,
    temperature: float,
    normalize: bool,
    scale: float,
    shift: float,
    padding: bool,
    dtype: torch.dtype,
) -> Tensor:
    """mask (N, H, W) bool, `padding` where pixels are hidden -> (N, H, W, 2 * features) of `dtype`, contiguous.

    Raises ValueError for an odd number of features or over 2,048, more than a grid holds, or an image of 2**31 elements.
    """
    if reason := why_not(tuple(mask.shape), features):
        raise ValueError(f"got a mask of shape {tuple(mask.shape)} and {features} features an axis: {reason}")
    if sum(stride * size for stride, size in zip(mask.stride()[1:], mask.shape[1:])) >= MAX_IMAGE:
        mask = mask.contiguous()
    batch, height, width = mask.shape
    out = empty((batch, height, width, 2 * features), dtype, mask.device)
    variant = sine_positions_variant(features, normalize, dtype)
    grid = (-(-width // int(variant.constants["BLOCK_J"])), height, batch)
    rate = 2 * math.log2(temperature) / features
    launch(variant, grid, mask, out, *mask.stride(), height, width, float(scale), float(shift), rate, int(padding))
    return out


def why_not(shape: tuple[int, ...], features: int) -> str | None:
    """Why the kernel takes no such mask (N, H, W), in words, or None."""
    batch, height, width = shape
    if features < 2 or features % 2 or features > MAX_FEATURES:
        return f"it takes an even number of features, up to {MAX_FEATURES:,}"
    if max(batch, height) > MAX_GRID or height * width * 2 * features >= MAX_IMAGE:
        return f"it takes up to {MAX_GRID:,} images of as many rows, each of less than 2**31 elements"
    return None


def compile_sine_positions(features: int, normalize: bool, dtype: torch.dtype, device: torch.device) -> None:
    """Compile what `sine_positions` launches."""
    compile_variant(sine_positions_variant(features, normalize, dtype), device)


@cache
def sine_positions_variant(features: int, normalize: bool, dtype: torch.dtype) -> Variant:
    """The program: 16 elements a lane at most, and 32 rows or columns counted at once, a feature map's usual height."""
    types = (*map(pointer, (torch.bool, dtype)), "i64", *["i32"] * 4, *["fp32"] * 3, "i32")
    block = 1 << (2 * features - 1).bit_length()
    constants = {
        "FEATURES": features,
        "NORMALIZED": normalize,
        "BLOCK_J": max(1, min(32, 2048 // block)),
        "BLOCK_C": block,
        "BLOCK_N": 32,
    }
    return Variant(sine_positions_kernel, types, constants, num_warps=4)


def catalog_entries() -> Iterator[Entry]:
    variant, example = sine_positions_variant(128, True, torch.bfloat16), partial(_example, torch.bfloat16)
    yield Entry("sine_positions", "sine_positions_bf16", variant, 2048, Budget(64, 1024, 64, 1024), example)


def _example(dtype: torch.dtype, device: torch.device) -> Callable[[], tuple[Tensor, ...]]:
    """A small image beside a whole one, with more columns than a program writes and more rows than are counted at once."""
    mask = torch.zeros(2, 35, 11, dtype=torch.bool, device=device)
    mask[1, 20:], mask[1, :, 7:] = True, True
    return lambda: (sine_positions(mask, 128, 10_000.0, True, 2 * math.pi, 0.0, True, dtype),)
