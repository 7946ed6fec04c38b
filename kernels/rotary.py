# mypy: allow-incomplete-defs
"""Rotary position embedding: each pair of channels of queries and keys turned by an angle of its token, in one launch.

    y_a = a * cos_a - b * sin_a,   y_b = b * cos_b + a * sin_b        (a, b) a pair of channels

    da = dy_a * cos_a + dy_b * sin_b,   db = dy_b * cos_b - dy_a * sin_a

q is (B, L, H, E) and k (B, L, Hk, E), of any strides between heads and tokens; cos and sin are (B or 1, L, R), R up to E, or with one
number a pair (B or 1, L, R / 2). Pairs are channels p and R / 2 + p, or, interleaved, 2 p and 2 p + 1. The two of a pair may have cosines
and sines of their own, so the gradient is another turn with them exchanged; it is the same kernel turned back, and needs nothing but them.
Channels from R on, and tokens before the first one that is turned, are copied. Sorted, neighbours are turned and come as halves, as
in DeepSeek's models; turned back, halves come as neighbours.
Source: Su et al., 2021, arXiv:2104.09864 (RoFormer).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache, lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from .configs import ROTARY_HEADS, rotary_config
from .entry import Budget, Entry
from .launch import Variant, empty, empty_strided, jit, launch, pointer, tl
from .overlap import wait_for_previous
from .rows import MAX_PLANS, Plan

MAX_COLUMNS = 256
MAX_PROGRAMS = (1 << 31) - 1  # of a grid, and tokens of all sequences together


class Turn(NamedTuple):
    """How channels are paired and turned, besides the angles.

    interleaved: pairs are neighbours; else a channel's partner is half of those that are turned away. per_pair: cos and sin have one
    number a pair; else one a channel. back: the transposed turn. first: the tokens before it are copied; those of cos and sin follow.
    sorts: pairs that are neighbours come as halves; with one number a pair.
    """

    interleaved: bool = False
    per_pair: bool = False
    back: bool = False
    first: int = 0
    sorts: bool = False


@jit
def _runs(base, start, column, VEC: tl.constexpr):
    """base + start + column, (heads, tokens, columns), whose runs of VEC elements each start at a multiple of their size or of 16 bytes."""
    pointers = base + (start + column)
    if VEC > 1:
        run: tl.constexpr = VEC * (base.dtype.element_ty.primitive_bitwidth // 8)
        pointers = tl.multiple_of(pointers, (1, 1, 16 if run > 16 else run))
    return pointers


@jit
def _pairs_of(base, start, mask, column, pairs, PAIRS: tl.constexpr, VEC: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The first and the second channels of all pairs, (heads, tokens, PAIRS), in fp32; mask: of columns."""
    if INTERLEAVED:
        both = tl.load(_runs(base, start, column, VEC), mask=mask, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(both, (both.shape[0], both.shape[1], PAIRS, 2)))
    else:
        a = tl.load(_runs(base, start, column, VEC), mask=mask, other=0.0).to(tl.float32)
        b = tl.load(_runs(base, start + pairs, column, VEC), mask=mask, other=0.0).to(tl.float32)
    return a, b


