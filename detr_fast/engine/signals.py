"""Ctrl-C, SIGTERM and the end of a terminal as a request that training reads between two steps."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any

from detr_fast.engine.errors import Interrupted


class StopSignals:
    """While entered, SIGINT, SIGTERM and SIGHUP are remembered, and `check` raises Interrupted for them at a moment of the caller's choice.

    A second Ctrl-C doesn't wait: it raises KeyboardInterrupt at once. `announced`, when that will be, is told on stderr at the first. Forked data workers inherit the handler, so a Ctrl-C in the
    terminal, which reaches the whole process group, doesn't kill them under the main process. Off the main thread it does nothing. A SIGHUP that is
    ignored, as under nohup, stays so. Once `ending` is set signals do nothing: if one kept the workers from being ended, Python would wait for them without end.
    """

    HANGUP = getattr(signal, "SIGHUP", None)  # None on Windows
    HANDLED = tuple(signum for signum in (signal.SIGINT, signal.SIGTERM, HANGUP) if signum is not None)

    def __init__(self, announced: str | None = None) -> None:
        self.announced = announced
        self.received: int | None = None
        self.ending = False
        self._process = os.getpid()
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for signum in self.HANDLED:
                if signum != self.HANGUP or signal.getsignal(signum) != signal.SIG_IGN:
                    self._previous[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.ending:
            return
        if self.received == signum == signal.SIGINT:
            raise KeyboardInterrupt
        if self.announced is not None and self.received is None and os.getpid() == self._process:
            # By the system call: the signal may have come in the middle of a print.
            again = "; Ctrl-C again stops at once, without saving" if signum == signal.SIGINT else ""
            with suppress(OSError):
                os.write(2, f"\nstopping {self.announced}{again}\n".encode())
        self.received = signum

    def check(self) -> None:
        """Raise Interrupted if a signal came."""
        if self.received is not None:
            raise Interrupted(self.received)


@contextmanager
def tidy_end() -> Iterator[None]:
    """While entered, a SIGTERM or SIGHUP that would end the process at once raises SystemExit, by which half-written files are removed; a second one ends it."""

    def end(signum: int, frame: FrameType | None) -> None:
        signal.signal(signum, signal.SIG_DFL)
        raise SystemExit(128 + signum)

    handled = [s for s in StopSignals.HANDLED if signal.getsignal(s) == signal.SIG_DFL]
    if threading.current_thread() is not threading.main_thread():  # which alone may set them
        handled = []
    for signum in handled:
        signal.signal(signum, end)
    try:
        yield
    finally:
        for signum in handled:
            signal.signal(signum, signal.SIG_DFL)


@contextmanager
def signals_held() -> Iterator[None]:
    """Signals to stop wait until this is left; processes that are started inside hold them until `release_signals`."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, StopSignals.HANDLED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def release_signals() -> None:
    """In a process that was started under `signals_held`: what came meanwhile is delivered, or dropped where it is ignored by now."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, StopSignals.HANDLED)
