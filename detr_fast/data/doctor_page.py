"""The doctor's report as text, and as one page of pictures."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from detr_fast.data.annotations import id_key
from detr_fast.data.doctor_scan import BoxScan, ImageScan, SplitScan
from detr_fast.data.errors import DataError
from detr_fast.data.images import read_image

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from detr_fast.data.doctor import Report, SplitSummary

_SIDES = (0, 8, 16, 32, 64, 96, 128, 256, 512)  # borders of the box-size histogram, in pixels; 32 and 96 are COCO's
_COLUMNS, _ROWS = 4, 3  # of pictures on the page, at most
_CHARTS = 4.5  # inches of height; a picture is 4 wide
_LITERAL: dict[str, Any] = {"parse_math": False}  # a $ in the name of a class or file begins no formula


def report_text(report: Report) -> str:
    """Figures of each split, boxes by class and by size, then the problems."""
    from detr_fast.data.doctor import KINDS

    parts = report.splits
    names = [part.name for part in parts]
    lines = [f"{report.folder}", ""]
    rows = [
        ["images", *(str(part.images) for part in parts)],
        ["  without objects", *(str(part.without_objects) for part in parts)],
        ["  sizes", *(_size_range(part) for part in parts)],
        ["boxes", *(str(part.boxes) for part in parts)],
        ["  most in an image", *(str(part.boxes_per_image.max(initial=0)) for part in parts)],
        ["  crowds", *(str(part.crowd) for part in parts)],
    ]
    lines += _table(["", *names], rows)
    classes = list(dict.fromkeys(name for part in parts for name in part.boxes_by_class))
    lines += ["", f"Boxes by class ({len(classes)})"]
    lines += _table(
        ["", *names], [[name, *(str(part.boxes_by_class.get(name, 0)) for part in parts)] for name in classes]
    )
    lines += ["", "Boxes by side (square root of the area, pixels)"]
    lines += _table(["", *names], _side_rows(parts))
    lines += ["", "Findings" if report.findings else "No findings."]
    for finding in report.findings:
        lines.append(f"  {finding.severity:<8} {finding.split}: {finding.kind} ({finding.count})")
        lines += [f"             {example}" for example in finding.examples]
        if finding.count > len(finding.examples):
            lines.append(f"             … and {finding.count - len(finding.examples)} more")
        lines.append(f"             --fix: {KINDS[finding.kind].cure}")
    verdict = "healthy" if report.healthy else "not fit for training; --fix writes a repaired copy"
    if any(finding.severity == "error" and not KINDS[finding.kind].fixable for finding in report.findings):
        verdict = "not fit for training, and --fix can't repair it; see above"
    return "\n".join([*lines, "", f"{report.folder}: {verdict}"])


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    return [
        "  "
        + "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))).rstrip()
        for row in [header, *rows]
    ]


def _size_range(part: SplitSummary) -> str:
    if not part.image_sizes:
        return "-"
    if len(part.image_sizes) == 1:
        ((height, width),) = part.image_sizes
        return f"{width}×{height}"
    heights, widths = zip(*part.image_sizes)
    return f"{min(widths)}–{max(widths)}×{min(heights)}–{max(heights)}"


def _side_rows(parts: tuple[SplitSummary, ...]) -> list[list[str]]:
    borders = [*_SIDES, np.inf]
    counts = [np.histogram(part.box_sides, borders)[0] for part in parts]
    labels = [f"{low}–{high}" for low, high in pairwise(_SIDES)] + [f"over {_SIDES[-1]}"]
    return [[label, *(str(c[i]) for c in counts)] for i, label in enumerate(labels) if any(c[i] for c in counts)]


def draw_report(report: Report, path: Path) -> None:
    """One page (PNG): three charts above, images with their boxes below, those with problems first."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    chosen = _choose_images(report.scans, _ROWS * _COLUMNS)
    rows = max(1, -(-len(chosen) // _COLUMNS))
    shapes = [image.size[0] / image.size[1] for _, image, _ in chosen]
    pictures = rows * (0.6 + 4 * float(np.clip(np.median(shapes), 0.4, 1.6) if shapes else 0.75))
    figure = Figure(figsize=(16, _CHARTS + pictures), layout="constrained")
    FigureCanvasAgg(figure)  # without pyplot: no window system, no state left behind
    figure.suptitle(
        f"{report.folder}: " + ("healthy" if report.healthy else "not fit for training"), fontsize=16, **_LITERAL
    )
    above, below = figure.subfigures(2, 1, height_ratios=[_CHARTS, pictures], squeeze=False).flat
    classes, sides, numbers = above.subplots(1, 3)
    _draw_classes(classes, report)
    for part in report.splits:
        if part.boxes:
            sides.hist(
                part.relative_sides * 100, bins=np.linspace(0, 100, 41).tolist(), histtype="step", label=part.name
            )
        numbers.hist(
            part.boxes_per_image,
            bins=np.arange(part.boxes_per_image.max(initial=0) + 2) - 0.5,
            histtype="step",
            label=part.name,
        )
    sides.set(title="Box side in % of the image's", xlabel="√(box area / image area), %", ylabel="boxes")
    numbers.set(title="Boxes in an image", xlabel="boxes", ylabel="images")
    for axes in (sides, numbers):
        axes.legend() if axes.patches else None
    for axes, entry in zip(below.subplots(rows, _COLUMNS, squeeze=False).flat, [*chosen, *[None] * _COLUMNS]):
        axes.set_axis_off()
        if entry is not None:
            _draw_image(axes, *entry)
    try:
        figure.savefig(path, dpi=80, format="png")  # whatever its name: matplotlib would add a suffix
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror}); give another path") from None


