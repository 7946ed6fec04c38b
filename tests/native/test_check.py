"""A program in C++ that gives something else than Python's path is never used: found before it is, said once, and left out."""

from __future__ import annotations

import copy
import warnings
from contextlib import nullcontext

import pytest
import torch
from detr_fast.kernels import driver

from benchmarks.test_host_time import CASES
from detr_fast import implementation, native, nn, ops, use_backend
from detr_fast.ops import boundary, host_check, host_native
from detr_fast.ops.host_program import Busy
from tests import stub_cuda
from tests.native.emulated_driver import emulated_driver, forget_kernels
from tests.native.stub_driver import StubDriver
from tests.seen import nodes

CPU = torch.device("cpu")
WIDTH = 64
PROGRAM = "OpProgramBackward"


@pytest.fixture(autouse=True)
def _checking(host, monkeypatch):
    """A CPU is checked as a GPU is."""
    monkeypatch.setattr(host_check, "CHECKED", frozenset({"cpu"}))
    monkeypatch.setattr(host_check, "_trusted", {})
    monkeypatch.setattr(native, "status", native.status)
    monkeypatch.setattr(native, "_wrong", False)
    host_native.unrepeatable.clear()
    with use_backend("triton"):
        yield


@pytest.fixture
def libcuda(monkeypatch):
    with emulated_driver(monkeypatch) as driver:
        yield driver


def norm():
    leaves = [torch.randn(shape, requires_grad=True) for shape in ((3, WIDTH), (WIDTH,), (WIDTH,))]

    def step():
        y = ops.layer_norm(leaves[0], (WIDTH,), *leaves[1:])
        return y, *torch.autograd.grad(y, leaves, torch.ones_like(y))

    return step


