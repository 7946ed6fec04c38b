# mypy: allow-incomplete-defs
"""LayerNorm and RMSNorm, alone or behind dropout and a residual sum, over rows of more than 8,192 columns: a loop over blocks of columns.

The maths is that of layer_norm.py and add_layer_norm.py. A program takes one row and reads it twice, the second time from
the cache: first for the row's statistics (mean and squares by Chan's update; in the backward the two means), then for the
result. Weight and bias gradients take a kernel of their own, over blocks of columns, whose partial sums rows.py adds up.
Source: Chan et al., 1979, "Updating formulae and a pairwise algorithm for computing sample variances".
"""

from __future__ import annotations

from functools import cache, reduce
from operator import or_

import torch
from torch import Tensor

from .configs import WIDE_PARAMETERS, WIDE_ROWS
from .dropout import Dropout, dropout_arguments, keep_rows, load_seed
from .launch import Variant, jit, launch, multiprocessors, pointer, tl
from .overlap import wait_for_previous
from .rows import (
    ParameterSums,
    address_of,
    as_rows,
    dtype_of,
    load_parameters,
    run_length,
    run_pointers,
)

Dtypes = tuple[torch.dtype | None, ...]


@jit
def _load_sum(
    x_ptr,
    residual_ptr,
    seed_ptr,
    row,
    start,
    x_row_stride,
    residual_row_stride,
    C,
    offset,
    threshold,
    scale,
    BLOCK_C: tl.constexpr,
    VEC: tl.constexpr,
):
    """Of rows `row` (ROWS, 1), int64, and BLOCK_C columns from `start`: the sum, 0 outside, and the kept elements."""
    column = start + tl.arange(0, BLOCK_C)[None, :]
    inside = (column // VEC < C // VEC) & (row >= 0)
    total = tl.load(run_pointers(x_ptr, row * x_row_stride, column, VEC), mask=inside, other=0.0).to(tl.float32)
    keep = inside
    if seed_ptr is not None:
        low, high = load_seed(seed_ptr)
        keep = keep_rows(low, high, offset, threshold, row, start, BLOCK_C, VEC)
        # Where the caller's x is the sum already, the mask is only for its gradient.
        if residual_ptr is not None:
            total = tl.where(keep, total * scale, 0.0)
    if residual_ptr is not None:
        pointers = run_pointers(residual_ptr, row * residual_row_stride, column, VEC)
        total += tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    return total, keep, column, inside


@jit
def wide_forward_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    seed_ptr,
    y_ptr,
    sum_ptr,
    mean_ptr,
    rstd_ptr,
    x_row_stride: tl.int32,
    residual_row_stride: tl.int32,
    C: tl.int32,
    eps: tl.float32,
    offset: tl.int32,
    threshold: tl.int32,
    scale: tl.float32,
    BLOCK_C: tl.constexpr,
    VEC: tl.constexpr,
):
    wait_for_previous()
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)[:, None]
    mean = tl.sum(tl.zeros((1, BLOCK_C), tl.float32), axis=1)[:, None]
    squares = mean
    for start in range(0, C, BLOCK_C):
        total, _, column, inside = _load_sum(
            x_ptr, residual_ptr, seed_ptr, row, start, x_row_stride, residual_row_stride, C, offset, threshold, scale,
            BLOCK_C, VEC,
        )  # fmt: skip
        if sum_ptr is not None:
            total = total.to(sum_ptr.dtype.element_ty).to(tl.float32)  # as the backward reads it
        if mean_ptr is not None:
            count = tl.minimum(C - start, BLOCK_C).to(tl.float32)
            block_mean = tl.div_rn(tl.sum(total, axis=1)[:, None], count)
            centred = tl.where(inside, total - block_mean, 0.0)
            difference = block_mean - mean
            share = count / (start + count)
            mean += difference * share
            squares += tl.sum(centred * centred, axis=1)[:, None] + difference * difference * (start * share)
        else:
            squares += tl.sum(total * total, axis=1)[:, None]
    rstd = tl.rsqrt(squares / C + eps)
    if mean_ptr is not None:
        tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)
    for start in range(0, C, BLOCK_C):
        total, _, column, inside = _load_sum(
            x_ptr, residual_ptr, seed_ptr, row, start, x_row_stride, residual_row_stride, C, offset, threshold, scale,
            BLOCK_C, VEC,
        )  # fmt: skip
        if sum_ptr is not None:
            rounded = total.to(sum_ptr.dtype.element_ty)
            tl.store(run_pointers(sum_ptr, row * C, column, VEC), rounded, mask=inside)
            total = rounded.to(tl.float32)
        y = (total - mean) * rstd
        if weight_ptr is not None:
            y *= load_parameters(weight_ptr, column, column // VEC < C // VEC, VEC)
        if bias_ptr is not None:
            y += load_parameters(bias_ptr, column, column // VEC < C // VEC, VEC)
        tl.store(run_pointers(y_ptr, row * C, column, VEC), y.to(y_ptr.dtype.element_ty), mask=inside)


@jit
def wide_backward_kernel(
    dy_ptr,
    dsum_ptr,
    x_ptr,
    residual_ptr,
    weight_ptr,
    seed_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    dresidual_ptr,
    dy_row_stride: tl.int32,
    dsum_row_stride: tl.int32,
    x_row_stride: tl.int32,
    residual_row_stride: tl.int32,
    C: tl.int32,
    offset: tl.int32,
    threshold: tl.int32,
    scale: tl.float32,
    BLOCK_C: tl.constexpr,
    VEC: tl.constexpr,
):
    wait_for_previous()
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)[:, None]
    mean = 0.0
    if mean_ptr is not None:
        mean = tl.load(mean_ptr + row)
    rstd = tl.load(rstd_ptr + row)
    tl.assume(C > 0)  # else what the second loop needs is worked out ahead of the first, kept over it, and spilled
    sum_g = tl.zeros((1, BLOCK_C), tl.float32)
    sum_gx = tl.zeros((1, BLOCK_C), tl.float32)
    for start in range(0, C, BLOCK_C):
        total, _, column, inside = _load_sum(
            x_ptr, residual_ptr, seed_ptr, row, start, x_row_stride, residual_row_stride, C, offset, threshold, scale,
            BLOCK_C, VEC,
        )  # fmt: skip
        g = tl.load(run_pointers(dy_ptr, row * dy_row_stride, column, VEC), mask=inside, other=0.0).to(tl.float32)
        if weight_ptr is not None:
            g *= load_parameters(weight_ptr, column, column // VEC < C // VEC, VEC)
        sum_g += g
        sum_gx += g * ((total - mean) * rstd)
    mean_g = 0.0
    if mean_ptr is not None:
        mean_g = tl.sum(sum_g, axis=1)[:, None] / C
    mean_gx = tl.sum(sum_gx, axis=1)[:, None] / C
    for start in range(0, C, BLOCK_C):
        total, keep, column, inside = _load_sum(
            x_ptr, residual_ptr, seed_ptr, row, start, x_row_stride, residual_row_stride, C, offset, threshold, scale,
            BLOCK_C, VEC,
        )  # fmt: skip
        g = tl.load(run_pointers(dy_ptr, row * dy_row_stride, column, VEC), mask=inside, other=0.0).to(tl.float32)
        if weight_ptr is not None:
            g *= load_parameters(weight_ptr, column, column // VEC < C // VEC, VEC)
        ds = (g - mean_g - (total - mean) * rstd * mean_gx) * rstd
        if dsum_ptr is not None:
            pointers = run_pointers(dsum_ptr, row * dsum_row_stride, column, VEC)
            ds += tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
        if dresidual_ptr is not None:
            pointers = run_pointers(dresidual_ptr, row * C, column, VEC)
            tl.store(pointers, ds.to(dresidual_ptr.dtype.element_ty), mask=inside)
        if dx_ptr is not None:
            if seed_ptr is not None:
                ds = tl.where(keep, ds * scale, 0.0)
            tl.store(run_pointers(dx_ptr, row * C, column, VEC), ds.to(dx_ptr.dtype.element_ty), mask=inside)


@jit
def wide_parameters_kernel(
    dy_ptr,
    x_ptr,
    residual_ptr,
    seed_ptr,
    mean_ptr,
    rstd_ptr,
    dweight_ptr,
    dbias_ptr,
    dy_row_stride: tl.int32,
    x_row_stride: tl.int32,
    residual_row_stride: tl.int32,
    rows: tl.int64,
    C: tl.int32,
    offset: tl.int32,
    threshold: tl.int32,
    scale: tl.float32,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    VEC: tl.constexpr,
):
    """dweight and dbias are fp32 (programs along the rows, C)."""
    wait_for_previous()
    start = tl.program_id(0) * BLOCK_C
    dweight = tl.zeros((ROWS, BLOCK_C), tl.float32)
    dbias = tl.zeros((ROWS, BLOCK_C), tl.float32)
    first, end = tl.program_id(1), tl.cdiv(rows, ROWS)
    if seed_ptr is None:  # with dropout a compiler that knows takes 1 % more instructions, and spills no less
        tl.assume(first < end)
    for tile in range(first, end, tl.num_programs(1)):
        row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
        exists = row < rows
        row = tl.where(exists, row, -1)  # no such row
        total, _, column, inside = _load_sum(
            x_ptr, residual_ptr, seed_ptr, row, start, x_row_stride, residual_row_stride, C, offset, threshold, scale,
            BLOCK_C, VEC,
        )  # fmt: skip
        dy = tl.load(run_pointers(dy_ptr, row * dy_row_stride, column, VEC), mask=inside, other=0.0).to(tl.float32)
        mean = 0.0
        if mean_ptr is not None:
            mean = tl.load(mean_ptr + row, mask=exists, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=exists, other=0.0)
        dweight += dy * ((total - mean) * rstd)
        dbias += dy
    column = start + tl.arange(0, BLOCK_C)[None, :]
    inside = column // VEC < C // VEC
    place = tl.program_id(1).to(tl.int64) * C
    if dweight_ptr is not None:
        tl.store(run_pointers(dweight_ptr + place, 0, column, VEC), tl.sum(dweight, axis=0)[None, :], mask=inside)
    if dbias_ptr is not None:
        tl.store(run_pointers(dbias_ptr + place, 0, column, VEC), tl.sum(dbias, axis=0)[None, :], mask=inside)


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    total: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    eps: float,
    dropout: Dropout | None,
) -> None:
    """Fill y, rstd, and mean and the sum where they are given; contiguous, the rest as in add_layer_norm.py."""
    tensors = (x, residual, weight, bias, None if dropout is None else dropout.seed, y, total, mean, rstd)
    strides = _strides(x, residual)
    vector = _vector((x, residual), (y, total), (weight, bias), strides)
    dtypes = tuple(map(dtype_of, (x, residual, weight, bias, y, total)))
    variant = forward_variant(dtypes, dropout is not None, vector, mean is not None)
    launch(variant, (rstd.shape[0],), *tensors, *strides, x.shape[-1], eps, *dropout_arguments(dropout))


def backward(
    dy: Tensor,
    dsum: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    dx: Tensor | None,
    dresidual: Tensor | None,
    dropout: Dropout | None,
    with_dw: bool,
    with_db: bool,
    parameter_dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None]:
    """Fill dx and dresidual where they are given; return dweight and dbias where they are wanted."""
    rows, columns, centred = rstd.shape[0], x.shape[-1], mean is not None
    seed = None if dropout is None else dropout.seed
    strides = _strides(dy, dsum, x, residual)
    vector = _vector((dy, dsum, x, residual), (dx, dresidual), (weight,), strides)
    numbers = dropout_arguments(dropout)
    if dx is not None or dresidual is not None:
        dtypes = tuple(map(dtype_of, (dy, dsum, x, residual, weight, dx, dresidual)))
        variant = backward_variant(dtypes, dropout is not None, vector, centred)
        rest = (mean, rstd, dx, dresidual)
        launch(variant, (rows,), dy, dsum, x, residual, weight, seed, *rest, *strides, columns, *numbers)
    if not (with_dw or with_db):
        return None, None
    # The sum needs the mask only where it is formed here.
    dropped = dropout is not None and residual is not None
    variant = parameters_variant(tuple(map(dtype_of, (dy, x, residual))), dropped, with_dw, with_db, vector, centred)
    tiles, blocks = -(-rows // variant.constants["ROWS"]), -(-columns // variant.constants["BLOCK_C"])
    programs = min(tiles, -(-multiprocessors(x.device) * WIDE_PARAMETERS.programs // blocks))
    sums = ParameterSums(with_dw, with_db, programs, columns, x.device)
    tensors = (dy, x, residual, seed if dropped else None, mean, rstd, sums.dw, sums.db)
    launch(variant, (blocks, programs), *tensors, strides[0], *strides[2:], rows, columns, *numbers)
    return sums.total(parameter_dtype)


@cache
def forward_variant(dtypes: Dtypes, dropout: bool, vector: int, centred: bool = True) -> Variant:
    x, residual, weight, bias, y, total = dtypes
    seed = torch.int64 if dropout else None
    tensors = (x, residual, weight, bias, seed, y, total, torch.float32 if centred else None, torch.float32)
    types = (*map(pointer, tensors), "i32", "i32", "i32", "fp32", "i32", "i32", "fp32")
    constants = {"BLOCK_C": WIDE_ROWS.columns, "VEC": vector}
    return Variant(wide_forward_kernel, types, constants, WIDE_ROWS.num_warps)


@cache
def backward_variant(dtypes: Dtypes, dropout: bool, vector: int, centred: bool = True) -> Variant:
    seed = torch.int64 if dropout else None
    tensors = (*dtypes[:5], seed, torch.float32 if centred else None, torch.float32, *dtypes[5:])
    types = (*map(pointer, tensors), *("i32",) * 7, "fp32")
    constants = {"BLOCK_C": WIDE_ROWS.columns, "VEC": vector}
    # LayerNorm's without parameters, of fp16 beside float32: for four programs a multiprocessor ptxas would spill 8 bytes on sm_80. Three fit.
    short = (
        centred
        and not dropout
        and vector > 1
        and dtypes[4] is None
        and {*dtypes[2:4]} == {torch.float16, torch.float32}
    )
    return Variant(wide_backward_kernel, types, constants, WIDE_ROWS.num_warps, registers=80 if short else 0)


@cache
def parameters_variant(
    dtypes: Dtypes, dropout: bool, with_dw: bool, with_db: bool, vector: int, centred: bool = True
) -> Variant:
    """dtypes: of dy, x and residual."""
    fp32 = torch.float32
    sums = (fp32 if with_dw else None, fp32 if with_db else None)
    tensors = (*dtypes, torch.int64 if dropout else None, fp32 if centred else None, fp32, *sums)
    types = (*map(pointer, tensors), "i32", "i32", "i32", "i64", "i32", "i32", "i32", "fp32")
    constants = {"ROWS": WIDE_PARAMETERS.rows, "BLOCK_C": WIDE_PARAMETERS.columns, "VEC": vector}
    # RMSNorm's, of an fp16 x, dropped, beside a float32 residual: ptxas would spill 8 bytes on sm_80 for eight programs a
    # multiprocessor, of which four or five are launched. With 80 registers six fit.
    short = dropout and vector > 1 and not centred and dtypes[1:] == (torch.float16, fp32)
    warps, registers = WIDE_PARAMETERS.num_warps, 80 if short else 0
    return Variant(wide_parameters_kernel, types, constants, warps, registers=registers)


def _strides(*tensors: Tensor | None) -> tuple[int, ...]:
    return tuple(0 if tensor is None else as_rows(tensor)[1] for tensor in tensors)


def _vector(
    inputs: tuple[Tensor | None, ...],
    outputs: tuple[Tensor | None, ...],
    parameters: tuple[Tensor | None, ...],
    strides: tuple[int, ...],
) -> int:
    first = inputs[0]
    assert first is not None
    addresses = reduce(or_, map(address_of, inputs + parameters))
    size = min(t.element_size() for t in inputs + outputs if t is not None)
    return run_length(size, reduce(or_, strides) | first.shape[-1], addresses)
