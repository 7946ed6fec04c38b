# mypy: allow-incomplete-defs
"""Dropout, residual sum and LayerNorm in one pass, backward. The maths are in add_layer_norm.py.

One kernel for what the forward may have kept: x and the residual, their sum, or xhat, what was normalised (in
linear_norm.py).
"""

from __future__ import annotations

from functools import cache, lru_cache, reduce
from operator import or_
from typing import NamedTuple

import torch
from torch import Tensor

from . import wide_rows
from .configs import ADD_LAYER_NORM_BACKWARD
from .dropout import Dropout, dropout_arguments, keep_rows, load_seed
from .launch import Variant, empty, jit, launch, multiprocessors, pointer, tl
from .overlap import wait_for_previous
from .read_ahead import backward_constants, backward_programs, load_rows, load_statistic, load_tile, widened
from .rows import (
    MAX_BLOCK,
    MAX_PLANS,
    ParameterSums,
    Plan,
    add_rows,
    address_of,
    arriving_rows,
    as_rows,
    block_of,
    column_block,
    dtype_of,
    load_parameters,
    norm_gradient,
    packed,
    row_constants,
    run_length,
    run_pointers,
    scaled_gradient,
    tile_range,
)


@jit
def _add_tile(
    sums,
    dweight_ptr,
    dbias_ptr,
    ds,
    x,
    mean,
    rstd,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    GROUPS: tl.constexpr,
    XHAT: tl.constexpr,
):
    """dweight and dbias, where they are wanted, with a tile's share, and x without its mean."""
    dweight, dbias = sums
    # Where there is no element, dy = 0 takes x out of every sum.
    if dbias_ptr is not None:
        dbias = add_rows(dbias, ds, ROWS, BLOCK_C, GROUPS)
    if mean is not None:
        x -= mean[:, None]
    if dweight_ptr is not None:
        dweight = add_rows(dweight, (ds if XHAT else ds * rstd[:, None]) * x, ROWS, BLOCK_C, GROUPS)
    return dweight, dbias, x


