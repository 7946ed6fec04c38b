"""A GPU that is not there, with a libcuda: kernels run as compiled PTX on CPU memory, by Triton's launcher's arguments and by the driver's."""

from __future__ import annotations

import ctypes
import gc
import struct
from contextlib import contextmanager

import torch
from detr_fast.kernels import launch
from detr_fast.kernels.catalog import CATALOG
from triton.runtime import driver as runtime

from detr_fast import dispatch, implementation
from detr_fast.ops import boundary
from detr_fast.testing.ptx.driver import LIMIT, EmulatedGPU, Emulation, run_grid
from detr_fast.testing.ptx.translator import translate
from tests.native.stub_driver import StubDriver

REACH = 4096  # bytes that a kernel may touch from an address on: nobody tells the emulation how many there are


def memory(address):
    return torch.frombuffer((ctypes.c_uint8 * REACH).from_address(address), dtype=torch.uint8)


class AddressedGPU(EmulatedGPU):
    """Takes addresses in tensors' places."""

    def __init__(self):
        super().__init__()
        self.kernels, self.launched = [], []
        self.emulation = Emulation(LIMIT, frozenset())

    def load_binary(self, name, binary, shared, device):
        module, program, *rest = super().load_binary(name, binary, shared, device)
        self.kernels.append(program)
        return module, len(self.kernels), *rest

    def run(self, function, grid, types, values):
        text, shared = self.kernels[function - 1]
        taken = [
            (str(index), kind, memory(value) if kind[0] == "*" and type(value) is int else value)
            for index, (kind, value) in enumerate(zip(types, values))
            if kind not in (None, "constexpr")
        ]
        run_grid(translate(text), grid, taken, shared, self.emulation)

    def _launcher(self, source, metadata):
        names = source.fn.arg_names
        types = [source.signature.get(name, source.signature.get(index)) for index, name in enumerate(names)]
        return lambda x, y, z, stream, function, *rest: self.run(function, (x, y, z), types, rest[4:])


class EmulatedDriver(StubDriver):
    """broken: called with a kernel's name and the values of its parameters, gives what it is launched with."""

    def __init__(self, gpu):
        super().__init__(gpu)
        self.broken = lambda name, values: values

    def _ask(self, function, index, offset, size):
        parameters = translate(self.stub.kernels[function - 1][0]).kernel.parameters
        if index >= len(parameters):
            return 1
        size[0] = {"64": 8, "32": 4}[parameters[index][1][-2:]]
        return 0

    def _launch(self, configuration, function, parameters, extra):
        how = configuration[0]
        formats, _ = self.entries[function]
        present = [f for f in formats if f is not None]
        values = [
            struct.unpack(f, ctypes.string_at(parameters[i], struct.calcsize(f)))[0] for i, f in enumerate(present)
        ]
        types = [{"<Q": "*u8", "<i": "i32", "<q": "i64", "<f": "fp32"}[f] for f in present]
        self.launches += 1
        name = translate(self.stub.kernels[function - 1][0]).kernel.name
        self.stub.run(function, (how.x, how.y, how.z), types, self.broken(name, values))
        return 0


def forget_kernels():
    """Nothing holds on to kernels of a driver that goes away."""
    launch.forget_programs()
    dispatch.forget_decisions()
    for op in boundary.ops:
        if op.native is not None:
            op.native.programs()  # none, and those of before are gone
    for kernel in {one.variant.kernel for one in CATALOG}:
        kernel.device_caches.clear()
    gc.collect()


@contextmanager
def emulated_driver(monkeypatch):
    """Inside the block kernels that are asked for by name run there, on CPU tensors; the value is the driver."""
    from triton import knobs

    gpu = AddressedGPU()
    monkeypatch.setattr(runtime, "_active", gpu)
    for module in (implementation, boundary):
        monkeypatch.setattr(module, "INTERPRETING", True)
    forget_kernels()
    knobs.runtime.kernel_load_start_hook.add(gpu.remember_files)
    try:
        yield EmulatedDriver(gpu).use(monkeypatch)
    finally:
        knobs.runtime.kernel_load_start_hook.remove(gpu.remember_files)
        forget_kernels()
