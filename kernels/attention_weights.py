# mypy: allow-incomplete-defs
"""Attention's weights, for who asks to see them: computed again from the log-sum-exp that the forward left.

    weights = dropout(exp(scale * q @ k^T + mask) / 2^lse)   per head, (B, H, L, S), or averaged over the heads, (B, L, S)

One program owns a tile of queries and keys: of one head, or of all heads, one after the other, where they are averaged, so that
nothing per head is ever stored. Dropout is the forward's, by position: these are the weights that the output was made with.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from .attention_copies import copy_rows
from .attention_problem import COMMON_TYPES, PLACE_TYPES, Form, Problem, places
from .attention_program import at, mask_place
from .attention_tiles import (
    apart,
    dot,
    is_covering,
    is_loaded_first,
    kept,
    load_mask,
    load_tile,
    masked_scores,
    visible_keys,
)
from .launch import Variant, empty, jit, launch, pointer, tl
from .overlap import wait_for_previous
from .rows import run_pointers


@jit
def attention_weights_kernel(
    q_ptr,
    k_ptr,
    weights_ptr,
    lse_ptr,
    padding_ptr,
    mask_ptr,
    seed_ptr,
    q_batch: tl.int64,
    q_head: tl.int64,
    q_row: tl.int32,
    k_batch: tl.int64,
    k_head: tl.int64,
    k_row: tl.int32,
    padding_batch: tl.int64,
    padding_column: tl.int32,
    mask_batch: tl.int64,
    mask_head: tl.int64,
    mask_row: tl.int32,
    mask_column: tl.int32,
    L: tl.int32,
    S: tl.int32,
    heads: tl.int32,
    group: tl.int32,
    scale: tl.float32,
    offset: tl.int32,
    threshold: tl.int32,
    rescale: tl.float32,
    batches: tl.int32,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    AVERAGED: tl.constexpr,
    OUT_VEC: tl.constexpr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    VEC: tl.constexpr,
    MASK_VEC: tl.constexpr,
    PERIODIC: tl.constexpr,
):
    """scale: times log2(e). rescale: what dropout multiplies a kept weight by. OUT_VEC: see `weights_run`. batches: see `mask_place`."""
    wait_for_previous()
    # Nothing here is of v: its dimensions stand for q's.
    FORM: tl.constexpr = (E, E, BLOCK_E, BLOCK_E, CAUSAL, PRECISION, VEC, MASK_VEC)
    tiles_m, tiles_n = tl.cdiv(L, BLOCK_M), tl.cdiv(S, BLOCK_N)
    column_start = tl.program_id(0) % tiles_n * BLOCK_N
    row_start = tl.program_id(0) // tiles_n % tiles_m * BLOCK_M
    which = tl.program_id(0) // (tiles_n * tiles_m)  # batch, or batch * heads + head
    first_head = 0 if AVERAGED else which % heads
    batch = (which if AVERAGED else which // heads).to(tl.int64)
    row, column = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    exists = row < L - row_start

    padding = (padding_ptr, batch * padding_batch, padding_column, None, 0, 0, 0, None, 0)
    visible = visible_keys(padding, column_start, S, BLOCK_N)
    if padding_ptr is not None:
        visible = apart(visible)
    shown = visible
    if padding_ptr is None and is_covering(MASK_VEC, mask_ptr):
        shown = None
    lse_ptr += batch * heads * L + row_start
    result = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for index in range(first_head, heads if AVERAGED else first_head + 1):
        head = tl.cast(index, tl.int64)
        q = load_tile(
            at(q_ptr, (q_batch, q_head, q_row), batch, head, row_start), q_row, exists, BLOCK_M, E, BLOCK_E, VEC
        )
        k_here = at(k_ptr, (k_batch, k_head, k_row), batch, head // group, column_start)
        k = load_tile(k_here, k_row, visible, BLOCK_N, E, BLOCK_E, VEC)
        mask_start = mask_place(batch, head, mask_batch, mask_head, batches, PERIODIC)
        hiding = (None, 0, 0, mask_ptr, mask_start, mask_row, mask_column, None, 0)
        mask = None
        if is_loaded_first(MASK_VEC, mask_ptr):
            mask = load_mask(hiding, row_start, column_start, L, S, BLOCK_M, BLOCK_N, FORM)
        scores = dot(q, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION)
        scores = masked_scores(
            scores * scale, hiding, row_start, column_start, L, S, shown, BLOCK_M, BLOCK_N, FORM, mask=mask
        )
        lse = tl.load(lse_ptr + head * L + row, mask=exists, other=-float("inf"))
        lse = tl.where(lse == -float("inf"), float("inf"), lse)  # all weights of an empty row are zero
        weights = tl.exp2(scores - lse[:, None])
        if seed_ptr is not None:
            drop = (seed_ptr, batch.to(tl.int32) * heads + index, offset, threshold, rescale)
            keep = kept(drop, row_start, column_start, BLOCK_M, BLOCK_N)
            weights = tl.where(keep, weights * rescale, 0.0)
        result += weights
    if AVERAGED:
        result /= heads
    base = weights_ptr + (tl.cast(which, tl.int64) * L + row_start) * S + column_start
    pointers = run_pointers(base, tl.cast(row, tl.int64)[:, None] * S, column[None, :], OUT_VEC)
    inside = exists[:, None] & (column[None, :] // OUT_VEC < (S - column_start) // OUT_VEC)
    tl.store(pointers, result.to(weights_ptr.dtype.element_ty), mask=inside)


def attention_weights(problem: Problem, lse: Tensor, averaged: bool, dtype: torch.dtype) -> Tensor:
    """(B, H, L, S), or averaged over the heads (B, L, S), of `dtype`; zeros for a query without any visible key.

    problem: its q and k count, not its v, in place of which k is best passed. lse: what the forward returned.
    """
    if problem.copies:
        copy_rows(problem)
    q, k = problem.q, problem.k
    heads = () if averaged else (problem.heads,)
    weights = empty((problem.batch, *heads, problem.queries, problem.keys), dtype, q.device)
    variant = weights_variant(problem.form(), averaged, dtype, weights_run(problem.keys, dtype))
    tiles_m = -(-problem.queries // variant.constants["BLOCK_M"])
    tiles_n = -(-problem.keys // variant.constants["BLOCK_N"])
    grid = (tiles_m * tiles_n * problem.batch * (1 if averaged else problem.heads),)
    strides = (*places(q), *places(k))
    launch(variant, grid, q, k, weights, lse, *problem.tensors(), *strides, *problem.sizes(), problem.period)
    return weights


def weights_run(keys: int, dtype: torch.dtype) -> int:
    """The longest run, up to 16 bytes, at whose multiples all rows of weights start and end."""
    return min(16 // dtype.itemsize, keys & -keys) or 1


@cache
def weights_variant(form: Form, averaged: bool, dtype: torch.dtype, run: int) -> Variant:
    """The program that computes weights of `dtype`, stored in runs of `run` elements."""
    config = form.config("weights")
    tensors = (form.dtype, form.dtype, dtype, torch.float32, *form.masks())
    types = (*map(pointer, tensors), *PLACE_TYPES * 2, *COMMON_TYPES, "i32")
    common = {name: value for name, value in form.constants().items() if name not in ("EV", "BLOCK_EV")}
    tile = {"BLOCK_M": config.rows, "BLOCK_N": config.columns, "AVERAGED": averaged, "OUT_VEC": run}
    options = config.num_warps, config.num_stages, config.registers
    return Variant(attention_weights_kernel, types, {**tile, **common}, *options)
