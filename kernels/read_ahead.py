# mypy: allow-incomplete-defs
"""What the backwards of norms share: tiles of rows that are read, in 16 bits, while the tile before is worked on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from .launch import Variant, jit, tl, triton
from .overlap import capability
from .rows import evenly, existing_columns, load_where, persistent_programs, run_pointers


def is_blackwell(_semantic: Any = None) -> Any:
    """Whether a kernel is compiled for sm_100 or newer; False in Triton's interpreter."""
    if _semantic is None:
        return False
    return triton.language.constexpr(capability(str(getattr(_semantic.builder.options, "arch", ""))) >= 100)


if triton is not None and not triton.knobs.runtime.interpret:
    is_blackwell = triton.language.core.builtin(is_blackwell)


@jit
def load_rows(
    base,
    tile,
    row_stride,
    row,
    exists,
    C,
    BLOCK_C: tl.constexpr,
    FULL: tl.constexpr,
    VEC: tl.constexpr,
    PAIRED: tl.constexpr = True,
):
    """Rows of a tile, as `widened` takes them: (ROWS, BLOCK_C), of 16-bit runs, PAIRED, two elements in one (ROWS, BLOCK_C // 2).

    exists: which rows there are, whose others are 0, or None for all. A stand-in where base is None.
    """
    found = tile  # for what is absent: loops carry no None
    if base is not None:
        # Carried through a loop as 16-bit elements, each would take a register of its own, and instructions to get there.
        PAIRS: tl.constexpr = 2 if PAIRED and VEC > 1 and base.dtype.element_ty.primitive_bitwidth == 16 else 1
        column = tl.arange(0, BLOCK_C // PAIRS)[None, :]
        start = row[:, None] * row_stride
        offset = tile.to(tl.int64) * (row.shape[0] * row_stride)  # by MAX_ROW_STRIDE, the product fits 32 bits
        if PAIRS == 2:
            pairs = (base + offset).to(tl.pointer_type(tl.uint32))
            pointers = run_pointers(pairs, start // 2, column, VEC // 2)
        else:
            pointers = run_pointers(base + offset, start, column, VEC)
        mask = None
        if not FULL:
            mask = existing_columns(C // PAIRS, BLOCK_C // PAIRS, VEC // PAIRS)
        if exists is not None:
            mask = exists[:, None] if FULL else exists[:, None] & mask
        found = load_where(pointers, mask, mask is not None)
    return found


@jit
def load_statistic(base, tile, row, exists):
    """A number of each of these rows, as `load_rows` has them."""
    found = tile  # for what is absent: loops carry no None
    if base is not None:
        found = load_where(base + tile.to(tl.int64) * row.shape[0] + row, exists, exists is not None)
    return found


@jit
def load_tile(
    tensors,
    strides,
    statistics,
    tile,
    row,
    exists,
    C,
    BLOCK_C: tl.constexpr,
    FULL: tl.constexpr,
    VEC: tl.constexpr,
    PAIRED: tl.constexpr = True,
):
    """What a norm's backward reads of the rows of a tile: of dy, dsum, x and the residual by `load_rows`, mean and rstd."""
    dy = load_rows(tensors[0], tile, strides[0], row, exists, C, BLOCK_C, FULL, VEC, PAIRED)
    dsum = load_rows(tensors[1], tile, strides[1], row, exists, C, BLOCK_C, FULL, VEC, PAIRED)
    x = load_rows(tensors[2], tile, strides[2], row, exists, C, BLOCK_C, FULL, VEC, PAIRED)
    residual = load_rows(tensors[3], tile, strides[3], row, exists, C, BLOCK_C, FULL, VEC, PAIRED)
    mean, rstd = load_statistic(statistics[0], tile, row, exists), load_statistic(statistics[1], tile, row, exists)
    return dy, dsum, x, residual, mean, rstd


@jit
def widened(tile, dtype: tl.constexpr):
    """What `load_rows` has read of a tensor of that dtype, as fp32 (ROWS, BLOCK_C)."""
    if tile.dtype == tl.uint32:
        if dtype == tl.bfloat16:
            even, odd = (tile << 16).to(tl.float32, bitcast=True), (tile & 0xFFFF0000).to(tl.float32, bitcast=True)
        else:
            even = tile.to(tl.uint16).to(dtype, bitcast=True).to(tl.float32)
            odd = (tile >> 16).to(tl.uint16).to(dtype, bitcast=True).to(tl.float32)
        wide = tl.reshape(tl.join(even, odd), (tile.shape[0], 2 * tile.shape[1]))
    else:
        wide = tile.to(tl.float32)
    return wide


def backward_constants(
    constants: dict[str, int | bool], num_warps: int, registers: int, read: Iterable[torch.dtype | None]
) -> dict[str, int | bool]:
    """What a norm's backward needs besides `row_constants`; read: the dtypes of the tensors that it reads."""
    # The fewest sums of a tile's rows that need no exchange between threads: rows at this distance lie in one thread.
    rows, block, vector = (int(constants[name]) for name in ("ROWS", "BLOCK_C", "VEC"))
    groups = min(rows, max(1, num_warps * 32 * vector // block))
    # In fp32, or with an address an element, a tile ahead would take twice the registers or more.
    narrow = all(dtype is None or dtype.itemsize == 2 for dtype in read)
    return {"GROUPS": groups, "AHEAD": registers > 0 and vector > 1 and narrow}


def backward_programs(variant: Variant, rows: int, most: int, multiprocessors: int) -> int:
    """How many programs of a norm's backward share the rows; most: a multiprocessor, where they do not read ahead."""
    tiles = -(-rows // int(variant.constants["ROWS"]))
    if not variant.constants["AHEAD"]:
        return persistent_programs(tiles, multiprocessors, most)
    # As many as registers allow, 512 a lane and scheduler: the loads of two tiles each hide what latency there is.
    most = multiprocessors * (4 * (512 // variant.registers) // variant.num_warps)
    return evenly(tiles, max(min(tiles, multiprocessors), min(-(-tiles // 2), most)))
