"""Programs in C++ up to the driver's door, and through it: launches are Python's own, on addresses."""

from __future__ import annotations

import ctypes
import gc
import threading

import pytest
import torch
from detr_fast.kernels import driver, launch
from detr_fast.kernels.catalog import CATALOG

from benchmarks.test_host_time import CASES
from detr_fast import dispatch, implementation, nn, ops, use_backend
from detr_fast.ops import boundary, host_native
from tests.native.stub_driver import FAULT, MESSAGE, StubDriver
from tests.ops.test_host_program import launches_of
from tests.seen import nodes

pytestmark = pytest.mark.offline


@pytest.fixture(params=["triton", "driver"])
def on_stub(stub_gpu, host, monkeypatch, request):
    """A stub GPU, whose launches Triton's launcher makes, or CUDA's driver: then the stub has that, too."""
    if request.param == "driver":
        stub_gpu.driver = StubDriver(stub_gpu).use(monkeypatch)
    for module in (implementation, boundary):
        monkeypatch.setattr(module, "INTERPRETING", True)
    with use_backend("triton"):
        yield stub_gpu
    dispatch.forget_decisions()


by_driver = pytest.mark.parametrize("on_stub", ["driver"], indirect=True)


def pointers_of(stub, tensors, run):
    """Of each launch, which of the tensors, by index, each pointer is to the start of (-1 for memory of the op's own)."""
    before = len(stub.launched)
    run()
    starts = {t.data_ptr(): index for index, t in enumerate(tensors)}
    found = []
    for _, arguments in stub.launched[before:]:
        addresses = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]
        found.append([starts.get(a, -1) for a in addresses if type(a) is int and a > 1 << 40])
    return found


@pytest.mark.parametrize("name", CASES)
def test_an_op_launches_what_python_launches_on_the_same_tensors(name, on_stub):
    function, _, shapes = CASES[name]
    leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]
    dy = torch.zeros_like(function(*leaves))

    def step():
        y = function(*leaves)
        torch.autograd.grad(y, leaves, dy)
        return y

    def python():
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):  # which C++ leaves to Python
            step()

    expected, pointers = launches_of(on_stub, python), pointers_of(on_stub, [*leaves, dy], python)
    for _ in range(2):
        step()
    names = nodes(step())
    assert "OpProgramBackward" in names, host_native.unrepeatable
    assert launches_of(on_stub, step) == expected
    assert pointers_of(on_stub, [*leaves, dy], step) == pointers
    assert any(index >= 0 for one in pointers for index in one)


def test_a_program_of_one_tensor_given_twice_serves_no_other_call(on_stub):
    x, y, z = (torch.randn(1, 4, 2, 32) for _ in range(3))
    for _ in range(3):
        ops.attention(x, x, z)  # known by one address
    for _ in range(3):
        (forward, *_) = pointers_of(on_stub, [x, y, z], lambda: ops.attention(x, y, z))
        assert {0, 1, 2} <= set(forward)


def test_a_layer_launches_what_its_parts_launch(on_stub):
    layer = nn.TransformerEncoderLayer(64, 2, 64, 0.1, batch_first=True)
    x, padding = torch.randn(1, 4, 64, requires_grad=True), torch.tensor([[False] * 3 + [True]])
    leaves = [x, *layer.parameters()]

    def step():
        y = layer(x, src_key_padding_mask=padding)
        torch.autograd.grad(y, leaves, torch.zeros_like(y))
        return y

    expected = launches_of(on_stub, step)
    for _ in range(2):
        step()
    assert step().grad_fn.name() == "ProgramNodeBackward"
    assert launches_of(on_stub, step) == expected


def again(module, name):
    """Registers a parameter of the module again, which then comes last: as pruning does that is made permanent."""
    one = getattr(module, name)
    delattr(module, name)
    setattr(module, name, one)


@pytest.mark.parametrize("following", [False, True])
def test_a_program_serves_no_layer_whose_parameters_come_in_another_order(following, on_stub):
    def made():
        layer = nn.TransformerEncoderLayer(64, 2, 64, 0.0, batch_first=True, norm_first=True)
        return nn.TransformerEncoder(layer, 1, nn.LayerNorm(64)) if following else layer

    one, other, x = made(), made(), torch.randn(1, 4, 64, requires_grad=True)
    again(other.norm if following else other.norm1, "weight")
    for _ in range(3):
        one(x)

    def parts():
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            other(x)

    parameters = [*other.parameters()]
    expected = pointers_of(on_stub, parameters, parts)
    for _ in range(3):
        other(x)
    assert pointers_of(on_stub, parameters, lambda: other(x)) == expected


def test_a_program_serves_no_layer_whose_parts_are_of_another_class(on_stub):
    one, other = (nn.TransformerEncoderLayer(64, 2, 64, 0.0, batch_first=True, norm_first=True) for _ in range(2))
    other.norm1 = torch.nn.LayerNorm(64)  # which is PyTorch's operation
    x = torch.randn(1, 4, 64, requires_grad=True)

    def launches(layer):
        for _ in range(3):
            layer(x)
        before = len(on_stub.launched)
        layer(x)
        return len(on_stub.launched) - before

    assert launches(one) > launches(other)


