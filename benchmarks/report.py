"""One page of what `make gpu` has measured: what is claimed and whether it shows, what to change, where a peer is faster.

python benchmarks/report.py FOLDER          # summary.md, from measurements.jsonl; figures.py likewise draws the pictures
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.tables import (
    HOW,
    LAUNCHES,
    OURS,
    PEAKS,
    STEP,
    all_times,
    launches,
    number,
    table,
    times_of,
    training_step,
)

IS_GRAPH = "ours, as it is run, a CUDA graph"
CAPTURABLE = ("auto", "triton", "chunked")  # ours, and what begins so: none of it may wait for the host
LISTED = 12  # steps of each kind
OTHER_IMPLEMENTATIONS = ("eager", "triton", "chunked", "padded")  # which the dispatcher could have chosen
SECTION = "section: "
LINE = 160  # characters of a reason


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
        if not isinstance(entry, dict) or not entry:  # what was left of a line
            continue
        found[entry.get("case") or next(iter(entry))] = entry
    return list(found.values())


def given_folder() -> Path:
    """The folder that the command line names, which must hold measurements: without any, the page there would be replaced by an empty one."""
    if len(sys.argv) != 2 or not measurements(Path(sys.argv[1])):
        given = " ".join(sys.argv[1:]) or "nothing"
        sys.exit(f"got {given}, expected one folder that 'make gpu' has written measurements.jsonl to; give that")
    return Path(sys.argv[1])


def keep_section(folder: Path, name: str, lines: Sequence[str]) -> None:
    """Record how a section of the run ended."""
    with (folder / "measurements.jsonl").open("a") as file:
        file.write(json.dumps({SECTION + name: list(lines)}) + "\n")


def write(folder: Path, machine: str | None = None, failed: Sequence[str] = ()) -> Path:
    """summary.md, whose title is the machine; None: as it is recorded."""
    entries = measurements(folder)
    path = folder / "summary.md"
    path.write_text("\n".join([f"# {machine or machine_of(entries, folder)}", *page(entries, failed)]) + "\n")
    return path


def machine_of(entries: Iterable[Mapping[str, Any]], folder: Path) -> str:
    """The GPU's name and PyTorch's version, as far as they are recorded."""
    facts: Mapping[str, Any] = next((entry["machine"] for entry in entries if "machine" in entry), {})
    return ", torch ".join(filter(None, (str(facts.get("GPU", folder.name)), str(facts.get("torch", "")))))


def page(entries: Sequence[Mapping[str, Any]], failed: Sequence[str] = (), *, times: bool = True) -> list[str]:
    """times: with all peers' times of each case, which are most of the page."""
    cases = [entry for entry in entries if "peers" in entry]
    facts = [entry for entry in entries if "peers" not in entry]
    short = [*headline(cases), *training_step(entries), *claims(cases), *next_steps(cases, failed)]
    short += [*launches(facts), *told(facts), *hosts(cases), *absent(cases), *sections(facts)]
    return short + all_times(cases) if times else short


