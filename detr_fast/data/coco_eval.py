"""COCO average precision by pycocotools, without its prints, files and pitfalls.

pycocotools takes annotation id 0 for "no match", can't load an empty list of detections, and prints; here ids are given
anew, detections are handed over in memory, and results come back as a dict of floats.
Source: Lin et al., 2014, arXiv:1405.0312; https://cocodataset.org/#detection-eval
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from detr_fast.data.coco import CocoDetection

AREAS = ("", "s", "m", "l")  # all; up to 32² pixels; up to 96²; above


class NotFiniteError(ValueError):
    """A prediction holds NaN or infinity: the model that made it has diverged."""


class CocoEvaluator:
    """Collects predictions of a data set's images and computes COCO AP over the images it was given.

    Attributes:
        predictions: what was given, by image id: {"scores", "labels", "boxes"} as numpy arrays. Processes that each
            evaluate a part of the images can exchange it and pass it to another evaluator's `update`.
    """

    def __init__(self, dataset: CocoDetection) -> None:
        self.names = unique_names(dataset)
        self.predictions: dict[int, dict[str, np.ndarray]] = {}
        self._truth = _truth_by_image(dataset)

    def update(self, predictions: Mapping[int, Mapping[str, Any]]) -> None:
        """Add predictions by image id; those of an image given twice replace the first.

        Each is {"scores" (n,), "labels" (n,) positions in the data set's names, "boxes" (n, 4) corners in pixels of the
        original image}, tensors or arrays, n may be 0. Labels that name no class are left out.

        Raises:
            ValueError: an unknown image id or lengths that differ.
            NotFiniteError: values that are not finite.
        """
        for image_id, prediction in predictions.items():
            if int(image_id) not in self._truth:
                raise ValueError(f"image id {image_id!r} is not in the data set; use target['image_id']")
            arrays = {key: _to_numpy(prediction[key]) for key in ("scores", "labels", "boxes")}
            arrays["boxes"] = arrays["boxes"].reshape(-1, 4)
            lengths = {key: len(values) for key, values in arrays.items()}
            if len(set(lengths.values())) > 1:
                raise ValueError(f"predictions of image {image_id} have lengths {lengths}, expected one length")
            if not all(np.isfinite(values).all() for values in arrays.values()):
                raise NotFiniteError(f"the predictions for image {image_id} are not finite: the model has diverged")
            self.predictions[int(image_id)] = arrays

    def summarize(self) -> dict[str, float]:
        """COCO's twelve figures, each class's AP, and precision and recall at one threshold.

        Keys: AP (mean over IoU 0.50 to 0.95), AP50, AP75, APs, APm, APl, AR1, AR10, AR100, ARs, ARm, ARl, and
        AP/<name>, AP50/<name> for each class. Figures are from 0 to 1; -1 where the images have no such object
        (pycocotools' convention). threshold is the score that gives the highest F1 of all classes' boxes at IoU 0.5;
        precision, recall, precision/<name> and recall/<name> are of the boxes that score at least that.
        """
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation = COCOeval(self._to_coco(self._truth_records()), self._to_coco(self._detections()), "bbox")
            evaluation.evaluate()
            evaluation.accumulate()
        precision: np.ndarray = evaluation.eval["precision"]  # (IoU, recall, class, area, detections)
        recall: np.ndarray = evaluation.eval["recall"]  # (IoU, class, area, detections)
        results = {
            "AP": _mean(precision[:, :, :, 0, -1]),
            "AP50": _mean(precision[0, :, :, 0, -1]),
            "AP75": _mean(precision[5, :, :, 0, -1]),
        }
        results |= {f"AP{area}": _mean(precision[:, :, :, i, -1]) for i, area in enumerate(AREAS) if area}
        results |= {f"AR{most}": _mean(recall[:, :, 0, i]) for i, most in enumerate((1, 10, 100))}
        results |= {f"AR{area}": _mean(recall[:, :, i, -1]) for i, area in enumerate(AREAS) if area}
        for label, name in enumerate(self.names):
            results[f"AP/{name}"] = _mean(precision[:, :, label, 0, -1])
            results[f"AP50/{name}"] = _mean(precision[0, :, label, 0, -1])
        return results | _at_best_threshold(evaluation, self.names)

    def _truth_records(self) -> list[dict[str, Any]]:
        return [record for image_id in self.predictions for record in self._truth[image_id]]

    def _detections(self) -> list[dict[str, Any]]:
        records = []
        for image_id, arrays in self.predictions.items():
            for score, label, (x0, y0, x1, y1) in zip(
                arrays["scores"].tolist(), arrays["labels"].tolist(), arrays["boxes"].tolist()
            ):
                box = [x0, y0, x1 - x0, y1 - y0]
                records.append(_record(image_id, label, box, area=box[2] * box[3]) | {"score": score})
        return records

    def _to_coco(self, records: list[dict[str, Any]]) -> COCO:
        coco = COCO()
        coco.dataset = {
            "images": [{"id": image_id} for image_id in self.predictions],
            "categories": [{"id": label, "name": name} for label, name in enumerate(self.names)],
            "annotations": [record | {"id": number} for number, record in enumerate(records, start=1)],
        }
        coco.createIndex()
        return coco


def _at_best_threshold(evaluation: COCOeval, names: Sequence[str]) -> dict[str, float]:
    """The score with the highest F1 at IoU 0.5, and precision and recall there, of all classes and of each; -1 for a share of nothing."""
    images = [image for image in evaluation.evalImgs if image and image["aRng"] == evaluation.params.areaRng[0]]
    rows = [
        (score, matched > 0, image["category_id"])
        for image in images
        for score, matched, ignored in zip(image["dtScores"], image["dtMatches"][0], image["dtIgnore"][0])
        if not ignored
    ]
    scores, hits, labels = np.array(sorted(rows, reverse=True), dtype=np.float64).reshape(-1, 3).T
    true = np.zeros(len(names))
    for image in images:
        true[image["category_id"]] += np.count_nonzero(np.asarray(image["gtIgnore"]) == 0)
    threshold = -1.0
    if hits.any():
        f1 = 2 * hits.cumsum() / (np.arange(1, len(hits) + 1) + true.sum())
        ends = np.append(np.diff(scores) != 0, True)  # boxes of one score are taken together
        threshold = float(scores[np.argmax(np.where(ends, f1, 0))])
    taken = scores >= threshold
    results = {"threshold": threshold}
    for suffix, own, objects in [("", taken, true.sum())] + [
        (f"/{name}", taken & (labels == label), true[label]) for label, name in enumerate(names)
    ]:
        found = float(hits[own].sum())
        results[f"precision{suffix}"] = found / int(own.sum()) if own.any() else -1.0
        results[f"recall{suffix}"] = found / float(objects) if objects else -1.0
    return results


def unique_names(dataset: CocoDetection) -> tuple[str, ...]:
    """The classes' names; those that occur twice get their category id."""
    return tuple(
        name if dataset.names.count(name) == 1 else f"{name} (id {number})"
        for name, number in zip(dataset.names, dataset.category_ids)
    )


def _truth_by_image(dataset: CocoDetection) -> dict[int, list[dict[str, Any]]]:
    part = dataset.annotations
    labels = np.searchsorted(dataset.category_ids, part.category_ids).tolist()
    columns = list(zip(labels, part.boxes.tolist(), part.areas.tolist(), part.crowd.tolist()))
    return {
        image_id: [
            _record(image_id, label, box, area, int(crowd)) for label, box, area, crowd in columns[part.of_image(index)]
        ]
        for index, image_id in enumerate(part.image_ids)
    }


def _record(image_id: int, label: int, box: list[float], area: float, crowd: int = 0) -> dict[str, Any]:
    return {"image_id": image_id, "category_id": label, "bbox": box, "area": area, "iscrowd": crowd}


def _to_numpy(values: Any) -> np.ndarray:
    return values.detach().float().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def _mean(values: np.ndarray) -> float:
    """The mean of what is defined; pycocotools marks the rest with -1."""
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else -1.0
