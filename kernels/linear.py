# mypy: allow-incomplete-defs
"""Matrix products with what surrounds them fused in, forward and backward.

    y = dropout(activation(x @ w^T + bias)),   also with (x + position) @ w^T for the first columns of y

    dpre = (dy @ w') * activation'(pre) * kept / (1 - p),   w' being the next product's weight, (its outputs, N)

x is (M, K), w (N, K), y (M, N). The backward keeps what it needs of the activation: y itself for ReLU (positive where
it was active and kept) or a bit for each of its elements, pre, the product before the activation, for the others, whose
y it then writes once more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, lru_cache, partial, reduce
from operator import or_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .attention_tiles import dot
from .configs import LINEAR, LINEAR_SCATTERED, MatmulConfig
from .dropout import Dropout, drop_tile, keep_tile, load_seed
from .entry import Budget, Entry
from .launch import TRITON_TYPES, Variant, empty, jit, launch, pointer, tl
from .overlap import wait_for_previous
from .product_tiles import (
    Form,
    activate,
    active_words,
    drawn,
    grid_of,
    is_active,
    load_active,
    precision,
    product,
    store_active,
    store_tile,
    tile_of,
)
from .rows import MAX_PLANS, Plan, address_of, arriving_rows, as_rows, dtype_of, packed, run_length, run_pointers


@jit
def linear_kernel(
    x_ptr,
    position_ptr,
    w_ptr,
    bias_ptr,
    y_ptr,
    pre_ptr,
    active_ptr,
    seed_ptr,
    x_row_stride: tl.int32,
    position_row_stride: tl.int32,
    position_rows: tl.int32,
    position_columns: tl.int32,
    w_stride: tl.int32,
    M: tl.int32,
    N: tl.int32,
    K: tl.int32,
    offset: tl.int32,
    threshold: tl.int32,
    scale: tl.float32,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    VEC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """position: (position_rows, K), repeated down the rows of x; added for y's first `position_columns`, whole tiles."""
    wait_for_previous()
    first_m, first_n = tile_of(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    rows, columns = M - first_m, N - first_n
    row = tl.minimum(tl.arange(0, BLOCK_M), rows - 1)[:, None]
    x_base = x_ptr + first_m.to(tl.int64) * x_row_stride
    x_start = row * x_row_stride
    w_base = w_ptr + first_n.to(tl.int64) * w_stride
    bias_base = None if bias_ptr is None else bias_ptr + first_n
    # With or without the bits, so that a forward that is done again without them gives the same. Elements with an address of their own lack
    # the registers: 226 on sm_90 for 128.
    SMALL: tl.constexpr = y_ptr.dtype.element_ty.primitive_bitwidth == 16 and VEC > 1
    AT_ONCE: tl.constexpr = ACTIVATION == "relu" and seed_ptr is not None and SMALL
    scaled_bias = 0.0
    if AT_ONCE and bias_ptr is not None:
        # Added with the scale, by the same instruction: in front, each of the sums is a copy of it. Other programs lack the registers.
        n = tl.arange(0, BLOCK_N)
        scaled_bias = tl.load(bias_base + n, mask=n < columns, other=0.0).to(tl.float32)[None, :] * scale
        bias_base = None
    if position_ptr is None:
        acc = product(
            *(x_base, x_start, w_base, w_stride, columns, K, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, VEC, PRECISION),
            bias_ptr=bias_base,
        )
    elif first_n < position_columns:
        added = ((first_m + row) % position_rows).to(tl.int64) * position_row_stride
        acc = product(
            *(x_base, x_start, w_base, w_stride, columns, K, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, VEC, PRECISION),
            added_ptr=position_ptr,
            added_start=added,
            bias_ptr=bias_base,
        )
    else:
        acc = product(
            *(x_base, x_start, w_base, w_stride, columns, K, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, VEC, PRECISION),
            bias_ptr=bias_base,
        )
    y_place = first_m.to(tl.int64) * N + first_n
    if pre_ptr is not None:
        store_tile(pre_ptr + y_place, N, acc, rows, columns, BLOCK_M, BLOCK_N, VEC)
        acc = acc.to(pre_ptr.dtype.element_ty).to(tl.float32)  # the backward sees no other pre than the forward
    if AT_ONCE:  # dropout takes two elements of 16 bits, and their bits, at once; see the backward for the scale
        acc = tl.maximum(acc * scale + scaled_bias, 0.0, propagate_nan=tl.PropagateNan.ALL).to(y_ptr.dtype.element_ty)
    else:
        acc, _ = activate(acc, ACTIVATION)
    if seed_ptr is not None:
        low, high = load_seed(seed_ptr)
        hidden = tl.full((), 1, tl.int32)
        acc = drop_tile(acc, low, high, offset, threshold, hidden, first_m, first_n, BLOCK_M, BLOCK_N, VEC)
        if not AT_ONCE:
            acc = (acc * scale).to(y_ptr.dtype.element_ty)
        if active_ptr is not None:
            store_active(active_ptr, acc, first_m, first_n, rows, N, BLOCK_M, BLOCK_N)
    store_tile(y_ptr + y_place, N, acc, rows, columns, BLOCK_M, BLOCK_N, VEC)


@jit
def linear_backward_kernel(
    dy_ptr,
    w_ptr,
    saved_ptr,
    active_ptr,
    x_ptr,
    own_w_ptr,
    own_bias_ptr,
    dpre_ptr,
    y_ptr,
    dbias_ptr,
    seed_ptr,
    dy_row_stride: tl.int32,
    w_stride: tl.int32,
    x_row_stride: tl.int32,
    own_w_stride: tl.int32,
    M: tl.int32,
    N: tl.int32,
    K: tl.int32,
    own_K: tl.int32,
    offset: tl.int32,
    threshold: tl.int32,
    scale: tl.float32,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    VEC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dy (M, K), w (K, N), saved (M, N) or active (`active_words`), or neither: pre comes from x (M, own_K), own_w (N, own_K).

    dbias is fp32 (tiles of rows, N): each tile's sum over its rows.
    """
    wait_for_previous()
    first_m, first_n = tile_of(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    rows, columns = M - first_m, N - first_n
    row = tl.minimum(tl.arange(0, BLOCK_M), rows - 1)[:, None]
    m, n = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
    exists = (m < rows) & (n // VEC < columns // VEC)
    place = first_m.to(tl.int64) * N + first_n
    if active_ptr is not None:  # before the product: they take few registers, and arrive while it runs
        words = load_active(active_ptr, first_m, first_n, rows, N, BLOCK_M, BLOCK_N)
    elif saved_ptr is None:
        base, start = x_ptr + first_m.to(tl.int64) * x_row_stride, row * x_row_stride
        own_w_base = own_w_ptr + first_n.to(tl.int64) * own_w_stride
        saved = product(
            *(base, start, own_w_base, own_w_stride, columns, own_K),
            *(BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, VEC, PRECISION),
        )
        if own_bias_ptr is not None:
            column = tl.arange(0, BLOCK_N)
            saved += tl.load(own_bias_ptr + first_n + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    dy_base, dy_start = dy_ptr + first_m.to(tl.int64) * dy_row_stride, row * dy_row_stride
    dh = product(
        *(dy_base, dy_start, w_ptr + first_n, w_stride, columns, K),
        *(BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, VEC, PRECISION),
        BY_ROWS=False,
    )
    if saved_ptr is not None:
        saved = tl.load(run_pointers(saved_ptr + place, m * N, n, VEC), mask=exists, other=0.0).to(tl.float32)
    if active_ptr is not None:
        # Scaled behind the choice: were that the last step, the compiler would choose among 16 bits, one by one.
        dpre = tl.where(is_active(words, BLOCK_M, BLOCK_N), dh, 0.0) * scale
    elif ACTIVATION == "relu" and saved_ptr is not None:  # saved is y: positive where active and kept
        dpre = tl.where(saved > 0, dh * scale, 0.0)
    else:
        y, slope = activate(saved, ACTIVATION)
        if seed_ptr is not None:
            low, high = load_seed(seed_ptr)
            hidden = tl.full((), 1, tl.int32)
            kept = keep_tile(low, high, offset, threshold, hidden, first_m, first_n, BLOCK_M, BLOCK_N, VEC=VEC)
            y, slope = tl.where(kept, y * scale, 0.0), tl.where(kept, slope * scale, 0.0)
        store_tile(y_ptr + place, N, y, rows, columns, BLOCK_M, BLOCK_N, VEC)
        dpre = tl.where(exists, dh * slope, 0.0)
    if dbias_ptr is not None:
        partial = dbias_ptr + (first_m // BLOCK_M).to(tl.int64) * N + first_n
        if active_ptr is not None:
            # By the tensor cores: elsewhere, tiles as these lie take 160 shuffles and 16 barriers.
            ones = tl.full((16, BLOCK_M), 1.0, tl.float32).to(dpre_ptr.dtype.element_ty)
            dpre = dpre.to(ones.dtype)
            sums = dot(ones, dpre, tl.zeros((16, BLOCK_N), tl.float32), PRECISION)
            alike = tl.arange(0, 16)[:, None]
            tl.store(partial + (n + 0 * alike), sums, mask=(n < columns) & (alike == 0))
        else:
            sums = tl.sum(dpre, axis=0)
            column = tl.arange(0, BLOCK_N)
            tl.store(partial + column, sums, mask=column < columns)
    store_tile(dpre_ptr + place, N, dpre, rows, columns, BLOCK_M, BLOCK_N, VEC)


def linear_forward(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    *,
    activation: str = "none",
    dropout: Dropout | None = None,
    keep: bool = False,
    position: Tensor | None = None,
    position_columns: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """dropout(activation(x @ w^T + bias)), x (..., K), w (N, K), bias (N,) or None.

    position: (..., K) in x's dtype, whose rows repeat along those of x; added to x for the first `position_columns`
    columns of the result, a multiple of 128 (or all). Returns y (..., N) in x's dtype, contiguous, and with keep what a backward wants
    beside it: for ReLU with dropout in 16 bits its `active_words`, for ReLU else nothing, otherwise what the activation was
    applied to.
    """
    x, x_stride = as_rows(x)
    w, w_stride = as_rows(w)
    bias = packed(bias)
    dtype, device, N, K = x.dtype, x.device, w.shape[0], x.shape[-1]
    leading = x.shape[:-1]
    rows = leading.numel()
    if dropout is None and position is None and activation in ("none", "relu") and _by_cublas(x, bias, activation):
        x = x.reshape(rows, K)
        product = torch._addmm_activation if activation == "relu" else torch.addmm
        return (torch.mm(x, w.t()) if bias is None else product(bias, x, w.t())).view(*leading, N), None
    position, position_stride, position_rows = _position(position, rows)
    y = empty((*leading, N), dtype, device)
    pre = empty((*leading, N), dtype, device) if keep and activation != "relu" else None
    small = keep and activation == "relu" and dropout is not None and dtype.itemsize == 2
    active = empty(active_words(rows, N), torch.int16, device) if small else None
    offset = (x.data_ptr() | w.data_ptr() | address_of(position)) % 16
    sizes = (x_stride, position_stride, position_rows, position_columns, w_stride, rows, N, K)
    given = dtype_of(bias), dropout is not None, pre is not None, position is not None, small
    plan = _plan_forward(dtype, activation, precision(dtype), sizes, given, offset)
    launch(plan.variant, plan.grid, x, position, w, bias, y, pre, active, *drawn(dropout, sizes))
    return y, active if small else pre


def _by_cublas(x: Tensor, bias: Tensor | None, activation: str) -> bool:
    """Whether cuBLAS has a product that ends so: with bias and ReLU it takes 18.7 µs on an H200 for DETR's 6,800 rows, this kernel 25.0."""
    ends_so = activation == "none" if bias is None else bias.dtype is x.dtype
    return ends_so and x.dtype.itemsize == 2 and x.is_cuda and torch.version.hip is None and x.numel() > 0


@lru_cache(maxsize=MAX_PLANS)
def _plan_forward(
    dtype: torch.dtype, activation: str, rounding: str, sizes: tuple[int, ...], given: Any, offset: int
) -> Plan:
    x_stride, position_stride, _, _, w_stride, rows, N, K = sizes
    vector = run_length(dtype.itemsize, x_stride | w_stride | position_stride | N | K, offset)
    variant = forward_variant(Form(dtype, activation, K % 64 == 0, vector, rounding), *given)
    return Plan(variant, grid_of(variant, rows, N), sizes)


class Recomputed(NamedTuple):
    """What `linear_forward` got, for a backward to which it left nothing: x (..., K), w (N, K), bias (N,) or None."""

    x: Tensor
    w: Tensor
    bias: Tensor | None


def linear_backward(
    dy: Tensor,
    w: Tensor,
    saved: Tensor | Recomputed,
    *,
    activation: str,
    active: Tensor | None = None,
    dropout: Dropout | None = None,
    with_dbias: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """From the gradient dy (..., K) behind y @ w^T, w (K, N), back through y = dropout(activation(pre)).

    saved: y for ReLU, else pre, (..., N), contiguous; or what to compute them from once more. active: y's `active_words`,
    where the forward kept them: read in place of y. Returns dpre (..., N), y (..., N), and dpre's sums over the rows of each
    tile, fp32 (tiles, N), for `sum_partials`, or None. Deterministic.
    """
    dy, dy_stride = arriving_rows(dy)
    w, w_stride = as_rows(w)
    dtype, device, N, K = dy.dtype, dy.device, w.shape[1], dy.shape[-1]
    leading = dy.shape[:-1]
    rows = leading.numel()
    x, own_w, bias, kept = (*saved, None) if isinstance(saved, Recomputed) else (None, None, None, saved)
    x, x_stride = (None, 0) if x is None else as_rows(x)
    own_w, own_stride = (None, 0) if own_w is None else as_rows(own_w)
    own_K = 0 if x is None else x.shape[-1]
    bias = packed(bias)
    dpre = empty((*leading, N), dtype, device)
    known = activation == "relu" and kept is not None  # and so y itself
    y = kept if known and kept is not None else empty((*leading, N), dtype, device)
    read = kept if active is None else None
    offset = (dy.data_ptr() | w.data_ptr() | address_of(read) | address_of(x) | address_of(own_w)) % 16
    sizes = (dy_stride, w_stride, x_stride, own_stride, rows, N, K, own_K)
    given = dropout is not None and not known, with_dbias, kept is not None, dtype_of(bias), active is not None
    plan = _plan_backward(dtype, activation, precision(dtype), sizes, given, offset)
    partial = empty((-(-rows // plan.variant.constants["BLOCK_M"]), N), torch.float32, device) if with_dbias else None
    tensors = (dy, w, read, active, x, own_w, bias, dpre, None if known else y, partial)
    launch(plan.variant, plan.grid, *tensors, *drawn(dropout, sizes, masks=not known))
    return dpre, y, partial


@lru_cache(maxsize=MAX_PLANS)
def _plan_backward(
    dtype: torch.dtype, activation: str, rounding: str, sizes: tuple[int, ...], given: Any, offset: int
) -> Plan:
    *strides, rows, N, K, own_K = sizes
    vector = run_length(dtype.itemsize, reduce(or_, strides) | N | K | own_K, offset)
    variant = backward_variant(Form(dtype, activation, (K | own_K) % 64 == 0, vector, rounding), *given)
    return Plan(variant, grid_of(variant, rows, N), sizes)


def _position(position: Tensor | None, rows: int) -> tuple[Tensor | None, int, int]:
    """The position, the distance of its rows, and how many there are; rows of x must be a multiple of them."""
    if position is None:
        return None, 0, 1
    position, stride = as_rows(position)
    return position, stride, max(1, min(rows, position.shape[:-1].numel()))


@cache
def forward_variant(
    form: Form, bias_dtype: torch.dtype | None, dropout: bool, pre: bool, position: bool, active: bool = False
) -> Variant:
    """The program of `linear_forward`; pre, active: what it keeps."""
    config = _config(form, busy=position)
    dtype = form.dtype
    kept = dtype if pre else None, torch.int16 if active else None
    tensors = (dtype, dtype if position else None, dtype, bias_dtype, dtype, *kept)
    types = (*map(pointer, tensors), "*i64" if dropout else None, *["i32"] * 10, "fp32")
    return Variant(linear_kernel, types, form.constants(config), config.num_warps, config.num_stages)


@cache
def backward_variant(
    form: Form,
    dropout: bool,
    with_dbias: bool,
    kept: bool = True,
    bias_dtype: torch.dtype | None = None,
    active: bool = False,
) -> Variant:
    """The program of `linear_backward`; kept: the forward kept y or pre; else bias_dtype is of what pre comes from."""
    known = form.activation == "relu" and kept
    config = _config(form, busy=not known)
    dtype = form.dtype
    if form.activation == "gelu" and dropout and kept and config is LINEAR_SCATTERED:
        config = replace(config, block_n=64)  # 64 bytes a thread spill in 128; 8 % more instructions at K = 256
    again = None if kept else dtype
    saved = (None, torch.int16) if active else (dtype if kept else None, None)
    read = (dtype, dtype, *saved, again, again, bias_dtype)
    written = (dtype, None if known else dtype, torch.float32 if with_dbias else None)
    types = (*map(pointer, (*read, *written)), "*i64" if dropout else None, *["i32"] * 10, "fp32")
    return Variant(linear_backward_kernel, types, form.constants(config), config.num_warps, config.num_stages)


def _config(form: Form, busy: bool) -> MatmulConfig:
    if form.dtype.itemsize == 2 and form.vector == 1:
        return LINEAR_SCATTERED
    return LINEAR[form.dtype.itemsize, busy]


def catalog_entries() -> Iterator[Entry]:
    bf16, fp32 = torch.bfloat16, torch.float32
    forms = (  # dtype, activation, K, N, dropout, position
        (bf16, "relu", 256, 2048, True, False),
        (bf16, "none", 256, 768, False, True),
        (fp32, "silu", 100, 43, True, False),  # nothing aligned, masked steps
    )
    for dtype, activation, K, N, drops, position in forms:
        vector = 16 // dtype.itemsize if K % 8 == 0 else 1
        form = Form(dtype, activation, K % 64 == 0, vector, precision(dtype))
        example = partial(_example, dtype, activation, K, N, drops, position)
        suffix = f"k{K}_{activation}_{TRITON_TYPES[dtype]}" + ("_position" if position else "")
        small = activation == "relu" and dtype.itemsize == 2
        ahead = forward_variant(form, dtype, drops, activation not in ("none", "relu"), position, small)
        budget = Budget(184 if vector > 1 else 224, 82 << 10, 264, 64 << 10)
        yield Entry("linear", f"linear_forward_{suffix}", ahead, _tile(ahead), budget, example)
        budget = Budget(216, 82 << 10, 256, 64 << 10)
        if activation == "relu":
            back = backward_variant(form, False, True, active=small)
            yield Entry("linear", f"linear_backward_{suffix}", back, _tile(back), budget, example)
            back = backward_variant(form, drops, True, False, dtype)
            yield Entry("linear", f"linear_backward_{suffix}_recomputed", back, _tile(back), budget, example)


def _tile(variant: Variant) -> int:
    return int(variant.constants["BLOCK_M"]) * int(variant.constants["BLOCK_N"])


def _example(
    dtype: torch.dtype, activation: str, K: int, N: int, drops: bool, position: bool, device: torch.device
) -> Callable[[], tuple[Tensor, ...]]:
    """Forward and backward over two tiles of rows; K and N are as odd as told, and small."""
    K, N = min(K, 64) if K % 64 == 0 else K, min(N, 160 if position else 128)
    rows = 2 * LINEAR[dtype.itemsize, False].block_m - 3
    x, dy = (torch.randn(rows, K, device=device).to(dtype) for _ in range(2))
    w, w2 = (torch.randn(N, K, device=device).to(dtype) / 16 for _ in range(2))
    bias = torch.randn(N, device=device).to(dtype)
    added = torch.randn(1, K, device=device).to(dtype) if position else None
    dropout = Dropout(torch.ones(1, dtype=torch.int64, device=device), 3, 0.1) if drops else None

    def call() -> tuple[Tensor, ...]:
        y, kept = linear_forward(
            x,
            w,
            bias,
            activation=activation,
            dropout=dropout,
            keep=activation != "none",
            position=added,
            position_columns=128 if position else 0,
        )
        if activation == "none":
            return (y,)
        found: Any = (y, kept) if activation == "relu" else (kept, None)
        outputs = [y]
        for saved, active in (found, (Recomputed(x, w, bias), None)):
            results = linear_backward(dy, w2.t(), saved, activation=activation, active=active, dropout=dropout)
            outputs += [t for t in results if t is not None]
        return tuple(outputs)

    return call
