# mypy: allow-incomplete-defs
"""Small heads in fp32 over the same rows: a perceptron, and a linear map beside it, forward and backward.

    h1 = relu(x @ w1^T + b1),   h2 = relu(h1 @ w2^T + b2),   y = sigmoid(h2 @ w3^T + b3),   z = x @ wc^T + bc

x is (M, C), w1 (H, C), w2 (H, H), w3 (D, H), wc (N, C), all of them fp32. Without w2 y comes from h1; the sigmoid and z
may be left out. A program has some rows through all layers: what one layer writes, the next reads from the cache. So it is
backward, from dy and dz to dx, and each weight's gradient is a product over all rows, which programs share out.

Products are fp32's to its rounding, by tensor cores: each factor as the sum of two that tf32 has, of whose four products
the three largest are added up. Source: Ootomo and Yokota, 2022, arXiv:2203.03341; DETR's heads: Carion et al., 2020,
arXiv:2005.12872, section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .configs import MLP_ROWS, MLP_SHARES, MLP_WEIGHTS, MatmulConfig
from .entry import TARGETS, Budget, Entry
from .launch import Variant, empty, jit, launch, multiprocessors, tl
from .mlp_weights import mlp_weights_kernel
from .overlap import wait_for_previous
from .product_tiles import product, sigmoid, split_precision, store_tile
from .rows import MAX_PLANS, arriving_rows, run_length, run_pointers, sum_partials


@jit
def mlp_forward_kernel(
    x_ptr,
    w1_ptr,
    b1_ptr,
    w2_ptr,
    b2_ptr,
    w3_ptr,
    b3_ptr,
    wc_ptr,
    bc_ptr,
    h1_ptr,
    h2_ptr,
    y_ptr,
    z_ptr,
    x_row_stride: tl.int32,
    M: tl.int32,
    C: tl.int32,
    H: tl.int32,
    D: tl.int32,
    N: tl.int32,
    ENDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
    VEC: tl.constexpr,
    VEC_D: tl.constexpr,
    VEC_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The grid's second dimension: the perceptron, and z. ENDS: "sigmoid" or "none". VEC_D, VEC_N: of rows of y, of z."""
    wait_for_previous()
    first = tl.program_id(0) * BLOCK_M
    rows = M - first
    row = tl.minimum(tl.arange(0, BLOCK_M), rows - 1)[:, None]
    place = first.to(tl.int64)
    x_base = x_ptr + place * x_row_stride
    x_start = row * x_row_stride
    if tl.program_id(1) == 0:
        h1_base = h1_ptr + place * H
        _layer(
            *(x_base, x_start, w1_ptr, b1_ptr, h1_base, rows, C, H),
            *("relu", BLOCK_M, BLOCK_N, BLOCK_K, EVEN, VEC, VEC, PRECISION),
        )
        tl.debug_barrier()  # each thread reads what others wrote
        h_base = h1_base
        if w2_ptr is not None:
            h_base = h2_ptr + place * H
            _layer(
                *(h1_base, row * H, w2_ptr, b2_ptr, h_base, rows, H, H),
                *("relu", BLOCK_M, BLOCK_N, BLOCK_K, EVEN, VEC, VEC, PRECISION),
            )
            tl.debug_barrier()
        _layer(
            *(h_base, row * H, w3_ptr, b3_ptr, y_ptr + place * D, rows, H, D),
            *(ENDS, BLOCK_M, BLOCK_D, BLOCK_K, EVEN, VEC, VEC_D, PRECISION),
        )
    elif wc_ptr is not None:
        _layer(
            *(x_base, x_start, wc_ptr, bc_ptr, z_ptr + place * N, rows, C, N),
            *("none", BLOCK_M, BLOCK_N, BLOCK_K, EVEN, VEC, VEC_N, PRECISION),
        )


