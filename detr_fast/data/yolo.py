"""YOLO's format, in Ultralytics' layout: a data.yaml, and a text file of boxes for each image.

A line is `label center_x center_y width height`, as fractions of the image, which is taken as its EXIF orientation turns
it. Lines with more values are polygons, and count by the box around them.
Format: https://docs.ultralytics.com/datasets/detect/
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from detr_fast.data.errors import DataError
from detr_fast.data.folders import ImageCopies
from detr_fast.data.images import image_path, read_image_size
from detr_fast.data.records import IMAGE_SUFFIXES, BoxRecord, ImageRecord, Records, is_hidden, tidy

_SPLIT_KEYS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}


def find_yolo_config(folder: Path) -> Path | None:
    """data.yaml, or the only YAML file with "names"."""
    others = (path for path in folder.glob("*.y*ml") if path.name != "data.yaml" and not is_hidden(path))
    files = [folder / "data.yaml", *sorted(others)]
    return next((path for path in files if path.is_file() and "names" in path.read_text(errors="replace")), None)


def read_yolo(folder: Path) -> Records:
    path = find_yolo_config(folder)
    if path is None:
        raise DataError(f"{folder}: holds no data.yaml with 'names' and 'train'; give the folder that has it")
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: is not YAML ({str(error).splitlines()[0]}); correct it") from None
    if not isinstance(config, dict):
        raise DataError(f"{path}: holds a {type(config).__name__}, expected 'names' and 'train', 'val' or 'test'")
    names = _names(config.get("names"), path)
    splits = {}
    for split, keys in _SPLIT_KEYS.items():
        entry = next((config[key] for key in keys if config.get(key)), None)
        if entry is not None:
            images = _image_files(entry, path, config.get("path"))
            splits[split] = [_read_image(image, name, len(names)) for image, name in images]
    if not splits:
        raise DataError(f"{path}: names no 'train', 'val' or 'test' images; add the folders")
    if not any(image.boxes for images in splits.values() for image in images):
        raise DataError(f"{path}: none of its images has a label; put label files into labels/ or beside the images")
    return Records(names, splits)


def _names(names: Any, path: Path) -> tuple[str, ...]:
    """A list, or a mapping from each label to its name."""
    if isinstance(names, dict) and names and set(names) == set(range(len(names))):
        names = [names[label] for label in range(len(names))]
    if not isinstance(names, list) or not names:
        raise DataError(f"{path}: 'names' is {names!r:.60}, expected a list of names, or labels 0, 1, 2, … with names")
    return tuple(str(name) for name in names)


def _text(path: Path) -> str:
    """Without the mark that Windows' editors begin a file with; bytes that are no text are then seen to be no numbers."""
    return path.read_text(encoding="utf-8-sig", errors="replace")


def _image_files(entry: Any, config: Path, root: Any) -> list[tuple[Path, str]]:
    """Files and names of a split: a folder, a text file that lists images, or a list of these."""
    found = []
    for item in entry if isinstance(entry, list) else [entry]:
        bases = [config.parent / str(root or ""), config.parent]  # `path` is often that of another machine
        place = next((base / str(item) for base in bases if (base / str(item)).exists()), None)
        if place is None:
            # Roboflow's exports write ../train/images for what lies at train/images.
            place = config.parent / str(item).removeprefix("../")
        if place.is_dir():
            images = (file for file in place.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
            files = sorted(file for file in images if not is_hidden(file))
            if not files:
                raise DataError(f"{place}: holds no images, but {config.name} names it; correct the path")
            found += [(file, str(file.relative_to(place))) for file in files]
        elif place.is_file():
            lines = [line.strip() for line in _text(place).splitlines()]
            files = [image_path(place.parent, line) for line in lines if line]
            found += [(file, file.name) for file in files]
        else:
            raise DataError(f"{config}: {item!r} is neither a folder nor a list of images; correct the path")
    return found


def _read_image(path: Path, file_name: str, classes: int) -> ImageRecord:
    height, width = read_image_size(path, turned=True)
    parts = list(path.with_suffix(".txt").parts)
    if "images" in parts[:-1]:
        last = len(parts) - 1 - parts[::-1].index("images")
        parts[last] = "labels"
    labels = next((file for file in (Path(*parts), path.with_suffix(".txt")) if file.is_file()), None)
    boxes = []
    for number, line in enumerate(_text(labels).splitlines() if labels is not None else [], start=1):
        if line.strip():
            boxes.append(_read_line(line, f"{labels}: line {number}", classes, height, width))
    return ImageRecord(path, file_name, height, width, tuple(boxes))


def _read_line(line: str, where: str, classes: int, height: int, width: int) -> BoxRecord:
    try:
        label, *values = (float(value) for value in line.split())
    except ValueError:
        raise DataError(
            f"{where} is {line!r:.60}, expected numbers: label, center x, center y, width, height"
        ) from None
    if not label.is_integer() or not 0 <= label < classes:
        raise DataError(
            f"{where} has label {label:g}, expected 0 to {classes - 1}; correct it, or 'names' in data.yaml"
        )
    if not all(-1 <= value <= 2 for value in values):  # a box may overhang, but by no more
        raise DataError(f"{where} is {line!r:.60}, expected fractions of the image's width and height, not pixels")
    if len(values) == 4:
        x, y, w, h = values
        x0, y0 = x - w / 2, y - h / 2
    elif len(values) >= 6 and len(values) % 2 == 0:
        x0, y0 = min(values[::2]), min(values[1::2])
        w, h = max(values[::2]) - x0, max(values[1::2]) - y0
    else:
        raise DataError(f"{where} has {len(values)} values after the label, expected 4, or a polygon's 6, 8, …")
    return BoxRecord(int(label), (tidy(x0 * width), tidy(y0 * height), tidy(w * width), tidy(h * height)))


def write_yolo(records: Records, folder: Path) -> None:
    config: dict[str, Any] = {split: f"images/{split}" for split in records.splits}
    config["names"] = dict(enumerate(records.names))
    for split, images in records.splits.items():
        copies = ImageCopies(folder / "images" / split)
        for image in images:
            *folders, last = image.file_name.replace("\\", "/").split("/")
            # Readers put "labels" for the last folder called images, which is to be the split's (Label Studio has images/a.jpg).
            name = copies.add(image.path, "/".join([*(part for part in folders if part != "images"), last]))
            labels = (folder / "labels" / split / name).with_suffix(".txt")
            labels.parent.mkdir(parents=True, exist_ok=True)
            labels.write_text("".join(_line(box, image) for box in image.boxes))
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    (folder / "data.yaml").write_text(text, encoding="utf-8")


def _line(box: BoxRecord, image: ImageRecord) -> str:
    x, y, w, h = box.box
    values = ((x + w / 2) / image.width, (y + h / 2) / image.height, w / image.width, h / image.height)
    return " ".join([str(box.label), *(f"{value:.9f}" for value in values)]) + "\n"
