from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from detr_fast import native
from tests import rehearsal

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


def load(path):
    spec = importlib.util.spec_from_file_location(f"benchmarks_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def gpu(tmp_path):
    module = load(SCRIPT)
    module.CACHE = tmp_path / "cache"
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so_plainly():
    run = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True)
    assert (run.returncode, run.stdout.strip()) == (
        1,
        "There is no GPU that PyTorch can use here: nothing was run. 'make test' needs none.",
    )


def test_a_rehearsed_tuning_leaves_what_this_user_measured_alone(monkeypatch):
    monkeypatch.delenv("DETR_FAST_CACHE", raising=False)
    with pytest.raises(SystemExit, match="DETR_FAST_CACHE"):
        rehearsal._tune()


def test_a_part_that_fails_or_hangs_does_not_stop_the_others(gpu, tmp_path, capsys):
    failing = "print('[gw1] [ 20%] FAILED tests/x.py::y '); print('FAILED tests/x.py::y - why'); raise SystemExit(3)"
    parts = [
        ("bad", [sys.executable, "-c", failing], 30),
        ("hangs", [sys.executable, "-c", "import time; print('half', flush=True); time.sleep(60)"], 2),
        ("good", [sys.executable, "-c", "print('3 passed')"], 30),
        ("writes", [sys.executable, "-c", f"print('wrote {tmp_path.resolve()}/regimes.json')"], 30),
    ]
    assert gpu.run(parts, tmp_path, "a GPU") == 1
    summary = (tmp_path / "summary.md").read_text()
    assert "- bad: FAILED (3)" in summary
    assert summary.count("FAILED tests/x.py") == 2  # once as the output's last line
    assert "    - FAILED tests/x.py::y - why" in summary
    assert "- hangs: STOPPED after 2 s" in summary
    assert "half" in summary
    assert "- good: ok" in summary
    assert "s. wrote regimes.json" in summary  # without the folder
    assert "3 passed" in summary
    assert "print('3 passed')" in (tmp_path / "log.txt").read_text()


def test_measurements_that_make_no_page_do_not_stop_the_parts_behind(gpu, tmp_path, capfd):
    odd = 'open(\'measurements.jsonl\', \'a\').write(\'3\\n{}\\n{"case": "odd", "peers": 3, "claims": []}\\n\')'
    write = [sys.executable, "-c", f"import os; os.chdir(os.environ['DETR_FAST_RESULTS']); {odd}"]
    parts = [("odd", write, 30), ("good", [sys.executable, "-c", "print('3 passed')"], 30)]
    assert gpu.run(parts, tmp_path, "a GPU") == 1
    told = capfd.readouterr()
    assert "- good: ok" in told.out
    assert told.err.count("Traceback") == 4  # the page after each part and at the end, and the pictures
    assert "section: good" in (tmp_path / "measurements.jsonl").read_text()


def test_sections_get_what_is_left_of_the_time_and_the_last_none(gpu, tmp_path, capsys):
    waits = [
        sys.executable,
        "-c",
        "import os, time; print(float(os.environ['DETR_FAST_DEADLINE']) - time.time()); time.sleep(60)",
    ]
    assert gpu.run([("first", waits, 4), ("last", waits, 30)], tmp_path, "a GPU", seconds=5.0) == 1
    summary = (tmp_path / "summary.md").read_text()
    assert "- first: STOPPED after 4 s" in summary
    assert "- last: skipped: 5 s were over" in summary
    assert gpu.run([("last", [sys.executable, "-c", "print('now')"], 30)], tmp_path, "a GPU") == 0
    assert gpu.run([("first", waits, 30)], tmp_path, "a GPU", seconds=1.0) == 0
    summary = (tmp_path / "summary.md").read_text()
    assert "- first: STOPPED after 4 s" in summary  # not that it was skipped since
    assert "- last: ok" in summary
    deadline = float((tmp_path / "log.txt").read_text().splitlines()[1])
    assert -3 < deadline - (4 - gpu.STOPPING) <= 0


