# mypy: allow-incomplete-defs
"""What the attention kernels share: tiles of (B, L, H, E) tensors, the keys that are worth visiting, scores and masks.

All scores, and the log-sum-exp, are in base 2: see `attention_problem`. Offsets from the first row of a tile fit 32 bits; where a
tile starts is computed in 64.
"""

from __future__ import annotations

from .dropout import draw_tile, drop_pairs, keep_drawn, keep_tile, load_seed, places_in_tile
from .launch import at_compile_time, jit, tl
from .rows import run_pointers


@jit
def dot(a, b, accumulator, PRECISION: tl.constexpr):
    """accumulator + a @ b in fp32. Triton's interpreter needs fp32 operands, for bf16. "split": see `split_precision`."""
    if PRECISION == "split" or PRECISION == "interpreted_split":
        a_high, a_low = split(a, PRECISION)
        b_high, b_low = split(b, PRECISION)
        # Small products first, and each step's sum from zero on: tensor cores cut off what lies below a sum's last bit.
        result = tl.dot(a_low, b_high, input_precision="tf32")
        result = tl.dot(a_high, b_low, result, input_precision="tf32")
        result = accumulator + tl.dot(a_high, b_high, result, input_precision="tf32")
    elif PRECISION == "interpreted":
        result = tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator, input_precision="ieee")
    else:
        result = tl.dot(a, b, accumulator, input_precision=PRECISION)
    return result


@jit
def split(x, PRECISION: tl.constexpr):
    """x, fp32, as a sum of two numbers of 11 bits, the second cut off: in tf32's format, of which tensor cores ignore the other bits."""
    high = ((x.to(tl.uint32, bitcast=True) + 0x1000) & 0xFFFFE000).to(tl.float32, bitcast=True)
    low = x - high  # exact, and as often below zero as above
    if PRECISION == "interpreted_split":
        low = (low.to(tl.uint32, bitcast=True) & 0xFFFFE000).to(tl.float32, bitcast=True)
    return high, low


@jit
def load_tile(
    base,
    row_stride,
    exists,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    VEC: tl.constexpr,
):
    """Rows base, base + row_stride, ... as (ROWS, BLOCK_C); zeros where a row (exists, or None) or column is not there."""
    return load_rows(base, tl.arange(0, ROWS) * row_stride, exists, COLUMNS, BLOCK_C, VEC)


@jit
def load_rows(base, offsets, exists, COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr, VEC: tl.constexpr):
    """Rows at base + offsets (ROWS,) as (ROWS, BLOCK_C); zeros where a row (exists, or None) or column is not there."""
    column = tl.arange(0, BLOCK_C)[None, :]
    pointers = run_pointers(base, offsets[:, None], column, VEC)
    if exists is None and COLUMNS == BLOCK_C:
        tile = tl.load(pointers)
    else:
        if COLUMNS == BLOCK_C:
            inside = exists[:, None]
        elif exists is None:
            inside = column // VEC < COLUMNS // VEC
        else:
            inside = exists[:, None] & (column // VEC < COLUMNS // VEC)
        tile = tl.load(pointers, mask=inside, other=0.0)
    return tile


@jit
def load_keys(
    base,
    row_stride,
    hiding,
    start,
    visible,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    FORM: tl.constexpr,
):
    """Rows of the keys start ... start + ROWS - 1, by their list where LISTED; zeros where not visible (or None)."""
    PRECISION: tl.constexpr = FORM[5]
    VEC: tl.constexpr = FORM[6]
    LISTED: tl.constexpr = FORM[8]
    UNIFORM: tl.constexpr = FORM[9]
    list_ptr, list_start = hiding[7], hiding[8]
    if not LISTED:
        tile = load_tile(base + tl.cast(start, tl.int64) * row_stride, row_stride, visible, ROWS, COLUMNS, BLOCK_C, VEC)
    else:
        numbers = tl.load(list_ptr + (list_start + start) + tl.arange(0, ROWS), mask=visible)
        # Without signs, a product of two 32-bit numbers is one instruction; and an addition, where ptxas has the stride in a uniform
        # register and no longer knows that its upper half is zero.
        if UNIFORM and visible is None and PRECISION != "interpreted":
            offsets = tl.inline_asm_elementwise(
                "mul.wide.u32 $0, $1, $2;", "=l,r,r", [numbers, row_stride], dtype=tl.int64, is_pure=True, pack=1
            )
        else:
            offsets = numbers.to(tl.uint32, bitcast=True).to(tl.int64) * tl.cast(row_stride, tl.uint32).to(tl.int64)
        tile = load_rows(base, offsets, visible, COLUMNS, BLOCK_C, VEC)
    return tile


@jit
def store_tile(
    base,
    row_stride,
    exists,
    tile,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    VEC: tl.constexpr,
):
    """Store (ROWS, BLOCK_C) where rows and columns exist."""
    store_rows(base, tl.arange(0, ROWS) * row_stride, exists, tile, COLUMNS, BLOCK_C, VEC)


@jit
def store_rows(base, offsets, exists, tile, COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr, VEC: tl.constexpr):
    """Store (ROWS, BLOCK_C) at base + offsets (ROWS,) where rows and columns exist."""
    pointers, inside = _places(base, offsets, exists, COLUMNS, BLOCK_C, VEC)
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=inside)


