"""Clipping and Adam's step on our launches: as PyTorch's own, and left to PyTorch, with the reason, where they don't fit."""

from __future__ import annotations

import copy
import importlib
from types import SimpleNamespace

import pytest
import torch
from detr_fast.kernels import launch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.hardware import DEVICE, sized
from detr_fast import capture, dispatch, ops
from detr_fast.dispatch import BackendError, use_backend
from detr_fast.ops import optimizer_rules, regimes
from detr_fast.ops.regimes import NEVER, Regime
from detr_fast.testing import assert_close_to_truth, count
from tests.stub_cuda import stubs

module = importlib.import_module("detr_fast.ops.optimizer_step")  # as a name in ops it is the op
interpreter = pytest.mark.interpreter(int32_limit=1 << 16)


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def groups(model):
    return [
        {"params": model[0].parameters()},
        {"params": model[2].parameters(), "lr": 0.02, "weight_decay": 0.3, "betas": (0.8, 0.95), "eps": 1e-6},
    ]


def trained(kind, backend, dtype=torch.float32, max_norm=0.5, steps=4, **options):
    """A model and its optimizer after some steps with a schedule; the first layer's bias has no gradient in one of them."""
    model = network(dtype)
    optimizer = kind(groups(model), lr=1e-2, fused=True, **options)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    x = torch.randn(4, 7).to(dtype)
    with use_backend(optimizer_step=backend):
        for step in range(steps):
            optimizer.zero_grad()
            (3 * model(x)).square().sum().backward()
            if step == 2:
                model[0].bias.grad = None
            ops.optimizer_step(optimizer, model.parameters(), max_norm)
            schedule.step()
    return model, optimizer


KINDS = {
    "AdamW": (torch.optim.AdamW, {}),
    "Adam, L2": (torch.optim.Adam, {"weight_decay": 0.1}),
    "AdamW, maximised": (torch.optim.AdamW, {"maximize": True}),
    "AdamW, capturable": (torch.optim.AdamW, {"capturable": True}),
    "AdamW, a rate that is a tensor": (torch.optim.AdamW, {"lr": torch.tensor(1e-2)}),
}


@interpreter
@pytest.mark.parametrize("max_norm", [0.0, 0.5])
@pytest.mark.parametrize("kind", KINDS)
def test_training_is_as_accurate_as_with_pytorchs_own(kind, max_norm, recwarn):
    which, options = KINDS[kind]

    def run(backend, dtype=torch.float32):
        given = copy.deepcopy(options)  # a rate that is a tensor is one of each optimizer's
        return trained(lambda p, **o: which(p, **o | given), backend, dtype, max_norm)

    (ours, optimizer), (eager, other), (truth, _) = run("triton"), run("eager"), run("eager", torch.float64)
    for (name, p), q, exact in zip(ours.named_parameters(), eager.parameters(), truth.parameters()):
        assert_close_to_truth(name, p.detach(), q.detach(), exact.detach())
    found, expected = optimizer.state_dict(), other.state_dict()
    assert found["param_groups"] == expected["param_groups"]
    torch.testing.assert_close(found["state"], expected["state"], rtol=1e-5, atol=1e-7)
    assert [s["step"].item() for s in found["state"].values()] == [4.0, 3.0, 4.0, 4.0]
    assert not any("optimizer.step()" in str(one.message) for one in recwarn)  # of schedulers, that there was none


@interpreter
@pytest.mark.parametrize("rate", [1e-2, 1])
def test_defaults_of_pytorch_and_whole_numbers_change_nothing(rate):
    found = []
    for backend in ("triton", "eager"):
        model, optimizer = with_gradients()
        optimizer.param_groups[0]["lr"] = rate
        ops.optimizer_step(optimizer, model.parameters())  # makes the moments
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device("meta"), use_backend(optimizer_step=backend):
                ops.optimizer_step(optimizer, model.parameters())
        finally:
            torch.set_default_dtype(torch.float32)
        found.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(*found)


@interpreter
def test_gradients_stay_as_they_were_and_what_is_written_is_known_to_be(interpreter):
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.randn(2, 7)).sum().backward()
    before = [p.grad.clone() for p in model.parameters()]
    versions = [p._version for p in model.parameters()]
    with use_backend(optimizer_step="triton"):
        ops.optimizer_step(optimizer, model.parameters(), 1e-3)
    assert all(map(torch.equal, before, [p.grad for p in model.parameters()]))
    assert all(p._version > version for p, version in zip(model.parameters(), versions))
    assert interpreter.counts()["adam_update_kernel"] == 2  # in runs, and what remains


