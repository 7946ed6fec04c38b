# mypy: allow-incomplete-defs
"""1×1 convolutions of a network with frozen batch norms: products of pixels and channels, with what lies between two of them.

    y = relu(x @ w^T * scale + shift + residual * residual_scale),   of each channel of y a scale and a shift

    out = (g @ w + added) * scale,   zero where y <= 0:   from one product's gradient to that of the product before it

Forward, x is (P, K), P being pixels, w (N, K), residual and y (P, N). Backward, g is (P, N), and added, y and out are (P, K):
`added` is what arrives for the product's input from elsewhere, y that input, which a ReLU wrote, scale what came before the
ReLU. Scales and shifts are fp32, sums too, and are rounded once. NaN goes on, as from PyTorch's ReLU.
Source: He et al., 2015, arXiv:1512.03385 (residual blocks); Carion et al., 2020, arXiv:2005.12872 (frozen batch norm).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from .configs import POINTWISE, POINTWISE_LONG, POINTWISE_SCATTERED, MatmulConfig
from .entry import Budget, Entry
from .launch import Variant, empty, jit, launch, pointer, tl
from .overlap import wait_for_previous
from .product_tiles import Form, grid_of, precision, product, store_tile, tile_of
from .rows import MAX_PLANS, Plan, address_of, arriving_rows, as_rows, packed, run_length, run_pointers


@jit
def pointwise_kernel(
    x_ptr,
    w_ptr,
    scale_ptr,
    shift_ptr,
    residual_ptr,
    residual_scale_ptr,
    y_ptr,
    x_row_stride: tl.int32,
    w_stride: tl.int32,
    P: tl.int32,
    N: tl.int32,
    K: tl.int32,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    VEC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    wait_for_previous()
    first_m, first_n = tile_of(P, N, BLOCK_M, BLOCK_N, GROUP_M)
    rows, columns = P - first_m, N - first_n
    place = first_m.to(tl.int64) * N + first_n
    # All that lies beside the product is on its way while that runs.
    scale = _load_factors(scale_ptr + first_n, columns, BLOCK_N)
    shift = _load_factors(shift_ptr + first_n, columns, BLOCK_N)
    if residual_ptr is not None:
        residual = _load_beside(residual_ptr + place, N, rows, columns, BLOCK_M, BLOCK_N, VEC)
        if residual_scale_ptr is not None:
            residual_scale = _load_factors(residual_scale_ptr + first_n, columns, BLOCK_N)
    row = tl.minimum(tl.arange(0, BLOCK_M), rows - 1)[:, None]
    y = product(
        *(x_ptr + first_m.to(tl.int64) * x_row_stride, row * x_row_stride),
        *(w_ptr + first_n.to(tl.int64) * w_stride, w_stride, columns, K),
        *(BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, VEC, PRECISION),
    )
    y = y * scale[None, :] + shift[None, :]
    if residual_ptr is not None:
        residual = residual.to(tl.float32)
        if residual_scale_ptr is not None:
            residual *= residual_scale[None, :]
        y += residual
    y = tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)
    store_tile(y_ptr + place, N, y, rows, columns, BLOCK_M, BLOCK_N, VEC)


@jit
def pointwise_backward_kernel(
    g_ptr,
    w_ptr,
    added_ptr,
    y_ptr,
    scale_ptr,
    out_ptr,
    g_row_stride: tl.int32,
    w_stride: tl.int32,
    P: tl.int32,
    K: tl.int32,
    N: tl.int32,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    VEC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The product's step along g's columns is BLOCK_K, a tile of out has BLOCK_N columns of K."""
    wait_for_previous()
    first_m, first_k = tile_of(P, K, BLOCK_M, BLOCK_N, GROUP_M)
    rows, columns = P - first_m, K - first_k
    place = first_m.to(tl.int64) * K + first_k
    if scale_ptr is not None:
        scale = _load_factors(scale_ptr + first_k, columns, BLOCK_N)
    if added_ptr is not None:
        added = _load_beside(added_ptr + place, K, rows, columns, BLOCK_M, BLOCK_N, VEC)
    if y_ptr is not None:
        y = _load_beside(y_ptr + place, K, rows, columns, BLOCK_M, BLOCK_N, VEC)
    row = tl.minimum(tl.arange(0, BLOCK_M), rows - 1)[:, None]
    out = product(
        *(g_ptr + first_m.to(tl.int64) * g_row_stride, row * g_row_stride, w_ptr + first_k, w_stride, columns, N),
        *(BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, VEC, PRECISION),
        BY_ROWS=False,
    )
    if added_ptr is not None:
        out += added.to(tl.float32)
    if y_ptr is not None:
        out = tl.where(y.to(tl.float32) <= 0.0, 0.0, out)  # where y is NaN, the gradient goes on, as in PyTorch
    if scale_ptr is not None:
        out *= scale[None, :]
    store_tile(out_ptr + place, K, out, rows, columns, BLOCK_M, BLOCK_N, VEC)


