# mypy: allow-incomplete-defs
"""Row-wise LayerNorm and RMSNorm, forward and backward.

    y = (x - mean(x)) * rstd(x) * weight + bias,   rstd = 1 / sqrt(var(x) + eps)

    g = dy * weight,   xhat = (x - mean) * rstd
    dx = rstd * (g - mean(g) - xhat * mean(g * xhat)),   dweight = sum over rows of dy * xhat,   dbias = sum of dy

x is (rows, C); mean and rstd are fp32 (rows,) and are all that the backward keeps besides x. RMSNorm is the same without
any mean: of x, in var(x), which is mean(x * x) then, and of g. Kernels leave it out where they are given no mean.
Source: Ba et al., 2016, arXiv:1607.06450; Zhang and Sennrich, 2019, arXiv:1910.07467.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, lru_cache, partial

import torch
from torch import Tensor

from . import wide_rows
from .configs import ADD_LAYER_NORM_BACKWARD, LAYER_NORM_BACKWARD, LAYER_NORM_FORWARD, RowConfig
from .entry import Budget, Entry
from .launch import TRITON_TYPES, Variant, empty, jit, launch, multiprocessors, pointer, tl
from .overlap import wait_for_previous
from .read_ahead import backward_constants, backward_programs, is_blackwell, load_tile, widened
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
    root_mean_square,
    row_constants,
    row_statistics,
    run_length,
    run_pointers,
    scaled_gradient,
    statistics_of,
    sum_partials_variant,
    tile_elements,
    tile_range,
)
from .rows import MAX_COLUMNS as MAX_COLUMNS
from .warp_rows import config_by_warps, load_by_warps, load_norm_parameters, scale_and_shift, store_rows


@jit
def layer_norm_forward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    x_row_stride: tl.int32,
    rows: tl.int64,
    C: tl.int32,
    eps: tl.float32,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    FULL: tl.constexpr,
    VEC: tl.constexpr,
    WARPS: tl.constexpr,
):
    wait_for_previous()
    first = tl.program_id(0).to(tl.int64) * ROWS  # rows * C can pass 2**31; offsets from the first row cannot
    row = tl.arange(0, ROWS)
    count = tl.minimum(rows - first, ROWS).to(tl.int32)
    exists = row < count
    column, inside, inverse_c = column_block(C, BLOCK_C, FULL, VEC)
    mask = exists[:, None] & inside
    # Parameters come before x: the compiler then gives everything the layout of x, with whole rows in a warp.
    weight, bias = None, None
    if weight_ptr is not None:
        weight = load_norm_parameters(weight_ptr, column, inside, BLOCK_C, VEC, WARPS)
    if bias_ptr is not None:
        bias = load_norm_parameters(bias_ptr, column, inside, BLOCK_C, VEC, WARPS)

    x_first = x_ptr + first * x_row_stride
    if WARPS:
        x = load_by_warps(x_first, x_row_stride, count, ROWS, BLOCK_C, WARPS)
    else:
        pointers = run_pointers(x_first, row[:, None] * x_row_stride, column, VEC)
        x = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    if mean_ptr is not None:
        x, mean, rstd = row_statistics(x, inside, C, inverse_c, eps, FULL)
    else:
        rstd = root_mean_square(x, inverse_c, eps)
    y = scale_and_shift(x * rstd[:, None], weight, bias, WARPS)

    y_stride = BLOCK_C if FULL else C
    store_rows(y_ptr + first * y_stride, y_stride, count, y, row, column, mask, VEC, WARPS)
    if mean_ptr is not None:
        tl.store(mean_ptr + first + row, mean, mask=exists)
    tl.store(rstd_ptr + first + row, rstd, mask=exists)


@jit
def layer_norm_backward_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    dweight_ptr,
    dbias_ptr,
    dy_row_stride: tl.int32,
    x_row_stride: tl.int32,
    rows: tl.int64,
    C: tl.int32,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    FULL: tl.constexpr,
    VEC: tl.constexpr,
    GROUPS: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """dweight and dbias are fp32 (programs, C): each program's sum over the rows that it visited."""
    wait_for_previous()
    row = tl.arange(0, ROWS)
    column, inside, inverse_c = column_block(C, BLOCK_C, FULL, VEC)
    read, strides = (dy_ptr, None, x_ptr, None), (dy_row_stride, 0, x_row_stride, 0)
    statistics = (mean_ptr, rstd_ptr)
    dx_stride = BLOCK_C if FULL else C
    weight = None
    if weight_ptr is not None:
        weight = load_parameters(weight_ptr, column, inside, VEC)
    dweight = tl.zeros((GROUPS, BLOCK_C), tl.float32)
    dbias = tl.zeros((GROUPS, BLOCK_C), tl.float32)

    # Blackwell's code for 32 elements a lane would spill 24 to 40 bytes.
    ahead: tl.constexpr = AHEAD and not is_blackwell()

    for cut in tl.static_range(2):  # full tiles, without masks of rows; then what remains
        begin, end, step = tile_range(rows, ROWS, cut)
        if ahead and not cut:
            exists = row < tl.where(begin < end, ROWS, 0)
            loaded = load_tile(read, strides, statistics, begin, row, exists, C, BLOCK_C, FULL, VEC)
        for tile in range(begin, end, step):
            here = tl.cast(rows // ROWS if cut else tile, tl.int32)
            first = here.to(tl.int64) * ROWS
            exists = row < tl.minimum(rows - first, ROWS).to(tl.int32)
            mask = exists[:, None] & inside if cut else inside
            if cut or not ahead:
                exists = exists if cut else None
                loaded = load_tile(read, strides, statistics, here, row, exists, C, BLOCK_C, FULL, VEC)
            dy, _, x, _, mean, rstd = loaded
            dy, x = widened(dy, dy_ptr.dtype.element_ty), widened(x, x_ptr.dtype.element_ty)
            # Where there is no element, dy = 0 takes x out of every sum.
            if mean_ptr is not None:
                x -= mean[:, None]
            if ahead and not cut:  # the next tile is on its way while this one is worked on
                if tile + step < end:
                    loaded = load_tile(read, strides, statistics, tile + step, row, None, C, BLOCK_C, FULL, VEC)

            if dbias_ptr is not None:
                dbias = add_rows(dbias, dy, ROWS, BLOCK_C, GROUPS)
            if dweight_ptr is not None:
                dweight = add_rows(dweight, dy * rstd[:, None] * x, ROWS, BLOCK_C, GROUPS)
            if dx_ptr is not None:
                dx = norm_gradient(scaled_gradient(dy, rstd, weight), x, rstd, inverse_c, mean_ptr is not None)
                dx_pointers = run_pointers(dx_ptr + first * dx_stride, row[:, None] * dx_stride, column, VEC)
                tl.store(dx_pointers, dx.to(dx_ptr.dtype.element_ty), mask=mask if cut or not FULL else None)

    partial = tl.program_id(0).to(tl.int64) * dx_stride
    if dweight_ptr is not None:
        tl.store(run_pointers(dweight_ptr + partial, 0, column, VEC), tl.sum(dweight, axis=0)[None, :], mask=inside)
    if dbias_ptr is not None:
        tl.store(run_pointers(dbias_ptr + partial, 0, column, VEC), tl.sum(dbias, axis=0)[None, :], mask=inside)


def layer_norm_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    out_dtype: torch.dtype | None = None,
    centred: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """LayerNorm over the last dimension of x (..., C); RMSNorm where it is not centred.

    weight, bias: (C,) in fp32 or x's dtype, or None. out_dtype: of y; x's where None (autocast wants fp32).
    Returns y (..., C), contiguous, and mean (RMSNorm: None) and rstd, fp32 (rows,). Raises ValueError for 0 columns.
    """
    x, stride = as_rows(x)
    weight, bias = packed(weight), packed(bias)
    shape, device, out_dtype = x.shape, x.device, out_dtype or x.dtype
    columns = shape[-1]
    rows = shape[:-1].numel()
    y = empty(shape, out_dtype, device)
    mean, rstd = statistics_of(rows, centred, device)
    if columns > MAX_BLOCK:
        wide_rows.forward(x, None, weight, bias, y, None, mean, rstd, eps, None)
        return y, mean, rstd
    offset = (x.data_ptr() | address_of(weight) | address_of(bias)) % 16
    dtypes = (x.dtype, dtype_of(weight), dtype_of(bias), out_dtype)
    plan = _plan_forward(rows, columns, stride, dtypes, centred, offset)
    launch(plan.variant, plan.grid, x, weight, bias, y, mean, rstd, *plan.sizes, eps)
    return y, mean, rstd


@lru_cache(maxsize=MAX_PLANS)
def _plan_forward(
    rows: int,
    columns: int,
    stride: int,
    dtypes: tuple[torch.dtype, torch.dtype | None, torch.dtype | None, torch.dtype],
    centred: bool,
    offset: int,
) -> Plan:
    vector = run_length(dtypes[0].itemsize, stride | columns, offset)
    variant = forward_variant(columns, *dtypes, vector, centred)
    return Plan(variant, (-(-rows // variant.constants["ROWS"]),), (stride, rows, columns))


def layer_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    *,
    with_dx: bool = True,
    with_dw: bool = True,
    with_db: bool = True,
    parameter_dtype: torch.dtype | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `layer_norm_forward`: dx (..., C) in x's dtype, dweight and dbias (C,).

    dy, x: (..., C), any layout. mean, rstd: what the forward returned. parameter_dtype: of dweight and dbias; weight's
    where None. Deterministic: sums are always taken in the same order on the same GPU.
    """
    if not (with_dx or with_dw or with_db):
        return None, None, None
    dy, dy_stride = arriving_rows(dy)
    x, x_stride = as_rows(x)
    weight = packed(weight)
    shape, device = x.shape, x.device
    columns = shape[-1]
    parameter_dtype = parameter_dtype or (x.dtype if weight is None else weight.dtype)
    dx = empty(shape, x.dtype, device) if with_dx else None
    if columns > MAX_BLOCK:
        inputs = (dy, None, x, None, weight, mean, rstd, None, dx, None)
        return (dx, *wide_rows.backward(*inputs, with_dw, with_db, parameter_dtype))
    offset = (x.data_ptr() | dy.data_ptr() | address_of(weight)) % 16
    dtypes = (dy.dtype, x.dtype, dtype_of(weight))
    strides = (dy_stride, x_stride)
    wanted = (with_dx, with_dw, with_db)
    plan = _plan_backward(rstd.numel(), columns, strides, dtypes, wanted, mean is not None, offset, device)
    sums = ParameterSums(with_dw, with_db, plan.grid[0], columns, device)
    launch(plan.variant, plan.grid, dy, x, weight, mean, rstd, dx, sums.dw, sums.db, *plan.sizes)
    return (dx, *sums.total(parameter_dtype))


@lru_cache(maxsize=MAX_PLANS)
def _plan_backward(
    rows: int,
    columns: int,
    strides: tuple[int, int],
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype | None],
    wanted: tuple[bool, bool, bool],
    centred: bool,
    offset: int,
    device: torch.device,
) -> Plan:
    dy_dtype, x_dtype, _ = dtypes
    vector = run_length(min(x_dtype.itemsize, dy_dtype.itemsize), strides[0] | strides[1] | columns, offset)
    variant = backward_variant(columns, *dtypes, *wanted, vector, centred)
    most = backward_config(columns, dy_dtype, x_dtype, wanted, vector).programs
    programs = backward_programs(variant, rows, most, multiprocessors(device))
    return Plan(variant, (programs,), (*strides, rows, columns))


@cache
def forward_variant(
    columns: int,
    x_dtype: torch.dtype,
    weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
    out_dtype: torch.dtype,
    vector: int,
    centred: bool = True,
) -> Variant:
    """The program that normalises rows of `columns` columns, read in runs of `vector` elements."""
    by_warps = config_by_warps(columns, vector, x_dtype, weight_dtype, bias_dtype, out_dtype)
    config = by_warps or LAYER_NORM_FORWARD[block_of(columns)]
    tensors = (x_dtype, weight_dtype, bias_dtype, out_dtype, torch.float32 if centred else None, torch.float32)
    types = (*map(pointer, tensors), "i32", "i64", "i32", "fp32")
    constants = row_constants(columns, config, vector) | {"WARPS": by_warps.num_warps if by_warps else 0}
    # 16 bits one by one, 32 elements a lane beside as many of the weight and of the bias: left to ptxas, fp16 spills 16 bytes
    # on sm_90 for 128 registers. So it takes 136 to 151, as bf16 does, and 8 to 11 % fewer instructions. Less, such as 144, costs
    # 10 % more on sm_100 and sm_120.
    scattered = vector == 1 and constants["BLOCK_C"] == 1024 and not constants["FULL"] and x_dtype.itemsize == 2
    registers = 168 if scattered and weight_dtype and bias_dtype else config.registers
    return Variant(layer_norm_forward_kernel, types, constants, config.num_warps, registers=registers)


def backward_config(
    columns: int, dy_dtype: torch.dtype, x_dtype: torch.dtype, wanted: tuple[bool, bool, bool], vector: int
) -> RowConfig:
    """How the backward lies on the machine."""
    block = block_of(columns)
    config = LAYER_NORM_BACKWARD[block]
    if vector > 1:
        crowded = columns < block or max(dy_dtype.itemsize, x_dtype.itemsize) > 2
    else:  # tiles are halved (`row_constants`) where they have more than a row
        crowded = config.rows == 1 and all(wanted)
    return ADD_LAYER_NORM_BACKWARD[block] if crowded else config


@cache
def backward_variant(
    columns: int,
    dy_dtype: torch.dtype,
    x_dtype: torch.dtype,
    weight_dtype: torch.dtype | None,
    with_dx: bool,
    with_dw: bool,
    with_db: bool,
    vector: int,
    centred: bool = True,
) -> Variant:
    """The program that takes all gradients in one pass over dy and x."""
    config = backward_config(columns, dy_dtype, x_dtype, (with_dx, with_dw, with_db), vector)
    fp32 = torch.float32
    statistics = (fp32 if centred else None, fp32)
    tensors = (dy_dtype, x_dtype, weight_dtype, *statistics, x_dtype if with_dx else None)
    sums = (fp32 if with_dw else None, fp32 if with_db else None)
    types = (*map(pointer, (*tensors, *sums)), "i32", "i32", "i64", "i32")
    constants = row_constants(columns, config, vector)
    constants |= backward_constants(constants, config.num_warps, config.registers, (dy_dtype, x_dtype))
    registers = config.registers if constants["AHEAD"] else 0
    if config is ADD_LAYER_NORM_BACKWARD[2048]:
        # As many as its four programs a multiprocessor have anyway; for more programs ptxas would spill 8 bytes on sm_80.
        registers = 128
    return Variant(layer_norm_backward_kernel, types, constants, config.num_warps, registers=registers)


def catalog_entries() -> Iterator[Entry]:
    fp16, bf16, fp32 = torch.float16, torch.bfloat16, torch.float32
    ahead, narrow, wide = Budget(144, 64, 88, 64), Budget(168, 1024, 160, 2048), Budget(144, 4096, 112, 8192)
    # columns, x's dtype, the parameters' dtype, y's dtype, whether all is aligned, budgets
    rows = (
        (256, bf16, bf16, bf16, True, replace(ahead, amd_shared=2048), narrow),
        (768, fp16, fp32, fp32, True, replace(ahead, registers=176), wide),  # autocast; columns masked in whole runs
        (100, fp32, None, fp32, False, ahead, narrow),  # nothing aligned, no parameters
        (8192, fp32, fp32, fp32, True, ahead, wide),
    )
    for columns, x, parameters, y, aligned, *budgets in rows:
        vector = 16 // x.itemsize if aligned else 1
        affine = parameters is not None
        example = partial(_example, columns, x, parameters, y, aligned, True)
        suffix = f"c{columns}_{TRITON_TYPES[x]}" + ("_autocast" if y != x else "") + ("" if aligned else "_unaligned")
        variants = {
            "forward": forward_variant(columns, x, parameters, parameters, y, vector),
            "backward": backward_variant(columns, y, x, parameters, True, affine, affine, vector),
        }
        for (kind, variant), budget in zip(variants.items(), budgets):
            yield Entry("layer_norm", f"layer_norm_{kind}_{suffix}", variant, tile_elements(variant), budget, example)
        if columns == 256:
            total = sum_partials_variant(columns, x, x)
            name = f"layer_norm_sum_partials_{suffix}"
            elements = 4 * int(total.constants["LOADS"]) * int(total.constants["LANES"])  # of fp32, of a round of loads
            # AMD's 64 lanes a wave load two groups of rows at once, whose sums meet in shared memory.
            yield Entry("layer_norm", name, total, elements, Budget(64, 512, 56, 8192), example)
            # RMSNorm: the same kernels without a mean, and without a bias.
            example = partial(_example, columns, x, parameters, y, aligned, False)
            rms = {
                "forward": forward_variant(columns, x, parameters, None, y, vector, False),
                "backward": backward_variant(columns, y, x, parameters, True, True, False, vector, False),
            }
            for (kind, variant), budget in zip(rms.items(), budgets):
                yield Entry("rms_norm", f"rms_norm_{kind}_{suffix}", variant, tile_elements(variant), budget, example)


def _example(
    columns: int,
    x_dtype: torch.dtype,
    parameter_dtype: torch.dtype | None,
    y_dtype: torch.dtype,
    aligned: bool,
    centred: bool,
    device: torch.device,
) -> Callable[[], tuple[Tensor, ...]]:
    """Forward and backward over a few tiles; rows off 16 bytes where not aligned."""
    rows, gap = (70 if columns <= 1024 else 3), (0 if aligned else 1)
    x = torch.randn(rows, columns + gap, device=device).to(x_dtype)[:, :columns]
    dy = torch.randn(rows, columns + gap, device=device).to(y_dtype)[:, :columns]
    weight = bias = None
    if parameter_dtype is not None:
        weight, bias = (torch.randn(columns, device=device).to(parameter_dtype) for _ in range(2))

    def call() -> tuple[Tensor, ...]:
        affine = parameter_dtype is not None
        y, mean, rstd = layer_norm_forward(x, weight, bias if centred else None, 1e-5, y_dtype, centred)
        gradients = layer_norm_backward(dy, x, weight, mean, rstd, with_dw=affine, with_db=affine and centred)
        return tuple(t for t in (y, mean, rstd, *gradients) if t is not None)

    return call