@interpreter
def test_no_step_is_taken_twice_to_be_recorded(monkeypatch):
    model, optimizer = with_gradients()
    monkeypatch.setattr(module._optimizer_step, "native", lambda *_: pytest.fail("it went to C++"))
    with use_backend(optimizer_step="triton"):
        for _ in range(5):
            ops.optimizer_step(optimizer, model.parameters(), 1.0)
    assert {state["step"].item() for state in optimizer.state.values()} == {5.0}


def lists(model, optimizer):
    """The op's arguments."""
    with use_backend(optimizer_step="eager"):
        known = optimizer_rules.tensors_of(optimizer, list(model.parameters()), 0.5)
    assert known.reason is None
    tensors = known.parameters, known.gradients, known.first_moments, known.second_moments, known.steps, known.rates
    each = ([t.detach() for t in one] for one in tensors)
    return (*each, [number for one in known.settings for number in one], 0.5)


@interpreter
def test_opcheck_accepts_the_op():
    model, optimizer = trained(torch.optim.AdamW, "eager")
    torch.library.opcheck(torch.ops.detr_fast.optimizer_step.default, lists(model, optimizer))


def test_on_a_cpu_pytorchs_own_runs_and_nothing_is_looked_at(monkeypatch):
    monkeypatch.setattr(module, "tensors_of", None)
    model, _ = trained(torch.optim.AdamW, "auto")
    other = network()
    optimizer = torch.optim.AdamW(groups(other), lr=1e-2, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    x = torch.randn(4, 7)
    for step in range(4):
        optimizer.zero_grad()
        (3 * other(x)).square().sum().backward()
        if step == 2:
            other[0].bias.grad = None
        nn.utils.clip_grad_norm_(other.parameters(), 0.5)
        optimizer.step()
        schedule.step()
    for p, q in zip(model.parameters(), other.parameters()):
        assert torch.equal(p, q)


def test_an_optimizer_without_gradients_and_another_one_take_their_own_steps():
    model = network()
    for kind in (torch.optim.AdamW, torch.optim.SGD):
        optimizer, calls = kind(model.parameters(), lr=0.1), []
        optimizer.register_step_post_hook(lambda *_, calls=calls: calls.append(1))
        with use_backend("triton"):  # which binds what has such kernels, and can take the call
            ops.optimizer_step(optimizer, model.parameters(), 1.0)
            model(torch.randn(2, 7)).sum().backward()
            ops.optimizer_step(optimizer, model.parameters(), 1.0)
        assert len(calls) == 2


class Mine(torch.optim.AdamW):
    pass


def with_gradients(change=lambda model, optimizer: None, kind=torch.optim.AdamW, **options):
    model = network()
    optimizer = kind(model.parameters(), **({"fused": True} | options))
    model(torch.randn(2, 7)).sum().backward()
    change(model, optimizer)
    return model, optimizer


def sparse(model, _):
    model[0].weight.grad = model[0].weight.grad.to_sparse()


def laid_out_otherwise(model, _):
    with torch.no_grad():
        model[0].weight.data = model[0].weight.data.t().contiguous().t()


def in_16_bits(model, _):
    model[0].weight.data = model[0].weight.data.bfloat16()
    model[0].weight.grad = None
    model[0].weight.grad = torch.zeros_like(model[0].weight)


def holding_a_scale(_, optimizer):
    optimizer.found_inf = torch.zeros(())


REFUSED = {
    "of another class": ({"kind": Mine}, "Mine is neither torch.optim.AdamW nor torch.optim.Adam"),
    "SGD": ({"kind": torch.optim.SGD, "lr": 0.1}, "SGD is neither torch.optim.AdamW nor"),
    "amsgrad": ({"amsgrad": True}, "has amsgrad=True"),
    "differentiable": ({"differentiable": True, "fused": False}, "has differentiable=True"),
    "hooks": ({"change": lambda _, o: o.register_step_pre_hook(lambda *_: None)}, "AdamW has hooks"),
    "a step of its own": ({"change": lambda _, o: setattr(o, "step", lambda: None)}, "has a step of its own"),
    "a scaler": ({"change": holding_a_scale}, "a gradient scaler has the AdamW unscale gradients"),
    "sparse": ({"change": sparse}, "some gradients or parameters are sparse"),
    "layout": ({"change": laid_out_otherwise}, "not laid out alike and without gaps"),
    "dtypes": ({"change": in_16_bits}, "are of several dtypes"),
    "double": (
        {"change": lambda model, _: model.double() and sum(p.grad.sum() for p in model.parameters())},
        "float64",
    ),
    "rate": ({"lr": torch.tensor(1e-3, dtype=torch.float64)}, "a learning rate is a tensor of torch.float64 on cpu"),
}


@interpreter
@pytest.mark.parametrize("case", REFUSED)
def test_what_the_kernels_do_not_take_is_named_and_left_to_pytorch(case):
    settings, reason = REFUSED[case]
    model, optimizer = with_gradients(**settings)
    with use_backend(optimizer_step="triton"), pytest.raises(BackendError, match=reason):
        ops.optimizer_step(optimizer, model.parameters(), 1.0)
    told = []
    with use_backend("triton"), dispatch.recording(lambda op, decision: told.append((op, decision.reasons["triton"]))):
        if case not in ("sparse", "dtypes", "layout", "differentiable"):  # which PyTorch takes no more than we do
            ops.optimizer_step(optimizer, model.parameters(), 1.0)


@interpreter
def test_parameters_that_are_clipped_must_be_the_optimizers(interpreter):
    model, optimizer = with_gradients()
    with use_backend(optimizer_step="triton"):
        with pytest.raises(BackendError, match="gradients are clipped are not those that the optimizer holds"):
            ops.optimizer_step(optimizer, model[0].parameters(), 1.0)
        ops.optimizer_step(optimizer, model[0].parameters())  # nothing is clipped


@interpreter
def test_a_schedulers_count_of_steps_is_no_step_of_its_own(recwarn):
    model, optimizer = with_gradients()
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    with use_backend(optimizer_step="triton"):
        ops.optimizer_step(optimizer, model.parameters(), 1.0)
    schedule.step()
    assert not any("optimizer.step()" in str(one.message) for one in recwarn)


@pytest.fixture
def measured(monkeypatch):
    """measured(minimum): as on a GPU where it was measured to be faster from so many bytes on; None: where nothing was measured."""
    monkeypatch.setattr(dispatch, "architecture", lambda device: "sm_90")

    def as_if(minimum):
        entry = None if minimum is None else Regime("optimizer_step", "sm_90", minimum, minimum, "a test")
        monkeypatch.setattr(regimes, "find", lambda op, *_: entry)
        dispatch.forget_decisions()

    yield as_if
    dispatch.forget_decisions()


def on_a_fake_gpu():
    """(launches, what was told) of a step of fake tensors on a GPU."""
    told = []
    with FakeTensorMode(), dispatch.recording(lambda op, decision: told.append((op, decision))):
        with torch.device("cuda"):
            parameters = [torch.empty(n, requires_grad=True) for n in (3000, 5)]
        optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)
        for p in parameters:
            p.grad = torch.empty_like(p)
        counts = count(lambda: ops.optimizer_step(optimizer, parameters, 0.1))
    ((op, decision),) = told
    assert op == "optimizer_step"
    return counts, decision


