from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import textwrap
import xml.etree.ElementTree
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


def load(path):
    spec = importlib.util.spec_from_file_location(f"benchmarks_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def gpu(monkeypatch):
    # pytest-benchmark measures nothing in a process that takes itself for a worker of several, as parts here would.
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    return load(SCRIPT)


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


def test_benchmarks_that_run_out_of_time_keep_what_they_measured(gpu, tmp_path, capsys):
    pytest.importorskip("pytest_benchmark")
    case = """
        import time
        import pytest

        @pytest.mark.parametrize("peer", ["auto", "eager"])
        def test_first(benchmark, peer):
            benchmark.group = "quick"
            benchmark.pedantic(lambda: None, rounds=2)

        def test_second():
            time.sleep(100)
    """
    (tmp_path / "test_slow.py").write_text(textwrap.dedent(case))
    out = tmp_path / "out"
    out.mkdir()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path)]
    command += [str(tmp_path / "test_slow.py"), f"--benchmark-json={out / 'benchmarks.json'}"]
    assert gpu.run([("benchmarks", command, 15)], out, "a GPU") == 1
    assert set(gpu.medians_by_case(out)["quick"]) == {"auto", "eager"}
    assert "- benchmarks: STOPPED after 15 s" in (out / "summary.md").read_text()


def test_the_summary_names_where_auto_is_slower_than_a_peer(gpu, tmp_path):
    entries = [
        {"group": "case", "params": {"peer": peer}, "stats": {"median": median}}
        for peer, median in (("auto", 2e-3), ("eager", 1e-3))
    ]
    (tmp_path / "benchmarks.json").write_text(json.dumps({"benchmarks": entries}))
    step = {"group": "step", "params": {"peer": "auto"}, "stats": {"median": 5e-3}}
    (tmp_path / "benchmarks-step.json").write_text(json.dumps({"benchmarks": [step]}))
    medians = gpu.medians_by_case(tmp_path)
    assert medians["step"] == {"auto": 5.0}
    assert gpu.slower_than_a_peer(medians)[3] == "| case | 2.00 | eager | eager 1.0000, auto 2.0000 |"
    assert "| case | auto failed | eager |" in gpu.slower_than_a_peer({"case": {"eager": 1.0}})[3]
    assert gpu.next_steps(["tests"], medians)[2:] == [
        "1. mend tests: its output is in log.txt",
        "2. case: auto takes 2.00 × eager (a wrong choice: an entry in detr_fast/ops/regimes.py)",
    ]


def test_every_part_names_files_that_exist_and_all_fit_in_nine_minutes(gpu, tmp_path):
    parts = gpu.sections(tmp_path)
    assert sum(limit for *_, limit in parts) <= 540
    for _, command, _ in parts:
        for word in command:
            if word in ("tests", "benchmarks") or word.endswith(".py"):
                assert (SCRIPT.parents[1] / word).exists()


def test_a_tool_that_is_missing_is_a_skipped_part(gpu, tmp_path):
    assert gpu.run([("memcheck", ["env", "A=1", "no-such-sanitizer", "--tool"], 5)], tmp_path, "a GPU") == 0
    assert "- memcheck: skipped: there is no no-such-sanitizer here" in (tmp_path / "summary.md").read_text()


