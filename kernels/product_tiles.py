# mypy: allow-incomplete-defs
"""What kernels around a matrix product share: tiles of x @ w^T in fp32, activations, what a product's programs depend on.

Offsets from the first row of a tile fit 32 bits (rows lie at most 2**23 elements apart); where a tile starts is computed
in 64. Sources: Hendrycks and Gimpel, 2016, arXiv:1606.08415 (GELU); Elfwing et al., 2017, arXiv:1702.03118 (SiLU).
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from . import launch as launching
from .attention_tiles import dot
from .configs import MatmulConfig
from .dropout import Dropout, dropout_arguments, has_pairs
from .launch import Variant, jit, tl
from .rows import run_pointers

GROUP = 8  # tiles of rows that share their columns' weights while these are in the L2 cache


@jit
def plus(a, b, PRECISION: tl.constexpr):
    """a + b in their dtype; in fp32 in Triton's interpreter, which has no arithmetic in bf16."""
    if PRECISION == "interpreted":
        return (a.to(tl.float32) + b.to(tl.float32)).to(a.dtype)
    return a + b


@jit
def product(
    x_ptr,
    x_start,
    w_ptr,
    w_stride,
    columns,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    VEC: tl.constexpr,
    PRECISION: tl.constexpr,
    BY_ROWS: tl.constexpr = True,
    added_ptr=None,
    added_start=0,
    bias_ptr=None,
):
    """A tile of x @ w^T, fp32 (BLOCK_M, BLOCK_N), or of (x + added) @ w^T; plus the bias, at the tile's first column.

    x_start, added_start: offsets of the tile's rows (BLOCK_M, 1). w_ptr: at the tile's first column, of `columns` that
    remain. BY_ROWS: w is (N, K); otherwise it lies transposed, as (K, N).
    """
    k = tl.arange(0, BLOCK_K)
    n = tl.arange(0, BLOCK_N)
    if BY_ROWS:  # columns past the end read the last one again: no mask in the loop, and nothing of them is stored
        w_start = tl.minimum(n, columns - 1)[:, None] * w_stride
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if (
        bias_ptr is not None
    ):  # first, under the loop's first loads: behind it, each lane would hold its columns' beside the sums
        accumulator += tl.load(bias_ptr + n, mask=n < columns, other=0.0).to(tl.float32)[None, :]
    for start in range(0, K, BLOCK_K):
        here = k // VEC < (K - start) // VEC
        pointers = run_pointers(x_ptr + start, x_start, k[None, :], VEC)
        x = tl.load(pointers) if EVEN_K else tl.load(pointers, mask=here[None, :], other=0.0)
        if added_ptr is not None:
            pointers = run_pointers(added_ptr + start, added_start, k[None, :], VEC)
            added = tl.load(pointers) if EVEN_K else tl.load(pointers, mask=here[None, :], other=0.0)
            x = plus(x, added, PRECISION)
        if BY_ROWS:
            pointers = run_pointers(w_ptr + start, w_start, k[None, :], VEC)
            w = tl.load(pointers) if EVEN_K else tl.load(pointers, mask=here[None, :], other=0.0)
            accumulator = dot(x, w.T, accumulator, PRECISION)
        else:
            inside = n[None, :] // VEC < columns // VEC
            inside = inside if EVEN_K else here[:, None] & inside
            w = tl.load(run_pointers(w_ptr, k[:, None] * w_stride, n[None, :], VEC), mask=inside, other=0.0)
            accumulator = dot(x, w, accumulator, PRECISION)
            w_ptr += BLOCK_K * w_stride.to(tl.int64)
    return accumulator


