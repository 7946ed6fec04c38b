"""`detr-fast explain`: which implementation each part of a model would run on here, and why."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import torch

    from detr_fast.engine.config import TrainConfig
    from detr_fast.explanation import Explanation
    from detr_fast.models.detr import Detr


def explain(
    model: Annotated[
        str, typer.Argument(help="A run folder, a checkpoint, published weights, or: small, resnet18, … resnet101.")
    ] = "resnet50",
    training: Annotated[bool, typer.Option("--training", help="A training step instead of inference.")] = False,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Images a batch.")] = 2,
    image_size: Annotated[
        int, typer.Option("--image-size", min=0, help="Pixels a side; 0 is the model's own size.")
    ] = 0,
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Records instead of lines.")] = False,
) -> None:
    """Say what would run where: one line a module, with the implementation chosen, its cost, and the reasons against others."""
    import dataclasses
    import json

    from rich.console import Console

    from detr_fast.cli.devices import pick_device
    from detr_fast.cli.presets import MODELS, preset
    from detr_fast.engine.errors import EngineError
    from detr_fast.engine.trained import load_trained_model
    from detr_fast.models.build import build_model

    where = pick_device(device)
    if model in MODELS and not Path(model).exists():
        config = preset(model, "", "")
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, num_classes=91))
        detector = build_model(config.model).to(where)
    elif not Path(model).exists():
        raise EngineError(
            f"no checkpoint {model}; give a run folder, a checkpoint, published weights or one of {', '.join(MODELS)}"
        )
    else:
        trained = load_trained_model(model, where)
        config, detector = trained.config, trained.model.requires_grad_(training)
    with Console(stderr=True).status("running it once, counted"):
        explanation = explain_model(detector, config, where, training, batch_size, image_size, counted=True)
    print(json.dumps(explanation.as_dicts(), indent=1) if as_json else explanation)


def explain_model(
    model: Detr,
    config: TrainConfig,
    device: torch.device | str,
    training: bool,
    batch_size: int = 2,
    image_size: int = 0,
    counted: bool = False,
) -> Explanation:
    """One batch of padded random images, of the size that `config` evaluates at; `counted`: with launches and bytes."""
    import torch

    from detr_fast.explanation import explaining

    side = image_size or config.transforms.eval_size
    images = [torch.rand(3, side, side - side // 4 * (i % 2), device=device) for i in range(batch_size)]
    before = model.training
    state: dict[str, Any] = {k: v.clone() for k, v in model.state_dict().items()} if training else {}
    model.train(training)
    try:
        with torch.set_grad_enabled(training), explaining(model, counted=counted) as explanation:
            outputs = model(images)
            if training:
                (outputs["pred_logits"].sum() + outputs["pred_boxes"].sum()).backward()
    finally:
        model.train(before)
        if training:
            model.zero_grad()
            model.load_state_dict(state)  # batch norms have counted the random images
    return explanation


def summarize_choices(model: Detr, config: TrainConfig, device: torch.device | str) -> list[str]:
    """One line an op and implementation for a training step: how often it ran, and why not on another."""
    from collections import Counter

    from detr_fast.explanation import reasons_in_words

    model.requires_grad_(True)
    counts: Counter[tuple[str, str, str]] = Counter()
    for record in explain_model(model, config, device, training=True, batch_size=config.batch_size):
        counts[record.op, record.chosen, reasons_in_words(record.reasons)] += record.calls
    return [
        f"{op} ×{calls} on {chosen}" + (f" ({against})" if against else "")
        for (op, chosen, against), calls in counts.items()
    ]
