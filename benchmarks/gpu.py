"""One command for a machine with a GPU and no network: tests on the hardware, benchmarks, tuning, a summary.

    make gpu                                # results in benchmarks/results/<gpu>/, in place of what is measured there
    make gpu OUT=folder ONLY=tests,tune     # some sections again: measurements are added to what the folder holds

Needs torch >= 2.11 with triton and pytest; with pytest-xdist results are checked in many processes first, which is also
what fills Triton's and torch.compile's caches, and a test that breaks CUDA breaks no other. The checkout is installed without
network (`pip install --no-deps --no-build-isolation -e .`). Packages that such a machine lacks are carried as wheels in
`wheels/`, filled on a machine with network, say for the libraries beside which kernels are timed, by

    pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux2014_x86_64 -d wheels liger-kernel

xformers' wheel wants CUDA 12's runtime, which is one more: nvidia-cuda-runtime-cu12.

Sections are independent and in the order of what matters most. Each has its own time limit, all together have nine
minutes, and each writes as it goes. See docs/gpu-run.md.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import figures, report  # noqa: E402

FIRST = ("test_host", "test_attention", "test_captured")  # test_host compiles the host's part; then what takes longest
LAST = ("test_on_gpu",)  # which waits for that
OUR_KERNELS = "^[a-z0-9_]+_kernel$"  # names of no other library's, whose races are not ours to mend
LARGEST_FILE = 16 << 20
SECONDS = 540.0  # of all sections together
LEAST = 20  # seconds without which a section is not begun
STOPPING = 12.0  # seconds before its limit in which a section should begin nothing new
CACHE = Path.home() / ".cache" / "detr-fast"  # where the host's part is kept between runs
Section = tuple[str, list[str], int]


def main() -> int:
    parser = argparse.ArgumentParser(description="GPU tests and benchmarks in one run")
    parser.add_argument("--out", type=Path, help="folder for the results (default: benchmarks/results/<gpu>)")
    parser.add_argument("--only", help="sections to run, separated by commas: words of their names (default: all)")
    arguments = parser.parse_args()
    try:
        import torch
    except ImportError:
        print("PyTorch is not installed for this Python: run 'make setup', or name another with PYTHON=…")
        return 1
    if not torch.cuda.is_available():
        print("There is no GPU that PyTorch can use here: nothing was run. 'make test' needs none.")
        return 1
    name = torch.cuda.get_device_name().replace(" ", "-").lower()
    out = arguments.out or ROOT / "benchmarks" / "results" / name
    out.mkdir(parents=True, exist_ok=True)
    for path in compiled_host(CACHE):
        shutil.copy(path, out)
    chosen = sections(out)
    if arguments.only:
        wanted = arguments.only.split(",")
        if unknown := [word for word in wanted if not any(word in part[0] for part in chosen)]:
            parser.error(
                f"no section is named {' or '.join(unknown)}: there is {', '.join(part[0] for part in chosen)}"
            )
        chosen = [part for part in chosen if any(word in part[0] for word in ("wheels", "install", "native", *wanted))]
    else:
        for name in ("measurements.jsonl", "regimes.json", "log.txt"):
            (out / name).unlink(missing_ok=True)
    return run(chosen, out, f"{torch.cuda.get_device_name()}, torch {torch.__version__}", SECONDS)


def compiled_host(folder: Path) -> list[Path]:
    """The host's part of this source and torch, where the folder holds it: with another one's, each process would wait for a compiler."""
    from detr_fast import native

    path = folder / native.library().name
    return [path] if path.exists() else []


def sections(out: Path) -> list[Section]:
    """(name, command, seconds it may take), in the order of what matters most."""
    python = sys.executable
    pytest = [python, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--continue-on-collection-errors", "-m", "gpu"]
    pytest += ["--durations", "15"]
    many, one = processes(min(14, max(2, (os.cpu_count() or 4) - 2)), 190), processes(1, 60)
    install = [python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-build-isolation"]
    wheels = sorted(map(str, (ROOT / "wheels").glob("*.whl")))
    step = "benchmarks/test_step.py"
    found = sorted(path for path in (ROOT / "tests").rglob("test_*.py") if needs_gpu(path))
    found.sort(
        key=lambda path: (
            path.name.startswith(LAST),
            not path.name.startswith(FIRST[:1]),
            not path.name.startswith(FIRST),
        )
    )
    files = [str(path.relative_to(ROOT)) for path in found]
    names = (
        "layers",
        "attention",
        "layer_norm",
        "rotary_embedding",
        "gated_activation",
        "attention_forms",
        "losses",
        "prediction_heads",
        "deformable_attention",
        "criterion",
        "optimizer",
        "casts",
        "sine_positions",
        "hugging_face_layers",
        "backbone",
        "pointwise",
    )
    timed = [f"benchmarks/test_{name}.py" for name in names]
    # The compilers of many processes share the cores, and the longest compilation begins first. The host's part is one of them: what does
    # not test it goes without until it is there.
    native = f"DETR_FAST_NATIVE={int(bool(compiled_host(out)))}"
    sharing = ["env", "DETR_FAST_CHECK_ONLY=1", "TORCHINDUCTOR_COMPILE_THREADS=4", "OMP_NUM_THREADS=1", native]
    calls = [python, "benchmarks/kernel_calls.py"]
    # Without PyTorch's own pool of memory, an access outside a tensor is one outside an allocation.
    # The part in C++ asks the driver for a kernel's parameters until there are no more, which counts as an error of CUDA's.
    without = ["PYTORCH_NO_CUDA_MEMORY_CACHING=1", "DETR_FAST_NATIVE=0"]
    sanitizer = ["env", *without, "compute-sanitizer", "--error-exitcode", "9"]
    sanitizer += ["--kernel-name", f"regex={OUR_KERNELS}", "--tool"]
    return [
        *([("wheels", [*install, *wheels], 30)] if wheels else []),
        ("install", [*install, "-e", "."], 40),
        ("tests and checks", [*sharing, *pytest, *many, files[0], step, *timed, *files[1:]], 220),
        ("native host", [python, "-m", "detr_fast.native"], 100),
        ("graphs and host synchronisation", [*calls, "graphs"], 60),
        ("memcheck", [*sanitizer, "memcheck", *calls, "once"], 60),
        ("racecheck", [*sanitizer, "racecheck", *calls, "once"], 60),
        ("tune", [python, "-c", "from detr_fast.cli import main; main(['tune'])"], 190),
        ("training step", [*pytest, *processes(1, 85), "-k", "not compile", step], 90),
        ("benchmarks", [*pytest, *one, *timed], 190),
        ("profile", [python, "-m", "benchmarks.step_profile", str(out)], 75),
        ("step beside torch.compile", [*pytest, *processes(1, 215), "-k", "compile", step], 220),
    ]


def needs_gpu(path: Path) -> bool:
    """Whether a file has tests for a GPU: others may import what is not installed there."""
    return "mark.gpu" in path.read_text() or "NEEDS_GPU" in path.read_text()


def processes(number: int, seconds: int) -> list[str]:
    """pytest's options: so many processes that begin tests one by one in order; a test that hangs ends its own after `seconds`."""
    options = ["-p", "benchmarks.fresh_process"]
    if importlib.util.find_spec("xdist"):
        options += ["-n", str(number), "--maxschedchunk", "1", "--max-worker-restart", "30"]
        if importlib.util.find_spec("pytest_timeout"):
            options += ["--timeout", str(seconds), "--timeout-method", "thread"]
    return options