def quietly(step):
    """What the step gives when it is called for the third time, where nobody warns of anything."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            step()
        return step()


@pytest.mark.offline
def test_what_the_driver_launches_gives_what_tritons_launcher_gives_and_nothing_is_said(libcuda):
    step = norm()
    expected, state = step(), torch.get_rng_state()
    found = quietly(step)
    assert libcuda.launches > 0
    assert nodes(found[0]) == {PROGRAM, "torch::autograd::AccumulateGrad"}, host_native.unrepeatable
    assert all(map(torch.equal, found, expected))
    assert native.status == "in use"
    assert torch.equal(torch.get_rng_state(), state)
    assert libcuda.modes[-3:] == [0, driver.RELAXED, 0]


@pytest.mark.offline
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_launch_with_swapped_arguments_is_found_and_everything_runs_from_python(where, libcuda):
    step = norm()
    expected = step()

    def broken(name, values):
        return [values[1], values[0], *values[2:]] if where in name else values

    libcuda.broken = broken
    with pytest.warns(
        RuntimeWarning, match="not used, as on a cpu its detr_fast::layer_norm gives another result"
    ) as told:
        found = [step() for _ in range(2)][-1]
    assert len(told) == 1
    assert native.status.startswith("left out: on a cpu, detr_fast::layer_norm gives another result")
    assert native.host is None
    assert all(map(torch.equal, found, expected))
    native.make()
    assert native.host is None


@pytest.mark.interpreter(None)
def test_a_seed_at_another_offset_is_found(monkeypatch):
    function, _, shapes = CASES["add_layer_norm"]
    leaves = [torch.randn(shape) for shape in shapes]
    quietly(lambda: function(*leaves))
    assert host_check._trusted[CPU].kinds == {("detr_fast::add_layer_norm", False)}
    real = host_native._section

    def broken(program, *rest):
        other = copy.copy(program)
        other.recorder = program.recorder._replace(
            offsets=[(r, further + 1) for r, further in program.recorder.offsets]
        )
        return real(other, *rest)

    monkeypatch.setattr(host_native, "_section", broken)
    native.host.forget()
    function(*leaves)
    with pytest.warns(RuntimeWarning, match="add_layer_norm gives another result 1"):
        function(*leaves)
    assert native.host is None


@pytest.mark.offline
def test_what_another_threads_check_keeps_from_being_checked_is_checked_later(stub_driver):
    step = encoder_layer()
    step()
    with host_check._checking:
        for _ in range(2):
            assert isinstance(step().grad_fn, torch._C._FunctionBase)
    assert not host_check._trusted
    assert nodes(step()) >= {"ProgramNodeBackward"}
    assert ("layer", True) in host_check._trusted[CPU].kinds


def encoder_layer(tokens=4):
    layer = nn.TransformerEncoderLayer(64, 2, 64, 0.1, batch_first=True)
    x, padding = torch.randn(1, tokens, 64, requires_grad=True), torch.tensor([[False] * (tokens - 1) + [True]])
    leaves = [x, *layer.parameters()]

    def step():
        y = layer(x, src_key_padding_mask=padding)
        torch.autograd.grad(y, leaves, torch.ones_like(y))
        return y

    return step


@pytest.fixture
def stub_driver(stub_gpu, monkeypatch):
    """Kernels do nothing, in memory that is filled."""
    for module in (implementation, boundary):
        monkeypatch.setattr(module, "INTERPRETING", True)
    torch.use_deterministic_algorithms(True)
    yield StubDriver(stub_gpu).use(monkeypatch)
    torch.use_deterministic_algorithms(False)
    forget_kernels()


@pytest.mark.offline
def test_a_whole_layer_is_checked_before_its_program_is_used(stub_driver, monkeypatch):
    step, checked = encoder_layer(), []
    real = host_check._results

    def results(way, offset, given, pattern):
        checked.append((offset, torch._C._is_multithreading_enabled()))
        return real(way, offset, given, pattern)

    monkeypatch.setattr(host_check, "_results", results)
    assert nodes(quietly(step)) >= {"ProgramNodeBackward"}
    assert ("layer", True) in host_check._trusted[CPU].kinds
    assert checked == [(3, False), (3, False), (17, False), (17, False)]
    assert torch._C._is_multithreading_enabled()


@pytest.mark.offline
def test_a_layer_that_differs_is_not_used(stub_driver, monkeypatch):
    monkeypatch.setattr(host_check, "_differing", lambda *_: "gives something else")
    step = encoder_layer()
    step()
    with pytest.warns(RuntimeWarning, match="its layer gives something else"):
        step()
    before = stub_driver.launches
    assert isinstance(step().grad_fn, torch._C._FunctionBase)
    assert stub_driver.launches == before
    assert native.host is None


def test_nothing_is_checked_in_a_backward_or_where_saved_tensors_take_no_hooks():
    x, told = torch.ones(1, requires_grad=True), []

    def hook(_):
        try:
            host_check.expect(CPU)
        except Busy as error:
            told.append(error)

    y = x * 2
    y.register_hook(hook)
    y.backward()
    assert told
    host_check.expect(CPU)
    with torch.autograd.graph.disable_saved_tensors_hooks("none here"), pytest.raises(Busy):
        host_check.expect(CPU)


def test_copies_lie_as_the_tensors_do_with_other_values_and_another_seed():
    pack, memory, seed = torch.randn(2, 3, 4), torch.randn(33), torch.tensor([7])
    given = [
        pack[:, 0],
        memory[1:].view(4, 8).t(),
        pack[:, 1],
        None,
        torch.randn(1, 4).expand(3, 4),
        seed,
        torch.empty(0, 3),
    ]
    given += [torch.tensor([True, False]), torch.arange(3), torch.randn(2, requires_grad=True)]
    copies = host_check._copies(given, 0.5, True)
    for one, made in zip(given, copies, strict=True):
        assert (one is None) == (made is None)
        if one is not None:
            told = (one.shape, one.stride(), one.dtype, one.requires_grad, one.data_ptr() % 16)
            assert (made.shape, made.stride(), made.dtype, made.requires_grad, made.data_ptr() % 16) == told
            assert one.numel() == 0 or made.data_ptr() != one.data_ptr()
            expected = one + 1 if one is seed else one * 0.5 if one.is_floating_point() else one
            assert torch.equal(made, expected)
    assert copies[2].data_ptr() - copies[0].data_ptr() == given[2].data_ptr() - given[0].data_ptr()
    assert host_check._copies([seed], 0.5, False)[0].item() == 7


def test_what_python_varies_itself_may_vary_a_little_and_nothing_else_may():
    noise = iter(range(100))

    def varying():
        return [torch.ones(3), torch.ones(3) + next(noise) * 1e-5]

    assert host_check._differing([torch.ones(3), torch.ones(3) + 1e-4], varying) is None
    assert "result 2 of 2" in host_check._differing([torch.ones(3), torch.ones(3) * 2], varying)
    assert "result 1 of 2" in host_check._differing([torch.ones(3) + 1e-4, torch.ones(3)], varying)
    nan = [torch.full((2,), torch.nan), None]
    assert host_check._differing(nan, lambda: list(nan)) is None
    assert "result 2 of 2" in host_check._differing([nan[0], torch.ones(2)], lambda: list(nan))


def test_a_pause_on_another_stream_comes_behind_all_allocations(monkeypatch):
    done = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stub_cuda.Stream())
    monkeypatch.setattr(torch.cuda, "Stream", stub_cuda.Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: done.append("pause"))
    with host_check._behind_a_pause(torch.device("cuda", 0), lambda: done.append("ahead")):
        done.append("behind")
    assert done == ["ahead", "pause", "behind"]


@pytest.mark.interpreter(None)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_calls_without_gradients_are_checked_in_their_mode(mode):
    with mode():
        leaves = [torch.randn(shape) for shape in ((3, WIDTH), (WIDTH,), (WIDTH,))]
        quietly(lambda: ops.layer_norm(leaves[0], (WIDTH,), *leaves[1:]))
    assert host_check._trusted[CPU].kinds == {("detr_fast::layer_norm", False)}
    assert native.status == "in use"


@pytest.mark.offline
@pytest.mark.parametrize("made", [norm, lambda: encoder_layer()])
def test_where_there_is_no_memory_for_a_check_python_runs_and_nothing_is_said(made, stub_driver, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB")

    monkeypatch.setattr(host_check, "_copies", full)
    step = made()
    found = quietly(step)
    y = found[0] if isinstance(found, tuple) else found
    assert isinstance(y.grad_fn, torch._C._FunctionBase)
    assert native.status == "in use"


@pytest.mark.offline
def test_once_a_device_has_cost_its_seconds_only_new_kinds_are_checked(stub_driver, monkeypatch):
    checked = []
    monkeypatch.setattr(host_check, "_difference", lambda *_, **__: checked.append(1))
    for tokens in (4, 5):
        quietly(encoder_layer(tokens))
    assert len(checked) == 2
    host_check._trusted[CPU].seconds = host_check.SECONDS + 1
    quietly(encoder_layer(6))
    assert len(checked) == 2
    quietly(norm())
    assert len(checked) == 3
