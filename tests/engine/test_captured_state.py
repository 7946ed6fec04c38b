"""What a captured step is bound to besides shapes: a model's mode and memory, what is trained, the optimizer's state and settings."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch import nn

import detr_fast
from detr_fast.dispatch import use_backend
from detr_fast.engine.captured import CapturedInference, CapturedStep
from detr_fast.engine.ema import ExponentialMovingAverage
from detr_fast.engine.graphs import GraphedFunction


def test_parameters_that_are_trained_later_are_trained_and_clipped(emulated):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer.param_groups[0]["capturable"] = True
    step = CapturedStep(model, lambda y, _: 100 * y.mean(), optimizer, clip_norm=0.5)
    x, before = torch.randn(8, 4), copy.deepcopy(model[0].state_dict())
    for _ in range(4):
        step(x)
    assert all(torch.equal(value, before[name]) for name, value in model[0].state_dict().items())
    model.requires_grad_(True)
    for graphs_then in (1, 1, 2, 2):
        before = copy.deepcopy(model[0].state_dict())
        step(x)
        moved = sum((value - before[name]).square().sum() for name, value in model[0].state_dict().items()).sqrt()
        assert 0 < moved <= 0.5 + 1e-5
        assert step.graphs == graphs_then


def test_weights_that_lie_in_other_memory_are_read_there(emulated):
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    inference = CapturedInference(model)
    for _ in range(4):
        inference(x)
    model.weight.data = torch.ones(2, 3)
    for _ in range(4):
        assert torch.equal(inference(x), model(x))
    assert inference.graphs == 2


def test_a_slice_of_a_weight_that_lies_where_the_whole_lay_is_what_runs(emulated):
    model, x = nn.Linear(3, 2, bias=False), torch.randn(4, 3)
    inference = CapturedInference(model)
    for _ in range(4):
        inference(x)
    model.weight = nn.Parameter(model.weight.data[:1])
    for _ in range(4):
        assert torch.equal(inference(x), model(x))


@pytest.mark.parametrize("held", [False, True])
def test_a_model_without_parameters_computes_where_its_buffers_or_else_its_inputs_lie(held, emulated):
    model, x = nn.Flatten(), torch.randn(4, 3, 2)
    if held:
        model.register_buffer("scale", torch.ones(2))
    inference = CapturedInference(model)
    for _ in range(4):
        assert torch.equal(inference(x), model(x))
    assert inference.graphs == held
    assert held or inference(x.to("meta")).device.type == "meta"


def test_a_norm_that_is_put_into_eval_mode_learns_no_more_statistics(emulated):
    model = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.param_groups[0]["capturable"] = True
    step = CapturedStep(model, lambda y, _: y.square().mean(), optimizer)
    for _ in range(4):
        step(torch.randn(8, 4))
    model[1].eval()
    before = model[1].running_mean.clone()
    for graphs_then in (1, 1, 2, 2):
        step(torch.randn(8, 4))
        assert torch.equal(model[1].running_mean, before)
        assert step.graphs == graphs_then


def test_weights_and_buffers_that_were_assigned_are_those_that_run(emulated):
    model, x = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), torch.randn(4, 3)
    inference, other = CapturedInference(model), copy.deepcopy(model)
    nn.init.ones_(other[1].running_var).mul_(4)
    for _ in range(4):
        inference(x)
    model.load_state_dict(other.state_dict(), assign=True)
    for graphs_then in (1, 1, 2):
        assert torch.equal(inference(x), other.eval()(x))
        assert inference.graphs == graphs_then


def regression():
    """A captured step of a linear layer, and its optimizer."""
    model = nn.Linear(4, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    return CapturedStep(model, lambda y, _: y.square().mean(), optimizer), optimizer


def test_an_optimizer_that_was_loaded_or_set_otherwise_has_another_graph(emulated):
    step, optimizer = regression()
    x = torch.randn(8, 4)
    for _ in range(4):
        step(x)
    assert step.graphs == 1
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for graphs_then in (0, 0, 1, 1):
        step(x)
        assert step.graphs == graphs_then
    optimizer.param_groups[0]["weight_decay"] = 0.1
    step(x)
    assert step.graphs == 0


def test_moments_that_were_cleared_begin_anew(emulated):
    (step, optimizer), (eager, other) = regression(), regression()
    eager.model.load_state_dict(step.model.state_dict())
    eager._step.reason = "to compare with"
    for clear in (False, True):
        if clear:
            optimizer.state.clear(), other.state.clear()
        for seed in range(4):
            torch.manual_seed(seed)
            x = torch.randn(8, 4)
            step(x), eager(x)
        assert step.graphs == 1
        torch.testing.assert_close(step.model.state_dict(), eager.model.state_dict())


def test_settings_that_change_at_each_step_leave_steps_eager_and_a_warning_names_them(emulated):
    step, optimizer = regression()
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=20)

    def train():
        for _ in range(6):
            step(torch.randn(8, 4))
            schedule.step()

    with pytest.warns(RuntimeWarning, match=r"the optimizer's betas changed .* OneCycleLR, takes cycle_momentum=False"):
        train()
    assert step.graphs == 0
    assert step.reason is None  # they may stop changing


def test_an_optimizer_that_is_loaded_at_each_step_is_told_likewise(emulated):
    step, optimizer = regression()

    def train():
        for _ in range(6):
            step(torch.randn(8, 4))
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    with pytest.warns(RuntimeWarning, match="the optimizer's state changed in four steps"):
        train()
    assert step.graphs == 0


def test_a_group_that_is_added_later_goes_by_its_own_learning_rate(emulated):
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1)), torch.randn(8, 4)
    optimizer = torch.optim.AdamW(model[0].parameters(), lr=1e-3, fused=True)
    step = CapturedStep(model, lambda y, _: y.square().mean(), optimizer)
    for _ in range(3):
        step(x)
    optimizer.add_param_group({"params": list(model[1].parameters()), "lr": 0.0})
    before = model[1].bias.detach().clone()
    for graphs_then in (0, 0, 1):
        step(x)
        assert step.graphs == graphs_then
    assert torch.equal(model[1].bias, before)
    optimizer.param_groups[1]["lr"] = 0.5
    step(x)
    assert (model[1].bias - before).abs() > 0.1
    assert step.graphs == 1


def test_inference_that_was_captured_in_inference_mode_runs_outside_of_it_too(emulated):
    model = nn.Linear(3, 2)
    inference = CapturedInference(model)
    with torch.inference_mode():
        for _ in range(4):
            inference(torch.randn(4, 3))
    x = torch.randn(4, 3)
    assert torch.equal(inference(x), model(x))


def doubled(*given):
    return given[-1] * 2


def doubled_first(_, given, *__):
    return (given[0] * 2,)


def doubled_gradient(parameter):
    parameter.grad.mul_(2)


HOOKS = {
    "forward": lambda model, _: model[0].register_forward_hook(doubled),
    "forward, of all modules": lambda *_: nn.modules.module.register_module_forward_hook(
        lambda part, _, y: y * 2 if type(part) is nn.Tanh else None
    ),
    "before the forward": lambda model, _: model[1].register_forward_pre_hook(doubled_first),
    "backward": lambda model, _: model[1].register_full_backward_hook(doubled_first),
    "before the backward": lambda model, _: model[1].register_full_backward_pre_hook(doubled_first),
    "of a gradient": lambda model, _: model[0].weight.register_hook(doubled),
    "behind a gradient": lambda model, _: model[0].weight.register_post_accumulate_grad_hook(doubled_gradient),
    "before the optimizer's step": lambda model, optimizer: optimizer.register_step_pre_hook(
        lambda *_: doubled_gradient(model[0].weight)
    ),
}


@pytest.mark.parametrize("add", HOOKS.values(), ids=HOOKS)
def test_hooks_that_come_or_go_later_act_as_in_eager_steps(add, emulated):
    start = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
    models, steps, optimizers = [copy.deepcopy(start) for _ in range(2)], [], []
    for model, capture in zip(models, (True, False)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer.param_groups[0]["capturable"] = True
        steps.append(CapturedStep(model, lambda y, _: y.square().mean(), optimizer, capture=capture))
        optimizers.append(optimizer)
    x = torch.randn(8, 4)

    def train():
        for _ in range(4):
            losses = [step(x)["loss"] for step in steps]
            torch.testing.assert_close(*losses)
            torch.testing.assert_close(*(dict(model.named_parameters()) for model in models))
        assert steps[0].graphs > 0

    train()
    # That of all modules is one for both.
    handles = [
        add(*each) for each in list(zip(models, optimizers))[: 1 if add is HOOKS["forward, of all modules"] else 2]
    ]
    train()
    for handle in handles:
        handle.remove()
    train()


def test_a_part_that_was_put_into_anothers_place_is_what_runs(emulated):
    model, x = nn.Sequential(nn.Linear(3, 2), nn.Sequential(nn.Tanh())), torch.randn(4, 3)
    inference = CapturedInference(model)
    for part in (nn.Tanh(), nn.Sequential(nn.Linear(2, 2)), nn.BatchNorm1d(2)):
        model[1][0] = part.eval()
        for _ in range(4):
            torch.testing.assert_close(inference(x), model(x))
    nn.init.ones_(part.running_var).mul_(4)
    part.running_var = part.running_var * 9
    torch.testing.assert_close(inference(x), model(x))
    assert inference.graphs == 3


def test_a_forward_of_a_parts_own_and_dropout_that_was_set_otherwise_are_what_runs(emulated):
    model, x = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0)).train(), torch.randn(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.param_groups[0]["capturable"] = True
    step = CapturedStep(model, lambda y, _: y.square().sum(), optimizer)

    def losses():
        return [step(x)["loss"].item() for _ in range(4)]

    plain = losses()[0]
    model[0].forward = lambda x: nn.functional.linear(x, model[0].weight * 2, model[0].bias * 2)
    assert losses() == pytest.approx([4 * plain] * 4)
    del model[0].forward
    assert losses() == pytest.approx([plain] * 4)
    model[1].p = 1.0
    assert losses() == [0.0] * 4
    assert step.graphs == 4


@pytest.mark.parametrize(
    "entered", [lambda: torch.autocast("cpu", torch.bfloat16), lambda: use_backend(layer_norm="eager")]
)
def test_what_an_eager_call_goes_by_has_a_graph_of_its_own(entered, emulated):
    model, x = nn.Sequential(nn.Linear(3, 4), detr_fast.nn.LayerNorm(4)), torch.randn(2, 3)
    inference = CapturedInference(model)
    for manager in (contextlib.nullcontext, entered, contextlib.nullcontext):
        with manager():
            for _ in range(4):
                expected = model(x)
                torch.testing.assert_close(inference(x), expected)
    assert inference.graphs == len(emulated) == 2


class Doubling(nn.Module):
    def forward(self, x):
        return x * 2


class Inheriting(Doubling):
    def forward(self, x):
        return super().forward(x) + 1


@pytest.mark.parametrize("kind", [Doubling, Inheriting])
def test_a_forward_that_a_class_got_later_is_what_runs(kind, emulated, monkeypatch):
    model, x = nn.Sequential(nn.Linear(3, 2), kind()), torch.randn(4, 3)
    inference = CapturedInference(model)
    first = Doubling.forward
    for forward, graphs_then in ((first, 1), (lambda self, x: x * 3, 2), (lambda self, x: x * 5, 3), (first, 3)):
        monkeypatch.setattr(Doubling, "forward", forward)
        for _ in range(4):
            assert torch.equal(inference(x), model(x))
        assert inference.graphs == graphs_then


def test_a_forward_that_a_class_got_after_a_part_became_one_of_it_is_what_runs(emulated, monkeypatch):
    model, x = nn.Sequential(nn.Linear(3, 2), nn.Identity()), torch.randn(4, 3)
    inference = CapturedInference(model)
    for change in (lambda: None, lambda: setattr(model[1], "__class__", Doubling)):
        change()
        for _ in range(4):
            assert torch.equal(inference(x), model(x))
    monkeypatch.setattr(Doubling, "forward", lambda self, x: x * 3)
    assert torch.equal(inference(x), model(x))


@pytest.mark.parametrize(
    "entered",
    [
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        lambda: torch.nn.attention.sdpa_kernel(
            [torch.nn.attention.SDPBackend.MATH, torch.nn.attention.SDPBackend.FLASH_ATTENTION], set_priority=True
        ),
        lambda: torch.backends.cudnn.flags(enabled=False),
        lambda: torch.backends.cudnn.flags(benchmark=True),
        lambda: torch.backends.cudnn.flags(deterministic=True),
    ],
    ids=["no_grad", "inference_mode", "math", "order", "cudnn", "benchmark", "deterministic"],
)
def test_modes_and_flags_that_choose_kernels_have_graphs_of_their_own(entered, emulated):
    weight, x = torch.randn(3, requires_grad=True), torch.randn(3)
    graphed = GraphedFunction(lambda x: x * weight, torch.device("cpu"))
    for manager in (contextlib.nullcontext, entered, contextlib.nullcontext):
        with manager():
            for _ in range(3):
                y = graphed(x)
            assert (y.requires_grad, y.is_inference()) == (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    assert graphed.graphs == len(emulated) == 2


def test_a_part_that_came_later_is_clipped(emulated):
    model, x = nn.Sequential(nn.Linear(3, 3), nn.Tanh()), torch.randn(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer.param_groups[0]["capturable"] = True
    step = CapturedStep(model, lambda y, _: y.square().sum(), optimizer, clip_norm=1e-3)
    for _ in range(4):
        step(x)
    model[1] = nn.Linear(3, 2)
    optimizer.add_param_group({"params": model[1].parameters(), "capturable": True})
    before = model[1].weight.detach().clone()
    for steps in range(1, 5):
        step(x)
        assert (model[1].weight - before).norm() <= 1.001e-3 * steps


def test_a_model_that_is_accelerated_after_a_capture_is_captured_anew(emulated):
    model, x = nn.Sequential(nn.LayerNorm(4)), torch.randn(2, 4)
    inference = CapturedInference(model)
    for _ in range(4):
        inference(x)
    detr_fast.accelerate(model)
    for graphs_then in (1, 1, 2):
        inference(x)
        assert inference.graphs == graphs_then


def test_arguments_that_have_no_hash_leave_their_calls_eager(emulated):
    class Sum(nn.Linear):
        def forward(self, x, powers):
            return sum(nn.Linear.forward(self, x) ** power for power in powers)

    inference, x = CapturedInference(Sum(3, 2)), torch.randn(4, 3)
    for powers in ({1}, {2}, {1, 2}, {1}, {1}):
        with pytest.warns(RuntimeWarning, match=r"a set .*have no hash.* run eagerly"):
            found = inference(x, powers)
        assert torch.equal(found, inference.model(x, powers))
    for _ in range(4):
        assert torch.equal(inference(x, (1, 2)), inference.model(x, (1, 2)))
    assert inference.graphs == 1


def test_a_moving_average_goes_by_the_decay_that_was_set_after_the_capture(emulated):
    model, x = nn.Linear(4, 1), torch.randn(8, 4)
    optimizer, ema = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True), ExponentialMovingAverage(model, 1.0)
    step = CapturedStep(model, lambda y, _: y.mean(), optimizer, ema=ema)
    for _ in range(4):
        step(x)
    ema.decay = 0.0
    for _ in range(4):
        step(x)
        torch.testing.assert_close(ema.module.weight, model.weight, check_stride=False)
    assert step.graphs > 0


def change_group(name, value):
    def change(step):
        (group,) = step.optimizer.param_groups
        group[name] = value(group[name])

    return change


@pytest.mark.parametrize(
    "change",
    [
        lambda step: setattr(step.criterion, "beta", 0.1),
        lambda step: setattr(step, "criterion", nn.L1Loss()),
        lambda step: setattr(step, "clip_norm", 0.01),
        change_group("lr", lambda lr: torch.tensor(10 * lr)),
        change_group("params", lambda params: params[:1]),
    ],
    ids=["criterion's setting", "criterion", "clipping", "learning rate as a tensor", "parameters"],
)
def test_what_a_step_is_made_of_is_what_it_is_now(change, emulated):
    class Loss(nn.SmoothL1Loss):
        def forward(self, y, target):
            return super().forward(y, target) * 100

    start, x, target = nn.Linear(4, 2), torch.randn(8, 4), torch.randn(8, 2)
    steps = []
    for capture in (True, False):
        model = copy.deepcopy(start)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
        steps.append(CapturedStep(model, Loss(), optimizer, clip_norm=1.0, capture=capture))
    for changed in (False, True):
        for step in steps:
            if changed:
                change(step)
            for _ in range(4):
                step(x, target)
        torch.testing.assert_close(*(step.model.state_dict() for step in steps), rtol=1e-4, atol=1e-5)
    assert steps[0].graphs > 0
