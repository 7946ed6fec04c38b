"""Whom training tells how it goes."""

from __future__ import annotations

from typing import Any


class Reporter:
    """Hears how training goes; this one is silent. The command line's draws progress bars."""

    def about(self, text: str) -> None:
        """What is trained, on what and where, in one line."""

    def start(self, step: int, total: int) -> None:
        """Training goes on from `step` to `total`."""

    def message(self, text: str) -> None:
        """Something that the user should know."""

    def step(self, step: int, record: dict[str, Any] | None) -> None:
        """A step is done; `record` is the line of metrics.jsonl where one was written."""

    def evaluating(self, done: int, total: int) -> None:
        """So many images of the validation split are done."""

    def evaluated(self, record: dict[str, Any]) -> None:
        """The figures of an evaluation, as in metrics.jsonl."""
