"""Errors that a user can act on; the command line prints them as one line and ends with exit status 2."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


class EngineError(RuntimeError):
    """Base of the errors below: the message is one line that names the value received and the remedy."""


class ConfigError(EngineError):
    """A setting is out of its range, or two settings contradict each other."""


class CheckpointError(EngineError):
    """A checkpoint is missing, damaged, not ours, or of another shape than the model."""


class RunFolderError(EngineError):
    """The run folder can't be used or written: it is occupied, unwritable, or the disk is full."""


class PredictionError(EngineError):
    """An image to predict on is missing, unreadable, or there is none."""


class LoaderError(EngineError):
    """A process that loads images has ended; in training the state is saved when this reaches the caller."""


class TrainingDiverged(EngineError):
    """The loss, a box or a weight is not finite any more."""


class Interrupted(EngineError):
    """A signal asked training to stop; the state is saved when this reaches the caller, and `advice` says so."""

    def __init__(self, signum: int, advice: str = "") -> None:
        self.signum = signum
        self.name = "Ctrl-C" if signum == signal.SIGINT else signal.Signals(signum).name
        super().__init__(f"stopped by {self.name}" + (f": {advice}" if advice else ""))


@contextmanager
def loading() -> Iterator[None]:
    """Raise LoaderError where a process that loads images ends inside the block."""
    try:
        yield
    except (RuntimeError, ConnectionError, EOFError) as error:
        if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader worker (pid"):
            raise
        raise LoaderError(f"{error}: did memory run out? Lower --workers") from error
