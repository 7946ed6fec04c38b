"""Reads one COCO instances JSON into arrays, and refuses what could not be trained on.

Ids are normalised here, once: "7", 7.0 and 7 are the same id, and image ids that are no integers at all become 1, 2,
3, … in file order. Everything after this file sees integers, so an id's type can't cost accuracy.
Format: https://cocodataset.org/#format-data
"""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from detr_fast.data.errors import DataError

BadBoxes = Literal["raise", "drop"]


@dataclass(frozen=True, order=True)
class Category:
    """A class as the JSON names it."""

    id: int
    name: str


@dataclass(frozen=True)
class Annotations:
    """One instances JSON: N images, M boxes sorted by image; image i owns boxes offsets[i] to offsets[i + 1].

    Arrays rather than objects: a million Python objects would be copied into every worker process.
    """

    path: Path
    categories: tuple[Category, ...]
    file_names: tuple[str, ...]
    image_ids: tuple[int, ...]  # normalised to integers
    original_image_ids: tuple[Any, ...]  # as the JSON has them
    sizes: np.ndarray  # (N, 2) int64, height and width; 0 where the JSON names none
    boxes: np.ndarray  # (M, 4) float64, x, y, width, height in pixels, as annotated
    category_ids: np.ndarray  # (M,) int64
    areas: np.ndarray  # (M,) float64, of the segment where the JSON has it, else of the box
    crowd: np.ndarray  # (M,) bool
    offsets: np.ndarray  # (N + 1,) int64
    dropped: int = 0  # boxes left out because they are bad

    def of_image(self, index: int) -> slice:
        return slice(int(self.offsets[index]), int(self.offsets[index + 1]))


def read_coco_json(path: Path) -> dict[str, Any]:
    """The parsed JSON, checked to be a COCO instances file: lists "images", "annotations" and "categories"."""
    try:
        raw = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from None
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, or a number or nesting without end
        raise DataError(f"{path}: is not JSON ({error}); export the annotations again") from None
    expected = "expected a COCO instances file: an object with the lists 'images', 'annotations' and 'categories'"
    if not isinstance(raw, dict):
        raise DataError(f"{path}: holds a {type(raw).__name__}; {expected}")
    for key in ("images", "annotations", "categories"):
        if not isinstance(raw.get(key), list):
            found = f"'{key}' is a {type(raw[key]).__name__}" if key in raw else f"has no '{key}'"
            raise DataError(f"{path}: {found}; {expected}, or convert it with 'detr-fast convert'")
        for position, record in enumerate(raw[key]):
            if not isinstance(record, dict):
                raise DataError(f"{path}: {key}[{position}] is {record!r:.60}; expected an object")
    return raw


def as_integer_id(value: Any) -> int | None:
    """7, 7.0 and "7" as 7; None for anything that is no integer of 64 bits."""
    if isinstance(value, bool):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str):
        digits = value.strip()
        if not digits.removeprefix("-").isdecimal():
            return None
        value = int(digits)
    return value if isinstance(value, int) and abs(value) < 2**63 else None


def box_of(record: dict[str, Any]) -> Any:
    """An annotation's bbox; where it has none, the box around its polygons."""
    box, polygons = record.get("bbox"), record.get("segmentation")
    if box or not isinstance(polygons, list) or not polygons:
        return box
    try:
        points = np.concatenate([np.asarray(polygon, dtype=float).reshape(-1, 2) for polygon in polygons])
        return [*points.min(axis=0).tolist(), *np.ptp(points, axis=0).tolist()]
    except (TypeError, ValueError):  # no polygons
        return box


def is_crowd(record: dict[str, Any]) -> bool:
    """Whether an annotation marks a crowd; some tools write iscrowd as text, and "0" is none."""
    value = record.get("iscrowd")
    return bool(value if (integer := as_integer_id(value)) is None else integer)


def area_of(record: dict[str, Any], box: list[float]) -> float:
    """An annotation's area in pixels where it is a number that an area can be, else its box's.

    pycocotools ignores objects of negative area, which polygons in the other direction get.
    """
    area = record.get("area")
    if isinstance(area, (int, float)) and not isinstance(area, bool) and 0 <= area < math.inf:
        return area
    return box[2] * box[3]


def id_key(value: Any) -> Any:
    """What ids are compared by: the integer where there is one, else the text."""
    integer = as_integer_id(value)
    return str(value) if integer is None else integer


class BoxProblem(NamedTuple):
    """Why a box can't be trained on."""

    kind: Literal["malformed", "no area", "outside"]
    message: str


def box_problem(box: Any, height: int, width: int) -> BoxProblem | None:
    """What is wrong with a [x, y, width, height] box in pixels, if anything. An image size of 0 × 0 means unknown."""
    if not isinstance(box, list) or len(box) != 4:
        return BoxProblem("malformed", f"is {box!r:.60}, expected [x, y, width, height]")
    if not all(isinstance(value, (int, float)) and abs(value) <= sys.float_info.max for value in box):
        return BoxProblem("malformed", f"is {box!r:.60}, expected four finite numbers")
    x, y, w, h = box
    if w <= 0 or h <= 0:
        return BoxProblem("no area", f"has no area: {box}")
    if height and width and (x >= width or y >= height or x + w <= 0 or y + h <= 0):
        return BoxProblem("outside", f"lies outside its {width}×{height} image: {box}")
    return None


