"""How often one training step makes the host wait for the GPU: never; the original's algorithm does some 75 times.

Without a GPU: forward, losses, clipping, optimizer and moving average run on fake "cuda" tensors, and backward on meta
tensors, as autograd on fake ones wants a driver.
"""

from __future__ import annotations

from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.original_step import OriginalCriterion, logged
from detr_fast.engine import graphs
from detr_fast.engine.captured import CapturedStep
from detr_fast.engine.ema import ExponentialMovingAverage
from detr_fast.engine.metrics import FLAGS, DeviceMetrics
from detr_fast.engine.trainer import LOGGED
from detr_fast.models import ModelConfig, NestedTensor, Targets, build_criterion, build_model
from detr_fast.testing import count
from tests.seen import AnswersYes, Copies

CONFIG = ModelConfig(backbone="conv", num_classes=91, backbone_width=4, d_model=32, heads=2, feedforward=32)


def inputs(device):
    images = NestedTensor(
        torch.rand(2, 3, 64, 96, device=device), torch.zeros(2, 64, 96, dtype=torch.bool, device=device)
    )
    counts = torch.zeros(2, dtype=torch.int64, device=device)
    labels = torch.zeros(2, 20, dtype=torch.int64, device=device)
    return images, Targets(torch.rand(2, 20, 4, device=device), labels, counts)


@pytest.mark.parametrize("focal", [False, True], ids=["softmax", "focal"])
def test_forward_losses_and_metrics_never_wait(focal):
    with FakeTensorMode(), torch.device("cuda"):
        model, criterion = build_model(CONFIG).train(), build_criterion(CONFIG, focal=focal)
        images, targets = inputs("cuda")
        metrics = DeviceMetrics((*LOGGED, *FLAGS), "cuda")

        def forward():
            losses = criterion(model(images), targets)
            metrics.add({**losses, "loss": criterion.weighted_sum(losses)})

        counts = count(forward)
    assert counts.total_synchronisations == 0, counts.synchronisations
    assert counts.launches["linear_assignment_kernel"] == counts.launches["matching_cost_kernel"] == 1


def test_backward_and_clipping_never_wait():
    with torch.device("meta"):
        model, criterion = build_model(CONFIG).train(), build_criterion(CONFIG)
        images, targets = inputs("meta")

        def step():
            criterion.weighted_sum(criterion(model(images), targets)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)

        counts = count(step)
    assert counts.total_synchronisations == 0, counts.synchronisations
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_clipping_optimizer_and_moving_average_never_wait():
    with FakeTensorMode(), torch.device("cuda"):
        model = build_model(CONFIG).train()
        # foreach, as fake tensors have no fused AdamW with a learning rate on the device: that one is a single kernel.
        optimizer = torch.optim.AdamW(model.parameters(), foreach=True, capturable=True)
        optimizer.param_groups[0]["lr"] = torch.empty(())
        ema = ExponentialMovingAverage(nn.Identity(), 0.999)
        ema.module = build_model(CONFIG)  # a deep copy of fake tensors would copy their mode as well
        number = torch.zeros((), dtype=torch.int64)
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)

        def update():
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            ema.update(model, number.add_(1))

        counts = count(update)
    assert counts.total_synchronisations == 0, counts.synchronisations


def test_the_originals_step_waits_some_75_times():
    with FakeTensorMode(), torch.device("cuda"), AnswersYes():
        model, weights = build_model(CONFIG).train(), build_criterion(CONFIG).weight_dict
        images, _ = inputs("cuda")
        targets = [{"boxes": torch.rand(20, 4), "labels": torch.zeros(20, dtype=torch.int64)} for _ in range(2)]

        def solve(cost):
            order = torch.arange(cost.shape[1], device="cpu")
            return order, order

        criterion = OriginalCriterion(91, solve=solve)

        def step():
            losses = criterion(model(images), targets)
            logged(losses, weights)

        counts = count(step)
    assert 65 <= counts.total_synchronisations <= 85, counts.synchronisations


def test_a_captured_step_is_what_the_trainer_runs(tiny):
    from detr_fast.engine.reporter import Reporter
    from detr_fast.engine.trainer import Trainer

    trainer = Trainer(tiny(epochs=1), Reporter())
    assert isinstance(trainer.take_step, CapturedStep)
    assert trainer.take_step.reason == "the parameters are on cpu, and CUDA graphs need a GPU"


def test_batches_travel_without_blocking_the_host(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(graphs, "_state", lambda kind: None)  # meta tensors have no autocast
    monkeypatch.setattr(graphs, "_looked_at", lambda: False)
    given = inputs("cpu")
    with Copies() as copies:
        graphs.moved(given, torch.device("meta"))
        graphed = graphs.GraphedFunction(lambda *_: None, torch.device("meta"))
        static = graphs.mapped(given, lambda tensor: torch.empty_like(tensor, device="meta"))
        graphed._buckets[graphs.shapes_of(given), None, None] = graphs._Bucket(5, static, mock.Mock())
        graphed(*given)
    assert len(copies.blocking) == 2 * 5  # images, mask, boxes, labels, counts
    assert not any(copies.blocking)


def test_for_a_gpu_batches_are_page_locked_and_padded_to_fitted_sizes(tiny, monkeypatch):
    from detr_fast.data.coco import CocoFolder
    from detr_fast.engine import training_data as module

    config, asked = tiny(epochs=1), []
    build = module.build_loader
    monkeypatch.setattr(
        module, "build_loader", lambda *a, **k: asked.append(k) or build(*a, **(k | {"pin_memory": False}))
    )
    one_gpu = mock.Mock(device=torch.device("cuda"), num_processes=1)
    module.load_training_data(config, CocoFolder.open(config.data), one_gpu, print)
    assert [k["pin_memory"] for k in asked] == [True, True]
    assert asked[0]["buckets"] is not None


def test_losses_are_read_every_so_many_steps(tiny, monkeypatch):
    from detr_fast.engine.trainer import train

    reads, read = [], DeviceMetrics.read
    monkeypatch.setattr(DeviceMetrics, "read", lambda self: reads.append(int(self._sums[-1])) or read(self))
    train(tiny(epochs=2, log_every=4))
    assert reads == [3, 1, 2]  # at the end of the first epoch, at step 4, at the end
