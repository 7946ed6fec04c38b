# mypy: allow-incomplete-defs
"""Gradients of all weights and biases of `mlp`'s layers, in one launch: products over rows, which programs share out.

    dw = dy^T @ x,   db = sum of dy over rows,   of each layer, dy (M, outputs) before its activation, x (M, inputs)

Each share of the rows gives a row of sums, which are added up in a launch of their own, always in one order.
"""

from __future__ import annotations

from .attention_tiles import dot
from .launch import jit, tl
from .overlap import wait_for_previous
from .product_tiles import store_tile
from .rows import run_pointers


@jit
def mlp_weights_kernel(
    x_ptr,
    h1_ptr,
    h2_ptr,
    dh1_ptr,
    dh2_ptr,
    dy_ptr,
    dz_ptr,
    sums_ptr,
    x_row_stride: tl.int32,
    dy_row_stride: tl.int32,
    dz_row_stride: tl.int32,
    M: tl.int32,
    C: tl.int32,
    H: tl.int32,
    D: tl.int32,
    N: tl.int32,
    share: tl.int32,
    total: tl.int32,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    VEC: tl.constexpr,
    VEC_D: tl.constexpr,
    VEC_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Each weight's and bias's gradient over `share` rows, the grid's second dimension: a row of sums (shares, total)."""
    wait_for_previous()
    tile = tl.program_id(0)
    base = sums_ptr + tl.program_id(1).to(tl.int64) * total
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, M)
    tiles = tl.cdiv(H, BLOCK_N) * tl.cdiv(C, BLOCK_K)
    if tile < tiles:
        _weight_gradient(
            *(dh1_ptr, H, x_ptr, x_row_stride, base, begin, end, H, C, tile),
            *(BLOCK_M, BLOCK_N, BLOCK_K, VEC, VEC, PRECISION),
        )
    tile -= tiles
    base += H.to(tl.int64) * C + H
    h_ptr = h1_ptr
    if h2_ptr is not None:
        h_ptr = h2_ptr
        tiles = tl.cdiv(H, BLOCK_N) * tl.cdiv(H, BLOCK_K)
        if (tile >= 0) & (tile < tiles):
            _weight_gradient(
                *(dh2_ptr, H, h1_ptr, H, base, begin, end, H, H, tile),
                *(BLOCK_M, BLOCK_N, BLOCK_K, VEC, VEC, PRECISION),
            )
        tile -= tiles
        base += H.to(tl.int64) * H + H
    tiles = tl.cdiv(D, BLOCK_N) * tl.cdiv(H, BLOCK_K)
    if (tile >= 0) & (tile < tiles):
        _weight_gradient(
            *(dy_ptr, dy_row_stride, h_ptr, H, base, begin, end, D, H, tile),
            *(BLOCK_M, BLOCK_N, BLOCK_K, VEC_D, VEC, PRECISION),
        )
    if dz_ptr is not None:
        tile -= tiles
        base += D.to(tl.int64) * H + D
        if tile >= 0:
            _weight_gradient(
                *(dz_ptr, dz_row_stride, x_ptr, x_row_stride, base, begin, end, N, C, tile),
                *(BLOCK_M, BLOCK_N, BLOCK_K, VEC_N, VEC, PRECISION),
            )


@jit
def _weight_gradient(
    dy_ptr,
    dy_row_stride,
    x_ptr,
    x_row_stride,
    base,
    begin,
    end,
    N,
    K,
    tile,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    VEC_N: tl.constexpr,
    VEC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of dy^T @ x, (N, K), over the rows from begin to end, and behind all of it dy's sums over them, (N,)."""
    across = tl.cdiv(K, BLOCK_K)
    first_n, first_k = tile // across * BLOCK_N, tile % across * BLOCK_K
    m, n, k = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :], tl.arange(0, BLOCK_K)[None, :]
    inside_n, inside_k = n // VEC_N < (N - first_n) // VEC_N, k // VEC < (K - first_k) // VEC
    dy_ptr += begin.to(tl.int64) * dy_row_stride + first_n
    x_ptr += begin.to(tl.int64) * x_row_stride + first_k
    weight, bias = tl.zeros((BLOCK_N, BLOCK_K), tl.float32), tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(begin, end, BLOCK_M):
        exists = m < end - start
        dy = tl.load(run_pointers(dy_ptr, m * dy_row_stride, n, VEC_N), mask=exists & inside_n, other=0.0)
        x = tl.load(run_pointers(x_ptr, m * x_row_stride, k, VEC), mask=exists & inside_k, other=0.0)
        weight = dot(dy.T, x, weight, PRECISION)
        bias += dy
        dy_ptr += BLOCK_M * dy_row_stride.to(tl.int64)
        x_ptr += BLOCK_M * x_row_stride.to(tl.int64)
    store_tile(base + first_n.to(tl.int64) * K + first_k, K, weight, N - first_n, K - first_k, BLOCK_N, BLOCK_K, 1)
    if first_k == 0:
        column = first_n + tl.arange(0, BLOCK_N)
        tl.store(base + N.to(tl.int64) * K + column, tl.sum(bias, axis=0), mask=column < N)
