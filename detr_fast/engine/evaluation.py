"""Evaluating a model on a split: COCO AP and the validation loss, and pictures of what it finds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from detr_fast.data.coco import CocoDetection
from detr_fast.data.coco_eval import CocoEvaluator, NotFiniteError
from detr_fast.engine.drawing import Box, Picture
from detr_fast.engine.errors import TrainingDiverged, loading
from detr_fast.models.boxes import to_corners
from detr_fast.models.criterion import SetCriterion
from detr_fast.models.postprocess import PostProcess

Progress = Callable[[int, int], None]


def evaluate_model(
    model: nn.Module,
    loader: DataLoader[Any],
    evaluator: CocoEvaluator,
    device: torch.device | str,
    criterion: SetCriterion | None = None,
    progress: Progress | None = None,
    exchange: Callable[[dict[int, Any]], Mapping[int, Any]] | None = None,
    labels: Sequence[int] | None = None,
) -> dict[str, float]:
    """Run `model` over `loader`, fill `evaluator` and return its figures; the model's train or eval mode is kept.

    Args:
        model: a Detr on `device`.
        loader: gives `Batch`es of the evaluator's data set.
        evaluator: collects the predictions.
        criterion: adds "loss", the mean over the images of the weighted sum that training minimises.
        progress: called with (images done, images in all).
        labels: the data set's label for each of the model's, -1 for none, where they differ.
        exchange: takes this process's predictions by image id and returns those of all processes.

    Returns:
        `CocoEvaluator.summarize()`'s figures, and "loss" if there is a criterion.

    Raises:
        TrainingDiverged: a prediction is not finite.
        LoaderError: a process that loads images has ended.
    """
    training = model.training
    model.eval()
    post_process = PostProcess(focal=bool(getattr(model, "focal", False)))
    total_loss = torch.zeros((), device=device)
    translation = None if labels is None else torch.tensor(labels, device=device)
    done, total = 0, len(evaluator_images(loader))
    try:
        with torch.inference_mode(), loading():
            for batch in loader:
                on_device = batch.to(device, non_blocking=True)
                outputs = model(on_device.images)
                sizes = torch.tensor([m["orig_size"] for m in batch.metadata], device=device)
                if criterion is not None:
                    losses = criterion(outputs, on_device.targets)
                    total_loss += len(batch) * criterion.weighted_sum(losses)
                results = post_process(outputs, sizes)
                if translation is not None:
                    results = [result | {"labels": translation[result["labels"]]} for result in results]
                try:
                    evaluator.update({m["image_id"]: r for m, r in zip(batch.metadata, results)})
                except NotFiniteError as error:
                    raise TrainingDiverged(f"{error}; take an earlier checkpoint, or train with a lower --lr") from None
                done += len(batch)
                if progress is not None:
                    progress(done, total)
    finally:
        model.train(training)
    if exchange is not None:
        evaluator.update(exchange(evaluator.predictions))
    figures = evaluator.summarize()
    if criterion is not None:
        figures["loss"] = float(total_loss) / max(1, done)
    return figures


def evaluator_images(loader: DataLoader[Any]) -> CocoDetection:
    """The data set that a loader of `build_loader` reads."""
    dataset = loader.dataset
    assert isinstance(dataset, CocoDetection)
    return dataset


def sample_pictures(
    model: nn.Module, dataset: CocoDetection, device: torch.device | str, count: int = 16, threshold: float = 0.5
) -> list[Picture]:
    """`count` images spread over the data set, each with what the model finds above `threshold` and what is there."""
    training = model.training
    model.eval()
    post_process = PostProcess(focal=bool(getattr(model, "focal", False)))
    pictures = []
    try:
        with torch.inference_mode():
            for index in _spread(len(dataset), count):
                image, target = dataset[index]
                height, width = target["orig_size"].tolist()
                found = post_process(model([image.to(device)]), torch.tensor([[height, width]], device=device))[0]
                corners = to_corners(target["boxes"]) * torch.tensor([width, height, width, height])
                true = [Box(label, xyxy) for label, xyxy in zip(target["labels"].tolist(), _tuples(corners))]
                pixels = dataset.images[index].permute(1, 2, 0).numpy()
                predicted = boxes_above(found, threshold)
                caption = f"{len(predicted)} found, {len(true)} true"
                pictures.append(Picture(Image.fromarray(pixels), predicted, true, caption))
    finally:
        model.train(training)
    return pictures


def boxes_above(found: Mapping[str, Tensor], threshold: float) -> list[Box]:
    """The boxes to draw of one image's post-processed predictions, the best first."""
    order = found["scores"].argsort(descending=True)
    rows = zip(found["labels"][order].tolist(), _tuples(found["boxes"][order]), found["scores"][order].tolist())
    return [Box(label, xyxy, score) for label, xyxy, score in rows if score >= threshold]


def _tuples(boxes: Tensor) -> list[tuple[float, float, float, float]]:
    return [(x0, y0, x1, y1) for x0, y0, x1, y1 in boxes.tolist()]


def _spread(length: int, count: int) -> list[int]:
    count = min(length, count)
    return [i * length // count for i in range(count)]
