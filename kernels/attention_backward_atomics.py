# mypy: allow-incomplete-defs
"""Fused attention, backward in one pass over the scores: dq is added up by atomics, in any order, so that it varies in its last bits.

The kernel of the keys takes dq as well: five products for the seven of the two passes in `attention_backward`, and weights,
masks and dropout computed once. Before it, a small launch writes the rows' statistics and clears dq; after it, where dq is
of 16 bits, another converts the fp32 sums. In fp32 they are dq itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from .attention_backward import cut_gradients, keys_variant, launch_keys, ready
from .attention_copies import copy_variants
from .attention_problem import PACKED_TYPES, PLACE_TYPES, Form, Problem, places
from .attention_program import at, clear_surplus, own_queries, own_sequence, row_statistics
from .attention_split import Parts, combine_variant, whole
from .attention_tiles import load_tile, store_tile
from .launch import Variant, jit, launch, pointer, tl
from .overlap import wait_for_previous


@jit
def attention_backward_rows_kernel(
    out_ptr,
    dout_ptr,
    dq_ptr,
    lse_ptr,
    dlse_ptr,
    statistics_ptr,
    ends_ptr,
    out_batch: tl.int64,
    out_head: tl.int64,
    out_row: tl.int32,
    dout_batch: tl.int64,
    dout_head: tl.int64,
    dout_row: tl.int32,
    dq_batch: tl.int64,
    dq_head: tl.int64,
    dq_row: tl.int32,
    L: tl.int32,
    heads: tl.int32,
    tokens: tl.int32,
    batches: tl.int32,
    BLOCK_M: tl.constexpr,
    E: tl.constexpr,
    EV: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_EV: tl.constexpr,
    VEC: tl.constexpr,
):
    """One program for BLOCK_M queries of one head: their statistics, and zeros where dq is going to be added up."""
    wait_for_previous()
    batch, head, head_index, row_start, exists = own_queries(L, heads, BLOCK_M)
    index, first_q, own_L, _, _ = own_sequence((ends_ptr, ends_ptr), batch, L, L)
    if ends_ptr is not None:
        exists = tl.arange(0, BLOCK_M) < own_L - row_start
        step = tl.cdiv(L, BLOCK_M) * BLOCK_M
        place = (dq_batch, dq_head, dq_row)
        clear_surplus(dq_ptr, place, head, ends_ptr, tokens, batch, batches, row_start, step, BLOCK_M, E, BLOCK_E, VEC)
    dq_ptr = at(dq_ptr, (dq_batch, dq_head, dq_row), index, head, first_q + row_start)
    store_tile(dq_ptr, dq_row, exists, tl.zeros((BLOCK_M, BLOCK_E), tl.float32), BLOCK_M, E, BLOCK_E, VEC)
    out_ptr = at(out_ptr, (out_batch, out_head, out_row), index, head, first_q + row_start)
    dout_ptr = at(dout_ptr, (dout_batch, dout_head, dout_row), index, head, first_q + row_start)
    out = load_tile(out_ptr, out_row, exists, BLOCK_M, EV, BLOCK_EV, VEC)
    dout = load_tile(dout_ptr, dout_row, exists, BLOCK_M, EV, BLOCK_EV, VEC)
    rows = head_index.to(tl.int64) * L + row_start + tl.arange(0, BLOCK_M)
    all_rows = (tl.num_programs(0) // tl.cdiv(L, BLOCK_M)).to(tl.int64) * L
    row_statistics(out, dout, lse_ptr, dlse_ptr, statistics_ptr, rows, all_rows, exists)


def attention_backward_atomics(
    problem: Problem,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None = None,
    *,
    into: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv as of `attention_backward`, in one launch less than three in fp32, and three in 16 bits."""
    form = problem.form()
    out, dout, dlse, statistics, (dq, dk, dv) = ready(problem, form, out, lse, dout, dlse, into)
    parts = None if form.dtype == torch.float32 else Parts(1, problem, dq)
    sums = dq if parts is None else parts.tensor

    variant = rows_variant(form, dlse is not None)
    tensors = (out, dout, sums)
    strides = [stride for tensor in tensors for stride in places(tensor)]
    grid = (problem.tiles(variant.constants["BLOCK_M"]),)
    (ends, _), counts = problem.packed(sums)
    launch(variant, grid, *tensors, lse, dlse, statistics, ends, *strides, problem.queries, problem.heads, *counts)
    launch_keys(problem, form, dout, statistics, dk, dv, sums)
    if parts is not None:
        parts.combine(form)
    return cut_gradients(problem, dq, dk, dv)


def atomics_variants(problem: Problem, with_dlse: bool = False) -> list[Variant]:
    """All that `attention_backward_atomics` launches; with_dlse: with dlse or without."""
    form = problem.form()
    variants = copy_variants(problem, backward=True)
    variants += [rows_variant(form, dlse) for dlse in ((False, True) if with_dlse else (False,))]
    variants.append(keys_variant(form, atomics=True))
    return (
        variants if form.dtype == torch.float32 else [*variants, combine_variant(whole(form), problem.head_dim, False)]
    )


@cache
def rows_variant(form: Form, with_dlse: bool = False) -> Variant:
    """The program that takes the rows' statistics and clears dq."""
    fp32 = torch.float32
    block_e, block_ev = form.blocks
    tensors = (form.dtype, form.dtype, fp32, fp32, fp32 if with_dlse else None, fp32, form.ends()[0])
    types = (*map(pointer, tensors), *PLACE_TYPES * 3, "i32", "i32", *PACKED_TYPES)
    dims = {"E": form.head_dim, "EV": form.value_dim, "BLOCK_E": block_e, "BLOCK_EV": block_ev}
    constants = {"BLOCK_M": max(16, 2048 // max(block_e, block_ev)), **dims, "VEC": form.vector}
    return Variant(attention_backward_rows_kernel, types, constants, num_warps=4)
