"""What it takes to launch a compiled kernel by CUDA's driver itself, from C++ (`native/launch.h`).

Triton's launcher is a Python function, and behind it one in C that takes each argument from a Python object. Who keeps a
launch's arguments as bytes needs neither. What is launched is the same: `entry` names nothing but what it knows how to launch.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

# libcuda's functions that native/launch.h calls, in its order.
FUNCTIONS = (
    "cuLaunchKernelEx",
    "cuGetErrorString",
    "cuCtxGetCurrent",
    "cuDeviceGet",
    "cuDevicePrimaryCtxRetain",
    "cuCtxSetCurrent",
)
SLOT = 8  # bytes for each parameter, of which a smaller one takes the first
MAX_SHARED = 228 << 10  # bytes; with more, Triton's launcher sets a mode
WAIT = "griddepcontrol.wait"  # what a kernel begins with that may start early (`kernels.overlap`)
RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED
POINTER, INT32 = "<Q", "<i"
_FORMATS = {"i32": INT32, "i64": "<q", "fp32": "<f"}  # by Triton's types
NUMBERS = tuple(_FORMATS.values())
_SCRATCH = (POINTER, POINTER)  # Triton's kernels end with two pointers to scratch memory, null where they use none


class Entry(NamedTuple):
    """A kernel as the driver knows it.

    function: its CUfunction. threads: in a block. shared: bytes. overlaps: whether it may start before what is launched ahead of it
    ends. formats: `struct`'s, of each run-time argument, None for one that is left out.
    """

    function: int
    threads: int
    shared: int
    overlaps: bool
    formats: tuple[str | None, ...]

    def parameters(self, values: Sequence[Any]) -> bytes:
        """A slot for each parameter, of numbers. Raises struct.error or OverflowError for one that doesn't fit."""
        packed = [struct.pack(f, v) for f, v in zip(self.formats, values, strict=True) if f is not None]
        return b"".join(one.ljust(SLOT, b"\0") for one in [*packed, *(b"" for _ in _SCRATCH)])


@cache
def library() -> Any:
    """libcuda, or None where there is none."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


def functions() -> tuple[int, ...] | None:
    """Addresses of FUNCTIONS; None where they are not all there."""
    try:
        found = [getattr(library(), name) for name in FUNCTIONS]
    except AttributeError:
        return None
    return tuple(ctypes.cast(one, ctypes.c_void_p).value or 0 for one in found)


@contextmanager
def relaxed_captures() -> Iterator[None]:
    """Inside the block nothing that this thread does, such as to wait or to allocate, spoils a CUDA graph that another captures."""
    exchange = getattr(library(), "cuThreadExchangeStreamCaptureMode", None)
    mode = ctypes.c_int(RELAXED)
    if exchange is not None:
        exchange(ctypes.byref(mode))  # which leaves the mode of before there
    try:
        yield
    finally:
        if exchange is not None:
            exchange(ctypes.byref(mode))


def entry(kernel: Any, types: Sequence[str | None]) -> Entry | None:
    """Of a kernel that Triton has compiled and loaded, with run-time arguments of these types; None where only Triton knows how to
    launch it: with clusters, scratch memory or instrumentation, on another driver, or with other parameters than expected."""
    formats = tuple(None if t is None else POINTER if t[0] == "*" else _FORMATS.get(t, "") for t in types)
    if "" in formats or not _is_plain(kernel):
        return None
    expected = [struct.calcsize(f) for f in (*formats, *_SCRATCH) if f is not None]
    if _sizes(kernel.function, len(expected) + 1) != expected:
        return None
    threads = kernel.metadata.num_warps * kernel.metadata.target.warp_size
    return Entry(
        kernel.function, threads, kernel.metadata.shared, bool(getattr(kernel.run, "launch_pdl", False)), formats
    )


def overlap(kernel: Any, overlapping: bool) -> None:
    """Let Triton's launcher launch a kernel so, from now on; the kernel's own code is the same. One that is not seen to wait, such as
    code for an older GPU (TRITON_OVERRIDE_ARCH), never overlaps: it would read what is not written yet."""
    overlapping = overlapping and WAIT in kernel.asm.get("ptx", "")
    if getattr(kernel.run, "launch_pdl", overlapping) != overlapping:
        kernel.run.launch_pdl = overlapping


def _is_plain(kernel: Any) -> bool:
    """Whether Triton's launcher does no more for it than to launch it."""
    metadata, launcher = kernel.metadata, type(kernel.run)
    without = ("launch_cooperative_grid", "global_scratch_size", "profile_scratch_size")
    return (
        (launcher.__module__, launcher.__name__) == ("triton.backends.nvidia.driver", "CudaLauncher")
        and getattr(metadata, "num_ctas", None) == 1
        and all(getattr(metadata, name, None) == 0 for name in without)
        and hasattr(kernel.run, "launch_pdl")
        and not getattr(metadata, "tensordesc_meta", None)
        and not getattr(metadata, "instrumentation_mode", "")
        and metadata.shared <= MAX_SHARED
    )


def _sizes(function: int, most: int) -> list[int]:
    """Bytes of a kernel's parameters, of the first `most` where it has more; none where the driver is too old to tell (CUDA 12.4)."""
    ask = getattr(library(), "cuFuncGetParamInfo", None)
    found: list[int] = []
    offset, size = ctypes.c_size_t(), ctypes.c_size_t()
    while ask is not None and len(found) < most:
        arguments = ctypes.c_void_p(function), ctypes.c_size_t(len(found))
        if ask(*arguments, ctypes.byref(offset), ctypes.byref(size)) != 0:
            break
        found.append(size.value)
    return found
