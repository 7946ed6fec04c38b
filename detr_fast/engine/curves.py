"""The curves of a run: losses, precision and learning rate over the steps, from its metrics.jsonl."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from detr_fast.engine.run_folder import atomic_write

INK, GRID = "#1c1e22", "#e4e6ea"
BLUE, ORANGE, GREEN, RED = "#1f77d2", "#ff7f0e", "#2caa46", "#d6273c"


def draw_curves(records: Sequence[dict[str, Any]], path: Path, title: str = "") -> None:
    """Write a page of four panels as PNG: total loss, its parts, average precision, learning rate."""
    train = [r for r in records if r["kind"] == "train"]
    evaluated = [r for r in records if r["kind"] == "evaluation"]
    figure = Figure(figsize=(12, 7.2), dpi=130, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)  # no window system, no global state
    (total, parts), (precision, rate) = figure.subplots(2, 2)

    _smoothed(total, train, "loss", BLUE, "training")
    _line(total, evaluated, "loss", ORANGE, "validation", marker="o")
    _style(total, "Loss, all decoder layers")
    for key, colour, label in (
        ("loss_ce", BLUE, "classes"),
        ("loss_bbox", ORANGE, "boxes, L1"),
        ("loss_giou", GREEN, "boxes, GIoU"),
    ):
        _smoothed(parts, train, key, colour, label)
    _style(parts, "Parts of the training loss, last layer, unweighted")
    for key, colour in (("AP50", BLUE), ("AP", ORANGE), ("AP75", GREEN)):
        _line(precision, evaluated, key, colour, key, marker="o")
    if evaluated:
        best = max(evaluated, key=lambda r: r["AP50"])
        precision.annotate(
            f"{best['AP50']:.3f}",
            (best["step"], best["AP50"]),
            xytext=(0, 7),
            textcoords="offset points",
            ha="center",
            color=BLUE,
        )
        precision.set_ylim(0, max(0.1, 1.18 * best["AP50"]))
    _style(precision, "Average precision on the validation split")
    _line(rate, train, "lr", BLUE, "transformer")
    _line(rate, train, "lr_backbone", ORANGE, "backbone", linestyle="--")
    rate.set_ylim(bottom=0)
    _style(rate, "Learning rate")
    for axes in (total, parts, precision, rate):  # the same steps in all, also where there is one evaluation yet
        axes.set_xlim(0, 1.02 * max((r["step"] for r in records), default=1))
    if title:
        figure.suptitle(title, color=INK, fontsize=15, parse_math=False)  # a $ in a folder's name is no formula
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    atomic_write(path, lambda file: file.write(buffer.getvalue()))


def _line(axes: Axes, records: Sequence[dict[str, Any]], key: str, colour: str, label: str, **style: Any) -> None:
    points = [(r["step"], r[key]) for r in records if key in r]
    if points:
        style = {"marker": _marker(points)} | style
        axes.plot(*zip(*points), color=colour, label=label, linewidth=2, markersize=4, **style)


def _smoothed(axes: Axes, records: Sequence[dict[str, Any]], key: str, colour: str, label: str) -> None:
    """The values in a pale line under their running mean over about 1/30 of the run."""
    points = [(r["step"], r[key]) for r in records if key in r]
    if not points:
        return
    steps, values = zip(*points)
    window = max(1, len(values) // 30)
    means = [
        sum(values[max(0, i - window) : i + window + 1]) / len(values[max(0, i - window) : i + window + 1])
        for i in range(len(values))
    ]
    axes.plot(steps, values, color=colour, alpha=0.22, linewidth=1)
    axes.plot(steps, means, color=colour, label=label, linewidth=2, markersize=4, marker=_marker(points))


def _marker(points: Sequence[Any]) -> str:
    """A single point is no line, and would not be seen."""
    return "o" if len(points) == 1 else ""


def _style(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", color=INK, fontsize=11)
    axes.set_xlabel("step", color=INK)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