@jit
def _turned(
    source,
    to,
    batch,
    row,
    exists,
    turns,
    chunk,
    heads,
    angles,
    strides,
    sizes,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
    FULL: tl.constexpr,
    VEC: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    TO_NEIGHBOURS: tl.constexpr,
):
    """HEADS heads of all tokens of this program, from `source` to `to`."""
    batch_stride, row_stride, head_stride, to_batch, to_row, to_head = strides
    pairs, columns = sizes
    cos_a, cos_b, sin_a, sin_b = angles
    column = tl.arange(0, 2 * PAIRS if INTERLEAVED else PAIRS)[None, None, :]
    to_column = tl.arange(0, 2 * PAIRS if TO_NEIGHBOURS else PAIRS)[None, None, :]
    head = chunk * HEADS + tl.arange(0, HEADS)[:, None, None]
    there = exists & (head < heads)
    mask, to_mask = there, there
    if not FULL:
        mask = there & (column // VEC < (2 * pairs if INTERLEAVED else pairs) // VEC)
        to_mask = there & (to_column // VEC < (2 * pairs if TO_NEIGHBOURS else pairs) // VEC)
    far = head.to(tl.int64)
    start = batch * batch_stride + row * row_stride + far * head_stride
    to_start = batch * to_batch + row * to_row + far * to_head
    a, b = _pairs_of(source, start, mask, column, pairs, PAIRS, VEC, INTERLEAVED)
    if REST > 0:
        rest = tl.arange(0, REST)[None, None, :]
        rest_mask = there & (rest // VEC < (columns - 2 * pairs) // VEC)
        copied = tl.load(_runs(source, start + 2 * pairs, rest, VEC), mask=rest_mask, other=0.0)
        tl.store(_runs(to, to_start + 2 * pairs, rest, VEC), copied, mask=rest_mask)
    y_a = tl.where(turns, a * cos_a - b * sin_a, a)
    y_b = tl.where(turns, b * cos_b + a * sin_b, b)
    kind = to.dtype.element_ty
    if TO_NEIGHBOURS:
        both = tl.reshape(tl.join(y_a.to(kind), y_b.to(kind)), (HEADS, y_a.shape[1], 2 * PAIRS))
        tl.store(_runs(to, to_start, to_column, VEC), both, mask=to_mask)
    else:
        tl.store(_runs(to, to_start, to_column, VEC), y_a.to(kind), mask=to_mask)
        tl.store(_runs(to, to_start + pairs, to_column, VEC), y_b.to(kind), mask=to_mask)


@jit
def rotary_embedding_kernel(
    q_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    q_to,
    k_to,
    q_batch: tl.int64,
    q_row: tl.int64,
    q_head: tl.int64,
    q_to_batch: tl.int64,
    q_to_row: tl.int64,
    q_to_head: tl.int64,
    k_batch: tl.int64,
    k_row: tl.int64,
    k_head: tl.int64,
    k_to_batch: tl.int64,
    k_to_row: tl.int64,
    k_to_head: tl.int64,
    cos_batch: tl.int64,
    cos_row: tl.int64,
    sin_batch: tl.int64,
    sin_row: tl.int64,
    tokens: tl.int32,
    L: tl.int32,
    first: tl.int32,
    q_heads: tl.int32,
    k_heads: tl.int32,
    pairs: tl.int32,
    columns: tl.int32,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
    FULL: tl.constexpr,
    VEC: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    TO_NEIGHBOURS: tl.constexpr,
    PER_PAIR: tl.constexpr,
    BACK: tl.constexpr,
):
    """TOKENS tokens, of all sequences, by HEADS heads: those of q, and behind them those of k. Programs of the same tokens are neighbours."""
    wait_for_previous()
    chunks = tl.cdiv(q_heads, HEADS)
    both = chunks
    if k_ptr is not None:
        both += tl.cdiv(k_heads, HEADS)
    tile, chunk = tl.program_id(0) // both, tl.program_id(0) % both
    # Heads come first: a lane has the same channels of all of them, and angles once.
    token = tile.to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[None, :, None]
    exists = token < tokens
    token = token.to(tl.int32)  # of those that exist
    batch, row = (token // L).to(tl.int64), token % L
    turns = row >= first
    angle = tl.maximum(row - first, 0).to(tl.int64)
    row = row.to(tl.int64)
    SPLIT: tl.constexpr = INTERLEAVED and not PER_PAIR
    column = tl.arange(0, 2 * PAIRS if SPLIT else PAIRS)[None, None, :]
    RUN: tl.constexpr = VEC // 2 if INTERLEAVED and PER_PAIR and VEC > 1 else VEC
    mask = exists & turns
    if not FULL:
        mask = mask & (column // RUN < (2 * pairs if SPLIT else pairs) // RUN)
    cos_start = batch * cos_batch + angle * cos_row
    sin_start = batch * sin_batch + angle * sin_row
    if PER_PAIR:
        cos_a = tl.load(_runs(cos_ptr, cos_start, column, RUN), mask=mask, other=0.0).to(tl.float32)
        sin_a = tl.load(_runs(sin_ptr, sin_start, column, RUN), mask=mask, other=0.0).to(tl.float32)
        cos_b, sin_b = cos_a, sin_a
    else:
        cos_a, cos_b = _pairs_of(cos_ptr, cos_start, mask, column, pairs, PAIRS, RUN, INTERLEAVED)
        sin_a, sin_b = _pairs_of(sin_ptr, sin_start, mask, column, pairs, PAIRS, RUN, INTERLEAVED)
    if BACK:
        sin_a, sin_b = -sin_b, -sin_a
    angles = (cos_a, cos_b, sin_a, sin_b)
    sizes = (pairs, columns)
    if chunk < chunks:
        _turned(
            *(q_ptr, q_to, batch, row, exists, turns, chunk, q_heads, angles),
            (q_batch, q_row, q_head, q_to_batch, q_to_row, q_to_head),
            *(sizes, HEADS, PAIRS, REST, FULL, VEC, INTERLEAVED, TO_NEIGHBOURS),
        )
    elif k_ptr is not None:
        _turned(
            *(k_ptr, k_to, batch, row, exists, turns, chunk - chunks, k_heads, angles),
            (k_batch, k_row, k_head, k_to_batch, k_to_row, k_to_head),
            *(sizes, HEADS, PAIRS, REST, FULL, VEC, INTERLEAVED, TO_NEIGHBOURS),
        )


def rotary_embedding(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    turn: Turn,
    heads_first: tuple[bool, bool],
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """q (B, L, H, E) and k (B, L, Hk, E), or None, turned by cos and sin (B or 1, L - turn.first, R), or R / 2 wide where they are per pair.

    Returns both in `out_dtype`, by default their own, and new memory, which lies with heads before tokens where `heads_first` says so.
    Raises ValueError for more than 256 channels.
    """
    q, k = _rows(q), None if k is None else _rows(k)
    cos, sin = _rows(cos), _rows(sin)
    outputs = [None if t is None else memory_for(t, first, out_dtype) for t, first in zip((q, k), heads_first)]
    given = [t for t in (q, k, cos, sin, *outputs) if t is not None]
    layouts = tuple(map(_layout_of, given))
    plan = _plan(layouts, k is not None, turn)
    launch(plan.variant, plan.grid, q, k, cos, sin, *outputs, *plan.sizes)
    return outputs[0], outputs[1]  # type: ignore[return-value]


def most_programs(tokens: int, *heads: int) -> int:
    """No launch over so many tokens, of all sequences, and heads of q and of k has more programs; it has no more tokens, either."""
    return tokens * max(1, sum(-(-n // ROTARY_HEADS) for n in heads))


def memory_for(x: Tensor, heads_first: bool, dtype: torch.dtype | None = None) -> Tensor:
    """New memory for a tensor (B, L, H, E), in that order or with heads before tokens."""
    if heads_first:
        return empty_strided(tuple(x.shape), heads_first_strides(x.shape), dtype or x.dtype, x.device)
    return empty(x.shape, dtype or x.dtype, x.device)


def heads_first_strides(shape: Sequence[int]) -> tuple[int, int, int, int]:
    """Of a tensor (B, L, H, E) with heads before tokens."""
    _, tokens, heads, columns = shape
    return heads * tokens * columns, columns, tokens * columns, 1


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


_Layout = tuple[torch.dtype, torch.Size, tuple[int, ...], int]


@lru_cache(maxsize=MAX_PLANS)
def _plan(layouts: tuple[_Layout, ...], with_k: bool, turn: Turn) -> Plan:
    """layouts: of q, k where there is one, cos, sin, and what q and k are written to: dtype, shape, strides, bytes behind a multiple of 16."""
    count = 1 + with_k
    heads, tables, results = layouts[:count], layouts[count : count + 2], layouts[count + 2 :]
    batches, length, q_heads, columns = heads[0][1]
    pairs = tables[0][1][-1] // (1 if turn.per_pair else 2)
    if columns > MAX_COLUMNS:
        raise ValueError(f"heads of {columns} channels: this kernel takes up to {MAX_COLUMNS}")
    k_heads = heads[1][1][2] if with_k else 0
    dtypes, angles, written = (tuple(one[0] for one in group) for group in (heads, tables, results))
    run = run_of(layouts, pairs, columns, turn)
    variant = variant_for(dtypes, angles, pairs, columns, max(q_heads, k_heads), run, turn, written)
    tokens = batches * length
    constants = variant.constants
    chunks = sum(-(-n // constants["HEADS"]) for n in (q_heads, k_heads))
    moves = [(*_steps(source), *_steps(to)) for source, to in zip(heads, results)]
    strides = (*moves[0], *(moves[1] if with_k else (0,) * 6), *(s for one in tables for s in _steps(one)))
    sizes = (tokens, max(length, 1), turn.first, q_heads, k_heads, pairs, columns)
    programs = -(-tokens // constants["TOKENS"]) * chunks if columns else 0
    return Plan(variant, (programs,), (*strides, *sizes))


def _steps(layout: _Layout) -> tuple[int, ...]:
    """Strides of all dimensions but the last; 0 along one of a single element, where any is allowed and lanes beyond it would be anywhere."""
    _, shape, strides, _ = layout
    return tuple(stride if size > 1 else 0 for size, stride in zip(shape[:-1], strides))


def run_of(layouts: tuple[_Layout, ...], pairs: int, columns: int, turn: Turn) -> int:
    """Neighbouring elements that all tensors keep together at a multiple of their size, or of 16 bytes: 8 at most, and 1 at least."""
    neighbours = turn.interleaved and not turn.sorts
    run = math.gcd(2 * pairs if neighbours else pairs, columns, 16 // layouts[0][0].itemsize)
    for layout in layouts:
        together, size = _together(layout), layout[0].itemsize
        if together < min(16, run * size):
            run = max(1, together // size)
    return run


def _together(layout: _Layout) -> int:
    """Bytes of a power of two, 16 at most, at a multiple of which all rows start."""
    dtype, shape, strides, start = layout
    steps = (stride * dtype.itemsize for size, stride in zip(shape[:-1], strides[:-1]) if size > 1)
    return math.gcd(16, start, *steps)


def arriving(gradient: Tensor) -> Tensor:
    """A gradient (B, L, H, E) as the program that was compiled for new memory reads it; a copy where its rows lie otherwise."""
    gradient = _rows(gradient)
    if _together(_layout_of(gradient)) < math.gcd(16, gradient.shape[-1] * gradient.element_size()):
        return gradient.clone(memory_format=torch.contiguous_format)
    return gradient


def _layout_of(x: Tensor) -> _Layout:
    return x.dtype, x.shape, x.stride(), x.data_ptr() % 16


@cache
def variant_for(
    dtypes: tuple[torch.dtype, ...],
    tables: tuple[torch.dtype, ...],
    pairs: int,
    columns: int,
    heads: int,
    run: int,
    turn: Turn,
    results: tuple[torch.dtype, ...] = (),
) -> Variant:
    """The program for q, and k where there are two dtypes, of up to `heads` heads of `columns` channels, read in runs of `run`.

    results: dtypes of what is written, where they are others.
    """
    rest = _rest_block(pairs, columns)
    config = rotary_config(pairs, rest, heads, run, turn.interleaved)
    absent = (None,) * (2 - len(dtypes))
    types = (*map(pointer, (*dtypes, *absent, *tables, *(results or dtypes), *absent)), *("i64",) * 16, *("i32",) * 7)
    constants = {
        "TOKENS": config.tokens,
        "HEADS": config.heads,
        "PAIRS": config.pairs,
        "REST": rest,
        "FULL": pairs == config.pairs,
        "VEC": run,
        "INTERLEAVED": turn.interleaved and not (turn.sorts and turn.back),
        "TO_NEIGHBOURS": turn.interleaved and not (turn.sorts and not turn.back),
        "PER_PAIR": turn.per_pair,
        "BACK": turn.back,
    }
    return Variant(rotary_embedding_kernel, types, constants, config.num_warps)


def _rest_block(pairs: int, columns: int) -> int:
    rest = columns - 2 * pairs
    return 1 << (rest - 1).bit_length() if rest else 0


def catalog_entries() -> Iterator[Entry]:
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    budget = Budget(148, 4096, 128, 8192)  # registers: 128, and 177 by triton 3.6
    halves, neighbours = Turn(), Turn(interleaved=True)
    cases = {
        "hd64_bf16": (bf16, bf16, 32, 64, 8, halves),
        "partial_hd80_fp16": (fp16, fp32, 16, 80, 8, halves._replace(per_pair=True)),
        "hd20_fp32_elements": (fp32, fp16, 10, 20, 1, halves),
        "back_hd96_bf16_interleaved": (bf16, fp32, 48, 96, 8, neighbours._replace(back=True)),
        "sorted_hd64_bf16": (bf16, bf16, 32, 64, 8, Turn(interleaved=True, per_pair=True, sorts=True)),
    }
    for name, (dtype, table, pairs, columns, run, turn) in cases.items():
        variant = variant_for((dtype, dtype), (table, table), pairs, columns, 4, run, turn)
        elements = 2 * pairs * variant.constants["TOKENS"] * variant.constants["HEADS"]
        example = partial(_example, dtype, table, pairs, columns, run, turn)
        yield Entry("rotary_embedding", f"rotary_{name}", variant, elements, budget, example)


def _example(
    dtype: torch.dtype, table: torch.dtype, pairs: int, columns: int, run: int, turn: Turn, device: torch.device
) -> Callable[[], tuple[Tensor, ...]]:
    """Both ways, of more than two tiles of tokens, the last one not full, and heads that fill no chunk."""
    tokens = rotary_config(pairs, _rest_block(pairs, columns), 4, run, turn.interleaved).tokens
    step = columns if run > 1 else columns + 1  # of single elements: rows that start anywhere
    q, k = (torch.randn(2, tokens + 3, heads, step, device=device).to(dtype)[..., :columns] for heads in (6, 3))
    cos, sin = (
        torch.randn(tokens + (3 if turn.sorts else 2), pairs * (1 if turn.per_pair else 2), device=device).to(table)
        for _ in range(2)
    )
    turn = turn._replace(first=0 if turn.sorts else 1)

    def call() -> tuple[Tensor, ...]:
        results = []
        for back in (False, True):
            turned, other = rotary_embedding(q, k, cos[None], sin[None], turn._replace(back=back), (False, True))
            assert other is not None
            results += [turned, other]
        return tuple(results)

    return call
