"""What the 32 threads of a warp do together: matrix products, shuffles, reductions. All warps of a program at once.

Layouts of matrix fragments: PTX ISA, "Warp Level Matrix Multiply-Accumulate Instructions". In each, thread 4 g + t of a warp
holds elements of row (or column) g.
"""

from __future__ import annotations

import numpy as np

from detr_fast.testing.ptx.arithmetic import bf16_to_f32

Array = np.ndarray


def multiply(kind: str, a: tuple[Array, ...], b: tuple[Array, ...], c: tuple[Array, ...]) -> tuple[Array, ...]:
    """m16n8k16 or m16n8k8 of 16-bit elements (two a register), m16n8k8 of tf32: registers of A, B, C to those of D."""
    left = _values(kind, a)  # (registers, warps, g, t, elements a register)
    right = _values(kind, b)
    halves, warps = len(b), left.shape[1]  # of k
    each = left.shape[-1]
    # registers of A: (half of k, half of the 16 rows)
    left = left.reshape(halves, 2, warps, 8, 4, each).transpose(2, 1, 3, 0, 4, 5).reshape(warps, 16, -1)
    right = right.transpose(1, 0, 3, 4, 2).reshape(warps, -1, 8)
    product = np.matmul(left, right).reshape(warps, 2, 8, 4, 2)  # (half of the rows, g, t, column)
    sums = np.stack(c).reshape(2, 2, warps, 8, 4)  # (half of the rows, column, …)
    result = (product.transpose(1, 4, 0, 2, 3) + sums).astype(np.float32).reshape(4, -1)
    return tuple(result)


def _values(kind: str, registers: tuple[Array, ...]) -> Array:
    """(registers, warps, 8, 4, elements a register) in fp64: products and sums are then rounded once."""
    words = np.stack(registers)
    if kind == "tf32":
        values = (words & np.uint32(0xFFFFE000)).view(np.float32)
    elif kind == "f16":
        values = words.view(np.float16)
    else:
        values = bf16_to_f32(words.view(np.uint16))
    return values.astype(np.float64).reshape(len(registers), -1, 8, 4, 1 if kind == "tf32" else 2)


def matrix_rows(addresses: Array, matrices: int) -> Array:
    """ldmatrix: the address of each row, (matrices, warps, 8); thread 8 i + r names row r of matrix i."""
    return addresses.reshape(-1, 32)[:, : 8 * matrices].reshape(-1, matrices, 8).transpose(1, 0, 2)


def matrix_registers(rows: Array, transposed: bool) -> tuple[Array, ...]:
    """rows: (matrices, warps, 8, 8), 16 bits each, to a 32-bit register a matrix."""
    if transposed:
        rows = rows.swapaxes(-1, -2)
    words = np.ascontiguousarray(rows).view(np.uint32)  # (matrices, warps, 8, 4)
    return tuple(words.reshape(len(words), -1))


def shuffle_source(mode: str, b: Array, c: Array) -> Array:
    """The thread that each thread reads: itself where that one lies outside its segment."""
    lane = np.arange(b.size) & 31
    b, c = b.astype(np.int64) & 31, c.astype(np.int64)
    bound, segment = c & 31, (c >> 8) & 31
    most = (lane & segment) | (bound & ~segment)
    least = lane & segment
    if mode == "up":
        source = lane - b
        inside = source >= most
    elif mode == "down":
        source = lane + b
        inside = source <= most
    elif mode == "bfly":
        source = lane ^ b
        inside = source <= most
    else:
        source = least | (b & ~segment)
        inside = source <= most
    source = np.where(inside, source, lane)
    return (np.arange(b.size) & ~31) + source
