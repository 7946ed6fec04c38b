"""The training loop: seeded, resumable at any step, and on one or many devices by Hugging Face's accelerate."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from torch.nn.utils import get_total_norm

from detr_fast.data.batching import Batch
from detr_fast.data.coco import CocoFolder
from detr_fast.data.coco_eval import CocoEvaluator
from detr_fast.data.words import counted
from detr_fast.engine.captured import CapturedStep
from detr_fast.engine.checkpoints import (
    latest_run,
    load_weights,
    require_same_classes,
    rng_state,
    save_checkpoint,
    set_rng_state,
)
from detr_fast.engine.config import TrainConfig
from detr_fast.engine.curves import draw_curves
from detr_fast.engine.drawing import draw_grid
from detr_fast.engine.ema import ExponentialMovingAverage
from detr_fast.engine.errors import ConfigError, Interrupted, LoaderError, TrainingDiverged, loading
from detr_fast.engine.evaluation import evaluate_model, sample_pictures
from detr_fast.engine.metrics import FLAGS, DeviceMetrics, raise_for_flags
from detr_fast.engine.optimization import parameter_groups, rate_factor
from detr_fast.engine.reporter import Reporter
from detr_fast.engine.run_folder import RunFolder, atomic_write
from detr_fast.engine.signals import StopSignals
from detr_fast.engine.training_data import load_training_data
from detr_fast.models.build import build_criterion, build_model
from detr_fast.models.convert import load_weights as load_foreign_weights
from detr_fast.models.detr import Detr

LOGGED = ("loss", "loss_ce", "loss_bbox", "loss_giou", "class_error", "cardinality_error")


@dataclass
class TrainResult:
    """What came out of a run.

    Attributes:
        run: its folder.
        model: the trained model (its average where it has one), in eval mode.
        metrics: of the last evaluation; empty where there is no validation split.
        steps: taken in all.
        seconds: wall time of the training steps of this call, evaluation left out.
        images_per_second: over these.
    """

    run: RunFolder
    model: Detr
    config: TrainConfig
    names: tuple[str, ...]
    metrics: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    seconds: float = 0.0
    images_per_second: float = 0.0


def train(config: TrainConfig, *, overwrite: bool = False, reporter: Reporter | None = None) -> TrainResult:
    """Train from the start, and leave checkpoint, metrics, curves and pictures in `config.run`.

    Raises:
        RunFolderError: the folder holds a run already, unless `overwrite`; another process trains in it; or it can't be written.
        DataError, ConfigError, WeightsError: the data, the settings or the weights to start from can't be used.
        Interrupted, LoaderError: Ctrl-C, SIGTERM or SIGHUP came, or a process that loads images ended; the checkpoint is saved.
        TrainingDiverged: the loss or a weight is not finite.
    """
    return Trainer(config, reporter or Reporter(), overwrite=overwrite).run_all()


def resume(
    run: str | Path,
    *,
    epochs: int | None = None,
    data: str | Path | None = None,
    device: str | None = None,
    workers: int | None = None,
    reporter: Reporter | None = None,
) -> TrainResult:
    """Go on with the run in folder `run` as if it had not been interrupted; raises as `train`.

    `epochs` changes how far; `data` is where the data set lies now, if it was moved; `device` and `workers` suit another machine.
    """
    folder, state = latest_run(run)
    config = TrainConfig.from_dict(state["config"] | {"run": str(folder.path)})
    given = {"epochs": epochs, "data": data, "device": device, "workers": workers}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    return Trainer(dataclasses.replace(config, **changes), reporter or Reporter(), state=state).run_all()


class Trainer:
    """One run; see `train`."""

    def __init__(
        self,
        config: TrainConfig,
        reporter: Reporter,
        *,
        overwrite: bool = False,
        state: dict[str, Any] | None = None,
    ) -> None:
        if config.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("the device is 'cuda', but PyTorch sees no GPU here; use --device cpu or auto")
        self.reporter = reporter
        try:
            self.accelerator = Accelerator(mixed_precision=config.precision, cpu=config.device == "cpu")
        except ValueError as error:  # the device can't, or this process has begun with another one
            raise ConfigError(f"precision {config.precision!r} can't be used here: {error}") from error
        self.device = self.accelerator.device
        self.main = self.accelerator.is_main_process
        set_seed(config.seed)
        folder = CocoFolder.open(config.data, bad_boxes="drop" if config.drop_bad_boxes else "raise")
        dropped = sum(folder.annotations(split).dropped for split in folder.splits)
        if dropped:
            reporter.message(f"left out: {counted(dropped, 'box')} without area or outside the image")
        self.config = dataclasses.replace(
            config,
            data=os.path.abspath(config.data),  # the run may be resumed from another folder
            model=dataclasses.replace(config.model, num_classes=len(folder.categories)),
        )
        self.data = load_training_data(self.config, folder, self.accelerator, reporter.message)
        self.total_steps = config.epochs * self.data.steps_per_epoch
        if state is not None:
            require_same_classes(state["names"], self.data.names, config)
            self._compare_epochs(state)
        self._build(state)
        self.folder = RunFolder(config.run)
        if state is not None and self.main:
            self.folder.claim()
        elif self.main:
            self.folder = RunFolder.create(config.run, overwrite)
            text = json.dumps(self.config.to_dict(), indent=1) + "\n"
            atomic_write(self.folder.config, lambda file: file.write(text.encode()))
        self.accelerator.wait_for_everyone()

    # Setting up ------------------------------------------------------------------------------------------------------

    def _build(self, state: dict[str, Any] | None) -> None:
        config = self.config
        try:
            model = build_model(config.model, config.weights_backbone if state is None else None)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        if config.weights is not None and state is None:
            self.reporter.message(str(load_foreign_weights(model, config.weights)))
        self.criterion = build_criterion(config.model, config.no_object_weight, class_weight=config.class_weight).to(
            self.device
        )
        self.step = 0
        self.saved = self.evaluated = 0  # at which step last
        self.metrics: dict[str, float] = {}
        self.best = -math.inf
        if state is not None:
            load_weights(model, state["model"], RunFolder(config.run).checkpoint)
        groups = parameter_groups(model, config)
        model = model.to(self.device)
        optimizer = torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay, fused=True)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        # Not prepared: accelerate would take one scheduler step for each process.
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate)
        self.bare: Detr = self.accelerator.unwrap_model(self.model)
        self.ema = ExponentialMovingAverage(self.bare, config.ema_decay) if config.ema_decay else None
        if state is not None:
            self._restore(state)
        self.sums = DeviceMetrics((*LOGGED, *FLAGS), self.device)
        self.take_step = CapturedStep(
            self.model,
            self.criterion,
            optimizer,
            clip_norm=config.clip_norm,
            ema=self.ema,
            averaged=self.bare,
            scaler=self.accelerator.scaler,
            metrics=self.sums,
            autocast=self.accelerator.autocast,
            taken=self.step,
        )
        if self.device.type == "cuda" and self.take_step.reason is not None:
            self.reporter.message(f"steps are not captured in CUDA graphs: {self.take_step.reason}")

    def _compare_epochs(self, state: dict[str, Any]) -> None:
        """Say how epochs are counted from here on, where they have another length than when `state` was saved."""
        was, now = state.get("steps_per_epoch"), self.data.steps_per_epoch
        if was is None or was == now:
            return
        epochs, step = self.config.epochs, state["step"]
        ahead = f"training goes on in epoch {step // now + 1}" if step < self.total_steps else "nothing is left to do"
        self.reporter.message(
            f"an epoch had {counted(was, 'step')} and has {now:,} now, as the data or the processes changed: "
            f"{counted(epochs, 'epoch')} are {counted(self.total_steps, 'step')}, of which {step:,} are done; {ahead}"
        )

    def _restore(self, state: dict[str, Any]) -> None:
        if self.ema is not None and state["ema"] is not None:
            self.ema.module.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.metrics, self.best = state["step"], state["metrics"], state["best"]
        self.saved, self.evaluated = self.step, state.get("evaluated", self.step)
        set_rng_state(state["rng"])

    def _rate(self, step: int) -> float:
        return rate_factor(self.config, step, self.total_steps)

    def _summary(self) -> str:
        config, data = self.config, self.data
        parameters = sum(p.numel() for p in self.bare.parameters()) / 1e6
        processes = self.accelerator.num_processes
        where = self.device.type + (f" ×{processes}" if processes > 1 else "")
        images = counted(data.training_images, "training image")
        if data.validation is not None:
            images += f", {len(data.validation)} for validation"
        epochs, steps = counted(config.epochs, "epoch"), counted(data.steps_per_epoch, "step")
        batch = counted(config.batch_size * processes, "image")
        return (
            f"{config.model.backbone} DETR, {parameters:.1f} M parameters, on {where}: "
            f"{images}, {counted(len(data.names), 'class')}; {epochs} of {steps} of {batch}"
        )

    # Running ---------------------------------------------------------------------------------------------------------

    def run_all(self) -> TrainResult:
        """Train up to the last epoch, evaluating and saving on the way."""
        self.seconds, self.images = 0.0, 0
        self.reporter.about(self._summary())
        self.reporter.start(self.step, self.total_steps)
        if self.step >= self.total_steps:
            self.reporter.message(f"{counted(self.config.epochs, 'epoch')} done already; give --epochs to go further")
        when = "after this step" if self._alone else "with the other processes"
        with StopSignals(when if self.main else None) as signals:
            try:
                self._end_epoch(signals)  # of a run that was stopped before it evaluated
                while self.step < self.total_steps:
                    self._train_epoch(signals)
                    self._end_epoch(signals)
            except Interrupted as stop:
                if self.saved != self.step:
                    self._save()
                raise Interrupted(stop.signum, self._how_to_go_on) from None
            finally:
                signals.ending = True
                self.data.stop_workers()
                self.folder.release()
        self._draw()
        return TrainResult(
            run=self.folder,
            model=self._evaluated_model().eval(),
            config=self.config,
            names=self.data.names,
            metrics=self.metrics,
            steps=self.step,
            seconds=self.seconds,
            images_per_second=self.images / self.seconds if self.seconds else 0.0,
        )

    def _train_epoch(self, signals: StopSignals) -> None:
        epoch, done = divmod(self.step, self.data.steps_per_epoch)
        self.data.sampler.set_epoch(epoch, start=done * self.accelerator.num_processes)
        self.model.train()
        window = _Window(self.step)
        begun = time.perf_counter()
        for batch in self._batches(self.data.steps_per_epoch - done):
            self.take_step(batch.images, batch.targets)
            self.scheduler.step()
            self.step += 1
            window.images += len(batch) * self.accelerator.num_processes
            last = self.step % self.data.steps_per_epoch == 0
            save = self.step - self.saved >= self.config.save_every
            record = None
            if self.step % self.config.log_every == 0 or last or save or (self._alone and signals.received is not None):
                record = self._log(window, epoch)
                if save:
                    self._save()
                window = _Window(self.step)
            self.images += len(batch) * self.accelerator.num_processes
            self.reporter.step(self.step, record)
            if self._alone:
                signals.check()
            elif record is not None:  # where all processes wait for their devices
                self._check_together(signals)
        self.seconds += time.perf_counter() - begun

    def _batches(self, count: int) -> Iterator[Batch]:
        """So many of this epoch's. Where one can't be loaded, no step is lost."""
        try:
            with loading():
                for batch, _ in zip(self.data.loader, range(count)):
                    yield batch
        except Exception as error:
            if self.saved != self.step:
                self._save()
            if isinstance(error, LoaderError):
                raise self._to_go_on(error) from error
            raise

    def _to_go_on(self, error: LoaderError) -> LoaderError:
        return LoaderError(f"{error}; {self._how_to_go_on}")

    @property
    def _how_to_go_on(self) -> str:
        return f"step {self.step} of {self.total_steps} is saved; go on with '{self.folder.how_to_go_on}'"

    @property
    def _alone(self) -> bool:
        return self.accelerator.num_processes == 1

    def _check_together(self, signals: StopSignals) -> None:
        """Raise Interrupted if a signal came to any process: the others would wait for the gradients of one that stopped alone."""
        received = self.accelerator.gather(torch.tensor([signals.received or 0], device=self.device))
        if (signum := int(received.max())) != 0:  # type: ignore[union-attr]
            raise Interrupted(signum)

    def _end_epoch(self, signals: StopSignals) -> None:
        """Save, and evaluate where that is due and not done yet."""
        epoch, steps = divmod(self.step, self.data.steps_per_epoch)
        due = steps == 0 and (epoch % self.config.evaluate_every == 0 or self.step == self.total_steps)
        if self.saved != self.step:
            self._save()
        if due and self.evaluated != self.step:
            self._evaluate(signals)

    def _log(self, window: _Window, epoch: int) -> dict[str, Any]:
        means = self.sums.read()  # the one place where the host waits for the device
        steps = f"step {self.step}" if self.step - window.after == 1 else f"steps {window.after + 1} to {self.step}"
        raise_for_flags(means, steps, self._advice_after_divergence())
        lr, lr_backbone = self.scheduler.get_last_lr()
        logged = {name: means[name] for name in LOGGED}
        record = {"kind": "train", "step": self.step, "epoch": epoch, **logged, "lr": lr, "lr_backbone": lr_backbone}
        record["images_per_second"] = window.images / (time.perf_counter() - window.begun)
        if self.main:
            self.folder.log(record)
        return record

    def _advice_after_divergence(self) -> str:
        kept = "the last checkpoint is kept; " if self.folder.checkpoint.exists() else ""
        return f"{kept}start again with a lower --lr (it was {self.config.lr:g})"

    def _evaluated_model(self) -> Detr:
        return cast(Detr, self.ema.module) if self.ema is not None else self.bare

    def _evaluate(self, signals: StopSignals) -> None:
        """Take the validation split's figures, where there is one, and save them."""
        if self.data.validation is None or self.data.validation_loader is None:
            return
        alone = self._alone

        def progress(done: int, total: int) -> None:
            self.reporter.evaluating(done, total)
            if alone:  # else the other processes would wait for this one's predictions
                signals.check()

        try:
            figures = evaluate_model(
                self._evaluated_model(),
                self.data.validation_loader,
                CocoEvaluator(self.data.validation),
                self.device,
                self.criterion if alone else None,  # its sums wait for the other processes
                progress,
                None if alone else _exchange,
            )
        except LoaderError as error:
            raise self._to_go_on(error) from error
        self.metrics, self.evaluated = figures, self.step
        record = {"kind": "evaluation", "step": self.step, "epoch": self.step // self.data.steps_per_epoch, **figures}
        if self.main:
            self.folder.log(record)
            # Without any box there is no AP, -1: the last weights are the best.
            if figures["AP"] > self.best or self.best < 0:
                self.best = figures["AP"]
                weights = self._evaluated_model().state_dict()
                self._write(self.folder.best, self._about() | {"model": weights, "ema": None})
        self._save()
        self.reporter.evaluated(record)

    def _about(self) -> dict[str, Any]:
        return {
            "config": self.config.to_dict(),
            "names": list(self.data.names),
            "category_ids": list(self.data.category_ids),
            "epoch": self.step // self.data.steps_per_epoch,
            "step": self.step,
            "steps_per_epoch": self.data.steps_per_epoch,
            "metrics": self.metrics,
            "best": self.best,
            "evaluated": self.evaluated,
        }

    def _save(self) -> None:
        # A gradient can be NaN where the loss is finite. Every process has the same weights, so all of them raise.
        if not get_total_norm(self.bare.parameters(), math.inf).isfinite():
            raise TrainingDiverged(f"a weight is not finite after step {self.step}; {self._advice_after_divergence()}")
        self.saved = self.step
        if not self.main:
            return
        scaler = self.accelerator.scaler
        state = self._about() | {
            "model": self.bare.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema is not None else None,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict() | {"lr_lambdas": [None, None]},
            "scaler": scaler.state_dict() if scaler is not None else None,
            "rng": rng_state(),
        }
        self._write(self.folder.checkpoint, state)

    def _write(self, path: Path, state: dict[str, Any]) -> None:
        advice = f"free some space, then go on with '{self.folder.how_to_go_on}'"
        save_checkpoint(path, state, advice if self.folder.checkpoint.exists() else "")

    def _draw(self) -> None:
        if not self.main:
            return
        name = Path(self.config.data).resolve().name
        draw_curves(self.folder.read_metrics(), self.folder.curves, f"{name}: {counted(self.step, 'step')}")
        pictures = sample_pictures(self._evaluated_model(), self.data.drawn, self.device)
        what = "validation" if self.data.validation is not None else "training"
        page = draw_grid(
            pictures, self.data.names, f"{name}: {what} images after {counted(self.step, 'step')}, scores from 0.5"
        )
        atomic_write(self.folder.predictions, lambda file: page.save(file, format="PNG"))


@dataclass
class _Window:
    """The steps between two reads of the losses: after which step they began, when, and how many images they had."""

    after: int
    images: int = 0
    begun: float = field(default_factory=time.perf_counter)


def _exchange(predictions: dict[int, Any]) -> dict[int, Any]:
    return dict(gather_object(list(predictions.items())))