def test_a_run_of_all_begins_anew_and_one_of_some_adds_to_what_is_there(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Stub GPU")
    monkeypatch.setattr(
        gpu, "sections", lambda out: [(name, [name], 1) for name in ("install", "native host", "tune", "tests")]
    )
    run = []
    monkeypatch.setattr(gpu, "run", lambda parts, out, *_: run.append([name for name, *_ in parts]) or 0)
    written = [tmp_path / name for name in ("measurements.jsonl", "regimes.json", "log.txt")]
    for arguments, left, names in (
        (["--only", "tune"], 3, ["install", "native host", "tune"]),
        ([], 0, ["install", "native host", "tune", "tests"]),
    ):
        for path in written:
            path.write_text("{}")
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path), *arguments])
        assert gpu.main() == 0
        assert sum(path.exists() for path in written) == left
        assert run[-1] == names


def test_a_section_that_there_is_not_is_said_before_anything_runs(gpu, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Stub GPU")
    monkeypatch.setattr(gpu, "sections", lambda out: [(name, [name], 1) for name in ("install", "tune")])
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path), "--only", "tune,test"])
    with pytest.raises(SystemExit, match="2"):
        gpu.main()
    assert "no section is named test: there is install, tune\n" in capsys.readouterr().err


def test_the_hosts_part_is_compiled_beside_the_first_tests_and_kept_for_the_next_run(gpu, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (checked,) = (command for name, command, _ in gpu.sections(out) if name == "tests and checks")
    files = [word for word in checked if word.endswith(".py")]
    assert files[0] == "tests/benchmarks/test_host.py"
    assert files[-1] == "tests/native/test_on_gpu.py"
    assert "DETR_FAST_NATIVE=0" in checked
    name = native.library().name
    makes = [sys.executable, "-c", f"from pathlib import Path; Path({str(out / name)!r}).write_text('compiled')"]
    assert gpu.run([("native host", makes, 30)], out, "a GPU") == 0
    assert gpu.compiled_host(out) == []
    assert [path.name for path in gpu.compiled_host(gpu.CACHE)] == [name]
    shutil.copy(gpu.CACHE / name, out)
    (checked,) = (command for name, command, _ in gpu.sections(out) if name == "tests and checks")
    assert "DETR_FAST_NATIVE=1" in checked


def test_a_hosts_part_of_another_source_or_torch_is_none(gpu, tmp_path):
    (tmp_path / "_host-1.so").touch()
    (checked,) = (command for name, command, _ in gpu.sections(tmp_path) if name == "tests and checks")
    assert "DETR_FAST_NATIVE=0" in checked


def test_every_part_names_files_that_exist_and_no_section_but_the_checks_takes_most_of_the_time(gpu, tmp_path):
    parts = gpu.sections(tmp_path)
    assert gpu.SECONDS <= 540
    assert all(limit <= gpu.SECONDS / 2 for *_, limit in parts)
    for _, command, _ in parts:
        for word in command:
            if word.endswith(".py"):
                assert (SCRIPT.parents[1] / word).exists()
    (checked,) = (command for name, command, _ in parts if name == "tests and checks")
    for path in (SCRIPT.parents[1] / "tests").rglob("test_*.py"):
        assert ("@pytest.mark.gpu" in path.read_text()) <= (str(path.relative_to(SCRIPT.parents[1])) in checked)
    for path in SCRIPT.parent.glob("test_*.py"):
        assert ("NEEDS_GPU" in path.read_text()) == (f"benchmarks/{path.name}" in checked)


def test_all_that_runs_on_a_gpu_can_be_collected_without_what_only_training_needs(gpu, tmp_path):
    (checked,) = (command for name, command, _ in gpu.sections(tmp_path) if name == "tests and checks")
    files = [word for word in checked if word.endswith(".py")]
    options = ["-q", "--collect-only", "-m", "gpu", "-p", "no:cacheprovider"]
    start = "import sys; sys.modules.update(dict.fromkeys(['pycocotools', 'expecttest'])); import pytest"
    command = [sys.executable, "-c", f"{start}; raise SystemExit(pytest.main({[*options, *files]!r}))"]
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[1])}
    run = subprocess.run(command, capture_output=True, text=True, cwd=SCRIPT.parents[1], env=environment)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]


