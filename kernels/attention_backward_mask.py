# mypy: allow-incomplete-defs
"""Fused attention, backward: the gradient of a float mask. The maths are in `attention_backward`."""

from __future__ import annotations

from .attention_program import at, mask_end, mask_place, own_sequence, shared_head
from .attention_tiles import (
    apart,
    deferred,
    dot,
    drawn,
    dropped,
    is_covering,
    is_loaded_first,
    load_mask,
    load_tile,
    masked_scores,
    visible_keys,
)
from .launch import jit, tl
from .overlap import wait_for_previous


@jit
def attention_backward_mask_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    dmask_ptr,
    statistics_ptr,
    padding_ptr,
    mask_ptr,
    seed_ptr,
    ends_q_ptr,
    ends_k_ptr,
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
    mask_batches: tl.int32,
    mask_heads: tl.int32,
    SHARED_ROWS: tl.constexpr,
    SHARED_COLUMNS: tl.constexpr,
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
    PERIODIC: tl.constexpr,
    PAIRED: tl.constexpr,
):
    """One program for one tile of dmask, (mask_batches, mask_heads, 1 or L, 1 or S), over all that the mask is shared by.

    Where several share a tile, along the grid's second axis, dmask has a part for each, and each takes a share of the batch
    elements and heads. Each element is written once, by sums in a fixed order. Of a packed batch, L and S are the largest lengths,
    and a batch element is a sequence.
    """
    wait_for_previous()
    FORM: tl.constexpr = (E, EV, BLOCK_E, BLOCK_EV, CAUSAL, PRECISION, VEC, MASK_VEC)
    tiles_n = 1 if SHARED_COLUMNS else tl.cdiv(S, BLOCK_N)
    tiles_m = 1 if SHARED_ROWS else tl.cdiv(L, BLOCK_M)
    first_column = tl.program_id(0) % tiles_n * BLOCK_N
    first_row = tl.program_id(0) // tiles_n % tiles_m * BLOCK_M
    which = tl.program_id(0) // (tiles_n * tiles_m)
    first_batch, first_head = which // mask_heads, which % mask_heads
    end_row = L if SHARED_ROWS else tl.minimum(first_row + 1, L)
    end_column = S if SHARED_COLUMNS else tl.minimum(first_column + 1, S)
    row, column = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)

    dmask = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # Of the heads of a batch element, those that share the mask: all, or one.
    step = tl.where(mask_heads == 1, 1, heads)
    shared = tl.where(mask_batches == 1, batches, 1) * tl.where(mask_heads == 1, heads, 1)
    if PERIODIC:  # counted one by one: from a batch element to the next the step is another than from head to head
        step, together = 1, tl.where(mask_heads == 1, heads, 1)
        shared = batches // mask_batches * together
    share = tl.cdiv(shared, tl.num_programs(1)) * step
    origin = first_batch * heads + first_head
    first = 0 if PERIODIC else origin
    end = tl.minimum((tl.program_id(1) + 1) * share, shared * step) + first
    for number in range(first + tl.program_id(1) * share, end, step):
        index = number
        if PERIODIC:
            index = origin + number // together * (mask_batches * heads) + number % together
        batch, head = tl.cast(index // heads, tl.int64), tl.cast(index % heads, tl.int64)
        place, first_q, own_L, first_k, own_S = own_sequence((ends_q_ptr, ends_k_ptr), batch, L, S)
        last_row, last_column = end_row, end_column
        if ends_q_ptr is not None:
            last_row, last_column = tl.minimum(last_row, own_L), tl.minimum(last_column, own_S)
        hiding = (
            padding_ptr,
            batch * padding_batch,
            padding_column,
            mask_ptr,
            mask_place(batch, head, mask_batch, mask_head, mask_batches, PERIODIC),
            mask_row,
            mask_column,
            None,
            0,
        )
        drop = (seed_ptr, index, offset, threshold, rescale)
        end_run = mask_end(ends_k_ptr, mask_ptr, own_S, MASK_VEC)
        q_base = at(q_ptr, (q_batch, q_head, q_row), place, head, first_q)
        dout_base = at(dout_ptr, (dout_batch, dout_head, dout_row), place, head, first_q)
        k_base = at(k_ptr, (k_batch, k_head, k_row), place, shared_head(head, group), first_k)
        v_base = at(v_ptr, (v_batch, v_head, v_row), place, shared_head(head, group), first_k)
        for row_start in range(first_row, last_row, BLOCK_M):
            exists = row < own_L - row_start
            q_here = q_base + tl.cast(row_start, tl.int64) * q_row
            dout_here = dout_base + tl.cast(row_start, tl.int64) * dout_row
            q = load_tile(q_here, q_row, exists, BLOCK_M, E, BLOCK_E, VEC)
            dout = load_tile(dout_here, dout_row, exists, BLOCK_M, EV, BLOCK_EV, VEC)
            rows = tl.cast(index, tl.int64) * L + row_start + row
            lse = tl.load(statistics_ptr + rows, mask=exists, other=float("inf"))
            all_rows = tl.cast(batches, tl.int64) * heads * L
            delta = tl.load(statistics_ptr + all_rows + rows, mask=exists, other=0.0)
            if seed_ptr is not None:
                delta = delta * (1.0 / deferred(rescale))
            for column_start in range(first_column, last_column, BLOCK_N):
                visible = visible_keys(hiding, column_start, own_S, BLOCK_N)
                if padding_ptr is not None:
                    visible = apart(visible)
                k_here = k_base + tl.cast(column_start, tl.int64) * k_row
                v_here = v_base + tl.cast(column_start, tl.int64) * v_row
                k = load_tile(k_here, k_row, visible, BLOCK_N, E, BLOCK_E, VEC)
                v = load_tile(v_here, v_row, visible, BLOCK_N, EV, BLOCK_EV, VEC)
                mask = None
                if is_loaded_first(MASK_VEC, mask_ptr):
                    mask = load_mask(hiding, row_start, column_start, own_L, end_run, BLOCK_M, BLOCK_N, FORM)
                shown = visible
                if padding_ptr is None and is_covering(MASK_VEC, mask_ptr, ends_k_ptr):
                    shown = None
                scores = dot(q, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION)
                scores = masked_scores(
                    scores * scale,
                    hiding,
                    row_start,
                    column_start,
                    own_L,
                    end_run,
                    shown,
                    BLOCK_M,
                    BLOCK_N,
                    FORM,
                    mask=mask,
                )
                weights = tl.exp2(scores - lse[:, None])
                dweights = dot(dout, tl.trans(v), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION)
                if seed_ptr is not None:
                    draws = drawn(drop, row_start, column_start, BLOCK_M, BLOCK_N)
                    dweights = dropped(dweights, drop, draws, PAIRED)
                dmask += weights * (dweights - delta[:, None])

    if seed_ptr is not None:
        dmask *= deferred(rescale)
    rows = 1 if SHARED_ROWS else L
    columns = 1 if SHARED_COLUMNS else S
    # Said anew, from the loop's end: kept over the loop, it would be spilled.
    which = tl.program_id(0) // (tiles_n * tiles_m) + tl.program_id(1) * mask_batches * mask_heads
    base = dmask_ptr + (tl.cast(which, tl.int64) * rows + first_row) * columns + first_column
    if SHARED_ROWS and SHARED_COLUMNS:
        tl.store(base, tl.sum(dmask).to(dmask_ptr.dtype.element_ty))
    elif SHARED_ROWS:
        total = tl.sum(dmask, 0).to(dmask_ptr.dtype.element_ty)
        tl.store(base + column, total, mask=column < S - first_column)
    elif SHARED_COLUMNS:
        total = tl.sum(dmask, 1).to(dmask_ptr.dtype.element_ty)
        tl.store(base + row, total, mask=row < L - first_row)
    else:
        inside = (row < L - first_row)[:, None] & (column < S - first_column)[None, :]
        place = base + (tl.cast(row, tl.int64)[:, None] * S + column[None, :])
        tl.store(place, dmask.to(dmask_ptr.dtype.element_ty), mask=inside)
