"""The counters' ratchet: what may not get worse, and the page that shows it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from detr_fast.kernels import launch

from detr_fast.testing.ratchet import Ratchet

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "counters.py"


@pytest.fixture
def counters():
    spec = importlib.util.spec_from_file_location("counters", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(launch.triton is None, reason="counts kernels")
def test_no_counter_is_worse_than_recorded_and_the_docs_show_what_is(counters, monkeypatch):
    recorded = json.loads(counters.EAGER.read_text())
    if recorded["torch"] != counters.VERSION:
        pytest.skip(f"recorded on torch {recorded['torch']}: other versions decompose some operations otherwise")
    if counters.RATCHET.check(counters.measure(counters.nn)):
        counters.TABLE.write_text(counters.table(counters.RATCHET.recorded(), recorded["cases"]))
    expected = counters.table(counters.RATCHET.recorded(), recorded["cases"])
    assert counters.TABLE.read_text() == expected, f"docs are stale: run '{counters.COMMAND}'"


@pytest.fixture
def ratchet(tmp_path, monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    made = Ratchet(tmp_path / "numbers.json", "python update.py")
    assert made.check({"layer": {"launches": 10, "bytes": 100}})
    return made


def test_a_worse_number_fails_and_is_not_written(ratchet):
    with pytest.raises(AssertionError, match=r"layer: launches 11, was 10\n.*delete the case"):
        ratchet.check({"layer": {"launches": 11, "bytes": 90}})
    assert ratchet.recorded() == {"layer": {"launches": 10, "bytes": 100}}


def test_a_better_or_new_number_is_written_down(ratchet):
    assert not ratchet.check({"layer": {"launches": 10, "bytes": 100}})
    better = {"layer": {"launches": 9, "bytes": 100}, "other": {"launches": 1}}
    assert ratchet.check(better)
    assert ratchet.recorded() == better


def test_in_ci_an_improvement_that_is_not_recorded_fails_with_the_command(ratchet, monkeypatch):
    monkeypatch.setenv("CI", "true")
    assert not ratchet.check({"layer": {"launches": 10, "bytes": 100}})
    with pytest.raises(AssertionError, match=r"\(layer\): run 'python update.py' and commit"):
        ratchet.check({"layer": {"launches": 9, "bytes": 100}})
    assert ratchet.recorded()["layer"]["launches"] == 10
