"""The training step's benchmark, in small and on the CPU: its first run on a GPU must not end in a typo."""

from __future__ import annotations

import sys

import pytest
import torch

from benchmarks import hardware, report, step_profile, test_step, timing
from benchmarks.test_step import ACCELERATED, Pair, check
from tests.stub_cuda import conv2d, stubs


@pytest.fixture(autouse=True)
def _quick_convolutions(monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "conv2d", conv2d)


def test_both_sides_of_the_step_benchmark_are_the_same_model_drop_as_much_and_train():
    pytest.importorskip("transformers")
    pair = Pair("cpu", size=(32, 64), batch=2, layers=1, feedforward=64)
    check(pair)
    config = pair.peer.config
    assert {config.dropout, config.attention_dropout, config.activation_dropout} == {pair.config.dropout} == {0.1}
    losses = {which: pair.step(which)() for which in ("uncaptured", "auto", "huggingface", *ACCELERATED[1:])}
    assert all(torch.isfinite(loss) for loss in losses.values())


def test_a_wrong_model_is_not_timed():
    pytest.importorskip("transformers")
    pair = Pair("cpu", size=(32, 32), batch=1, layers=1, feedforward=64)
    check(pair)
    with torch.no_grad():
        pair.ours.class_embed.weight.mul_(1.1)
    with pytest.raises(AssertionError, match="not timed"):
        check(pair)


def test_a_model_that_trains_less_is_not_timed():
    pytest.importorskip("transformers")
    pair = Pair("cpu", size=(32, 32), batch=1, layers=1, feedforward=64)
    pair.peer.model.backbone.requires_grad_(False)
    with pytest.raises(
        AssertionError, match=r"we train 24,\d{3},\d{3} numbers, and Hugging Face's model 1,\d{3},\d{3}: not"
    ):
        check(pair)


def test_without_transformers_our_step_is_measured_and_profiled_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)  # its import fails
    monkeypatch.setenv("DETR_FAST_RESULTS", str(tmp_path))
    monkeypatch.delenv("DETR_FAST_DEADLINE", raising=False)
    for name, value in stubs().items():
        monkeypatch.setattr(torch.cuda, name, value, raising=False)
    for module in (hardware, step_profile, test_step):
        monkeypatch.setattr(module, "REHEARSAL", True)
    for name, value in {"DEVICE": torch.device("cpu"), "FLUSHED": 16, "ROUNDS": (1, 1)}.items():
        monkeypatch.setattr(timing, name, value)
    try:
        test_step.test_training_step(("uncaptured", "huggingface", "torch.compile"))
    except pytest.skip.Exception as skipped:
        pytest.fail(f"skipped: {skipped}")
    step = report.measurements(tmp_path)[0]["peers"]
    assert step["uncaptured"]["wall"] > 0
    for peer in ("huggingface", "torch.compile"):
        assert "transformers is not installed" in step[peer]["absent"]

    for name in ("machine", "ceilings", "launches"):
        monkeypatch.setattr(step_profile, name, lambda *_: {"ms": 1.0})
    assert step_profile.main(tmp_path) == 0
    facts = [next(iter(entry)) for entry in report.measurements(tmp_path)]
    assert any(fact.endswith("captured") for fact in facts)
    assert any(fact.endswith("the GPU's ms") for fact in facts)
