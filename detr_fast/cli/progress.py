"""Progress bars of training: loss, images per second and time left; plain lines where there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

from detr_fast.engine.trainer import Reporter

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


@contextmanager
def progress_bar(console: Console, description: str) -> Iterator[Callable[[int, int], None]]:
    """A bar for a callback of (done, total)."""
    with Progress(*_columns(), console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(description, total=None, note="")
        yield lambda done, total: progress.update(task, completed=done, total=total)


class ProgressReporter(Reporter):
    """Shows how training goes. Enter it around `train` or `resume`."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.progress = Progress(*_columns(), console=console, disable=not console.is_terminal)
        self.training = self.progress.add_task("training", total=None, note="")
        self.evaluation = self.progress.add_task("evaluating", total=None, note="", visible=False)
        self.total = 0
        self._last_line = 0.0

    def __enter__(self) -> ProgressReporter:
        self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()

    def start(self, step: int, total: int) -> None:
        self.total = total
        self._last_line = time.monotonic()
        self.progress.reset(self.training, total=total, completed=step, note="")

    def message(self, text: str) -> None:
        self.console.print(f"[yellow]note[/] {text}", highlight=False, soft_wrap=True)

    def step(self, step: int, record: dict[str, Any] | None) -> None:
        self.progress.update(self.training, completed=step)
        if record is None:
            return
        note = f"loss {record['loss']:.3f}  {record['images_per_second']:.0f} img/s"
        self.progress.update(self.training, note=note)
        now = time.monotonic()
        if not self.console.is_terminal and now - self._last_line >= LINE_EVERY:
            self._last_line = now
            images = record["images_per_second"]
            self.console.print(
                f"step {step}/{self.total}  loss {record['loss']:.3f}  {images:.0f} img/s", soft_wrap=True
            )

    def evaluating(self, done: int, total: int) -> None:
        self.progress.update(self.evaluation, completed=done, total=total, visible=done < total)

    def evaluated(self, record: dict[str, Any]) -> None:
        loss = f"  loss {record['loss']:.3f}" if "loss" in record else ""
        self.console.print(
            f"epoch {record['epoch']:>3}, step {record['step']}:{loss}  AP {figure(record['AP'])}  "
            f"AP50 [bold]{figure(record['AP50'])}[/]",
            highlight=False,
            soft_wrap=True,
        )
