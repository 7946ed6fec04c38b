"""What a captured step is bound to besides shapes: a model's mode and memory, what is trained, the optimizer's state and settings."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from detr_fast.engine.captured import CapturedInference, CapturedStep


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
    assert inference.graphs == 1
