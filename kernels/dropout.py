# mypy: allow-incomplete-defs
"""Dropout masks from Philox4x32 with 7 rounds, whose counter is the position alone.

    key = seed (64 bits, read from a tensor),   counter = (column group, row, batch·head, offset of the op)

So every tile shape, the backward, and the eager twin in `detr_fast/ops/dropout.py` produce the same mask. One Philox call
gives eight draws of 16 bits; p therefore has a resolution of 2**-16, and the scale is that of the p really applied, so
that the expectation is kept exactly. Which eight positions share a call is part of the definition:

- `keep_rows`, for row-wise kernels: eight neighbouring columns, which 16-byte accesses keep in one thread;
- `keep_tile`, for tiles of `tl.dot`: rows r and r + 8, columns c, c + 1, c + 8 and c + 9, which tensor cores' accumulators
  keep in one thread (rows r and r + 8, columns c and c + 8 also where the tile is transposed).

Each element's expression holds the whole call, and the compiler sees that the elements of a thread share it. Static
figures on sm_80 and sm_90, compare, select and scale included: 10 instructions an element in a row-wise kernel, 8 on a
128×64 accumulator, 11 where it is transposed; draws of 32 bits would take 4 more, and of 8 bits 2 less, but p = 0.1 would
become 0.102. Seven rounds are the fewest that pass BigCrush.
Source: Salmon et al., 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

from .launch import jit, tl

STEPS = 1 << 16  # of a draw: p's resolution


def kept_steps(p: float) -> int:
    """How many of the 2**16 values of a draw keep an element: 0 for p = 1, under 2**16 for any p over 0."""
    return min(round((1.0 - p) * STEPS), STEPS - 1)


def threshold(p: float) -> int:
    """The kernels' argument, an int32: an element is kept where its draw, as the high half of an int32, is below it."""
    return (kept_steps(p) - STEPS // 2) << 16


def scale(p: float) -> float:
    """What a kept element is multiplied by: 1 / (1 - p) for the p really applied; 0 where all are dropped."""
    kept = kept_steps(p)
    return STEPS / kept if kept else 0.0


class Dropout(NamedTuple):
    """What an op drops: where the seed lies (int64, one element), the op's offset, and p, over 0."""

    seed: Tensor
    offset: int
    p: float


def dropout_arguments(dropout: Dropout | None) -> tuple[int, int, float]:
    """The kernels' offset, threshold and scale."""
    return (0, 0, 1.0) if dropout is None else (dropout.offset, *_threshold_and_scale(dropout.p))


@lru_cache(maxsize=64)
def _threshold_and_scale(p: float) -> tuple[int, float]:
    return threshold(p), scale(p)


@jit
def load_seed(seed_ptr):
    """The seed, an int64 in memory, as two uint32 (low, high)."""
    seed = tl.load(seed_ptr).to(tl.uint64, bitcast=True)
    return seed.to(tl.uint32), (seed >> 32).to(tl.uint32)


@jit
def keep_rows(low, high, offset, threshold, row, start, BLOCK_C: tl.constexpr):
    """Which elements are kept: rows `row` (ROWS, 1), int64, columns start ... start + BLOCK_C - 1, start a multiple of 8.

    low, high: from `load_seed`. offset: of the op, int32. threshold: int32, from the function of that name.
    """
    column = tl.arange(0, BLOCK_C)[None, :]
    group = (start // 8 + column // 8).to(tl.uint32)
    words = _philox(low, high, group, row.to(tl.uint32), (row >> 32).to(tl.uint32), tl.cast(offset, tl.uint32))
    return _draw(words, column & 4, column & 2, column & 1) < threshold


@jit
def keep_tile(
    low,
    high,
    offset,
    threshold,
    head,
    row_start,
    column_start,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TRANSPOSED: tl.constexpr = False,
):
    """Which elements of a tile are kept, (ROWS, COLUMNS), or (COLUMNS, ROWS) where TRANSPOSED.

    head: batch · heads + head, int32. row_start, column_start: int32, multiples of 16. The rest as in `keep_rows`.
    """
    if TRANSPOSED:
        row = tl.arange(0, ROWS)[None, :]
        column = tl.arange(0, COLUMNS)[:, None]
    else:
        row = tl.arange(0, ROWS)[:, None]
        column = tl.arange(0, COLUMNS)[None, :]
    # Of 16 rows 8 remain, of 16 columns 4: bits 3 of both and 0 of the column choose among the call's draws.
    rows = row_start // 16 * 8 + (row // 16 * 8 + row % 8)
    columns = column_start // 16 * 4 + (column // 16 * 4 + column % 8 // 2)
    head, offset = tl.cast(head, tl.uint32), tl.cast(offset, tl.uint32)
    words = _philox(low, high, columns.to(tl.uint32), rows.to(tl.uint32), head, offset)
    return _draw(words, row & 8, column & 8, column & 1) < threshold


@jit
def _philox(k0, k1, c0, c1, c2, c3):
    for _ in tl.static_range(7):
        a = c0.to(tl.uint64) * 0xD2511F53
        b = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (b >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (a >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = b.to(tl.uint32)
        c3 = a.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@jit
def _draw(words, high_pair, odd_word, high_half):
    """One of a call's eight draws, as the high half of an int32."""
    first, second, third, fourth = words
    word = tl.where(high_pair != 0, tl.where(odd_word != 0, fourth, third), tl.where(odd_word != 0, second, first))
    return tl.where(high_half != 0, word, word << 16).to(tl.int32, bitcast=True)
