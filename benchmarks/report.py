"""One page of what `make gpu` has measured: what is claimed and whether it shows, what to change, where a peer is faster.

python benchmarks/report.py FOLDER          # from measurements.jsonl
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

HOW = {"wall": "launched eagerly", "graph": "in a CUDA graph", "gpu": "the GPU alone"}  # what is timed
IS_GRAPH = "ours, as it is run, a CUDA graph"
CAPTURABLE = ("auto", "triton", "chunked")  # ours, and what begins so: none of it may wait for the host
LISTED = 12  # steps of each kind
OTHER_IMPLEMENTATIONS = ("eager", "triton", "chunked", "padded")  # which the dispatcher could have chosen


def measurements(folder: Path) -> list[dict[str, Any]]:
    """All lines that are whole; of a case or a fact that was measured twice, the later."""
    found: dict[str, dict[str, Any]] = {}
    try:
        lines = (folder / "measurements.jsonl").read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:  # cut off in the middle
            continue
        found[entry.get("case") or next(iter(entry))] = entry
    return list(found.values())


def page(entries: Sequence[Mapping[str, Any]], failed: Sequence[str] = (), *, times: bool = True) -> list[str]:
    """times: with all peers' times of each case, which are most of the page."""
    cases = [entry for entry in entries if "peers" in entry]
    facts = [entry for entry in entries if "peers" not in entry]
    short = [*told(facts), *rates(cases), *claims(cases), *next_steps(cases, failed), *absent(cases)]
    return short + all_times(cases) if times else short


def told(facts: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is no comparison: the machine, the parts of a step, how busy the GPU is, launches."""
    lines: list[str] = []
    for fact in facts:
        for title, values in fact.items():
            shown = values if isinstance(values, str) else ", ".join(f"{k} {_short(v)}" for k, v in values.items())
            lines.append(f"- {title}: {shown}")
    return ["", *lines] if lines else []


def rates(cases: Iterable[Mapping[str, Any]]) -> list[str]:
    """Images a second of what computes images, by its wall time, fastest first."""
    lines = []
    for entry in cases:
        if images := entry.get("images"):
            times = sorted(_times(entry, "wall").items(), key=lambda item: item[1])
            shown = ", ".join(f"{name} {images / milliseconds * 1e3:.0f}" for name, milliseconds in times)
            lines.append(f"- {entry['case']}, images a second: {shown}")
    return lines


def claims(cases: Iterable[Mapping[str, Any]]) -> list[str]:
    """One row for each claim and way of launching: in how many cases it holds, and where it is furthest off."""
    judged: dict[tuple[str, float, str], list[tuple[float, str]]] = {}
    for entry in cases:
        for claim in entry["claims"]:
            measured = math.nan if claim["measured"] is None else claim["measured"]
            judged.setdefault((claim["claim"], claim["wanted"], claim["how"]), []).append((measured, entry["case"]))
    lines = (
        ["", "| claim | wanted | measured | holds in | least | where |", "|---|---|---|---|---|---|"] if judged else []
    )
    for (text, wanted, how), values in sorted(judged.items()):
        known = sorted(value for value in values if not math.isnan(value[0]))
        holds = sum(value[0] >= wanted for value in known)
        least, where = known[0] if known else (math.nan, "nothing to compare with ran")
        unknown = f", {len(values) - len(known)} unknown" if 0 < len(known) < len(values) else ""
        lines.append(
            f"| {text} | ≥ {wanted:g} × | {how} | {holds} of {len(values)}{unknown} | {least:.2f} × | {where} |"
        )
    return lines


def next_steps(cases: Iterable[Mapping[str, Any]], failed: Sequence[str]) -> list[str]:
    """Failures first, then where `auto` could be faster by another choice or a better kernel, worst first."""
    steps = [f"mend {name}: its output is in log.txt" for name in failed]
    for entry in cases:
        for name, peer in entry["peers"].items():
            if "failed" in peer:
                steps.append(f"mend {name} in {entry['case']}: {peer['failed']}")
            elif "uncaptured" in peer and name.startswith(CAPTURABLE):
                steps.append(f"let {name} be captured in {entry['case']}: {peer['uncaptured']}")
    for kind in ("graph", "wall"):
        steps += slower(cases, kind)[:LISTED]
    numbered = [f"{number}. {step}" for number, step in enumerate(steps, 1)]
    return ["", "What to change next:", *numbered] if steps else []


def slower(cases: Iterable[Mapping[str, Any]], kind: str) -> list[str]:
    """Where `auto` takes longer than the fastest, by so much that it is no noise."""
    found = []
    for entry in cases:
        how = HOW[kind] if entry.get("in_graphs", True) else IS_GRAPH
        times = _times(entry, kind)
        times.pop("copy", None)
        if "auto" in times:
            best = min(times, key=lambda name: times[name])
            found.append((times["auto"] / times[best], f"{entry['case']}, {how}", best))
    lines = []
    for ratio, case, best in sorted(found, reverse=True):
        if ratio > 1.05:
            own = best in OTHER_IMPLEMENTATIONS or best.startswith("triton")
            remedy = "a wrong choice: detr_fast/ops/regimes.py" if own else "kernels/configs.py, then the kernel"
            lines.append(f"{case}: auto takes {ratio:.2f} × {best} ({remedy})")
    return lines


def absent(cases: Iterable[Mapping[str, Any]]) -> list[str]:
    """Peers that are not installed, those that take no such call, and those that no CUDA graph takes."""
    missing = {name for entry in cases for name, peer in entry["peers"].items() if "absent" in peer}
    lines = [f"Not installed, so not measured: {', '.join(sorted(missing))}."] if missing else []
    for key, text in (
        ("refused", "that a peer refused or got wrong"),
        ("uncaptured", "in which a peer can't be captured"),
    ):
        counts = Counter(name for entry in cases for name, peer in entry["peers"].items() if key in peer)
        told = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
        lines += [f"Cases {text} (why: measurements.jsonl): {told}."] if told else []
    return ["", *lines]


def all_times(cases: Iterable[Mapping[str, Any]]) -> list[str]:
    """Every case: the times of all peers, fastest first."""
    title = "| case | launched eagerly, ms | in a CUDA graph, ms | GPU alone with a cold cache, ms | GB/s | peak, MiB |"
    lines = ["", title, "|---|---|---|---|---|---|"]
    for entry in cases:
        gpu = _times(entry, "gpu")
        own = next((gpu[name] for name in ("triton", "auto") if name in gpu), 0.0)
        rate = f"{entry['moves'] / own / 1e6:.0f}" if entry.get("moves") and own else ""
        times = " | ".join(_listed(_times(entry, kind)) for kind in HOW)
        lines.append(f"| {entry['case']} | {times} | {rate} | {_listed(_times(entry, 'MiB'), 0)} |")
    return lines if len(lines) > 3 else []


def _times(entry: Mapping[str, Any], kind: str) -> dict[str, float]:
    return {name: peer[kind] for name, peer in entry["peers"].items() if kind in peer}


def _listed(values: Mapping[str, float], digits: int = 4) -> str:
    return ", ".join(f"{name} {value:.{digits}f}" for name, value in sorted(values.items(), key=lambda item: item[1]))


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    print("\n".join(page(measurements(Path(sys.argv[1])))))
