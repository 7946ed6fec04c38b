"""COCO-format data sets: finding the files of a folder, and the samples of one split."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from detr_fast.data.annotations import Annotations, BadBoxes, Category, parse_annotations
from detr_fast.data.errors import DataError
from detr_fast.data.images import ImageStore, image_path, read_image_size
from detr_fast.data.records import is_hidden

Target = dict[str, Any]
Transform = Callable[[Tensor, Target], tuple[Tensor, Target]]

CACHE_BYTES = 512 * 2**20  # decoded images of data sets up to this size stay in memory

_SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_FILE_PATTERN = re.compile(
    r"(?P<prefix>instances_)?(?P<split>train|valid|validation|val|test)(?P<year>\d{4})?\.json", re.IGNORECASE
)


@dataclass(frozen=True)
class SplitFiles:
    """Where one split lies."""

    name: str  # "train", "val" or "test"
    annotations: Path  # the instances JSON
    images: Path  # the folder that its file_names are relative to


class CocoFolder:
    """A folder with a COCO-format data set.

    Attributes:
        path: the folder.
        splits: the splits found, by name: "train", "val", "test".
        categories: all splits' categories, in order of id. Labels are positions in it.
    """

    def __init__(self, path: Path, splits: Mapping[str, SplitFiles], annotations: Mapping[str, Annotations]) -> None:
        self.path = path
        self.splits = dict(splits)
        self._annotations = dict(annotations)
        self.categories = self._merge_categories()

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        annotations: Mapping[str, str | Path] | None = None,
        images: str | Path | None = None,
        bad_boxes: BadBoxes = "raise",
    ) -> CocoFolder:
        """Find the splits of a data set and read their annotations.

        Annotations are looked for as `instances_train.json`, `instances_train2017.json`, `train.json` (likewise val and
        test), in the folder and in `annotations/`, and as `train/_annotations.coco.json`. Images are looked for in
        `images/`, `train/`, `train2017/`, `images/train/` and beside the JSON; the folder that has them counts.

        Args:
            path: the folder.
            annotations: JSON files by split name, relative to the folder, in place of the search.
            images: the images' folder, relative to the folder, in place of the search.
            bad_boxes: "raise" an error for boxes without area or outside their image, or "drop" them.

        Raises:
            DataError: the folder, its annotations or its images are missing, or the annotations are not usable.
        """
        folder = Path(path)
        files = find_annotation_files(folder, annotations)
        parsed = {name: parse_annotations(file, folder, bad_boxes) for name, file in files.items()}
        splits = {
            name: SplitFiles(name, files[name], find_image_folder(folder, name, files[name], part.file_names, images))
            for name, part in parsed.items()
        }
        return cls(folder, splits, parsed)

    def annotations(self, split: str) -> Annotations:
        """The parsed JSON of a split."""
        if split not in self._annotations:
            remedy = f"add instances_{split}.json" if split in _SPLIT_NAMES.values() else "choose one of these"
            raise DataError(f"{self.path}: has no split {split!r}, only {', '.join(self.splits)}; {remedy}")
        return self._annotations[split]

    def _merge_categories(self) -> tuple[Category, ...]:
        merged: dict[int, tuple[str, Path]] = {}
        for part in self._annotations.values():
            for category in part.categories:
                name, path = merged.setdefault(category.id, (category.name, part.path))
                if name != category.name:
                    raise DataError(
                        f"{part.path}: category {category.id} is {category.name!r}, but {name!r} in {path.name}; "
                        "give every split the same categories"
                    )
        if not merged:
            paths = ", ".join(str(files.annotations) for files in self.splits.values())
            raise DataError(f"{paths}: lists no categories, expected at least one; export the annotations again")
        return tuple(Category(number, merged[number][0]) for number in sorted(merged))


def find_annotation_files(path: Path, overrides: Mapping[str, str | Path] | None = None) -> dict[str, Path]:
    """The instances JSON of each split, in the order train, val, test; see `CocoFolder.open`."""
    if not path.is_dir():
        problem = "is a file, expected a folder" if path.exists() else "does not exist"
        raise DataError(f"{path}: {problem}; give a folder with instances_train.json and its images")
    found = {name: path / file for name, file in overrides.items()} if overrides else _find_json(path)
    if not found:
        others = [file for folder in (path, path / "annotations") for file in sorted(folder.glob("*.json"))]
        others = [file for file in others if not is_hidden(file)]
        only = ", ".join(str(file.relative_to(path)) for file in others[:3])
        raise DataError(
            f"{path}: holds no annotations{f' that are named after a split, only {only}' if only else ''}; "
            "expected instances_train.json, annotations/instances_train2017.json, "
            "train.json or train/_annotations.coco.json (likewise val and test); 'detr-fast convert' makes them from "
            "YOLO (a folder with data.yaml) and Pascal VOC (one with Annotations/)"
        )
    for file in found.values():
        if not file.is_file():
            raise DataError(f"{file}: no such annotations file; check the path")
    order = ("train", "val", "test")
    return dict(sorted(found.items(), key=lambda entry: order.index(entry[0]) if entry[0] in order else len(order)))


def _find_json(path: Path) -> dict[str, Path]:
    """The best match of each split: instances_ before bare names, the later year, the root before annotations/."""
    ranked: list[tuple[tuple[bool, int, int], str, Path]] = []
    for rank, folder in ((1, path), (0, path / "annotations")):
        for file in sorted(folder.glob("*.json")):
            if match := _FILE_PATTERN.fullmatch(file.name):
                score = (match["prefix"] is not None, int(match["year"] or 0), rank)
                ranked.append((score, _SPLIT_NAMES[match["split"].lower()], file))
    for folder_name, split in _SPLIT_NAMES.items():
        file = path / folder_name / "_annotations.coco.json"
        if file.is_file():
            ranked.append(((False, -1, 0), split, file))
    return {split: file for _, split, file in sorted(ranked, key=lambda entry: entry[0])}


def find_image_folder(
    path: Path, split: str, annotations: Path, file_names: Sequence[str], override: str | Path | None = None
) -> Path:
    """The folder that has the most of a sample of the split's images; see `CocoFolder.open`."""
    if override is not None:
        if not (path / override).is_dir():
            raise DataError(f"{path / override}: no such image folder; check the path")
        return path / override
    stems = [
        re.sub("^instances_", "", annotations.stem, flags=re.IGNORECASE),
        *(alias for alias, name in _SPLIT_NAMES.items() if name == split),
    ]
    candidates = [path / "images" / stem for stem in stems] + [path / stem for stem in stems]
    candidates += [path / "images", annotations.parent, path]
    sample = file_names[:: max(1, len(file_names) // 16)]
    existing = [folder for folder in candidates if folder.is_dir()]
    return max(existing, key=lambda folder: sum(image_path(folder, name).is_file() for name in sample))


class CocoDetection(Dataset[tuple[Tensor, Target]]):
    """One split of a COCO-format folder: items are (image, target).

    image is (3, H, W): uint8 without `transforms`, else what they return. target holds
    "boxes" (n, 4) float32, (center x, center y, width, height) relative to the image's own size, all with area;
    "labels" (n,) int64, positions in `names`; "image_id" int64; "orig_size" and "size" (2,) int64, height and width
    before and after the transforms. Crowd annotations are left out. n may be 0.

    An item is asked for by index, or by (index, seed): then the transforms draw from that seed, whatever process runs
    them, and the global random state stays as it was.

    Args:
        folder: the data set.
        split: "train", "val" or "test".
        transforms: a torchvision.transforms.v2 callable of (image, target), boxes being `tv_tensors.BoundingBoxes` in
            pixels; see `train_transforms` and `eval_transforms`.
        cache_bytes: decoded images are kept in memory when all of them fit; 0 never keeps them.

    Attributes:
        names: the classes' names, in order of category id.
        category_ids: the JSON's id of each label.
        image_ids: the images' ids as integers.
        image_sizes: (height, width) of the images before the transforms.
        max_boxes: the largest number of boxes in an image.
        annotations: the parsed JSON.

    Raises:
        DataError: no such split, or images of it are missing.
    """

    def __init__(
        self, folder: CocoFolder, split: str, transforms: Transform | None = None, *, cache_bytes: int = CACHE_BYTES
    ) -> None:
        self.annotations = folder.annotations(split)
        self.transforms = transforms
        self.names = tuple(category.name for category in folder.categories)
        self.category_ids = tuple(category.id for category in folder.categories)
        self.image_ids = self.annotations.image_ids
        paths = [image_path(folder.splits[split].images, name) for name in self.annotations.file_names]
        self._require_images(paths, folder.splits[split])
        self.image_sizes = [
            (height, width) if height and width else read_image_size(path)
            for path, (height, width) in zip(paths, self.annotations.sizes.tolist())
        ]
        self.images = ImageStore(paths, self.image_sizes, cache_bytes)
        self._labels = torch.from_numpy(np.searchsorted(self.category_ids, self.annotations.category_ids))
        boxes = self.annotations.boxes
        self._corners = torch.from_numpy(np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)).float()
        self._usable = torch.from_numpy(~self.annotations.crowd)
        self.max_boxes = max(int(self._usable[self.annotations.of_image(i)].sum()) for i in range(len(self)))

    def __len__(self) -> int:
        return len(self.image_ids)

    def __iter__(self) -> Iterator[tuple[Tensor, Target]]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, item: int | tuple[int, int]) -> tuple[Tensor, Target]:
        index, seed = item if isinstance(item, tuple) else (item, None)
        image: Tensor = tv_tensors.Image(self.images[index])
        target = self._target(index)
        if self.transforms is not None:
            with _seeded(seed):
                image, target = self.transforms(image, target)
        return image.as_subclass(Tensor), _relative(target, image.shape[-2], image.shape[-1])

    def _target(self, index: int) -> Target:
        own = self.annotations.of_image(index)
        keep = self._usable[own]
        height, width = self.image_sizes[index]
        boxes = tv_tensors.BoundingBoxes(
            self._corners[own][keep],
            format=tv_tensors.BoundingBoxFormat.XYXY,
            canvas_size=(height, width),  # type: ignore[arg-type]  # torchvision's stub says int
        )
        return {
            "boxes": boxes,
            "labels": self._labels[own][keep],
            "image_id": torch.tensor(self.image_ids[index]),
            "orig_size": torch.tensor([height, width]),
        }

    def _require_images(self, paths: list[Path], files: SplitFiles) -> None:
        missing = [path for path in paths if not path.is_file()]
        if missing:
            inside = missing[0].is_relative_to(files.images)
            remedy = f"put them into {files.images}" if inside else f"make file_name relative to {files.images}"
            raise DataError(
                f"{files.annotations}: {len(missing)} of {len(paths)} images are missing, first {missing[0]}; "
                f"{remedy}, or run 'detr-fast doctor DATA --fix COPY'"
            )


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Draw from `seed` inside, and go on as if nothing had been drawn; None changes nothing."""
    if seed is None:
        yield
        return
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would also reseed the GPUs
    try:
        yield
    finally:
        torch.set_rng_state(state)


def _relative(target: Target, height: int, width: int) -> Target:
    """Boxes in pixels, corners, to boxes relative to the image, center and size; those without area are dropped."""
    size = torch.tensor([width, height], dtype=torch.float32)
    boxes = target["boxes"].as_subclass(Tensor) / torch.cat([size, size])
    boxes = boxes.clamp(0, 1)
    low, high = boxes[:, :2], boxes[:, 2:]
    keep = (high > low).all(dim=1)
    relative = torch.cat([(low + high) / 2, high - low], dim=1)[keep]
    return target | {
        "boxes": relative,
        "labels": target["labels"][keep],
        "size": torch.tensor([height, width]),
    }