def test_auto_takes_it_only_where_it_was_measured_to_be_faster(measured):
    measured(None)
    counts, decision = on_a_fake_gpu()
    assert decision.implementation is dispatch.PARTS
    assert decision.reasons == {"triton": "not measured on any GPU yet: run detr-fast tune"}
    assert not any(name.startswith("adam") for name in counts.launches)
    measured(1 << 20)
    assert "below 1 MiB of input PyTorch is faster (measured on sm_90: a test)" in str(on_a_fake_gpu()[1].reasons)
    measured(0)
    counts, decision = on_a_fake_gpu()
    assert decision.implementation.name == "triton"
    assert decision.shapes == "AdamW with clipping, 2 tensors of 0.0115 MiB"
    kernels = {name: n for name, n in counts.launches.items() if name.endswith("_kernel")}
    # On tensors that lie nowhere all can be read in runs, but for the last element of five.
    assert kernels == {"gradient_squares_kernel": 2, "adam_scalars_kernel": 1, "adam_update_kernel": 2}
    assert counts.total_synchronisations == 0


def test_where_it_never_wins_tensors_are_not_looked_at(measured, monkeypatch):
    class OnAGPU:
        is_cuda, device, nbytes, grad = True, torch.device("cuda"), 1 << 30, object()

    monkeypatch.setattr(module, "tensors_of", lambda *_: "looked")
    monkeypatch.setattr(dispatch, "capturing", lambda kind: False)
    optimizer = SimpleNamespace(param_groups=[{"params": [OnAGPU()]}])
    for minimum, found in ((None, None), (NEVER, None), (0, "looked")):
        measured(minimum)
        assert module._tensors(optimizer, [], 0.0) == found


