# mypy: allow-incomplete-defs
"""Split keys: where few queries make few programs, several share a tile's keys, and one more launch combines their parts.

    lse = log2(sum over parts of 2^lse_i),   out = sum over parts of 2^(lse_i - lse) * out_i,   dq = sum over parts of dq_i

Parts are fp32, (parts, B, H, L, dim), of a packed batch too, whose L is the longest sequence's, and added in order: results are
deterministic, and the same on every GPU that has the same number of multiprocessors.
Source: Dao et al., 2023, "Flash-Decoding for long-context inference".
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from .attention_problem import PACKED_TYPES, PLACE_TYPES, Form, Problem, places
from .attention_program import at, clear_surplus, own_queries, own_sequence
from .attention_tiles import load_tile, store_tile
from .launch import Variant, empty, jit, launch, multiprocessors, pointer, tl
from .overlap import wait_for_previous

LEAST_KEYS = 128  # a part: fewer don't pay for another program's start and for combining


@jit
def attention_combine_kernel(
    part_ptr,
    part_lse_ptr,
    out_ptr,
    lse_ptr,
    ends_ptr,
    out_batch: tl.int64,
    out_head: tl.int64,
    out_row: tl.int32,
    parts: tl.int32,
    L: tl.int32,
    heads: tl.int32,
    tokens: tl.int32,
    batches: tl.int32,
    BLOCK_M: tl.constexpr,
    EV: tl.constexpr,
    BLOCK_EV: tl.constexpr,
    VEC: tl.constexpr,
):
    """One program for BLOCK_M rows of one head. Without part_lse_ptr parts are just added."""
    wait_for_previous()
    batch, head, head_index, row_start, exists = own_queries(L, heads, BLOCK_M)
    all_rows = (tl.num_programs(0) // tl.cdiv(L, BLOCK_M)).to(tl.int64) * L
    first = head_index.to(tl.int64) * L + row_start
    rows = first + tl.arange(0, BLOCK_M)
    accumulator = tl.zeros((BLOCK_M, BLOCK_EV), tl.float32)
    if part_lse_ptr is not None:
        highest = tl.full((BLOCK_M,), -float("inf"), tl.float32)
        for part in range(parts):
            highest = tl.maximum(highest, tl.load(part_lse_ptr + part * all_rows + rows, mask=exists, other=0.0))
        shift = tl.where(highest == -float("inf"), 0.0, highest)
        total = tl.zeros((BLOCK_M,), tl.float32)
        for part in range(parts):
            weight = tl.exp2(tl.load(part_lse_ptr + part * all_rows + rows, mask=exists, other=0.0) - shift)
            total += weight
            tile = load_tile(part_ptr + (part * all_rows + first) * EV, EV, exists, BLOCK_M, EV, BLOCK_EV, VEC)
            accumulator += weight[:, None] * tile
        total = tl.where(total == 0.0, 1.0, total)
        accumulator = accumulator / total[:, None]
        tl.store(lse_ptr + rows, highest + tl.log2(total), mask=exists)
    else:
        for part in range(parts):
            accumulator += load_tile(part_ptr + (part * all_rows + first) * EV, EV, exists, BLOCK_M, EV, BLOCK_EV, VEC)
    place = (out_batch, out_head, out_row)
    index, first_q, length, _, _ = own_sequence((ends_ptr, ends_ptr), batch, L, L)
    if ends_ptr is not None:
        exists = tl.arange(0, BLOCK_M) < length - row_start
        step = tl.cdiv(L, BLOCK_M) * BLOCK_M
        clear_surplus(
            out_ptr, place, head, ends_ptr, tokens, batch, batches, row_start, step, BLOCK_M, EV, BLOCK_EV, VEC
        )
    out_ptr = at(out_ptr, place, index, head, first_q + row_start)
    store_tile(out_ptr, out_row, exists, accumulator, BLOCK_M, EV, BLOCK_EV, VEC)


def key_parts(problem: Problem, rows: int, device: torch.device) -> int:
    """How many programs share the keys of a tile of `rows` queries on `device`: 1 where tiles fill half of it."""
    tiles = problem.tiles(rows)
    available = multiprocessors(device)
    if tiles == 0 or 2 * tiles > available:
        return 1
    return max(1, min(-(-available // tiles), -(-problem.keys // LEAST_KEYS)))


class Parts:
    """Where the parts of a result (B, L, H, dim) go, each a (B, L, H, dim) one after the other, and their log-sum-exps.

    Of a packed batch, each of several parts is padded: B sequences of L queries. One alone lies as the result does.
    """

    def __init__(self, parts: int, problem: Problem, result: Tensor, lse: Tensor | None = None) -> None:
        self.parts, self.problem = parts, problem
        self.result, self.result_lse = result, lse
        batch, self.queries, self.heads, dim = result.shape
        if parts > 1:
            batch, self.queries = problem.batch, problem.queries
        rows = (parts * batch, self.heads, self.queries)
        self.rows = batch * self.heads
        self.tensor = empty((*rows, dim), torch.float32, result.device).transpose(1, 2)
        self.lse = None if lse is None else empty(rows, torch.float32, result.device)

    def combine(self, form: Form) -> None:
        """Launch what writes the result, and its log-sum-exp where there is one."""
        result, problem = self.result, self.problem
        variant = combine_variant(form if self.parts > 1 else whole(form), result.shape[3], self.lse is not None)
        ends, counts = None, (0, 0)
        if self.parts > 1:
            (ends, _), counts = problem.packed(result)
        sizes = (*places(result), self.parts, self.queries, self.heads, *counts)
        grid = (-(-self.queries // int(variant.constants["BLOCK_M"])) * self.rows,)
        launch(variant, grid, self.tensor, self.lse, result, self.result_lse, ends, *sizes)


@cache
def whole(form: Form) -> Form:
    """The form of what reads a packed batch as a single sequence."""
    return replace(form, packed=False)


@cache
def combine_variant(form: Form, dim: int, with_lse: bool) -> Variant:
    """The program that combines parts of `dim` columns: outputs with their log-sum-exps, or gradients without."""
    block = form.blocks[0] if dim == form.head_dim else form.blocks[1]
    lse = pointer(torch.float32 if with_lse else None)
    tensors = (pointer(torch.float32), lse, pointer(form.dtype), lse, pointer(form.ends()[0]))
    types = (*tensors, *PLACE_TYPES, "i32", "i32", "i32", *PACKED_TYPES)
    constants = {"BLOCK_M": 16, "EV": dim, "BLOCK_EV": block, "VEC": form.vector}
    return Variant(attention_combine_kernel, types, constants, num_warps=4)
