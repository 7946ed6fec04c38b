# mypy: allow-incomplete-defs
"""Dropout masks from Philox4x32 with 7 rounds, whose counter is the position alone.

    key = seed (64 bits, read from a tensor)

So every tile shape, the backward, and the eager twin in `detr_fast/ops/dropout.py` produce the same mask. Draws have 16
bits; p therefore has a resolution of 2**-16, and the scale is that of the p really applied, so that the expectation is kept
exactly. Which positions share a call is part of the definition:

- `keep_rows`, for row-wise kernels: counter = (column group, row, row's upper half, offset of the op), and eight neighbouring
  columns, which 16-byte accesses keep in one thread, have the eight halves of the call's four words;
- `keep_tile`, for tiles of `tl.dot`: counter = (batch·head, column group, offset, row group), and 64 positions share a call, whose
  rows differ in bits 0, 3 and 4, and columns likewise. With an offset over 0, no such counter is one of `keep_rows`' below 2**32 rows. Tensor cores' accumulators keep many of these in one thread.

In tiles, both bits 4 choose the factors of the sixth round, of four pairs that begin with Philox's own. Of the words w0 ... w3, an
even row takes the one that both bits 3 choose, an odd one the sum of that word's next and a multiple of it: 32 bits that, with any
other word of the eight, are distributed as two words of a call are. A column's bit 0 chooses the half. So a thread's 32
draws take five rounds once and two rounds twice, and 0.25 additions a draw. The counter's words of row and column are those that
are multiplied from the second round on: in a loop over either, the first round and parts of the next two are done before.

Each element's expression holds the whole call, and the compiler sees that the elements of a thread share it. In tiles, a
draw counts as a float of 16 bits, dropped where it is under a bound (or kept, where fewer are kept than dropped; NaN is under
none): NVIDIA's GPUs compare two such numbers at once (`drop_pairs`), and need not take words apart.
Seven rounds are the fewest that pass BigCrush, in which a tile's rows and columns take part in six, as `keep_rows`' rows do. Of tiles, BigCrush was not
run; in 3.9 million calls no two of a call's 64 draws were correlated by more than 3.6 standard deviations, and counts were binomial, at p of .02, .1 and .5.
Draws of 32 bits would double the calls; of 8 bits, p = 0.1 would become 0.102.
Source: Salmon et al., 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import Any, NamedTuple

from torch import Tensor

from .launch import at_compile_time, jit, tl, triton
from .overlap import capability

STEPS = 1 << 16  # of a draw: p's resolution

# Philox4x32's factors are the first and third; the others are the lower halves of Philox4x64's. For odd rows, one of Steele and Vigna, 2022,
# "Computationally easy, spectrally good multipliers for congruential pseudorandom number generators".
FACTORS = 0xD2511F53, 0xE14C6C93, 0xCD9E8D57, 0x95121157
ODD_ROW_FACTOR = 0x93D765DD


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
        # A thread takes whole calls, see `keep_rows`: all rows and columns without bits 0 and 3.
        row, column = tl.arange(0, ROWS // 4)[:, None], tl.arange(0, COLUMNS // 4)[None, :]
        row, column = row // 4 * 16 + row % 4 * 2, column // 4 * 16 + column % 4 * 2
        words = _tile_words(low, high, head, offset, row_start, row, column_start, column, ROWS, COLUMNS)
        first, second, third, fourth = words
        even = tl.join(tl.join(first, third), tl.join(second, fourth))
        odd = even + tl.join(tl.join(fourth, second), tl.join(first, third)) * _odd_row_factor()
        words = tl.join(even, odd)
        kept = keep_drawn(tl.join(words, words >> 16), tl.full((), 0, tl.int1), threshold)
        kept = tl.reshape(kept, (ROWS // 16, 4, COLUMNS // 16, 4, 2, 2, 2, 2))
        return tl.reshape(tl.permute(kept, (0, 4, 1, 6, 2, 5, 3, 7)), (ROWS, COLUMNS))
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
def places_in_tile(ROWS: tl.constexpr, COLUMNS: tl.constexpr, TRANSPOSED: tl.constexpr = False, order=None):
    """Numbers of a tile's rows and of its columns, as (ROWS, 1) and (1, COLUMNS), or (1, ROWS) and (COLUMNS, 1) where TRANSPOSED.

    order: which row of the tile, or column where TRANSPOSED, each of its first axis is, from `spread`; None: as they come.
    """
    if TRANSPOSED:
        row, column = tl.arange(0, ROWS)[None, :], (tl.arange(0, COLUMNS) if order is None else order)[:, None]
    else:
        row, column = (tl.arange(0, ROWS) if order is None else order)[:, None], tl.arange(0, COLUMNS)[None, :]
    return row, column


@jit
def spread(SIZE: tl.constexpr, WARPS: tl.constexpr):
    """An order (SIZE,) of a tile's first axis in which a thread's four share dropout's calls; as they come where WARPS is 0, or of fewer.

    Of an accumulator with 16 rows a warp, twice, a thread holds rows i, i + 8, i + 16 * WARPS and i + 16 * WARPS + 8; these get
    numbers n, n + 1, n + 8 and n + 9.
    """
    row = tl.arange(0, SIZE)
    if WARPS > 0 and SIZE >= 32 * WARPS:
        own = (row & 3) * 2 + row // 8 % 2 + row // (16 * WARPS) % 2 * 8
        row = row // (32 * WARPS) * (32 * WARPS) + row // 16 % WARPS * 32 + (row & 4) * 4 + own
    return row


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
    order=None,
):
    """A tile's words, uint32 (ROWS, COLUMNS), or (COLUMNS, ROWS) where TRANSPOSED, and whose draws are the words' high halves.

    head: batch · heads + head, int32. row_start, column_start: int32, multiples of 32, or of 16 where the tile has no more rows, or columns.
    order: see `places_in_tile`. The rest as in `keep_rows`.
    """
    row, column = places_in_tile(ROWS, COLUMNS, TRANSPOSED, order)
    words = _tile_words(low, high, head, offset, row_start, row, column_start, column, ROWS, COLUMNS)
    first, second, third, fourth = words
    lower, right = row & 8 != 0, column & 8 != 0
    word = tl.where(lower, tl.where(right, fourth, third), tl.where(right, second, first))
    before = tl.where(lower, tl.where(right, third, second), tl.where(right, first, fourth))
    # A factor of 0 for even rows: where lanes differ in bit 0, they take the same instructions.
    return word + before * tl.where(row & 1 != 0, _odd_row_factor(), 0).to(tl.uint32), column & 1 != 0


@jit
def _tile_words(
    low, high, head, offset, row_start, row, column_start, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """The words of each position's call. row, column: in the tile."""
    # Of 32 rows 4 remain, of 32 columns 4.
    rows = row_start // 32 * 4 + (row // 32 * 4 + row % 8 // 2)
    columns = column_start // 32 * 4 + (column // 32 * 4 + column % 8 // 2)
    # Of the tile's own number alone, where that will do, bit 4 is a constant for each register.
    upper = (row if ROWS % 32 == 0 else row + row_start) & 16 != 0
    left = (column if COLUMNS % 32 == 0 else column + column_start) & 16 == 0
    one, other = tl.where(left, _factor(0), _factor(1)), tl.where(left, _factor(2), _factor(3))
    sixth = tl.where(upper, other, one), tl.where(upper, one, other)
    head, offset = tl.cast(head, tl.uint32), tl.cast(offset, tl.uint32)
    return _philox(low, high, head, columns.to(tl.uint32), offset, rows.to(tl.uint32), sixth)


