"""Many casts in one launch: PyTorch's values, gradients and layouts, and PyTorch's copies, with the reason, where it does not fit."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
import torch
from detr_fast.kernels import launch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.hardware import DEVICE, sized
from detr_fast import capture, dispatch, ops
from detr_fast.dispatch import BackendError, use_backend
from detr_fast.ops import regimes
from detr_fast.ops.regimes import Regime
from detr_fast.testing import count
from tests.stub_cuda import stubs

module = importlib.import_module("detr_fast.ops.cast_together")  # as a name in ops it is the op
interpreter = pytest.mark.interpreter(int32_limit=1 << 16)
LAST, CPU = torch.channels_last, torch.device("cpu")
WAYS = ["eager", pytest.param("triton", marks=interpreter)]


def weights(device=CPU):
    """Of convolutions, contiguous and channels last, and of products; trained, but for two."""
    torch.manual_seed(0)
    shapes = (4, 8, 3, 3), (5, 4, 1, 1), (3,), (4, 3, 3, 3), (40, 3), (2, 8, 3, 3)
    made = [torch.randn(shape, device=device) for shape in shapes]
    made[3] = made[3].contiguous(memory_format=LAST)
    return [t.requires_grad_(i not in (2, 4)) for i, t in enumerate(made)]


@pytest.mark.parametrize("way", WAYS)
def test_gradients_lie_as_their_parameters_and_what_is_not_used_has_none(way):
    tensors = weights()
    with use_backend(cast_together=way):
        cast = ops.cast_together(tensors, torch.bfloat16, channels_last=True)
        assert [t.requires_grad for t in cast] == [t.requires_grad for t in tensors]
        assert all(t.is_contiguous(memory_format=LAST) for t in cast if t.ndim == 4)
        for t, source in zip(cast, tensors):
            assert torch.equal(t, source.bfloat16())
        sum(t.float().square().sum() for t in cast[:-1]).backward()
    assert tensors[-1].grad is None
    for source, t in zip(tensors[:-1], cast):
        if source.requires_grad:
            torch.testing.assert_close(source.grad, 2 * t.float(), rtol=1e-2, atol=1e-2)
            assert source.grad.stride() == source.stride()


def test_a_frozen_weight_of_another_dtype_leaves_gradients_range_alone():
    frozen, weight = torch.ones(3, dtype=torch.float16), torch.ones(3, requires_grad=True)
    _, cast = ops.cast_together([frozen, weight], torch.bfloat16)
    (cast * 2.0**20).sum().backward()
    assert torch.equal(weight.grad, torch.full((3,), 2.0**20))


@interpreter
@pytest.mark.parametrize("channels_last", [False, True])
def test_one_launch_casts_all_and_another_their_gradients_to_pytorchs_bits(channels_last, interpreter):
    def run(way):
        tensors = weights()
        with use_backend(cast_together=way):
            cast = ops.cast_together(tensors, torch.float16, channels_last)
            torch.manual_seed(1)
            arriving = [
                torch.randn(t.shape).half().contiguous(memory_format=LAST if t.ndim == 4 else torch.contiguous_format)
                for t in cast
            ]
            trained = [i for i, t in enumerate(tensors) if t.requires_grad]
            found = torch.autograd.grad(
                [cast[i] for i in trained], [tensors[i] for i in trained], [arriving[i] for i in trained]
            )
        assert [t.stride() for t in found] == [tensors[i].stride() for i in trained]  # else they would be copied again
        return [*cast, *found]

    for ours, eager in zip(run("triton"), run("eager"), strict=True):
        assert torch.equal(ours, eager)
        assert ours.stride() == eager.stride()
    assert interpreter.counts() == {"cast_kernel": 2}


@interpreter
def test_what_lies_neither_way_is_copied_by_pytorch_beside_the_launch(interpreter):
    tensors = [torch.randn(6, 4).t(), torch.randn(1).expand(5), torch.randn(7), torch.randn(4, 3, 2, 2).transpose(0, 1)]
    with use_backend(cast_together="triton"):
        found = ops.cast_together(tensors, torch.bfloat16, channels_last=True)
        alone = ops.cast_together(tensors[:1], torch.bfloat16)
    assert all(torch.equal(y, x.bfloat16()) for x, y in zip(tensors, found, strict=True))
    assert torch.equal(alone[0], tensors[0].bfloat16())
    assert interpreter.counts() == {"cast_kernel": 1}


@pytest.mark.parametrize("way", WAYS)
def test_gradients_can_be_differentiated_again(way):
    x = torch.randn(3, requires_grad=True)
    with use_backend(cast_together=way):
        (cast,) = ops.cast_together([x], torch.bfloat16)
        (first,) = torch.autograd.grad(cast.float().pow(3).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(second, 6 * x, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("way", WAYS)
def test_casts_take_a_batch_of_gradients_at_once(way):
    parameters = [torch.randn(3, 2, requires_grad=True), torch.randn(2, 3, 1, 1, requires_grad=True)]
    with use_backend(cast_together=way):
        casts = ops.cast_together(parameters, torch.bfloat16, channels_last=True)
        upstream = [torch.randn(2, *cast.shape).bfloat16() for cast in casts]
        found = torch.autograd.grad(casts, parameters, upstream, is_grads_batched=True)
    assert all(torch.equal(one, arrived.float()) for one, arrived in zip(found, upstream))


@interpreter
def test_opcheck_accepts_the_op():
    last = [t.ndim == 4 for t in weights()]
    op = torch.ops.detr_fast.cast_together.default
    torch.library.opcheck(op, ([t.detach() for t in weights()], torch.bfloat16, last))
    torch.library.opcheck(op, ([t for t in weights() if t.requires_grad], torch.float16, [True, False, True, True]))


@interpreter
def test_no_cast_is_made_twice_to_be_recorded(monkeypatch):
    monkeypatch.setattr(module._cast_together, "native", lambda *_: pytest.fail("it went to C++"))
    with use_backend(cast_together="triton"):
        for _ in range(3):
            ops.cast_together(weights(), torch.bfloat16)


class Mine(torch.Tensor):
    pass


REFUSED = {
    "dtypes": ([torch.zeros(2), torch.zeros(2).double()], torch.bfloat16, r"several dtypes \(float32, float64\)"),
    "double": (
        [torch.zeros(2)],
        torch.float64,
        "torch.float32 to torch.float64: it casts from fp32 to 16 bits and back",
    ),
    "halves": ([torch.zeros(2).half()], torch.bfloat16, "torch.float16 to torch.bfloat16"),
    "the same": ([torch.zeros(2)], torch.float32, "torch.float32 to torch.float32"),
    "devices": ([torch.zeros(2), torch.zeros(2, device="meta")], torch.bfloat16, "several devices"),
    "subclass": ([torch.zeros(2).as_subclass(Mine)], torch.bfloat16, "tensor subclass Mine"),
}


@interpreter
@pytest.mark.parametrize("case", REFUSED)
def test_what_the_kernel_does_not_take_is_named_and_left_to_pytorch(case):
    tensors, dtype, reason = REFUSED[case]
    with use_backend(cast_together="triton"), pytest.raises(BackendError, match=reason):
        ops.cast_together(tensors, dtype)
    with use_backend("triton"):  # which binds what has such kernels, and can take the call
        found = ops.cast_together(tensors, dtype)
    assert {t.dtype for t in found} == {dtype}


def test_nothing_is_decided_outside_of_captures_unless_by_name(monkeypatch):
    monkeypatch.setattr(module, "_signature", lambda *_: pytest.fail("looked"))
    monkeypatch.setattr(module.CAST_TOGETHER, "_signature", module._signature)
    with dispatch.recording(lambda *_: pytest.fail("told")):
        assert ops.cast_together([torch.ones(3)], torch.bfloat16)[0].dtype == torch.bfloat16
    assert ops.cast_together([], torch.bfloat16) == []


@pytest.fixture
def capturing(monkeypatch):
    """capturing(minimum, architecture): as in a capture of ours on a GPU, where it was measured to be faster from so many bytes on."""
    monkeypatch.setattr(dispatch, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(dispatch, "situation", lambda kind: dispatch.Situation("captured", True, None, False, None))
    monkeypatch.setattr(capture._thread, "behind", [])

    def as_if(minimum, architecture="sm_90"):
        entry = None if minimum is None else Regime("cast_together", architecture, 0, minimum, "a test")
        monkeypatch.setattr(regimes, "find", lambda op, *_: entry)
        dispatch.forget_decisions()

    yield as_if
    dispatch.forget_decisions()


def on_a_fake_gpu(room=1 << 10):
    """(launches, what was told) of casts of fake tensors on a GPU."""
    told = []
    with FakeTensorMode(), dispatch.recording(lambda op, decision: told.append((op, decision))):
        tensors = [torch.empty(n, device="cuda") for n in (3000, 5)]
        with capture.set_aside(CPU, cast_together=room):
            counts = count(lambda: ops.cast_together(tensors, torch.bfloat16))
    ((op, decision),) = told
    assert op == "cast_together"
    return counts, decision


def test_auto_takes_it_only_where_it_was_measured_to_be_faster_on_the_very_architecture(capturing):
    for minimum, architecture in ((None, ""), (0, "sm_80")):
        capturing(minimum, architecture)
        counts, decision = on_a_fake_gpu()
        assert decision.implementation is dispatch.PARTS
        assert decision.reasons == {"triton": "not measured on this GPU: run detr-fast tune"}
        assert "cast_kernel" not in counts.launches
    capturing(1 << 20)
    assert "below 1 MiB of input PyTorch is faster in a CUDA graph" in str(on_a_fake_gpu()[1].reasons)
    capturing(0)
    counts, decision = on_a_fake_gpu()
    assert decision.implementation.name == "triton"
    assert decision.shapes == "float32 to bfloat16, 2 tensors of 0.0115 MiB"
    assert counts.launches["cast_kernel"] == 1
    assert counts.total_synchronisations == 0
    _, decision = on_a_fake_gpu(room=3 * 8)
    assert "no memory set aside" in decision.reasons["triton"]


def test_where_addresses_may_change_it_is_not_taken():
    (kernel, _) = module.CAST_TOGETHER.implementations
    call = SimpleNamespace(reason=None, room=True, situation=SimpleNamespace(regime="captured"))
    assert "not captured by detr_fast.capture" in kernel.why_not(call)
    call.situation.regime = "eager"
    assert kernel.why_not(call) is None  # by name
    assert "would be copied to the GPU at each call" in kernel.advice(call)


@interpreter
def test_in_a_capture_addresses_are_copied_behind_it_to_memory_that_is_not_the_graphs(monkeypatch):
    tensors = weights()
    for name, value in stubs().items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(dispatch, "capturing", lambda kind: True)
    monkeypatch.setattr(module.kernels, "launch", lambda *call: recorded.append(call))
    recorded = []
    arriving = [torch.randn(t.shape).bfloat16() for t in tensors]
    arriving = [t.contiguous(memory_format=LAST) if t.ndim == 4 else t for t in arriving]
    graph = torch.cuda.CUDAGraph()
    room = module.room_for_casts(tensors, gradients=True)
    with use_backend(cast_together="triton"):
        with capture.set_aside(CPU, cast_together=room), capture.capture(graph):
            aside = capture._thread.aside["cast_together"]
            aside.zero_()
            cast = ops.cast_together(tensors, torch.bfloat16, channels_last=True)
            trained = [i for i, t in enumerate(tensors) if t.requires_grad]
            with torch.autograd.set_multithreading_enabled(False):  # gradients that last, as in a graph's memory
                sources = [tensors[i] for i in trained]
                found = torch.autograd.grad([cast[i] for i in trained], sources, [arriving[i] for i in trained])
            assert not any(call[2].any() for call in recorded)  # the tables are still blank
            assert len(recorded) == 2
        assert len(graph.behind) == 2
    places = [call[2].data_ptr() - aside.data_ptr() for call in recorded]
    assert places[0] == 0 < places[1] < 8 * room
    for call in recorded:  # a replay
        launch.launch(*call)
    assert all(torch.equal(t, source.bfloat16()) for source, t in zip(tensors, cast))
    assert all(torch.equal(one, arriving[i].float()) for i, one in zip(trained, found))


@pytest.mark.gpu
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_on_a_gpu_replays_cast_what_parameters_and_gradients_are_by_then(half):
    shapes = sized(
        [(512, 512, 3, 3), (300, 1000), (64, 3, 7, 7), (7,), (4097,), (256, 64, 1, 1)] * 20, [(4, 8, 3, 3), (7,)]
    )
    every = torch.arange(1 << 16, device=DEVICE).to(torch.uint16).view(half).float()
    tensors = [torch.randn(shape, device=DEVICE).requires_grad_() for shape in shapes] + [every.requires_grad_()]
    arriving = [torch.randn(t.shape, device=DEVICE).to(half) for t in tensors]
    arriving = [t.contiguous(memory_format=LAST) if t.ndim == 4 else t for t in arriving]

    def step():
        cast = ops.cast_together(tensors, half, channels_last=True)
        with torch.autograd.set_multithreading_enabled(False):
            return [*cast, *torch.autograd.grad(cast, tensors, arriving)]

    room = module.room_for_casts(tensors, gradients=True)
    graph = torch.cuda.CUDAGraph()
    with use_backend(cast_together="triton"), capture.set_aside(DEVICE, cast_together=room), capture.capture(graph):
        other = torch.empty(1 << 17, device=DEVICE)  # what is no more leaves its place to what comes
        other.zero_()
        del other
        found = step()
    for scale in (1.0, 3.0):
        with torch.no_grad():
            torch._foreach_mul_(tensors, scale)
            torch._foreach_mul_(arriving, scale)
        graph.replay()
        with use_backend(cast_together="eager"):
            for one, other in zip(found, step(), strict=True):
                assert torch.equal(one.nan_to_num(nan=1.5), other.nan_to_num(nan=1.5))
                assert one.stride() == other.stride()
