"""What all rooms' tests share: the two kinds of process, the data set of real images, no stray overrides."""

from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path

import pytest

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
EMULATING = (
    os.environ.get("DETR_FAST_EMULATE") == "1"
)  # the interpreter's tests run compiled PTX instead: slower, sees more

# Arguments of attention's kernels that several programs write, the same values: the list (or copy) of the keys that are
# visible, which each program reads back itself, and the rows' statistics, which the next launch reads.
IDENTICAL_WRITES = ("list_ptr", "statistics_ptr")


@contextmanager
def emulated_instead(**_):
    """In `checked_interpreter`'s place: its record of launches, with kernels that run in the emulator."""
    from detr_fast.kernels import launch

    from detr_fast.testing.interpreter import InterpreterChecks
    from detr_fast.testing.ptx import emulated_gpu

    checks = InterpreterChecks(int32_limit=0)
    launch.observers.append(checks.observe)
    try:
        with emulated_gpu(identical_writes=IDENTICAL_WRITES):
            yield checks
    finally:
        launch.observers.remove(checks.observe)


def pytest_configure() -> None:
    if EMULATING:
        from detr_fast.testing import interpreter

        interpreter.checked_interpreter = emulated_instead


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        marker = item.get_closest_marker("interpreter")
        if marker and EMULATING and None in marker.args:
            item.add_marker(pytest.mark.skip(reason="a test of the interpreter itself"))
        elif marker and not (INTERPRETING or EMULATING):
            item.add_marker(
                pytest.mark.skip(reason="runs in Triton's interpreter: set TRITON_INTERPRET=1 (make test does)")
            )
        if item.get_closest_marker("offline") and INTERPRETING:
            item.add_marker(pytest.mark.skip(reason="offline compilation fails while TRITON_INTERPRET=1"))


@pytest.fixture(autouse=True)
def _repeatable():
    import torch

    torch.manual_seed(0)


@pytest.fixture
def unmeasured(monkeypatch, tmp_path):
    """No GPU was ever measured: neither by the user nor before this detr-fast was shipped."""
    from detr_fast import dispatch
    from detr_fast.ops import regimes

    monkeypatch.setenv("DETR_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(regimes, "SHIPPED", tuple(r for r in regimes.SHIPPED if r.architecture == "cpu"))
    regimes.known.cache_clear()
    dispatch.forget_decisions()
    yield
    regimes.known.cache_clear()
    dispatch.forget_decisions()


@pytest.fixture(autouse=True)
def interpreter(request):
    """Tests marked `interpreter` run their kernels in the checked interpreter; the value tells what was launched.

    The marker's arguments are `checked_interpreter`'s, say `interpreter(int32_limit=1 << 15)`; None for a test of the
    checks themselves: `interpreter(None)`.
    """
    marker = request.node.get_closest_marker("interpreter")
    if marker is None or not (INTERPRETING or EMULATING) or None in marker.args:
        yield None
        return
    from detr_fast.testing.interpreter import checked_interpreter

    with checked_interpreter(**marker.kwargs) as checks:
        yield checks


@pytest.fixture(scope="session")
def compiled_host():
    """The host's part in C++, compiled where it is not yet (half a minute), or why it can't be."""
    from detr_fast import native

    try:
        return native.load()
    except native.CompilationError as error:
        return str(error)


@pytest.fixture
def host(compiled_host):
    """The host's part in C++, in use."""
    from detr_fast import native

    if isinstance(compiled_host, str):
        pytest.skip(f"host.cpp can't be compiled here: {compiled_host}")
    before = native.host
    native.use(compiled_host)
    compiled_host.forget()
    yield compiled_host
    native.use(before)


@pytest.fixture(scope="session")
def bccd() -> Path:
    """The folder of real blood-cell micrographs; a test that needs it is skipped, saying so, where it is absent."""
    places = [os.environ.get("DETR_FAST_BCCD"), Path(__file__).parents[2] / "shared" / "data" / "bccd"]
    for place in places:
        if place and (Path(place) / "instances_train.json").is_file():
            return Path(place)
    pytest.skip("the BCCD data set is not here: set DETR_FAST_BCCD to its folder (instances_*.json and images/)")


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
        return object(), len(self.loaded), 32, 0, 1024

    def unload_module(self, module):
        pass


@pytest.fixture
def stub_gpu(monkeypatch):
    """Kernels called on CPU tensors take the whole path of a CUDA launch, up to the driver's door."""
    from detr_fast.kernels.catalog import CATALOG
    from detr_fast.kernels.launch import forget_programs
    from triton.runtime import driver

    stub = StubGPU()
    monkeypatch.setattr(driver, "_active", stub)
    kernels = {one.variant.kernel for one in CATALOG}
    for kernel in kernels:
        kernel.device_caches.clear()
    yield stub
    forget_programs()
    for kernel in kernels:
        kernel.device_caches.clear()
