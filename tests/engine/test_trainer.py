from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.data._utils import signal_handling

from detr_fast.data import DataError
from detr_fast.engine.checkpoints import load_checkpoint
from detr_fast.engine.config import TrainConfig
from detr_fast.engine.curves import draw_curves
from detr_fast.engine.errors import CheckpointError, ConfigError, Interrupted, RunFolderError, TrainingDiverged
from detr_fast.engine.reporter import Reporter
from detr_fast.engine.run_folder import RunFolder
from detr_fast.engine.signals import StopSignals
from detr_fast.engine.trained import load_trained_model
from detr_fast.engine.trainer import Trainer, resume, train
from detr_fast.models import PostProcess, TargetError, Targets

Tiny = Callable[..., TrainConfig]


class StopAt(Reporter):
    """Sends this process a signal after a step, as a user or a scheduler would."""

    def __init__(self, at: int, signum: int = signal.SIGINT) -> None:
        self.at, self.signum = at, signum

    def step(self, step: int, record: dict[str, Any] | None) -> None:
        if step == self.at:
            os.kill(os.getpid(), self.signum)


class CrashAt(Reporter):
    """Ends training without notice after a step, or as soon as so many images are evaluated."""

    def __init__(self, step: int | None = None, evaluated: int | None = None) -> None:
        self.at, self.images = step, evaluated

    def step(self, step: int, record: dict[str, Any] | None) -> None:
        if step == self.at:
            raise RuntimeError("crashed")

    def evaluating(self, done: int, total: int) -> None:
        if done == self.images:
            raise RuntimeError("crashed")


KILLED = """
import json, os, signal, sys
from detr_fast.engine.config import TrainConfig
from detr_fast.engine.reporter import Reporter
from detr_fast.engine.trainer import train

class Killed(Reporter):
    def step(self, step, record):
        if step == 5:
            os.kill(os.getpid(), signal.SIGKILL)

train(TrainConfig.from_dict(json.loads(sys.argv[1])), reporter=Killed())
"""


def assert_same(a: Any, b: Any, where: str = "") -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, f"{where}/{i}")
    else:
        assert a == b, where


def test_a_run_leaves_checkpoint_metrics_and_pictures(tiny: Tiny) -> None:
    result = train(tiny())
    run = result.run
    assert result.steps == 6
    assert 0 <= result.metrics["AP"] <= result.metrics["AP50"] <= 1
    assert result.images_per_second > 0
    kinds = [record["kind"] for record in run.read_metrics()]
    assert kinds.count("train") == 6
    assert kinds.count("evaluation") == 2
    for picture in (run.curves, run.predictions):
        with Image.open(picture) as image:
            assert min(image.size) > 200
    assert json.loads(run.config.read_text())["model"]["num_classes"] == 6
    best = load_checkpoint(run.best)
    assert best["evaluated"] == best["step"] in (3, 6)