@jit
def _layer(
    x_base,
    x_start,
    w_ptr,
    b_ptr,
    y_base,
    rows,
    K,
    N,
    ENDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
    VEC: tl.constexpr,
    VEC_Y: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of rows of x @ w^T + b, and what it ENDS in."""
    for n in range(0, N, BLOCK_N):
        w_base = w_ptr + tl.cast(n, tl.int64) * K
        y = product(
            *(x_base, x_start, w_base, K, N - n, K, BLOCK_M, BLOCK_N, BLOCK_K, EVEN, VEC, PRECISION),
            bias_ptr=b_ptr + n,
        )
        if ENDS == "relu":
            y = tl.where(y < 0, 0.0, y)  # NaN stays NaN, as torch's
        if ENDS == "sigmoid":
            y = sigmoid(y)
        store_tile(y_base + n, N, y, rows, N - n, BLOCK_M, BLOCK_N, VEC_Y)


@jit
def mlp_backward_kernel(
    dy_ptr,
    dz_ptr,
    y_ptr,
    h1_ptr,
    h2_ptr,
    w1_ptr,
    w2_ptr,
    w3_ptr,
    wc_ptr,
    dy_own_ptr,
    dh1_ptr,
    dh2_ptr,
    dx_ptr,
    dy_row_stride: tl.int32,
    dz_row_stride: tl.int32,
    M: tl.int32,
    C: tl.int32,
    H: tl.int32,
    D: tl.int32,
    N: tl.int32,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
    VEC: tl.constexpr,
    VEC_D: tl.constexpr,
    VEC_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dh1, dh2: gradients before the ReLUs; dy_own: before the sigmoid. What is left out, besides w2's: wc's, y's, dx."""
    wait_for_previous()
    first = tl.program_id(0) * BLOCK_M
    rows = M - first
    row = tl.minimum(tl.arange(0, BLOCK_M), rows - 1)[:, None]
    place = first.to(tl.int64)
    dy_base, dy_start = dy_ptr + place * dy_row_stride, row * dy_row_stride
    if y_ptr is not None:
        m = tl.arange(0, BLOCK_M)[:, None]
        own_base = dy_own_ptr + place * D
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)[None, :]
            exists = (m < rows) & (d < D)
            dy = tl.load(dy_base + dy_start + d, mask=exists, other=0.0)
            y = tl.load(y_ptr + place * D + (m * D + d), mask=exists, other=0.0)
            tl.store(own_base + (m * D + d), dy * (1.0 - y) * y, mask=exists)
        tl.debug_barrier()  # each thread reads what others wrote
        dy_base, dy_start = own_base, row * D
    dh1_base, h1_base = dh1_ptr + place * H, h1_ptr + place * H
    if w2_ptr is None:
        _active_gradient(
            *(dy_base, dy_start, w3_ptr, h1_base, dh1_base, rows, D, H),
            *(BLOCK_M, BLOCK_N, BLOCK_D, False, VEC_D, VEC, PRECISION),
        )
    else:
        dh2_base = dh2_ptr + place * H
        _active_gradient(
            *(dy_base, dy_start, w3_ptr, h2_ptr + place * H, dh2_base, rows, D, H),
            *(BLOCK_M, BLOCK_N, BLOCK_D, False, VEC_D, VEC, PRECISION),
        )
        tl.debug_barrier()
        _active_gradient(
            *(dh2_base, row * H, w2_ptr, h1_base, dh1_base, rows, H, H),
            *(BLOCK_M, BLOCK_N, BLOCK_K, EVEN, VEC, VEC, PRECISION),
        )
    if dx_ptr is not None:
        tl.debug_barrier()
        for c in range(0, C, BLOCK_N):
            dx = product(
                *(dh1_base, row * H, w1_ptr + c, C, C - c, H, BLOCK_M, BLOCK_N, BLOCK_K, EVEN, VEC, PRECISION),
                BY_ROWS=False,
            )
            if wc_ptr is not None:
                dx += product(
                    *(dz_ptr + place * dz_row_stride, row * dz_row_stride, wc_ptr + c, C, C - c, N),
                    *(BLOCK_M, BLOCK_N, BLOCK_K, False, VEC_N, PRECISION),
                    BY_ROWS=False,
                )
            store_tile(dx_ptr + place * C + c, C, dx, rows, C - c, BLOCK_M, BLOCK_N, VEC)


