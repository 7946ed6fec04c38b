"""On a GPU: programs in C++ give what Python gives, launched for real."""

from __future__ import annotations

import threading
import time
import warnings
from functools import partial

import pytest
import torch
from detr_fast.kernels import driver, launch

from benchmarks import test_host_time
from benchmarks.hardware import DEVICE, REHEARSAL, sized
from benchmarks.test_host_time import CASES
from detr_fast import native, nn, ops, use_backend
from detr_fast.ops import host_check, host_native
from tests.seen import nodes

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _triton(host):
    with use_backend("triton"):
        yield


def both(run):
    """What C++ gives, called for the fourth time, and what Python gives; in a rehearsal it is Python that gives both."""
    for _ in range(sized(3, 0)):
        run()
    found = run()
    module = native.host
    native.use(None)
    try:
        return found, run()
    finally:
        native.use(module)


def same(found, expected):
    return all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", CASES)
def test_ops(name, dtype, create_graph, monkeypatch):
    monkeypatch.setattr(test_host_time, "PADDING", test_host_time.PADDING.to(DEVICE))
    monkeypatch.setattr(test_host_time, "ENDS", test_host_time.ENDS.to(DEVICE))
    function, _, shapes = CASES[name]
    if isinstance(function, partial) and "key_padding_mask" in function.keywords:
        function = partial(function, key_padding_mask=test_host_time.PADDING)
    leaves = [torch.randn(shape, device=DEVICE, dtype=dtype, requires_grad=True) for shape in shapes]

    def step():
        torch.manual_seed(3)
        y = function(*leaves)
        dy = torch.linspace(-1, 1, y.numel(), device=DEVICE).view_as(y).to(y.dtype)
        return [y, *torch.autograd.grad(y, leaves, dy, create_graph=create_graph)]

    found, expected = both(step)
    assert same(found, expected), host_native.unrepeatable
    assert REHEARSAL or "OpProgramBackward" in nodes(found[0]), host_native.unrepeatable


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["Encoder", "Decoder"])
def test_layers(name, autocast, dtype):
    layer = getattr(nn, f"Transformer{name}Layer")(64, 2, 128, 0.1, batch_first=True, device=DEVICE, dtype=dtype)
    inputs = [
        torch.randn(2, sized(50, 5), 64, device=DEVICE, dtype=dtype, requires_grad=True)
        for _ in range(1 + (name == "Decoder"))
    ]
    leaves = [*inputs, *layer.parameters()]

    def step():
        torch.manual_seed(3)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
            y = layer(*inputs)
        return [y, *torch.autograd.grad(y, leaves, torch.ones_like(y))]

    found, expected = both(step)
    assert same(found, expected)
    assert REHEARSAL or "ProgramNodeBackward" in nodes(found[0])


@pytest.fixture
def unchecked(monkeypatch):
    """As in a new process."""
    monkeypatch.setattr(host_check, "CHECKED", frozenset({DEVICE.type}))
    monkeypatch.setattr(host_check, "_trusted", {})
    monkeypatch.setattr(native, "status", native.status)
    monkeypatch.setattr(native, "_wrong", False)
    monkeypatch.setattr(native, "_started", True)  # the module is here, whatever DETR_FAST_NATIVE says


def leaves_of(rows):
    return [torch.randn(shape, device=DEVICE, requires_grad=True) for shape in ((rows, 64), (64,), (64,))]


def normalize(leaves=None):
    """A norm in training, and what it gives when it is called for the third time."""
    leaves = leaves or leaves_of(rows=3)
    for _ in range(3):
        y = ops.layer_norm(leaves[0], (64,), *leaves[1:])
        y.backward(torch.ones_like(y))
    return y


def test_what_is_used_was_checked_and_nothing_is_said(unchecked):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # In the rehearsal triton 3.6's interpreter, with NumPy 2, warns of itself.
        warnings.filterwarnings("ignore", "Conversion of an array", DeprecationWarning)
        y = normalize()
    assert native.status == "in use"
    if not REHEARSAL:  # where the interpreter looks, and Python runs
        (trust,) = host_check._trusted.values()
        assert trust.kinds == {("detr_fast::layer_norm", True)}
        assert trust.seconds < 10
        assert y.grad_fn.name() == "OpProgramBackward"


@pytest.mark.skipif(REHEARSAL, reason="a CPU has no allocator that tells")
def test_a_check_leaves_no_memory_no_gradient_and_no_other_seed_behind(unchecked):
    leaves = leaves_of(rows=3)
    dy = torch.ones_like(leaves[0])

    def step():
        torch.autograd.grad(ops.layer_norm(leaves[0], (64,), *leaves[1:]), leaves, dy)
        return torch.cuda.memory_allocated()

    before, state = step(), torch.cuda.get_rng_state()
    end = time.monotonic() + 5
    while step() != before:  # the thread of the backward may hold a node a little longer
        assert time.monotonic() < end
    assert host_check._trusted
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert all(leaf.grad is None for leaf in leaves)


