"""What PTX's arithmetic means, on numpy arrays of one element a thread. Generated code calls these by name.

Approximate instructions (ex2.approx, rsqrt.approx, div.full, …) give the exact value, rounded.
"""

from __future__ import annotations

import numpy as np

Array = np.ndarray
TINY = np.finfo(np.float32).tiny  # what is smaller is flushed to zero by .ftz


def fma(a: Array, b: Array, c: Array) -> Array:
    """a * b + c in fp32: the product is exact in fp64."""
    exact = np.multiply(a, b, dtype=np.float64)
    exact += c
    return exact.astype(np.float32)


def flush(x: Array) -> Array:
    """Subnormal fp32 numbers as zero of their sign."""
    small = np.abs(x) < TINY
    return np.where(small, np.copysign(np.float32(0), x), x) if small.any() else x


def smaller(a: Array, b: Array) -> Array:
    """min of floats: the other one where one is NaN; -0 is less than +0."""
    return -larger(-a, -b)


def larger(a: Array, b: Array) -> Array:
    result = np.fmax(a, b)
    zeros = (a == 0) & (b == 0)
    return np.where(zeros, a + b, result) if zeros.any() else result


def bf16_to_f32(bits: Array) -> Array:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(x: Array) -> Array:
    """Bits of x rounded to nearest even; NaN is 0x7fff, as the instruction gives."""
    bits = x.view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    nan = x != x
    return np.where(nan, np.uint16(0x7FFF), rounded.astype(np.uint16)) if nan.any() else rounded.astype(np.uint16)


def f32_to_bf16_down(x: Array) -> Array:
    """Bits of x rounded towards zero."""
    nan = x != x
    return np.where(nan, np.uint16(0x7FFF), (x.view(np.uint32) >> np.uint32(16)).astype(np.uint16))


def f32_to_tf32(x: Array) -> Array:
    """x rounded to ten bits of fraction, ties away from zero; fp32 bits."""
    return (x.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)


def pack16(low: Array, high: Array) -> Array:
    """One 32-bit register of two 16-bit ones."""
    both = np.empty((low.size, 2), np.uint16)
    both[:, 0], both[:, 1] = low, high
    return both.view(np.uint32).ravel()


def pack32(low: Array, high: Array) -> Array:
    both = np.empty((low.size, 2), np.uint32)
    both[:, 0], both[:, 1] = low, high
    return both.view(np.uint64).ravel()


def half(register: Array, count: int, index: int) -> Array:
    """Part `index` of the `count` equal parts of a register, the lowest first."""
    parts = np.ascontiguousarray(register).view(f"u{register.itemsize // count}")
    return np.ascontiguousarray(parts[index::count])


def f16s(register: Array) -> Array:
    """All 16-bit floats in a register of any width, one after the other, in fp64."""
    return np.ascontiguousarray(register).view(np.float16).astype(np.float64)


def bf16s(register: Array) -> Array:
    return bf16_to_f32(np.ascontiguousarray(register).view(np.uint16)).astype(np.float64)


def f16s_back(values: Array) -> Array:
    return values.astype(np.float16).view(np.uint16)


def bf16s_back(values: Array) -> Array:
    return f32_to_bf16(values.astype(np.float32))