@jit
def _active_gradient(
    dy_base,
    dy_start,
    w_ptr,
    h_base,
    dh_base,
    rows,
    K,
    H,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
    VEC_K: tl.constexpr,
    VEC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dy @ w, w (K, H), where h, of the same rows, is positive."""
    m = tl.arange(0, BLOCK_M)[:, None]
    for start in range(0, H, BLOCK_N):
        n = tl.arange(0, BLOCK_N)[None, :]
        exists = (m < rows) & (n // VEC < (H - start) // VEC)
        h = tl.load(run_pointers(h_base + start, m * H, n, VEC), mask=exists, other=0.0)
        dh = product(
            *(dy_base, dy_start, w_ptr + start, H, H - start, K, BLOCK_M, BLOCK_N, BLOCK_K, EVEN, VEC_K, PRECISION),
            BY_ROWS=False,
        )
        store_tile(dh_base + start, H, tl.where(h > 0, dh, 0.0), rows, H - start, BLOCK_M, BLOCK_N, VEC)


class Layers(NamedTuple):
    """Weights (outputs, inputs) and biases (outputs,), fp32: the perceptron's two or three (w2, b2 None), and the linear map's or None."""

    w1: Tensor
    b1: Tensor
    w2: Tensor | None
    b2: Tensor | None
    w3: Tensor
    b3: Tensor
    wc: Tensor | None
    bc: Tensor | None

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """C, H, D and N, which is 0 without a linear map."""
        return self.w1.shape[1], self.w1.shape[0], self.w3.shape[0], 0 if self.wc is None else self.wc.shape[0]

    @property
    def form(self) -> Form:
        return form_of(*self.sizes, self.w2 is not None, split_precision())

    def packed(self) -> Layers:
        """As kernels read them: element beside element, from a multiple of 16 bytes on."""
        return Layers(*(None if t is None else arriving_rows(t)[0].contiguous() for t in self))  # type: ignore[arg-type]


class Kept(NamedTuple):
    """What the forward leaves for the backward: h1, h2 (None without w2), (..., H), and y behind a sigmoid, else None."""

    h1: Tensor
    h2: Tensor | None
    y: Tensor | None


def mlp_forward(
    x: Tensor, layers: Layers, *, ends_in_sigmoid: bool
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """x (..., C), fp32: y (..., D), z (..., N) or None, h1 and h2 (..., H) or None. All contiguous."""
    x, x_stride = arriving_rows(x)
    layers = layers.packed()
    C, H, D, N = layers.sizes
    leading, device = x.shape[:-1], x.device
    h1, y = (empty((*leading, n), torch.float32, device) for n in (H, D))
    h2 = None if layers.w2 is None else empty((*leading, H), torch.float32, device)
    z = None if layers.wc is None else empty((*leading, N), torch.float32, device)
    variant, rows = forward_variant(layers.form, ends_in_sigmoid), leading.numel()
    grid = (-(-rows // variant.constants["BLOCK_M"]), 1 if z is None else 2)
    launch(variant, grid, x, *layers, h1, h2, y, z, x_stride, rows, C, H, D, N)
    return y, z, h1, h2


def mlp_backward(
    dy: Tensor, dz: Tensor | None, x: Tensor, kept: Kept, layers: Layers, *, with_dx: bool = True, with_dw: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """From the gradients dy (..., D) and dz (..., N): dx (..., C), and those of all layers, one behind the other.

    Each layer's weight and bias in turn, (H * C + H + H * H + H + D * H + D + N * C + N,), fp32. None where not wanted. Deterministic.
    """
    dy, dy_stride = arriving_rows(dy)
    dz, dz_stride = (None, 0) if dz is None else arriving_rows(dz)
    x, x_stride = arriving_rows(x)
    layers = layers.packed()
    C, H, D, N = layers.sizes
    leading, device, rows = x.shape[:-1], x.device, x.shape[:-1].numel()
    form, sizes = layers.form, (rows, C, H, D, N)
    dh1 = empty((*leading, H), torch.float32, device)
    dh2 = None if layers.w2 is None else empty((*leading, H), torch.float32, device)
    own = None if kept.y is None else empty((*leading, D), torch.float32, device)
    dx = empty((*leading, C), torch.float32, device) if with_dx else None
    variant = backward_variant(form, own is not None, with_dx)
    tensors = (dy, dz, kept.y, kept.h1, kept.h2, layers.w1, layers.w2, layers.w3, layers.wc, own, dh1, dh2, dx)
    launch(variant, (-(-rows // variant.constants["BLOCK_M"]),), *tensors, dy_stride, dz_stride, *sizes)
    if not with_dw:
        return dx, None
    if own is not None:
        dy, dy_stride = own, D
    variant = weights_variant(form)
    blocks = variant.constants
    tiles = sum(
        -(-len(w) // blocks["BLOCK_N"]) * -(-w.shape[1] // blocks["BLOCK_K"]) for w in layers[::2] if w is not None
    )
    share = _share(rows, -(-2 * multiprocessors(device) // tiles), blocks["BLOCK_M"])
    total = sum(t.numel() for t in layers if t is not None)
    sums = empty((-(-rows // share), total), torch.float32, device)
    read = (x, kept.h1, kept.h2, dh1, dh2, dy, dz)
    strides = (x_stride, dy_stride, dz_stride)
    launch(variant, (tiles, len(sums)), *read, sums, *strides, *sizes, share, total)
    return dx, sum_partials((sums, torch.float32))[0]


def _share(rows: int, programs: int, step: int) -> int:
    """How many rows each of about so many programs adds up: whole steps."""
    least, most = MLP_SHARES
    return -(-min(max(-(-rows // programs), least), most) // step) * step


class Form(NamedTuple):
    """What programs depend on besides what is left out; vectors: elements a run of all rows, of y's and of z's."""

    vectors: tuple[int, int, int]
    even: bool
    block_d: int
    middle: bool
    beside: bool
    precision: str

    def constants(self) -> dict[str, int | str | bool]:
        return {**dict(zip(("VEC", "VEC_D", "VEC_N"), self.vectors)), "PRECISION": self.precision}

    def config(self, configs: dict[bool, MatmulConfig]) -> MatmulConfig:
        return configs[self.vectors[0] > 1]


@lru_cache(maxsize=MAX_PLANS)
def form_of(C: int, H: int, D: int, N: int, middle: bool, precision: str) -> Form:
    """Of rows that lie in place: see `arriving_rows`."""
    vector = run_length(4, C | H, 0)
    of_y, of_z = (vector if n % 4 == 0 else 1 for n in (D, N))
    block_d = 16 if D <= 16 else 32  # backward a step of products: of 64, 8 bytes a thread spill on sm_90
    return Form((vector, of_y, of_z), (C | H) % 64 == 0, block_d, middle, N > 0, precision)


@cache
def forward_variant(form: Form, ends_in_sigmoid: bool) -> Variant:
    """The program of `mlp_forward`."""
    middle, beside = form.middle, form.beside
    present = (True, True, True, middle, middle, True, True, beside, beside, True, middle, True, beside)
    return _rows_variant(mlp_forward_kernel, form, present, 6, ENDS="sigmoid" if ends_in_sigmoid else "none")


@cache
def backward_variant(form: Form, sigmoid: bool, with_dx: bool) -> Variant:
    """The program of `mlp_backward` that goes through layers."""
    middle, beside = form.middle, form.beside
    present = (True, beside, sigmoid, True, middle, True, middle, True, beside, sigmoid, True, middle, with_dx)
    return _rows_variant(mlp_backward_kernel, form, present, 7)


def _rows_variant(kernel: Any, form: Form, present: tuple[bool, ...], sizes: int, **constants: str) -> Variant:
    config = form.config(MLP_ROWS)
    blocks = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_D": form.block_d, "BLOCK_K": config.block_k}
    constants |= {**blocks, "EVEN": form.even, **form.constants()}  # type: ignore[dict-item]
    return Variant(kernel, (*_types(present), *["i32"] * sizes), constants, config.num_warps, config.num_stages)


@cache
def weights_variant(form: Form) -> Variant:
    """The program of `mlp_backward` that goes over rows."""
    types = _types((True, True, form.middle, True, form.middle, True, form.beside, True))
    config = form.config(MLP_WEIGHTS)
    blocks = {"BLOCK_M": config.block_k, "BLOCK_N": config.block_m, "BLOCK_K": config.block_n}
    constants = {**blocks, **form.constants()}
    return Variant(mlp_weights_kernel, (*types, *["i32"] * 10), constants, config.num_warps, config.num_stages)


def _types(present: tuple[bool, ...]) -> tuple[str | None, ...]:
    return tuple("*fp32" if one else None for one in present)


def catalog_entries() -> Iterator[Entry]:
    targets = tuple(name for name in TARGETS if name.startswith("sm_"))
    forms = {  # C, H, D, N, with w2
        "c256": (256, 256, 4, 92, True),
        "c100_two_layers": (100, 37, 2, 0, False),  # nothing aligned, masked steps; its example launches all three
    }
    for name, (C, H, D, N, middle) in forms.items():
        form, example = form_of(C, H, D, N, middle, split_precision()), partial(_example, C, H, D, N, middle)
        variants = {
            "forward": forward_variant(form, middle),
            "backward": backward_variant(form, middle, True),
            "weights": weights_variant(form),
        }
        for part, variant in variants.items() if middle else [("weights", variants["weights"])]:
            blocks = variant.constants
            tile = int(blocks["BLOCK_N"]) * int(blocks["BLOCK_K" if part == "weights" else "BLOCK_M"])
            budget = Budget(255, 61 << 10, 0, 0, spills=8 if part == "weights" else 0)
            yield Entry("prediction_heads", f"mlp_{part}_{name}_fp32", variant, tile, budget, example, targets)


def _example(C: int, H: int, D: int, N: int, middle: bool, device: torch.device) -> Callable[[], tuple[Tensor, ...]]:
    """Forward and backward over two tiles of rows, the second cut; hidden units as few as two steps of products take."""
    C, H = (64 if n % 64 == 0 else n for n in (C, H))
    rows, ends_in_sigmoid = 37, middle
    shapes = [(H, C), (H,), (H, H), (H,), (D, H), (D,), (N, C), (N,)]
    present = [True, True, middle, middle, True, True, N > 0, N > 0]
    parameters = (torch.randn(shape, device=device) / 8 if one else None for shape, one in zip(shapes, present))
    layers = Layers(*parameters)  # type: ignore[arg-type]
    x, dy, dz = (torch.randn(rows, n, device=device) for n in (C, D, N))

    def call() -> tuple[Tensor, ...]:
        y, z, h1, h2 = mlp_forward(x, layers, ends_in_sigmoid=ends_in_sigmoid)
        kept = Kept(h1, h2, y if ends_in_sigmoid else None)
        gradients = mlp_backward(dy, dz if N else None, x, kept, layers, with_dx=True)
        return tuple(t for t in (y, z, *gradients) if t is not None)

    return call
