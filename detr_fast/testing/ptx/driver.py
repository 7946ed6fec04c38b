"""Triton's driver of a GPU that is not there: programs are compiled for sm_80 and their PTX runs on CPU tensors."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from detr_fast import dispatch, implementation
from detr_fast.kernels import launch
from detr_fast.ops import boundary
from detr_fast.testing.interpreter import poisoned
from detr_fast.testing.ptx.machine import Machine
from detr_fast.testing.ptx.memory import GlobalMemory
from detr_fast.testing.ptx.shadow import Clock
from detr_fast.testing.ptx.translator import Program, translate

LIMIT = 20_000_000
DEVICE = 80  # a number that no real device has: Triton caches programs by it


@dataclass
class Loaded:
    """A program and the bytes of shared memory that it takes."""

    program: Program
    shared: int


@dataclass
class Emulation:
    """launches: kernel name and grid of each launch, in order.

    limit: instructions that one program may run. identical: arguments that several programs may write, the same values.
    """

    limit: int
    identical: frozenset[str]
    launches: list[tuple[str, tuple[int, int, int]]] = field(default_factory=list)

    def counts(self) -> Counter[str]:
        """Number of launches by kernel name."""
        return Counter(name for name, _ in self.launches)


class EmulatedGPU:
    """What Triton asks of a driver."""

    def __init__(self) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", 80, 32)
        self.emulation: Emulation | None = None
        self.files: Any = None
        self.utils = self
        self.launcher_cls = self._launcher

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return DEVICE

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 163 << 10, "multiprocessor_count": 2, "warpSize": 32}

    def remember_files(self, module: object, function: object, name: str, files: Any, hash: str) -> None:
        """Called by Triton before it loads a program: where its PTX lies."""
        self.files = files

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        path = next(Path(path) for file, path in self.files.items() if file.endswith(".ptx"))
        return object(), (path.read_text(), shared), 32, 0, 1024

    def unload_module(self, module: object) -> None:
        pass

    def _launcher(self, source: Any, metadata: Any) -> Callable[..., None]:
        signature = source.signature  # types by argument; "constexpr" for what the program does not take
        names = source.fn.arg_names
        kinds = [signature.get(name, signature.get(index)) for index, name in enumerate(names)]

        def run(x: int, y: int, z: int, stream: int, function: Any, *rest: Any) -> None:
            arguments = rest[4:]  # after two kinds of metadata and two hooks
            taken = [
                (name, kind, value)
                for name, kind, value in zip(names, kinds, arguments)
                if kind not in (None, "constexpr")
            ]
            assert self.emulation is not None
            text, shared = function
            run_grid(translate(text), (x, y, z), taken, shared, self.emulation)

        return run


def run_grid(
    program: Program,
    grid: tuple[int, int, int],
    arguments: list[tuple[str, str, Any]],
    shared: int,
    emulation: Emulation,
) -> None:
    """Run all programs of a grid; arguments: name, Triton's type and value of each that the program takes."""
    emulation.launches.append((program.kernel.name, grid))
    clock = Clock()
    tensors = {name: value for name, kind, value in arguments if isinstance(value, Tensor)}
    reached = launch.reached(value for _, _, value in arguments)
    tensors |= {f"tensor {i} of a table": tensor for i, tensor in enumerate(reached)}
    memory = GlobalMemory(tensors, program.granule_global, clock, emulation.identical)
    values = [_bits(kind, value) for _, kind, value in arguments]
    parameters = dict(zip((name for name, _ in program.kernel.parameters), [*values, 0, 0]))
    for z in range(grid[2]):
        for y in range(grid[1]):
            for x in range(grid[0]):
                Machine(program, memory, clock, parameters, (x, y, z), grid, shared, emulation.limit).run()


def _bits(kind: str, value: Any) -> int:
    if isinstance(value, Tensor):
        return value.data_ptr()
    if kind == "fp32":
        return int(struct.unpack("<I", struct.pack("<f", value))[0])
    return int(value) & (2**64 - 1)


_gpu: EmulatedGPU | None = None


@contextmanager
def emulated_gpu(*, limit: int = LIMIT, identical_writes: Iterable[str] = ()) -> Iterator[Emulation]:
    """Inside the block, launches of Triton kernels on CPU tensors run their compiled PTX, with all checks.

    limit: instructions that one program may run. identical_writes: names of kernel arguments that several programs of a
    launch may write, provided that they write the same values and each reads only what it wrote. Raises RuntimeError where
    kernels are interpreted.
    """
    from triton import knobs
    from triton.runtime import driver

    if knobs.runtime.interpret:
        raise RuntimeError("kernels are interpreted, and never compiled: unset TRITON_INTERPRET")
    global _gpu
    _gpu = _gpu or EmulatedGPU()
    with ExitStack() as stack:
        for module in (implementation, boundary):  # ops asked for their kernels by name take CPU tensors, too
            stack.enter_context(mock.patch.object(module, "INTERPRETING", True))
        for op in dispatch._ops.values():
            stack.callback(op.forget)
        stack.enter_context(mock.patch.object(driver, "_active", _gpu))
        stack.enter_context(mock.patch.object(_gpu, "emulation", Emulation(limit, frozenset(identical_writes))))
        stack.enter_context(launch.allocating_with(poisoned))
        knobs.runtime.kernel_load_start_hook.add(_gpu.remember_files)
        stack.callback(knobs.runtime.kernel_load_start_hook.remove, _gpu.remember_files)
        assert _gpu.emulation is not None
        yield _gpu.emulation
