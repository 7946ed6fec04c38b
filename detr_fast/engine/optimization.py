"""What a run optimizes at which learning rate."""

from __future__ import annotations

from typing import Any

from detr_fast.engine.config import TrainConfig
from detr_fast.models.detr import Detr


def parameter_groups(model: Detr, config: TrainConfig) -> list[dict[str, Any]]:
    """AdamW's groups, as in the original DETR: the transformer with the heads, and the backbone with a rate of its own.

    Where that rate is 0 the backbone is frozen, so that its backward isn't computed either.
    """
    if config.lr_backbone == 0:
        model.backbone[0].requires_grad_(False)
    trained = [(name.startswith("backbone"), p) for name, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for of_backbone, p in trained if not of_backbone]},
        {"params": [p for of_backbone, p in trained if of_backbone], "lr": config.lr_backbone},
    ]


def rate_factor(config: TrainConfig, step: int, total_steps: int) -> float:
    """What the learning rates are multiplied by at a step, counted from 0: warm-up, then the schedule."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "linear":
        return max(0.0, (total_steps - step) / max(1, total_steps - config.warmup_steps))
    return 0.1 if step >= config.lr_drop * total_steps else 1.0
