"""Small data sets with known contents, and the real one where it is there."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

REPOSITORY = Path(__file__).parents[2]

# Three images of different shape; the second has no objects. Category ids have gaps and are out of order.
IMAGES = [
    {"id": 10, "file_name": "wide.png", "width": 60, "height": 30},
    {"id": 20, "file_name": "empty.png", "width": 40, "height": 40},
    {"id": 30, "file_name": "tall.png", "width": 30, "height": 50},
]
CATEGORIES = [{"id": 9, "name": "zebra"}, {"id": 2, "name": "ant"}, {"id": 5, "name": "bee"}]
ANNOTATIONS = [
    {"id": 0, "image_id": 30, "category_id": 9, "bbox": [3, 5, 12, 20], "area": 240, "iscrowd": 0},
    {"id": 1, "image_id": 10, "category_id": 2, "bbox": [6, 3, 30, 15], "area": 450, "iscrowd": 0},
    {"id": 2, "image_id": 10, "category_id": 5, "bbox": [40, 10, 10, 10], "area": 100, "iscrowd": 0},
    {"id": 3, "image_id": 10, "category_id": 5, "bbox": [0, 0, 60, 30], "area": 1800, "iscrowd": 1},
]

WriteCoco = Callable[..., Path]


@pytest.fixture
def write_coco(tmp_path: Path) -> WriteCoco:
    """write_coco(split="train", edit=None, folder="set") writes a data set and returns its folder.

    `edit` may change the JSON's object in place before it is written.
    """

    def write(split: str = "train", edit: Callable[[dict[str, Any]], None] | None = None, folder: str = "set") -> Path:
        root = tmp_path / folder
        (root / "images").mkdir(parents=True, exist_ok=True)
        raw = json.loads(json.dumps({"images": IMAGES, "annotations": ANNOTATIONS, "categories": CATEGORIES}))
        for number, image in enumerate(IMAGES):
            pixels = np.random.default_rng(number).integers(256, size=(image["height"], image["width"], 3))
            Image.fromarray(pixels.astype(np.uint8)).save(root / "images" / image["file_name"])
        if edit is not None:
            edit(raw)
        (root / f"instances_{split}.json").write_text(json.dumps(raw))
        return root

    return write


@pytest.fixture(scope="session")
def bccd() -> Path:
    """The folder of the BCCD data set (blood cells, COCO format)."""
    folder = Path(os.environ.get("DETR_FAST_BCCD") or REPOSITORY.parent / "shared" / "data" / "bccd")
    if not (folder / "instances_train.json").is_file():
        pytest.skip(f"the BCCD data set is not at {folder}; name its folder in DETR_FAST_BCCD")
    return folder
