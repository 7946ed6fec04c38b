# mypy: allow-incomplete-defs
"""Fused attention, backward, in two deterministic launches, and the gradient of a float mask in a third.

    w = exp(scale * q @ k^T + mask) / 2^lse,   d = dropout's factor (0 or 1 / (1 - p); 1 without dropout)
    dv = (w * d)^T @ dout,   dw = d * (dout @ v^T),   ds = w * (dw - delta),   delta = sum over Ev of dout * out - log2(e) * dlse
    dq = scale * ds @ k,   dk = scale * ds^T @ q,   dmask = sum of ds over the dimensions that the mask is broadcast over

The first kernel owns BLOCK_M queries, passes over the keys as the forward does, and writes dq and the rows' statistics
(lse and delta), which the second reads: it owns BLOCK_N keys and passes over the queries. There, rows of hidden
keys are zero on loading and on storing, and need no mask in between: a key's row of dk and dv meets no other key.
Source: Dao, 2023, arXiv:2307.08691.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from .attention import empty_rows
from .attention_tiles import (
    COMMON_TYPES,
    PLACE_TYPES,
    Form,
    Problem,
    dot,
    kept,
    key_range,
    load_tile,
    masked_scores,
    places,
    readable,
    store_tile,
    visible_keys,
)
from .configs import attention_config
from .launch import Variant, empty, jit, launch, pointer, tl


@jit
def _pass_over_keys(
    dq,
    q,
    dout,
    lse,
    delta,
    k_ptr,
    v_ptr,
    padding_ptr,
    mask_ptr,
    seed_ptr,
    k_row,
    v_row,
    padding_column,
    mask_row,
    mask_column,
    row_start,
    start_key,
    end_key,
    L,
    S,
    scale,
    head,
    offset,
    threshold,
    rescale,
    MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    E: tl.constexpr,
    EV: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_EV: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    VEC: tl.constexpr,
    MASK_VEC: tl.constexpr,
):
    for start in range(start_key, end_key, BLOCK_N):
        visible = None
        if MASKED:
            visible = visible_keys(padding_ptr, padding_column, start, S, BLOCK_N)
        k = load_tile(k_ptr + tl.cast(start, tl.int64) * k_row, k_row, visible, BLOCK_N, E, BLOCK_E, VEC)
        v = load_tile(v_ptr + tl.cast(start, tl.int64) * v_row, v_row, visible, BLOCK_N, EV, BLOCK_EV, VEC)
        scores = dot(q, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION)
        if MASKED:
            scores = masked_scores(
                scores * scale,
                mask_ptr,
                mask_row,
                mask_column,
                row_start,
                start,
                L,
                S,
                visible,
                BLOCK_M,
                BLOCK_N,
                CAUSAL,
                MASK_VEC,
            )
            weights = tl.exp2(scores - lse[:, None])
        else:
            weights = tl.exp2(scores * scale - lse[:, None])
        dweights = dot(dout, tl.trans(v), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION)
        if seed_ptr is not None:
            keep = kept(seed_ptr, offset, threshold, head, row_start, start, BLOCK_M, BLOCK_N)
            dweights = tl.where(keep, dweights * rescale, 0.0)
        dscores = weights * (dweights - delta[:, None])
        dq = dot(dscores.to(k.dtype), k, dq, PRECISION)
    return dq


@jit
def attention_backward_queries_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    dout_ptr,
    dq_ptr,
    lse_ptr,
    dlse_ptr,
    statistics_ptr,
    padding_ptr,
    mask_ptr,
    seed_ptr,
    q_batch: tl.int64,
    q_head: tl.int64,
    q_row: tl.int32,
    k_batch: tl.int64,
    k_head: tl.int64,
    k_row: tl.int32,
    v_batch: tl.int64,
    v_head: tl.int64,
    v_row: tl.int32,
    out_batch: tl.int64,
    out_head: tl.int64,
    out_row: tl.int32,
    dout_batch: tl.int64,
    dout_head: tl.int64,
    dout_row: tl.int32,
    dq_batch: tl.int64,
    dq_head: tl.int64,
    dq_row: tl.int32,
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
    scale_out: tl.float32,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    E: tl.constexpr,
    EV: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_EV: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    VEC: tl.constexpr,
    MASK_VEC: tl.constexpr,
):
    """statistics: fp32 (2, B, H, L): lse, inf for rows without visible key, and delta. scale: scale_out times log2(e)."""
    tiles = tl.cdiv(L, BLOCK_M)
    row_start = tl.program_id(0) % tiles * BLOCK_M
    head_index = tl.program_id(0) // tiles
    batch, head = (head_index // heads).to(tl.int64), (head_index % heads).to(tl.int64)
    row = tl.arange(0, BLOCK_M)
    exists = row < L - row_start
    first = row_start.to(tl.int64)

    k_ptr += batch * k_batch + head // group * k_head
    v_ptr += batch * v_batch + head // group * v_head
    if padding_ptr is not None:
        padding_ptr += batch * padding_batch
    if mask_ptr is not None:
        mask_ptr += batch * mask_batch + head * mask_head
    q = load_tile(q_ptr + batch * q_batch + head * q_head + first * q_row, q_row, exists, BLOCK_M, E, BLOCK_E, VEC)
    out_ptr += batch * out_batch + head * out_head + first * out_row
    dout_ptr += batch * dout_batch + head * dout_head + first * dout_row
    out = load_tile(out_ptr, out_row, exists, BLOCK_M, EV, BLOCK_EV, VEC)
    dout = load_tile(dout_ptr, dout_row, exists, BLOCK_M, EV, BLOCK_EV, VEC)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    rows = head_index.to(tl.int64) * L + row_start + row
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + rows, mask=exists, other=0.0) * 1.4426950408889634
    lse = tl.load(lse_ptr + rows, mask=exists, other=-float("inf"))
    lse = tl.where(lse == -float("inf"), float("inf"), lse)  # all weights of an empty row are zero
    tl.store(statistics_ptr + rows, lse, mask=exists)
    all_rows = (tl.num_programs(0) // tiles).to(tl.int64) * L
    tl.store(statistics_ptr + all_rows + rows, delta, mask=exists)

    first_masked, end = key_range(padding_ptr, padding_column, S)
    if CAUSAL:
        first_masked = tl.minimum(first_masked, row_start + 1)
        end = tl.minimum(end, row_start + BLOCK_M)
    first_masked = tl.minimum(first_masked, end) // BLOCK_N * BLOCK_N
    if mask_ptr is not None:
        first_masked = 0
    dq = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    for MASKED in tl.static_range(2):
        if MASKED or mask_ptr is None:
            dq = _pass_over_keys(
                dq,
                q,
                dout,
                lse,
                delta,
                k_ptr,
                v_ptr,
                padding_ptr,
                mask_ptr,
                seed_ptr,
                k_row,
                v_row,
                padding_column,
                mask_row,
                mask_column,
                row_start,
                first_masked if MASKED else 0,
                end if MASKED else first_masked,
                L,
                S,
                scale,
                head_index,
                offset,
                threshold,
                rescale,
                MASKED,
                BLOCK_M,
                BLOCK_N,
                E,
                EV,
                BLOCK_E,
                BLOCK_EV,
                CAUSAL,
                PRECISION,
                VEC,
                MASK_VEC,
            )
    dq_ptr += batch * dq_batch + head * dq_head + first * dq_row
    store_tile(dq_ptr, dq_row, exists, dq * scale_out, BLOCK_M, E, BLOCK_E, VEC)


@jit
def _pass_over_queries(
    dk,
    dv,
    k,
    v,
    q_ptr,
    dout_ptr,
    statistics_ptr,
    all_rows,
    mask_ptr,
    seed_ptr,
    q_row,
    dout_row,
    mask_row,
    mask_column,
    column_start,
    start_row,
    end_row,
    L,
    S,
    scale,
    head,
    offset,
    threshold,
    rescale,
    MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    E: tl.constexpr,
    EV: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_EV: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    VEC: tl.constexpr,
    MASK_VEC: tl.constexpr,
):
    """Tiles are (keys, queries). statistics_ptr: of the head's first row."""
    row = tl.arange(0, BLOCK_M)
    for start in range(start_row, end_row, BLOCK_M):
        exists = row < L - start
        lse = tl.load(statistics_ptr + start + row, mask=exists, other=float("inf"))
        delta = tl.load(statistics_ptr + all_rows + start + row, mask=exists, other=0.0)
        q = load_tile(q_ptr + tl.cast(start, tl.int64) * q_row, q_row, exists, BLOCK_M, E, BLOCK_E, VEC)
        dout = load_tile(dout_ptr + tl.cast(start, tl.int64) * dout_row, dout_row, exists, BLOCK_M, EV, BLOCK_EV, VEC)
        scores = dot(k, tl.trans(q), tl.zeros((BLOCK_N, BLOCK_M), tl.float32), PRECISION)
        if MASKED:
            scores = masked_scores(
                scores * scale,
                mask_ptr,
                mask_row,
                mask_column,
                start,
                column_start,
                L,
                S,
                None,
                BLOCK_M,
                BLOCK_N,
                CAUSAL,
                MASK_VEC,
                True,
            )
            weights = tl.exp2(scores - lse[None, :])
        else:
            weights = tl.exp2(scores * scale - lse[None, :])
        dweights = dot(v, tl.trans(dout), tl.zeros((BLOCK_N, BLOCK_M), tl.float32), PRECISION)
        if seed_ptr is not None:
            keep = kept(seed_ptr, offset, threshold, head, start, column_start, BLOCK_M, BLOCK_N, True)
            dweights = tl.where(keep, dweights * rescale, 0.0)
            dscores = weights * (dweights - delta[None, :])
            weights = tl.where(keep, weights, 0.0)
        else:
            dscores = weights * (dweights - delta[None, :])
        dv = dot(weights.to(dout.dtype), dout, dv, PRECISION)
        dk = dot(dscores.to(q.dtype), q, dk, PRECISION)
    return dk, dv


