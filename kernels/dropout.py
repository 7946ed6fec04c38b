# mypy: allow-incomplete-defs
"""Dropout masks from Philox4x32 with 7 rounds, whose counter is the position alone.

    key = seed (64 bits, read from a tensor),   counter = (column group, row, batch·head, offset of the op)

So every tile shape, the backward, and the eager twin in `detr_fast/ops/dropout.py` produce the same mask. One Philox call
gives eight draws of 16 bits; p therefore has a resolution of 2**-16, and the scale is that of the p really applied, so
that the expectation is kept exactly. Which eight positions share a call is part of the definition:

- `keep_rows`, for row-wise kernels: eight neighbouring columns, which 16-byte accesses keep in one thread;
- `keep_tile`, for tiles of `tl.dot`: rows r and r + 8, columns c, c + 1, c + 8 and c + 9, which tensor cores' accumulators
  keep in one thread (rows r and r + 8, columns c and c + 8 also where the tile is transposed).

Each element's expression holds the whole call, and the compiler sees that the elements of a thread share it. In tiles, a
draw counts as a float of 16 bits, dropped where it is under a bound (or kept, where fewer are kept than dropped; NaN is under
none): NVIDIA's GPUs compare two such numbers at once (`drop_pairs`), and need not take words apart. The integer pipe, which
has half the lanes of the others, is what dropout keeps busy.
Seven rounds are the fewest that pass BigCrush. Draws of 32 bits would double the calls; of 8 bits, p = 0.1 would become 0.102.
Source: Salmon et al., 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import Any, NamedTuple

from torch import Tensor

from .launch import jit, tl, triton
from .overlap import capability

STEPS = 1 << 16  # of a draw: p's resolution


def kept_steps(p: float) -> int:
    """How many of the 2**16 values of a draw keep an element: 0 for p = 1, under 2**16 for any p over 0."""
    kept = min(round((1.0 - p) * STEPS), STEPS - 1)
    # No float of 16 bits has 31,745 under it: 0 and -0 are equal.
    return kept + {0x7C01: -1, STEPS - 0x7C01: 1}.get(kept, 0)


def threshold(p: float) -> int:
    """The kernels' argument, an int32: `keep_rows` keeps what is below it, a draw being the high half of an int32."""
    return (kept_steps(p) - STEPS // 2) << 16


def tile_bound(p: float) -> tuple[float, bool]:
    """The float of 16 bits that a tile's draws are compared with, and whether those under it are kept (or dropped)."""
    kept = kept_steps(p)
    under = min(kept, STEPS - kept)
    bits = 0xFC00 - under if under <= 0x7C00 else under - 0x7C01  # see `_tile_bound`
    return struct.unpack("<e", struct.pack("<H", bits))[0], 2 * kept < STEPS


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
def keep_rows(low, high, offset, threshold, row, start, BLOCK_C: tl.constexpr, VEC: tl.constexpr):
    """Which elements are kept: rows `row` (ROWS, 1), int64, columns start ... start + BLOCK_C - 1, start a multiple of 8.

    low, high: from `load_seed`. offset: of the op, int32. threshold: int32, from the function of that name. VEC: as of the
    accesses beside it, see rows.py.
    """
    low_row, high_row, offset = row.to(tl.uint32), (row >> 32).to(tl.uint32), tl.cast(offset, tl.uint32)
    if VEC == 1:
        # Accesses of one element leave neighbours to different threads, each of which would take the whole call for its
        # one draw: twice the instructions of a kernel's loop. So a thread takes calls, and passes on what is kept.
        group = start // 8 + tl.arange(0, BLOCK_C // 8)[None, :]
        first, second, third, fourth = _philox(low, high, group.to(tl.uint32), low_row, high_row, offset)
        words = tl.join(tl.join(first, third), tl.join(second, fourth))
        draws = tl.join(words << 16, words).to(tl.int32, bitcast=True)
        return tl.reshape(draws < threshold, (row.shape[0], BLOCK_C))
    column = tl.arange(0, BLOCK_C)[None, :]
    words = _philox(low, high, (start // 8 + column // 8).to(tl.uint32), low_row, high_row, offset)
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
    VEC: tl.constexpr = 8,
):
    """Which elements of a tile are kept, (ROWS, COLUMNS), or (COLUMNS, ROWS) where TRANSPOSED; arguments as of `draw_tile`.

    VEC: as in `keep_rows`; tiles that are not TRANSPOSED.
    """
    if VEC == 1:
        row, column = tl.arange(0, ROWS // 2)[:, None], tl.arange(0, COLUMNS // 4)[None, :]
        rows, columns = (row_start // 16 * 8 + row).to(tl.uint32), (column_start // 16 * 4 + column).to(tl.uint32)
        head, offset = tl.cast(head, tl.uint32), tl.cast(offset, tl.uint32)
        first, second, third, fourth = _philox(low, high, columns, rows, head, offset)
        words = tl.join(tl.join(first, third), tl.join(second, fourth))
        kept = keep_drawn(tl.join(words, words >> 16), tl.full((), 0, tl.int1), threshold)
        kept = tl.reshape(kept, (ROWS // 16, 8, COLUMNS // 16, 4, 2, 2, 2))
        return tl.reshape(tl.permute(kept, (0, 4, 1, 2, 5, 3, 6)), (ROWS, COLUMNS))
    words, odd = draw_tile(low, high, offset, head, row_start, column_start, ROWS, COLUMNS, TRANSPOSED)
    return keep_drawn(words, odd, threshold)


@jit
def drop_tile(
    x,
    low,
    high,
    offset,
    threshold,
    head,
    row_start,
    column_start,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    VEC: tl.constexpr,
):
    """x (ROWS, COLUMNS), fp32 or of 16 bits, where `keep_tile` keeps it, 0 elsewhere; arguments as there."""
    if VEC == 1 or not has_pairs():
        kept = keep_tile(low, high, offset, threshold, head, row_start, column_start, ROWS, COLUMNS, VEC=VEC)
        x = tl.where(kept, x, 0.0)
    else:
        # Each half of a word by itself, LLVM would take the last rounds for twice, in 16 and in 32 bits.
        words, odd = draw_tile(low, high, offset, head, row_start, column_start, ROWS, COLUMNS)
        x = drop_pairs(x, words, odd, threshold)
    return x


@jit
def draw_tile(
    low,
    high,
    offset,
    head,
    row_start,
    column_start,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TRANSPOSED: tl.constexpr = False,
    columns=None,
):
    """A tile's words, uint32 (ROWS, COLUMNS), or (COLUMNS, ROWS) where TRANSPOSED, and whose draws are the words' high halves.

    head: batch · heads + head, int32. row_start, column_start: int32, multiples of 16. columns: (COLUMNS,), which column of the
    tile each is, where not in order. The rest as in `keep_rows`.
    """
    column = tl.arange(0, COLUMNS) if columns is None else columns
    if TRANSPOSED:
        row, column = tl.arange(0, ROWS)[None, :], column[:, None]
    else:
        row, column = tl.arange(0, ROWS)[:, None], column[None, :]
    # Of 16 rows 8 remain, of 16 columns 4: bits 3 of both and 0 of the column choose among the call's draws.
    rows = row_start // 16 * 8 + (row // 16 * 8 + row % 8)
    columns = column_start // 16 * 4 + (column // 16 * 4 + column % 8 // 2)
    head, offset = tl.cast(head, tl.uint32), tl.cast(offset, tl.uint32)
    first, second, third, fourth = _philox(low, high, columns.to(tl.uint32), rows.to(tl.uint32), head, offset)
    word = tl.where(row & 8 != 0, tl.where(column & 8 != 0, fourth, third), tl.where(column & 8 != 0, second, first))
    return word, column & 1 != 0


def has_pairs(_semantic: Any = None) -> bool:
    """Whether `drop_pairs` is to be had: a kernel is compiled for a GPU of NVIDIA's."""
    return _semantic is not None and capability(str(getattr(_semantic.builder.options, "arch", ""))) > 0


if triton is not None and not triton.knobs.runtime.interpret:
    has_pairs = triton.language.core.builtin(has_pairs)


@jit
def _tile_bound(threshold):
    """(bound, kept): a draw, read as a float of 16 bits, is under `bound` where it is kept (kept = 1) or dropped (kept = 0).

    bound: uint32, the bits of a float of 16 bits. kept: uint32, 1 where fewer are kept than dropped.
    """
    steps = (tl.cast(threshold, tl.uint32) >> 16) ^ 0x8000  # that keep
    few = steps < 0x8000
    under = tl.where(few, steps, 0x10000 - steps)
    # From -inf (0xFC00) downwards in bits, upwards in value, to -0; then on from +0, of which -0 is no less.
    bound = tl.where(under <= 0x7C00, 0xFC00 - under, under - 0x7C01)
    return bound, tl.where(few, 1, 0).to(tl.uint32)


@jit
def keep_drawn(words, odd, threshold):
    """Which elements are kept, of what `draw_tile` returned."""
    bound, kept = _tile_bound(threshold)
    draws = tl.where(odd, words >> 16, words).to(tl.uint16)
    under = draws.to(tl.float16, bitcast=True) < bound.to(tl.uint16).to(tl.float16, bitcast=True)
    return under == (kept != 0)


@jit
def drop_pairs(x, words, odd, threshold):
    """x where kept, 0 elsewhere, in NVIDIA's assembly: one compare for two neighbours of a thread.

    x: fp32, or of 16 bits, whose neighbours share the selection, too. The rest as in `keep_drawn`, its twin.
    """
    bound, kept = _tile_bound(threshold)
    half = tl.where(odd, 0x32, 0x10)  # bytes of a word, as PRMT numbers them; those of the second word from 4 on
    if x.dtype == tl.float32:
        x = tl.inline_asm_elementwise(
            "{ .reg .b32 draws; .reg .pred first, second, kept; mad.lo.s32 draws, $7, 256, $6; add.s32 draws, draws, 0x4400;"
            " prmt.b32 draws, $4, $5, draws; setp.eq.s32 kept, $10, 0; setp.lt.xor.f16x2 first|second, draws, $8, kept;"
            " selp.f32 $0, $2, 0f00000000, first; selp.f32 $1, $3, 0f00000000, second; }",
            "=r,=r,r,r,r,r,r,r,r,r,r,r",
            [x, words, half, bound * 0x10001, kept],
            dtype=tl.float32,
            is_pure=True,
            pack=2,
        )
    else:
        x = tl.inline_asm_elementwise(
            "{ .reg .b32 draws; mad.lo.s32 draws, $5, 256, $4; add.s32 draws, draws, 0x4400; prmt.b32 draws, $2, $3, draws;"
            " set.lt.u32.f16x2 draws, draws, $6; lop3.b32 $0, $1, draws, $8, 0x60; }",
            "=r,r,r,r,r,r,r,r,r,r",
            [x, words, half, bound * 0x10001, kept - 1],
            dtype=x.dtype,
            is_pure=True,
            pack=2,
        )
    return x


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