def has_pairs(_semantic: Any = None) -> bool:
    """Whether `drop_pairs` is to be had: a kernel is compiled for a GPU of NVIDIA's."""
    return _semantic is not None and capability(str(getattr(_semantic.builder.options, "arch", ""))) > 0


if triton is not None and not triton.knobs.runtime.interpret:
    has_pairs = triton.language.core.builtin(has_pairs)


@jit
def _kept_steps(threshold):
    return (tl.cast(threshold, tl.uint32) >> 16) ^ 0x8000


@jit
def _tile_bound(threshold):
    """(bound, kept): a draw, read as a float of 16 bits, is under `bound` where it is kept (kept = 1) or dropped (kept = 0).

    bound: uint32, the bits of a float of 16 bits. kept: uint32, 1 where fewer are kept than dropped.
    """
    steps = _kept_steps(threshold)
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
def drop_pairs(x, words, odd, threshold, NEIGHBOURS: tl.constexpr = None):
    """x where kept, 0 elsewhere, in NVIDIA's assembly: one compare for two elements of a thread.

    x: fp32, or of 16 bits, whose neighbours share the selection, too. NEIGHBOURS: what a thread has one behind another, for which this
    takes the fewest instructions: two "columns" of a row (None, as triton 3.6 takes no text as a default), two "rows" of a column, or "both", two rows of one column and of the
    next (fp32). The rest as in `keep_drawn`, its twin.
    """
    bound, kept = _tile_bound(threshold)
    half = tl.where(odd, 0x32, 0x10)  # bytes of a word, as PRMT numbers them; those of the second word from 4 on
    if x.dtype == tl.float32:
        # As floats: ptxas would put a comparison of integers into a uniform register, on sm_90, and copy it for each pair.
        steps = _kept_steps(threshold).to(tl.float32)
        PACK: tl.constexpr = 4 if NEIGHBOURS == "both" else 2
        CODE: tl.constexpr = _selection(NEIGHBOURS, PACK)
        OPERANDS: tl.constexpr = _operands(PACK, 5)
        x = tl.inline_asm_elementwise(
            CODE,
            OPERANDS,
            [x, words, half, bound * 0x10001, steps],
            dtype=tl.float32,
            is_pure=True,
            pack=PACK,
        )
    else:
        HALVES: tl.constexpr = _selection_of_halves(NEIGHBOURS)
        x = tl.inline_asm_elementwise(
            HALVES,
            "=r,r,r,r,r,r,r,r,r,r",
            [x, words, half, bound * 0x10001, kept - 1],
            dtype=x.dtype,
            is_pure=True,
            pack=2,
        )
    return x


