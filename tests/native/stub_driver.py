"""Functions in libcuda's place, as far as launches by the driver call them; what they launch, a stub GPU writes down."""

from __future__ import annotations

import ctypes
import re
import struct
import tempfile
from ctypes import CFUNCTYPE, POINTER, c_char_p, c_int, c_size_t, c_uint, c_void_p
from functools import lru_cache

from detr_fast.kernels import driver, launch
from detr_fast.kernels.analysis import nvidia_tool

FAULT, MESSAGE = 700, b"an illegal memory access was encountered"


@lru_cache(maxsize=256)
def sizes_of(cubin: bytes) -> dict[int, int]:
    """Bytes of each parameter of the kernel in a machine program."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = nvidia_tool("cuobjdump", "--dump-elf", file.name)
    found = re.findall(r"Ordinal\s*:\s*0x(\w+)\s+Offset\s*:\s*0x\w+\s+Size\s*:\s*0x(\w+)", text)
    return {int(ordinal, 16): int(size, 16) for ordinal, size in found}


class Configuration(ctypes.Structure):
    _fields_ = [
        *((name, c_uint) for name in ("x", "y", "z", "threads", "threads_y", "threads_z", "shared")),
        ("stream", c_void_p),
        ("attributes", c_void_p),
        ("count", c_uint),
    ]


class StubDriver:
    """calls: names of the functions called, but launches. fault: what a launch returns. wider: bytes that each parameter seems to
    have more than it has."""

    def __init__(self, stub):
        self.stub, self.calls, self.launches = stub, [], 0
        self.fault, self.wider, self.context = 0, 0, 1
        self.entries = {}  # by CUfunction: formats of run-time arguments, and the constants behind them
        self.cuLaunchKernelEx = CFUNCTYPE(c_int, POINTER(Configuration), c_void_p, POINTER(c_void_p), c_void_p)(
            self._launch
        )
        self.cuGetErrorString = CFUNCTYPE(c_int, c_int, POINTER(c_char_p))(self._describe)
        self.cuCtxGetCurrent = CFUNCTYPE(c_int, POINTER(c_void_p))(self._current)
        self.cuDeviceGet = CFUNCTYPE(c_int, POINTER(c_int), c_int)(lambda *_: self._called("cuDeviceGet"))
        self.cuDevicePrimaryCtxRetain = CFUNCTYPE(c_int, POINTER(c_void_p), c_int)(
            lambda *_: self._called("cuDevicePrimaryCtxRetain")
        )
        self.cuCtxSetCurrent = CFUNCTYPE(c_int, c_void_p)(lambda _: self._called("cuCtxSetCurrent"))
        self.cuThreadExchangeStreamCaptureMode = CFUNCTYPE(c_int, POINTER(c_int))(self._exchange)
        self.modes = [0]  # of captures, one after another; at first cudaStreamCaptureModeGlobal
        self.cuFuncGetParamInfo = CFUNCTYPE(c_int, c_void_p, c_size_t, POINTER(c_size_t), POINTER(c_size_t))(self._ask)

    def use(self, monkeypatch):
        original = launch.Program.entry.func

        def entry(program):
            found = original(program)
            if found is not None:
                self.entries[found.function] = found.formats, program.constants
            return found

        monkeypatch.setattr(launch.Program, "entry", property(entry))
        monkeypatch.setattr(driver, "library", lambda: self)
        monkeypatch.setattr(driver, "_is_plain", lambda kernel: True)
        return self

    def _called(self, name):
        self.calls.append(name)
        return 0

    def _current(self, context):
        context[0] = self.context
        return 0

    def _exchange(self, mode):
        self.modes.append(mode[0])
        mode[0] = self.modes[-2]
        return 0

    def _describe(self, error, text):
        text[0] = MESSAGE
        return 0

    def _ask(self, function, index, offset, size):
        sizes = sizes_of(self.stub.loaded[function - 1])
        if index not in sizes:
            return 1
        size[0] = sizes[index] + self.wider
        return 0

    def _launch(self, configuration, function, parameters, extra):
        how = configuration[0]
        formats, constants = self.entries[function]
        place = 0
        arguments: list[int | float | None] = []
        for one in formats:
            if one is None:
                arguments.append(None)
                continue
            (value,) = struct.unpack(one, ctypes.string_at(parameters[place], struct.calcsize(one)))
            arguments.append(value)
            place += 1
        scratch = [ctypes.string_at(parameters[place + i], 8) for i in range(2)]
        assert scratch == [bytes(8)] * 2
        assert (how.threads % 32, how.threads_y, how.threads_z, extra) == (0, 1, 1, None)
        self.launches += 1
        self.stub.launched.append(((how.x, how.y, how.z), (*arguments, *constants)))
        return self.fault
