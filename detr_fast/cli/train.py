"""`detr-fast train`: any COCO-format folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

_START, _RECIPE, _MACHINE = "Start", "Recipe", "Machine"
_RESUMABLE = ("--resume", "--epochs", "--data", "--device", "--workers")  # what is not the recipe's may change


def train(
    context: typer.Context,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data", help="A COCO-format folder: instances_train.json, …_val.json and images.", rich_help_panel=_START
        ),
    ] = None,
    run: Annotated[
        Path | None, typer.Option("--run", help="The run folder; runs/<data> by default.", rich_help_panel=_START)
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            "--resume",
            help="Go on with this run folder, where it stopped; with --epochs, --device or --workers, and --data if it was moved.",
            rich_help_panel=_START,
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run folder's run.", rich_help_panel=_START)
    ] = False,
    drop_bad_boxes: Annotated[
        bool,
        typer.Option(
            "--drop-bad-boxes",
            help="Leave out boxes without area or outside their image (COCO 2017 has two) rather than stop.",
            rich_help_panel=_START,
        ),
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            help="small, resnet18, resnet34, resnet50 or resnet101 (that of --weights, or else resnet50).",
            rich_help_panel=_START,
        ),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(
            "--weights",
            help="Start from these: a run's checkpoint, the original's, or Hugging Face's.",
            rich_help_panel=_START,
        ),
    ] = None,
    weights_backbone: Annotated[
        str | None,
        typer.Option(
            "--weights-backbone",
            help="ImageNet weights: a file, or a name of torchvision's, which downloads them.",
            rich_help_panel=_START,
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option("--epochs", help="Passes over the data (300; small: 50).", rich_help_panel=_RECIPE),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", help="Images a step (2; small: 8).", rich_help_panel=_RECIPE),
    ] = None,
    image_size: Annotated[
        int,
        typer.Option(
            "--image-size",
            help="Shorter side in pixels (800; small: 128).",
            show_default=False,
            rich_help_panel=_RECIPE,
        ),
    ] = 0,
    queries: Annotated[
        int | None,
        typer.Option("--queries", help="The most objects an image can get (100).", rich_help_panel=_RECIPE),
    ] = None,
    focal: Annotated[
        bool,
        typer.Option(
            "--focal", help="Classify by sigmoid focal loss, without a 'no object' class.", rich_help_panel=_RECIPE
        ),
    ] = False,
    lr: Annotated[
        float | None,
        typer.Option(
            "--lr",
            help="Learning rate of the transformer (0.0001; small: 0.0005).",
            rich_help_panel=_RECIPE,
        ),
    ] = None,
    lr_backbone: Annotated[
        float | None,
        typer.Option(
            "--lr-backbone", help="… of the backbone; 0 freezes it (1e-05; small: 0.0005).", rich_help_panel=_RECIPE
        ),
    ] = None,
    ema: Annotated[
        float | None, typer.Option("--ema", help="Average the weights, for example 0.999.", rich_help_panel=_RECIPE)
    ] = None,
    horizontal_flip: Annotated[
        bool,
        typer.Option(
            "--horizontal-flip/--no-horizontal-flip",
            help="Augment so; not where left and right differ in meaning, as in text.",
            rich_help_panel=_RECIPE,
        ),
    ] = True,
    vertical_flip: Annotated[
        bool,
        typer.Option("--vertical-flip", help="Augment so too: pictures without an upside.", rich_help_panel=_RECIPE),
    ] = False,
    color_jitter: Annotated[
        float,
        typer.Option("--color-jitter", help="Augment brightness, contrast and saturation.", rich_help_panel=_RECIPE),
    ] = 0.0,
    evaluate_every: Annotated[
        int | None,
        typer.Option("--evaluate-every", help="Epochs between evaluations (1).", rich_help_panel=_RECIPE),
    ] = None,
    save_every: Annotated[
        int | None,
        typer.Option(
            "--save-every",
            help="Steps between checkpoints within an epoch: the most that a crash can lose (1000).",
            rich_help_panel=_MACHINE,
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option("--seed", help="Of weights, order and augmentation (0).", rich_help_panel=_RECIPE),
    ] = None,
    device: Annotated[
        str | None, typer.Option("--device", help="auto, cpu or cuda (auto).", rich_help_panel=_MACHINE)
    ] = None,
    precision: Annotated[
        str | None, typer.Option("--precision", help="no, bf16 or fp16 (no).", rich_help_panel=_MACHINE)
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option("--workers", help="Processes that load images (2).", rich_help_panel=_MACHINE),
    ] = None,
) -> None:
    """Train a DETR on a COCO-format folder; classes and their names come from its annotations.

    A checkpoint is kept after each epoch, within long ones, and on Ctrl-C; --resume goes on from the last. Several GPUs: accelerate launch -m detr_fast train …

    In brackets are the defaults: the original recipe's, and where they differ those of --model small.
    """
    import os
    from dataclasses import replace

    import torch
    from rich.console import Console

    from detr_fast.cli.presets import preset
    from detr_fast.cli.progress import ProgressReporter, figure, speed
    from detr_fast.data.words import counted
    from detr_fast.engine import trainer
    from detr_fast.engine.errors import ConfigError
    from detr_fast.models.convert import read_weights

    if data is None and resume is None:
        raise ConfigError("give either --data DIR, to start a run, or --resume RUN, to go on with one")
    changes: dict[str, Any] = {
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr,
        "lr_backbone": lr_backbone,
        "ema_decay": ema,
        "evaluate_every": evaluate_every,
        "save_every": save_every,
        "seed": seed,
        "device": device,
        "precision": precision,
        "workers": workers,
    }
    changes = {name: value for name, value in changes.items() if value is not None}
    console = Console(width=None if os.isatty(1) else 120, markup=False)  # a [bracket] in a path is no style
    if resume is not None:
        sources = {p.opts[0]: context.get_parameter_source(p.name or "") for p in context.command.params}
        given = [option for option, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
        surplus = [option for option in given if option not in _RESUMABLE]
        if surplus:
            raise ConfigError(
                f"{', '.join(surplus)} cannot change in mid-run; with --resume go only --epochs, --device, --workers, and --data where it was moved"
            )
        with ProgressReporter(console) as reporter:
            result = trainer.resume(resume, epochs=epochs, data=data, device=device, workers=workers, reporter=reporter)
    else:
        assert data is not None
        if model is None and weights is not None:
            changes["model"] = read_weights(weights).config
            model = "small" if changes["model"].backbone == "conv" else changes["model"].backbone
        model = model or "resnet50"
        config = replace(preset(model, data, run or Path("runs") / data.resolve().name, image_size), **changes)
        notes: list[str] = []
        settings: dict[str, Any] = {"focal": focal or config.model.focal}
        if queries is not None:
            settings["num_queries"] = queries
        if model != "small" and weights is None and weights_backbone is None:
            settings["backbone_norm"] = "batch"
            notes.append("no weights given: the backbone trains from scratch, which needs much data")
        if model != "small" and device != "cuda" and not torch.cuda.is_available():
            notes.append(
                f"no GPU: a step of {model} at {config.transforms.eval_size} pixels takes a CPU many seconds; "
                "--model small --image-size 160 is made for one"
            )
        if queries is not None and queries < 1:
            raise ConfigError(f"--queries is {queries}, expected at least 1: the most objects that an image can get")
        config = replace(
            config,
            model=replace(config.model, **settings),
            transforms=replace(
                config.transforms,
                horizontal_flip=0.5 if horizontal_flip else 0.0,
                vertical_flip=0.5 if vertical_flip else 0.0,
                color_jitter=color_jitter,
            ),
            drop_bad_boxes=drop_bad_boxes,
            weights=None if weights is None else str(weights),
            weights_backbone=weights_backbone,
        )
        with ProgressReporter(console, notes) as reporter:
            result = trainer.train(config, overwrite=overwrite, reporter=reporter)
    figures = f"AP {figure(result.metrics['AP'])}, AP50 {figure(result.metrics['AP50'])}; " if result.metrics else ""
    pace = f"{speed(result.images_per_second)}; " if result.seconds else ""
    folder = result.run.path
    console.print(
        f"{figures}{pace}{counted(result.steps, 'step')}; in {folder}: checkpoint.pt, metrics.jsonl, curves.png, predictions.png",
        highlight=False,
        soft_wrap=True,
    )