def run(parts: list[Section], out: Path, machine: str, seconds: float = SECONDS) -> int:
    """Run each part within its time and what is left of all, keep its output, and bring the one-page summary up to date."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {
        "DETR_FAST_CACHE": str(out.resolve()),
        "DETR_FAST_RESULTS": str(out.resolve()),
        "PYTHONUNBUFFERED": "1",
    }
    failed = []
    log = out / "log.txt"
    end = time.monotonic() + seconds
    for name, command, longest in parts:
        begun = time.monotonic()
        limit = min(longest, int(end - begun))
        if limit < min(longest, LEAST):
            status, output = f"skipped: {seconds:.0f} s were over", ""
        else:
            environment["DETR_FAST_DEADLINE"] = str(time.time() + limit - STOPPING)
            status, output = _run_part(name, command, limit, environment, log)
        if status.startswith(("FAILED", "STOPPED")):
            failed.append(name)
        output = output.replace(
            f"{out.resolve()}{os.sep}", ""
        )  # results are published, and folders of the machine aren't
        last = next((line for line in reversed(output.splitlines()) if line.strip()), "")
        known = any(report.SECTION + name in entry for entry in report.measurements(out))
        if not (known and status.startswith("skipped")):
            told = [f"{status}, {time.monotonic() - begun:.0f} s. {last.strip()[:160]}", *failures(output)[:12]]
            report.keep_section(out, name, [line[:200] for line in told])
        tell(failed, "summary", lambda: report.write(out, machine, failed))
        print(f"- {name}: {status}", flush=True)
        if name == "install" and name in failed:
            import_from_checkout(environment)
        if name == "native host" and name not in failed:
            environment["DETR_FAST_NATIVE"] = "1"
    for path in compiled_host(out):
        CACHE.mkdir(mode=0o700, parents=True, exist_ok=True)
        shutil.move(path, CACHE / path.name)
    for path in out.glob("_host-*"):
        path.unlink()
    tell(failed, "pictures", lambda: figures.write(out))
    drop_large_files(out)
    tell(failed, "summary", lambda: print("\n".join(report.page(report.measurements(out), failed, times=False))))
    print(f"\nAll times: {out / 'summary.md'}")
    return 1 if failed else 0


def tell(failed: list[str], name: str, write: Callable[[], object]) -> None:
    """Write what tells of results; where it can't be made of what was measured, the run goes on, and counts as failed."""
    try:
        write()
    except Exception:
        traceback.print_exc()
        if name not in failed:
            failed.append(name)