@by_driver
def test_kernels_stay_loaded_while_a_backward_may_launch_them(on_stub, monkeypatch):
    unloaded, kernels = [], {one.variant.kernel for one in CATALOG}
    monkeypatch.setattr(type(on_stub), "unload_module", lambda self, module: unloaded.append(module))
    leaves = [torch.randn(shape, requires_grad=True) for shape in ((4, 64), (64,), (64,))]
    for _ in range(3):
        y = ops.layer_norm(leaves[0], (64,), *leaves[1:])
        dy = torch.ones_like(y)
        torch.autograd.grad(y, leaves, dy, retain_graph=True)
    gc.collect()
    before, launches = len(unloaded), on_stub.driver.launches
    launch.forget_programs()
    for kernel in kernels:
        kernel.device_caches.clear()
    gc.collect()
    torch.autograd.grad(y, leaves, dy)
    assert on_stub.driver.launches > launches
    assert len(unloaded) == before


def test_addresses_are_those_of_the_tensors(on_stub):
    x, weight, bias = (torch.randn(*shape) for shape in ((4, 64), (64,), (64,)))
    with torch.no_grad():
        for _ in range(3):
            y = ops.layer_norm(x, (64,), weight, bias)
    _, arguments = on_stub.launched[-1]
    addresses = [a for a in arguments if type(a) is int]
    for tensor in (x, weight, bias, y):
        assert tensor.data_ptr() in addresses


def normalize():
    """Calls a norm in training: for the fourth time, so that all is recorded."""
    leaves = [torch.randn(shape, requires_grad=True) for shape in ((4, 64), (64,), (64,))]

    def step():
        y = ops.layer_norm(leaves[0], (64,), *leaves[1:])
        torch.autograd.grad(y, leaves, torch.ones_like(y))

    for _ in range(3):
        step()
    return step


@by_driver
@pytest.mark.parametrize("name", CASES)
def test_all_that_an_op_launches_goes_by_the_driver(name, on_stub):
    function, _, shapes = CASES[name]
    leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]
    dy = torch.zeros_like(function(*leaves))

    def step():
        """How many launches, and how many of them by the driver."""
        before, driven = len(on_stub.launched), on_stub.driver.launches
        torch.autograd.grad(function(*leaves), leaves, dy)
        return len(on_stub.launched) - before, on_stub.driver.launches - driven

    counts = [step() for _ in range(20)]  # where allocations lie otherwise than ever before, Python runs
    assert any(all_of_them == by_driver > 0 for all_of_them, by_driver in counts), counts


@by_driver
def test_a_kernel_whose_parameters_are_not_as_expected_is_left_to_triton(on_stub):
    on_stub.driver.wider = 1
    step, before = normalize(), len(on_stub.launched)
    step()
    assert len(on_stub.launched) > before
    assert on_stub.driver.launches == 0


@by_driver
def test_kernels_are_loaded_in_a_way_that_spoils_no_capture(on_stub, monkeypatch):
    modes, real = [], on_stub.load_binary
    monkeypatch.setattr(on_stub, "load_binary", lambda *given: modes.append(on_stub.driver.modes[-1]) or real(*given))
    normalize()
    assert set(modes) == {driver.RELAXED}
    assert on_stub.driver.modes[-1] == 0


@by_driver
def test_other_threads_run_while_a_launch_waits(on_stub, host):
    libc, left = ctypes.CDLL(None), ctypes.create_string_buffer(16)
    # It takes a launch's configuration, whose grid comes first, for one second, and the function for where to write.
    waiting = ctypes.cast(libc.nanosleep, ctypes.c_void_p).value
    numbers = (ctypes.addressof(left), 1, 0, 0, 0, 0, 0)
    launch = ((waiting, *driver.functions()[1:]), numbers, bytes(8), (0,), None)
    section = ((("launch", ((2, 0, 0), launch), (), False, ()),), (0,), (0,), 1)
    program = host.Program(section, (), (), (0,), (), False, True, None, lambda device: 0, -1)
    thread = threading.Thread(target=program.run, args=(0, None, torch.zeros(1)), daemon=True)
    thread.start()
    thread.join(0.1)
    assert thread.is_alive()
    thread.join(10)
    assert not thread.is_alive()


@by_driver
def test_a_thread_without_a_context_gets_its_devices(on_stub):
    step = normalize()
    assert on_stub.driver.calls == []
    on_stub.driver.context = None
    step()
    assert on_stub.driver.calls == ["cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent"] * 2


@by_driver
@pytest.mark.parametrize("backward", [False, True])
def test_a_launch_that_fails_raises_what_the_driver_says(backward, on_stub):
    normalize()
    leaves = [torch.randn(shape, requires_grad=True) for shape in ((4, 64), (64,), (64,))]
    y = ops.layer_norm(leaves[0], (64,), *leaves[1:])
    dy = torch.ones_like(y)
    on_stub.driver.fault = FAULT

    def failing():
        torch.autograd.grad(y, leaves, dy) if backward else ops.layer_norm(leaves[0], (64,), *leaves[1:])

    with pytest.raises(RuntimeError, match=MESSAGE.decode()):
        failing()