@jit
def add_layer_norm_backward_kernel(
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
    dweight_ptr,
    dbias_ptr,
    dx_sum_ptr,
    dy_row_stride: tl.int32,
    dsum_row_stride: tl.int32,
    x_row_stride: tl.int32,
    residual_row_stride: tl.int32,
    sums_row_stride: tl.int32,
    rows: tl.int64,
    C: tl.int32,
    offset: tl.int32,
    threshold: tl.int32,
    scale: tl.float32,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    FULL: tl.constexpr,
    VEC: tl.constexpr,
    GROUPS: tl.constexpr,
    AHEAD: tl.constexpr,
    RELOAD: tl.constexpr,
    SURE: tl.constexpr,
    LATE: tl.constexpr,
    PAIRED: tl.constexpr,
    XHAT: tl.constexpr,
):
    """Without a residual, x is the sum, or xhat; without rstd nothing was normalised, without mean nothing centred (RMSNorm).

    dweight, dbias and dx_sum, which is summed from dx, are fp32 (programs, C): each program's sums over its rows.
    """
    wait_for_previous()
    row = tl.arange(0, ROWS)
    column, inside, inverse_c = column_block(C, BLOCK_C, FULL, VEC)
    statistics = (mean_ptr, rstd_ptr)
    read = (dy_ptr, dsum_ptr, x_ptr, residual_ptr)
    strides = (dy_row_stride, dsum_row_stride, x_row_stride, residual_row_stride)
    out_stride = BLOCK_C if FULL else C
    weight = None
    if weight_ptr is not None and not RELOAD:
        weight = load_parameters(weight_ptr, column, inside, VEC)
    dweight = tl.zeros((GROUPS, BLOCK_C), tl.float32)
    dbias = tl.zeros((GROUPS, BLOCK_C), tl.float32)
    dx_sum = tl.zeros((GROUPS, BLOCK_C), tl.float32)
    if seed_ptr is not None:
        low, high = load_seed(seed_ptr)

    for cut in tl.static_range(2):  # full tiles, without masks of rows; then what remains
        begin, end, step = tile_range(rows, ROWS, cut)
        if SURE and not cut:
            tl.assume(begin < end)
        if AHEAD and not cut:
            exists = row < tl.where(begin < end, ROWS, 0)
            loaded = load_tile(read, strides, statistics, begin, row, exists, C, BLOCK_C, FULL, VEC)
        for tile in range(begin, end, step):
            here = tl.cast(rows // ROWS if cut else tile, tl.int32)
            first = here.to(tl.int64) * ROWS
            exists = row < tl.minimum(rows - first, ROWS).to(tl.int32)
            mask = exists[:, None] & inside if cut else inside
            if cut or not AHEAD:
                exists = exists if cut else None
                if LATE:
                    x = load_rows(x_ptr, here, x_row_stride, row, exists, C, BLOCK_C, FULL, VEC)
                    residual = load_rows(residual_ptr, here, residual_row_stride, row, exists, C, BLOCK_C, FULL, VEC)
                    keep = keep_rows(low, high, offset, threshold, first + row[:, None], 0, BLOCK_C, VEC)
                    mean = load_statistic(mean_ptr, here, row, exists)
                    rstd = load_statistic(rstd_ptr, here, row, exists)
                    loaded = here, here, x, residual, mean, rstd
                else:
                    loaded = load_tile(read, strides, statistics, here, row, exists, C, BLOCK_C, FULL, VEC, PAIRED)
            dy, dsum, x, residual, mean, rstd = loaded
            if not LATE:
                ds = widened(dy, dy_ptr.dtype.element_ty)
                if dsum_ptr is not None:
                    dsum = widened(dsum, dsum_ptr.dtype.element_ty)
            if rstd_ptr is not None:
                x = widened(x, x_ptr.dtype.element_ty)
            if residual_ptr is not None:
                residual = widened(residual, residual_ptr.dtype.element_ty)
            if AHEAD and not cut:  # the next tile is on its way while this one is worked on
                if tile + step < end:
                    loaded = load_tile(read, strides, statistics, tile + step, row, None, C, BLOCK_C, FULL, VEC)

            if seed_ptr is not None and not LATE:
                keep = keep_rows(low, high, offset, threshold, first + row[:, None], 0, BLOCK_C, VEC)
            if rstd_ptr is not None:
                if residual_ptr is not None:
                    if seed_ptr is not None:
                        x = tl.where(keep, x * scale, 0.0)
                    x += residual

                sums = dweight, dbias
                if LATE:
                    if mean_ptr is not None:
                        x -= mean[:, None]
                    g = tl.zeros((ROWS, BLOCK_C), tl.float32)
                    if here >= 0:  # always; else ptxas puts these sums off, and keeps what they add until a row's end
                        read_late = load_rows(dy_ptr, here, dy_row_stride, row, exists, C, BLOCK_C, FULL, VEC)
                        late = widened(read_late, dy_ptr.dtype.element_ty)
                        dweight, dbias, _ = _add_tile(
                            sums, dweight_ptr, dbias_ptr, late, x, None, rstd, ROWS, BLOCK_C, GROUPS, XHAT
                        )
                        if RELOAD:
                            g = scaled_gradient(late, rstd, load_parameters(weight_ptr, column, inside, VEC))
                        else:
                            g = scaled_gradient(late, rstd, weight)
                else:
                    factor = weight
                    if RELOAD:
                        factor = load_parameters(weight_ptr, column, inside, VEC)
                    centre = mean if mean_ptr is not None else None
                    dweight, dbias, x = _add_tile(
                        sums, dweight_ptr, dbias_ptr, ds, x, centre, rstd, ROWS, BLOCK_C, GROUPS, XHAT
                    )
                    g = scaled_gradient(ds, rstd, factor)
                if XHAT:
                    ds = norm_gradient(g, x, None, inverse_c, True)
                else:
                    ds = norm_gradient(g, x, rstd, inverse_c, mean_ptr is not None)
            if dsum_ptr is not None:
                if LATE:
                    dsum = load_rows(dsum_ptr, here, dsum_row_stride, row, exists, C, BLOCK_C, FULL, VEC)
                    dsum = widened(dsum, dsum_ptr.dtype.element_ty)
                ds += dsum
            out_start = row[:, None] * out_stride
            if dresidual_ptr is not None:
                pointers = run_pointers(dresidual_ptr + first * out_stride, out_start, column, VEC)
                tl.store(pointers, ds.to(dresidual_ptr.dtype.element_ty), mask=mask if cut or not FULL else None)
            if seed_ptr is not None:
                ds = tl.where(keep, ds * scale, 0.0)
            if dx_sum_ptr is not None:
                dx_sum = add_rows(dx_sum, ds, ROWS, BLOCK_C, GROUPS)
            if dx_ptr is not None:
                pointers = run_pointers(dx_ptr + first * out_stride, out_start, column, VEC)
                tl.store(pointers, ds.to(dx_ptr.dtype.element_ty), mask=mask if cut or not FULL else None)

    partial = tl.program_id(0).to(tl.int64) * sums_row_stride
    if dweight_ptr is not None:
        tl.store(run_pointers(dweight_ptr + partial, 0, column, VEC), tl.sum(dweight, axis=0)[None, :], mask=inside)
    if dbias_ptr is not None:
        tl.store(run_pointers(dbias_ptr + partial, 0, column, VEC), tl.sum(dbias, axis=0)[None, :], mask=inside)
    if dx_sum_ptr is not None:
        tl.store(run_pointers(dx_sum_ptr + partial, 0, column, VEC), tl.sum(dx_sum, axis=0)[None, :], mask=inside)


def add_layer_norm_backward(
    dy: Tensor,
    dsum: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    dropout: Dropout | None = None,
    *,
    dx_dtype: torch.dtype | None,
    dresidual_dtype: torch.dtype | None,
    with_dw: bool = True,
    with_db: bool = True,
    parameter_dtype: torch.dtype | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `add_layer_norm_forward`: dx and dresidual (..., C), dweight and dbias (C,).

    x, residual: the forward's; or the sum it returned and None. dy, dsum: (..., C), any layout. dx_dtype,
    dresidual_dtype: None where that gradient is not wanted. parameter_dtype: of dweight and dbias; weight's where None.
    Deterministic: sums are always taken in the same order on the same GPU.
    """
    dy, dy_stride = arriving_rows(dy)
    x, x_stride = as_rows(x)
    dsum, dsum_stride = (None, 0) if dsum is None else arriving_rows(dsum)
    residual, residual_stride = (None, 0) if residual is None else as_rows(residual)
    weight = packed(weight)
    shape, device, columns = x.shape, x.device, x.shape[-1]
    parameter_dtype = parameter_dtype or (x.dtype if weight is None else weight.dtype)
    dx = None if dx_dtype is None else empty(shape, dx_dtype, device)
    dresidual = None if dresidual_dtype is None else empty(shape, dresidual_dtype, device)
    if columns > MAX_BLOCK:
        found = (dy, dsum, x, residual, weight, mean, rstd, dx, dresidual, dropout)
        return (dx, dresidual, *wide_rows.backward(*found, with_dw, with_db, parameter_dtype))

    addresses = dy.data_ptr() | x.data_ptr() | address_of(dsum) | address_of(residual) | address_of(weight)
    read = (dy.dtype, dtype_of(dsum), x.dtype, dtype_of(residual), dtype_of(weight))
    dtypes = (*read, dx_dtype, dresidual_dtype)
    form = BackwardForm(dtypes, with_dw, with_db, dropout is not None, centred=mean is not None)
    strides = (dy_stride, dsum_stride, x_stride, residual_stride, columns)
    plan = _plan(form, rstd.numel(), columns, strides, addresses % 16, device)
    sums = ParameterSums(with_dw, with_db, plan.grid[0], columns, device)
    seed = None if dropout is None else dropout.seed
    tensors = (dy, dsum, x, residual, weight, seed, mean, rstd, dx, dresidual, sums.dw, sums.db, None)
    launch(plan.variant, plan.grid, *tensors, *plan.sizes, *dropout_arguments(dropout))
    return (dx, dresidual, *sums.total(parameter_dtype))


class BackwardForm(NamedTuple):
    """What the program depends on, besides the columns and whether they are aligned."""

    dtypes: tuple[torch.dtype | None, ...]  # of dy, dsum, x, residual, weight, dx and dresidual
    with_dw: bool
    with_db: bool
    dropout: bool
    xhat: bool = False  # x is what was normalised, if anything was, and dx is summed up as well
    centred: bool = True  # LayerNorm, else RMSNorm


@lru_cache(maxsize=MAX_PLANS)
def _plan(
    form: BackwardForm, rows: int, columns: int, strides: tuple[int, ...], offset: int, device: torch.device
) -> Plan:
    """strides: of rows of dy, dsum, x, residual and the partial sums; offset: of all addresses from multiples of 16."""
    *given, _weight, dx, dresidual = form.dtypes
    size = min(dtype.itemsize for dtype in (*given, dx, dresidual) if dtype is not None)
    vector = run_length(size, reduce(or_, strides) | columns, offset)
    variant = backward_variant(columns, form, vector)
    most = ADD_LAYER_NORM_BACKWARD[block_of(columns)].programs
    programs = backward_programs(variant, rows, most, multiprocessors(device))
    return Plan(variant, (programs,), (*strides, rows, columns))


def residual_norm_backward(
    dy: Tensor,
    xhat: Tensor,
    rstd: Tensor,
    weight: Tensor,
    dropout: Dropout | None = None,
    *,
    dsum: Tensor | None = None,
    dresidual_dtype: torch.dtype,
    dx_dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Back from y = LayerNorm(residual + dropout(x)), of which the forward kept xhat (..., C) and rstd, fp32 (rows,).

    dsum: the gradient that arrives for that sum itself, (..., C). Returns dresidual, dx (None where it would equal
    dresidual), both (..., C), and the sums over each program's rows for weight, bias and the bias inside x, fp32
    (programs, 3 * C), for `sum_partials`. C up to 8,192. Deterministic.
    """
    dy, dy_stride = arriving_rows(dy)
    dsum, dsum_stride = (None, 0) if dsum is None else arriving_rows(dsum)
    weight = weight.contiguous()
    shape, device, columns = dy.shape, dy.device, dy.shape[-1]
    dresidual = empty(shape, dresidual_dtype, device)
    separate = dropout is not None or dx_dtype != dresidual_dtype
    dx = empty(shape, dx_dtype, device) if separate else None
    dtypes = (dy.dtype, dtype_of(dsum), xhat.dtype, None, weight.dtype, dtype_of(dx), dresidual_dtype)
    form = BackwardForm(dtypes, True, True, dropout is not None, True)
    offset = (dy.data_ptr() | address_of(dsum) | xhat.data_ptr() | weight.data_ptr()) % 16
    plan = _plan(form, rstd.numel(), columns, (dy_stride, dsum_stride, columns, 0, 3 * columns), offset, device)
    partial = empty((*plan.grid, 3 * columns), torch.float32, device)
    sums = (partial, partial[:, columns:], partial[:, 2 * columns :])  # the kernel reads but where they start
    seed = None if dropout is None else dropout.seed
    tensors = (dy, dsum, xhat, None, weight, seed, None, rstd, dx, dresidual, *sums)
    launch(plan.variant, plan.grid, *tensors, *plan.sizes, *dropout_arguments(dropout))
    return dresidual, dx, partial


def dropped_backward(dsum: Tensor, dropout: Dropout, dx_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Back from residual + dropout(x) to x: dx (..., C), and its sums over each program's rows, fp32 (programs, C)."""
    dsum, stride = arriving_rows(dsum)
    shape, device, columns = dsum.shape, dsum.device, dsum.shape[-1]
    dx = empty(shape, dx_dtype, device)
    form = BackwardForm((dsum.dtype, None, None, None, None, dx_dtype, None), False, False, True, True)
    strides = (stride, 0, 0, 0, columns)
    plan = _plan(form, shape[:-1].numel(), columns, strides, dsum.data_ptr() % 16, device)
    partial = empty((*plan.grid, columns), torch.float32, device)
    tensors = (dsum, None, None, None, None, dropout.seed, None, None, dx, None, None, None, partial)
    launch(plan.variant, plan.grid, *tensors, *plan.sizes, *dropout_arguments(dropout))
    return dx, partial


@cache
def backward_variant(columns: int, form: BackwardForm, vector: int) -> Variant:
    """The program that takes all gradients in one pass over rows of `columns` columns, read in runs of `vector`."""
    dtypes, with_dw, with_db, dropout, xhat, centred = form
    config = ADD_LAYER_NORM_BACKWARD[block_of(columns)]
    fp32 = torch.float32
    sums = (fp32 if with_dw else None, fp32 if with_db else None, fp32 if xhat else None)
    statistics = (None if xhat or not centred else fp32, None if dtypes[2] is None else fp32)
    tensors = (*dtypes[:5], torch.int64 if dropout else None, *statistics, *dtypes[5:], *sums)
    types = (*map(pointer, tensors), *["i32"] * 5, "i64", "i32", "i32", "i32", "fp32")
    constants = row_constants(columns, config, vector)
    # Dropout's random bits take registers, too.
    registers = 0 if config.registers == 0 else 168 if dropout else config.registers
    constants |= backward_constants(constants, config.num_warps, registers, dtypes[:4])
    registers = registers if constants["AHEAD"] else _granted(form, int(constants["BLOCK_C"]), vector)
    wide = form, int(constants["BLOCK_C"]), vector
    constants |= {"RELOAD": _reloads(*wide), "SURE": _is_sure(*wide), "LATE": _is_late(*wide)}
    constants |= {"PAIRED": _is_paired(form), "XHAT": xhat}
    return Variant(add_layer_norm_backward_kernel, types, constants, config.num_warps, registers=registers)


def _granted(form: BackwardForm, block: int, vector: int) -> int:
    """The most registers of what does not read ahead, 0 where the compiler decides: as many as its eight programs a multiprocessor have.

    For ten, ptxas would spill 8 bytes on sm_100.
    """
    return 128 if form.xhat and form.dropout and form.dtypes[1] is not None and block == 64 and vector == 1 else 0


def _is_paired(form: BackwardForm) -> bool:
    """Whether 16-bit elements are read in pairs, which takes 2 to 5 % fewer instructions.

    Of a float32 x beside a residual of which nothing is written, all others lie four in a thread, but its pairs eight: changing from one to the
    other, and drawing dropout's mask for four, takes up to twice the instructions, and 8 to 80 bytes spilled in rows of over 4,096 columns.
    """
    _, _, x, residual, *_, dresidual = form.dtypes
    return not (x == torch.float32 and residual not in (None, torch.float32) and dresidual is None)


def _is_sure(form: BackwardForm, block: int, vector: int) -> bool:
    """Whether the compiler is told that each program has a row, as it has where a tile is one: where it would spill 8 to 88 bytes.

    It would work out what the loop and the sums behind it have in common on both ways, in it and past it, and keep that over the loop.
    Elsewhere there are up to 4 % more instructions then.
    """
    _, _, x, residual, *_ = form.dtypes
    mixed = residual is not None and x != residual
    return _is_late(form, block, vector) or (form.dropout and mixed and block == MAX_BLOCK)


def _is_late(form: BackwardForm, block: int, vector: int) -> bool:
    """Whether dropout's mask is drawn before dy is read, and the sum's gradient is read last, where up to 144 bytes would spill.

    Elements of no whole runs take a register each, and what is read early waits in them.
    """
    _, _, x, *_ = form.dtypes
    return form.dropout and x is not None and block == MAX_BLOCK and vector == 1


def _reloads(form: BackwardForm, block: int, vector: int) -> bool:
    """Whether each row reads the weight again, whose 16 registers dropout's mask takes: 512 threads have no more than 128 each.

    Kept, 8 to 24 bytes a thread spill; read again, 1 to 6 % more instructions (of no whole runs 3 %) leave DRAM 2.5 times as slow as
    the busiest pipe.
    """
    *_, weight, _, dresidual = form.dtypes
    # Of no whole runs, what gives the residual no gradient has registers left.
    crowded = vector == 8 or (_is_late(form, block, vector) and dresidual is not None)
    return form.dropout and weight is not None and block == MAX_BLOCK and crowded
