"""COCO AP: the figures of pycocotools' own path, where that path works, and sense where it does not."""

from __future__ import annotations

import contextlib
import io
import json

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detr_fast.data import CocoDetection, CocoEvaluator, CocoFolder, generate_scenes


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = generate_scenes(tmp_path_factory.mktemp("scenes") / "set", train=1, val=40)
    return CocoDetection(CocoFolder.open(folder), "val")


def corners(dataset, index):
    boxes = torch.from_numpy(dataset.annotations.boxes[dataset.annotations.of_image(index)]).float()
    return torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1)


def truth(dataset):
    return {
        image_id: {
            "scores": torch.ones(len(dataset[index][1]["labels"])),
            "labels": dataset[index][1]["labels"],
            "boxes": corners(dataset, index),
        }
        for index, image_id in enumerate(dataset.image_ids)
    }


def noisy(dataset, seed=0):
    """The truth moved a little, some of it with another class, and false alarms."""
    random = torch.Generator().manual_seed(seed)
    out = {}
    for image_id, entry in truth(dataset).items():
        boxes = entry["boxes"] + torch.randn(entry["boxes"].shape, generator=random) * 3
        labels = torch.where(torch.rand(len(boxes), generator=random) < 0.2, 0, entry["labels"])
        false = torch.rand(3, 4, generator=random) * 40 + torch.tensor([0, 0, 41, 41])
        out[image_id] = {
            "scores": torch.rand(len(boxes) + 3, generator=random),
            "labels": torch.cat([labels, torch.randint(6, (3,), generator=random)]),
            "boxes": torch.cat([boxes, false]),
        }
    return out


def evaluate(dataset, predictions):
    evaluator = CocoEvaluator(dataset)
    evaluator.update(predictions)
    return evaluator.summarize()


def test_figures_equal_those_of_pycocotools_on_the_files(dataset, tmp_path):
    """Through the file formats and original category ids, as the COCO server does."""
    predictions = noisy(dataset)
    records = [
        {
            "image_id": image_id,
            "category_id": dataset.category_ids[label],
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "score": s,
        }
        for image_id, entry in predictions.items()
        for s, label, (x0, y0, x1, y1) in zip(*(entry[k].tolist() for k in ("scores", "labels", "boxes")))
    ]
    (tmp_path / "results.json").write_text(json.dumps(records))
    with contextlib.redirect_stdout(io.StringIO()):
        ground = COCO(str(dataset.annotations.path))
        theirs = COCOeval(ground, ground.loadRes(str(tmp_path / "results.json")), "bbox")
        theirs.evaluate()
        theirs.accumulate()
        theirs.summarize()
    ours = evaluate(dataset, predictions)
    names = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]
    assert 0.1 < ours["AP"] < 0.9
    assert [ours[name] for name in names] == pytest.approx(theirs.stats.tolist(), abs=1e-12)
    per_class = [theirs.eval["precision"][:, :, k, 0, -1].mean() for k in range(6)]
    assert [ours[f"AP/{name}"] for name in dataset.names] == pytest.approx(per_class)


def test_the_truth_scores_one_and_nothing_scores_zero(dataset):
    perfect = evaluate(dataset, truth(dataset))
    assert perfect["AP"] == perfect["AP50"] == perfect["AR100"] == pytest.approx(1.0)
    empty = {"scores": torch.ones(0), "labels": torch.ones(0, dtype=torch.int64), "boxes": torch.ones(0, 4)}
    nothing = evaluate(dataset, dict.fromkeys(dataset.image_ids, empty))
    assert nothing["AP"] == nothing["AP50"] == nothing["AR100"] == nothing["AP/star"] == 0.0


def test_one_image_without_predictions_among_others_is_counted(dataset):
    predictions = truth(dataset)
    for entry in list(predictions.values())[:20]:
        entry.update(scores=torch.ones(0), labels=torch.ones(0), boxes=torch.ones(0, 4))
    assert 0.2 < evaluate(dataset, predictions)["AR100"] < 0.8


def test_precision_and_recall_are_at_the_score_that_balances_them_best(dataset):
    predictions = truth(dataset)
    first = next(iter(predictions.values()))
    first["scores"] = torch.full_like(first["scores"], 0.25)  # found, but below the false alarms
    sure = evaluate(dataset, predictions)
    assert [sure[key] for key in ("threshold", "precision", "recall")] == [0.25, 1.0, 1.0]
    for entry in predictions.values():
        entry["scores"] = torch.cat([entry["scores"], torch.tensor([0.5])])
        entry["labels"] = torch.cat([entry["labels"], torch.tensor([0])])
        entry["boxes"] = torch.cat([entry["boxes"], torch.tensor([[0.0, 0, 1, 1]])])
    figures = evaluate(dataset, predictions)
    labels = [entry["labels"][:-1] for entry in predictions.values()]
    every = torch.cat(labels).bincount(minlength=6)
    found = every - labels[0].bincount(minlength=6)
    assert (figures["threshold"], figures["precision"]) == (1.0, 1.0)
    assert figures["recall"] == pytest.approx(float(found.sum() / every.sum()))
    per_class = [figures[f"recall/{name}"] for name in dataset.names]
    assert per_class == pytest.approx((found / every).tolist())


