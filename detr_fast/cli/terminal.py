"""Output that a lost terminal does not stop: a training outlives the ssh session that started it."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO, cast


class Lasting:
    """A terminal's text stream that leads nowhere once the terminal is gone, where each write would fail."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        return self._or_nowhere(lambda: self._stream.write(text))

    def flush(self) -> None:
        self._or_nowhere(self._stream.flush)

    def _or_nowhere(self, act: Callable[[], Any]) -> Any:
        try:
            return act()
        except OSError as error:
            if error.errno != errno.EIO:
                raise
        with open(os.devnull, "w") as nowhere:  # also for what waits in buffers, which is flushed again at exit
            os.dup2(nowhere.fileno(), self._stream.fileno())
        return act()


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
    """While entered, stdout and stderr are Lasting where they are terminals."""
    with contextlib.ExitStack() as stack:
        if sys.stdout.isatty():
            stack.enter_context(contextlib.redirect_stdout(cast(TextIO, Lasting(sys.stdout))))
        if sys.stderr.isatty():
            stack.enter_context(contextlib.redirect_stderr(cast(TextIO, Lasting(sys.stderr))))
        yield