def headline(cases: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a reader should know who reads no further."""
    lines = []
    for entry in cases:
        times = times_of(entry, "wall") if entry["case"].startswith(STEP) else {}
        peers = {"torch.compile": "Hugging Face's with torch.compile", "huggingface": "Hugging Face's launched eagerly"}
        beside = [
            f"{times[n] / times['auto']:.1f} × as fast as {t}" for n, t in peers.items() if {n, "auto"} <= {*times}
        ]
        if beside:
            lines = ["", f"**A training step of DETR-R50 takes {number(times['auto'])} ms: {', '.join(beside)}.**"]
    for way in ("graph", "wall"):
        factors = [one for entry in cases if entry.get("in_graphs", True) and (one := factor(entry, way)) is not None]
        if factors:
            faster, mean = sum(one >= 1 / 1.05 for one in factors), statistics.geometric_mean(factors)
            text = f"`auto` is at least as fast as the fastest alternative (within 5 %) in {faster} of {len(factors)} cases"
            lines += ["", f"{HOW[way][0].upper()}{HOW[way][1:]}, {text}; in the mean {mean:.2f} × as fast."]
    return [*lines, "", "![How many times as fast](speedups.svg)"] if lines else []


def factor(entry: Mapping[str, Any], way: str) -> float | None:
    """How many times as fast as the fastest alternative ours is; None where there is none."""
    times = times_of(entry, way)
    own = times.get("auto", times.get("triton"))
    others = [ms for name, ms in times.items() if not name.startswith(OURS)]
    return min(others) / own if own and others else None


def told(facts: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is no comparison: the machine, the parts of a step, how busy the GPU is."""
    lines: list[str] = []
    for fact in facts:
        for title, values in fact.items():
            if title.startswith((SECTION, LAUNCHES)) or title == PEAKS:
                continue
            shown = values if isinstance(values, str) else ", ".join(f"{k} {v}" for k, v in _each(values))
            lines.append(f"- {title}: {shown}")
    return ["", *lines] if lines else []


def _each(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and values, those of which nvidia-smi gave several together one by one."""
    found: list[tuple[str, str]] = []
    for name, value in values.items():
        names = name.split(",")
        several = isinstance(value, str) and len(names) == value.count(",") + 1
        found += zip(names, map(str.strip, value.split(","))) if several else [(name, _short(value))]
    return found


def sections(facts: Iterable[Mapping[str, Any]]) -> list[str]:
    """How each section of the run ended."""
    lines = []
    for fact in facts:
        for title, told in fact.items():
            if title.startswith(SECTION):
                lines.append(f"- {title.removeprefix(SECTION)}: {told[0]}")
                lines += [f"    - {line}" for line in told[1:]]
    return ["", "## The run", "", *lines] if lines else []


def claims(cases: Iterable[Mapping[str, Any]]) -> list[str]:
    """One row for each claim: for each way of timing in how many cases it holds, and the least; and the case furthest off."""
    judged: dict[tuple[str, float], dict[str, list[tuple[float, str]]]] = {}
    for entry in cases:
        for claim in entry["claims"]:
            measured = math.nan if claim["measured"] is None else claim["measured"]
            how = HOW["graph"] if claim["how"] == IS_GRAPH else claim["how"]
            of_claim = judged.setdefault((claim["claim"], claim["wanted"]), {})
            of_claim.setdefault(how, []).append((measured, entry["case"]))
    ways = [HOW[way] for way in ("graph", "wall", "gpu")]
    rows = []
    for (text, wanted), found in sorted(judged.items()):
        off = min(
            ((value, f"{case}, {how}") for how in found for value, case in found[how] if value < wanted), default=None
        )
        cells = [_cell(found.get(way, []), wanted) for way in ways]
        rows.append((text, f"≥ {wanted:g} ×", *cells, "" if off is None else f"{off[1]}: {_times(off[0], wanted)}"))
    legend = (
        "How many times as fast as what the claim names ours is. ✓: wanted and seen in all cases; ✗: not in all; then in how many, and the "
        "least. A training step of ours is a CUDA graph."
    )
    title = ["", "## What is claimed", "", legend]
    return title + table(("claim", "wanted", *ways, "furthest off"), rows) if rows else []


def _cell(values: Sequence[tuple[float, str]], wanted: float) -> str:
    if not values:
        return ""
    known = [value for value, _ in values if not math.isnan(value)]
    if not known:
        return "nothing to compare with ran"
    holds = sum(value >= wanted for value in known)
    unknown = f", {len(values) - len(known)} unknown" if len(known) < len(values) else ""
    return f"{'✓' if holds == len(known) else '✗'} {holds} of {len(values)}{unknown}; {_times(min(known), wanted)}"


def _times(value: float, wanted: float) -> str:
    """Not rounded to what is wanted where it is less."""
    return f"{value:.2f} ×" if value >= wanted or round(value, 2) < wanted else f"{value:.4f} ×"


def next_steps(cases: Iterable[Mapping[str, Any]], failed: Sequence[str]) -> list[str]:
    """Failures first, then where `auto` could be faster by another choice or a better kernel, worst first."""
    steps = [f"mend {name}: its output is in log.txt" for name in failed]
    for entry in cases:
        for name, peer in entry["peers"].items():
            if "failed" in peer:
                steps.append(f"mend {name} in {entry['case']}: {peer['failed'][:LINE]}")
            elif "uncaptured" in peer and name.startswith(CAPTURABLE):
                steps.append(f"let {name} be captured in {entry['case']}: {peer['uncaptured']}")
    for kind in ("graph", "wall"):
        steps += slower(cases, kind)[:LISTED]
    numbered = [f"{number}. {step}" for number, step in enumerate(steps, 1)]
    return ["", "## What to change next", "", *numbered] if steps else []


def slower(cases: Iterable[Mapping[str, Any]], kind: str) -> list[str]:
    """Where `auto` takes longer than the fastest, by so much that it is no noise."""
    found = []
    for entry in cases:
        is_graph = entry.get("is_graph", not entry.get("in_graphs", True))
        times = times_of(entry, kind)
        times.pop("copy", None)
        if "auto" in times:
            best = min(times, key=lambda name: times[name])
            found.append((times["auto"] / times[best], f"{entry['case']}, {IS_GRAPH if is_graph else HOW[kind]}", best))
    lines = []
    for ratio, case, best in sorted(found, reverse=True):
        if ratio > 1.05:
            own = best in OTHER_IMPLEMENTATIONS or best.startswith("triton")
            remedy = "a wrong choice: detr_fast/ops/regimes.py" if own else "kernels/configs.py, then the kernel"
            lines.append(f"{case}: auto takes {ratio:.2f} × {best} ({remedy})")
    return lines


def hosts(cases: Iterable[Mapping[str, Any]]) -> list[str]:
    """Which way the host went in what `auto` took, what C++ gains, and what waking autograd's thread takes."""
    ways: dict[str, list[str]] = {}
    gains, woken = [], []
    for entry in cases:
        auto = entry["peers"].get("auto", {})
        if "host" in auto:
            ways.setdefault(auto["host"], []).append(entry["case"])
        if "wall from Python" in auto and auto.get("wall"):
            gains.append(auto["wall from Python"] / auto["wall"])
        if "wall, woken" in auto and "backward" in entry["case"]:
            woken.append(auto["wall, woken"] - auto["wall"])
    if not ways:
        return []
    others = {way: names for way, names in ways.items() if way != "C++"}
    told = ", ".join(f"{way} in {len(names)} cases" for way, names in ways.items())
    lines = ["", f"The host's part of `auto`, launched eagerly: {told}."]
    if gains:
        spread = f"{min(gains):.2f} to {max(gains):.2f}"
        lines.append(f"Without C++ the same calls take {statistics.median(gains):.2f} × as long (median; {spread}).")
    if woken:
        lines.append(
            "Backward ran on the calling thread; where it wakes autograd's own, a call takes "
            f"{number(statistics.median(woken))} ms more (median)."
        )
    return lines + [f"- {way}: {'; '.join(names[:4])}{' …' * (len(names) > 4)}" for way, names in others.items()]


def absent(cases: Iterable[Mapping[str, Any]]) -> list[str]:
    """Peers that are not installed, those that take no such call or are less accurate, and those that no CUDA graph takes."""
    lines = []
    for key, text in (
        ("absent", "Not installed, so not measured"),
        ("refused", "Refused, or wrong and not timed"),
        ("coarse", "Timed, though less accurate than ours may be"),
        ("uncaptured", "Can't be captured in a CUDA graph"),
    ):
        reasons: dict[tuple[str, str], int] = {}
        for entry in cases:
            for name, peer in entry["peers"].items():
                if key in peer:
                    one = name, peer[key][:LINE]
                    reasons[one] = reasons.get(one, 0) + 1
        counts = sorted((name, count, why) for (name, why), count in reasons.items())
        lines += [
            f"- {text}: {name}, {count} {'cases' if count > 1 else 'case'} ({why})" for name, count, why in counts
        ]
    return ["", "## What is not compared, and why", "", *lines] if lines else []


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    print(write(given_folder()))