@jit
def _load_factors(base, columns, BLOCK_N: tl.constexpr):
    n = tl.arange(0, BLOCK_N)
    return tl.load(base + n, mask=n < columns, other=0.0)


@jit
def _load_beside(base, row_stride, rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, VEC: tl.constexpr):
    """A tile as `store_tile` stores one; rows past the end are the last one again."""
    row, n = tl.minimum(tl.arange(0, BLOCK_M), rows - 1)[:, None], tl.arange(0, BLOCK_N)[None, :]
    return tl.load(run_pointers(base, row * row_stride, n, VEC), mask=n // VEC < columns // VEC, other=0.0)


def pointwise_forward(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
) -> Tensor:
    """relu(x @ weight^T * scale + shift + residual * residual_scale); without residual_scale the residual as it is.

    x (..., K), weight (N, K) and residual (..., N) of one dtype of 16 bits, the others fp32 (N,). Returns y (..., N) in x's
    dtype, contiguous.
    """
    x, x_stride = as_rows(x)
    weight, w_stride = as_rows(weight)
    residual = packed(residual)
    scale, shift, residual_scale = scale.contiguous(), shift.contiguous(), packed(residual_scale)
    leading, (N, K) = x.shape[:-1], weight.shape
    y = empty((*leading, N), x.dtype, x.device)
    given = x.dtype, residual is not None, residual_scale is not None
    sizes = (x_stride, w_stride, leading.numel(), N, K)
    addresses = x.data_ptr() | weight.data_ptr() | address_of(residual)
    plan = _plan_forward(given, precision(x.dtype), sizes, addresses % 16)
    launch(plan.variant, plan.grid, x, weight, scale, shift, residual, residual_scale, y, *plan.sizes)
    return y


def pointwise_backward(
    g: Tensor,
    weight: Tensor,
    added: Tensor | None = None,
    y: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """(g @ weight + added) * scale, zero where y <= 0; each of added, y and scale may be left out.

    g (..., N), weight (N, K), added and y (..., K) of one dtype of 16 bits, scale fp32 (K,). Returns (..., K) in g's dtype,
    contiguous. Where y is NaN, the gradient goes on.
    """
    g, g_stride = arriving_rows(g)
    weight, w_stride = as_rows(weight)
    added = None if added is None else arriving_rows(added.contiguous())[0]
    y, scale = packed(y), packed(scale)
    leading, (N, K) = g.shape[:-1], weight.shape
    out = empty((*leading, K), g.dtype, g.device)
    given = g.dtype, added is not None, y is not None, scale is not None
    sizes = (g_stride, w_stride, leading.numel(), K, N)
    addresses = g.data_ptr() | weight.data_ptr() | address_of(added) | address_of(y)
    plan = _plan_backward(given, precision(g.dtype), sizes, addresses % 16)
    launch(plan.variant, plan.grid, g, weight, added, y, scale, out, *plan.sizes)
    return out


@lru_cache(maxsize=MAX_PLANS)
def _plan_forward(given: tuple[torch.dtype, bool, bool], rounding: str, sizes: tuple[int, ...], offset: int) -> Plan:
    *_, N, K = sizes
    variant = forward_variant(_form(given[0], rounding, sizes, offset), N, K, *given[1:])
    return Plan(variant, grid_of(variant, *sizes[2:4]), sizes)


@lru_cache(maxsize=MAX_PLANS)
def _plan_backward(
    given: tuple[torch.dtype, bool, bool, bool], rounding: str, sizes: tuple[int, ...], offset: int
) -> Plan:
    *_, K, N = sizes
    variant = backward_variant(_form(given[0], rounding, sizes, offset), N, K, *given[1:])
    return Plan(variant, grid_of(variant, *sizes[2:4]), sizes)


def _form(dtype: torch.dtype, rounding: str, sizes: tuple[int, ...], offset: int) -> Form:
    """sizes: the distances of rows, of x's or g's and of the weight's, the number of rows, of columns, and of terms that are summed."""
    x_stride, w_stride, _, columns, terms = sizes
    vector = run_length(dtype.itemsize, x_stride | w_stride | columns | terms, offset)
    return Form(dtype, "none", terms % 64 == 0, vector, rounding)


@cache
def forward_variant(form: Form, N: int, K: int, residual: bool, scaled: bool) -> Variant:
    """The program of `pointwise_forward`; scaled: the residual has a scale."""
    dtype, fp32 = form.dtype, torch.float32
    tensors = (dtype, dtype, fp32, fp32, dtype if residual else None, fp32 if scaled else None, dtype)
    return _variant(pointwise_kernel, tensors, form, _config(form, N, K))


@cache
def backward_variant(form: Form, N: int, K: int, added: bool, masked: bool, scaled: bool) -> Variant:
    """The program of `pointwise_backward`; masked: by y; scaled: out has a scale."""
    dtype = form.dtype
    beside = (dtype if added else None, dtype if masked else None, torch.float32 if scaled else None)
    # With two tensors beside a long product's step of 64 it takes 212 registers on sm_90, two programs a multiprocessor.
    config = _config(form, K, 0 if added and masked else N)
    return _variant(pointwise_backward_kernel, (dtype, dtype, *beside, dtype), form, config)


def _config(form: Form, columns: int, terms: int) -> MatmulConfig:
    return POINTWISE_SCATTERED if form.vector == 1 else POINTWISE[columns <= 64, terms >= POINTWISE_LONG]


def _variant(kernel: Any, tensors: tuple[torch.dtype | None, ...], form: Form, config: MatmulConfig) -> Variant:
    constants = form.constants(config)
    del constants["ACTIVATION"]
    return Variant(kernel, (*map(pointer, tensors), *["i32"] * 5), constants, config.num_warps, config.num_stages)


def catalog_entries() -> Iterator[Entry]:
    # N, K, residual, whether it has a scale: the last product of a stage's first block; nothing aligned
    forward = ((192, 64, True, True), (43, 100, True, True))
    # N, K, added, y, scale: the gradient behind a block's first product, and behind its last one, long and of few columns
    backward = ((64, 192, True, True, True), (192, 64, False, True, True))
    for N, K, *beside in forward:
        variant = forward_variant(_aligned_form(N, K), N, K, *beside)
        yield _entry(f"pointwise_forward_k{K}_n{N}", variant, N, K)
    for N, K, *beside in backward:
        variant = backward_variant(_aligned_form(K, N), N, K, *beside)
        yield _entry(f"pointwise_backward_n{N}_k{K}", variant, N, K)


def _aligned_form(columns: int, terms: int) -> Form:
    return _form(torch.bfloat16, precision(torch.bfloat16), (terms, columns, 1, columns, terms), 0)


def _entry(name: str, variant: Variant, N: int, K: int) -> Entry:
    tile = int(variant.constants["BLOCK_M"]) * int(variant.constants["BLOCK_N"])
    budget = Budget(252, 74 << 10, 256, 64 << 10)
    return Entry("pointwise_affine", name, variant, tile, budget, partial(_example, N, K))


def _example(N: int, K: int, device: torch.device) -> Callable[[], tuple[Tensor, ...]]:
    """Both directions, of tiles of rows of which the last one is not full, with and without what there may be beside them."""
    P = 63 if 64 in (N, K) else 125  # one tile of 128 rows, or two of 64

    def some(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    x, g, residual, w = some(P, K), some(P, N), some(P, N), some(N, K)
    scale, shift, residual_scale = (some(N, dtype=torch.float32) for _ in range(3))
    scale_of_x = some(K, dtype=torch.float32)

    def call() -> tuple[Tensor, ...]:
        forward = [
            pointwise_forward(x, w, scale, shift, *beside) for beside in ((), (residual,), (residual, residual_scale))
        ]
        backward = [pointwise_backward(g, w, added, x, scale_of_x) for added in (x, None)]
        return *forward, *backward

    return call
