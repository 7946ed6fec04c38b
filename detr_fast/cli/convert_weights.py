"""`detr-fast convert-weights`: checkpoints between this library, the original repository and Hugging Face."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def convert_weights(
    source: Annotated[
        Path, typer.Argument(help="A run folder, a checkpoint, a safetensors file or a Hugging Face folder.")
    ],
    destination: Annotated[Path, typer.Argument(help="What to write; must not exist yet.")],
    to: Annotated[str, typer.Option("--to", help="original, huggingface or safetensors.")] = "safetensors",
) -> None:
    """Convert a DETR's weights; the source's kind is recognised. No code in a file is ever executed."""
    from detr_fast.data.words import counted
    from detr_fast.models import convert

    weights = convert.convert_weights(source, destination, to)  # type: ignore[arg-type]
    classes = counted(weights.config.num_classes, "class")
    print(f"wrote {destination} ({to}): {counted(len(weights.state), 'tensor')}, {weights.config.backbone}, {classes}")
