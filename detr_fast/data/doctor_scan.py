"""Looks at every record and every image of one split, and keeps what is wrong with each; the doctor's eyes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from detr_fast.data.annotations import as_integer_id, box_of, box_problem, id_key, read_coco_json
from detr_fast.data.coco import SplitFiles, find_annotation_files, find_image_folder
from detr_fast.data.errors import DataError
from detr_fast.data.images import image_path, read_image, used_bits

Progress = Callable[[int, int], None]

DARK_BITS = 2  # unused by every image: all are read at a quarter of their brightness or less
OVERHANG = 1.0  # pixels that a box may pass its image's border by before it is worth a word


@dataclass
class ImageScan:
    """One record of "images": its file as found, and the kinds of problems it has."""

    record: dict[str, Any]
    path: Path
    size: tuple[int, int] = (0, 0)  # height and width: of the decoded file where it decodes, else of the record
    digest: str = ""  # of the decoded pixels, so that a copy under another name or format is found
    bits: tuple[int, int] | None = None  # that a sample has and that its values need, where it has more than 8
    problems: dict[str, str] = field(default_factory=dict)  # kind -> example text

    @property
    def usable(self) -> bool:
        return not self.problems.keys() & {"malformed image record", "duplicate image id", *UNREADABLE}


UNREADABLE = ("missing image", "damaged image")


@dataclass
class BoxScan:
    """One record of "annotations"."""

    record: dict[str, Any]
    image: ImageScan | None
    problems: dict[str, str] = field(default_factory=dict)


@dataclass
class SplitScan:
    """All of one split."""

    files: SplitFiles
    categories: dict[Any, str]  # id, an integer where it is one -> name
    images: list[ImageScan]
    boxes: list[BoxScan]
    problems: dict[str, str] = field(default_factory=dict)  # of the file as a whole


def scan_folder(folder: Path, progress: Progress | None = None) -> list[SplitScan]:
    """Scan all splits of a COCO-format folder.

    Raises:
        DataError: no folder, no annotations, or JSON that isn't COCO: nothing there that could be examined.
    """
    scans = []
    for split, path in find_annotation_files(folder).items():
        raw = read_coco_json(path)
        names = [str(record.get("file_name", "")) for record in raw["images"]]
        images = find_image_folder(folder, split, path, names)
        scans.append(_scan_records(raw, SplitFiles(split, path, images)))
    _decode([image for scan in scans for image in scan.images], progress or (lambda done, total: None))
    for scan in scans:
        _scan_boxes(scan)
        _mark_copies(scan)
    _mark_leaks(scans)
    _mark_dark(scans)
    return scans


def _scan_records(raw: dict[str, Any], files: SplitFiles) -> SplitScan:
    scan = SplitScan(files, {}, [], [])
    for position, record in enumerate(raw["categories"]):
        key, name = id_key(record.get("id")), record.get("name")
        if record.get("id") is None or not isinstance(name, str) or not name:
            scan.problems["malformed category"] = f"categories[{position}]: id {record.get('id')!r}, name {name!r}"
        elif key in scan.categories:
            scan.problems["duplicate category id"] = f"id {key!r}: {scan.categories[key]!r} and {name!r}"
        else:
            scan.categories[key] = name
            if as_integer_id(record["id"]) is None:
                scan.problems["category id no integer"] = repr(record["id"])
    by_id: dict[Any, ImageScan] = {}
    for position, record in enumerate(raw["images"]):
        name = record.get("file_name")
        valid = record.get("id") is not None and isinstance(name, str) and bool(name)
        image = ImageScan(record, image_path(files.images, str(name)))
        sides = [as_integer_id(record.get(side) or 0) for side in ("height", "width")]
        image.size = (sides[0] or 0, sides[1] or 0)
        key = id_key(record.get("id"))
        if None in sides:
            annotated = f"{record.get('width')!r}×{record.get('height')!r}"
            image.problems["wrong image size"] = f"{name} is annotated as {annotated}, expected pixels"
        if not valid:
            image.problems["malformed image record"] = (
                f"images[{position}]: id {record.get('id')!r}, file_name {name!r}"
            )
        elif key in by_id:
            first = by_id[key]
            text = f"id {key!r}: {first.record['file_name']!r} and {name!r}"
            image.problems["duplicate image id"] = text
            if first.record["file_name"] != name:  # whose boxes these are can't be told
                first.problems["duplicate image id"] = text
        else:
            by_id[key] = image
        scan.images.append(image)
    scan.boxes = [
        BoxScan(record | {"bbox": box_of(record)}, by_id.get(id_key(record.get("image_id"))))
        for record in raw["annotations"]
    ]
    return scan


def _decode(images: list[ImageScan], progress: Progress) -> None:
    """Decode every image on all cores; size, digest and what is wrong with the file."""

    def decode(image: ImageScan) -> None:
        if "malformed image record" in image.problems:
            return
        name = image.record["file_name"]
        if not image.path.is_file():
            image.problems["missing image"] = name
            return
        annotated = image.size
        try:
            pixels = _read_as_annotated(image.path, annotated)
        except DataError as error:
            reason = str(error).partition(": ")[2].partition(";")[0]
            image.problems["damaged image"] = f"{name} {reason}"
            return
        image.size = (pixels.shape[0], pixels.shape[1])
        image.bits = used_bits(image.path, pixels)
        image.digest = hashlib.blake2b(pixels.tobytes() + repr(pixels.shape).encode(), digest_size=16).hexdigest()
        if all(annotated) and annotated != image.size:
            image.problems["wrong image size"] = (
                f"{name} is {image.size[1]}×{image.size[0]}, annotated as {annotated[1]}×{annotated[0]}"
            )

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done, _ in enumerate(pool.map(decode, images), start=1):
            progress(done, len(images))


def _read_as_annotated(path: Path, size: tuple[int, int]) -> np.ndarray:
    """The picture, turned by EXIF where that gives the annotated size, else as it is stored."""
    if all(size):
        try:
            return read_image(path, size)
        except DataError:
            pass  # of another size, or damaged: the next line tells which
    return read_image(path)


def _scan_boxes(scan: SplitScan) -> None:
    seen: dict[tuple[Any, ...], Any] = {}
    for box in scan.boxes:
        record, image = box.record, box.image
        name = f"annotation {record['id']!r}" if "id" in record else "an annotation without id"
        if image is None:
            box.problems["unknown image id"] = f"{name}: image_id {record.get('image_id')!r}"
        if id_key(record.get("category_id")) not in scan.categories:
            box.problems["unknown category id"] = f"{name}: category_id {record.get('category_id')!r}"
        height, width = image.size if image is not None else (0, 0)
        where = f"{name} of {image.record['file_name']}" if image is not None else name
        problem = box_problem(record.get("bbox"), height, width)
        if problem is not None:
            box.problems[_BOX_KINDS[problem.kind]] = f"{where} {problem.message}"
            continue
        x, y, w, h = record["bbox"]
        if height and width and (min(x, y) < -OVERHANG or x + w > width + OVERHANG or y + h > height + OVERHANG):
            box.problems["box overhangs"] = f"{where}: {record['bbox']} in {width}×{height}"
        key = (id(image), id_key(record.get("category_id")), x, y, w, h)
        if image is not None and key in seen:
            box.problems["duplicate box"] = f"{where} repeats {seen[key]!r}: {record['bbox']}"
        seen.setdefault(key, record.get("id"))


_BOX_KINDS = {"malformed": "malformed box", "no area": "box without area", "outside": "box outside its image"}


def _mark_copies(scan: SplitScan) -> None:
    first: dict[str, ImageScan] = {}
    for image in scan.images:
        if image.digest and image.usable:
            original = first.setdefault(image.digest, image)
            if original is not image:
                names = f"{image.record['file_name']} has the pixels of {original.record['file_name']}"
                image.problems["duplicate image"] = names


def _mark_leaks(scans: list[SplitScan]) -> None:
    """Images of an earlier split that come again in a later one: in train and test, the training image is marked."""
    for position, scan in enumerate(scans):
        later = {
            image.digest: f"{other.files.name} ({image.record['file_name']})"
            for other in scans[position + 1 :]
            for image in other.images
            if image.digest and image.usable
        }
        for image in scan.images:
            if image.digest in later:
                image.problems["leak between splits"] = f"{image.record['file_name']} is also in {later[image.digest]}"


def _mark_dark(scans: list[SplitScan]) -> None:
    """Images of 12 bits, say, stored in 16 and read as such: told of all, since a single one may just be dark."""
    deep = [(image, image.bits) for scan in scans for image in scan.images if image.bits is not None]
    used = max((needed for _, (_, needed) in deep), default=0)
    for image, (bits, _) in deep:
        if used <= bits - DARK_BITS:
            name = image.record["file_name"]
            image.problems["dark images"] = f"{name}: no image needs over {used} of {bits} bits"


def all_problems(scan: SplitScan) -> list[dict[str, str]]:
    """The problems of the file, then those of each image, then those of each box."""
    return [scan.problems, *(image.problems for image in scan.images), *(box.problems for box in scan.boxes)]
