"""What a captured step is bound to besides shapes: settings of a model's parts, changed by users or by a forward itself."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from detr_fast.engine.captured import CapturedInference


class Windowed(nn.Module):
    """Reads settings of every kind in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.window, self.flag, self.how, self.limits, self.scales, self.mask = 2, False, "plus", (0, 1), [1, 2], None
        self.config, self.weights = SimpleNamespace(heads=1), {"all": 1}

    def forward(self, x):
        y = self.linear(x)[:, : self.window] * self.config.heads * self.scales[0] * self.weights["all"] + self.limits[1]
        y = y if self.mask is None else y * self.mask[: self.window]
        return -y if self.flag else y if self.how == "plus" else y * 7


CHANGES = {
    "int": lambda part: setattr(part, "window", 3),
    "bool": lambda part: setattr(part, "flag", True),
    "str": lambda part: setattr(part, "how", "times"),
    "tuple": lambda part: setattr(part, "limits", (0, 5)),
    "list": lambda part: part.scales.__setitem__(0, 9),
    "dictionary": lambda part: part.weights.update(all=9),
    "None": lambda part: setattr(part, "mask", torch.ones(4) * 6),
    "configuration": lambda part: setattr(part.config, "heads", 8),
    "another configuration": lambda part: setattr(part, "config", SimpleNamespace(heads=5)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_setting_that_was_changed_after_the_capture_is_what_runs(change, emulated):
    model, x = nn.Sequential(nn.Linear(4, 4), Windowed()), torch.randn(3, 4)
    inference, before = CapturedInference(model), copy.deepcopy(model[1].__dict__)
    for _ in range(4):
        inference(x)
    change(model[1])
    for graphs_then in (1, 1, 2, 2):
        assert torch.equal(inference(x), model(x))
        assert inference.graphs == graphs_then
    model[1].__dict__.update(before)
    assert torch.equal(inference(x), model(x))


def test_a_setting_of_a_part_that_changes_at_each_call_leaves_calls_eager_and_a_warning_names_it(emulated, recwarn):
    class Scaled(nn.Linear):
        factor = 1.0  # of the class, at first

        def forward(self, x):
            return super().forward(x) * self.factor

    model, x = nn.Sequential(Scaled(3, 2)), torch.randn(4, 3)
    inference = CapturedInference(model)
    for step in range(20):  # two by turns, with a graph each
        model[0].factor = step % 2 / 2
        torch.testing.assert_close(inference(x), model(x))
    assert inference.graphs == 2
    assert not recwarn
    for step in range(8):
        model[0].factor = 2.0 + step
        torch.testing.assert_close(inference(x), model(x))
    (warning,) = recwarn
    assert "Scaled.factor changed in four calls one behind the other" in str(warning.message)
    assert inference.graphs == 2


def test_a_part_that_lists_dropouts_is_captured(emulated):
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)), torch.randn(2, 4)
    model[0].dropout = [0.1, 0.2]
    inference = CapturedInference(model.eval())
    for _ in range(4):
        torch.testing.assert_close(inference(x), model(x))
    assert inference.graphs == 1


@pytest.mark.parametrize("step", [lambda n: n + 1, lambda n: 1 - n], ids=["counted", "by turns"])
def test_a_setting_that_the_forward_itself_changes_leaves_calls_eager_and_a_warning_names_it(step, emulated, recwarn):
    class Counting(nn.Linear):
        calls = 0

        def forward(self, x):
            self.calls = step(self.calls)
            return super().forward(x) * self.calls

    model, x = nn.Sequential(Counting(3, 2)), torch.randn(4, 3)
    inference, other = CapturedInference(model), copy.deepcopy(model)
    for _ in range(9):
        torch.testing.assert_close(inference(x), other(x))
    (warning,) = recwarn
    assert "four calls one behind the other changed Counting.calls themselves" in str(warning.message)
    assert inference.graphs == 0
    assert inference.reason is None


def test_what_a_forward_keeps_of_its_last_call_is_no_setting(emulated, recwarn):
    class Keeping(nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 2)
            self.last = None

        def forward(self, x):
            self.last = super().forward(x)
            return self.last * 2

    model, x = nn.Sequential(Keeping()), torch.randn(4, 3)
    inference = CapturedInference(model)
    for _ in range(6):
        inference(x)
    assert inference.graphs == 1
    assert not recwarn
