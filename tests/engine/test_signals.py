"""Signals that come again while a run stops: they cost neither the checkpoint nor a worker that nobody ends."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from detr_fast.engine.checkpoints import load_checkpoint
from detr_fast.engine.config import TrainConfig
from detr_fast.engine.errors import Interrupted
from detr_fast.engine.reporter import Reporter
from detr_fast.engine.trainer import Trainer, train
from detr_fast.engine.training_data import TrainingData


class StopAtOnce(Reporter):
    """Sends this process a signal after its first step, and again just before `again`, a method, runs."""

    def __init__(self, signum: int, again: tuple[type, str], monkeypatch: pytest.MonkeyPatch) -> None:
        owner, name = again
        self.signum, self.times, whole = signum, 0, getattr(owner, name)

        def interrupted(*arguments: Any) -> None:
            if self.times == 1:
                self.send()
            whole(*arguments)

        monkeypatch.setattr(owner, name, interrupted)

    def send(self) -> None:
        self.times += 1
        os.kill(os.getpid(), self.signum)

    def step(self, step: int, record: dict[str, Any] | None) -> None:
        if self.times == 0:
            self.send()


@pytest.fixture
def deadly() -> Iterator[None]:
    """SIGTERM outside of training is an error, as it would end the process."""

    def end(*_: object) -> None:
        raise AssertionError("ended by SIGTERM")

    before = signal.signal(signal.SIGTERM, end)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("signum", "again"),
    [
        (signal.SIGTERM, (Trainer, "_save")),
        (signal.SIGTERM, (TrainingData, "stop_workers")),
        (signal.SIGINT, (TrainingData, "stop_workers")),
    ],
)
def test_a_signal_that_comes_again_costs_neither_the_checkpoint_nor_the_end_of_the_workers(
    signum: int,
    again: tuple[type, str],
    tiny: Callable[..., TrainConfig],
    deadly: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = tiny(epochs=1)
    reporter = StopAtOnce(signum, again, monkeypatch)
    with pytest.raises(Interrupted, match="step 1 of 3 is saved; go on with"):
        train(config, reporter=reporter)
    assert reporter.times == 2
    run = tiny().run
    assert load_checkpoint(f"{run}/checkpoint.pt")["step"] == 1
    assert not os.path.exists(f"{run}/.lock")
