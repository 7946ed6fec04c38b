"""`detr-fast predict`: objects in images, as pictures and JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def predict(
    model: Annotated[Path, typer.Argument(help="A run folder, a checkpoint, the original's, or Hugging Face's.")],
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders of them.")],
    out: Annotated[
        Path,
        typer.Option("--out", help="Gets predictions.json, and a picture of each image (at most 1,600 pixels a side)."),
    ] = Path("predictions"),
    threshold: Annotated[float, typer.Option("--threshold", help="Leave out what scores less, 0 to 1.")] = 0.5,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Images a batch.")] = 4,
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = "auto",
    pictures: Annotated[bool, typer.Option("--pictures/--no-pictures", help="Draw the pictures.")] = True,
) -> None:
    """Detect objects in images: writes a picture of each with its boxes, and predictions.json with all of them.

    Files that cannot be read are named and left out, and the exit status is then 1.
    """
    import sys
    from collections import Counter

    from rich.console import Console

    from detr_fast.cli.devices import pick_device
    from detr_fast.cli.progress import progress_bar
    from detr_fast.data.words import counted
    from detr_fast.engine.errors import PredictionError
    from detr_fast.engine.prediction import JSON_NAME, find_images, predict_images, require_apart, write_predictions
    from detr_fast.engine.trained import load_trained_model

    hidden: list[Path] = []
    paths = find_images(images, hidden)
    if pictures:
        require_apart(paths, out)
    trained = load_trained_model(model, pick_device(device))
    unreadable: list[PredictionError] = []
    with progress_bar(Console(stderr=True), "predicting") as progress:

        def shown():  # type: ignore[no-untyped-def]
            predictions = predict_images(
                trained, paths, threshold=threshold, batch_size=batch_size, unreadable=unreadable
            )
            for number, prediction in enumerate(predictions, start=1):
                yield prediction
                progress(number, len(paths))

        records = write_predictions(shown(), trained, out, pictures)
    counts = Counter(d["name"] for record in records for d in record["detections"])
    found = ", ".join(f"{count} {name}" for name, count in counts.most_common()) or "no objects"
    what = "pictures and " if pictures else ""
    skipped = f" ({counted(len(hidden), 'hidden file')} left out)" if hidden else ""
    print(f"{counted(len(records), 'image')}{skipped}: {found} above {threshold:g}; {what}{JSON_NAME} in {out}")
    for error in unreadable:
        print(f"Warning: {str(error).rpartition(';')[0]}; left out", file=sys.stderr)
    if unreadable:
        raise typer.Exit(1)
