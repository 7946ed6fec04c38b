"""Everything that defines a training run, as one typed value that is saved beside its results."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from detr_fast.data.transforms import TransformConfig
from detr_fast.engine.errors import ConfigError
from detr_fast.models.build import ModelConfig

Schedule = Literal["step", "linear"]
Precision = Literal["no", "bf16", "fp16"]


@dataclass
class TrainConfig:
    """A training run. The defaults are the original DETR's (Carion et al., 2020, arXiv:2005.12872).

    `model.num_classes` is set from the annotations when training starts; whatever stands there before is ignored.
    """

    data: str
    run: str
    model: ModelConfig = field(default_factory=ModelConfig)
    transforms: TransformConfig = field(default_factory=TransformConfig)
    drop_bad_boxes: bool = False  # leave out boxes without area or outside their image, rather than refuse the data
    weights: str | None = None  # a checkpoint to start from; a head of another size is left out
    weights_backbone: str | None = None  # torchvision's name for pre-trained backbone weights

    epochs: int = 300
    batch_size: int = 2  # images a process and step
    lr: float = 1e-4
    lr_backbone: float = 1e-5  # 0 freezes it
    weight_decay: float = 1e-4
    clip_norm: float = 0.1
    schedule: Schedule = "step"  # "step": lr / 10 after `lr_drop` of the epochs; "linear": down to 0 at the end
    lr_drop: float = 2 / 3
    warmup_steps: int = 0
    ema_decay: float = 0.0  # 0: no moving average of the weights
    no_object_weight: float = 0.1
    class_weight: float = 1.0  # of the classification loss, beside 5 for L1 and 2 for GIoU

    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Precision = "no"
    seed: int = 0
    workers: int = 2
    log_every: int = 10  # steps between reads of the losses from the device
    evaluate_every: int = 1  # epochs
    save_every: int = 1000  # steps between checkpoints within an epoch: the most that a crash can lose

    def __post_init__(self) -> None:
        self.data, self.run = os.fspath(self.data), os.fspath(self.run)  # paths will do
        self.weights = None if self.weights is None else os.fspath(self.weights)
        at_least = {
            "epochs": 1,
            "batch_size": 1,
            "workers": 0,
            "log_every": 1,
            "evaluate_every": 1,
            "save_every": 1,
            "warmup_steps": 0,
            "weight_decay": 0,
            "lr_backbone": 0,
            "seed": 0,
        }
        for name, low in at_least.items():
            if not low <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected at least {low}")
        for name in ("lr", "clip_norm", "no_object_weight", "class_weight"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected a number over 0")
        if self.seed >= 2**32:
            raise ConfigError(f"seed is {self.seed}, expected less than 2**32, as NumPy takes them")
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(
                f"ema_decay is {self.ema_decay}, expected a number from 0 (off) to below 1, for example 0.999"
            )
        if not 0 <= self.transforms.color_jitter < math.inf:
            raise ConfigError(
                f"color_jitter is {self.transforms.color_jitter}, expected 0 (off) or a strength, for example 0.2"
            )
        if not 0 < self.lr_drop <= 1:
            raise ConfigError(f"lr_drop is {self.lr_drop}, expected a share of the epochs over 0 and up to 1")
        for name, allowed in (
            ("schedule", ("step", "linear")),
            ("precision", ("no", "bf16", "fp16")),
            ("device", ("auto", "cpu", "cuda")),
        ):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(allowed)}")

    def to_dict(self) -> dict[str, Any]:
        """Plain data that JSON and a weights-only load can hold."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """The inverse of `to_dict`; raises ConfigError for names that this version doesn't know."""
        values = dict(values)
        model = ModelConfig.from_dict(values.pop("model", {}))
        transforms = _from_dict(TransformConfig, values.pop("transforms", {}))
        return _from_dict(cls, values | {"model": model, "transforms": transforms})


def _from_dict(cls: type, values: Mapping[str, Any]) -> Any:
    known = {f.name for f in dataclasses.fields(cls)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ConfigError(f"unknown settings {', '.join(unknown)}: saved by another version of detr-fast?")
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