def parse_annotations(path: Path, folder: Path, bad_boxes: BadBoxes = "raise") -> Annotations:
    """Read and check one instances JSON of the data set in `folder`.

    bad_boxes says what happens to boxes without area or wholly outside their image: "raise", or "drop" as the original
    repository does (COCO 2017 itself has two).

    Raises:
        DataError: the first problem found, with the file, the record and the remedy.
    """
    raw = read_coco_json(path)
    remedy = f"run 'detr-fast doctor {shlex.quote(str(folder))}'"

    def fail(message: str) -> DataError:
        return DataError(f"{path}: {message}; {remedy}")

    categories = _parse_categories(raw["categories"], fail)
    file_names, original_ids, sizes = _parse_images(raw["images"], fail)
    index_of = {id_key(value): index for index, value in enumerate(original_ids)}
    integers = [as_integer_id(value) for value in original_ids]
    image_ids = tuple(range(1, len(integers) + 1)) if None in integers else tuple(i for i in integers if i is not None)

    known = {category.id for category in categories}
    if raw["annotations"] and not known:
        raise fail("lists no categories, expected at least one")
    rows: list[tuple[int, int, float, bool]] = []
    boxes: list[Any] = []
    dropped = 0
    for position, record in enumerate(raw["annotations"]):
        image = index_of.get(id_key(record.get("image_id")))
        category = as_integer_id(record.get("category_id"))
        box = box_of(record)
        if image is None or category not in known:
            key = "image_id" if image is None else "category_id"
            raise fail(f"{_name(record, position)} names {key} {record.get(key)!r}, which the file does not list")
        problem = box_problem(box, *sizes[image])
        if problem is not None:
            if bad_boxes == "drop" and problem.kind != "malformed":
                dropped += 1
                continue
            raise fail(f"{_name(record, position)} of image {file_names[image]!r}: its bbox {problem.message}")
        rows.append((image, category, area_of(record, box), is_crowd(record)))
        boxes.append(box)

    images = np.array([row[0] for row in rows], dtype=np.int64)
    order = np.argsort(images, kind="stable")
    counts = np.bincount(images, minlength=len(file_names))
    return Annotations(
        path=path,
        categories=categories,
        file_names=tuple(file_names),
        image_ids=image_ids,
        original_image_ids=tuple(original_ids),
        sizes=np.array(sizes, dtype=np.int64).reshape(-1, 2),
        boxes=np.array(boxes, dtype=np.float64).reshape(-1, 4)[order],
        category_ids=np.array([row[1] for row in rows], dtype=np.int64)[order],
        areas=np.array([row[2] for row in rows], dtype=np.float64)[order],
        crowd=np.array([row[3] for row in rows], dtype=bool)[order],
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        dropped=dropped,
    )


def _name(record: dict[str, Any], position: int) -> str:
    return f"annotation {record['id']}" if "id" in record else f"annotations[{position}]"


def _parse_categories(records: list[dict[str, Any]], fail: Callable[[str], DataError]) -> tuple[Category, ...]:
    categories: dict[int, Category] = {}
    for position, record in enumerate(records):
        number, name = as_integer_id(record.get("id")), record.get("name")
        if number is None:
            raise fail(f"categories[{position}] has id {record.get('id')!r}, expected an integer")
        if not isinstance(name, str) or not name:
            raise fail(f"category {number} has name {name!r}, expected text")
        if number in categories:
            raise fail(f"category id {number} appears twice: {categories[number].name!r} and {name!r}")
        categories[number] = Category(number, name)
    return tuple(sorted(categories.values()))


def _parse_images(
    records: list[dict[str, Any]], fail: Callable[[str], DataError]
) -> tuple[list[str], list[Any], list[tuple[int, int]]]:
    if not records:
        raise fail("lists no images, expected at least one")
    file_names: list[str] = []
    ids: list[Any] = []
    sizes: list[tuple[int, int]] = []
    seen: dict[Any, str] = {}
    for position, record in enumerate(records):
        name, key = record.get("file_name"), id_key(record.get("id"))
        if "id" not in record or not isinstance(name, str) or not name:
            raise fail(f"images[{position}] has id {record.get('id')!r} and file_name {name!r}, expected both")
        if key in seen:
            raise fail(f"image id {record['id']!r} appears twice: {seen[key]!r} and {name!r}")
        seen[key] = name
        height, width = as_integer_id(record.get("height") or 0), as_integer_id(record.get("width") or 0)
        if height is None or width is None or height < 0 or width < 0:
            raise fail(f"image {name!r} has size {record.get('width')!r}×{record.get('height')!r}, expected pixels")
        file_names.append(name)
        ids.append(record["id"])
        sizes.append((height, width))
    return file_names, ids, sizes
