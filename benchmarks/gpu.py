"""One command for a machine with a GPU and no network: tests on the hardware, benchmarks, tuning, a summary.

    make gpu                 # results in benchmarks/results/<gpu>/
    make gpu OUT=folder

Needs torch >= 2.11 with triton and pytest; uses pytest-benchmark where it is there. The checkout is installed without
network (`pip install --no-deps --no-build-isolation -e .`). Packages that such a machine lacks (pycocotools, say) are
carried as wheels in `wheels/`, filled on a machine with network by

    pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux2014_x86_64 -d wheels pycocotools

Sections are independent, each has its own time limit, and each writes its results as soon as it ends.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


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
    return [
        *([("wheels", [*install, *wheels], 60)] if wheels else []),
        ("install", [*install, "-e", "."], 60),
        ("tests", [*pytest, "-m", "gpu", "tests"], 150),
        ("benchmarks", [*pytest, "benchmarks", f"--benchmark-json={out / 'benchmarks.json'}"], 200),
        ("tune", [python, "-c", "from detr_fast.cli import main; main(['tune'])"], 60),
    ]


def run(parts: list[tuple[str, list[str], int]], out: Path, machine: str) -> int:
    """Run each part within its time, keep its output, and end with a one-page summary."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"DETR_FAST_CACHE": str(out)}
    lines, failed = [f"# {machine}", ""], 0
    log = out / "log.txt"
    log.write_text("")
    for name, command, limit in parts:
        start = time.monotonic()
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env=environment,
                timeout=limit,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            status, output = ("ok" if done.returncode == 0 else f"FAILED ({done.returncode})"), done.stdout
        except subprocess.TimeoutExpired as late:
            status, output = f"STOPPED after {limit} s", (late.stdout or b"").decode(errors="replace")
        failed += status != "ok"
        last = next((line for line in reversed(output.splitlines()) if line.strip()), "")
        lines.append(f"- {name}: {status}, {time.monotonic() - start:.0f} s. {last.strip()[:160]}")
        lines += [f"    - {line[:200]}" for line in output.splitlines() if re.match(r"(FAILED|ERROR) ", line)][:20]
        with log.open("a") as file:
            file.write(f"===== {name}: {' '.join(command)}\n{output}\n")
        (out / "summary.md").write_text("\n".join(lines + slower_than_a_peer(out / "benchmarks.json")) + "\n")
        print(lines[-1] if lines[-1].startswith("- ") else f"- {name}: {status}", flush=True)
    print((out / "summary.md").read_text())
    return 1 if failed else 0


def slower_than_a_peer(path: Path) -> list[str]:
    """Where `auto` (what users get) is slower than the best peer, worst first, with medians in ms."""
    try:
        benchmarks = json.loads(path.read_text())["benchmarks"]
    except (OSError, ValueError, KeyError):
        return []
    groups: dict[str, dict[str, float]] = {}
    for entry in benchmarks:
        groups.setdefault(entry["group"], {})[entry["params"]["peer"]] = entry["stats"]["median"] * 1e3
    rows = []
    for group, medians in groups.items():
        best = min(medians, key=lambda peer: medians[peer])
        rows.append((medians.get("auto", 0.0) / medians[best], group, medians, best))
    lines = ["", "| case | auto / best | best | medians, ms |", "|---|---|---|---|"]
    for ratio, group, medians, best in sorted(rows, reverse=True, key=lambda row: row[0]):
        listed = ", ".join(f"{peer} {median:.4f}" for peer, median in sorted(medians.items(), key=lambda item: item[1]))
        lines.append(f"| {group} | {ratio:.2f} | {best} | {listed} |")
    return lines


if __name__ == "__main__":
    sys.exit(main())
