# mypy: allow-incomplete-defs
"""A matrix product whose result meets its residual and LayerNorm before it is written, forward.

    s = residual + dropout(x @ w^T + bias),   y = xhat * norm_weight + norm_bias,   xhat = (s - mean(s)) * rstd(s)

x is (M, K), w (C, K), residual and y (M, C) with C up to 256: whole rows lie in one tile. s is in fp32 registers, so that
it is finite where fp16 would not be. For pre-norm it is written as well, or alone; y comes from what was not rounded. The
backward, `residual_norm_backward`, gets xhat, which is no larger than sqrt(C), and rstd.
Source: Ba et al., 2016, arXiv:1607.06450 (LayerNorm).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, lru_cache, partial, reduce
from operator import or_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .add_layer_norm_backward import BackwardForm, backward_variant, residual_norm_backward
from .configs import FEW_ROWS, LINEAR_NORM
from .dropout import Dropout, keep_rows, load_seed
from .entry import Budget, Entry
from .launch import TRITON_TYPES, Variant, empty, jit, launch, pointer, rehearsing, tl
from .overlap import wait_for_previous
from .product_tiles import Form, drawn, has_product_in_fp32, plus_product, precision, product, store_tile
from .rows import (
    MAX_PLANS,
    Plan,
    address_of,
    as_rows,
    block_of,
    column_block,
    dtype_of,
    load_parameters,
    packed,
    run_length,
    run_pointers,
    sum_partials,
    tile_elements,
)

MAX_COLUMNS = 256
# From so long a K on the product is left to cuBLAS, unless one launch is wanted: each program would read all of w for its
# few rows. At K = 2,048 on an H200, dropout and norm included: 18.5 µs for 27.9 at 6,800 rows, 12.9 for 37.5 at 3,400, 8.2 for
# 24.5 at 800. At K = 256 10.3 for 11.3, 7.8 for 10.0, 5.6 for 7.1: not worth a launch.
LONG_ROWS = 512


@jit
def linear_norm_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    residual_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    y_ptr,
    sum_ptr,
    xhat_ptr,
    rstd_ptr,
    rounded_ptr,
    seed_ptr,
    x_row_stride: tl.int32,
    residual_row_stride: tl.int32,
    w_stride: tl.int32,
    M: tl.int32,
    N: tl.int32,
    K: tl.int32,
    offset: tl.int32,
    threshold: tl.int32,
    scale: tl.float32,
    eps: tl.float32,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    FULL: tl.constexpr,
    VEC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    wait_for_previous()
    first = tl.program_id(0) * BLOCK_M
    rows = M - first
    row = tl.minimum(tl.arange(0, BLOCK_M), rows - 1)[:, None]
    x_base = x_ptr + first.to(tl.int64) * x_row_stride
    s = product(x_base, row * x_row_stride, w_ptr, w_stride, N, K, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, VEC, PRECISION)
    finish_rows(
        *(s, bias_ptr, residual_ptr, norm_weight_ptr, norm_bias_ptr, y_ptr, sum_ptr, xhat_ptr, rstd_ptr, seed_ptr),
        *(residual_row_stride, first, rows, N, offset, threshold, scale, eps, BLOCK_M, BLOCK_N, FULL, VEC),
        rounded_ptr=rounded_ptr,
    )


@jit
def finish_kernel(
    z_ptr,
    bias_ptr,
    residual_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    y_ptr,
    sum_ptr,
    xhat_ptr,
    rstd_ptr,
    rounded_ptr,
    seed_ptr,
    residual_row_stride: tl.int32,
    M: tl.int32,
    N: tl.int32,
    offset: tl.int32,
    threshold: tl.int32,
    scale: tl.float32,
    eps: tl.float32,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FULL: tl.constexpr,
    VEC: tl.constexpr,
):
    """The same behind a product that is in memory, z (M, N) in fp32."""
    wait_for_previous()
    first = tl.program_id(0) * BLOCK_M
    rows = M - first
    row = tl.minimum(tl.arange(0, BLOCK_M), rows - 1)[:, None]
    column, inside, _ = column_block(N, BLOCK_N, FULL, VEC)
    s = tl.load(run_pointers(z_ptr + first.to(tl.int64) * N, row * N, column, VEC), mask=inside, other=0.0)
    finish_rows(
        *(s, bias_ptr, residual_ptr, norm_weight_ptr, norm_bias_ptr, y_ptr, sum_ptr, xhat_ptr, rstd_ptr, seed_ptr),
        *(residual_row_stride, first, rows, N, offset, threshold, scale, eps, BLOCK_M, BLOCK_N, FULL, VEC, VEC),
        rounded_ptr=rounded_ptr,
    )


@jit
def finish_rows(
    s,
    bias_ptr,
    residual_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    y_ptr,
    sum_ptr,
    xhat_ptr,
    rstd_ptr,
    seed_ptr,
    residual_row_stride,
    first,
    rows,
    N,
    offset,
    threshold,
    scale,
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FULL: tl.constexpr,
    VEC: tl.constexpr,
    DRAWN: tl.constexpr = 1,
    rounded_ptr=None,
):
    """From a product's whole rows, fp32 (BLOCK_M, BLOCK_N), to the sum and y: bias, dropout, residual, LayerNorm.

    DRAWN: as VEC for dropout. Tensor cores leave pairs of neighbours to a thread, which would take four calls for its eight draws:
    at 256 columns up to a quarter more instructions.
    """
    column, inside, inverse_n = column_block(N, BLOCK_N, FULL, VEC)
    m = tl.arange(0, BLOCK_M)
    row = tl.minimum(m, rows - 1)[:, None]
    if bias_ptr is not None:
        s += load_parameters(bias_ptr, column, inside, VEC)
    if seed_ptr is not None:
        low, high = load_seed(seed_ptr)
        kept = keep_rows(low, high, offset, threshold, (first + m)[:, None].to(tl.int64), 0, BLOCK_N, DRAWN)
        s = tl.where(kept, s * scale, 0.0)
    residual_base = residual_ptr + first.to(tl.int64) * residual_row_stride
    residual = tl.load(run_pointers(residual_base, row * residual_row_stride, column, VEC), mask=inside, other=0.0)
    s += residual.to(tl.float32)
    place = first.to(tl.int64) * N
    if sum_ptr is not None:
        store_tile(sum_ptr + place, N, s, rows, N, BLOCK_M, BLOCK_N, VEC)
    if y_ptr is not None:
        if not FULL:
            s = tl.where(inside, s, 0.0)
        s -= tl.sum(s, axis=1, keep_dims=True) * inverse_n
        if not FULL:
            s = tl.where(inside, s, 0.0)
        rstd = tl.rsqrt(tl.sum(s * s, axis=1, keep_dims=True) * inverse_n + eps)
        s *= rstd
        if xhat_ptr is not None:
            store_tile(xhat_ptr + place, N, s, rows, N, BLOCK_M, BLOCK_N, VEC)
            tl.store(rstd_ptr + first + m, tl.reshape(rstd, (BLOCK_M,)), mask=m < rows)
        s *= load_parameters(norm_weight_ptr, column, inside, VEC)
        if norm_bias_ptr is not None:
            s += load_parameters(norm_bias_ptr, column, inside, VEC)
        store_tile(y_ptr + place, N, s, rows, N, BLOCK_M, BLOCK_N, VEC)
        if rounded_ptr is not None:
            store_tile(rounded_ptr + place, N, s, rows, N, BLOCK_M, BLOCK_N, VEC)


class Rows(NamedTuple):
    """What comes of whole rows, each contiguous, None where it was not wanted: y, the sum, xhat (..., C), rstd (rows,)."""

    y: Tensor | None
    total: Tensor | None
    xhat: Tensor | None
    rstd: Tensor | None

    @classmethod
    def empty(
        cls, x: Tensor, residual: Tensor, norm_weight: Tensor | None, dtype: torch.dtype, with_sum: bool, keep: bool
    ) -> Rows:
        """Uninitialised: y and, where a backward is to come, xhat of `dtype`, the sum of x's and the residual's, promoted.

        Without norm_weight the sum is all there is.
        """
        shape, device, norm = residual.shape, residual.device, norm_weight is not None
        y, xhat = (empty(shape, dtype, device) if norm and wanted else None for wanted in (True, keep))
        total = None
        if with_sum or not norm:
            total = empty(shape, torch.promote_types(x.dtype, residual.dtype), device)
        rstd = None if xhat is None else empty((shape[:-1].numel(),), torch.float32, device)
        return cls(y, total, xhat, rstd)


def linear_norm_forward(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    *,
    dropout: Dropout | None = None,
    out_dtype: torch.dtype | None = None,
    with_sum: bool = False,
    keep: bool = True,
    one_launch: bool = True,
    rounded: Tensor | None = None,
) -> Rows:
    """LayerNorm(residual + dropout(x @ w^T + bias)), x (..., K), w (C, K), residual (..., C), the rest (C,).

    residual may have another dtype than x; y gets out_dtype, the residual's where None, and the sum, which is written
    with_sum, that of both promoted. keep: also what the backward needs, xhat in y's dtype and rstd in fp32. Without
    norm_weight the sum is all there is. one_launch: also for a long K, whose product is PyTorch's otherwise. rounded: (..., C),
    contiguous, gets y in its dtype as well.
    """
    x, x_stride = as_rows(x)
    w, w_stride = as_rows(w)
    residual, residual_stride = as_rows(residual)
    rows, N, K = x.shape[:-1].numel(), w.shape[0], x.shape[-1]
    out = Rows.empty(x, residual, norm_weight, out_dtype or residual.dtype, with_sum, keep)
    bias, norm_weight, norm_bias = packed(bias), packed(norm_weight), packed(norm_bias)
    parameters = bias, residual, norm_weight, norm_bias
    if not one_launch and K >= LONG_ROWS and has_product_in_fp32(x):
        _finish(x.reshape(rows, K), w, parameters, residual_stride, eps, dropout, out, rounded)
        return out
    offset = x.data_ptr() | w.data_ptr() | residual.data_ptr()
    offset = (offset | address_of(bias) | address_of(norm_weight) | address_of(norm_bias)) % 16
    dtypes = tuple(map(dtype_of, (*parameters, *out[:3], rounded)))
    sizes = (x_stride, residual_stride, w_stride, rows, N, K)
    plan = _plan(x.dtype, precision(x.dtype), sizes, dtypes, dropout is not None, offset)
    launch(plan.variant, plan.grid, x, w, *parameters, *out, rounded, *drawn(dropout, sizes), eps)
    return out


@lru_cache(maxsize=MAX_PLANS)
def _plan(
    dtype: torch.dtype,
    rounding: str,
    sizes: tuple[int, ...],
    dtypes: tuple[torch.dtype | None, ...],
    dropout: bool,
    offset: int,
) -> Plan:
    x_stride, residual_stride, w_stride, rows, N, K = sizes
    vector = run_length(dtype.itemsize, x_stride | w_stride | residual_stride | N | K, offset)
    # Small tiles read a long w too often: at K = 2,048 and 3,400 rows 37 µs on an H200, large ones 24.
    few = rows <= FEW_ROWS and K < LONG_ROWS
    variant = forward_variant(Form(dtype, "none", K % 64 == 0, vector, rounding), N, few, dtypes, dropout)
    return Plan(variant, (-(-rows // variant.constants["BLOCK_M"]),), sizes)


def _finish(
    x: Tensor,
    w: Tensor,
    parameters: tuple[Tensor | None, Tensor, Tensor | None, Tensor | None],
    residual_stride: int,
    eps: float,
    dropout: Dropout | None,
    out: Rows,
    rounded: Tensor | None = None,
) -> None:
    """x @ w^T by PyTorch, in fp32, and what is behind it."""
    rows, N = x.shape[0], w.shape[0]
    z = empty((rows, N), torch.float32, x.device) if rehearsing(x.device) else plus_product(None, x, w.t())
    offset = reduce(or_, map(address_of, parameters)) % 16
    sizes, dtypes = (residual_stride, rows, N), tuple(map(dtype_of, (*parameters, *out[:3], rounded)))
    plan = _finish_plan(x.dtype, sizes, dtypes, dropout is not None, offset)
    launch(plan.variant, plan.grid, z, *parameters, *out, rounded, *drawn(dropout, sizes), eps)


@lru_cache(maxsize=MAX_PLANS)
def _finish_plan(
    dtype: torch.dtype, sizes: tuple[int, ...], dtypes: tuple[torch.dtype | None, ...], dropout: bool, offset: int
) -> Plan:
    stride, rows, N = sizes
    variant = finish_variant(N, run_length(dtype.itemsize, stride | N, offset), dtypes, dropout)
    return Plan(variant, (-(-rows // variant.constants["BLOCK_M"]),), sizes)


@cache
def finish_variant(columns: int, vector: int, dtypes: tuple[torch.dtype | None, ...], dropout: bool) -> Variant:
    """The program behind a product of `linear_norm_forward`'s that is PyTorch's; dtypes as `forward_variant`'s."""
    block = block_of(columns)
    constants = {"BLOCK_M": 1024 // block, "BLOCK_N": block, "FULL": columns == block, "VEC": vector}
    types = (*map(pointer, (torch.float32, *_with_rstd(dtypes))), "*i64" if dropout else None, *["i32"] * 5)
    return Variant(finish_kernel, (*types, "fp32", "fp32"), constants, num_warps=1)


@cache
def forward_variant(
    form: Form, columns: int, few: bool, dtypes: tuple[torch.dtype | None, ...], dropout: bool
) -> Variant:
    """The program of `linear_norm_forward`; dtypes of bias, residual, norm_weight, norm_bias, y, the sum, xhat and y rounded."""
    config = LINEAR_NORM[form.dtype.itemsize, few]
    block = block_of(columns)
    if block == MAX_COLUMNS and dropout and form.vector == 1 and form.dtype.itemsize == 2:
        # An address for each element: of 64 rows up to 64 bytes a thread spill; 38 % more instructions at K = 256.
        config = replace(config, block_m=min(32, config.block_m))
    constants = form.constants(config) | {"BLOCK_N": block, "FULL": columns == block}
    for unused in ("ACTIVATION", "GROUP_M"):
        del constants[unused]
    types = (*map(pointer, (form.dtype, form.dtype, *_with_rstd(dtypes))), "*i64" if dropout else None, *["i32"] * 8)
    return Variant(linear_norm_kernel, (*types, "fp32", "fp32"), constants, config.num_warps, config.num_stages)


def _with_rstd(dtypes: tuple[torch.dtype | None, ...]) -> tuple[torch.dtype | None, ...]:
    return (*dtypes[:7], None if dtypes[6] is None else torch.float32, *dtypes[7:])


def catalog_entries() -> Iterator[Entry]:
    bf16, fp32 = torch.bfloat16, torch.float32
    # rows, columns, x's dtype, the residual's, whether the sum is returned (pre-norm), the forward's budget
    forms = (
        (FEW_ROWS + 1, 256, bf16, bf16, False, Budget(248, 82 << 10, 256, 64 << 10)),
        (33, 256, bf16, fp32, True, Budget(248, 72 << 10, 256, 64 << 10)),  # autocast
        (33, 100, fp32, fp32, False, Budget(248, 40 << 10, 256, 64 << 10)),
    )
    for rows, columns, dtype, residual, with_sum, budget in forms:
        vector = 16 // dtype.itemsize
        form = Form(dtype, "none", True, vector, precision(dtype))
        example = partial(_example, rows, columns, dtype, residual, with_sum)
        suffix = f"c{columns}_{TRITON_TYPES[dtype]}" + ("_few" if rows <= FEW_ROWS else "") + "_sum" * with_sum
        total = residual if with_sum else None
        rounded = None if residual == dtype else dtype
        dtypes = (dtype, residual, residual, residual, residual, total, residual, rounded)
        ahead = forward_variant(form, columns, rows <= FEW_ROWS, dtypes, True)
        tile = int(ahead.constants["BLOCK_M"]) * int(ahead.constants["BLOCK_N"])
        yield Entry("linear_add_layer_norm", f"linear_norm_forward_{suffix}", ahead, tile, budget, example)
        if with_sum:
            behind, limit = finish_variant(columns, vector, dtypes, True), Budget(128, 256, 128, 256)
            yield Entry("linear_add_layer_norm", f"linear_norm_finish_{suffix}", behind, 1024, limit, example)
            read = (residual, total, residual, None, residual)
            back = backward_variant(columns, BackwardForm((*read, dtype, residual), True, True, True, True), vector)
            limit = Budget(255, 8192, 256, 8192)
            name = f"residual_norm_backward_{suffix}"
            yield Entry("linear_add_layer_norm", name, back, tile_elements(back), limit, example)


def _example(
    rows: int,
    columns: int,
    dtype: torch.dtype,
    residual_dtype: torch.dtype,
    with_sum: bool,
    device: torch.device,
) -> Callable[[], tuple[Tensor, ...]]:
    """Forward and backward with dropout; with the sum, the forward in two launches as well."""
    x, w = (torch.randn(n, 64, device=device).to(dtype) for n in (rows, columns))
    bias = torch.randn(columns, device=device).to(dtype)
    residual, dy = (torch.randn(rows, columns, device=device).to(residual_dtype) for _ in range(2))
    weight, offset = (torch.randn(columns, device=device).to(residual_dtype) for _ in range(2))
    dropout = Dropout(torch.ones(1, dtype=torch.int64, device=device), 3, 0.1)

    def call() -> tuple[Tensor, ...]:
        options: Any = {"dropout": dropout, "with_sum": with_sum}
        rounds = residual_dtype != dtype
        options["rounded"] = rounded = empty(residual.shape, dtype, device) if rounds else None
        y, total, xhat, rstd = linear_norm_forward(x, w, bias, residual, weight, offset, 1e-5, **options)
        assert y is not None
        assert xhat is not None
        assert rstd is not None
        back: Any = {"dsum": dy if with_sum else None, "dresidual_dtype": residual_dtype, "dx_dtype": dtype}
        ds, dproduct, partial = residual_norm_backward(dy, xhat, rstd, weight, dropout, **back)
        assert dproduct is not None
        outputs = (y, xhat, rstd, ds, dproduct, *sum_partials((partial, residual_dtype)))
        if not with_sum:
            return outputs
        again = Rows.empty(x, residual, weight, residual_dtype, with_sum, True)
        also = empty(residual.shape, dtype, device) if rounds else None
        _finish(x, w, (bias, residual, weight, offset), columns, 1e-5, dropout, again, also)
        return (*outputs, *(t for t in (total, rounded, *again, also) if t is not None))

    return call
