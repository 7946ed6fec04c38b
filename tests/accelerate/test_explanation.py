"""What `explain` says an op costs."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

import detr_fast
from detr_fast import native, ops
from detr_fast import nn as ours
from detr_fast.explanation import Explanation, Record, explaining, measured_times


def test_each_op_has_its_launches_and_bytes_and_the_rest_is_summed_up(capsys):
    model = nn.Sequential(ours.LayerNorm(8), nn.Linear(8, 8), nn.ReLU(), ours.LayerNorm(8))
    records = detr_fast.explain(model, torch.ones(4, 8))
    tensors = 4 * 8 * 4
    assert [(r.module, r.launches) for r in records] == [("0", 1), ("3", 1)]
    assert all(r.bytes_moved == 2 * tensors + 2 * 8 * 4 + 2 * 4 * 4 for r in records)  # with weight, bias, statistics
    printed = capsys.readouterr().out
    assert "everything else: 2 launches" in printed
    assert f"in all: {records.counts.total_launches} launches" in printed
    assert records.counts.total_launches == 4
    assert records.as_dicts()[0]["launches"] == 1
    assert repr(records) == "<Explanation of 2 records; print() shows them, as_dicts() gives plain data>"


def test_the_costs_of_calls_of_one_module_are_added_up():
    norm = ours.LayerNorm(8)
    (record,) = detr_fast.explain(nn.Sequential(norm, norm), torch.ones(4, 8), quiet=True)
    assert (record.calls, record.launches) == (2, 2)


def test_a_reason_against_several_implementations_is_said_once():
    layer = ours.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    records = detr_fast.explain(layer, torch.ones(1, 3, 8), quiet=True)
    (block,) = (str(record) for record in records if record.op == "feed_forward")
    assert block.endswith(
        "[not triton, triton_recompute, triton_one_kernel: tensors on cpu: Triton kernels run on GPUs]"
    )


def test_a_models_arguments_may_have_any_name():
    class Scale(nn.Module):
        def forward(self, x, model):
            return model * x

    assert detr_fast.explain(Scale(), torch.ones(2), model=3.0, quiet=True).counts.total_launches == 1


def test_models_are_explained_while_other_threads_run_theirs():
    model, stop, errors = nn.Sequential(ours.LayerNorm(8), nn.Sequential(nn.ReLU(), nn.ReLU())), threading.Event(), []

    def work():
        try:
            while not stop.is_set():
                model(torch.ones(2, 8))
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(50):
            assert {r.module for r in detr_fast.explain(model, torch.ones(2, 8), quiet=True)} == {"0"}
    finally:
        stop.set()
        thread.join()
    assert not errors


def test_what_another_thread_is_in_the_middle_of_is_not_explained():
    inside, go_on = threading.Event(), threading.Event()

    class Waiting(nn.Module):
        def forward(self, x):
            inside.set()
            assert go_on.wait(60)
            return ops.layer_norm(x, (8,))

    model = Waiting()
    thread = threading.Thread(target=model, args=(torch.ones(2, 8),))
    thread.start()
    assert inside.wait(60)
    with explaining(model) as records:
        go_on.set()
        thread.join()
    assert records == []


def test_explaining_a_step_counts_nothing_unless_asked():
    model = nn.Sequential(ours.LayerNorm(8))
    with explaining(model) as records:
        model(torch.ones(4, 8))
    assert records.counts is None
    assert not hasattr(records[0], "launches")
    assert "launch" not in str(records)


@pytest.mark.parametrize("training", [True, False])
def test_a_model_is_explained_without_a_trace(training):
    model = nn.Sequential(nn.BatchNorm1d(8), ours.LayerNorm(8), nn.Dropout()).train(training)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = torch.randn(4, 8)
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    detr_fast.explain(model, x, quiet=True)
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training is training


class Counting(nn.Module):
    """Counts its calls in two buffers, one changed in place, one replaced, and has one whose elements share memory."""

    def __init__(self):
        super().__init__()
        self.norm = ours.LayerNorm(8)
        self.register_buffer("changed", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(()))
        self.register_buffer("shared", torch.zeros(1, 8).expand(4, 8))

    def forward(self, x):
        self.changed += 1
        self.replaced = self.replaced + 1
        return self.norm(x + self.shared)


@pytest.mark.parametrize("training", [True, False])
def test_buffers_are_the_same_tensors_with_the_same_values_afterwards(training):
    model = Counting().train(training)
    before = dict(model.named_buffers())
    detr_fast.explain(model, torch.ones(4, 8), quiet=True)
    assert all(model.get_buffer(name) is buffer for name, buffer in before.items())
    assert all(float(buffer.abs().sum()) == 0 for buffer in before.values())


def test_a_model_whose_buffers_are_of_inference_mode_is_explained():
    model = Counting()
    with torch.inference_mode():
        model.shared = torch.ones(4, 8)
    assert detr_fast.explain(model, torch.ones(4, 8), quiet=True)[0].op == "layer_norm"
    with torch.inference_mode():
        detr_fast.explain(model, torch.ones(4, 8), quiet=True)


def test_times_are_those_of_each_modules_calls_the_median_over_runs():
    class Event:  # stands for torch.cuda.Event: time passes only in Wait
        now = 0.0

        def record(self):
            self.at = Event.now

        def synchronize(self):
            pass

        def elapsed_time(self, other):
            return other.at - self.at

    class Wait(nn.Module):
        def forward(self, x):
            Event.now += next(durations)
            return x

    durations = iter([1.0, 2.0, 100.0, 3.0, 4.0, 5.0])  # two calls a run
    wait = Wait()
    model = nn.Sequential(wait, nn.Identity(), wait)
    times = measured_times(model, lambda: model(torch.ones(1)), 3, Event)
    assert times == {"": 9.0, "0": 9.0, "1": 0.0}


def test_where_kernels_were_chosen_on_a_gpu_it_says_who_launches_them(monkeypatch):
    chosen = Explanation([Record("0", "layer_norm", "(4, 8) float32", "triton", {})])
    assert "C++" not in str(chosen)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(native, "status", "being compiled")
    assert str(chosen).endswith("launched eagerly, the host's part in C++ is being compiled")
    assert "C++" not in str(Explanation([Record("0", "layer_norm", "(4, 8) float32", "eager", {})]))
