"""A small data set made here: coloured shapes on textured ground, in COCO's format, the same on every machine.

Each picture has a size of its own (80 to 112 pixels a side by default) and one to five shapes that may overlap. The
class is the shape; colour, size, position and angle are random. Boxes are tight around the part of a shape that can be
seen, as COCO's annotators draw them, and at least 60 % of every shape can be seen. Category ids have gaps and don't
start at 0, as in many a real data set.
"""

from __future__ import annotations

import colorsys
import json
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from detr_fast.data.folders import new_folder

CATEGORIES = {3: "circle", 7: "square", 11: "triangle", 18: "star", 25: "ring", 40: "cross"}

_VERSION = 2  # of the pictures: raise it when they change, and folders of older versions are made anew
_STAMP = "scenes.json"
_SUPERSAMPLING = 4  # shapes are drawn this much larger, then averaged down: smooth edges, boxes to a quarter pixel
_LEAST_VISIBLE = 0.6


@dataclass(frozen=True)
class _Settings:
    train: int
    val: int
    seed: int
    size: int
    version: int = _VERSION


def generate_scenes(
    folder: str | Path,
    train: int = 2000,
    val: int = 200,
    seed: int = 0,
    size: int = 96,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write the data set, unless the folder already holds it whole.

    The folder appears in one move when all is written, so an interrupted run leaves none.

    Args:
        folder: gets images/, instances_train.json and instances_val.json.
        train, val: numbers of images.
        seed: another one gives other pictures.
        size: the middle of the images' sides in pixels; they vary by a sixth.
        progress: called with (images done, images in all).

    Returns:
        The folder.

    Raises:
        DataError: the folder has other contents, or can't be written.
    """
    folder = Path(folder)
    settings = _Settings(train, val, seed, size)
    stamp = folder / _STAMP
    ours = stamp.is_file()
    if ours and json.loads(stamp.read_text()) == asdict(settings):
        return folder
    with new_folder(folder, replace=ours) as partial_folder:
        _write(partial_folder, settings, progress or (lambda done, total: None))
    return folder


def _write(folder: Path, settings: _Settings, progress: Callable[[int, int], None]) -> None:
    images = folder / "images"
    images.mkdir()
    total = settings.train + settings.val
    with ThreadPoolExecutor(
        os.cpu_count()
    ) as pool:  # Pillow and numpy let go of the interpreter's lock where it counts
        scenes = []
        for scene in pool.map(partial(_write_scene, images, settings.seed, settings.size), range(total)):
            scenes.append(scene)
            progress(len(scenes), total)
    splits = {"train": scenes[: settings.train], "val": scenes[settings.train :]}
    for split, part in splits.items():
        (folder / f"instances_{split}.json").write_text(json.dumps(_coco(part)))
    (folder / _STAMP).write_text(json.dumps(asdict(settings)))


def _coco(scenes: list[dict[str, Any]]) -> dict[str, Any]:
    annotations = [annotation for scene in scenes for annotation in scene["annotations"]]
    return {
        "info": {"description": "Generated scenes of coloured shapes"},
        "images": [scene["image"] for scene in scenes],
        "annotations": [annotation | {"id": number} for number, annotation in enumerate(annotations, start=1)],
        "categories": [{"id": number, "name": name} for number, name in CATEGORIES.items()],
    }


def _write_scene(images: Path, seed: int, size: int, number: int) -> dict[str, Any]:
    picture, objects = draw_scene(np.random.default_rng((seed, size, number)), size)
    name = f"{number:06d}.png"
    image = {"id": 1000 + number, "file_name": name, "width": picture.width, "height": picture.height}
    picture.save(images / name, compress_level=1)  # level 6 takes three times as long for 10 % less
    annotations = [
        {"image_id": image["id"], "category_id": category, "bbox": box, "area": area, "iscrowd": 0}
        for category, box, area in objects
    ]
    return {"image": image, "annotations": annotations}


def draw_scene(random: np.random.Generator, size: int) -> tuple[Image.Image, list[tuple[int, list[float], float]]]:
    """One picture and its objects as (category id, [x, y, width, height], visible area), in pixels."""
    low, high = round(size * 5 / 6), round(size * 7 / 6)
    width, height = (int(side) for side in random.integers(low, high + 1, size=2))
    canvas = _ground(random, width, height)
    masks: list[np.ndarray] = []
    whole_areas: list[int] = []
    categories: list[int] = []
    for _ in range(int(random.integers(1, 6))):
        category = int(random.choice(list(CATEGORIES)))
        mask = _shape_mask(random, CATEGORIES[category], width, height)
        remaining = [other & ~mask for other in masks]
        if any(int(left.sum()) < _LEAST_VISIBLE * area for left, area in zip(remaining, whole_areas)):
            continue  # it would hide another one
        masks = [*remaining, mask]
        whole_areas.append(int(mask.sum()))
        categories.append(category)
        coverage = mask.reshape(height, _SUPERSAMPLING, width, _SUPERSAMPLING).mean(axis=(1, 3), dtype=np.float32)
        canvas += coverage[..., None] * (_colour(random) - canvas)
    noise = random.normal(0, 6, size=canvas.shape).astype(np.float32)
    picture = Image.fromarray((canvas + noise).clip(0, 255).astype(np.uint8))
    return picture, [_object(category, mask) for category, mask in zip(categories, masks)]


def _object(category: int, mask: np.ndarray) -> tuple[int, list[float], float]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    left, top, right, bottom = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    box = [float(value) / _SUPERSAMPLING for value in (left, top, right - left, bottom - top)]
    return category, box, round(float(mask.sum()) / _SUPERSAMPLING**2, 2)


def _colour(random: np.random.Generator) -> np.ndarray:
    """A bright, saturated colour: the ground is dull, so that a shape's edge can be seen."""
    hue, saturation, value = random.uniform((0, 0.85, 0.9), (1, 1, 1))
    return np.array(colorsys.hsv_to_rgb(hue, saturation, value), dtype=np.float32) * 255


def _ground(random: np.random.Generator, width: int, height: int) -> np.ndarray:
    """A dull colour with a cloudy texture, (height, width, 3) float32."""
    colour = random.uniform(50, 90) + random.uniform(-15, 15, size=3)
    ground = np.zeros((height, width), dtype=np.float32)
    for cells, strength in ((4, 14), (12, 8)):
        grid = random.normal(0, strength, size=(cells, cells)).astype(np.float32)
        ground += np.asarray(Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC))
    return (ground[..., None] + colour).astype(np.float32)


