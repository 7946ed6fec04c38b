# mypy: allow-incomplete-defs
"""Fused attention, backward: the kernel of dk and dv. The maths are in `attention_backward`."""

from __future__ import annotations

from .attention_program import (
    at,
    batch_and_head,
    clear_surplus,
    mask_end,
    mask_place,
    own_keys,
    own_sequence,
    shared_head,
    uniform,
)
from .attention_tiles import (
    add_tile,
    apart,
    deferred,
    dot,
    drawn,
    dropped,
    is_covering,
    is_loaded_first,
    load_mask,
    load_rows,
    load_tile,
    masked_scores,
    store_rows,
    visible_keys,
)
from .dropout import load_seed, spread
from .launch import jit, tl
from .overlap import wait_for_previous


@jit
def _pass_over_queries(
    dk,
    dv,
    k,
    v,
    q_ptr,
    q_row,
    dout_ptr,
    dout_row,
    adding,
    statistics_ptr,
    all_rows,
    hiding,
    drop,
    seed,
    visible,
    keys,
    column_start,
    start_row,
    end_row,
    L,
    S,
    scale,
    MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FORM: tl.constexpr,
):
    """Tiles are (keys, queries). statistics_ptr: of the head's first row. visible: keys (BLOCK_N,), or None: see `masked_scores`.

    seed: dropout's, or None where it is loaded here.
    adding: (fp32 pointer to dq or None, offset of the head's first row, row stride, k with zeros for hidden keys, scale).
    """
    E: tl.constexpr = FORM[0]
    EV: tl.constexpr = FORM[1]
    BLOCK_E: tl.constexpr = FORM[2]
    BLOCK_EV: tl.constexpr = FORM[3]
    PRECISION: tl.constexpr = FORM[5]
    VEC: tl.constexpr = FORM[6]
    PAIRED: tl.constexpr = FORM[8]
    ONE_CHOICE: tl.constexpr = FORM[9]
    WARPS: tl.constexpr = FORM[10]
    NEIGHBOURS: tl.constexpr = "both" if WARPS > 0 and BLOCK_N >= 32 * WARPS else "rows"
    row = tl.arange(0, BLOCK_M)
    for start in range(start_row, end_row, BLOCK_M):
        exists = row < L - start
        lse = tl.load(statistics_ptr + start + row, mask=exists, other=float("inf"))
        delta = tl.load(statistics_ptr + all_rows + start + row, mask=exists, other=0.0)
        if drop[0] is not None:
            delta = delta * (1.0 / deferred(drop[4]))
        q = load_tile(q_ptr + tl.cast(start, tl.int64) * q_row, q_row, exists, BLOCK_M, E, BLOCK_E, VEC)
        dout = load_tile(dout_ptr + tl.cast(start, tl.int64) * dout_row, dout_row, exists, BLOCK_M, EV, BLOCK_EV, VEC)
        mask = None
        if MASKED and is_loaded_first(FORM[7], hiding[3], max(BLOCK_E, BLOCK_EV)):
            mask = load_mask(hiding, start, column_start, L, S, BLOCK_M, BLOCK_N, FORM, True, keys)
        scores = dot(k, tl.trans(q), tl.zeros((BLOCK_N, BLOCK_M), tl.float32), PRECISION)
        if MASKED:
            scores = masked_scores(
                scores * scale, hiding, start, column_start, L, S, visible, BLOCK_M, BLOCK_N, FORM, True, keys, mask
            )
            weights = tl.exp2(scores - lse[None, :])
        else:
            weights = tl.exp2(scores * scale - lse[None, :])
        dweights = dot(v, tl.trans(dout), tl.zeros((BLOCK_N, BLOCK_M), tl.float32), PRECISION)
        if ONE_CHOICE:
            draws = drawn(drop, start, column_start, BLOCK_M, BLOCK_N, True, keys, seed)
            chosen = dropped(weights, drop, draws, PAIRED, NEIGHBOURS)
            shared = chosen.to(dout.dtype)
            dscores = chosen * dweights - weights * delta[None, :]
        else:
            shared = weights.to(dout.dtype)
            if drop[0] is not None:
                draws = drawn(drop, start, column_start, BLOCK_M, BLOCK_N, True, keys, seed)
                dweights = dropped(dweights, drop, draws, PAIRED, "rows")
                shared = dropped(shared, drop, draws, PAIRED, "rows")
            dscores = weights * (dweights - delta[None, :])
        dv = dot(shared, dout, dv, PRECISION)
        dk = dot(dscores.to(q.dtype), q, dk, PRECISION)
        if adding[0] is not None:
            dq_ptr, dq_start, dq_row, k_visible, scale_out = adding
            dq = dot(tl.trans(dscores.to(q.dtype)), k_visible, tl.zeros((BLOCK_M, BLOCK_E), tl.float32), PRECISION)
            dq_ptr += dq_start + tl.cast(start, tl.int64) * dq_row
            add_tile(dq_ptr, dq_row, exists, dq * scale_out, BLOCK_M, E, BLOCK_E, VEC)
    return dk, dv


