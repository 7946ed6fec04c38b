# mypy: allow-incomplete-defs
"""A whole feed-forward block in one kernel, forward: the hidden activation never leaves the multiprocessor.

    h = dropout(activation(x @ w1^T + b1)),   s = residual + dropout(h @ w2^T + b2),   y = LayerNorm(s)

x is (M, C), w1 (F, C), w2 (D, F), y (M, D), with C and D up to 256: a program keeps its rows of x, and the sums of its rows
of s in fp32 registers, and goes over F; s may be all that is wanted, or its second term. So h costs no memory, and a sum of any size is finite. The backward computes h once
more (`linear_backward` with `Recomputed`). Sources: Vaswani et al., 2017, arXiv:1706.03762, section 3.3; Dao et al., 2022,
arXiv:2205.14135, whose loop over keys this is with weights in place of keys and values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial, reduce
from operator import or_
from typing import NamedTuple

import torch
from torch import Tensor

from .attention_tiles import dot
from .configs import FEED_FORWARD, FEW_ROWS
from .dropout import Dropout, dropout_arguments, keep_tile, load_seed
from .entry import Budget, Entry
from .launch import TRITON_TYPES, Variant, empty, jit, launch, pointer, tl
from .linear_norm import Rows, finish_rows
from .overlap import wait_for_previous
from .product_tiles import activate, precision, store_tile
from .rows import address_of, arriving_rows, block_of, dtype_of, load_parameters, packed, run_length, run_pointers

MAX_COLUMNS = 256


@jit
def feed_forward_kernel(
    x_ptr,
    w1_ptr,
    b1_ptr,
    w2_ptr,
    b2_ptr,
    residual_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    y_ptr,
    sum_ptr,
    xhat_ptr,
    rstd_ptr,
    seed_ptr,
    output_seed_ptr,
    x_row_stride: tl.int32,
    w1_stride: tl.int32,
    w2_stride: tl.int32,
    residual_row_stride: tl.int32,
    M: tl.int32,
    C: tl.int32,
    D: tl.int32,
    F: tl.int32,
    offset: tl.int32,
    threshold: tl.int32,
    scale: tl.float32,
    output_threshold: tl.int32,
    output_scale: tl.float32,
    eps: tl.float32,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_F: tl.constexpr,
    EVEN: tl.constexpr,
    FULL: tl.constexpr,
    VEC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """EVEN: C fills its block and F whole steps. FULL: D fills its block. y_ptr is None where the sum is all there is."""
    wait_for_previous()
    first = tl.program_id(0) * BLOCK_M
    rows = M - first
    row = tl.minimum(tl.arange(0, BLOCK_M), rows - 1)[:, None]
    c, f = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_F)
    d = tl.minimum(tl.arange(0, BLOCK_D), D - 1)[:, None]  # columns past the end are never stored
    x_pointers = run_pointers(x_ptr + first.to(tl.int64) * x_row_stride, row * x_row_stride, c[None, :], VEC)
    x = tl.load(x_pointers) if EVEN else tl.load(x_pointers, mask=c[None, :] // VEC < C // VEC, other=0.0)
    s = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(0, F, BLOCK_F):
        w1_base = w1_ptr + tl.cast(start, tl.int64) * w1_stride
        w2_pointers = run_pointers(w2_ptr + start, d * w2_stride, f[None, :], VEC)
        if EVEN:
            w1 = tl.load(run_pointers(w1_base, f[:, None] * w1_stride, c[None, :], VEC))
            w2 = tl.load(w2_pointers)
        else:  # units of h past the end meet zeros of w2
            unit = tl.minimum(f, F - start - 1)[:, None]
            w1_pointers = run_pointers(w1_base, unit * w1_stride, c[None, :], VEC)
            w1 = tl.load(w1_pointers, mask=c[None, :] // VEC < C // VEC, other=0.0)
            w2 = tl.load(w2_pointers, mask=f[None, :] // VEC < (F - start) // VEC, other=0.0)
        h = dot(x, w1.T, tl.zeros((BLOCK_M, BLOCK_F), tl.float32), PRECISION)
        if b1_ptr is not None:
            h += tl.load(b1_ptr + start + f, mask=f < F - start, other=0.0).to(tl.float32)[None, :]
        h, _ = activate(h, ACTIVATION)
        if seed_ptr is not None:
            low, high = load_seed(seed_ptr)
            hidden = tl.full((), 1, tl.int32)
            kept = keep_tile(low, high, offset, threshold, hidden, first, start, BLOCK_M, BLOCK_F)
            h = tl.where(kept, h * scale, 0.0)
        if not EVEN:
            h = tl.where(f[None, :] < F - start, h, 0.0)  # an infinite h times 0 would not be 0
        s = dot(h.to(x.dtype), w2.T, s, PRECISION)
    if residual_ptr is not None:
        finish_rows(
            *(s, b2_ptr, residual_ptr, norm_weight_ptr, norm_bias_ptr, y_ptr, sum_ptr, xhat_ptr, rstd_ptr),
            *(output_seed_ptr, residual_row_stride, first, rows, D, offset, output_threshold, output_scale, eps),
            *(BLOCK_M, BLOCK_D, FULL, VEC),
        )
    else:
        column = tl.arange(0, BLOCK_D)[None, :]
        if b2_ptr is not None:
            s += load_parameters(b2_ptr, column, column // VEC < D // VEC, VEC)
        store_tile(y_ptr + first.to(tl.int64) * D, D, s, rows, D, BLOCK_M, BLOCK_D, VEC)


class Norm(NamedTuple):
    """What is behind the second product: residual (..., D), weight and bias (D,) of LayerNorm, its eps, y's dtype.

    As `linear_norm_forward` takes them.
    """

    residual: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    out_dtype: torch.dtype
    with_sum: bool
    keep: bool


def feed_forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    norm: Norm | None = None,
    *,
    activation: str,
    dropout: Dropout | None = None,
    output_dropout: Dropout | None = None,
) -> Rows:
    """The block over x (..., C): y (..., D), and with a norm what `linear_norm_forward` gives.

    dropout acts on h, output_dropout, of the same seed and offset, on what is added to the residual. What could be read 16 bytes
    at a time elsewhere is copied. Of widths that are no whole runs of 16 bytes, fp32's alone fit the registers.
    """
    x, x_stride = arriving_rows(x)
    w1, w1_stride = arriving_rows(w1)
    w2, w2_stride = arriving_rows(w2)
    b1, b2 = packed(b1), _in_place(b2)
    residual, residual_stride = (None, 0) if norm is None else arriving_rows(norm.residual)
    rows, C, F, D = x.shape[:-1].numel(), x.shape[-1], w1.shape[0], w2.shape[0]
    if norm is None:
        out = Rows(empty((*x.shape[:-1], D), x.dtype, x.device), None, None, None)
    else:
        out = Rows.empty(x, norm.residual, norm.weight, norm.out_dtype, norm.with_sum, norm.keep)
    parameters = (None, None) if norm is None else (_in_place(norm.weight), _in_place(norm.bias))
    addresses = reduce(or_, map(address_of, (x, w1, w2, b2, residual, *parameters)))
    vector = run_length(x.element_size(), x_stride | w1_stride | w2_stride | residual_stride | C | D | F, addresses)
    dtypes = tuple(map(dtype_of, (b1, b2, residual, *parameters, *out[:3])))
    drops = dropout is not None, output_dropout is not None
    variant = forward_variant(
        x.dtype, activation, (C, F, D), rows <= FEW_ROWS, dtypes, drops, vector, precision(x.dtype)
    )
    seeds = (None if one is None else one.seed for one in (dropout, output_dropout))
    tensors = (x, w1, b1, w2, b2, residual, *parameters, *out, *seeds)
    offset = max(dropout_arguments(dropout)[0], dropout_arguments(output_dropout)[0])
    drawn = (offset, *dropout_arguments(dropout)[1:], *dropout_arguments(output_dropout)[1:])
    sizes = (x_stride, w1_stride, w2_stride, residual_stride, rows, C, D, F)
    grid = (-(-rows // variant.constants["BLOCK_M"]),)
    launch(variant, grid, *tensors, *sizes, *drawn, 0.0 if norm is None else norm.eps)
    return out


def _in_place(parameter: Tensor | None) -> Tensor | None:
    """A parameter (D,) element beside element from a multiple of 16 bytes on, as `arriving_rows` brings rows into place."""
    return None if parameter is None else arriving_rows(parameter)[0]


@cache
def forward_variant(
    dtype: torch.dtype,
    activation: str,
    widths: tuple[int, int, int],
    few: bool,
    dtypes: tuple[torch.dtype | None, ...],
    drops: tuple[bool, bool],
    vector: int,
    rounding: str,
) -> Variant:
    """The program of `feed_forward`; widths C, F, D; dtypes of b1, b2, residual, norm weight and bias, y, the sum and
    xhat.

    rounding: see `product_tiles.precision`.
    """
    C, F, D = widths
    config = FEED_FORWARD[dtype.itemsize, few]
    b1, b2, *rest = dtypes
    kept = None if dtypes[-1] is None else torch.float32
    seeds = ("*i64" if drop else None for drop in drops)
    types = (*map(pointer, (dtype, dtype, b1, dtype, b2, *rest, kept)), *seeds)
    constants = {
        "ACTIVATION": activation,
        "BLOCK_M": config.rows,
        "BLOCK_C": block_of(C),
        "BLOCK_D": block_of(D),
        "BLOCK_F": config.columns,
        "EVEN": block_of(C) == C and F % config.columns == 0,
        "FULL": block_of(D) == D,
        "VEC": vector,
        "PRECISION": rounding,
    }
    numbers = (*["i32"] * 10, "fp32", "i32", "fp32", "fp32")
    return Variant(feed_forward_kernel, (*types, *numbers), constants, config.num_warps, config.num_stages)


def catalog_entries() -> Iterator[Entry]:
    bf16 = torch.bfloat16
    rows, budget = FEW_ROWS + 1, Budget(255, 99 << 10, 256, 64 << 10, amd_spills=48)  # the smaller tile needs less
    widths, dtypes = (256, 2048, 256), (*[bf16] * 6, None, bf16)
    variant = forward_variant(bf16, "relu", widths, rows <= FEW_ROWS, dtypes, (True, True), 8, precision(bf16))
    tile = int(variant.constants["BLOCK_M"]) * int(variant.constants["BLOCK_F"])
    name = f"feed_forward_c256_relu_{TRITON_TYPES[bf16]}"
    yield Entry("feed_forward", name, variant, tile, budget, partial(_example, rows, bf16))


def _example(rows: int, dtype: torch.dtype, device: torch.device) -> Callable[[], tuple[Tensor, ...]]:
    """The block with both dropouts; few units, as the interpreter takes."""
    x = torch.randn(rows, 256, device=device).to(dtype)
    w1, w2 = (torch.randn(s, device=device).to(dtype) / 16 for s in ((64, 256), (256, 64)))
    b1, b2, weight, bias = (torch.randn(n, device=device).to(dtype) for n in (64, 256, 256, 256))
    dropout = Dropout(torch.ones(1, dtype=torch.int64, device=device), 3, 0.1)
    norm = Norm(x, weight, bias, 1e-5, dtype, False, True)

    def call() -> tuple[Tensor, ...]:
        options = {"dropout": dropout, "output_dropout": dropout}
        found = feed_forward(x, w1, b1, w2, b2, norm, activation="relu", **options)
        return tuple(t for t in found if t is not None)

    return call
