# mypy: allow-incomplete-defs
"""Fused attention, backward: the kernel of dq and of the rows' statistics. The maths are in `attention_backward`."""

from __future__ import annotations

from .attention_program import (
    at,
    clear_surplus,
    keys_to_visit,
    mask_end,
    mask_place,
    own_queries,
    own_sequence,
    row_statistics,
    shared_head,
)
from .attention_tiles import (
    deferred,
    dot,
    drawn,
    dropped,
    is_covering,
    is_loaded_first,
    load_keys,
    load_mask,
    load_rows,
    masked_scores,
    store_rows,
    visible_keys,
)
from .dropout import spread
from .launch import jit, tl
from .overlap import wait_for_previous


@jit
def _pass_over_keys(
    dq,
    excess,
    q,
    dout,
    lse,
    delta,
    k_ptr,
    k_row,
    v_ptr,
    v_row,
    hiding,
    drop,
    row_start,
    start_key,
    end_key,
    L,
    S,
    scale,
    MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FORM: tl.constexpr,
):
    """dq, and in `excess` the sums over keys of dscores where they are wanted."""
    E: tl.constexpr = FORM[0]
    EV: tl.constexpr = FORM[1]
    BLOCK_E: tl.constexpr = FORM[2]
    BLOCK_EV: tl.constexpr = FORM[3]
    PRECISION: tl.constexpr = FORM[5]
    LISTED: tl.constexpr = FORM[8]
    EXACT: tl.constexpr = FORM[10]
    PAIRED: tl.constexpr = FORM[11]
    COVERED: tl.constexpr = FORM[12]
    WARPS: tl.constexpr = FORM[13]
    order = spread(BLOCK_M, WARPS)
    # The last block alone: not pipelined, see docs/attention.md; masked blocks of any number are.
    STAGES: tl.constexpr = 1 if MASKED and (LISTED or (hiding[0] is None and hiding[3] is None)) else None
    # From 0: in a loop with another start, Triton finds no neighbouring elements to load at once.
    for step in tl.range(0, end_key - start_key, BLOCK_N, num_stages=STAGES):
        start = start_key + step
        visible = None
        if MASKED:
            visible = visible_keys(hiding, start, end_key, BLOCK_N, LISTED)
        k = load_keys(k_ptr, k_row, hiding, start, visible, BLOCK_N, E, BLOCK_E, FORM)
        v = load_keys(v_ptr, v_row, hiding, start, visible, BLOCK_N, EV, BLOCK_EV, FORM)
        mask = None
        if MASKED and is_loaded_first(FORM[7], hiding[3]):
            mask = load_mask(hiding, row_start, start, L, S, BLOCK_M, BLOCK_N, FORM, order=order)
        scores = dot(q, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION)
        if MASKED:
            shown = None if COVERED else visible
            scores = masked_scores(
                scores * scale, hiding, row_start, start, L, S, shown, BLOCK_M, BLOCK_N, FORM, order=order, mask=mask
            )
            weights = tl.exp2(scores - lse[:, None])
        else:
            weights = tl.exp2(scores * scale - lse[:, None])
        dweights = dot(dout, tl.trans(v), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION)
        if drop[0] is not None:
            # Among the weights, which are there before dweights: on sm_90, what is to be kept waits for these elsewhere, as bits of a register.
            chosen = dropped(weights, drop, drawn(drop, row_start, start, BLOCK_M, BLOCK_N, order=order), PAIRED)
            dscores = chosen * dweights - weights * delta[:, None]
        else:
            dscores = weights * (dweights - delta[:, None])
        if EXACT:
            excess += tl.sum(dscores, 1)
        dq = dot(dscores.to(k.dtype), k, dq, PRECISION)
    return dq, excess


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
    list_ptr,
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
    tokens: tl.int32,
    batches: tl.int32,
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
    UNIFORM: tl.constexpr,
    PAIRED: tl.constexpr,
    EXACT: tl.constexpr,
    WARPS: tl.constexpr,
):
    """statistics: fp32 (2, B, H, L): lse, inf for rows without visible key, and delta. scale: scale_out times log2(e). WARPS: see `spread`.

    EXACT: delta, which `out` gives as exactly as it is rounded, is corrected for the launches that follow: a row's dscores add
    up to what arrives for its log-sum-exp.
    """
    wait_for_previous()
    LISTED: tl.constexpr = padding_ptr is not None and seed_ptr is None and mask_ptr is None and not CAUSAL
    COVERED: tl.constexpr = padding_ptr is None and is_covering(MASK_VEC, mask_ptr, ends_k_ptr)
    FORM: tl.constexpr = (
        E,
        EV,
        BLOCK_E,
        BLOCK_EV,
        CAUSAL,
        PRECISION,
        VEC,
        MASK_VEC,
        LISTED,
        UNIFORM,
        EXACT,
        PAIRED,
        COVERED,
        WARPS,
    )
    longest = L
    batch, head, head_index, row_start, _ = own_queries(L, heads, BLOCK_M)
    index, first_q, L, first_k, S = own_sequence((ends_q_ptr, ends_k_ptr), batch, L, S)
    row = spread(BLOCK_M, WARPS)
    exists = row < L - row_start
    if ends_q_ptr is not None:
        S = tl.where(row_start < L, S, 0)  # a tile behind its sequence's end has nothing to do
    q_ptr = at(q_ptr, (q_batch, q_head, q_row), index, head, first_q + row_start)
    k_ptr = at(k_ptr, (k_batch, k_head, k_row), index, shared_head(head, group), first_k)
    v_ptr = at(v_ptr, (v_batch, v_head, v_row), index, shared_head(head, group), first_k)
    out_ptr = at(out_ptr, (out_batch, out_head, out_row), index, head, first_q + row_start)
    dout_ptr = at(dout_ptr, (dout_batch, dout_head, dout_row), index, head, first_q + row_start)
    hiding = (
        padding_ptr,
        batch * padding_batch,
        padding_column,
        mask_ptr,
        mask_place(batch, head, mask_batch, mask_head, batches, PERIODIC),
        mask_row,
        mask_column,
        list_ptr,
        batch * S,
    )
    drop = (seed_ptr, head_index, offset, threshold, rescale)
    q = load_rows(q_ptr, row * q_row, exists, E, BLOCK_E, VEC)
    out = load_rows(out_ptr, row * out_row, exists, EV, BLOCK_EV, VEC)
    dout = load_rows(dout_ptr, row * dout_row, exists, EV, BLOCK_EV, VEC)
    rows = head_index.to(tl.int64) * longest + row_start + row
    all_rows = (tl.num_programs(0) // tl.cdiv(longest, BLOCK_M)).to(tl.int64) * longest
    # Programs that share a row's keys all write its statistics, equal to the bit, and read none of them.
    lse, delta = row_statistics(out, dout, lse_ptr, dlse_ptr, statistics_ptr, rows, all_rows, exists)

    start, first_masked, end = keys_to_visit(hiding, row_start, S, BLOCK_M, BLOCK_N, FORM)
    if seed_ptr is not None:
        delta = delta / deferred(rescale)
        scale_out = scale_out * deferred(rescale)
    dq = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    excess = tl.zeros((BLOCK_M,), tl.float32)
    for MASKED in tl.static_range(2):
        if MASKED or mask_ptr is None:
            dq, excess = _pass_over_keys(
                dq,
                excess,
                q,
                dout,
                lse,
                delta,
                k_ptr,
                k_row,
                v_ptr,
                v_row,
                hiding,
                drop,
                row_start,
                first_masked if MASKED else start,
                end if MASKED else first_masked,
                L,
                mask_end(ends_k_ptr, mask_ptr, S, MASK_VEC),
                scale,
                MASKED,
                BLOCK_M,
                BLOCK_N,
                FORM,
            )
    if EXACT:
        if seed_ptr is not None:
            delta, excess = delta * deferred(rescale), excess * deferred(rescale)
        if dlse_ptr is not None:
            excess -= tl.load(dlse_ptr + rows, mask=exists, other=0.0) * 1.4426950408889634
        tl.store(statistics_ptr + all_rows + rows, delta + excess, mask=exists)
    if ends_q_ptr is not None:
        step = tl.cdiv(longest, BLOCK_M) * BLOCK_M
        place = (dq_batch, dq_head, dq_row)
        clear_surplus(
            dq_ptr, place, head, ends_q_ptr, tokens, batch, batches, row_start, step, BLOCK_M, E, BLOCK_E, VEC
        )
        split = tl.num_programs(1) > 1  # parts are padded
        index, first_q = tl.where(split, batch, index), tl.where(split, 0, first_q)
    part = tl.program_id(1) * (tl.num_programs(0) // tl.cdiv(longest, BLOCK_M) // heads).to(
        tl.int64
    )  # in batch elements
    dq_ptr = at(dq_ptr, (dq_batch, dq_head, dq_row), part + index, head, first_q + row_start)
    row = spread(BLOCK_M, WARPS)  # said anew, with what follows: kept over the loop, it would be spilled
    exists = row_start + row < L
    store_rows(dq_ptr, row * dq_row, exists, dq * scale_out, E, BLOCK_E, VEC)
