from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


@pytest.fixture
def gpu():
    spec = importlib.util.spec_from_file_location("gpu_run", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so_plainly():
    run = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True)
    assert (run.returncode, run.stdout.strip()) == (
        1,
        "There is no GPU that PyTorch can use here: nothing was run. 'make test' needs none.",
    )


def test_a_part_that_fails_or_hangs_does_not_stop_the_others(gpu, tmp_path, capsys):
    parts = [
        ("bad", [sys.executable, "-c", "print('FAILED tests/x.py'); raise SystemExit(3)"], 30),
        ("hangs", [sys.executable, "-c", "import time; print('half', flush=True); time.sleep(60)"], 2),
        ("good", [sys.executable, "-c", "print('3 passed')"], 30),
    ]
    assert gpu.run(parts, tmp_path, "a GPU") == 1
    summary = (tmp_path / "summary.md").read_text()
    assert "- bad: FAILED (3)" in summary
    assert "    - FAILED tests/x.py" in summary
    assert "- hangs: STOPPED after 2 s" in summary
    assert "half" in summary
    assert "- good: ok" in summary
    assert "3 passed" in summary
    assert "print('3 passed')" in (tmp_path / "log.txt").read_text()


def test_the_summary_names_where_auto_is_slower_than_a_peer(gpu, tmp_path):
    entries = [
        {"group": "case", "params": {"peer": peer}, "stats": {"median": median}}
        for peer, median in (("auto", 2e-3), ("eager", 1e-3))
    ]
    (tmp_path / "benchmarks.json").write_text(json.dumps({"benchmarks": entries}))
    assert (
        gpu.slower_than_a_peer(tmp_path / "benchmarks.json")[-1]
        == "| case | 2.00 | eager | eager 1.0000, auto 2.0000 |"
    )


def test_every_part_of_the_real_run_names_files_that_exist(gpu, tmp_path):
    for _, command, _ in gpu.sections(tmp_path):
        for word in command:
            if word in ("tests", "benchmarks"):
                assert (SCRIPT.parents[1] / word).is_dir()
