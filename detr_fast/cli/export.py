"""`detr-fast export`: a detector as one file that runs with PyTorch alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(
    model: Annotated[Path, typer.Argument(help="A run folder, a checkpoint, the original's, or Hugging Face's.")],
    destination: Annotated[Path, typer.Argument(help="What to write, such as detector.pt2; must not exist yet.")],
    device: Annotated[str, typer.Option("--device", help="Where it will run: cpu, cuda or auto.")] = "cpu",
) -> None:
    """Export a detector with torch.export: pixels in, scores, labels and boxes out; runs without detr-fast.

    For any number of images of any size: torch.export.load("detector.pt2").module()(images, mask).
    """
    from rich.console import Console

    from detr_fast.cli.devices import pick_device
    from detr_fast.engine.errors import ConfigError
    from detr_fast.engine.export import LONGEST, MULTIPLE, export_detector
    from detr_fast.engine.trained import load_trained_model

    if destination.exists():
        raise ConfigError(f"{destination} is there already; give the name of a new file")
    trained = load_trained_model(model, pick_device(device))
    with Console(stderr=True).status("exporting"):
        export_detector(trained, destination)
    print(
        f"wrote {destination} ({destination.stat().st_size / 1e6:.0f} MB): images (B, 3, H, W), RGB from 0 to 1, and a mask "
        f"(B, H, W), True = padding; H and W multiples of {MULTIPLE} up to {LONGEST:,} -> scores, labels, "
        f"boxes (x0, y0, x1, y1 as shares of the unpadded image)"
    )