@pytest.mark.skipif(REHEARSAL or torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("current", [0, 1])
def test_another_gpu_than_the_first_computes_whether_it_is_the_current_one_or_not(current, unchecked):
    found = []
    for index in (0, 1):
        torch.manual_seed(0)
        leaves = [leaf.detach().to(torch.device("cuda", index)).requires_grad_() for leaf in leaves_of(rows=3)]
        with torch.cuda.device(current):
            y = normalize(leaves)
        found.append([one.detach().cpu() for one in (y, *(leaf.grad for leaf in leaves))])
    assert same(*found)


@pytest.mark.skipif(REHEARSAL, reason="a CPU has no driver")
def test_a_wrong_argument_is_found(unchecked, monkeypatch):
    right = driver.Entry.parameters
    changed = lambda self, values: right(self, [v + 1.0 if type(v) is float else v for v in values])  # noqa: E731
    monkeypatch.setattr(driver.Entry, "parameters", changed)
    with pytest.warns(RuntimeWarning, match="detr_fast::layer_norm gives another result 1"):
        normalize()
    assert native.host is None


@pytest.mark.skipif(REHEARSAL, reason="a CPU has no streams")
def test_a_wrong_stream_is_found(unchecked, monkeypatch):
    real = native.host.Program
    monkeypatch.setattr(native.host, "Program", lambda *given: real(*given[:8], lambda device: 0, *given[9:]))
    with pytest.warns(RuntimeWarning, match="on a stream that is not the default one"):
        normalize()
    assert native.host is None


@pytest.mark.skipif(REHEARSAL, reason="a CPU has no graphs")
def test_a_check_does_not_spoil_what_another_thread_captures(unchecked):
    x, graph, begun, checked = (
        torch.ones(8, device=DEVICE),
        torch.cuda.CUDAGraph(),
        threading.Event(),
        threading.Event(),
    )

    def capture():
        with torch.cuda.graph(graph):
            found.append(x * 2)
            begun.set()
            checked.wait(60)
            found.append(x * 3)

    normalize()  # compiles, and is checked, too
    host_check._trusted.clear()
    leaves = leaves_of(rows=5)  # PyTorch's generator can't be used beside a capture
    found: list[torch.Tensor] = []
    thread = threading.Thread(target=capture)
    thread.start()
    begun.wait(60)
    normalize(leaves)
    checked.set()
    thread.join()
    assert host_check._trusted
    graph.replay()
    assert [one.sum().item() for one in found] == [16, 24]


@pytest.mark.skipif(REHEARSAL, reason="a CPU has no streams")
def test_streams_that_are_not_the_default_one_are_used():
    function, _, shapes = CASES["layer_norm"]
    leaves = [torch.randn(shape, device=DEVICE, requires_grad=True) for shape in shapes]
    expected = function(*leaves)
    for _ in range(2):
        function(*leaves)
    stream = torch.cuda.Stream()
    x = torch.randn_like(leaves[0])
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        later = leaves[0] + 0 * x  # queued behind the pause: who reads it on another stream reads too early
        y = function(later, *leaves[1:])
    stream.synchronize()
    assert torch.equal(y, expected)


@pytest.mark.skipif(REHEARSAL, reason="a CPU has no graphs")
def test_a_captured_graph_replays_what_was_captured():
    function, _, shapes = CASES["layer_norm"]
    leaves = [torch.randn(shape, device=DEVICE) for shape in shapes]
    for _ in range(3):
        function(*leaves)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = function(*leaves)
    leaves[0].normal_()
    graph.replay()
    assert torch.equal(y, function(*leaves))


@pytest.mark.skipif(REHEARSAL, reason="a CPU has no driver")
@pytest.mark.parametrize("name", CASES)
def test_the_driver_can_launch_every_kernel(name, monkeypatch):
    monkeypatch.setattr(test_host_time, "ENDS", test_host_time.ENDS.to(DEVICE))
    function, _, shapes = CASES[name]
    if isinstance(function, partial) and "key_padding_mask" in function.keywords:
        function = partial(function, key_padding_mask=test_host_time.PADDING.to(DEVICE))
    leaves = [torch.randn(shape, device=DEVICE, requires_grad=True) for shape in shapes]
    y = function(*leaves)
    torch.autograd.grad(y, leaves, torch.ones_like(y))
    assert launch._compiled
    for variant in launch._compiled:
        assert variant.program(DEVICE).entry is not None, variant.name
