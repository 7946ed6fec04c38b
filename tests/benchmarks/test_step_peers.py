"""The training step's benchmark, in small and on the CPU: its first run on a GPU must not end in a typo."""

from __future__ import annotations

import pytest
import torch

from benchmarks.test_step import Pair, check

pytest.importorskip("transformers")


def test_both_sides_of_the_step_benchmark_are_the_same_model_and_train():
    pair = Pair("cpu", size=(64, 96), batch=2, layers=1)
    check(pair)
    for which in ("uncaptured", "auto", "huggingface"):
        loss = pair.step(which)()
        assert torch.isfinite(loss)


def test_a_wrong_model_is_not_timed():
    pair = Pair("cpu", size=(64, 64), batch=1, layers=1)
    with torch.no_grad():
        pair.ours.class_embed.weight.mul_(1.1)
    with pytest.raises(AssertionError, match="not timed"):
        check(pair)
