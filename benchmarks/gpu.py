"""One command for a machine with a GPU and no network: tests on the hardware, benchmarks, tuning, a summary.

    make gpu                 # results in benchmarks/results/<gpu>/
    make gpu OUT=folder

Needs torch >= 2.11 with triton and pytest; uses pytest-benchmark where it is there. The checkout is installed without
network (`pip install --no-deps --no-build-isolation -e .`). Packages that such a machine lacks (pycocotools, say) are
carried as wheels in `wheels/`, filled on a machine with network by

    pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux2014_x86_64 -d wheels pycocotools

Sections are independent, each has its own time limit (together at most nine minutes), and each writes as it goes.
See docs/gpu-run.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LARGEST_FILE = 16 << 20


def main() -> int:
    parser = argparse.ArgumentParser(description="GPU tests and benchmarks in one run")
    parser.add_argument("--out", type=Path, help="folder for the results (default: benchmarks/results/<gpu>)")
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
    return run(sections(out), out, f"{torch.cuda.get_device_name()}, torch {torch.__version__}")


def sections(out: Path) -> list[tuple[str, list[str], int]]:
    """(name, command, seconds it may take), in the order of what matters most."""
    python = sys.executable
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    install = [python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-build-isolation"]
    wheels = sorted(map(str, (ROOT / "wheels").glob("*.whl")))
    timed, step = [*pytest, "-m", "gpu"], "benchmarks/test_step.py"
    calls = [python, "benchmarks/kernel_calls.py"]
    # Without PyTorch's own pool of memory, an access outside a tensor is one outside an allocation.
    sanitizer = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", "compute-sanitizer", "--error-exitcode", "9", "--tool"]
    return [
        *([("wheels", [*install, *wheels], 20)] if wheels else []),
        ("install", [*install, "-e", "."], 40),
        ("tests", [*pytest, "-m", "gpu", "tests"], 110),
        ("graphs and host synchronisation", [*calls, "graphs"], 40),
        ("benchmarks", [*timed, "benchmarks", "--ignore", step, f"--benchmark-json={out / 'benchmarks.json'}"], 110),
        ("training step", [*timed, step, f"--benchmark-json={out / 'benchmarks-step.json'}"], 70),
        ("profile", [*calls, "profile", str(out)], 35),
        ("memcheck", [*sanitizer, "memcheck", *calls, "once"], 35),
        ("racecheck", [*sanitizer, "racecheck", *calls, "once"], 35),
        ("tune", [python, "-c", "from detr_fast.cli import main; main(['tune'])"], 55),
    ]


def run(parts: list[tuple[str, list[str], int]], out: Path, machine: str) -> int:
    """Run each part within its time, keep its output, and end with a one-page summary."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"DETR_FAST_CACHE": str(out)}
    environment["PYTHONUNBUFFERED"] = "1"
    lines, failed = [f"# {machine}", ""], []
    log = out / "log.txt"
    log.write_text("")
    for name, command, limit in parts:
        start = time.monotonic()
        status, output = _run_part(name, command, limit, environment, log)
        if status.startswith(("FAILED", "STOPPED")):
            failed.append(name)
        last = next((line for line in reversed(output.splitlines()) if line.strip()), "")
        lines.append(f"- {name}: {status}, {time.monotonic() - start:.0f} s. {last.strip()[:160]}")
        lines += [f"    - {line[:200]}" for line in output.splitlines() if re.match(r"(FAILED|ERROR) ", line)][:12]
        medians = medians_by_case(out)
        (out / "summary.md").write_text(
            "\n".join(lines + next_steps(failed, medians) + slower_than_a_peer(medians)) + "\n"
        )
        print(f"- {name}: {status}", flush=True)
    drop_large_files(out)
    print((out / "summary.md").read_text())
    return 1 if failed else 0


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


def next_steps(failed: list[str], medians: dict[str, dict[str, float]]) -> list[str]:
    """What to change next: failures first, then where `auto` could be faster by another choice or a better kernel."""
    steps = [f"mend {name}: its output is in log.txt" for name in failed]
    for case, peers in medians.items():
        best = min(peers, key=lambda peer: peers[peer])
        if "auto" in peers and peers["auto"] > 1.05 * peers[best]:
            remedy = (
                "a wrong choice: an entry in detr_fast/ops/regimes.py"
                if best in ("eager", "triton", "sdpa")
                else "another library is ahead: kernels/configs.py, then the kernel"
            )
            steps.append(f"{case}: auto takes {peers['auto'] / peers[best]:.2f} × {best} ({remedy})")
    return (
        ["", "What to change next:", *[f"{number}. {step}" for number, step in enumerate(steps[:12], 1)]]
        if steps
        else []
    )


def medians_by_case(out: Path) -> dict[str, dict[str, float]]:
    """Median milliseconds of each peer in each benchmark of `out` that has peers."""
    cases: dict[str, dict[str, float]] = {}
    for path in sorted(out.glob("benchmarks*.json")):
        try:
            benchmarks = json.loads(path.read_text())["benchmarks"]
        except (OSError, ValueError, KeyError):
            continue
        for entry in benchmarks:
            if peer := (entry.get("params") or {}).get("peer"):
                cases.setdefault(entry["group"], {})[peer] = entry["stats"]["median"] * 1e3
    return cases


def slower_than_a_peer(cases: dict[str, dict[str, float]]) -> list[str]:
    """Where `auto` (what users get) is slower than the best peer, worst first, with medians in ms; at most a page."""
    rows = []
    for case, medians in cases.items():
        best = min(medians, key=lambda peer: medians[peer])
        rows.append((medians["auto"] / medians[best] if "auto" in medians else math.inf, case, medians, best))
    lines = ["", "| case | auto / best | best | medians, ms |", "|---|---|---|---|"] if rows else []
    for ratio, case, medians, best in sorted(rows, reverse=True, key=lambda row: row[0])[:25]:
        listed = ", ".join(f"{peer} {median:.4f}" for peer, median in sorted(medians.items(), key=lambda item: item[1]))
        lines.append(f"| {case} | {'auto failed' if ratio == math.inf else f'{ratio:.2f}'} | {best} | {listed} |")
    return lines


if __name__ == "__main__":
    sys.exit(main())