@jit
def add_tile(
    base,
    row_stride,
    exists,
    tile,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    VEC: tl.constexpr,
):
    """Add (ROWS, BLOCK_C) in fp32, atomically, where rows and columns exist."""
    pointers, inside = _places(base, tl.arange(0, ROWS) * row_stride, exists, COLUMNS, BLOCK_C, VEC)
    tl.atomic_add(pointers, tile, mask=inside, sem="relaxed")


@jit
def _places(base, offsets, exists, COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr, VEC: tl.constexpr):
    column = tl.arange(0, BLOCK_C)[None, :]
    pointers = run_pointers(base, offsets[:, None], column, VEC)
    inside = exists[:, None]
    if COLUMNS != BLOCK_C:
        inside = inside & (column // VEC < COLUMNS // VEC)
    return pointers, inside


@jit
def visible_keys(hiding, start, end, BLOCK_N: tl.constexpr, LISTED: tl.constexpr = False, keys=None):
    """Which of the keys start ... start + BLOCK_N - 1 are before end and not padding, as all are that are listed."""
    padding_ptr, padding_start, padding_column, _, _, _, _, list_ptr, list_start = hiding
    column = tl.arange(0, BLOCK_N) if keys is None else keys
    visible = column < end - start
    if list_ptr is not None and not LISTED:  # the mask's copy: what depends on a load of bytes is not pipelined
        visible = tl.load(list_ptr + (list_start + start) + column, mask=visible, other=1) == 0
    elif padding_ptr is not None and not LISTED:
        place = padding_ptr + (padding_start + tl.cast(start, tl.int64) * padding_column)
        hidden = tl.load(place + column * padding_column, mask=visible, other=True)
        visible = visible & (hidden == 0)
    return visible


@jit
def apart(visible):
    """`visible`, of a block's keys, by a maximum of one each, for products of rows that depend on it.

    Triton lays out k and v by the narrowest load behind theirs, and looks behind no reduction. For a padding mask's bytes, products would take their operands
    as if these had 8 bits, and load others past the pipeline (on sm_80).
    """
    return tl.max(visible.to(tl.int32)[:, None], 1) > 0


@jit
def load_mask(
    hiding,
    row_start,
    column_start,
    L,
    S,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FORM: tl.constexpr,
    TRANSPOSED: tl.constexpr = False,
    order=None,
):
    """A tile of the mask, (ROWS, COLUMNS) or transposed; where there is none, False, or -inf where `is_covering`, else zeros. order: see `places_in_tile`."""
    MASK_VEC: tl.constexpr = FORM[7]
    _, _, _, mask_ptr, mask_start, mask_row, mask_column, _, _ = hiding
    row, column = places_in_tile(ROWS, COLUMNS, TRANSPOSED, order)
    mask_start += tl.cast(row_start, tl.int64) * mask_row + tl.cast(column_start, tl.int64) * mask_column
    base = mask_ptr + mask_start
    if MASK_VEC <= 1:
        exists = (row < L - row_start) & (column < S - column_start)
    else:
        exists = (row < L - row_start) & (column // MASK_VEC < (S - column_start) // MASK_VEC)
    if MASK_VEC == 0:
        pointers = base + (row * mask_row + column * mask_column)
    elif MASK_VEC == 1:  # a row's elements are at constant distances: an address a row, not one each
        pointers = (base + row * mask_row) + column
    elif TRANSPOSED:
        run: tl.constexpr = MASK_VEC * ((mask_ptr.dtype.element_ty.primitive_bitwidth + 7) // 8)
        pointers = tl.multiple_of(base + (row * mask_row + column), (run, 1))
    else:
        pointers = run_pointers(base, row * mask_row, column, MASK_VEC)
    if mask_ptr.dtype.element_ty == tl.int1:
        tile = tl.load(pointers, mask=exists, other=False)
    elif is_covering(MASK_VEC, mask_ptr):
        tile = tl.load(pointers, mask=exists, other=-float("inf"))
    else:
        tile = tl.load(pointers, mask=exists, other=0.0)
    return tile


@at_compile_time
def is_loaded_first(mask_vector, mask_ptr, keys_block=0):
    """Whether there is a mask whose tile is to be loaded before the scores are computed: one by one, or in runs of under 4 bytes, as loads then are not pipelined.

    Behind them, Triton would give the scores the layout of such a load, too, and take rows' maxima, and in the forward exponentials, once in each of both.
    The kernel of the keys (keys_block: the larger head dimension of its tiles) takes no maxima: there bool masks at up to 32 cost fewer cycles behind the scores, .182 instead of .211 on sm_90.
    """
    if mask_ptr is None or (0 < keys_block <= 32 and mask_ptr.dtype.element_ty.primitive_bitwidth == 1):
        return False
    return mask_vector <= 1 or mask_vector * max(8, mask_ptr.dtype.element_ty.primitive_bitwidth) < 32


@at_compile_time
def is_covering(mask_vector, mask_ptr, ends_ptr=None):
    """Whether there is a mask whose tile hides what is behind the last row or key by itself.

    A float mask in runs does not: its loads are pipelined, and fill in zeros without an instruction more. Nor does a run that goes on behind the end of a packed
    sequence.
    """
    if mask_ptr is None:
        return False
    return mask_vector <= 1 or (mask_ptr.dtype.element_ty.primitive_bitwidth == 1 and ends_ptr is None)


@jit
def masked_scores(
    scores,
    hiding,
    row_start,
    column_start,
    L,
    S,
    visible,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FORM: tl.constexpr,
    TRANSPOSED: tl.constexpr = False,
    order=None,
    mask=None,
):
    """Scores of a tile, (ROWS, COLUMNS) or transposed, -inf where a key is hidden. order: see `places_in_tile`.

    visible: (COLUMNS,) from `visible_keys`, or None where hidden keys are dealt with elsewhere. mask: from `load_mask`, or None where it is loaded here.
    """
    CAUSAL: tl.constexpr = FORM[4]
    mask_ptr = hiding[3]
    row, column = places_in_tile(ROWS, COLUMNS, TRANSPOSED, order)
    if mask_ptr is not None:
        if mask is None:
            mask = load_mask(hiding, row_start, column_start, L, S, ROWS, COLUMNS, FORM, TRANSPOSED, order)
        if mask_ptr.dtype.element_ty == tl.int1:
            if visible is not None:  # together: one instruction less than to add it
                mask = mask & (visible[:, None] if TRANSPOSED else visible[None, :])
            scores = tl.where(mask, scores, -float("inf"))
        else:
            scores += mask.to(tl.float32) * 1.4426950408889634
    if CAUSAL:
        scores = tl.where(row + row_start >= column + column_start, scores, -float("inf"))
    if visible is not None:
        shown = visible[:, None] if TRANSPOSED else visible[None, :]
        if mask_ptr is None:
            scores += tl.where(shown, 0.0, -float("inf"))  # added, not selected: one instruction fused with the scaling
        elif mask_ptr.dtype.element_ty != tl.int1:
            if TRANSPOSED:  # as below: of NaN and a number the minimum is the number; to select would spill on sm_80
                scores = tl.minimum(scores, tl.where(shown, float("inf"), -float("inf")))
            else:  # whatever a float mask holds for a hidden key: NaN, too
                scores = tl.where(shown, scores, -float("inf"))
    return scores


@jit
def kept(drop, row_start, column_start, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TRANSPOSED: tl.constexpr = False):
    """Which weights of a tile dropout keeps."""
    seed_ptr, head_index, offset, threshold, _ = drop
    low, high = load_seed(seed_ptr)
    return keep_tile(low, high, offset, threshold, head_index, row_start, column_start, ROWS, COLUMNS, TRANSPOSED)


@jit
def drawn(
    drop,
    row_start,
    column_start,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TRANSPOSED: tl.constexpr = False,
    order=None,
    seed=None,
):
    """What `dropped` takes of a tile: see `draw_tile`."""
    seed_ptr, head_index, offset, _, _ = drop
    if seed is None:
        low, high = load_seed(seed_ptr)
    else:
        low, high = seed
    return draw_tile(low, high, offset, head_index, row_start, column_start, ROWS, COLUMNS, TRANSPOSED, order)


@jit
def dropped(x, drop, draws, PAIRED: tl.constexpr, NEIGHBOURS: tl.constexpr = None):
    """x (ROWS, COLUMNS) where dropout keeps it, 0 elsewhere. PAIRED: by NVIDIA's assembly, see `drop_pairs`."""
    words, odd = draws
    if PAIRED:
        x = drop_pairs(x, words, odd, drop[3], NEIGHBOURS)
    else:
        x = tl.where(keep_drawn(words, odd, drop[3]), x, 0.0)
    return x


@jit
def deferred(rescale):
    """What dropout multiplies dscores by when all are added up, and not each: rescale, or 1 where it drops everything."""
    return tl.where(rescale > 0.0, rescale, 1.0)
