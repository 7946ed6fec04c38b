"""`detr-fast convert`: data sets between COCO, YOLO and Pascal VOC."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def convert(
    source: Annotated[Path, typer.Argument(help="The data set's folder.")],
    destination: Annotated[Path, typer.Argument(help="A new or empty folder.")],
    to: Annotated[str, typer.Option("--to", help="coco, yolo or voc.")] = "coco",
    from_format: Annotated[str | None, typer.Option("--from", help="coco, yolo or voc; recognised by default.")] = None,
) -> None:
    """Write a copy of a data set in another format."""
    from detr_fast.data import formats
    from detr_fast.data.words import counted

    given = from_format or formats.detect_format(source)
    conversion = formats.convert(source, destination, given, to)  # type: ignore[arg-type]
    for split, images in conversion.images.items():
        boxes = counted(conversion.boxes[split], "box")
        print(f"{destination}, {split}: {counted(images, 'image')}, {boxes} ({given} to {to})")
    if conversion.crowds_dropped:
        print(f"left out {counted(conversion.crowds_dropped, 'crowd annotation')}: {to} has no place for them")