def room(optimizer, device="cpu"):
    return capture.set_aside(torch.device(device), optimizer_step=module.room_for_update(optimizer))


@interpreter
def test_in_a_capture_addresses_are_copied_behind_it_and_kept_as_long_as_the_graph(monkeypatch):
    model, optimizer = trained(torch.optim.AdamW, "eager")
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    model_then, state_then = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
    for name, value in stubs().items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(dispatch, "capturing", lambda kind: True)
    monkeypatch.setattr(module.kernels, "launch", lambda *call: recorded.append(call))
    monkeypatch.setattr(
        module.kernels, "empty", lambda *shape: own.append(torch.zeros(shape[0], dtype=shape[1])) or own[-1]
    )
    own, recorded = [], []
    graph = torch.cuda.CUDAGraph()
    with use_backend(optimizer_step="triton"):
        with room(optimizer), capture.capture(graph):
            capture._thread.aside["optimizer_step"].zero_()
            ops.optimizer_step(optimizer, model.parameters(), 0.5)
            assert not any(call[2].any() for call in recorded)  # the tables are still blank
            assert len(recorded) == 5
        assert len(graph.behind) == 1
    for memory in own:  # of the graph's pool, where a replay has written other tensors before it comes here
        memory.fill_(3)
    for call in recorded:  # a replay
        launch.launch(*call)
    expected = torch.optim.AdamW(groups(model_then), lr=1e-2, fused=True)
    expected.load_state_dict(state_then)
    for p, q in zip(model.parameters(), model_then.parameters()):
        q.grad = p.grad.clone()
    nn.utils.clip_grad_norm_(model_then.parameters(), 0.5)
    expected.step()
    for p, q in zip(model.parameters(), model_then.parameters()):
        torch.testing.assert_close(p, q)


def test_a_graph_that_is_captured_by_other_means_or_without_memory_beside_its_own_keeps_pytorchs_step(monkeypatch):
    call = SimpleNamespace(reason=None, room=False, situation=SimpleNamespace(regime="captured"))
    (kernel, _) = module.OPTIMIZER_STEP.implementations
    assert "not captured by detr_fast.capture" in kernel.why_not(call)
    monkeypatch.setattr(capture._thread, "behind", [])
    assert "no memory set aside" in kernel.why_not(call)
    with room(with_gradients()[1]):
        assert capture.left_aside("optimizer_step") == 4 * 2 * 8 + 4 * 8
        first, second = (capture.take_aside("optimizer_step", n).data_ptr() for n in (32, 1))
        assert first + 32 * 8 == second
        assert capture.left_aside("optimizer_step") == 63
        assert capture.left_aside("cast_together") == 0
    assert capture.left_aside("optimizer_step") == 0
    call.situation.regime = "eager"
    assert kernel.why_not(call) is None


@pytest.mark.gpu
@pytest.mark.parametrize("max_norm", [0.0, 0.1])
@pytest.mark.parametrize("graph", [False, True])
def test_on_a_gpu_steps_train_as_pytorchs_do(graph, max_norm):
    sizes = sized([(300, 1000), (7,), (4097,), (2, 3, 5)] * 60, [(5,), (8,)])

    def run(backend, dtype=torch.float32):
        torch.manual_seed(0)
        parameters = [torch.randn(size, device=DEVICE).to(dtype).requires_grad_() for size in sizes]
        optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1, fused=True, capturable=True)
        gradients = [torch.randn(p.shape, device=DEVICE).to(dtype) for p in parameters]
        for p in parameters:
            p.grad = torch.zeros_like(p)

        def step():
            for p, gradient in zip(parameters, gradients):  # PyTorch's clipping wrote to the last one
                p.grad.copy_(gradient)
            with use_backend(optimizer_step=backend):
                ops.optimizer_step(optimizer, parameters, max_norm)

        step()  # makes the state
        if graph:
            recorded = torch.cuda.CUDAGraph()
            with room(optimizer, DEVICE), capture.capture(recorded):
                other = torch.empty(1 << 17, device=DEVICE)  # what is no more leaves its place to what comes
                other.zero_()
                del other
                step()
        for _ in range(3):
            recorded.replay() if graph else step()
        return [p.detach() for p in parameters]

    ours, eager, truth = run("triton"), run("eager"), run("eager", torch.float64)
    for i, (p, q, exact) in enumerate(zip(ours, eager, truth)):
        assert_close_to_truth(f"parameter {i}", p, q, exact)
