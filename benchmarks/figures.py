"""What `make gpu` has measured, as pictures: how many times as fast as the fastest alternative ours is.

    python benchmarks/figures.py FOLDER          # from measurements.jsonl: speedups.svg and cases.svg, beside it

`speedups.svg` has one row for each kind of case, with the range over its sizes and the mean; `cases.svg` one for each case.
What is ours is what `auto` takes; where the dispatcher has nothing to choose, our kernel.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import report
from benchmarks.tables import OURS, kind, labels

WAYS = {"graph": ("in a CUDA graph", "#0b5fa5"), "wall": ("launched eagerly", "#808080")}
LABELS, PLOT, TEXTS, ROW, TOP = 440, 360, 400, 19, 58  # pixels


@dataclass(frozen=True)
class Speedup:
    """Of one case, one way of launching: how many times as fast ours is, and the alternative."""

    factor: float
    peer: str


@dataclass(frozen=True)
class Row:
    """label: None for a heading. ways: by the keys of `WAYS`, all that belongs into the row."""

    label: str
    ways: Mapping[str, Sequence[Speedup]] | None = None


def speedup(entry: Mapping[str, Any], way: str) -> Speedup | None:
    """None where ours or all alternatives were not timed this way."""
    if entry.get("is_graph", not entry.get("in_graphs", True)):  # ours, as it is run
        way = "wall" if way == "graph" else ""
    times = {name: peer[way] for name, peer in entry["peers"].items() if way in peer}
    own = times.get("auto", times.get("triton"))
    others = {name: ms for name, ms in times.items() if not name.startswith(OURS)}
    if own is None or not others:
        return None
    peer = min(others, key=lambda name: others[name])
    return Speedup(others[peer] / own, peer)


def rows_of_kinds(cases: Iterable[Mapping[str, Any]]) -> list[Row]:
    found: dict[str, dict[str, list[Speedup]]] = {}
    for entry in cases:
        for way in WAYS:
            if (one := speedup(entry, way)) is not None:
                found.setdefault(kind(entry["case"]), {}).setdefault(way, []).append(one)
    return [Row(name, ways) for name, ways in found.items()]


def rows_of_cases(cases: Iterable[Mapping[str, Any]]) -> list[Row]:
    found: dict[str, list[tuple[Mapping[str, Any], Mapping[str, Sequence[Speedup]]]]] = {}
    for entry in cases:
        ways = {way: [one] for way in WAYS if (one := speedup(entry, way)) is not None}
        if ways:
            found.setdefault(kind(entry["case"]), []).append((entry, ways))
    rows = []
    for heading, some in found.items():
        told = labels([entry for entry, _ in some])
        rows += [Row(heading), *(Row(label, ways) for label, (_, ways) in zip(told, some))]
    return rows


def picture(rows: Sequence[Row], title: str) -> str:
    """The rows as SVG, over a logarithmic axis with a line at 1: to its right ours is faster."""
    factors = [one.factor for row in rows for ways in (row.ways or {}).values() for one in ways] or [1.0]
    low = min(-1, math.floor(math.log2(min(factors))))
    high = max(1, math.ceil(math.log2(max(factors))))

    def x(factor: float) -> float:
        return LABELS + (math.log2(factor) - low) / (high - low) * PLOT

    height = TOP + ROW * len(rows) + 10
    parts = [
        f'<rect width="100%" height="100%" fill="#ffffff"/><text x="12" y="18" font-weight="bold">{escape(title)}</text>'
    ]
    place = 12
    for text, color in WAYS.values():
        parts.append(
            f'<circle cx="{place + 4}" cy="32" r="4.5" fill="{color}"/><text x="{place + 14}" y="36">{text}</text>'
        )
        place += 30 + 7 * len(text)
    for power in range(low, high + 1):
        at, strong = x(2.0**power), power == 0
        label = f"{2.0**power:g}×" if high - low < 10 or power % 2 == 0 else ""
        parts.append(
            f'<path d="M{at:.1f} {TOP - 4}V{height - 8}" stroke="{"#222222" if strong else "#dddddd"}"/>'
            f'<text x="{at:.1f}" y="{TOP - 8}" text-anchor="middle">{label}</text>'
        )
    for number, (text, color) in enumerate(WAYS.values()):
        place = LABELS + PLOT + 16 + number * 195
        parts.append(f'<text x="{place}" y="{TOP - 8}" font-size="11" fill="{color}">{text}, over</text>')
    for number, row in enumerate(rows):
        parts += _row(row, TOP + ROW * number + ROW / 2, x)
    size = f'width="{LABELS + PLOT + TEXTS}" height="{height}" viewBox="0 0 {LABELS + PLOT + TEXTS} {height}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">{"".join(parts)}</svg>\n'


def _row(row: Row, y: float, x: Any) -> list[str]:
    if row.ways is None:
        return [f'<text x="12" y="{y + 4:.1f}" font-weight="bold">{escape(row.label)}</text>']
    parts = [f'<text x="{LABELS - 14}" y="{y + 4:.1f}" text-anchor="end" font-size="11">{escape(row.label)}</text>']
    for number, (way, (_, color)) in reversed(list(enumerate(WAYS.items()))):
        if not (ones := row.ways.get(way)):
            continue
        factors = [one.factor for one in ones]
        mean, at = statistics.geometric_mean(factors), y + 3 * (2 * number - 1)
        if len(factors) > 1:
            ends = f"M{x(min(factors)):.1f} {at:.1f}H{x(max(factors)):.1f}"
            parts.append(f'<path d="{ends}" stroke="{color}" stroke-width="2"/>')
        parts.append(f'<circle cx="{x(mean):.1f}" cy="{at:.1f}" r="4.5" fill="{color}"/>')
        peers = ", ".join(sorted({one.peer for one in ones}))
        text = f"{mean:.2f}× {peers if len(peers) < 27 else peers[:24] + '…'}"
        place = LABELS + PLOT + 16 + number * 195
        parts.append(f'<text x="{place}" y="{y + 4:.1f}" font-size="11" fill="{color}">{escape(text)}</text>')
    return parts


def write(folder: Path) -> list[Path]:
    """Both pictures of a folder's measurements; none where nothing was compared."""
    entries = report.measurements(folder)
    cases = [entry for entry in entries if "peers" in entry]
    title = f"{report.machine_of(entries, folder)}: how many times as fast as the fastest alternative detr-fast is"
    written = []
    for name, rows in (("speedups.svg", rows_of_kinds(cases)), ("cases.svg", rows_of_cases(cases))):
        if rows:
            written.append(folder / name)
            written[-1].write_text(picture(rows, title))
    return written


if __name__ == "__main__":
    for path in write(report.given_folder()):
        print(path)