def test_curves_show_a_run_of_which_the_losses_were_read_once(tmp_path: Path) -> None:
    draw_curves([{"kind": "train", "step": 10, "loss": 2.0, "lr": 1e-4, "lr_backbone": 1e-5}], tmp_path / "curves.png")
    page = Image.open(tmp_path / "curves.png").convert("RGB")
    width, height = page.size
    ends = [
        page.crop((width * 3 // 7, 0, width // 2, height // 2)),
        page.crop((width * 13 // 14, height // 2, width, height)),
    ]
    assert all((0x1F, 0x77, 0xD2) in {colour for _, colour in part.getcolors(10**6)} for part in ends)


def test_settings_hold_paths_as_text_so_that_they_can_be_saved(tmp_path: Path) -> None:
    config = TrainConfig(tmp_path / "data", tmp_path / "run", weights=tmp_path / "w.pt")  # type: ignore[arg-type]
    assert TrainConfig.from_dict(config.to_dict()) == config
    assert (config.data, config.weights) == (str(tmp_path / "data"), str(tmp_path / "w.pt"))


def test_training_lowers_the_loss(tiny: Tiny) -> None:
    result = train(tiny(epochs=12, evaluate_every=12, lr=5e-3, lr_backbone=5e-3))
    losses = [record["loss"] for record in result.run.read_metrics() if record["kind"] == "train"]
    assert sum(losses[-6:]) < 0.95 * sum(losses[:6])


@pytest.mark.parametrize(("stop_at", "signum"), [(2, signal.SIGINT), (3, signal.SIGTERM), (4, signal.SIGHUP)])
def test_an_interrupted_and_resumed_run_equals_an_uninterrupted_one(
    tiny: Tiny, stop_at: int, signum: int, request: pytest.FixtureRequest
) -> None:
    # Under nohup a SIGHUP is ignored, and is meant to be.
    request.addfinalizer(partial(signal.signal, signum, signal.signal(signum, signal.default_int_handler)))
    whole = train(tiny("whole", workers=0))
    with pytest.raises(Interrupted, match=f"step {stop_at} of 6 is saved; go on with 'detr-fast train --resume"):
        train(tiny("parts"), reporter=StopAt(stop_at, signum))
    parts = resume(Path(tiny("parts").run))
    assert_same_run(whole.run, parts.run)


def assert_same_run(whole: RunFolder, parts: RunFolder) -> None:
    """Everything that a checkpoint holds, and the figures logged, but not the time that they took."""
    a, b = load_checkpoint(whole.checkpoint), load_checkpoint(parts.checkpoint)
    for key in ("model", "ema", "optimizer", "scheduler", "rng", "step", "metrics", "best", "evaluated"):
        assert_same(a[key], b[key], key)
    untimed = [[r | {"images_per_second": 0} for r in run.read_metrics()] for run in (whole, parts)]
    assert_same(*untimed)


@pytest.mark.parametrize(("crash", "saved"), [(CrashAt(3), 2), (CrashAt(evaluated=4), 6)])
def test_a_run_that_crashed_goes_on_from_a_checkpoint_within_its_epoch(tiny: Tiny, crash: CrashAt, saved: int) -> None:
    whole = train(tiny("whole", batch_size=2))
    with pytest.raises(RuntimeError, match="crashed"):
        train(tiny("parts", batch_size=2, save_every=2), reporter=crash)
    folder = RunFolder(tiny("parts").run)
    assert load_checkpoint(folder.checkpoint)["step"] == saved
    assert_same_run(whole.run, resume(folder.path).run)


def test_a_run_killed_in_mid_epoch_resumes_to_the_same_weights(tiny: Tiny) -> None:
    whole, parts = train(tiny("whole", batch_size=2)).run, tiny("parts", batch_size=2, save_every=4, workers=1)
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-c", KILLED, json.dumps(parts.to_dict())]
    assert subprocess.run(command, env=environment, timeout=120).returncode == -signal.SIGKILL
    assert load_checkpoint(RunFolder(parts.run).checkpoint)["step"] == 4
    assert_same_run(whole, resume(parts.run).run)


def test_checkpoints_within_an_epoch_are_as_far_apart_as_asked(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[int] = []
    monkeypatch.setattr("detr_fast.engine.trainer.save_checkpoint", lambda path, state, *_: saved.append(state["step"]))
    train(tiny(batch_size=2, save_every=4, evaluate_every=3))
    assert saved == [4, 6, 10, 12, 12, 12]  # before the evaluation, the best, and after it


def test_an_evaluation_that_crashes_costs_no_step(tiny: Tiny) -> None:
    with pytest.raises(RuntimeError, match="crashed"):
        train(tiny(batch_size=2, epochs=1, save_every=4), reporter=CrashAt(evaluated=2))
    state = load_checkpoint(RunFolder(tiny().run).checkpoint)
    assert (state["step"], state["evaluated"]) == (6, 0)
    assert resume(tiny().run).metrics
    assert load_checkpoint(RunFolder(tiny().run).checkpoint)["evaluated"] == 6


def test_ctrl_c_in_an_evaluation_does_not_wait_for_its_end_and_costs_no_step(tiny: Tiny) -> None:
    class Impatient(Reporter):
        def evaluating(self, done: int, total: int) -> None:
            seen.append((done, total))
            os.kill(os.getpid(), signal.SIGINT)

    seen: list[tuple[int, int]] = []
    whole = train(tiny("whole", batch_size=2, epochs=1))
    with pytest.raises(Interrupted, match="step 6 of 6 is saved; go on with"):
        train(tiny("parts", batch_size=2, epochs=1), reporter=Impatient())
    assert seen == [(2, 4)]
    assert_same_run(whole.run, resume(tiny("parts").run).run)


@pytest.mark.parametrize("signalled", [0, 1])
def test_a_signal_to_one_of_several_processes_stops_all_at_the_same_step(
    tiny: Tiny, signalled: int, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    request.addfinalizer(partial(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, signal.SIG_IGN)))
    trainer = Trainer(tiny(log_every=2), StopAt(1, signal.SIGTERM) if signalled == 0 else Reporter())
    others = torch.tensor([signal.SIGTERM if signalled == 1 else 0])
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", 2)
    monkeypatch.setattr(trainer.accelerator, "gather", lambda own: torch.cat([own, others]))
    with pytest.raises(Interrupted, match="stopped by SIGTERM: step 2 of 6 is saved"):
        trainer.run_all()


def test_a_run_without_a_checkpoint_is_started_again_and_not_resumed(tiny: Tiny) -> None:
    with pytest.raises(RuntimeError, match="crashed"):
        train(tiny(epochs=1), reporter=CrashAt(1))
    with pytest.raises(CheckpointError, match="stopped before its first checkpoint; start again with --overwrite"):
        resume(tiny().run)
    with pytest.raises(RunFolderError, match=r"without a checkpoint; replace it with --overwrite") as refusal:
        train(tiny(epochs=1))
    assert "--resume" not in str(refusal.value)
    assert train(tiny(epochs=1), overwrite=True).steps == 3


def test_weights_that_are_not_finite_are_never_saved(tiny: Tiny) -> None:
    trainer = Trainer(tiny(save_every=1, ema_decay=0.0, log_every=1000), Reporter())
    steps = iter([1.0, float("nan")])  # the losses of both steps are finite
    trainer.bare.class_embed.bias.register_hook(lambda gradient: gradient * next(steps))
    with pytest.raises(TrainingDiverged, match=r"weight is not finite after step 2; the last checkpoint is kept.*--lr"):
        trainer.run_all()
    state = load_checkpoint(RunFolder(tiny().run).checkpoint)
    assert state["step"] == 1
    assert all(weight.isfinite().all() for weight in state["model"].values())


def test_a_step_that_is_not_finite_never_replaces_a_checkpoint(tiny: Tiny) -> None:
    with pytest.raises(TrainingDiverged, match=r"step (\d) .*the last checkpoint is kept.*lower --lr"):
        train(tiny(lr=1e30, clip_norm=1e30, ema_decay=0.0, save_every=1, log_every=1000))
    state = load_checkpoint(RunFolder(tiny().run).checkpoint)
    assert state["step"] == 1
    assert all(weight.isfinite().all() for weight in state["model"].values())


def test_a_resumed_run_can_be_made_longer_and_go_on_with_another_number_of_workers(tiny: Tiny) -> None:
    first = train(tiny(epochs=1, workers=1))
    longer = resume(first.run.path, epochs=2, workers=0)
    assert (longer.steps, longer.config.workers) == (6, 0)


def test_a_run_from_a_gpu_goes_on_where_there_is_none(tiny: Tiny) -> None:
    run = train(tiny(epochs=1)).run
    state = torch.load(run.checkpoint)
    state["config"]["device"] = "cuda"
    torch.save(state, run.checkpoint)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="use --device cpu or auto"):
            resume(run.path, epochs=2)
    assert resume(run.path, epochs=2, device="cpu").steps == 6


def test_a_run_is_resumed_from_another_folder_and_with_data_that_were_moved(
    tiny: Tiny, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(scenes, "set")
    run = train(tiny(epochs=1, data="set")).run
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    assert resume(run.path, epochs=2).steps == 6
    (tmp_path / "set").rename("moved")
    with pytest.raises(DataError, match="set: does not exist"):
        resume(run.path, epochs=3)
    assert resume(run.path, epochs=3, data=Path("moved")).steps == 9
    assert load_trained_model(run.checkpoint).config.data == str(tmp_path / "elsewhere" / "moved")


def test_a_focal_run_is_evaluated_and_loaded_as_such(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[bool] = []
    original = PostProcess.__init__
    monkeypatch.setattr(PostProcess, "__init__", lambda self, focal=False: made.append(focal) or original(self, focal))
    run = train(tiny(epochs=1, model=replace(tiny().model, focal=True))).run
    assert set(made) == {True}
    trained = load_trained_model(run.checkpoint)
    assert trained.model.focal
    losses = [record["loss_ce"] for record in run.read_metrics() if record["kind"] == "train"]
    assert all(0 < loss < 100 for loss in losses)


def test_signals_are_the_callers_again_after_training(tiny: Tiny) -> None:
    before = signal.getsignal(signal.SIGINT)
    train(tiny(epochs=1))
    assert signal.getsignal(signal.SIGINT) is before


def test_a_hangup_that_is_ignored_as_under_nohup_stays_so() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            signals.check()
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="patches what a forked worker runs")
def test_a_worker_that_still_starts_outlasts_a_signal_to_all(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    begin = signal_handling._set_worker_signal_handlers  # from here on SIGTERM ends a worker

    def signalled() -> None:
        begin()
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(signal_handling, "_set_worker_signal_handlers", signalled)
    assert train(tiny(epochs=1, workers=1)).steps == 3


def test_a_forked_worker_announces_no_stop(capfd: pytest.CaptureFixture[str]) -> None:
    with StopSignals("after this step"):
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
    assert capfd.readouterr().err == ""


def test_a_folder_with_a_run_is_not_overwritten_unasked(tiny: Tiny) -> None:
    train(tiny(epochs=1))
    with pytest.raises(RunFolderError, match=r"already holds a run.*--resume"):
        train(tiny(epochs=1))
    assert train(tiny(epochs=1), overwrite=True).steps == 3


def test_a_folder_that_another_process_trains_in_is_refused_until_that_ends_however_it_does(tiny: Tiny) -> None:
    run = train(tiny(epochs=1)).run
    hold = "import fcntl, sys; f = open(sys.argv[1], 'ab'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    command = [sys.executable, "-c", hold, run.path / ".lock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(RunFolderError, match="another process trains in"):
            resume(run.path, epochs=2)
        with pytest.raises(RunFolderError, match="another process trains in"):
            train(tiny(epochs=1), overwrite=True)
        other.kill()
    assert resume(run.path, epochs=2).steps == 6
    assert not (run.path / ".lock").exists()


def test_a_loss_that_is_not_finite_stops_training_and_keeps_the_checkpoint(tiny: Tiny) -> None:
    class Poison(Reporter):
        def evaluated(self, record: dict[str, Any]) -> None:
            trained.append(record["step"])

    trained: list[int] = []
    with pytest.raises(TrainingDiverged, match=r"not finite.*lower --lr"):
        train(tiny(lr=1e30, clip_norm=1e30, ema_decay=0.0, warmup_steps=0))
    assert not RunFolder(tiny().run).checkpoint.exists()


def test_settings_that_contradict_the_data_are_one_line(tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match="has only 12 training images"):
        train(tiny(batch_size=13))
    model = replace(tiny().model, backbone="resnet18")
    with pytest.raises(ConfigError, match="no such file"):
        train(tiny(model=model, weights_backbone="no-such-weights"))


def test_a_precision_that_this_process_cannot_change_to_is_one_line(tiny: Tiny) -> None:
    train(tiny(epochs=1))
    with pytest.raises(ConfigError, match=r"precision 'bf16' can't be used here: AcceleratorState has already been"):
        train(tiny("other", precision="bf16"))


def test_labels_out_of_range_on_the_device_end_training_with_one_clear_error(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    collate = Targets.from_list

    def broken(*args: Any, **kwargs: Any) -> Targets:
        targets = collate(*args, **kwargs)
        targets.labels[0, 0] = 99
        return targets

    monkeypatch.setattr(Targets, "from_list", broken)
    with pytest.raises(TargetError, match=r"step 1 had true boxes .* label out of range.*detr-fast doctor"):
        train(tiny(epochs=1))


def test_weights_of_another_run_start_a_new_one(tiny: Tiny) -> None:
    first = train(tiny("first", epochs=1))
    second = train(
        tiny("second", epochs=1, weights=str(first.run.checkpoint), lr=1e-12, lr_backbone=0.0, ema_decay=0.0)
    )
    a, b = load_trained_model(first.run.checkpoint).model, load_trained_model(second.run.checkpoint).model
    torch.testing.assert_close(a.class_embed.weight, b.class_embed.weight, rtol=0, atol=1e-6)


def test_a_backbone_without_a_learning_rate_is_frozen(tiny: Tiny) -> None:
    result = train(tiny(epochs=1, lr_backbone=0.0, ema_decay=0.0))
    frozen = {name for name, p in result.model.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, _ in result.model.named_parameters() if name.startswith("backbone.0.")}
    trained, backbone = load_checkpoint(result.run.checkpoint)["optimizer"]["param_groups"]
    assert len(trained["params"]) + len(frozen) == len(list(result.model.parameters()))
    assert backbone["params"] == []
    resume(result.run.path, epochs=2)  # a group without parameters is no obstacle


def test_the_number_of_workers_does_not_change_the_run(tiny: Tiny) -> None:
    none, two = train(tiny("none", epochs=1)), train(tiny("two", epochs=1, workers=2))
    assert_same(load_checkpoint(none.run.checkpoint)["model"], load_checkpoint(two.run.checkpoint)["model"])


def test_resuming_from_weights_alone_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    run = train(tiny(epochs=1)).run
    with pytest.raises(CheckpointError, match=r"best.pt holds weights only; resume from the checkpoint.pt"):
        resume(run.best)
    run.best.replace(run.checkpoint)
    with pytest.raises(CheckpointError, match="holds weights only"):
        resume(run.path)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        resume(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("schedule", "expected"), [("step", [1, 1, 1, 0.1, 0.1, 0.1]), ("linear", [1, 1, 0.75, 0.5, 0.25, 0])]
)
def test_the_learning_rate_warms_up_and_follows_its_schedule(tiny: Tiny, schedule: str, expected: list[float]) -> None:
    run = train(tiny(schedule=schedule, warmup_steps=2, evaluate_every=2)).run
    rates = [record["lr"] / 1e-3 for record in run.read_metrics() if record["kind"] == "train"]
    assert rates == pytest.approx(expected)  # each record holds the rate of the step after it