def test_a_process_in_which_cuda_is_broken_ends_and_another_goes_on(gpu, tmp_path, monkeypatch):
    pytest.importorskip("xdist")
    case = """
        import os
        import pytest
        import torch

        torch.cuda.is_initialized = lambda: True
        torch.cuda.empty_cache = lambda: None
        torch.cuda.synchronize = lambda: None
        process = []

        @pytest.mark.gpu
        @pytest.mark.parametrize("number", range(3))
        def test_one(number):
            assert not process, "the process in which CUDA was broken goes on"
            if number == 1:
                process.append(os.getpid())
                def broken():
                    raise RuntimeError("an illegal memory access was encountered")
                torch.cuda.synchronize = broken
                torch.cuda.synchronize()
    """
    (tmp_path / "test_case.py").write_text(textwrap.dedent(case))
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *gpu.processes(1, 60)]
    command += ["--rootdir", str(tmp_path), "-c", str(tmp_path / "pytest.ini"), str(tmp_path / "test_case.py")]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=SCRIPT.parents[1])
    assert "2 passed" in run.stdout, run.stdout
    assert any("illegal memory access" in line for line in run.stdout.splitlines()), run.stdout


def test_where_the_checkout_can_not_be_installed_the_sections_import_it_as_it_lies(gpu, tmp_path, monkeypatch, capsys):
    checkout = copy_of_the_package(tmp_path / "checkout")
    monkeypatch.setattr(gpu, "ROOT", checkout)
    imports = "import detr_fast.kernels.catalog as c; print(c.__file__)"
    # -S: nothing that is installed here but what PyTorch needs
    packages = os.pathsep.join(path for path in sys.path if path.endswith("site-packages"))
    monkeypatch.setenv("PYTHONPATH", packages)
    parts = [
        ("install", [sys.executable, "-c", "raise SystemExit('error: setuptools is too old')"], 30),
        ("tune", [sys.executable, "-S", "-c", imports], 120),
    ]
    assert gpu.run(parts, tmp_path, "a GPU") == 1
    summary = (tmp_path / "summary.md").read_text()
    assert "- tune: ok, " in summary, (tmp_path / "log.txt").read_text()
    assert f" {Path('checkout', 'detr_fast', 'kernels', 'catalog.py')}" in summary


