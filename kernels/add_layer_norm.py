# mypy: allow-incomplete-defs
"""Dropout, residual sum and LayerNorm or RMSNorm in one pass, forward and backward.

    s = residual + dropout(x),   y = (s - mean(s)) * rstd(s) * weight + bias

    ds = gradient of LayerNorm (see layer_norm.py) + dsum,   dresidual = ds,   dx = dropout's mask * ds / (1 - p)

The sum stays in fp32: one over fp16's 65,504 does no harm. Where the caller wants it (pre-norm) it is written, and what is
written is normalised and read by the backward; else that reads x and residual. The mask is drawn again. Rows as in rows.py; beyond 8,192 columns
wide_rows.py takes over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, lru_cache, partial

import torch
from torch import Tensor

from . import wide_rows
from .add_layer_norm_backward import BackwardForm, add_layer_norm_backward, backward_variant
from .configs import ADD_LAYER_NORM_FORWARD, LAYER_NORM_FORWARD
from .dropout import Dropout, dropout_arguments, keep_rows, load_seed
from .entry import Budget, Entry
from .launch import TRITON_TYPES, Variant, empty, jit, launch, pointer, tl
from .overlap import wait_for_previous
from .rows import (
    MAX_BLOCK,
    MAX_PLANS,
    Plan,
    address_of,
    as_rows,
    block_of,
    column_block,
    dtype_of,
    packed,
    root_mean_square,
    row_constants,
    row_statistics,
    run_length,
    run_pointers,
    statistics_of,
    tile_elements,
)
from .warp_rows import config_by_warps, load_by_warps, load_norm_parameters, scale_and_shift, store_rows


@jit
def add_layer_norm_forward_kernel(
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
    rows: tl.int64,
    C: tl.int32,
    eps: tl.float32,
    offset: tl.int32,
    threshold: tl.int32,
    scale: tl.float32,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    FULL: tl.constexpr,
    VEC: tl.constexpr,
    WARPS: tl.constexpr,
):
    wait_for_previous()
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    count = tl.minimum(rows - first, ROWS).to(tl.int32)
    exists = row < count
    column, inside, inverse_c = column_block(C, BLOCK_C, FULL, VEC)
    mask = exists[:, None] & inside
    weight, bias = None, None
    if weight_ptr is not None:
        weight = load_norm_parameters(weight_ptr, column, inside, BLOCK_C, VEC, WARPS)
    if bias_ptr is not None:
        bias = load_norm_parameters(bias_ptr, column, inside, BLOCK_C, VEC, WARPS)

    if WARPS:
        # Where the sum is rounded, PTX adds 16 bits as they are, which takes fewer instructions.
        PAIRED: tl.constexpr = sum_ptr is None
        x = load_by_warps(x_ptr + first * x_row_stride, x_row_stride, count, ROWS, BLOCK_C, WARPS, PAIRED)
        residual_first = residual_ptr + first * residual_row_stride
        residual = load_by_warps(residual_first, residual_row_stride, count, ROWS, BLOCK_C, WARPS, PAIRED)
    else:
        x_start, residual_start = row[:, None] * x_row_stride, row[:, None] * residual_row_stride
        x = tl.load(run_pointers(x_ptr + first * x_row_stride, x_start, column, VEC), mask=mask, other=0.0)
        residual_pointers = run_pointers(residual_ptr + first * residual_row_stride, residual_start, column, VEC)
        residual = tl.load(residual_pointers, mask=mask, other=0.0)
    x = x.to(tl.float32)
    if seed_ptr is not None:
        low, high = load_seed(seed_ptr)
        x = tl.where(keep_rows(low, high, offset, threshold, first + row[:, None], 0, BLOCK_C, VEC), x * scale, 0.0)
    x += residual.to(tl.float32)

    y_stride = BLOCK_C if FULL else C
    if sum_ptr is not None:
        # The backward reads this sum: statistics of the unrounded one would not centre it.
        total = x.to(sum_ptr.dtype.element_ty)
        store_rows(sum_ptr + first * y_stride, y_stride, count, total, row, column, mask, VEC, WARPS)
        x = total.to(tl.float32)
    if mean_ptr is not None:
        x, mean, rstd = row_statistics(x, inside, C, inverse_c, eps, FULL)
    else:
        rstd = root_mean_square(x, inverse_c, eps)
    y = scale_and_shift(x * rstd[:, None], weight, bias, WARPS)
    store_rows(y_ptr + first * y_stride, y_stride, count, y, row, column, mask, VEC, WARPS)
    if mean_ptr is not None:
        tl.store(mean_ptr + first + row, mean, mask=exists)
    tl.store(rstd_ptr + first + row, rstd, mask=exists)


def add_layer_norm_forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dropout: Dropout | None = None,
    *,
    with_sum: bool = False,
    out_dtype: torch.dtype | None = None,
    centred: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """LayerNorm of residual + dropout(x), both (..., C), over the last dimension; RMSNorm where it is not centred.

    weight, bias: (C,) in fp32 or the inputs' dtype, or None. out_dtype: of y; the sum's, which is that of x and residual
    promoted, where None. Returns y and, with_sum, the sum, contiguous, and mean (RMSNorm: None) and rstd, fp32 (rows,).
    """
    x, x_stride = as_rows(x)
    residual, residual_stride = as_rows(residual)
    weight, bias = packed(weight), packed(bias)
    shape, device, columns = x.shape, x.device, x.shape[-1]
    sum_dtype = x.dtype if x.dtype is residual.dtype else torch.promote_types(x.dtype, residual.dtype)
    out_dtype = out_dtype or sum_dtype
    rows = shape[:-1].numel()
    y = empty(shape, out_dtype, device)
    total = empty(shape, sum_dtype, device) if with_sum else None
    mean, rstd = statistics_of(rows, centred, device)
    if columns > MAX_BLOCK:
        wide_rows.forward(x, residual, weight, bias, y, total, mean, rstd, eps, dropout)
        return y, total, mean, rstd

    offset = (x.data_ptr() | residual.data_ptr() | address_of(weight) | address_of(bias)) % 16
    dtypes = (x.dtype, residual.dtype, dtype_of(weight), dtype_of(bias), out_dtype)
    settings = (with_sum, dropout is not None, centred)
    plan = _plan_forward(rows, columns, (x_stride, residual_stride), dtypes, settings, offset)
    tensors = (x, residual, weight, bias, None if dropout is None else dropout.seed, y, total, mean, rstd)
    launch(plan.variant, plan.grid, *tensors, *plan.sizes, eps, *dropout_arguments(dropout))
    return y, total, mean, rstd


@lru_cache(maxsize=MAX_PLANS)
def _plan_forward(
    rows: int,
    columns: int,
    strides: tuple[int, int],
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype | None, torch.dtype | None, torch.dtype],
    settings: tuple[bool, bool, bool],
    offset: int,
) -> Plan:
    """settings: whether the sum is written, with dropout, centred."""
    with_sum, dropout, centred = settings
    vector = run_length(min(dtypes[0].itemsize, dtypes[1].itemsize), strides[0] | strides[1] | columns, offset)
    variant = forward_variant(columns, *dtypes, with_sum, dropout, vector, centred)
    return Plan(variant, (-(-rows // variant.constants["ROWS"]),), (*strides, rows, columns))


@cache
def forward_variant(
    columns: int,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype,
    weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
    out_dtype: torch.dtype,
    with_sum: bool,
    dropout: bool,
    vector: int,
    centred: bool = True,
) -> Variant:
    """The program that adds and normalises rows of `columns` columns, read in runs of `vector` elements."""
    narrow = vector == 8 and x_dtype is residual_dtype
    total = torch.promote_types(x_dtype, residual_dtype) if with_sum else None
    by_warps = None
    config = LAYER_NORM_FORWARD[block_of(columns)]
    if narrow and not dropout:
        by_warps = config_by_warps(columns, vector, x_dtype, residual_dtype, weight_dtype, bias_dtype, out_dtype)
        config = by_warps or ADD_LAYER_NORM_FORWARD.get(columns, config)
    tensors = (x_dtype, residual_dtype, weight_dtype, bias_dtype, torch.int64 if dropout else None, out_dtype, total)
    statistics = (torch.float32 if centred else None, torch.float32)
    types = (*map(pointer, (*tensors, *statistics)), "i32", "i32", "i64", "i32", "fp32")
    constants = row_constants(columns, config, vector) | {"WARPS": by_warps.num_warps if by_warps else 0}
    types = (*types, "i32", "i32", "fp32")
    # With dropout and masks of columns, 64 elements a lane take 128 to 154 registers on sm_80, where ptxas would spill 24 bytes
    # for 16 warps a multiprocessor. 12 have 96 KB on their way, beside what DRAM needs, about 22. Over 256 columns, whose weight
    # and bias take more of a lane, 168 would be too few.
    crowded = dropout and narrow and 16 < columns < constants["BLOCK_C"] <= 256
    # RMSNorm's in fp32 of fp16 that is read one by one: ptxas would spill 24 to 88 bytes for 20 warps a multiprocessor. 16 have 128.
    half = x_dtype == torch.float16 and (residual_dtype == x_dtype or weight_dtype is not None) and out_dtype != x_dtype
    short = half and not (centred or dropout or with_sum) and vector == 1 and constants["BLOCK_C"] == 32
    # In bf16 8 to 16 bytes would, behind the sum or dropout: 126 and 140 on sm_90.
    brain = x_dtype == residual_dtype == torch.bfloat16 and weight_dtype == out_dtype == torch.float32
    crowded = crowded or (brain and not centred and dropout != with_sum and vector == 1 and constants["BLOCK_C"] == 32)
    # As many as its 16 programs have; of its own accord ptxas takes fewer, and lets rows wait for one another. With a sum it does not.
    spread = config.registers if not with_sum else 0
    registers = 168 if crowded else 128 if short else spread
    return Variant(add_layer_norm_forward_kernel, types, constants, config.num_warps, registers=registers)


def catalog_entries() -> Iterator[Entry]:
    bf16, fp32 = torch.bfloat16, torch.float32
    # columns, x's dtype, the residual's and y's, dropout, whether the sum is returned (pre-norm)
    calls = (
        (256, bf16, bf16, 0.1, False),
        (256, bf16, fp32, 0.1, True),  # autocast
    )
    for columns, x, residual, p, with_sum in calls:
        example = partial(_example, columns, x, residual, p, with_sum)
        suffix = f"c{columns}_{TRITON_TYPES[x]}" + ("_autocast" if x != residual else "") + ("_sum" if with_sum else "")
        vector = 16 // x.itemsize
        read = (residual, residual, None) if with_sum else (None, x, residual)
        dtypes = (residual, *read, residual, x if p else None, residual)
        ahead = forward_variant(columns, x, *(residual,) * 4, with_sum, p > 0, vector)
        back = backward_variant(columns, BackwardForm(dtypes, True, True, p > 0), vector)
        for kind, variant, budget in (
            ("forward", ahead, Budget(192, 128, 128, 128)),
            ("backward", back, Budget(255, 8192, 256, 16384)),
        ):
            name = f"add_layer_norm_{kind}_{suffix}"
            yield Entry("add_layer_norm", name, variant, tile_elements(variant), budget, example)

    example = partial(_example, 10_000, bf16, bf16, 0.1, False)
    three = (bf16,) * 3
    for kind, variant in (
        ("forward", wide_rows.forward_variant((*three, bf16, bf16, None), True, 8)),
        ("backward", wide_rows.backward_variant((bf16, None, *three, bf16, bf16), True, 8)),
        ("parameters", wide_rows.parameters_variant(three, True, True, True, 8)),
    ):
        budget = Budget(160, 8192, 128, 16384)
        yield Entry("add_layer_norm", f"wide_{kind}_c10000_bf16", variant, tile_elements(variant), budget, example)


def _example(
    columns: int,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype,
    p: float,
    with_sum: bool,
    device: torch.device,
) -> Callable[[], tuple[Tensor, ...]]:
    """Forward and backward over a few tiles."""
    rows = 70 if columns <= 1024 else 3
    x = torch.randn(rows, columns, device=device).to(x_dtype)
    residual, dy = (torch.randn(rows, columns, device=device).to(residual_dtype) for _ in range(2))
    weight, bias = (torch.randn(columns, device=device).to(residual_dtype) for _ in range(2))
    dropout = Dropout(torch.ones(1, dtype=torch.int64, device=device), 2, p) if p else None

    def call() -> tuple[Tensor, ...]:
        y, total, mean, rstd = add_layer_norm_forward(x, residual, weight, bias, 1e-5, dropout, with_sum=with_sum)
        gradients = add_layer_norm_backward(
            dy,
            dy if with_sum else None,
            x if total is None else total,
            residual if total is None else None,
            weight,
            mean,
            rstd,
            dropout,
            dx_dtype=x_dtype if p else None,
            dresidual_dtype=residual_dtype,
        )
        return tuple(t for t in (y, total, *gradients) if t is not None)

    return call
