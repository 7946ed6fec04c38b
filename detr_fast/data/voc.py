"""Pascal VOC's format: an XML file for each image, and text files that list the images of each split.

Corners are pixels counted from 1, both included: a box over the whole of a 640×480 image is (1, 1, 640, 480).
Format: http://host.robots.ox.ac.uk/pascal/VOC/voc2012/htmldoc/
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from detr_fast.data.errors import DataError
from detr_fast.data.folders import ImageCopies
from detr_fast.data.images import read_image_size
from detr_fast.data.records import IMAGE_SUFFIXES, BoxRecord, ImageRecord, Records, is_hidden, tidy

_SPLITS = ("train", "val", "test")
_Named = tuple[str, tuple[float, float, float, float]]


def read_voc(folder: Path) -> Records:
    annotations = folder / "Annotations"
    if not annotations.is_dir():
        raise DataError(f"{folder}: holds no Annotations/ folder; give the folder that has it and JPEGImages/")
    lists = {split: folder / "ImageSets" / "Main" / f"{split}.txt" for split in _SPLITS}
    stems = {split: _listed(path) for split, path in lists.items() if path.is_file()}
    if not stems:
        stems = {"train": sorted(path.stem for path in annotations.glob("*.xml") if not is_hidden(path))}
    images = folder / "JPEGImages" if (folder / "JPEGImages").is_dir() else folder
    files = {path.stem: path for path in sorted(images.iterdir()) if path.suffix.lower() in IMAGE_SUFFIXES}
    parsed = {split: [_parse(annotations / f"{stem}.xml", files) for stem in part] for split, part in stems.items()}
    names = sorted({name for part in parsed.values() for _, _, _, boxes in part for name, _ in boxes})
    if not names:
        raise DataError(f"{annotations}: holds no objects; check that this is the right folder")
    label_of = {name: label for label, name in enumerate(names)}
    splits = {
        split: [
            ImageRecord(path, path.name, height, width, tuple(BoxRecord(label_of[name], box) for name, box in boxes))
            for path, height, width, boxes in part
        ]
        for split, part in parsed.items()
    }
    return Records(tuple(names), splits)


def _listed(path: Path) -> list[str]:
    """One name a line; lists of a single class have a 1, 0 or -1 behind it."""
    lines = (line.strip() for line in path.read_text(encoding="utf-8-sig", errors="replace").splitlines())
    return [re.sub(r"\s+-?[01]$", "", line) for line in lines if line]


def _parse(path: Path, files: dict[str, Path]) -> tuple[Path, int, int, list[_Named]]:
    try:
        root = ElementTree.parse(path).getroot()
    except FileNotFoundError:
        raise DataError(
            f"{path}: no such annotations file, but ImageSets lists it; restore it or shorten the list"
        ) from None
    except (ElementTree.ParseError, LookupError, ValueError) as error:  # no XML, or its encoding is not known
        raise DataError(f"{path}: is not XML ({error}); export it again, as UTF-8") from None
    image = files.get(path.stem) or files.get(Path(root.findtext("filename") or "").stem)
    if image is None:
        raise DataError(f"{path}: its image is missing; put {path.stem}.jpg (or .png, …) into JPEGImages/")
    # The file's header counts: annotation tools leave <size> at 0 often enough.
    height, width = read_image_size(image, turned=True)
    boxes: list[_Named] = []
    for item in root.iter("object"):
        name = item.findtext("name")
        try:
            x0, y0, x1, y1 = (float(item.findtext(f"bndbox/{key}") or "") for key in ("xmin", "ymin", "xmax", "ymax"))
        except ValueError:
            raise DataError(
                f"{path}: the bndbox of object {name!r} lacks a number; expected xmin, ymin, xmax, ymax"
            ) from None
        if not name or not all(map(math.isfinite, (x0, y0, x1, y1))):
            raise DataError(f"{path}: object {name!r} at {[x0, y0, x1, y1]}; expected a name and four finite numbers")
        boxes.append((name.strip(), (tidy(x0 - 1), tidy(y0 - 1), tidy(x1 - x0 + 1), tidy(y1 - y0 + 1))))
    return image, height, width, boxes


def write_voc(records: Records, folder: Path) -> None:
    (folder / "Annotations").mkdir()
    (folder / "ImageSets" / "Main").mkdir(parents=True)
    copies = ImageCopies(folder / "JPEGImages")
    for split, images in records.splits.items():
        stems = []
        for image in images:
            name = copies.add(image.path, image.file_name.replace("\\", "_").replace("/", "_"))
            stems.append(Path(name).stem)
            tree = ElementTree.ElementTree(_to_xml(image, name, records.names))
            ElementTree.indent(tree)
            tree.write(folder / "Annotations" / f"{stems[-1]}.xml", encoding="utf-8")
        listed = "".join(f"{stem}\n" for stem in stems)
        (folder / "ImageSets" / "Main" / f"{split}.txt").write_text(listed, encoding="utf-8")


def _to_xml(image: ImageRecord, name: str, names: tuple[str, ...]) -> Element:
    root = Element("annotation")
    SubElement(root, "folder").text = "JPEGImages"
    SubElement(root, "filename").text = name
    size = SubElement(root, "size")
    for key, length in (("width", image.width), ("height", image.height), ("depth", 3)):
        SubElement(size, key).text = str(length)
    for record in image.boxes:
        item = SubElement(root, "object")
        for key, text in (
            ("name", names[record.label]),
            ("pose", "Unspecified"),
            ("truncated", "0"),
            ("difficult", "0"),
        ):
            SubElement(item, key).text = text
        x, y, w, h = record.box
        corners = SubElement(item, "bndbox")
        for key, value in (("xmin", x + 1), ("ymin", y + 1), ("xmax", x + w), ("ymax", y + h)):
            SubElement(corners, key).text = f"{tidy(value):.12g}"  # whole numbers without ".0": many readers take int()
    return root