def test_sanitizers_watch_all_our_kernels_and_no_other_librarys(gpu, calls, tmp_path):
    names = {one.variant.kernel.__name__ for one in calls.CATALOG}
    assert len(names) > 20
    for name in names:
        assert re.search(gpu.OUR_KERNELS, name)
    for name in (
        "nvjet_sm90_tst_64x8_64x16_1x1_h_bz_splitK_NNT",
        "sm80_xmma_gemm_f32f32_f32f32_f32_nn_n_tilesize32x32x8_stage3_warpsize1x2x1_ffma_aligna4_alignc4_execute_kernel__5x_cublas",
        "_ZN2at6native29vectorized_elementwise_kernelILi4ENS0_11FillFunctorIfEEEEviT0_T1_",
        "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>(int, float)",
    ):
        assert not re.search(gpu.OUR_KERNELS, name)
    watched = [command for name, command, _ in gpu.sections(tmp_path) if name in ("memcheck", "racecheck")]
    assert all(f"regex={gpu.OUR_KERNELS}" in command for command in watched)
    assert len(watched) == 2


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
    examples = {one.example for one in calls.CATALOG}
    assert len(capsys.readouterr().out.splitlines()) == len(examples)
    assert calls.main(["graphs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(examples)
    assert all(line.endswith(": ok") for line in lines)
    assert calls.done[:4] == ["error", "default", "replay", "replay"]


def test_a_sanitizer_sees_no_product_of_cublas(calls):
    a, b, c = torch.randn(3, 4), torch.randn(4, 5), torch.randn(3, 5)
    expected, named = a @ b, []

    class Named(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            named.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    with Named(), calls.WithoutCublas():
        given, added = torch.empty(3, 5), c.clone()
        found = [
            a @ b,
            torch.mm(a, b, out=given),
            torch.addmm(c, a, b, alpha=2.0) - c - expected,
            added.addmm_(a, b) - c,
            torch.nn.functional.linear(a, b.t(), c[0]) - c[0],
            given,
        ]
    for one in found:
        torch.testing.assert_close(one, expected)
    assert not any("mm" in name for name in named), named


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


def test_an_example_that_ends_its_process_costs_no_other_its_verdict():
    module = load(SCRIPT.parent / "kernel_calls.py")
    found = module._in_a_process(["None", "'differs'", "__import__('os').abort()", "None"], eval)
    assert found == [None, "differs", "the process ended in it", None]


@pytest.mark.timeout(1800)  # five minutes of CPU
def test_the_whole_run_is_rehearsed_end_to_end(gpu, tmp_path, monkeypatch, capsys):
    """Every section runs its own code, with the CPU in the GPU's place (tests/rehearsal.py); nothing is timed."""
    tools, out, prefix = (tmp_path / name for name in ("bin", "out", "prefix"))
    tools.mkdir()
    # Takes the same arguments, and only runs what it should watch, for one tool.
    sanitizer = tools / "compute-sanitizer"
    sanitizer.write_text(
        '#!/bin/sh\nwhile [ "$1" != "--tool" ]; do shift; done\n[ "$2" = racecheck ] && exit\nshift 2\nexec "$@"\n'
    )
    sanitizer.chmod(0o755)
    real = gpu.sections
    checkout = copy_of_the_package(tmp_path / "checkout")
    switch = ["env", "DETR_FAST_REHEARSAL=1", "TRITON_INTERPRET=1", sys.executable]

    def rehearsed(out):
        for name, command, _ in real(out):
            if name == "wheels":  # made for another Python
                continue
            if "benchmarks/kernel_calls.py" in command or "benchmarks.step_profile" in command:
                place = next(i for i, word in enumerate(command) if word.startswith("benchmarks"))
                head = [word for word in command[:place] if word != "-m"]
                rehearsing = switch[:-1] if "benchmarks.step_profile" in command else []
                yield name, [*rehearsing, *head, "-m", "tests.rehearsal", *command[place:]], 600
            elif "pytest" in command:
                place = command.index("pytest") + 1
                if name == "tests and checks":  # what is timed later is not checked alone, too, but for one
                    timed = {f"benchmarks/{path.name}" for path in SCRIPT.parent.glob("test_*.py")}
                    command = [word for word in command if word not in timed - {"benchmarks/test_criterion.py"}]
                yield name, [*switch[:-1], *command[:place], "-p", "tests.rehearsal", *command[place:]], 900
            elif name == "native host":
                yield name, command, 600
            elif name == "tune":
                yield name, [*switch, "-m", "tests.rehearsal", "tune"], 600
            else:  # the same installation, elsewhere, and of nothing that is installed here
                yield name, [*command[:-1], str(checkout), "--ignore-installed", "--prefix", str(prefix)], 60

    if native.library().exists():  # compiled once for all tests
        out.mkdir()
        shutil.copy(native.library(), out)
    monkeypatch.setattr(gpu, "SECONDS", 1e4)
    monkeypatch.setattr(gpu, "processes", lambda *_: ["-p", "benchmarks.fresh_process"])
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setattr(gpu, "sections", lambda out: list(rehearsed(out)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Stub GPU")
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(out)])
    assert gpu.main() == 0, (out / "log.txt").read_text()[-6000:]
    summary = (out / "summary.md").read_text()
    assert summary.startswith("# Stub GPU, torch ")
    for name, *_ in real(out):
        assert name == "wheels" or f"- {name}: ok" in summary
    assert "FAILED" not in summary
    assert (prefix / "bin" / "detr-fast").exists()
    assert (out / "regimes.json").exists()
    written = list(out.iterdir())
    assert len(written) <= 8
    assert {path.name for path in written} >= {"summary.md", "log.txt", "profile.svg", "trace.json.gz", "speedups.svg"}
    assert summary.splitlines().index("## All times") <= 160
    measured = gpu.report.measurements(out)
    peers = [entry["peers"] for entry in measured if "peers" in entry]
    assert sum("wall" in of.get("auto", {}) and len(of) > 1 for of in peers) >= 20
    assert not [of for of in peers if any("failed" in peer for peer in of.values())]
    for claim in re.findall(
        r'Claim\(\s*f?"([^"{]+)', "".join(path.read_text() for path in SCRIPT.parent.glob("test_*.py"))
    ):
        assert claim in summary


def copy_of_the_package(folder):
    folder.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(SCRIPT.parents[1] / name, folder)
    for name in ("detr_fast", "kernels"):
        shutil.copytree(SCRIPT.parents[1] / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder
