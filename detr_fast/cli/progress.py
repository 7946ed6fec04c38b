"""Progress bars of training: loss, images per second and time left; plain lines where there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from detr_fast.engine.reporter import Reporter

LINE_EVERY = 20.0  # seconds between lines where there is no terminal


def _columns() -> list[ProgressColumn]:
    return [
        TextColumn("[bold]{task.description:<10}"),
        BarColumn(bar_width=32),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(compact=True),
        TextColumn("left"),
    ]


def figure(value: float) -> str:
    """A precision as users read it; pycocotools says -1 where there is nothing to measure."""
    return "–" if value < 0 else f"{value:.3f}"


def speed(images_per_second: float) -> str:
    """Two digits where there are few: "0.06 img/s", "3.1 img/s", "128 img/s"."""
    return f"{images_per_second:.0f} img/s" if images_per_second >= 9.5 else f"{images_per_second:.2g} img/s"


def duration(seconds: float) -> str:
    """As one says it: "40 s", "3 min", "2 h 10 min", "12 days"."""
    minutes = round(seconds / 60)
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    if minutes < 100:
        return f"{minutes} min"
    if minutes < 60 * 48:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes / 60 / 24:.0f} days"


@contextmanager
def progress_bar(console: Console, description: str) -> Iterator[Callable[[int, int], None]]:
    """A bar for a callback of (done, total)."""
    with Progress(*_columns(), console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(description, total=None, note="")
        yield lambda done, total: progress.update(task, completed=done, total=total)


class ProgressReporter(Reporter):
    """Shows how training goes. Enter it around `train` or `resume`."""

    def __init__(self, console: Console, notes: Sequence[str] = ()) -> None:
        """`notes` are told once the data and settings are known to be usable."""
        self.console = console
        self.notes = notes
        self.progress = Progress(*_columns(), console=console, disable=not console.is_terminal)
        self.training = self.progress.add_task("training", total=None, note="")
        self.evaluation = self.progress.add_task("evaluating", total=None, note="", visible=False)
        self.first = self.total = 0
        self._begun = self._last_line = 0.0

    def __enter__(self) -> ProgressReporter:
        self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()

    def start(self, step: int, total: int) -> None:
        self.first, self.total = step, total
        self._begun = self._last_line = time.monotonic()
        self.progress.reset(self.training, total=total, completed=step, note="")

    def about(self, text: str) -> None:
        self._print(text)
        for note in self.notes:
            self.message(note)

    def message(self, text: str) -> None:
        self._print(("note", "yellow"), f" {text}")

    def step(self, step: int, record: dict[str, Any] | None) -> None:
        self.progress.update(self.training, completed=step)
        note = "" if record is None else f"loss {record['loss']:.3f}  {speed(record['images_per_second'])}"
        if note:
            self.progress.update(self.training, note=note)
        now = time.monotonic()
        if not self.console.is_terminal and now - self._last_line >= LINE_EVERY:
            self._last_line = now
            left = duration((now - self._begun) / (step - self.first) * (self.total - step))
            self._print(f"step {step}/{self.total}  {note + '  ' * bool(note)}{left} left")

    def evaluating(self, done: int, total: int) -> None:
        self.progress.update(self.evaluation, completed=done, total=total, visible=done < total)

    def evaluated(self, record: dict[str, Any]) -> None:
        loss = f"  loss {record['loss']:.3f}" if "loss" in record else ""
        start = f"epoch {record['epoch']:>3}, step {record['step']}:{loss}  AP {figure(record['AP'])}  AP50 "
        self._print(start, (figure(record["AP50"]), "bold"))

    def _print(self, *parts: str | tuple[str, str]) -> None:
        """Text with styles rather than markup: a path may hold [brackets]."""
        self.console.print(Text.assemble(*parts), soft_wrap=True)
