"""Examines a COCO-format data set before hours of training are lost on it, and writes a repaired copy.

report = examine("my-data")
print(report.text())
report.draw("page.png")
fix("my-data", "my-data-repaired")
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from detr_fast.data.annotations import area_of, as_integer_id, id_key, is_crowd
from detr_fast.data.doctor_scan import UNREADABLE, BoxScan, ImageScan, Progress, SplitScan, all_problems, scan_folder
from detr_fast.data.errors import DataError
from detr_fast.data.folders import ImageCopies, new_folder

Severity = Literal["error", "warning", "note"]

_EXAMPLES = 3  # of each kind of problem are named


@dataclass(frozen=True)
class Kind:
    """A kind of problem: how bad it is, and what `fix` does about it."""

    severity: Severity
    cure: str

    @property
    def fixable(self) -> bool:
        return not self.cure.startswith("can't be fixed")


# "error": training refuses it, or its result would be wrong. "warning": it costs accuracy. "note": worth knowing.
KINDS: dict[str, Kind] = {
    "malformed category": Kind("error", "left out"),
    "duplicate category id": Kind("error", "the first one counts"),
    "category id no integer": Kind("error", "categories are numbered 1, 2, 3, …"),
    "categories disagree": Kind("error", "can't be fixed: give each id one name in all splits"),
    "no images": Kind("error", "can't be fixed: export the annotations again"),
    "no categories": Kind("error", "can't be fixed: export the annotations again"),
    "malformed image record": Kind("error", "left out"),
    "duplicate image id": Kind("error", "left out, with its boxes; the same file listed twice is kept once"),
    "missing image": Kind("error", "left out, with its boxes"),
    "damaged image": Kind("error", "left out, with its boxes"),
    "wrong image size": Kind("error", "the file's size counts"),
    "leak between splits": Kind("error", "left out of the earlier split (train before val before test)"),
    "unknown image id": Kind("error", "the annotation is left out"),
    "unknown category id": Kind("error", "the annotation is left out"),
    "malformed box": Kind("error", "left out"),
    "box without area": Kind("error", "left out"),
    "box outside its image": Kind("error", "left out"),
    "categories of one name": Kind("warning", "kept: leave out the one without boxes, or rename it"),
    "duplicate image": Kind("warning", "the first one counts"),
    "duplicate box": Kind("warning", "the first one counts"),
    "box overhangs": Kind("warning", "cut off at the border"),
    "dark images": Kind("warning", "kept: multiply their values, also of those to predict on (docs/faq.md)"),
    "class without boxes": Kind("note", "kept"),
    "images without objects": Kind("note", "kept: they are legal, and teach what no object looks like"),
}


@dataclass(frozen=True)
class Finding:
    """A kind of problem in one split."""

    kind: str
    split: str
    count: int
    examples: tuple[str, ...]

    @property
    def severity(self) -> Severity:
        return KINDS[self.kind].severity


@dataclass(frozen=True)
class SplitSummary:
    """The figures of one split; box sides are square roots of areas, in pixels."""

    name: str
    annotations: Path
    images: int
    without_objects: int
    crowd: int
    boxes_by_class: dict[str, int]
    boxes_per_image: np.ndarray
    box_sides: np.ndarray
    relative_sides: np.ndarray  # to the square root of the image's area
    image_sizes: Counter[tuple[int, int]]  # (height, width) of the images that can be decoded

    @property
    def boxes(self) -> int:
        return len(self.box_sides)


@dataclass(frozen=True)
class Report:
    """What `examine` found.

    Attributes:
        folder: the data set.
        splits: figures of each split.
        findings: problems, errors first.
    """

    folder: Path
    splits: tuple[SplitSummary, ...]
    findings: tuple[Finding, ...]
    scans: list[SplitScan] = field(repr=False)

    @property
    def healthy(self) -> bool:
        """No errors; warnings and notes may be there."""
        return not any(finding.severity == "error" for finding in self.findings)

    def text(self) -> str:
        """The report as plain text."""
        from detr_fast.data.doctor_page import report_text

        return report_text(self)

    def draw(self, path: str | Path) -> None:
        """Write one page of pictures (PNG): classes, box sizes, and images, those with problems first."""
        from detr_fast.data.doctor_page import draw_report

        draw_report(self, Path(path))

    def to_dict(self) -> dict[str, Any]:
        """Figures and findings as plain values, for JSON."""
        splits = {
            part.name: {
                "annotations": str(part.annotations),
                "images": part.images,
                "without_objects": part.without_objects,
                "boxes": part.boxes,
                "crowd": part.crowd,
                "boxes_by_class": part.boxes_by_class,
                "largest_number_of_boxes": int(part.boxes_per_image.max(initial=0)),
                "median_box_side": float(np.median(part.box_sides)) if part.boxes else None,
            }
            for part in self.splits
        }
        findings = [
            {"kind": f.kind, "severity": f.severity, "split": f.split, "count": f.count, "examples": list(f.examples)}
            for f in self.findings
        ]
        return {"folder": str(self.folder), "healthy": self.healthy, "splits": splits, "findings": findings}


def examine(folder: str | Path, progress: Progress | None = None) -> Report:
    """Look at every record and decode every image of a COCO-format folder.

    Args:
        folder: the data set, laid out as for `CocoFolder.open`.
        progress: called with (images done, images in all).

    Raises:
        DataError: no folder, no annotations, or JSON that isn't COCO: nothing there that could be examined.
    """
    scans = scan_folder(Path(folder), progress)
    summaries = tuple(_summarise(scan) for scan in scans)
    findings = [finding for scan, part in zip(scans, summaries) for finding in _findings(scan, part)]
    findings += _disagreements(scans)
    order = ("error", "warning", "note")
    findings.sort(key=lambda finding: (order.index(finding.severity), list(KINDS).index(finding.kind)))
    return Report(Path(folder), summaries, tuple(findings), scans)


def _sound(box: BoxScan) -> bool:
    """Nothing is wrong that `fix` would leave the box out for."""
    return not box.problems.keys() - {"box overhangs"}


def _summarise(scan: SplitScan) -> SplitSummary:
    sound = [box for box in scan.boxes if _sound(box) and not is_crowd(box.record)]
    per_image = Counter(id(box.image) for box in sound)
    sides = np.array([np.sqrt(box.record["bbox"][2] * box.record["bbox"][3]) for box in sound])
    canvas = np.array([np.sqrt(max(1, box.image.size[0] * box.image.size[1])) for box in sound if box.image])
    by_class = Counter(scan.categories[id_key(box.record["category_id"])] for box in sound)
    counts = np.array([per_image[id(image)] for image in scan.images], dtype=np.int64)
    return SplitSummary(
        name=scan.files.name,
        annotations=scan.files.annotations,
        images=len(scan.images),
        without_objects=sum(image.usable and not n for image, n in zip(scan.images, counts)),
        crowd=sum(is_crowd(box.record) for box in scan.boxes),
        boxes_by_class={name: by_class[name] for name in scan.categories.values()},
        boxes_per_image=counts,
        box_sides=sides,
        relative_sides=sides / canvas,
        image_sizes=Counter(image.size for image in scan.images if image.digest),
    )


def _findings(scan: SplitScan, part: SplitSummary) -> list[Finding]:
    examples: dict[str, list[str]] = {}
    for problems in all_problems(scan):
        for kind, text in problems.items():
            examples.setdefault(kind, []).append(text)
    if not scan.images:
        examples["no images"] = [scan.files.annotations.name]
    if not scan.categories:
        examples["no categories"] = [scan.files.annotations.name]
    named = Counter(scan.categories.values())
    shared = {name: [key for key, n in scan.categories.items() if n == name] for name, n in named.items() if n > 1}
    if shared:
        examples["categories of one name"] = [f"{name!r}: ids {', '.join(map(str, k))}" for name, k in shared.items()]
    unused = [name for name, count in part.boxes_by_class.items() if not count]
    if unused:
        examples["class without boxes"] = unused
    empty = [i.record["file_name"] for i, n in zip(scan.images, part.boxes_per_image) if i.usable and not n]
    if empty:
        examples["images without objects"] = empty
    return [Finding(kind, part.name, len(texts), tuple(texts[:_EXAMPLES])) for kind, texts in examples.items()]


def _disagreements(scans: list[SplitScan]) -> list[Finding]:
    names: dict[Any, str] = {}
    findings = []
    for scan in scans:
        texts = [
            f"id {key!r}: {names[key]!r} and {name!r}"
            for key, name in scan.categories.items()
            if names.setdefault(key, name) != name
        ]
        if texts:
            findings.append(Finding("categories disagree", scan.files.name, len(texts), tuple(texts[:_EXAMPLES])))
    return findings


def fix(folder: str | Path, destination: str | Path, progress: Progress | None = None) -> dict[str, dict[str, int]]:
    """Write a repaired copy of a data set: images/<split>/ and instances_<split>.json. The original stays as it is.

    What is done about each kind of problem stands in `KINDS`. Ids become integers, areas that are missing become those
    of the boxes, and all other fields are kept. The copy appears in one move when all is written.

    Args:
        folder: the data set.
        destination: a new or empty folder.
        progress: called with (images done, images in all), for the examination.

    Returns:
        For each split, how many images and boxes were left out: {"train": {"images": 2, "boxes": 31}, …}.

    Raises:
        DataError: what `examine` raises; problems that can't be fixed; the destination has contents or can't be written.
    """
    report = examine(folder, progress)
    for finding in report.findings:
        if not KINDS[finding.kind].fixable:
            cure = KINDS[finding.kind].cure.partition(": ")[2]
            raise DataError(f"{folder}: {finding.split}: {finding.kind} ({finding.examples[0]}); {cure}")
    numbers = _category_numbers(report.scans)
    removed = {}
    with new_folder(Path(destination)) as target:
        for scan in report.scans:
            name = scan.files.name
            raw = json.loads(scan.files.annotations.read_bytes())
            raw["categories"] = _repaired_categories(raw["categories"], scan, numbers)
            raw |= _repaired_records(scan, ImageCopies(target / "images" / name), numbers)
            (target / f"instances_{name}.json").write_text(json.dumps(raw))
            removed[name] = {
                "images": len(scan.images) - len(raw["images"]),
                "boxes": len(scan.boxes) - len(raw["annotations"]),
            }
    return removed


def _category_numbers(scans: list[SplitScan]) -> dict[Any, int]:
    """Category ids as they are where all are integers, else 1, 2, 3, … in order of first appearance."""
    keys = list(dict.fromkeys(key for scan in scans for key in scan.categories))
    if all(isinstance(key, int) for key in keys):
        return {key: key for key in keys}
    return {key: number for number, key in enumerate(keys, start=1)}


def _repaired_categories(
    records: list[dict[str, Any]], scan: SplitScan, numbers: dict[Any, int]
) -> list[dict[str, Any]]:
    first: dict[Any, dict[str, Any]] = {}
    for record in records:
        key = id_key(record.get("id"))
        if key in scan.categories and scan.categories[key] == record.get("name"):
            first.setdefault(key, record | {"id": numbers[key]})
    return list(first.values())


def _repaired_records(scan: SplitScan, copies: ImageCopies, numbers: dict[Any, int]) -> dict[str, list[dict[str, Any]]]:
    left_out = {*UNREADABLE, "malformed image record", "duplicate image id", "duplicate image", "leak between splits"}
    kept = [image for image in scan.images if not image.problems.keys() & left_out]
    integers = all(as_integer_id(image.record["id"]) is not None for image in kept)
    ids = {id(image): as_integer_id(image.record["id"]) if integers else i for i, image in enumerate(kept, start=1)}
    images = [
        image.record
        | {
            "id": ids[id(image)],
            "file_name": copies.add(image.path, image.record["file_name"]),
            "height": image.size[0],
            "width": image.size[1],
        }
        for image in kept
    ]
    annotations: list[dict[str, Any]] = []
    for box in scan.boxes:
        if box.image is not None and id(box.image) in ids and _sound(box):
            record = box.record | {
                "id": len(annotations) + 1,
                "image_id": ids[id(box.image)],
                "category_id": numbers[id_key(box.record["category_id"])],
                "bbox": _clipped(box.record["bbox"], box.image),
                "iscrowd": int(is_crowd(box.record)),
            }
            annotations.append(record | {"area": area_of(record, record["bbox"])})
    return {"images": images, "annotations": annotations}


def _clipped(box: list[float], image: ImageScan) -> list[float]:
    height, width = image.size
    x, y, w, h = box
    x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
    return box if (x0, y0, x1, y1) == (x, y, x + w, y + h) else [x0, y0, x1 - x0, y1 - y0]