def divide(a: Array, b: Array) -> Array:
    """Integer quotient, rounded towards zero."""
    return ((a - np.fmod(a, b)) // b).astype(a.dtype)


def remainder(a: Array, b: Array) -> Array:
    return np.fmod(a, b)


def multiply_high(a: Array, b: Array) -> Array:
    """The upper half of the product of two 32-bit or 64-bit integers."""
    if a.dtype.itemsize == 4:
        return (np.multiply(a, b, dtype=a.dtype.str.replace("4", "8")) >> 32).astype(a.dtype)
    exact = (np.broadcast_to(a, np.broadcast(a, b).shape).astype(object) * b.astype(object)) >> 64
    return exact.astype(a.dtype)


def extract(a: Array, position: Array, length: Array) -> Array:
    """bfe: `length` bits from `position` on, signed or not as a's dtype says."""
    bits = 8 * a.dtype.itemsize
    unsigned = np.dtype(f"u{a.dtype.itemsize}")
    position, length = (np.minimum(np.asarray(v) & 255, bits).astype(np.int64) for v in (position, length))
    if a.dtype.kind == "u":
        wide = a.astype(object) if bits == 64 else a.astype(np.uint64)
        return ((wide >> position.astype(wide.dtype)) & ((1 << length.astype(wide.dtype)) - 1)).astype(unsigned)
    end = np.minimum(position + length, bits)
    up = (bits - end).astype(a.dtype)
    down = np.minimum(up + position, bits - 1).astype(a.dtype)
    return np.where(length == 0, a.dtype.type(0), (a << up) >> down)


def insert(a: Array, b: Array, position: Array, length: Array) -> Array:
    """bfi: the low `length` bits of a in place of those of b from `position` on; 32 bits."""
    position, length = (np.minimum(np.asarray(v) & 255, 32).astype(np.uint64) for v in (position, length))
    mask = (((np.uint64(1) << length) - np.uint64(1)) << position) & np.uint64(0xFFFFFFFF)
    return ((b.astype(np.uint64) & ~mask) | ((a.astype(np.uint64) << position) & mask)).astype(np.uint32)


def logic3(a: Array, b: Array, c: Array, table: int) -> Array:
    """lop3: any function of three bits, by its table of eight."""
    result = a & np.uint32(0)
    for index in range(8):
        if table >> index & 1:
            result = result | ((a if index & 4 else ~a) & (b if index & 2 else ~b) & (c if index & 1 else ~c))
    return result


def permute(a: Array, b: Array, selector: Array) -> Array:
    """prmt: four bytes chosen from the eight of b:a; bit 3 of a choice repeats the byte's sign."""
    pool = a.astype(np.uint64) | (np.asarray(b).astype(np.uint64) << np.uint64(32))
    result = np.zeros_like(pool)
    for index in range(4):
        choice = (np.asarray(selector).astype(np.uint64) >> np.uint64(4 * index)) & np.uint64(15)
        byte = (pool >> ((choice & np.uint64(7)) * np.uint64(8))) & np.uint64(255)
        byte = np.where(choice & np.uint64(8), np.where(byte & np.uint64(128), 255, 0), byte).astype(np.uint64)
        result |= byte << np.uint64(8 * index)
    return result.astype(np.uint32)


def funnel(low: Array, high: Array, amount: Array, left: bool, clamp: bool) -> Array:
    """shf: the 64 bits high:low, shifted; the upper half (left) or the lower one (right)."""
    amount = np.minimum(amount, 32) if clamp else np.asarray(amount) & 31
    both = (np.asarray(high).astype(np.uint64) << np.uint64(32)) | np.asarray(low).astype(np.uint64)
    amount = np.asarray(amount).astype(np.uint64)
    shifted = (both << amount) >> np.uint64(32) if left else both >> amount
    return shifted.astype(np.uint32)


def count_bits(a: Array) -> Array:
    return np.unpackbits(a.view(np.uint8)).reshape(a.size, -1).sum(1, dtype=np.uint32)


def leading_zeros(a: Array) -> Array:
    return (8 * a.dtype.itemsize - np.frexp(a.astype(np.float64))[1]).astype(np.uint32)


def reverse_bits(a: Array) -> Array:
    one, bits = np.uint32(1), 32
    return sum(((a >> np.uint32(i)) & one) << np.uint32(bits - 1 - i) for i in range(bits))  # type: ignore[return-value]


ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def to_integer(x: Array, mode: str, kind: str) -> Array:
    """cvt from float to integer: rounded, clamped to the integer's range, NaN as 0."""
    limits = np.iinfo(kind)
    rounded = np.nan_to_num(ROUND[mode](x.astype(np.float64)), nan=0.0, posinf=np.inf, neginf=-np.inf)
    inside = np.clip(rounded, float(limits.min), float(limits.max))
    result = np.where(inside >= float(limits.max), limits.max, 0).astype(kind)
    return np.where(inside >= float(limits.max), result, inside.astype(kind))


def ex2(x: Array) -> Array:
    return np.exp2(x.astype(np.float64)).astype(np.float32)


def lg2(x: Array) -> Array:
    return np.log2(x.astype(np.float64)).astype(np.float32)


def rsqrt(x: Array) -> Array:
    return (1.0 / np.sqrt(x.astype(np.float64))).astype(np.float32)


def tanh(x: Array) -> Array:
    return np.tanh(x.astype(np.float64)).astype(np.float32)


def sine(x: Array) -> Array:
    return np.sin(x.astype(np.float64)).astype(np.float32)


def cosine(x: Array) -> Array:
    return np.cos(x.astype(np.float64)).astype(np.float32)
