"""`detr-fast evaluate`: COCO average precision of a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    model: Annotated[Path, typer.Argument(help="A run folder, a checkpoint, the original's, or Hugging Face's.")],
    data: Annotated[
        Path | None, typer.Option("--data", help="A COCO-format folder; the one trained on by default.")
    ] = None,
    split: Annotated[str, typer.Option("--split", help="val, test or train.")] = "val",
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Images a batch.")] = 8,
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = "auto",
    workers: Annotated[int, typer.Option("--workers", min=0, help="Processes that load images.")] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="All figures as JSON, and nothing else.")] = False,
) -> None:
    """Evaluate a trained model: COCO's average precision, overall and for each class, and the best threshold for predict."""
    import json
    import math
    import os

    from rich.console import Console
    from rich.table import Table

    from detr_fast.cli.devices import pick_device
    from detr_fast.cli.progress import figure, progress_bar
    from detr_fast.data.batching import build_loader
    from detr_fast.data.coco import CocoDetection, CocoFolder
    from detr_fast.data.coco_eval import CocoEvaluator
    from detr_fast.data.transforms import eval_transforms
    from detr_fast.data.words import counted
    from detr_fast.engine.errors import ConfigError
    from detr_fast.engine.evaluation import evaluate_model
    from detr_fast.engine.trained import load_trained_model, match_labels

    where = pick_device(device)
    trained = load_trained_model(model, where)
    if data is None and trained.published:
        raise ConfigError(f"{model} does not say what it was trained on; give a COCO-format folder: --data DIR")
    folder = data or Path(trained.config.data)
    opened = CocoFolder.open(folder, bad_boxes="drop" if trained.config.drop_bad_boxes else "raise")
    dataset = CocoDetection(opened, split, eval_transforms(trained.config.transforms))
    labels = match_labels(trained, dataset.names, dataset.category_ids, folder)
    loader = build_loader(dataset, batch_size, shuffle=False, workers=workers, pin_memory=where.type == "cuda")
    evaluator = CocoEvaluator(dataset)
    with progress_bar(Console(stderr=True), "evaluating") as progress:
        figures = evaluate_model(trained.model, loader, evaluator, where, progress=progress, labels=labels)
    if as_json:
        print(json.dumps(figures, indent=1))
        return
    if dataset.max_boxes == 0:
        print(f"{folder}, {split}: the {counted(len(dataset), 'image')} have no box: there is nothing to evaluate")
        return
    console = Console(width=None if os.isatty(1) else 120, markup=False)  # a [bracket] in a name is no style
    console.print(
        f"{trained.path} on {folder}, {split}: {counted(len(dataset), 'image')}", highlight=False, soft_wrap=True
    )
    overall = Table("", "all", "small", "medium", "large", box=None, padding=(0, 2, 0, 0))
    overall.add_row("AP", *(figure(figures[k]) for k in ("AP", "APs", "APm", "APl")))
    overall.add_row("AP50", figure(figures["AP50"]))
    overall.add_row("AP75", figure(figures["AP75"]))
    overall.add_row("AR, 100 boxes", *(figure(figures[k]) for k in ("AR100", "ARs", "ARm", "ARl")))
    console.print(overall)
    columns = ("AP", "AP50", "precision", "recall")
    by_class = Table("class", *columns, box=None, padding=(0, 2, 0, 0))
    for name in evaluator.names:
        by_class.add_row(name, *(figure(figures[f"{column}/{name}"]) for column in columns))
    by_class.add_row("all", *(figure(figures[column]) for column in columns))
    console.print(by_class)
    if figures["threshold"] >= 0:
        threshold = math.floor(1000 * figures["threshold"]) / 1000  # rounded up, it would leave a box out
        console.print(
            f"precision and recall are at IoU 0.5 and --threshold {threshold:.3f}, where F1 is highest on these images",
            highlight=False,
            soft_wrap=True,
        )