def test_results_that_are_too_large_are_cut(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "LARGEST_FILE", 100)
    (tmp_path / "log.txt").write_bytes(b"a" * 100 + b"the end")
    (tmp_path / "trace.json.gz").write_bytes(b"a" * 100)
    gpu.drop_large_files(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["log.txt"]
    assert (tmp_path / "log.txt").read_bytes().endswith(b"the end")


@pytest.fixture
def calls(monkeypatch):
    """kernel_calls.py on meta tensors, with stubs where it asks for CUDA: all its code runs, and no kernel does."""
    from detr_fast.kernels import launch

    if launch.triton is None:
        pytest.skip("needs triton")
    module = load(SCRIPT.parent / "kernel_calls.py")
    done = []

    class Graph:
        def replay(self):
            done.append("replay")

    monkeypatch.setattr(module, "DEVICE", torch.device("meta"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", done.append)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext())
    module.done = done
    return module


def test_every_catalog_entry_takes_part_in_the_sanitizers_and_graphs_of_the_rehearsal(calls, capsys):
    assert calls.main(["once"]) == 0
    kernels = {one.variant.name for one in calls.CATALOG}
    assert len(capsys.readouterr().out.splitlines()) == len(kernels)
    assert calls.main(["graphs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len({one.example for one in calls.CATALOG})
    assert all(line.endswith(": ok") for line in lines)
    assert calls.done[:4] == ["error", "default", "replay", "replay"]


def test_a_call_that_waits_for_the_host_fails_and_the_others_go_on(calls, capsys, monkeypatch):
    def waiting(device):
        def call():
            if calls.done[-1:] == ["error"]:
                raise RuntimeError("called a synchronizing CUDA operation")
            return (torch.zeros(1),)

        return call

    broken = dataclasses.replace(calls.CATALOG[0], name="broken", example=waiting)
    monkeypatch.setattr(calls, "CATALOG", (broken, calls.CATALOG[0]))
    assert calls.main(["graphs"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "FAILED broken: RuntimeError: called a synchronizing CUDA operation",
        f"{calls.CATALOG[1].name}: ok",
    ]


def test_the_profile_leaves_a_trace_and_a_picture(calls, tmp_path, capsys):
    assert calls.main(["profile", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["profile.svg", "trace.json.gz"]
    spans = [("a<b>", 0.0, 2.0), ("c", 3.0, 4.0), ("c", 3.5, 5.0)]
    assert calls.busy_time(spans) == (4.0, 5.0)
    drawn = xml.etree.ElementTree.fromstring(calls.picture(spans))
    assert [child.tag.split("}")[1] for child in drawn] == ["rect"] * 3 + ["text"] * 2


@pytest.mark.timeout(1800)  # two minutes on an idle core
def test_the_whole_run_is_rehearsed_end_to_end(gpu, tmp_path, monkeypatch, capsys):
    """Every section runs its own code, with the CPU in the GPU's place (tests/rehearsal.py); nothing is timed."""
    tools, out, prefix = (tmp_path / name for name in ("bin", "out", "prefix"))
    tools.mkdir()
    sanitizer = tools / "compute-sanitizer"  # takes the same arguments, and only runs what it should watch
    sanitizer.write_text('#!/bin/sh\nwhile [ "$1" != "--tool" ]; do shift; done\nshift 2\nexec "$@"\n')
    sanitizer.chmod(0o755)
    real = gpu.sections
    checkout = copy_of_the_package(tmp_path / "checkout")
    switch = ["env", "DETR_FAST_REHEARSAL=1", "TRITON_INTERPRET=1", sys.executable]

    def rehearsed(out):
        for name, command, _ in real(out):
            if "benchmarks/kernel_calls.py" in command:
                place = command.index("benchmarks/kernel_calls.py")
                yield name, [*command[:place], "-m", "tests.rehearsal", *command[place:]], 120
            elif "pytest" in command:
                place = command.index("pytest") + 1
                yield name, [*switch, *command[1:place], "-p", "tests.rehearsal", *command[place:]], 300
            elif name == "tune":
                yield name, [*switch, "-m", "tests.rehearsal", "tune"], 120
            else:  # the same installation, elsewhere, and of nothing that is installed here
                yield name, [*command[:-1], str(checkout), "--ignore-installed", "--prefix", str(prefix)], 60

    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setattr(gpu, "sections", lambda out: list(rehearsed(out)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Stub GPU")
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(out)])
    assert gpu.main() == 0, (out / "log.txt").read_text()[-6000:]
    summary = (out / "summary.md").read_text()
    assert summary.startswith("# Stub GPU, torch ")
    for name, *_ in real(out):
        assert f"- {name}: ok" in summary
    assert (prefix / "bin" / "detr-fast").exists()
    assert (out / "regimes.json").exists()
    written = list(out.iterdir())
    assert len(written) <= 8
    assert {path.name for path in written} >= {"summary.md", "log.txt", "profile.svg", "trace.json.gz"}
    assert len(summary.splitlines()) <= 60
    timed = gpu.medians_by_case(out)
    assert sum("auto" in peers and len(peers) > 1 for peers in timed.values()) >= 5, timed


def copy_of_the_package(folder):
    folder.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(SCRIPT.parents[1] / name, folder)
    for name in ("detr_fast", "kernels"):
        shutil.copytree(SCRIPT.parents[1] / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder
