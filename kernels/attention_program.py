# mypy: allow-incomplete-defs
"""What an attention kernel does before its loop: which queries or keys its program owns, where they lie, which keys it visits.

Tuples that travel together, here and in `attention_tiles` (triton takes None in one that is passed, not in one
that is returned):
    place = (batch stride, head stride, row stride) of a (B, L, H, E) tensor
    hiding = (padding, offset, column stride, mask, offset, row stride, column stride, list of keys, offset): pointers or
        None, offsets of a batch element and head
    packed = (ends of queries, ends of keys), pointers or None: int32 (B + 1,), 0 and then the end of each sequence of a packed
        batch, in which a batch element is a sequence of its own length
    drop = (seed pointer or None, batch * heads + head, offset, threshold, rescale) of dropout: see `dropout`
    FORM = (E, EV, BLOCK_E, BLOCK_EV, CAUSAL, PRECISION, VEC, MASK_VEC, LISTED, UNIFORM, ...), constants: see `Form.constants`
"""

from __future__ import annotations

from .attention_tiles import store_tile
from .launch import jit, tl


@jit
def own_queries(L, heads, BLOCK_M: tl.constexpr):
    """(batch, head, batch * heads + head, first row, which rows exist) of a program for BLOCK_M queries of one head."""
    tiles = tl.cdiv(L, BLOCK_M)
    row_start = tl.program_id(0) % tiles * BLOCK_M
    head_index = tl.program_id(0) // tiles
    batch, head = batch_and_head(head_index, heads)
    return batch, head, head_index, row_start, tl.arange(0, BLOCK_M) < L - row_start


@jit
def own_keys(S, BLOCK_N: tl.constexpr):
    """(batch * key heads + key head, first key) of a program for BLOCK_N keys of one key head."""
    tiles = tl.cdiv(S, BLOCK_N)
    return tl.program_id(0) // tiles, tl.program_id(0) % tiles * BLOCK_N