def _draw_classes(axes: Axes, report: Report) -> None:
    totals: dict[str, int] = {}
    for part in report.splits:
        for name, count in part.boxes_by_class.items():
            totals[name] = totals.get(name, 0) + count
    shown = sorted(totals, key=lambda name: -totals[name])[:30]
    left = np.zeros(len(shown))
    for part in report.splits:
        counts = np.array([part.boxes_by_class.get(name, 0) for name in shown])
        axes.barh(range(len(shown)), counts, left=left, label=part.name)
        left += counts
    axes.set_yticks(range(len(shown)), shown, **_LITERAL)
    axes.invert_yaxis()
    more = f" (30 of {len(totals)})" if len(totals) > len(shown) else ""
    axes.set(title=f"Boxes by class{more}", xlabel="boxes")
    if report.splits:
        axes.legend()


def _choose_images(scans: list[SplitScan], most: int) -> list[tuple[SplitScan, ImageScan, list[BoxScan]]]:
    """Images to show: one or two of each kind of problem, then others at even distances."""
    entries = []
    for scan in scans:
        boxes: dict[int, list[BoxScan]] = {}
        for box in scan.boxes:
            boxes.setdefault(id(box.image), []).append(box)
        entries += [(scan, image, boxes.get(id(image), [])) for image in scan.images if image.digest]
    seen: dict[str, int] = {}
    chosen, rest = [], []
    for entry in entries:
        kinds = {kind for problems in (entry[1].problems, *(box.problems for box in entry[2])) for kind in problems}
        if any(seen.get(kind, 0) < 2 for kind in kinds):
            chosen.append(entry)
            seen |= {kind: seen.get(kind, 0) + 1 for kind in kinds}
        else:
            rest.append(entry)
    chosen = chosen[:most]
    wanted = most - len(chosen)
    return chosen + [rest[i] for i in np.linspace(0, len(rest) - 1, min(wanted, len(rest))).astype(int)]


def _draw_image(axes: Axes, scan: SplitScan, image: ImageScan, boxes: list[BoxScan]) -> None:
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    axes.imshow(read_image(image.path, image.size))
    order = list(scan.categories)
    for box in boxes:
        x, y, w, h = _drawable(box.record.get("bbox"))
        bad = bool(box.problems)
        key: Any = id_key(box.record.get("category_id"))
        colour = "red" if bad else colormaps["tab10"](order.index(key) % 10)
        axes.add_patch(Rectangle((x, y), w, h, fill=False, color=colour, linewidth=2.5 if bad else 1.2))
        if len(boxes) <= 12 or bad:
            label = ", ".join(box.problems) if bad else scan.categories[key]
            height, width = image.size
            right = x > 0.75 * width  # a text that began there would be cut off
            place = (
                min(x + w, width) if right else max(x, 0),
                min(max(y, 0.05 * height), height),
            )  # if it overhangs, too
            style: dict[str, Any] = {
                "ha": "right" if right else "left",
                "backgroundcolor": colour,
                "clip_on": True,
                **_LITERAL,
            }
            axes.text(*place, label, fontsize=7, color="white", **style)
    problems = ", ".join(image.problems)
    axes.set_title(
        f"{scan.files.name}: {image.record['file_name']}" + (f"\n{problems}" if problems else ""),
        fontsize=9,
        color="red" if problems else "black",
        **_LITERAL,
    )


def _drawable(box: Any) -> tuple[float, float, float, float]:
    """The box as numbers; one that is malformed is drawn as a point in the corner."""
    if isinstance(box, list) and len(box) == 4 and all(isinstance(v, (int, float)) and np.isfinite(v) for v in box):
        return (float(box[0]), float(box[1]), float(box[2]), float(box[3]))
    return (0.0, 0.0, 0.0, 0.0)
