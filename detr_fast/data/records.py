"""What all annotation formats have in common; conversions go through it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif"})


def is_hidden(path: Path) -> bool:
    """Whether its name starts with a dot, as that of the "._photo.jpg" that macOS leaves beside a "photo.jpg" does."""
    return path.name.startswith(".")


@dataclass(frozen=True)
class BoxRecord:
    """A box: label (position in `Records.names`), (x, y, width, height) in pixels from the upper left corner."""

    label: int
    box: tuple[float, float, float, float]
    crowd: bool = False


@dataclass(frozen=True)
class ImageRecord:
    """An image: its file, its name in the data set, and as its EXIF orientation turns it its size in pixels and its boxes."""

    path: Path
    file_name: str
    height: int
    width: int
    boxes: tuple[BoxRecord, ...]


@dataclass(frozen=True)
class Records:
    """A data set: class names, and the images of each split ("train", "val", "test")."""

    names: tuple[str, ...]
    splits: dict[str, list[ImageRecord]]

    def without_crowds(self) -> Records:
        splits = {
            split: [replace(image, boxes=tuple(box for box in image.boxes if not box.crowd)) for image in images]
            for split, images in self.splits.items()
        }
        return Records(self.names, splits)


def tidy(value: float) -> float:
    """A thousandth of a pixel is enough: takes back what a format's decimals did to a whole number."""
    return round(value, 3)
