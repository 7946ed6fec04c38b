# mypy: allow-incomplete-defs
"""Copies of a call's tensors whose rows are whole runs of 16 bytes, for those whose own rows are not.

A head dimension of 20 in 16 bits leaves rows at multiples of 8 bytes: elements would be loaded one by one, with an address each.
In a copy, columns of zeros fill the last run. They add nothing to scores and gradients, and what comes of them is cut off. One
launch copies all that needs it: q, k and v where rows or an address are off, in the backward the output and its gradient, too.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from .attention_problem import Problem, block_of, memory_for, readable
from .launch import Variant, jit, launch, pointer, tl
from .overlap import wait_for_previous
from .rows import run_pointers

MOST = 5  # q, k, v, out and dout


@jit
def _copy(source, to, strides, sizes, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, VEC: tl.constexpr):
    """BLOCK_M rows of one head of a (batches, rows, heads, columns) tensor to (batches, heads, rows, width)."""
    batch_stride, row_stride, head_stride, column_stride = strides
    batches, rows, heads, columns, width = sizes
    tiles = tl.maximum(1, tl.cdiv(rows, BLOCK_M))
    head = tl.program_id(0) // tiles  # of all batch elements
    row = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_C)[None, :]
    exists = (row < tl.where(head < batches * heads, rows, 0))[:, None]
    source += (head // heads).to(tl.int64) * batch_stride + (head % heads).to(tl.int64) * head_stride
    places = row.to(tl.int64)[:, None] * row_stride + column.to(tl.int64) * column_stride
    tile = tl.load(source + places, mask=exists & (column < columns), other=0.0)
    places = (head.to(tl.int64) * rows + row)[:, None] * width
    tl.store(run_pointers(to, places, column, VEC), tile, mask=exists & (column // VEC < width // VEC))


@jit
def attention_copy_kernel(
    a_ptr,
    b_ptr,
    c_ptr,
    d_ptr,
    e_ptr,
    a_to,
    b_to,
    c_to,
    d_to,
    e_to,
    a_batch: tl.int64,
    a_row: tl.int64,
    a_head: tl.int64,
    a_column: tl.int64,
    b_batch: tl.int64,
    b_row: tl.int64,
    b_head: tl.int64,
    b_column: tl.int64,
    c_batch: tl.int64,
    c_row: tl.int64,
    c_head: tl.int64,
    c_column: tl.int64,
    d_batch: tl.int64,
    d_row: tl.int64,
    d_head: tl.int64,
    d_column: tl.int64,
    e_batch: tl.int64,
    e_row: tl.int64,
    e_head: tl.int64,
    e_column: tl.int64,
    batches: tl.int32,
    a_rows: tl.int32,
    a_heads: tl.int32,
    a_columns: tl.int32,
    a_width: tl.int32,
    b_rows: tl.int32,
    b_heads: tl.int32,
    b_columns: tl.int32,
    b_width: tl.int32,
    c_rows: tl.int32,
    c_heads: tl.int32,
    c_columns: tl.int32,
    c_width: tl.int32,
    d_rows: tl.int32,
    d_heads: tl.int32,
    d_columns: tl.int32,
    d_width: tl.int32,
    e_rows: tl.int32,
    e_heads: tl.int32,
    e_columns: tl.int32,
    e_width: tl.int32,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    VEC: tl.constexpr,
):
    """Up to five tensors, by programs of their own along axis 1; None for those that are not there."""
    wait_for_previous()
    tensors = (
        (a_ptr, a_to, (a_batch, a_row, a_head, a_column), (batches, a_rows, a_heads, a_columns, a_width)),
        (b_ptr, b_to, (b_batch, b_row, b_head, b_column), (batches, b_rows, b_heads, b_columns, b_width)),
        (c_ptr, c_to, (c_batch, c_row, c_head, c_column), (batches, c_rows, c_heads, c_columns, c_width)),
        (d_ptr, d_to, (d_batch, d_row, d_head, d_column), (batches, d_rows, d_heads, d_columns, d_width)),
        (e_ptr, e_to, (e_batch, e_row, e_head, e_column), (batches, e_rows, e_heads, e_columns, e_width)),
    )
    for i in tl.static_range(5):
        source, to, strides, sizes = tensors[i]
        if source is not None:
            if tl.program_id(1) == i:
                _copy(source, to, strides, sizes, BLOCK_M, BLOCK_C, VEC)


def copy_rows(problem: Problem, *results: Tensor) -> tuple[Tensor, ...]:
    """Fill the problem's copies; `results`, out and dout (B, L, H, Ev), as kernels can read them.

    Where Ev is no whole number of runs, the same launch copies those. Elsewhere out lies as the forward left it, as a rule, and
    PyTorch copies dout if it has to be: when the call's programs were compiled, nothing was known of it.
    """
    copies = [(t, memory_for(t)) for t in results] if problem.cut else []
    if problem.copies or copies:
        _launch([*problem.copies, *copies])
    if copies:
        return tuple(copy for _, copy in copies)
    return tuple(t if readable(t) else t.clone(memory_format=torch.contiguous_format) for t in results)


def _launch(copies: list[tuple[Tensor, Tensor]]) -> None:
    """Copy the first of each two tensors to the second."""
    sources, memory = zip(*copies)
    absent = MOST - len(copies)
    variant = copy_variant(sources[0].dtype, len(copies), block_of(max(to.shape[3] for to in memory)))
    strides = [stride for t in sources for stride in t.stride()]
    sizes = [size for t, to in copies for size in (*t.shape[1:], to.shape[3])]
    rows = int(variant.constants["BLOCK_M"])
    grid = (max(-(-t.shape[1] // rows) * t.shape[2] for t in sources) * sources[0].shape[0], len(copies))
    none = (None,) * absent
    numbers = (*strides, *(0,) * 4 * absent, sources[0].shape[0], *sizes, *(0,) * 4 * absent)
    launch(variant, grid, *sources, *none, *memory, *none, *numbers)


def copy_variants(problem: Problem, backward: bool = False) -> list[Variant]:
    """What `copy_rows` launches for a forward, or a backward with its two results."""
    count = len(problem.copies) + (2 if backward and problem.cut else 0)
    block = block_of(max(problem.head_dim, problem.value_dim))
    return [copy_variant(problem.q.dtype, count, block)] if count else []


@cache
def copy_variant(dtype: torch.dtype, count: int, block: int) -> Variant:
    """The program that copies so many tensors of up to `block` columns."""
    tensors = (pointer(dtype),) * count + (None,) * (MOST - count)
    types = (*tensors * 2, *("i64",) * 4 * MOST, "i32", *("i32",) * 4 * MOST)
    constants = {"BLOCK_M": 4096 // block, "BLOCK_C": block, "VEC": 16 // dtype.itemsize}
    return Variant(attention_copy_kernel, types, constants, num_warps=4)
