"""What a data set asks of a run, and what its user is told of it."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data._utils import signal_handling
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from detr_fast.cli import main
from detr_fast.data import DataError
from detr_fast.data.coco import CocoDetection
from detr_fast.data.coco_eval import CocoEvaluator
from detr_fast.data.scenes import generate_scenes
from detr_fast.engine.checkpoints import load_checkpoint
from detr_fast.engine.config import TrainConfig
from detr_fast.engine.errors import ConfigError, LoaderError
from detr_fast.engine.reporter import Reporter
from detr_fast.engine.trainer import resume, train

Tiny = Callable[..., TrainConfig]


class Listener(Reporter):
    """Keeps what the user is told."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def message(self, text: str) -> None:
        self.heard.append(text)


def without_boxes(data: str, copy: Path, split: str) -> str:
    shutil.copytree(data, copy)
    annotations = copy / f"instances_{split}.json"
    annotations.write_text(json.dumps(json.loads(annotations.read_text()) | {"annotations": []}))
    return str(copy)


def test_a_run_whose_data_set_has_grown_says_how_its_epochs_are_counted_now(tiny: Tiny, tmp_path: Path) -> None:
    listener = Listener()
    run = train(tiny(epochs=2)).run
    resume(run.path, epochs=2, reporter=listener)
    assert not [text for text in listener.heard if "had 3 steps" in text]
    grown = generate_scenes(tmp_path / "grown", train=20, val=4, size=40)
    assert resume(run.path, epochs=2, data=grown, reporter=listener).steps == 10
    assert listener.heard[-1] == (
        "an epoch had 3 steps and has 5 now, as the data or the processes changed: "
        "2 epochs are 10 steps, of which 6 are done; training goes on in epoch 2"
    )


def test_a_data_set_without_boxes_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    data = without_boxes(tiny().data, tmp_path / "empty", "train")
    with pytest.raises(ConfigError, match=r"none of the 12 training images of .* has a box"):
        train(tiny(data=data))


def test_the_last_weights_are_the_best_where_no_image_of_the_validation_split_has_a_box(
    tiny: Tiny, tmp_path: Path
) -> None:
    listener = Listener()
    data = without_boxes(tiny().data, tmp_path / "empty", "val")
    run = train(tiny(data=data), reporter=listener).run
    assert load_checkpoint(run.best)["step"] == 6
    assert any("none of the 4 validation images has a box: there is no AP" in text for text in listener.heard)


def test_the_user_is_told_when_there_are_fewer_queries_than_boxes(tiny: Tiny) -> None:
    listener = Listener()
    train(tiny(epochs=1, model=replace(tiny().model, num_queries=1)), reporter=listener)
    assert any("raise --queries" in text for text in listener.heard)


def test_bad_boxes_stop_a_run_or_are_left_out_by_request(tiny: Tiny, scenes: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(scenes, data)
    file = data / "instances_train.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["bbox"][3] = 0
    file.write_text(json.dumps(content))
    listener = Listener()
    with pytest.raises(ValueError, match="detr-fast doctor"):
        train(tiny(data=str(data), epochs=1), reporter=listener)
    result = train(tiny(data=str(data), epochs=1, drop_bad_boxes=True), reporter=listener)
    assert result.steps == 3
    assert "left out: 1 box without area or outside the image" in listener.heard


def kill_workers() -> None:
    """As a system does that has no memory left."""
    for worker in multiprocessing.active_children():
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)
        os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)  # where torch's handler would raise


class KillWorkers(Reporter):
    """Ends those processes after the first step, while something else runs."""

    def step(self, step: int, record: dict[str, Any] | None) -> None:
        if step == 1:
            kill_workers()


@pytest.fixture
def killed_soon(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """That a worker was killed is found in less than 5 s, and by the handlers of a new process."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", False)  # by another test's loader
    wait = _MultiProcessingDataLoaderIter._try_get_data
    monkeypatch.setattr(_MultiProcessingDataLoaderIter, "_try_get_data", lambda self: wait(self, 0.2))
    yield
    signal.signal(signal.SIGCHLD, before)


@pytest.fixture
def killed_in_evaluation(killed_soon: None, monkeypatch: pytest.MonkeyPatch) -> None:
    update = CocoEvaluator.update

    def kill_and_update(self: CocoEvaluator, predictions: Any) -> None:
        kill_workers()
        update(self, predictions)

    monkeypatch.setattr(CocoEvaluator, "update", kill_and_update)


def test_where_a_worker_is_killed_in_evaluation_training_says_how_to_go_on(
    tiny: Tiny, killed_in_evaluation: None
) -> None:
    said = r"^DataLoader worker .*--workers; step 12 of 12 is saved; go on with '.*--res[^;]*$"
    with pytest.raises(LoaderError, match=said):
        train(tiny(batch_size=1, epochs=1, workers=1))


def test_where_a_worker_is_killed_evaluate_says_so_in_one_line(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(tiny(epochs=1)).run
    request.getfixturevalue("killed_in_evaluation")
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", str(run.path), "--workers", "1", "--batch-size", "1", "--device", "cpu"])
    assert ended.value.code == 2
    last = capsys.readouterr().err.rstrip("\n").split("\n")[-1]
    assert re.fullmatch(r"Error: DataLoader worker \(pid.*Lower --workers", last)


def test_where_a_worker_is_killed_no_step_is_interrupted_or_lost(tiny: Tiny, killed_soon: None) -> None:
    settings = {"batch_size": 1, "epochs": 1, "workers": 1}
    with pytest.raises(
        LoaderError, match=r"exited unexpectedly.*--workers; step \d+ of 12 is saved; go on with '.*--res"
    ):
        train(tiny("parts", **settings), reporter=KillWorkers())
    run, whole = resume(tiny("parts").run, workers=0).run, train(tiny("whole", **settings)).run
    ours, theirs = (load_checkpoint(one.checkpoint)["model"] for one in (run, whole))
    assert all(weight.equal(theirs[name]) for name, weight in ours.items())


def test_an_image_that_cannot_be_read_any_more_costs_no_step(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    read, images = CocoDetection.__getitem__, []

    def fail(self: CocoDetection, index: Any) -> Any:
        images.append(index)
        if len(images) > 8:
            raise DataError("image 7: the disk is gone")
        return read(self, index)

    monkeypatch.setattr(CocoDetection, "__getitem__", fail)
    with pytest.raises(DataError, match="the disk is gone"):
        train(tiny())
    assert load_checkpoint(f"{tiny().run}/checkpoint.pt")["step"] == 2
