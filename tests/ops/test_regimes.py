from __future__ import annotations

import pytest
import torch

from detr_fast.dispatch import Call, Situation
from detr_fast.ops import regimes
from detr_fast.ops.regimes import Regime
from detr_fast.ops.tuning import NEVER, Timing, threshold


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DETR_FAST_CACHE", str(tmp_path))
    regimes.known.cache_clear()
    yield tmp_path
    regimes.known.cache_clear()


def call(architecture="sm_90", regime="eager"):
    situation = Situation(regime, True, None, False, None)
    return Call(torch.device("cuda"), architecture, torch.bfloat16, torch.Tensor, True, situation)


def test_what_the_user_measured_decides_and_survives_a_restart():
    regimes.save([Regime("layer_norm", "sm_90", 1 << 20, 4096, "H100")])
    regimes.known.cache_clear()
    assert regimes.advice("layer_norm", call(), 1 << 20) is None
    assert "1 MiB" in regimes.advice("layer_norm", call(), (1 << 20) - 1)
    assert regimes.advice("layer_norm", call(regime="captured"), 4096) is None
    assert regimes.note("layer_norm", call()) is None


def test_the_nearest_architecture_counts_and_is_called_unmeasured():
    regimes.save(
        [
            Regime("layer_norm", "sm_80", 1, 1, ""),
            Regime("layer_norm", "sm_120", 2, 2, ""),
            Regime("layer_norm", "gfx942", 3, 3, ""),
        ]
    )
    assert regimes.find("layer_norm", "sm_90").architecture == "sm_80"
    assert regimes.find("layer_norm", "gfx90a").architecture == "gfx942"
    assert "unmeasured on this GPU" in regimes.note("layer_norm", call("sm_90"))


def test_without_any_measurement_small_calls_stay_eager_unless_launches_are_free():
    assert "run detr-fast tune" in regimes.advice("layer_norm", call(), 1 << 20)
    assert regimes.advice("layer_norm", call(), 64 << 20) is None
    assert regimes.advice("layer_norm", call(regime="captured"), 1) is None


@pytest.mark.parametrize("content", ["", "{", '[{"op": 1}]', "[3]"])
def test_an_unreadable_cache_counts_as_empty(cache, content):
    (cache / "regimes.json").write_text(content)
    assert regimes.known() == regimes.SHIPPED


def test_the_threshold_is_where_the_kernel_wins_from_there_on():
    timings = [Timing(1, 1.0, 0.5), Timing(2, 1.0, 1.5), Timing(4, 1.0, 0.9), Timing(8, 1.0, 0.5)]
    assert threshold(timings) == 4
    assert threshold([Timing(8, 1.0, 1.1)]) == NEVER
    assert threshold([Timing(4, 1.0, 0.5), Timing(8, 1.0, 0.5, right=False)]) == NEVER