@jit
def tile_of(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """This program's first row and column: neighbours in time share weights and rows in the L2 cache."""
    program = tl.program_id(0)
    across, down = tl.cdiv(N, BLOCK_N), tl.cdiv(M, BLOCK_M)
    group = program // (GROUP_M * across)
    rows = tl.minimum(down - group * GROUP_M, GROUP_M)
    within = program % (GROUP_M * across)
    return (group * GROUP_M + within % rows) * BLOCK_M, within // rows * BLOCK_N


@jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@jit
def activate(x, ACTIVATION: tl.constexpr):
    """The activation of x and its derivative; what is not used is not computed."""
    y, slope = x, tl.full(x.shape, 1.0, tl.float32)
    if ACTIVATION == "relu":
        y, slope = tl.where(x < 0, 0.0, x), tl.where(x > 0, 1.0, 0.0)  # NaN stays NaN, as torch's
    if ACTIVATION == "gelu":
        below = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        y, slope = x * below, below + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    if ACTIVATION == "gelu_tanh":  # (1 + tanh(u)) / 2 is the sigmoid of 2u
        share = sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        y = x * share
        slope = share + y * (1.0 - share) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    if ACTIVATION == "silu":
        share = sigmoid(x)
        y, slope = x * share, share + x * share * (1.0 - share)
    if ACTIVATION == "quick_gelu":
        share = sigmoid(1.702 * x)
        y, slope = x * share, share + 1.702 * x * share * (1.0 - share)
    return y, slope


@jit
def store_tile(base, row_stride, value, rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, VEC: tl.constexpr):
    """Store what exists of a tile: `rows` and `columns` remain from base on."""
    m, n = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
    mask = (m < rows) & (n // VEC < columns // VEC)
    tl.store(run_pointers(base, m * row_stride, n, VEC), value.to(base.dtype.element_ty), mask=mask)


@jit
def store_active(base, y, first_m, first_n, rows, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Store which elements of y (BLOCK_M, BLOCK_N), of 16 bits and none under 0, are active, a bit each, as `active_words` has them.

    Tensor cores leave every eighth column of a row to one thread (on sm_90; on sm_80 to the four warps' threads), in pairs
    of neighbours, whose words are neighbours, too. NaN is active, as PyTorch's.
    """
    if has_pairs():
        first, second = tl.split(tl.reshape(y.to(tl.uint16, bitcast=True), (BLOCK_M, BLOCK_N // 2, 2)))
        pairs = tl.reshape(first.to(tl.uint32) | second.to(tl.uint32) << 16, (BLOCK_M, BLOCK_N // 8, 4))
        # As floats of 16 bits, whatever they are, both are over 0, or no numbers, where they are not 0.
        over = tl.inline_asm_elementwise(
            "set.gtu.u32.f16x2 $0, $1, $2;", "=r,r,r", [pairs, pairs * 0], dtype=tl.uint32, is_pure=True, pack=1
        )
        words = tl.xor_sum(over & (0x10001 << tl.arange(0, BLOCK_N // 8))[None, :, None].to(tl.uint32), 1)
    else:
        active = tl.reshape(~(y.to(tl.float32) <= 0), (BLOCK_M, BLOCK_N // 8, 4, 2))
        words = tl.sum(tl.sum(active.to(tl.uint32) << _bit_of(BLOCK_N), 3), 1)
    pointers, exists = _words_of(base, first_m, first_n, rows, N, BLOCK_M, BLOCK_N)
    tl.store(pointers, words.to(tl.int32, bitcast=True), mask=exists)


@jit
def load_active(base, first_m, first_n, rows, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """A tile's words, two in each of (BLOCK_M, 4), int32; none active in rows that don't exist."""
    pointers, exists = _words_of(base, first_m, first_n, rows, N, BLOCK_M, BLOCK_N)
    return tl.load(pointers, mask=exists, other=0)


@jit
def is_active(words, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which elements of a tile (BLOCK_M, BLOCK_N) are active, from its words."""
    words = words.to(tl.uint32, bitcast=True)[:, None, :, None] >> _bit_of(BLOCK_N)
    return tl.reshape((words & 1) != 0, (BLOCK_M, BLOCK_N))


@jit
def _bit_of(BLOCK_N: tl.constexpr):
    """Which bit of a pair of words each element of a row is, in blocks of 8 columns, which are four pairs of neighbours."""
    return tl.arange(0, BLOCK_N // 8)[None, :, None, None] + 16 * tl.arange(0, 2)[None, None, None, :]


@jit
def _words_of(base, first_m, first_n, rows, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where pairs of words lie, (BLOCK_M, 4), and which exist."""
    tl.static_assert(BLOCK_N == 128)
    row_pairs = tl.cdiv(N, BLOCK_N) * 4
    m = tl.arange(0, BLOCK_M)[:, None]
    base = base.to(tl.pointer_type(tl.int32)) + (first_m.to(tl.int64) * row_pairs + first_n // BLOCK_N * 4)
    return base + (m * row_pairs + tl.arange(0, 4)[None, :]), m < rows


class Form(NamedTuple):
    """What the programs of a product depend on, besides which tensors are there."""

    dtype: torch.dtype
    activation: str
    even: bool  # K is a multiple of every BLOCK_K
    vector: int
    precision: str

    def constants(self, config: MatmulConfig) -> dict[str, int | str | bool]:
        return {
            "ACTIVATION": self.activation,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_K": config.block_k,
            "GROUP_M": GROUP,
            "EVEN_K": self.even,
            "VEC": self.vector,
            "PRECISION": self.precision,
        }


def grid_of(variant: Variant, rows: int, columns: int) -> tuple[int]:
    """The grid of a program that takes its tile by `tile_of`."""
    blocks = variant.constants
    return (-(-rows // blocks["BLOCK_M"]) * -(-columns // blocks["BLOCK_N"]),)


@cache
def _interpreted() -> bool:
    return launching.triton is not None and bool(launching.triton.knobs.runtime.interpret)


def precision(dtype: torch.dtype) -> str:
    """How `tl.dot` multiplies fp32 operands: exactly, or as tf32 where torch's setting of matmul precision allows it."""
    if _interpreted():
        return "interpreted"
    rounds = (
        dtype is torch.float32
        and torch._C._get_fp32_precision_getter("cuda", "matmul") == "tf32"
        and not torch.version.hip
    )
    return "tf32" if rounds else "ieee"


def split_precision() -> str:
    """As `precision` of fp32, by NVIDIA's tensor cores: as exact as fp32 is by three products of tf32, of factors split in two."""
    exact = precision(torch.float32)
    return {"ieee": "split", "interpreted": "interpreted_split"}.get(exact, exact)


def drawn(dropout: Dropout | None, sizes: tuple[int, ...], masks: bool = True) -> tuple[object, ...]:
    """The arguments from the seed on: the seed, the sizes, and what dropout is."""
    seed = dropout.seed if dropout is not None and masks else None
    return (seed, *sizes, *dropout_arguments(dropout))


def active_words(rows: int, columns: int) -> tuple[int, int]:
    """The shape of what says which elements of (rows, columns) are active, int16, for which a tile has 128 columns.

    Of such a tile's row, bit i of word j is column 8 * i + j.
    """
    return rows, -(-columns // 128) * 8


def plus_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """total + a @ b, in place; 16 bits in fp32 from end to end: they would round each block's part, and fp16 overflow."""
    if a.dtype.itemsize > 2:
        return a @ b if total is None else total.addmm_(a, b)
    if not sums_16_bits_in_fp32(a.device):
        if total is None:
            total = torch.zeros((a.shape[0], b.shape[1]), dtype=torch.float32, device=a.device)
        return total.addmm_(a.float(), b.float())
    if total is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    if torch.compiler.is_compiling() or not _has_product_that_adds(total):  # nor has Inductor
        return total.add_(torch.mm(a, b, out_dtype=torch.float32))
    return torch.ops.aten.addmm.dtype_out(total, a, b, torch.float32, out=total)


def _has_product_that_adds(total: Tensor) -> bool:
    return (type(total) is Tensor and total.is_cuda) or adds_without_memory()


@cache
def adds_without_memory() -> bool:
    """Whether PyTorch knows the product that adds in fp32 for meta and fake tensors: in 2.11 it takes the dtype for beta."""
    with _disable_current_modes():
        total, half = (torch.empty(1, 1, dtype=dtype, device="meta") for dtype in (torch.float32, torch.float16))
        try:
            torch.ops.aten.addmm.dtype_out(total, half, half, torch.float32, out=total)
        except TypeError:
            return False
    return True


def has_product_in_fp32(x: Tensor) -> bool:
    """Whether `plus_product` multiplies x of 16 bits as fast as a product of 16 bits, or on the CPU, where it is tested."""
    return x.dtype.itemsize == 2 and (x.device.type == "cpu" or sums_16_bits_in_fp32(x.device))


_MM_OVERLOADS = torch.ops.aten.mm.overloads()


@cache
def sums_16_bits_in_fp32(device: torch.device) -> bool:
    """Whether PyTorch has a product of 16-bit matrices that it returns in fp32: on CUDA (from torch 2.8 on), not on the CPU.

    ROCm's came later and refuses bf16 in many builds, so it counts as without. On meta tensors what CUDA does is counted.
    """
    return "dtype" in _MM_OVERLOADS and torch.version.hip is None and device.type in ("cuda", "meta")
