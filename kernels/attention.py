# mypy: allow-incomplete-defs
"""Fused attention, forward: one kernel for any masks, dropout and layout, which keeps nothing of size L × S.

    out = dropout(softmax(scale * q @ k^T + mask)) @ v,   lse = log2(sum over keys of exp(scale * q @ k^T + mask))

q is (B, L, H, E), k (B, S, H / group, E), v (B, S, H / group, Ev), out (B, L, H, Ev), all read and written through their
strides; lse is fp32 (B, H, L). One program owns BLOCK_M queries of one head and passes over the keys in blocks, with a
running maximum. Whole blocks that every query sees come first, in a loop without any mask; those that need one follow. A key
padding mask is first turned into a list of visible keys, through which k and v are read, unless a key's position matters (for
dropout, causal order or an attn_mask). Rows of hidden keys are never loaded, so that NaN there can't leak.
Sources: Dao, 2023, arXiv:2307.08691; Milakov and Gimelshein, 2018, arXiv:1805.02867.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from .attention_copies import copy_rows, copy_variants
from .attention_problem import COMMON_TYPES, PACKED_TYPES, PLACE_TYPES, Form, Problem, places
from .attention_program import (
    at,
    clear_surplus,
    keys_to_visit,
    mask_end,
    mask_place,
    own_queries,
    own_sequence,
    shared_head,
)
from .attention_split import Parts, combine_variant, key_parts
from .attention_tiles import (
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
from .launch import Variant, empty, jit, launch, pointer, tl
from .overlap import wait_for_previous


@jit
def _row_sums(weights, ROWS: tl.constexpr, COLUMNS: tl.constexpr, LANES: tl.constexpr):
    """The sums of every LANES-th column, (ROWS, LANES): of 8, a lane of an accumulator has its own, and asks no other."""
    if LANES == 1:
        return tl.sum(weights, 1)[:, None]
    return tl.sum(tl.reshape(weights, (ROWS, COLUMNS // LANES, LANES)), 1)


@jit
def _attend(
    accumulator,
    total,
    highest,
    q,
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
    """Pass over the keys of [start_key, end_key), a multiple of BLOCK_N to start with. scale: positive, times log2(e)."""
    E: tl.constexpr = FORM[0]
    EV: tl.constexpr = FORM[1]
    BLOCK_E: tl.constexpr = FORM[2]
    BLOCK_EV: tl.constexpr = FORM[3]
    PRECISION: tl.constexpr = FORM[5]
    LISTED: tl.constexpr = FORM[8]
    PAIRED: tl.constexpr = FORM[10]
    LANES: tl.constexpr = FORM[11]
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
        mask = None
        if MASKED and is_loaded_first(FORM[7], hiding[3]):
            mask = load_mask(hiding, row_start, start, L, S, BLOCK_M, BLOCK_N, FORM, order=order)
        scores = dot(q, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION)
        if MASKED:
            shown = None if COVERED else visible
            scores = masked_scores(
                scores * scale, hiding, row_start, start, L, S, shown, BLOCK_M, BLOCK_N, FORM, order=order, mask=mask
            )
            higher = tl.maximum(highest, tl.max(scores, 1))
            # A row that has seen no visible key yet: -inf less -inf would be NaN.
            shift = tl.where(higher == -float("inf"), 0.0, higher)
            weights = tl.exp2(scores - shift[:, None])
            shrink = tl.exp2(highest - shift)
        else:
            higher = tl.maximum(highest, tl.max(scores, 1) * scale)
            weights = tl.exp2(scores * scale - higher[:, None])
            shrink = tl.exp2(highest - higher)
        highest = higher
        total = total * shrink[:, None] + _row_sums(weights, BLOCK_M, BLOCK_N, LANES)
        v = load_keys(v_ptr, v_row, hiding, start, visible, BLOCK_N, EV, BLOCK_EV, FORM)
        weights = weights.to(v.dtype)
        if drop[0] is not None:
            weights = dropped(weights, drop, drawn(drop, row_start, start, BLOCK_M, BLOCK_N, order=order), PAIRED)
        accumulator = dot(weights, v, accumulator * shrink[:, None], PRECISION)
    return accumulator, total, highest


@jit
def attention_forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
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
    WARPS: tl.constexpr,
):
    """scale: times log2(e). rescale: what dropout multiplies a kept weight by. WARPS: see `spread`."""
    wait_for_previous()
    LANES: tl.constexpr = 8 if q_ptr.dtype.element_ty.primitive_bitwidth == 16 else 1
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
        PAIRED,
        LANES,
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
    # The maximum is taken before scaling: a negative scale changes q's sign instead (exactly; by a product in fp32, as the
    # interpreter negates bf16 wrongly).
    q = (q.to(tl.float32) * tl.where(scale < 0, -1.0, 1.0)).to(q.dtype)
    scale = tl.abs(scale)

    start, first_masked, end = keys_to_visit(hiding, row_start, S, BLOCK_M, BLOCK_N, FORM)
    accumulator = tl.zeros((BLOCK_M, BLOCK_EV), tl.float32)
    total = tl.zeros((BLOCK_M, LANES), tl.float32)
    highest = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    for MASKED in tl.static_range(2):
        if MASKED or mask_ptr is None:
            accumulator, total, highest = _attend(
                accumulator,
                total,
                highest,
                q,
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

    total = tl.sum(total, 1)
    empty_row = total == 0.0
    accumulator = accumulator * (rescale / tl.where(empty_row, 1.0, total))[:, None]
    lse = tl.where(empty_row, -float("inf"), highest + tl.log2(tl.where(empty_row, 1.0, total)))
    if ends_q_ptr is not None:
        step = tl.cdiv(longest, BLOCK_M) * BLOCK_M
        place = (out_batch, out_head, out_row)
        clear_surplus(
            out_ptr, place, head, ends_q_ptr, tokens, batch, batches, row_start, step, BLOCK_M, EV, BLOCK_EV, VEC
        )
        if mask_ptr is not None and seed_ptr is not None:
            # Read again, and where by another division than above: kept over the loop, either would be spilled.
            sequence = tl.program_id(0) // (tl.cdiv(longest, BLOCK_M) * heads)
            first_q = tl.load(ends_q_ptr + sequence).to(tl.int64)
        split = tl.num_programs(1) > 1  # parts are padded
        index, first_q = tl.where(split, batch, index), tl.where(split, 0, first_q)
    all_heads = (tl.num_programs(0) // tl.cdiv(longest, BLOCK_M)).to(tl.int64)  # of all batch elements
    part = tl.program_id(1) * all_heads
    out_ptr = at(out_ptr, (out_batch, out_head, out_row), part // heads + index, head, first_q + row_start)
    row = spread(BLOCK_M, WARPS)  # said anew, with what follows: kept over the loop, it would be spilled
    exists = row_start + row < L
    store_rows(out_ptr, row * out_row, exists, accumulator, EV, BLOCK_EV, VEC)
    if ends_q_ptr is not None:
        lse = tl.where(exists, lse, -float("inf"))
        exists = row < longest - row_start
    tl.store(lse_ptr + (part + head_index) * longest + row_start + row, lse, mask=exists)


def attention_forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """out (B, L, H, Ev), laid out over batch and rows as q is, in rows of whole runs, and lse, fp32 (B, H, L), -inf where no key is visible."""
    if problem.copies:
        copy_rows(problem)
    q = problem.q
    out = empty_rows(problem.given[0], problem.value_dim)
    lse = empty((problem.batch, problem.heads, problem.queries), torch.float32, q.device)
    form = problem.form()
    rows = form.config("forward").rows
    parts = key_parts(problem, rows, q.device)
    split = Parts(parts, problem, out, lse) if parts > 1 else None
    to, to_lse = (out, lse) if split is None else (split.tensor, split.lse)
    tensors = (q, problem.k, problem.v, to)
    strides = [stride for tensor in tensors for stride in places(tensor)]
    packed, counts = problem.packed(q, parts > 1)
    inputs = (to_lse, problem.key_list(), *problem.tensors(), *packed)
    arguments = (*tensors, *inputs, *strides, *problem.sizes(), *counts)
    launch(forward_variant(form, parts > 1), (problem.tiles(rows), parts), *arguments)
    if split is not None:
        split.combine(form)
    return cut_rows(out, problem.given[2].shape[3]), lse


def forward_variants(problem: Problem, device: torch.device) -> list[Variant]:
    """All that `attention_forward` launches on `device`."""
    form, copies = problem.form(), copy_variants(problem)
    if key_parts(problem, form.config("forward").rows, device) == 1:
        return [*copies, forward_variant(form)]
    return [*copies, forward_variant(form, True), combine_variant(form, problem.value_dim, True)]


def empty_rows(q: Tensor, dim: int, allocate: Callable[..., Tensor] = empty) -> Tensor:
    """An empty (B, L, H, dim), sequence first in memory where q is: what follows then needs no copy."""
    batch, length, heads, _ = q.shape
    if batch > 1 and q.stride(0) < q.stride(1):
        return allocate((length, batch, heads, dim), q.dtype, q.device).transpose(0, 1)
    return allocate((batch, length, heads, dim), q.dtype, q.device)


def cut_rows(tensor: Tensor, dim: int) -> Tensor:
    """The first `dim` columns of a (B, L, H, whole runs) tensor."""
    return tensor if tensor.shape[3] == dim else tensor[..., :dim]


@cache
def forward_variant(form: Form, split: bool = False) -> Variant:
    """The program of the forward; split: with parts of the output as its result."""
    config = form.config("forward")
    out = torch.float32 if split else form.dtype
    tensors = (
        *(form.dtype,) * 3,
        out,
        torch.float32,
        torch.int32 if form.padding else None,
        *form.masks(),
        *form.ends(),
    )
    types = (*map(pointer, tensors), *PLACE_TYPES * 4, *COMMON_TYPES, *PACKED_TYPES)
    constants = {"BLOCK_M": config.rows, "BLOCK_N": config.columns, **form.constants()}
    constants |= {"UNIFORM": form.uniform, "PAIRED": form.paired, "WARPS": form.spread_over("forward")}
    return Variant(attention_forward_kernel, types, constants, config.num_warps, config.num_stages)
