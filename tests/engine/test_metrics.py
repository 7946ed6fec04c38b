from __future__ import annotations

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from detr_fast.engine.errors import TrainingDiverged
from detr_fast.engine.metrics import DeviceMetrics, raise_for_flags
from detr_fast.models import TargetError
from detr_fast.testing import count


def test_means_are_those_of_the_steps_since_the_last_read():
    metrics = DeviceMetrics(("loss", "class_error"), "cpu")
    place = metrics._sums.data_ptr()
    for value in (1.0, 2.0):
        metrics.add({"loss": torch.tensor(value), "class_error": torch.tensor(50.0), "more": torch.tensor(0.0)})
    assert metrics.read() == {"loss": 1.5, "class_error": 50.0}
    metrics.add({"loss": torch.tensor(4.0, dtype=torch.bfloat16), "class_error": torch.tensor(0)})
    assert metrics.read() == {"loss": 4.0, "class_error": 0.0}
    assert all(map(math.isnan, metrics.read().values()))
    assert metrics._sums.data_ptr() == place  # a CUDA graph goes on adding to it


def test_adding_never_waits_for_the_device():
    with FakeTensorMode():
        metrics = DeviceMetrics(("loss",), "cuda")
        counts = count(lambda: metrics.add({"loss": torch.empty((), device="cuda")}))
    assert counts.total_synchronisations == 0


@pytest.mark.parametrize(
    ("means", "error", "message"),
    [
        ({"loss": math.nan}, TrainingDiverged, "the loss of steps 1 to 10 is not finite; lower --lr"),
        (
            {"loss": 1.0, "broken_predictions": 3.0},
            TrainingDiverged,
            "not finite, and 3 predictions a step are NaN or infinite; lower --lr",
        ),
        (
            {"loss": math.inf, "broken_targets": 0.1},
            TargetError,
            r"steps 1 to 10 had true boxes outside \[0, 1\].*0\.1 a step on average; run 'detr-fast doctor'",
        ),
    ],
)
def test_what_went_wrong_on_the_device_is_one_clear_error(means, error, message):
    with pytest.raises(error, match=message):
        raise_for_flags(means, "steps 1 to 10", "lower --lr")


def test_sound_steps_raise_nothing():
    raise_for_flags({"loss": 2.0, "broken_predictions": 0.0, "broken_targets": 0.0}, "step 1", "")