@jit
def _clear_surplus(
    pointers,
    places,
    packed,
    batch,
    key_head,
    start,
    BLOCK_N: tl.constexpr,
    FORM: tl.constexpr,
):
    """Of dk and dv: see `clear_surplus`. packed: the sequences' ends, rows, sequences, and keys of the longest of these."""
    E: tl.constexpr = FORM[0]
    EV: tl.constexpr = FORM[1]
    BLOCK_E: tl.constexpr = FORM[2]
    BLOCK_EV: tl.constexpr = FORM[3]
    VEC: tl.constexpr = FORM[6]
    dk_ptr, dv_ptr = pointers
    dk_place, dv_place = places
    ends_ptr, tokens, batches, longest = packed
    step = tl.cdiv(longest, BLOCK_N) * BLOCK_N
    clear_surplus(dk_ptr, dk_place, key_head, ends_ptr, tokens, batch, batches, start, step, BLOCK_N, E, BLOCK_E, VEC)
    clear_surplus(dv_ptr, dv_place, key_head, ends_ptr, tokens, batch, batches, start, step, BLOCK_N, EV, BLOCK_EV, VEC)


@jit
def attention_backward_keys_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    dk_ptr,
    dv_ptr,
    dq_ptr,
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
    dk_batch: tl.int64,
    dk_head: tl.int64,
    dk_row: tl.int32,
    dv_batch: tl.int64,
    dv_head: tl.int64,
    dv_row: tl.int32,
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
    ONE_CHOICE: tl.constexpr,
    FRUGAL: tl.constexpr,
    ONE_SEED: tl.constexpr,
    COUNTED: tl.constexpr,
    WARPS: tl.constexpr,
):
    """One program for BLOCK_N keys of one key head, over all query heads of its group.

    dq_ptr: fp32, cleared, where dq is added to by atomics; None where the kernel of the queries takes it.
    FRUGAL: what follows from the head, and which keys are visible, is worked out anew for each head and after the last one: kept over
    the loops, it would be spilled.
    ONE_SEED: dropout's seed is loaded once. Where each of two loops does, the numbers that follow from it are kept twice, over both.
    ONE_CHOICE: dropout chooses once among the weights, for dv and dscores, and not among these and what arrives for them.
    COUNTED: FRUGAL, batch element * heads + head is the loop's own number, and not worked out.
    """
    wait_for_previous()
    FORM: tl.constexpr = (E, EV, BLOCK_E, BLOCK_EV, CAUSAL, PRECISION, VEC, MASK_VEC, PAIRED, ONE_CHOICE, WARPS)
    longest_q, longest_k = L, S
    key_index, column_start = own_keys(S, BLOCK_N)
    batch, key_head = batch_and_head(key_index, heads // group)
    index, first_q, L, first_k, S = own_sequence((ends_q_ptr, ends_k_ptr), batch, L, S)
    gradients, packed = (dk_ptr, dv_ptr), (ends_k_ptr, tokens, batches, longest_k)
    places = ((dk_batch, dk_head, dk_row), (dv_batch, dv_head, dv_row))
    if ends_q_ptr is not None and not FRUGAL:
        _clear_surplus(gradients, places, packed, batch, key_head, column_start, BLOCK_N, FORM)
    k_ptr = at(k_ptr, (k_batch, k_head, k_row), index, key_head, first_k + column_start)
    v_ptr = at(v_ptr, (v_batch, v_head, v_row), index, key_head, first_k + column_start)
    if not FRUGAL:
        dk_ptr = at(dk_ptr, (dk_batch, dk_head, dk_row), index, key_head, first_k + column_start)
        dv_ptr = at(dv_ptr, (dv_batch, dv_head, dv_row), index, key_head, first_k + column_start)
    padding = (padding_ptr, batch * padding_batch, padding_column, None, 0, 0, 0, None, 0)
    keys = spread(BLOCK_N, WARPS)
    visible = visible_keys(padding, column_start, S, BLOCK_N, keys=keys)
    visible = apart(visible)
    k_visible = load_rows(k_ptr, keys * k_row, visible, E, BLOCK_E, VEC)
    k = k_visible
    shown = None
    if dq_ptr is not None:
        # Here all keys of a row of dq meet: a hidden one counts as zero, and must not have a weight that is infinite, whatever
        # the row's log-sum-exp: in the masked pass it scores -inf, in the other one as a visible key, which all rows see.
        covered: tl.constexpr = padding_ptr is None and is_covering(MASK_VEC, mask_ptr, ends_k_ptr)
        if (CAUSAL or mask_ptr is not None) and not covered:
            shown = visible
        if mask_ptr is None:
            shown_column = tl.where(visible, keys, tl.max(tl.where(visible, keys, 0), 0))
            there = None
            if ends_k_ptr is not None:  # behind its sequence's end a tile may be behind all memory
                there = shown_column < S - column_start
            k = load_rows(k_ptr, shown_column * k_row, there, E, BLOCK_E, VEC)
    v = load_rows(v_ptr, keys * v_row, visible, EV, BLOCK_EV, VEC)
    seed = None
    if seed_ptr is not None:
        scale_out = scale_out * deferred(rescale)
        if ONE_SEED:
            low, high = load_seed(seed_ptr)
            if UNIFORM:  # the numbers that follow from it then lie in uniform registers
                low, high = uniform(low), uniform(high)
            seed = low, high

    end = tl.where(tl.max(visible.to(tl.int32), 0) > 0, L, 0)  # nothing to do for keys that are all padding
    if UNIFORM:
        end = uniform(end)
    start = 0
    end_masked = end
    if CAUSAL:  # the first row that sees these keys, and the first one that all rows from then on see whole
        start = column_start // BLOCK_M * BLOCK_M
        end_masked = tl.minimum(end, (column_start + BLOCK_N + BLOCK_M - 2) // BLOCK_M * BLOCK_M)
    elif mask_ptr is None:
        end_masked = 0
    if mask_ptr is not None:
        end_masked = end
    all_rows = (tl.num_programs(0) // tl.cdiv(longest_k, BLOCK_N) * group).to(tl.int64) * longest_q
    dk = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_EV), tl.float32)
    first_member, end_member = 0, group
    if FRUGAL:  # counted over all batch elements: batch element and head follow from the number alone
        first_member, end_member = key_index * group, key_index * group + group
        # Were the loop to be left out at times, what its front and what follows have in common would be worked out on both ways and kept.
        tl.assume(end_member > first_member)
    for member in range(first_member, end_member):
        if FRUGAL:
            element, head = batch_and_head(member, heads)
            own_index, own_q, own_L, _, own_S = own_sequence((ends_q_ptr, ends_k_ptr), element, longest_q, longest_k)
        else:
            element, head = batch, key_head * group + member
            own_index, own_q, own_L, own_S = index, first_q, L, S
        head_index = tl.cast(member, tl.int64) if COUNTED else element * heads + head
        mask_start = mask_place(element, head, mask_batch, mask_head, batches, PERIODIC)
        hiding = (None, 0, 0, mask_ptr, mask_start, mask_row, mask_column, None, 0)
        drop = (seed_ptr, head_index.to(tl.int32), offset, threshold, rescale)
        for MASKED in tl.static_range(1, -1, -1):
            if (mask_ptr is None) if not MASKED else (CAUSAL or mask_ptr is not None):
                dk, dv = _pass_over_queries(
                    dk,
                    dv,
                    k,
                    v,
                    at(q_ptr, (q_batch, q_head, q_row), own_index, head, own_q),
                    q_row,
                    at(dout_ptr, (dout_batch, dout_head, dout_row), own_index, head, own_q),
                    dout_row,
                    (dq_ptr, own_index * dq_batch + head * dq_head + own_q * dq_row, dq_row, k_visible, scale_out),
                    statistics_ptr + head_index * longest_q,
                    all_rows,
                    hiding,
                    drop,
                    seed,
                    shown,
                    keys,
                    column_start,
                    start if MASKED else tl.maximum(start, end_masked),
                    end_masked if MASKED else end,
                    own_L,
                    mask_end(ends_k_ptr, mask_ptr, own_S, MASK_VEC),
                    scale,
                    MASKED,
                    BLOCK_M,
                    BLOCK_N,
                    FORM,
                )
    # Said anew: kept over the loop, it would be spilled.
    keys = spread(BLOCK_N, WARPS)
    if FRUGAL:
        # By other operations than above, or the compiler would keep what it has.
        key_index = end_member // group - 1
        column_start = (tl.program_id(0) - key_index * tl.cdiv(longest_k, BLOCK_N)) * BLOCK_N
        batch, head = batch_and_head(end_member - 1, heads)
        key_head = shared_head(head, group)
        index, _, _, first_k, S = own_sequence((ends_q_ptr, ends_k_ptr), batch, longest_q, longest_k)
        dk_ptr = at(dk_ptr, (dk_batch, dk_head, dk_row), index, key_head, first_k + column_start)
        dv_ptr = at(dv_ptr, (dv_batch, dv_head, dv_row), index, key_head, first_k + column_start)
        padding = (padding_ptr, batch * padding_batch, padding_column, None, 0, 0, 0, None, 0)
        visible = visible_keys(padding, column_start, S, BLOCK_N, keys=keys)
    exists = column_start + keys < S
    dk, dv = dk * scale_out, dv * rescale
    # Else all keys that exist are visible. Without causal order it is said all the same: there some programs would spill without.
    if padding_ptr is not None or not CAUSAL:
        dk, dv = tl.where(visible[:, None], dk, 0.0), tl.where(visible[:, None], dv, 0.0)
    store_rows(dk_ptr, keys * dk_row, exists, dk, E, BLOCK_E, VEC)
    store_rows(dv_ptr, keys * dv_row, exists, dv, EV, BLOCK_EV, VEC)
    if ends_q_ptr is not None and FRUGAL:  # at last: before the loops, the places of rows would be kept over them
        _clear_surplus(gradients, places, packed, batch, key_head, column_start, BLOCK_N, FORM)
