"""Converts data sets between COCO, YOLO (Ultralytics' layout) and Pascal VOC.

Each format has a reader into `Records` and a writer from them; so each pair of formats works. Images are copied, never
encoded again. What a format cannot say is lost: YOLO and VOC know no crowds, segments or category ids (classes are
numbered again, 1, 2, 3, …), and VOC lists no classes, so those without a box vanish and the others come in alphabetical
order. Boxes come back to within a thousandth of a pixel.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from detr_fast.data.coco import CocoDetection, CocoFolder
from detr_fast.data.errors import DataError
from detr_fast.data.folders import ImageCopies, new_folder
from detr_fast.data.images import read_image_size, read_orientation
from detr_fast.data.records import BoxRecord, ImageRecord, Records, tidy
from detr_fast.data.voc import read_voc, write_voc
from detr_fast.data.yolo import find_yolo_config, read_yolo, write_yolo

Format = Literal["coco", "yolo", "voc"]


@dataclass(frozen=True)
class Conversion:
    """What was converted: class names, and images and boxes of each split."""

    names: tuple[str, ...]
    images: dict[str, int]
    boxes: dict[str, int]
    crowds_dropped: int


def convert(source: str | Path, destination: str | Path, from_format: Format, to_format: Format) -> Conversion:
    """Write a copy of a data set in another format.

    Args:
        source: COCO: a folder as for `CocoFolder.open`. YOLO: a folder with data.yaml (train, val, test, names) and label
            files beside the images or in labels/ where the images are in images/. VOC: a folder with Annotations/,
            JPEGImages/ and, for the splits, ImageSets/Main/{train,val,test}.txt; without those all is "train".
        destination: a new or empty folder; it appears in one move when all is written.
        from_format, to_format: "coco", "yolo" or "voc".

    Raises:
        DataError: the source is not in that format or damaged, or the destination has contents or can't be written.
    """
    for name in (from_format, to_format):
        if name not in get_args(Format):
            raise DataError(f"format {name!r} is unknown; choose one of {', '.join(get_args(Format))}")
    records = _READERS[from_format](Path(source))
    crowds = sum(box.crowd for images in records.splits.values() for image in images for box in image.boxes)
    if to_format != "coco":
        records = records.without_crowds()
    with new_folder(Path(destination)) as target:
        _WRITERS[to_format](records, target)
    return Conversion(
        names=records.names,
        images={split: len(images) for split, images in records.splits.items()},
        boxes={split: sum(len(image.boxes) for image in images) for split, images in records.splits.items()},
        crowds_dropped=0 if to_format == "coco" else crowds,
    )


def detect_format(folder: str | Path) -> Format:
    """The format that a folder is laid out in.

    Raises:
        DataError: it is none of those that `convert` reads.
    """
    folder = Path(folder)
    if (folder / "Annotations").is_dir():
        return "voc"
    if folder.is_dir() and find_yolo_config(folder) is not None:
        return "yolo"
    CocoFolder.open(folder, bad_boxes="drop")  # raises what is wrong with it
    return "coco"


def read_coco(folder: Path) -> Records:
    opened = CocoFolder.open(folder)
    splits = {}
    for split in opened.splits:
        dataset = CocoDetection(opened, split)
        part, paths = dataset.annotations, dataset.images.paths
        labels = [dataset.category_ids.index(number) for number in part.category_ids.tolist()]
        boxes = [
            BoxRecord(label, (x, y, w, h), crowd)
            for label, (x, y, w, h), crowd in zip(labels, part.boxes.tolist(), part.crowd.tolist())
        ]
        splits[split] = [
            _between_frames(ImageRecord(paths[i], part.file_names[i], height, width, tuple(boxes[part.of_image(i)])))
            for i, (height, width) in enumerate(dataset.image_sizes)
        ]
    return Records(tuple(category.name for category in opened.categories), splits)


def write_coco(records: Records, folder: Path) -> None:
    for split, images in records.splits.items():
        copies = ImageCopies(folder / "images" / split)
        raw: dict[str, list[dict[str, object]]] = {"images": [], "annotations": []}
        for number, image in enumerate(images, start=1):
            image = _between_frames(image, back=True)
            name = copies.add(image.path, image.file_name)
            raw["images"].append({"id": number, "file_name": name, "width": image.width, "height": image.height})
            for box in image.boxes:
                annotation = {
                    "id": len(raw["annotations"]) + 1,
                    "image_id": number,
                    "category_id": box.label + 1,
                    "bbox": list(box.box),
                    "area": round(box.box[2] * box.box[3], 4),
                    "iscrowd": int(box.crowd),
                }
                raw["annotations"].append(annotation)
        raw["categories"] = [{"id": number, "name": name} for number, name in enumerate(records.names, start=1)]
        (folder / f"instances_{split}.json").write_text(json.dumps(raw))


def _between_frames(image: ImageRecord, back: bool = False) -> ImageRecord:
    """Boxes on the picture as COCO's annotations mean it -> as its EXIF orientation turns it, as all others do, or back.

    COCO's are on the stored picture where they name its size (see `read_image`): so they do of one that is upside down.
    """
    orientation = read_orientation(image.path)
    if orientation == 1 or read_image_size(image.path) != (image.height, image.width):
        return image
    if back:
        orientation = {6: 8, 8: 6}.get(orientation, orientation)  # the others undo themselves
    boxes = [replace(box, box=_turned(box.box, orientation, image.height, image.width)) for box in image.boxes]
    height, width = (image.width, image.height) if orientation >= 5 else (image.height, image.width)
    return replace(image, height=height, width=width, boxes=tuple(boxes))


def _turned(
    box: tuple[float, float, float, float], orientation: int, height: int, width: int
) -> tuple[float, float, float, float]:
    x, y, w, h = box
    if orientation >= 5:
        x, y, w, h, height, width = y, x, h, w, width, height
    if orientation in (2, 3, 6, 7):
        x = width - x - w
    if orientation in (3, 4, 7, 8):
        y = height - y - h
    return tidy(x), tidy(y), tidy(w), tidy(h)


_READERS: dict[str, Callable[[Path], Records]] = {"coco": read_coco, "yolo": read_yolo, "voc": read_voc}
_WRITERS: dict[str, Callable[[Records, Path], None]] = {"coco": write_coco, "yolo": write_yolo, "voc": write_voc}
