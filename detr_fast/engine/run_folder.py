"""A run folder: where a training run keeps its checkpoint, its metrics and its pictures, written so that a crash loses nothing."""

from __future__ import annotations

import errno
import json
import os
import shlex
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from detr_fast.engine.errors import RunFolderError
from detr_fast.models.convert import RUN_FILES

BEST, CHECKPOINT = RUN_FILES
METRICS = "metrics.jsonl"
CONFIG = "config.json"
CURVES = "curves.png"
PREDICTIONS = "predictions.png"
LOCK = ".lock"


@contextmanager
def explained(path: Path, remedy: str = "", option: str = "") -> Iterator[None]:
    """Turn a failure to write `path` into one line that says why, and what to do: `remedy` where the disk is full.

    option: of the command line, by which another place is chosen.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            advice = remedy or "free some space, or write to another disk"
        else:
            advice = "choose a folder that you may write to" + (option and f" with {option}")
        raise RunFolderError(f"cannot write {path}: {error.strerror or error}; {advice}") from error


def atomic_write(path: str | os.PathLike[str], write: Callable[[BinaryIO], Any], remedy: str = "") -> None:
    """Write a file whole or not at all: into a temporary neighbour, flushed to disk, then renamed over `path`.

    Raises RunFolderError where that fails; a file that was there before is then unchanged.
    """
    path = Path(path)
    with explained(path, remedy):
        temporary = path.with_name(f".{path.name}.tmp")  # one writer a folder, so a crash leaves at most this one
        try:
            with open(temporary, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise


class RunFolder:
    """The files of one run. `create` refuses a folder that already holds a run, `claim` one that another process trains in."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.checkpoint = self.path / CHECKPOINT
        self.best = self.path / BEST
        self.metrics = self.path / METRICS
        self.config = self.path / CONFIG
        self.curves = self.path / CURVES
        self.predictions = self.path / PREDICTIONS
        self._claim: BinaryIO | None = None

    @property
    def how_to_go_on(self) -> str:
        return f"detr-fast train --resume {shlex.quote(str(self.path))}"

    @classmethod
    def create(cls, path: str | os.PathLike[str], overwrite: bool = False) -> RunFolder:
        run = cls(path)
        with explained(run.path, option="--run"):
            run.path.mkdir(parents=True, exist_ok=True)
        run.claim("--run")
        with explained(run.path, option="--run"):
            occupied = [p for p in (run.checkpoint, run.best, run.metrics) if p.exists()]
            if occupied and not overwrite:
                run.release()
                saved = f"; go on with '{run.how_to_go_on}'," if run.checkpoint.exists() else " without a checkpoint;"
                raise RunFolderError(
                    f"{run.path} already holds a run ({occupied[0].name}){saved} replace it with --overwrite, or choose another --run"
                )
            for file in (*occupied, run.curves, run.predictions):
                file.unlink(missing_ok=True)
            with tempfile.TemporaryFile(dir=run.path):  # found now rather than after the first epoch
                pass
        return run

    def claim(self, option: str = "") -> None:
        """Keep other processes from training here, until `release` or the end of this one, however it ends.

        Raises RunFolderError where another process does: both would write the same checkpoint and metrics. option: as `explained`.
        """
        try:
            import fcntl
        except ImportError:  # Windows
            return
        with explained(self.path, option=option):
            self._claim = open(self.path / LOCK, "a+b")  # noqa: SIM115  # held until `release`
        weakref.finalize(self, self._claim.close)
        try:
            fcntl.lockf(
                self._claim, fcntl.LOCK_EX | fcntl.LOCK_NB
            )  # of the process alone: forked workers don't hold it
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):  # a file system that knows no locks
                return
            self._claim.close()
            self._claim = None
            raise RunFolderError(
                f"another process trains in {self.path}; wait for its end or stop it, or choose another --run"
            ) from None

    def release(self) -> None:
        """The inverse of `claim`."""
        if self._claim is not None:
            with suppress(OSError):
                (self.path / LOCK).unlink()
            self._claim.close()
            self._claim = None

    def log(self, record: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl. A line that a crash left unfinished stays alone on its line."""
        then = f"go on with '{self.how_to_go_on}'" if self.checkpoint.exists() else "start again with --overwrite"
        advice = f"free some space, then {then}"
        with explained(self.metrics, advice), open(self.metrics, "a+b") as file:
            torn = file.tell() > 0 and not _ends_with_newline(file)
            file.write((b"\n" if torn else b"") + json.dumps(record).encode() + b"\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        return read_metrics(self.metrics)


def _ends_with_newline(file: BinaryIO) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl by step; where a resumed run repeated steps, the later record counts."""
    records: dict[tuple[str, int], dict[str, Any]] = {}
    if path.exists():
        for line in path.read_text().splitlines():
            with suppress(ValueError, KeyError, TypeError):  # a line cut short by a crash
                record = json.loads(line)
                records[record["kind"], record["step"]] = record
    return sorted(records.values(), key=lambda record: record["step"])