@jit
def attention_backward_keys_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    dk_ptr,
    dv_ptr,
    statistics_ptr,
    padding_ptr,
    mask_ptr,
    seed_ptr,
    q_batch: tl.int64,
    q_head: tl.int64,
    q_row: tl.int32,
    k_batch: tl.int64,
    k_head: tl.int64,
    k_row: tl.int32,
    v_batch: tl.int64,
    v_head: tl.int64,
    v_row: tl.int32,
    dout_batch: tl.int64,
    dout_head: tl.int64,
    dout_row: tl.int32,
    dk_batch: tl.int64,
    dk_head: tl.int64,
    dk_row: tl.int32,
    dv_batch: tl.int64,
    dv_head: tl.int64,
    dv_row: tl.int32,
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
    scale_out: tl.float32,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    E: tl.constexpr,
    EV: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_EV: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    VEC: tl.constexpr,
    MASK_VEC: tl.constexpr,
):
    """One program for BLOCK_N keys of one key head, over all query heads of its group."""
    tiles = tl.cdiv(S, BLOCK_N)
    column_start = tl.program_id(0) % tiles * BLOCK_N
    key_heads = heads // group
    batch = (tl.program_id(0) // tiles // key_heads).to(tl.int64)
    key_head = (tl.program_id(0) // tiles % key_heads).to(tl.int64)
    first = column_start.to(tl.int64)
    if padding_ptr is not None:
        padding_ptr += batch * padding_batch
    visible = visible_keys(padding_ptr, padding_column, column_start, S, BLOCK_N)
    k_ptr += batch * k_batch + key_head * k_head + first * k_row
    v_ptr += batch * v_batch + key_head * v_head + first * v_row
    k = load_tile(k_ptr, k_row, visible, BLOCK_N, E, BLOCK_E, VEC)
    v = load_tile(v_ptr, v_row, visible, BLOCK_N, EV, BLOCK_EV, VEC)

    end = tl.where(tl.max(visible.to(tl.int32), 0) > 0, L, 0)  # nothing to do for keys that are all padding
    start = 0
    end_masked = end
    if CAUSAL:  # the first row that sees these keys, and the first one that all rows from then on see whole
        start = column_start // BLOCK_M * BLOCK_M
        end_masked = tl.minimum(end, (column_start + BLOCK_N + BLOCK_M - 2) // BLOCK_M * BLOCK_M)
    elif mask_ptr is None:
        end_masked = 0
    if mask_ptr is not None:
        end_masked = end
    all_rows = (tl.num_programs(0) // tiles * group).to(tl.int64) * L
    dk = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_EV), tl.float32)
    for member in range(group):
        head = key_head * group + member
        head_index = batch * heads + head
        mask_here = mask_ptr
        if mask_ptr is not None:
            mask_here = mask_ptr + (batch * mask_batch + head * mask_head)
        for MASKED in tl.static_range(1, -1, -1):
            if (mask_ptr is None) if not MASKED else (CAUSAL or mask_ptr is not None):
                dk, dv = _pass_over_queries(
                    dk,
                    dv,
                    k,
                    v,
                    q_ptr + (batch * q_batch + head * q_head),
                    dout_ptr + (batch * dout_batch + head * dout_head),
                    statistics_ptr + head_index * L,
                    all_rows,
                    mask_here,
                    seed_ptr,
                    q_row,
                    dout_row,
                    mask_row,
                    mask_column,
                    column_start,
                    start if MASKED else tl.maximum(start, end_masked),
                    end_masked if MASKED else end,
                    L,
                    S,
                    scale,
                    head_index.to(tl.int32),
                    offset,
                    threshold,
                    rescale,
                    MASKED,
                    BLOCK_M,
                    BLOCK_N,
                    E,
                    EV,
                    BLOCK_E,
                    BLOCK_EV,
                    CAUSAL,
                    PRECISION,
                    VEC,
                    MASK_VEC,
                )
    exists = tl.arange(0, BLOCK_N) < S - column_start
    dk = tl.where(visible[:, None], dk * scale_out, 0.0)
    dv = tl.where(visible[:, None], dv * rescale, 0.0)
    dk_ptr += batch * dk_batch + key_head * dk_head + first * dk_row
    dv_ptr += batch * dv_batch + key_head * dv_head + first * dv_row
    store_tile(dk_ptr, dk_row, exists, dk, BLOCK_N, E, BLOCK_E, VEC)
    store_tile(dv_ptr, dv_row, exists, dv, BLOCK_N, EV, BLOCK_EV, VEC)


def attention_backward(
    problem: Problem, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv, laid out over batch and rows as q, k and v are.

    out, lse: what the forward returned; dout, dlse: the gradients that arrive for them, in any layout.
    """
    q, k, v = problem.q, problem.k, problem.v
    out, dout = readable(out), readable(dout)
    dlse = None if dlse is None else dlse.contiguous()
    dims = (problem.head_dim, problem.head_dim, problem.value_dim)
    dq, dk, dv = (empty_rows(t, dim) for t, dim in zip(problem.given, dims))
    statistics = empty((2, *lse.shape), torch.float32, q.device)
    form = problem.form(out, dout)

    variant = queries_variant(form, dlse is not None)
    tensors = (q, k, v, out, dout, dq)
    strides = [stride for tensor in tensors for stride in places(tensor)]
    grid = (-(-problem.queries // variant.constants["BLOCK_M"]) * problem.batch * problem.heads,)
    rows = (lse, dlse, statistics)
    launch(variant, grid, *tensors, *rows, *problem.tensors(), *strides, *problem.sizes(), problem.scale)

    variant = keys_variant(form)
    tensors = (q, k, v, dout, dk, dv)
    strides = [stride for tensor in tensors for stride in places(tensor)]
    grid = (-(-problem.keys // variant.constants["BLOCK_N"]) * problem.batch * k.shape[2],)
    launch(variant, grid, *tensors, statistics, *problem.tensors(), *strides, *problem.sizes(), problem.scale)
    return dq, dk, dv


@cache
def queries_variant(form: Form, with_dlse: bool = False) -> Variant:
    """The program that takes dq and the rows' statistics."""
    fp32 = torch.float32
    return _variant(attention_backward_queries_kernel, "queries", form, (fp32, fp32 if with_dlse else None, fp32))


@cache
def keys_variant(form: Form) -> Variant:
    """The program that takes dk and dv."""
    return _variant(attention_backward_keys_kernel, "keys", form, (torch.float32,))


def _variant(kernel: object, name: str, form: Form, rows: tuple[torch.dtype | None, ...]) -> Variant:
    config = attention_config(name, form.dtype.itemsize, max(form.blocks))
    types = (*map(pointer, ((form.dtype,) * 6 + rows + form.masks())), *PLACE_TYPES * 6, *COMMON_TYPES, "fp32")
    constants = {"BLOCK_M": config.rows, "BLOCK_N": config.columns, **form.constants()}
    return Variant(kernel, types, constants, config.num_warps, config.num_stages)
