"""The main job in small: generated scenes, a small DETR, and its speed beside plain torch.nn layers."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from detr_fast.data.batching import Batch, build_loader
from detr_fast.data.coco import CocoDetection, CocoFolder
from detr_fast.data.scenes import generate_scenes
from detr_fast.data.transforms import TransformConfig, train_transforms
from detr_fast.engine.config import TrainConfig
from detr_fast.models.build import ModelConfig, build_criterion, build_model

# A DETR that trains from scratch on a CPU within minutes.
SMALL_MODEL = ModelConfig(
    backbone="conv",
    num_queries=12,
    d_model=128,
    heads=8,
    encoder_layers=3,
    decoder_layers=3,
    feedforward=512,
    dropout=0.0,
    pre_norm=True,
    position_temperature=20.0,
)


def demo_config(run: Path, *, quick: bool = False, seed: int = 0) -> TrainConfig:
    """The demo's settings: 1,250 steps of batch 16; `quick` trains for some 40 seconds on two cores."""
    return TrainConfig(
        data=str(run / "scenes"),
        run=str(run),
        model=SMALL_MODEL,
        transforms=TransformConfig(sizes=(96,), max_size=128, crop=False, eval_size=96),
        epochs=5 if quick else 10,
        batch_size=16,
        lr=5e-4,
        lr_backbone=5e-4,
        weight_decay=1e-4,
        clip_norm=1.0,
        class_weight=2.0,
        no_object_weight=0.25,  # with the original's 0.1, a short training ends before duplicates are given up
        schedule="linear",
        warmup_steps=30 if quick else 100,
        workers=1,
        evaluate_every=5 if quick else 2,
        seed=seed,
    )


def scene_counts(quick: bool) -> tuple[int, int]:
    """How many training and validation images the demo generates."""
    return (480, 60) if quick else (2000, 200)


def make_scenes(config: TrainConfig, quick: bool, progress: Callable[[int, int], None] | None = None) -> None:
    """Generate the demo's data set."""
    train, val = scene_counts(quick)
    generate_scenes(config.data, train=train, val=val, seed=config.seed, progress=progress)


@dataclass(frozen=True)
class Comparison:
    """Training throughput of detr_fast.nn's layers and of torch.nn's, images per second on one device."""

    ours: float
    torch: float
    device: str
    steps: int

    @property
    def ratio(self) -> float:
        return self.ours / self.torch

    def __str__(self) -> str:
        text = f"{self.ours:.0f} img/s, plain torch.nn layers {self.torch:.0f} img/s: {self.ratio:.2f}× (best of {self.steps} steps)"
        if self.device == "cpu":
            text += "; about 1.0 is expected on a CPU, where PyTorch's own layers run either way"
        return text


def compare_with_torch(config: TrainConfig, device: torch.device | str, rounds: int = 4) -> Comparison:
    """Train the same model with both kinds of layers for a few steps, in turns, and compare the fastest step of each.

    What the machine does besides only ever adds time, and turns spread it over both; weights, batch and settings are the same.
    """
    folder = CocoFolder.open(config.data)
    dataset = CocoDetection(folder, "train", train_transforms(config.transforms))
    loader = build_loader(dataset, config.batch_size, shuffle=True, drop_last=True, seed=config.seed)
    batch: Batch = next(iter(loader)).to(device)
    steps = []
    for plain in (False, True):
        torch.manual_seed(config.seed)
        model = build_model(config.model)
        if plain:
            use_torch_layers(model)
        steps.append(_training_step(model.to(device).train(), batch, config, torch.device(device)))
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(rounds + 1):
        for which in (0, 1) if turn % 2 else (1, 0):
            for _ in range(2):
                seconds = steps[which]()
                if turn:  # the first turn warms up
                    times[which].append(seconds)
    ours, theirs = (len(batch) / min(t) for t in times)
    return Comparison(ours, theirs, torch.device(device).type, len(times[0]))


def use_torch_layers(model: nn.Module) -> None:
    """Switch every layer of detr_fast.nn in `model` back to the torch.nn class that it subclasses, in place."""
    for module in model.modules():
        if type(module).__module__.startswith("detr_fast.nn."):
            lineage = type(module).__mro__
            module.__class__ = next(c for c in lineage if c.__module__.startswith("torch.nn."))


def _training_step(model: nn.Module, batch: Batch, config: TrainConfig, device: torch.device) -> Callable[[], float]:
    criterion = build_criterion(config.model, config.no_object_weight, class_weight=config.class_weight).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)

    def step() -> float:
        _wait(device)
        begun = time.perf_counter()
        loss = criterion.weighted_sum(criterion(model(batch.images), batch.targets))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
        _wait(device)
        return time.perf_counter() - begun

    return step


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
