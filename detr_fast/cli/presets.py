"""Settings by model name, for commands that build one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from detr_fast.data.transforms import TransformConfig
from detr_fast.engine.config import TrainConfig
from detr_fast.engine.demo import SMALL_MODEL
from detr_fast.engine.errors import ConfigError
from detr_fast.models.build import ModelConfig

MODELS = ("small", "resnet18", "resnet34", "resnet50", "resnet101")


def preset(name: str, data: str | Path, run: str | Path, image_size: int = 0) -> TrainConfig:
    """The original's recipe for a ResNet, the demo's for "small"; `image_size` 0 is the recipe's own (800, 128).

    Raises:
        ConfigError: an unknown name or a size under 32 pixels.
    """
    if name not in MODELS:
        raise ConfigError(f"the model is {name!r}, expected one of {', '.join(MODELS)}")
    if image_size and image_size < 32:
        raise ConfigError(f"the image size is {image_size}, expected at least 32 pixels (0: the model's own)")
    common: dict[str, Any] = {"data": str(data), "run": str(run)}
    if name != "small":
        return TrainConfig(**common, model=ModelConfig(backbone=name), transforms=_sizes(image_size or 800, crop=True))
    return TrainConfig(
        **common,
        model=replace(SMALL_MODEL, num_queries=100),
        transforms=_sizes(image_size or 128, crop=False),
        epochs=50,
        batch_size=8,
        lr=5e-4,
        lr_backbone=5e-4,
        clip_norm=1.0,
        class_weight=2.0,
        schedule="linear",
        warmup_steps=50,
    )


def _sizes(size: int, crop: bool) -> TransformConfig:
    """The original's eleven sizes and its limit of the longer side, scaled so that the largest is `size`."""
    sizes = tuple(sorted({round(size * step / 25) for step in range(15, 26)}))
    return TransformConfig(sizes=sizes, max_size=round(size * 1333 / 800), crop=crop, eval_size=size)