def test_nothing_is_printed(dataset, capfd):
    evaluate(dataset, noisy(dataset))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("convert", [str, lambda value: f"image-{value}"])
def test_string_ids_do_not_make_the_result_zero(write_coco, convert):
    def edit(raw):
        for record in raw["images"]:
            record["id"] = convert(record["id"])
        for record in raw["annotations"]:
            record["image_id"] = convert(record["image_id"])
            record["category_id"] = str(record["category_id"])

    dataset = CocoDetection(CocoFolder.open(write_coco(edit=edit)), "train")
    assert evaluate(dataset, perfect_without_crowd(dataset))["AP"] == pytest.approx(1.0)


def perfect_without_crowd(dataset):
    out = {}
    for index, (_, target) in enumerate(dataset):
        own = dataset.annotations.of_image(index)
        boxes = corners(dataset, index)[~torch.from_numpy(dataset.annotations.crowd[own])]
        out[dataset.image_ids[index]] = {"scores": torch.ones(len(boxes)), "labels": target["labels"], "boxes": boxes}
    return out


def test_an_annotation_of_id_zero_counts_as_any_other(write_coco):
    """pycocotools keeps the matched annotation's id and reads 0 as none."""
    dataset = CocoDetection(CocoFolder.open(write_coco()), "train")
    assert evaluate(dataset, perfect_without_crowd(dataset))["AP/zebra"] == pytest.approx(1.0)


def test_detections_within_a_crowd_are_not_false_alarms(write_coco):
    dataset = CocoDetection(CocoFolder.open(write_coco()), "train")
    predictions = perfect_without_crowd(dataset)
    entry = predictions[10]
    entry["scores"] = torch.cat([torch.tensor([2.0, 2.0]), entry["scores"]])
    entry["labels"] = torch.cat([torch.tensor([1, 1]), entry["labels"]])
    entry["boxes"] = torch.cat([torch.tensor([[2.0, 2, 8, 8], [50, 20, 58, 28]]), entry["boxes"]])
    assert evaluate(dataset, predictions)["AP/bee"] == pytest.approx(1.0)


def test_figures_are_of_the_images_that_were_given(dataset):
    some = dict(list(truth(dataset).items())[:5])
    assert evaluate(dataset, some)["AP"] == pytest.approx(1.0)


def test_parts_from_several_processes_add_up(dataset):
    predictions = list(noisy(dataset).items())
    first, second, whole = CocoEvaluator(dataset), CocoEvaluator(dataset), CocoEvaluator(dataset)
    first.update(dict(predictions[:15]))
    second.update(dict(predictions[15:]))
    whole.update(first.predictions)
    whole.update(second.predictions)
    assert whole.summarize() == evaluate(dataset, dict(predictions))


def test_labels_that_name_no_class_are_left_out(dataset):
    predictions = truth(dataset)
    for entry in predictions.values():
        entry["scores"] = torch.cat([entry["scores"], torch.tensor([2.0, 2.0])])
        entry["labels"] = torch.cat([entry["labels"], torch.tensor([6, -1])])
        entry["boxes"] = torch.cat([entry["boxes"], torch.tensor([[0.0, 0, 5, 5]] * 2)])
    assert evaluate(dataset, predictions)["AP"] == pytest.approx(1.0)


def test_a_figure_without_objects_is_minus_one(write_coco):
    folder = CocoFolder.open(write_coco(edit=lambda raw: raw["annotations"].clear()))
    results = evaluate(CocoDetection(folder, "train"), {10: {"scores": [], "labels": [], "boxes": np.zeros((0, 4))}})
    assert set(results.values()) == {-1.0}
    assert all(type(value) is float for value in results.values())


def test_an_unknown_image_and_values_that_are_not_finite_are_refused(dataset):
    entry = {"scores": torch.ones(1), "labels": torch.zeros(1), "boxes": torch.ones(1, 4)}
    evaluator = CocoEvaluator(dataset)
    with pytest.raises(ValueError, match="image id 5 is not in the data set"):
        evaluator.update({5: entry})
    with pytest.raises(ValueError, match=r"for image 1001 are not finite: the model has diverged"):
        evaluator.update({1001: entry | {"boxes": torch.full((1, 4), torch.nan)}})
    with pytest.raises(ValueError, match="expected one length"):
        evaluator.update({1001: entry | {"scores": torch.ones(2)}})


def test_classes_of_the_same_name_stay_apart(write_coco):
    folder = CocoFolder.open(write_coco(edit=lambda raw: raw["categories"][0].update(name="bee")))
    names = CocoEvaluator(CocoDetection(folder, "train")).names
    assert names == ("ant", "bee (id 5)", "bee (id 9)")