@at_compile_time
def _operands(pack, inputs):
    return ",".join(["=r"] * pack + ["r"] * (pack * inputs))


@at_compile_time
def _selection(neighbours, pack):
    """Assembly: outputs, x, words, halves, bound and steps are `pack` registers each."""
    code = f".reg .pred p, q, kept; setp.ge.f32 kept, ${5 * pack}, 0f47000000; "  # 2**15
    for one in range(pack // 2):
        other = one + pack // 2
        code += _pair(neighbours, *(k * pack + i for k in (2, 3) for i in (one, other)))
        code += f"setp.lt.xor.f16x2 p|q, draws, ${4 * pack}, kept; "
        for i, chosen in ((one, "p"), (other, "q")):
            code += f"selp.f32 ${i}, ${pack + i}, 0f00000000, {chosen}; "
    return f"{{ {_REGISTERS} {code}}}"


@at_compile_time
def _selection_of_halves(neighbours):
    """Assembly: x is one register, all else as above."""
    choice = "set.lt.u32.f16x2 draws, draws, $6; lop3.b32 $0, $1, draws, $8, 0x60;"
    return f"{{ {_REGISTERS} {_pair(neighbours, 2, 3, 4, 5)}{choice} }}"


_REGISTERS = ".reg .b32 draws; .reg .b16 low, high, one, other; .reg .pred own;"


@at_compile_time
def _pair(neighbours, word, next_word, half, next_half):
    """Assembly: both draws in one register."""
    if neighbours == "rows":
        code = f"mad.lo.s32 draws, ${next_half}, 256, ${half}; add.s32 draws, draws, 0x4400; "
        return code + f"prmt.b32 draws, ${word}, ${next_word}, draws; "
    # Of halves of one word, ptxas sees that they are that word; not of its bytes.
    code = ""
    for draw, source, which in (("one", word, half), ("other", next_word, next_half)):
        code += f"mov.b32 {{low, high}}, ${source}; setp.eq.s32 own, ${which}, 0x10; selp.b16 {draw}, low, high, own; "
    return code + "mov.b32 draws, {one, other}; "


@at_compile_time
def _factor(number):
    return FACTORS[number]


@at_compile_time
def _odd_row_factor():
    return ODD_ROW_FACTOR


@jit
def _philox(k0, k1, c0, c1, c2, c3, sixth=None):
    """sixth: the factors of the sixth round, uint32, where they are not Philox's."""
    for i in tl.static_range(7):
        if i == 5 and sixth is not None:
            a, b = c0.to(tl.uint64) * sixth[0], c2.to(tl.uint64) * sixth[1]
        else:
            a, b = c0.to(tl.uint64) * _factor(0), c2.to(tl.uint64) * _factor(2)
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
