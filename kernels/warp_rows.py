# mypy: allow-incomplete-defs
"""Tiles of rows as norms' forwards read and write them: as Triton shares them out, or whole 16-bit rows by WARPS warps in turn.

Then each warp has a weight and a bias of its own. Triton would let each of two warps read half of both, and exchange the halves through
shared memory, and work out an address for every row: at 256 columns in bf16, 14.3 to 14.8 instructions an element
for 13.1 to 13.4 (sm_80, sm_90).
"""

from __future__ import annotations

import torch

from .configs import BY_WARPS, RowConfig
from .launch import jit, older_compiler, tl
from .read_ahead import widened
from .rows import load_parameters, run_pointers


def config_by_warps(columns: int, vector: int, *dtypes: torch.dtype | None) -> RowConfig | None:
    """How rows of so many columns lie on the machine if warps take them in turn; None where they don't.

    dtypes: of all that is read and written but statistics. With wider ones, Triton exchanges what threads hold, and triton 3.6
    always does, for 14.8 to 15.0 instructions.
    """
    narrow = vector == 8 and not older_compiler() and all(dtype is None or dtype.itemsize == 2 for dtype in dtypes)
    return BY_WARPS.get(columns) if narrow else None


@jit
def load_norm_parameters(base, column, inside, BLOCK_C: tl.constexpr, VEC: tl.constexpr, WARPS: tl.constexpr):
    """A weight or bias as fp32, (1, BLOCK_C) or (WARPS, BLOCK_C)."""
    if WARPS:
        pairs = base.to(tl.pointer_type(tl.uint32))
        column = tl.arange(0, BLOCK_C // 2)[None, None, :]
        pointers = tl.multiple_of(pairs + (tl.zeros((1, WARPS, 1), tl.int32) + column), (1, 1, 16))
        found = widened(tl.reshape(tl.load(pointers), (WARPS, BLOCK_C // 2)), base.dtype.element_ty)
    else:
        found = load_parameters(base, column, inside, VEC)
    return found


@jit
def scale_and_shift(x, weight, bias, WARPS: tl.constexpr):
    """x (ROWS, BLOCK_C) * weight + bias, each as `load_norm_parameters` has it, or None."""
    y = x
    if WARPS:
        y = tl.reshape(y, (x.shape[0] // WARPS, WARPS, x.shape[1]))
    if weight is not None:
        y *= weight[None] if WARPS else weight
    if bias is not None:
        y += bias[None] if WARPS else bias
    if WARPS:
        y = tl.reshape(y, x.shape)
    return y


@jit
def load_by_warps(
    base, row_stride, count, ROWS: tl.constexpr, BLOCK_C: tl.constexpr, WARPS: tl.constexpr, PAIRED: tl.constexpr = True
):
    """16-bit rows, (ROWS, BLOCK_C), of which count exist, whose others are 0. PAIRED: as fp32."""
    mask = _rows_in_turn(count, ROWS, WARPS)
    if PAIRED:  # two elements at once: of bf16, each is one instruction away from fp32
        pairs = base.to(tl.pointer_type(tl.uint32))
        found = tl.load(_warp_pointers(pairs, row_stride // 2, ROWS, BLOCK_C // 2, WARPS), mask=mask, other=0)
        found = widened(tl.reshape(found, (ROWS, BLOCK_C // 2)), base.dtype.element_ty)
    else:
        found = tl.load(_warp_pointers(base, row_stride, ROWS, BLOCK_C, WARPS), mask=mask, other=0.0)
        found = tl.reshape(found, (ROWS, BLOCK_C))
    return found


@jit
def store_rows(base, row_stride, count, y, row, column, mask, VEC: tl.constexpr, WARPS: tl.constexpr):
    """Write rows y (ROWS, BLOCK_C), of which count exist; row (ROWS,) and column (1, BLOCK_C) count from 0."""
    y = y.to(base.dtype.element_ty)
    if WARPS:
        y = tl.reshape(y, (y.shape[0] // WARPS, WARPS, y.shape[1]))
        pointers = _warp_pointers(base, row_stride, row.shape[0], column.shape[1], WARPS)
        tl.store(pointers, y, mask=_rows_in_turn(count, row.shape[0], WARPS))
    else:
        tl.store(run_pointers(base, row[:, None] * row_stride, column, VEC), y, mask=mask)


@jit
def _rows_in_turn(count, ROWS: tl.constexpr, WARPS: tl.constexpr):
    turn = tl.arange(0, ROWS // WARPS)[:, None, None] * WARPS
    return turn < count - tl.arange(0, WARPS)[None, :, None]


@jit
def _warp_pointers(base, row_stride, ROWS: tl.constexpr, BLOCK_C: tl.constexpr, WARPS: tl.constexpr):
    warp = tl.arange(0, WARPS)[None, :, None]
    turn = tl.arange(0, ROWS // WARPS)[:, None, None] * WARPS
    # What differs by thread is one sum, behind which a row adds a number; as one number, LLVM would or bits together.
    pointers = base + (warp * row_stride + tl.arange(0, BLOCK_C)[None, None, :]) + turn.to(tl.int64) * row_stride
    return tl.multiple_of(pointers, (1, 1, 16))