@jit
def batch_and_head(index, heads):
    """Both of batch * heads + head, an int32, as int64."""
    return (index // heads).to(tl.int64), (index % heads).to(tl.int64)


@jit
def shared_head(head, group):
    """The key head that a query head reads. Divided as 32 bits: the division of 64 is a call, whose stack counts as spilled."""
    return (head.to(tl.int32) // group).to(tl.int64)


@jit
def row_statistics(out, dout, lse_ptr, dlse_ptr, statistics_ptr, rows, all_rows, exists):
    """(lse, inf for rows without visible key; delta) of a tile's rows, which is stored to statistics, fp32 (2, B, H, L), too.

    rows: their numbers among all_rows. dlse_ptr: None where no gradient arrives for lse.
    """
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + rows, mask=exists, other=0.0) * 1.4426950408889634
    lse = tl.load(lse_ptr + rows, mask=exists, other=-float("inf"))
    lse = tl.where(lse == -float("inf"), float("inf"), lse)  # all weights of an empty row are zero
    tl.store(statistics_ptr + rows, lse, mask=exists)
    tl.store(statistics_ptr + all_rows + rows, delta, mask=exists)
    return lse, delta


@jit
def own_sequence(packed, batch, L, S):
    """(batch element in memory, first query, L, first key, S) of a program, which a packed batch reads from its ends."""
    ends_q_ptr, ends_k_ptr = packed
    first_q, first_k = tl.cast(0, tl.int64), tl.cast(0, tl.int64)
    if ends_q_ptr is not None:
        first_q, first_k = tl.load(ends_q_ptr + batch).to(tl.int64), tl.load(ends_k_ptr + batch).to(tl.int64)
        L = (tl.load(ends_q_ptr + batch + 1) - first_q).to(tl.int32)
        S = (tl.load(ends_k_ptr + batch + 1) - first_k).to(tl.int32)
        batch = tl.cast(0, tl.int64)
    return batch, first_q, L, first_k, S


@jit
def mask_end(ends_ptr, mask_ptr, S, MASK_VEC: tl.constexpr):
    """Where the runs of a mask's row end that hold the sequence's S keys: in a packed batch rows are as long as the longest one."""
    end = S
    if ends_ptr is not None and mask_ptr is not None and MASK_VEC > 1:
        end = tl.cdiv(S, MASK_VEC) * MASK_VEC
    return end


@jit
def clear_surplus(
    pointer,
    place,
    head,
    ends_ptr,
    tokens,
    batch,
    batches,
    start,
    step,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    VEC: tl.constexpr,
):
    """Zeros in a head's rows from the last sequence's end to `tokens`, shared by the programs of the last sequence.

    start: of the program's own tile; step: from one of its tiles of ROWS rows to the next.
    """
    end = tl.load(ends_ptr + batches)
    first = tl.where(batch == batches - 1, end + start, tokens)
    for row in range(first, tokens, step):
        exists = tl.arange(0, ROWS) < tokens - row
        zeros = tl.zeros((ROWS, BLOCK_C), tl.float32)
        store_tile(at(pointer, place, 0, head, row), place[2], exists, zeros, ROWS, COLUMNS, BLOCK_C, VEC)


@jit
def mask_place(batch, head, batch_stride, head_stride, batches, PERIODIC: tl.constexpr):
    """Where the mask of a head begins. PERIODIC: the masks of so many batch elements come again in the next ones; else each has its own."""
    if PERIODIC:  # divided as 32 bits: see `shared_head`
        batch = (batch.to(tl.int32) % batches).to(tl.int64)
    return batch * batch_stride + head * head_stride


@jit
def at(pointer, place, batch, head, row):
    """Where a row of a head lies."""
    batch_stride, head_stride, row_stride = place
    return pointer + (batch * batch_stride + head * head_stride + tl.cast(row, tl.int64) * row_stride)


@jit
def keys_to_visit(hiding, row_start, S, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FORM: tl.constexpr):
    """(start, first_masked, end): before first_masked all keys are visible to all rows; start and it are multiples of BLOCK_N.

    Keys are counted in the list of visible keys where LISTED. Of all keys that are worth it a program visits one share of as
    many as there are programs along axis 1.
    """
    CAUSAL: tl.constexpr = FORM[4]
    LISTED: tl.constexpr = FORM[8]
    UNIFORM: tl.constexpr = FORM[9]
    if LISTED:
        end = _list_visible(hiding, S)
        first_masked = end
    else:
        first_masked, end = _visible_range(hiding, S)
    if CAUSAL:
        first_masked = tl.minimum(first_masked, row_start + 1)
        end = tl.minimum(end, row_start + BLOCK_M)
    first_masked = tl.minimum(first_masked, end) // BLOCK_N * BLOCK_N
    if hiding[3] is not None:
        first_masked = 0
    if UNIFORM:
        first_masked, end = uniform(first_masked), uniform(end)
    share = tl.cdiv(tl.cdiv(end, BLOCK_N), tl.num_programs(1)) * BLOCK_N
    start = tl.program_id(1) * share
    end = tl.minimum(end, start + share)
    return start, tl.maximum(start, tl.minimum(first_masked, end)), end


@jit
def uniform(number):
    """An integer of 32 bits that comes from memory, reduced over 32 copies: ptxas then knows that all lanes of a warp have the same.

    In a loop with such bounds, addresses of shared memory and the tensor cores' descriptors stay in uniform registers.
    """
    return tl.max(tl.broadcast_to(number, (32,)), 0)


@jit
def _visible_range(hiding, S):
    """(first, end): padding hides no key before `first`, and all from `end` on. Copies the mask to the list, as int32."""
    padding_ptr, padding_start, padding_column, _, _, _, _, list_ptr, list_start = hiding
    first, end = S, S
    if padding_ptr is not None:
        column = tl.arange(0, 1024)
        first_hidden = tl.full((1024,), S, tl.int32)
        end_visible = tl.zeros((1024,), tl.int32)
        for start in range(0, S, 1024):
            here = start + column
            hidden = tl.load(
                padding_ptr + (padding_start + tl.cast(start, tl.int64) * padding_column + column * padding_column),
                here < S,
                True,
            )
            first_hidden = tl.minimum(first_hidden, tl.where(hidden, here, S))
            end_visible = tl.maximum(end_visible, tl.where(hidden, 0, here + 1))
            tl.store(list_ptr + list_start + here, (hidden != 0).to(tl.int32), mask=here < S)
        tl.debug_barrier()
        first, end = tl.min(first_hidden, 0), tl.max(end_visible, 0)
    return first, end


@jit
def _list_visible(hiding, S):
    """Write the numbers of the keys that are no padding, in order; return how many there are.

    All programs of a batch element write the same numbers to the same place, and each reads what it wrote itself.
    """
    padding_ptr, padding_start, padding_column, _, _, _, _, list_ptr, list_start = hiding
    column = tl.arange(0, 1024)
    count = 0
    for start in range(0, S, 1024):
        here = start + column
        place = padding_start + tl.cast(start, tl.int64) * padding_column + column * padding_column
        visible = tl.load(padding_ptr + place, here < S, True) == 0
        rank = tl.cumsum(visible.to(tl.int32), 0)
        tl.store(list_ptr + (list_start + count + rank - 1), here, mask=visible)
        count += tl.max(rank, 0)
    tl.debug_barrier()
    return count
