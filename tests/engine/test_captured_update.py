"""What clipping and the optimizer of captured steps run on: PyTorch's operations or our launches, and which, and why."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from detr_fast.dispatch import BackendError, use_backend
from detr_fast.engine.captured import CapturedStep

interpreter = pytest.mark.interpreter(int32_limit=1 << 16)


def training(kind=torch.optim.AdamW, **settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.03, "weight_decay": 0.2}]
    optimizer = kind(groups, lr=0.01, **({"fused": True} if kind is not torch.optim.SGD else {}))
    if kind is torch.optim.SGD:
        for group in optimizer.param_groups:
            group["capturable"] = True
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.7**step)
    step = CapturedStep(model, lambda y, _: 10 * y.square().mean(), optimizer, clip_norm=0.1, **settings)
    return step, optimizer, schedule


def losses_of(step, schedule, seeds):
    losses = []
    for seed in seeds:
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(seed))
        losses.append(step(x)["loss"].item())
        schedule.step()
    return losses


@interpreter
def test_replayed_steps_on_our_launches_train_as_pytorchs_eager_ones(emulated, interpreter, recwarn):
    (ours, optimizer, schedule), (eager, other, its) = training(), training(capture=False)
    expected = losses_of(eager, its, range(6))
    assert not interpreter.launches
    with use_backend(optimizer_step="triton"):
        found = losses_of(ours, schedule, range(6))
    assert ours.graphs == len(emulated) == 1
    assert found == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(ours.model.state_dict(), eager.model.state_dict())
    torch.testing.assert_close(optimizer.state_dict()["state"], other.state_dict()["state"])
    assert optimizer.state_dict()["param_groups"] == other.state_dict()["param_groups"]
    assert interpreter.counts()["adam_scalars_kernel"] == 7  # two eager steps, the capture, and four replays
    assert str(ours.update).startswith("the optimizer: optimizer_step AdamW with clipping, 4 tensors of ")
    assert ours.update.chosen == "triton"
    assert not any("optimizer.step()" in str(one.message) for one in recwarn)


@interpreter
def test_training_goes_on_from_a_loaded_state_and_on_other_launches(emulated):
    (ours, optimizer, schedule), (eager, _, its) = training(), training(capture=False)
    expected = losses_of(eager, its, range(9))
    with use_backend(optimizer_step="triton"):
        found = losses_of(ours, schedule, range(4))
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        found += losses_of(ours, schedule, range(4, 7))
    assert found + losses_of(ours, schedule, range(7, 9)) == pytest.approx(expected, rel=1e-5)
    assert ours.update.chosen == "its parts"


def test_a_step_says_why_pytorchs_operations_update(emulated):
    step, _, schedule = training()
    losses_of(step, schedule, range(4))
    assert "tensors on cpu: Triton kernels run on GPUs" in str(step.update)
    step, _, _ = training(scaler=torch.amp.GradScaler("cpu"))
    assert (
        str(step.update)
        == "the optimizer: optimizer_step AdamW -> eager  [not triton: a gradient scaler unscales gradients]"
    )
    step, _, _ = training(capture=False)
    assert step.update.reasons == {"triton": "steps run eagerly"}


@interpreter
def test_hooks_that_come_later_have_pytorchs_step_again_and_what_was_asked_by_name_is_refused(emulated):
    step, optimizer, schedule = training()
    with use_backend("triton"):
        losses_of(step, schedule, range(4))
        assert step.update.chosen == "triton"
        seen = []
        optimizer.register_step_pre_hook(lambda *_: seen.append(optimizer.param_groups[0]["params"][0].grad.norm()))
        losses_of(step, schedule, range(3))
        assert "the AdamW has hooks, which may look at clipped gradients" in step.update.reasons["triton"]
        assert len(seen) == 3
        assert max(seen) <= 0.1001
    with use_backend(optimizer_step="triton"), pytest.raises(BackendError, match="the AdamW has hooks"):
        losses_of(step, schedule, range(1))


def test_another_optimizer_is_captured_with_its_own_step(emulated):
    step, _, schedule = training(torch.optim.SGD)
    with use_backend("triton"):
        losses_of(step, schedule, range(4))
    assert step.graphs == 1
    assert "SGD is neither torch.optim.AdamW nor" in str(step.update)
