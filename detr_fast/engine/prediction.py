"""Predicting on image files: finding them, detecting objects, and writing pictures and JSON."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torchvision import tv_tensors

from detr_fast.data.errors import DataError
from detr_fast.data.images import read_image
from detr_fast.data.records import is_hidden
from detr_fast.data.transforms import eval_transforms
from detr_fast.engine.drawing import Box, Picture, draw_boxes
from detr_fast.engine.errors import PredictionError
from detr_fast.engine.evaluation import boxes_above
from detr_fast.engine.run_folder import atomic_write, explained
from detr_fast.engine.trained import TrainedModel
from detr_fast.models.postprocess import PostProcess

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif")
JSON_NAME = "predictions.json"
LONGEST_SIDE = 1600  # of a drawn picture: a whole 12-megapixel photo took 7 s to write, and 16 MB


@dataclass(frozen=True)
class Prediction:
    """What was found in one image file; boxes in its pixels, the best first."""

    path: Path
    image: Image.Image
    boxes: list[Box]

    def to_dict(self, names: Sequence[str], category_ids: Sequence[int]) -> dict[str, Any]:
        """Plain data; "bbox" is COCO's [x, y, width, height] in pixels."""
        detections = []
        for box in self.boxes:
            x0, y0, x1, y1 = box.xyxy
            detections.append(
                {
                    "name": names[box.label],
                    "category_id": category_ids[box.label],
                    "score": round(box.score or 0.0, 5),
                    "bbox": [round(v, 2) for v in (x0, y0, x1 - x0, y1 - y0)],
                }
            )
        return {
            "file": str(self.path),
            "width": self.image.width,
            "height": self.image.height,
            "detections": detections,
        }


def find_images(inputs: Sequence[str | Path], hidden: list[Path] | None = None) -> list[Path]:
    """The image files that are named, and those in the folders that are named (not in their subfolders), in order.

    Args:
        hidden: gets what in the folders is named like an image but hidden, such as the "._photo.jpg" that macOS leaves
            beside a "photo.jpg": it is left out, unless it is named itself.

    Raises:
        PredictionError: a path does not exist, or there is no image at all.
    """
    found: list[Path] = []
    for given in map(Path, inputs):
        if given.is_dir():
            images = sorted(p for p in given.iterdir() if p.suffix.lower() in EXTENSIONS and p.is_file())
            found += [p for p in images if not is_hidden(p)]
            if hidden is not None:
                hidden += [p for p in images if is_hidden(p)]
        elif given.exists():
            found.append(given)
        else:
            raise PredictionError(f"{given} does not exist; give image files or folders of images")
    if not found:
        where = ", ".join(map(str, inputs))
        raise PredictionError(
            f"{where} holds no images (subfolders and hidden files are left out); expected files ending in {', '.join(EXTENSIONS)}"
        )
    return list(dict.fromkeys(found))


def require_apart(paths: Sequence[Path], out: Path) -> None:
    """Raise PredictionError where `out` is the folder of one of the images: a picture would replace photo.png, or the mask beside photo.jpg."""
    for path in paths:
        if path.resolve().parent == out.resolve():
            raise PredictionError(
                f"{out} is the folder of {path}; pictures written there would replace images of the same name: "
                "give another --out, or --no-pictures"
            )


def predict_images(
    trained: TrainedModel,
    paths: Sequence[str | Path],
    *,
    threshold: float = 0.5,
    batch_size: int = 4,
    unreadable: list[PredictionError] | None = None,
) -> Iterator[Prediction]:
    """Detect objects in each file, in order; the model's device does the work.

    Pictures are turned as their EXIF orientation says, as viewers show them; boxes are in the pixels of the turned one.

    Args:
        unreadable: gets an error for each file that cannot be read as an image, and the others are gone on with.

    Raises:
        PredictionError: a threshold outside [0, 1]; a file that cannot be read, without `unreadable`; or none that can.
    """
    if not 0 <= threshold <= 1:
        raise PredictionError(f"the threshold is {threshold}, expected a score from 0 to 1")
    files = [Path(path) for path in paths]
    transform = eval_transforms(trained.config.transforms)
    device = next(trained.model.parameters()).device
    post_process = PostProcess(trained.model.focal)
    for start in range(0, len(files), batch_size):
        part, pixels = [], []
        for path in files[start : start + batch_size]:
            try:
                pixels.append(_read(path))
                part.append(path)
            except PredictionError as error:
                if unreadable is None:
                    raise
                unreadable.append(error)
        if not part:
            continue
        images = [transform(tv_tensors.Image(torch.from_numpy(p).permute(2, 0, 1))) for p in pixels]
        sizes = torch.tensor([p.shape[:2] for p in pixels], device=device)
        with torch.inference_mode():
            outputs = trained.model([image.as_subclass(torch.Tensor).to(device) for image in images])
        for path, own, found in zip(part, pixels, post_process(outputs, sizes)):
            yield Prediction(path, Image.fromarray(own), boxes_above(found, threshold))
    if unreadable and len(unreadable) == len(files):
        raise unreadable[0]


def write_predictions(
    predictions: Iterator[Prediction], trained: TrainedModel, out: Path, pictures: bool = True
) -> list[dict[str, Any]]:
    """Write `predictions.json` and one PNG an image into `out`, and return what the JSON holds for each image.

    Boxes in the JSON are in the file's pixels; pictures are reduced to LONGEST_SIDE.
    """
    with explained(out, option="--out"):
        out.mkdir(parents=True, exist_ok=True)
    records: list[dict[str, Any]] = []
    taken: set[str] = {JSON_NAME}
    for prediction in predictions:
        record = prediction.to_dict(trained.names, trained.category_ids)
        if pictures:
            record["picture"] = _free_name(prediction.path.stem, taken)
            picture = Picture(prediction.image, prediction.boxes)
            drawn = draw_boxes(picture, trained.names, min(LONGEST_SIDE, max(prediction.image.size)))
            png = io.BytesIO()
            drawn.save(png, format="PNG", compress_level=1)
            atomic_write(out / record["picture"], lambda file, png=png: file.write(png.getbuffer()))  # type: ignore[misc]
        records.append(record)
    content = {"model": str(trained.path), "names": list(trained.names), "images": records}
    atomic_write(out / JSON_NAME, lambda file: file.write(json.dumps(content, indent=1).encode() + b"\n"))
    return records


def _read(path: Path) -> Any:
    try:
        return read_image(path, turned=True)
    except DataError as error:
        reason = str(error).partition(": ")[2].partition(";")[0]
        raise PredictionError(f"{path}: {reason}; give another image") from None


def _free_name(stem: str, taken: set[str]) -> str:
    """`stem`.png, or with a number where images of several folders share their name."""
    name, number = f"{stem}.png", 1
    while name.lower() in taken:
        number += 1
        name = f"{stem}_{number}.png"
    taken.add(name.lower())
    return name
