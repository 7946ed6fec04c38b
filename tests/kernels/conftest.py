from __future__ import annotations

import pytest


@pytest.fixture
def interpreter():
    """Kernels run in the checked interpreter; the value tells what was launched."""
    from detr_fast.testing.interpreter import checked_interpreter

    with checked_interpreter() as checks:
        yield checks


class StubGPU:
    """Stands in for Triton's driver of an H100: programs are compiled and loaded for real, and launches written down."""

    def __init__(self):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", 90, 32)
        self.loaded = []
        self.launched = []
        self.utils = self
        self.launcher_cls = lambda source, metadata: self._launch

    def _launch(self, *arguments):
        grid, kernel_arguments = arguments[:3], arguments[9:]  # between them: stream, handles and hooks
        self.launched.append((grid, kernel_arguments))

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_device_properties(self, device):
        return {"max_shared_mem": 227 << 10}

    def load_binary(self, name, binary, shared, device):
        self.loaded.append(binary)
        return object(), object(), 32, 0, 1024

    def unload_module(self, module):
        pass


@pytest.fixture
def stub_gpu(monkeypatch):
    """Kernels called on CPU tensors take the whole path of a CUDA launch, up to the driver's door."""
    from detr_fast.kernels.catalog import CATALOG
    from triton.runtime import driver

    stub = StubGPU()
    monkeypatch.setattr(driver, "_active", stub)
    kernels = {one.variant.kernel for one in CATALOG}
    for kernel in kernels:
        kernel.device_caches.clear()
    yield stub
    for kernel in kernels:
        kernel.device_caches.clear()