def import_from_checkout(environment: dict[str, str]) -> None:
    """What the installation would have done for the sections that follow: `kernels/` is `detr_fast.kernels`."""
    link = ROOT / "detr_fast" / "kernels"
    if not link.exists():
        link.symlink_to(Path("..") / "kernels", target_is_directory=True)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"))))


def failures(output: str) -> list[str]:
    """Lines that begin with FAILED or ERROR, each test once: as it ends, and again, with the reason, at the end of a run."""
    found: dict[str, str] = {}
    for line in output.splitlines():
        if told := re.match(r"(?:\[gw\d+\] \[ *\d+%\] )?((?:FAILED|ERROR) (\S+).*)", line):
            found[told[2]] = told[1]
    return list(found.values())


def _run_part(name: str, command: list[str], limit: int, environment: dict[str, str], log: Path) -> tuple[str, str]:
    """Status and output of one part; the output is in the log while the part still runs."""
    tool = next((word for word in command if word != "env" and "=" not in word), "")
    if shutil.which(tool) is None:
        return f"skipped: there is no {tool} here", ""
    with log.open("a") as file:
        file.write(f"===== {name}: {' '.join(command)}\n")
        file.flush()
        begin = file.tell()
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        end = None  # what is written while it is being stopped says nothing of it
        try:
            code = process.wait(limit)
            status = "ok" if code == 0 else f"FAILED ({code})"
        except subprocess.TimeoutExpired:
            status, end = f"STOPPED after {limit} s", log.stat().st_size
            _stop(process)
    with log.open("rb") as written:
        written.seek(begin)
        return status, written.read(None if end is None else end - begin).decode(errors="replace")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Interrupt, so that pytest writes what it has measured; after ten seconds end it, with all that it has started."""
    os.killpg(process.pid, signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def drop_large_files(out: Path) -> None:
    """Results are at most 16 MiB a file: the log loses its beginning, anything else goes."""
    for path in out.iterdir():
        if path.is_file() and path.stat().st_size >= LARGEST_FILE:
            if path.suffix == ".txt":
                path.write_bytes(path.read_bytes()[-LARGEST_FILE // 2 :])
            else:
                path.unlink()


if __name__ == "__main__":
    sys.exit(main())