def _shape_mask(random: np.random.Generator, name: str, width: int, height: int) -> np.ndarray:
    """Where a shape of random size, place and angle lies: bool, supersampled; all of it is inside the picture."""
    radius = random.uniform(0.18, 0.29) * min(width, height)
    x, y = (random.uniform(radius, side - radius) for side in (width, height))
    angle = random.uniform(-math.pi / 12, math.pi / 12)
    mask = Image.new("1", (width * _SUPERSAMPLING, height * _SUPERSAMPLING))
    draw = ImageDraw.Draw(mask)

    def circle(scale: float, fill: int) -> None:
        r = radius * scale
        draw.ellipse([(v * _SUPERSAMPLING) for v in (x - r, y - r, x + r, y + r)], fill=fill)

    if name in ("circle", "ring"):
        circle(0.95, 1)
        if name == "ring":
            circle(0.55, 0)
    else:
        cos, sin = math.cos(angle) * radius, math.sin(angle) * radius
        corners = [(x + u * cos - v * sin, y + u * sin + v * cos) for u, v in _OUTLINES[name]]
        draw.polygon([(u * _SUPERSAMPLING, v * _SUPERSAMPLING) for u, v in corners], fill=1)
    return np.array(mask)


def _star(points: int, inner: float) -> list[tuple[float, float]]:
    angles = [math.pi * i / points - math.pi / 2 for i in range(2 * points)]
    return [
        ((inner if i % 2 else 1) * math.cos(a), (inner if i % 2 else 1) * math.sin(a)) for i, a in enumerate(angles)
    ]


# Corners within the unit circle, y pointing down.
_OUTLINES = {
    "square": [(-0.7, -0.7), (0.7, -0.7), (0.7, 0.7), (-0.7, 0.7)],
    "triangle": _star(3, 0.5),
    "star": _star(5, 0.42),
    "cross": [
        (x, y)
        for x, y in (
            (-0.3, -0.9), (0.3, -0.9), (0.3, -0.3), (0.9, -0.3), (0.9, 0.3), (0.3, 0.3),
            (0.3, 0.9), (-0.3, 0.9), (-0.3, 0.3), (-0.9, 0.3), (-0.9, -0.3), (-0.3, -0.3),
        )
    ],
}  # fmt: skip
