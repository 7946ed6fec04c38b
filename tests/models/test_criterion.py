"""The criterion's masked, all-at-once losses against the original's algorithm, written out image by image."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from detr_fast.models import HungarianMatcher, ModelConfig, SetCriterion, Targets, build_criterion
from detr_fast.models.criterion import loss_weights
from detr_fast.testing import count

linear_sum_assignment = pytest.importorskip("scipy.optimize").linear_sum_assignment

CLASSES, QUERIES, LAYERS = 6, 9, 3
FLAGS = {"broken_predictions", "broken_targets"}


def giou(a: list[float] | Tensor, b: list[float] | Tensor) -> Tensor:
    """Of two boxes, word for word from arXiv:1902.09630."""
    (ax, ay, aw, ah), (bx, by, bw, bh) = a, b
    ax0, ay0, ax1, ay1 = ax - aw / 2, ay - ah / 2, ax + aw / 2, ay + ah / 2
    bx0, by0, bx1, by1 = bx - bw / 2, by - bh / 2, bx + bw / 2, by + bh / 2
    inter = (torch.minimum(ax1, bx1) - torch.maximum(ax0, bx0)).clamp(0) * (
        torch.minimum(ay1, by1) - torch.maximum(ay0, by0)
    ).clamp(0)
    union = aw * ah + bw * bh - inter
    hull = (torch.maximum(ax1, bx1) - torch.minimum(ax0, bx0)) * (torch.maximum(ay1, by1) - torch.minimum(ay0, by0))
    return inter / union - (hull - union) / hull


def class_cost(logits: Tensor, label: int, focal: bool) -> Tensor:
    if not focal:
        return -logits.softmax(-1)[label]
    p = logits[label].sigmoid()
    return 0.25 * (1 - p) ** 2 * -p.log() - 0.75 * p**2 * -(1 - p).log()


def reference_layer(logits: Tensor, boxes: Tensor, targets: list[dict[str, Tensor]], focal: bool) -> dict[str, Tensor]:
    """One decoder layer's losses as the paper and the original repository define them, in plain loops."""
    num_boxes = max(1, sum(len(t["labels"]) for t in targets))
    weighted, weights, l1, overlap, errors, correct, matched, focal_sum = 0.0, 0.0, 0.0, 0.0, 0.0, 0, 0, 0.0
    for image, target in enumerate(targets):
        cost = torch.zeros(QUERIES, len(target["labels"]), dtype=torch.float64)
        for q in range(QUERIES):
            for n, (box, label) in enumerate(zip(target["boxes"], target["labels"].tolist())):
                distance = (boxes[image, q] - box).abs().sum()
                cost[q, n] = class_cost(logits[image, q], label, focal) + 5 * distance - 2 * giou(boxes[image, q], box)
        wanted = torch.full((QUERIES,), CLASSES)
        for q, n in zip(*linear_sum_assignment(cost.detach().numpy())):
            wanted[q] = target["labels"][n]
            l1 = l1 + (boxes[image, q] - target["boxes"][n]).abs().sum()
            overlap = overlap + 1 - giou(boxes[image, q], target["boxes"][n])
            guess = logits[image, q, :CLASSES] if focal else logits[image, q]
            correct += int(guess.argmax() == wanted[q])
            matched += 1
        for q in range(QUERIES):
            weight = 0.1 if wanted[q] == CLASSES else 1.0
            weighted = weighted - weight * logits[image, q].log_softmax(-1)[wanted[q]]
            weights += weight
            for k in range(CLASSES):
                p = logits[image, q, k].sigmoid()
                is_class = wanted[q] == k
                focal_sum = focal_sum - (0.25 * (1 - p) ** 2 * p.log() if is_class else 0.75 * p**2 * (1 - p).log())
        if focal:
            found = (logits[image, :, :CLASSES].amax(-1) > 0).sum()
        else:
            found = (logits[image].argmax(-1) != CLASSES).sum()
        errors += abs(int(found) - len(target["labels"]))
    return {
        "loss_ce": focal_sum / num_boxes if focal else weighted / weights,
        "loss_bbox": l1 / num_boxes,
        "loss_giou": overlap / num_boxes,
        "cardinality_error": torch.tensor(errors / len(targets)),
        "class_error": torch.tensor(100 - 100 * correct / max(1, matched)),
    }


def make_case(counts: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor, list[dict[str, Tensor]]]:
    torch.manual_seed(seed)
    logits = torch.randn(LAYERS, len(counts), QUERIES, CLASSES + 1, dtype=torch.float64, requires_grad=True)
    boxes = (torch.rand(LAYERS, len(counts), QUERIES, 4, dtype=torch.float64) * 0.5 + 0.2).requires_grad_()
    targets = [
        {"boxes": torch.rand(n, 4, dtype=torch.float64) * 0.5 + 0.2, "labels": torch.randint(CLASSES, (n,))}
        for n in counts
    ]
    return logits, boxes, targets


def as_outputs(logits: Tensor, boxes: Tensor) -> dict[str, Any]:
    layers = [{"pred_logits": l, "pred_boxes": b} for l, b in zip(logits.unbind(0), boxes.unbind(0))]
    return {**layers[-1], "aux_outputs": layers[:-1]}


def make_criterion(focal: bool = False) -> SetCriterion:
    return build_criterion(ModelConfig(num_classes=CLASSES, decoder_layers=LAYERS), focal=focal)


@pytest.mark.parametrize("focal", [False, True], ids=["softmax", "focal"])
@pytest.mark.parametrize(
    "counts",
    [(3, 0, 5), (0, 0), (9, 1), (12, 4, 0)],
    ids=["one-empty-image", "no-objects-anywhere", "as-many-as-queries", "more-than-queries"],
)
@pytest.mark.parametrize("capacity", [None, 14])
def test_values_and_gradients_equal_the_per_image_reference(counts, focal, capacity):
    logits, boxes, targets = make_case(counts)
    criterion = make_criterion(focal)
    losses = criterion(as_outputs(logits, boxes), Targets.from_list(targets, capacity))
    criterion.weighted_sum(losses).backward()
    grads = logits.grad, boxes.grad
    logits.grad = boxes.grad = None

    total = torch.zeros((), dtype=torch.float64)
    expected_names = set()
    for layer in range(LAYERS):
        suffix = "" if layer == LAYERS - 1 else f"_{layer}"
        for name, value in reference_layer(logits[layer], boxes[layer], targets, focal).items():
            if name == "class_error" and suffix:
                continue
            expected_names.add(name + suffix)
            value = torch.as_tensor(value, dtype=torch.float64)
            torch.testing.assert_close(losses[name + suffix].double(), value, rtol=1e-6, atol=1e-12)
            total = total + criterion.weight_dict.get(name + suffix, 0.0) * value
    assert losses.keys() == expected_names | FLAGS
    assert losses["broken_predictions"] == losses["broken_targets"] == 0
    torch.testing.assert_close(criterion.weighted_sum(losses), total, rtol=1e-6, atol=1e-12)
    total.backward()
    torch.testing.assert_close(grads[0], logits.grad, rtol=1e-6, atol=1e-12)
    expected_boxes = torch.zeros_like(boxes) if boxes.grad is None else boxes.grad
    torch.testing.assert_close(grads[1], expected_boxes, rtol=1e-6, atol=1e-12)


def test_a_list_of_targets_gives_the_same_losses_as_padded_ones():
    logits, boxes, targets = make_case((3, 0, 5))
    criterion = make_criterion()
    from_list = criterion(as_outputs(logits, boxes), targets)
    padded = criterion(as_outputs(logits, boxes), Targets.from_list(targets, capacity=30))
    assert from_list.keys() == padded.keys()
    for name in from_list:
        torch.testing.assert_close(from_list[name], padded[name])


def test_losses_asked_for_alone_are_computed_alone():
    logits, boxes, targets = make_case((2, 1))
    matcher = HungarianMatcher()
    outputs = as_outputs(logits[-1:], boxes[-1:])
    for part, names in (
        ("labels", {"loss_ce", "class_error"}),
        ("boxes", {"loss_bbox", "loss_giou"}),
        ("cardinality", {"cardinality_error"}),
    ):
        assert SetCriterion(CLASSES, matcher, loss_weights(1), losses=(part,))(outputs, targets).keys() == names | FLAGS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_outputs_give_finite_fp32_losses(dtype):
    logits, boxes, targets = make_case((3, 4))
    criterion = make_criterion()
    targets = [{"boxes": t["boxes"].float(), "labels": t["labels"]} for t in targets]
    losses = criterion(as_outputs(logits.to(dtype), boxes.to(dtype)), targets)
    exact = criterion(as_outputs(logits.float(), boxes.float()), targets)
    for name in ("loss_ce", "loss_bbox_0", "loss_giou"):
        assert losses[name].dtype == torch.float32
        torch.testing.assert_close(losses[name], exact[name], rtol=0.1, atol=0)


def test_nan_predictions_give_nan_losses_but_no_crash():
    logits, boxes, targets = make_case((3, 2))
    logits.data[:, 0, 4] = float("nan")
    boxes.data[:, 1, 2] = float("inf")
    losses = make_criterion()(as_outputs(logits, boxes), targets)
    assert losses["loss_ce"].isnan()
    assert losses["loss_bbox"].isfinite()  # the broken queries are the last to be matched
    assert losses["broken_predictions"] == 2 * LAYERS
    assert losses["broken_targets"] == 0


def test_broken_targets_are_counted_and_crash_nothing():
    logits, boxes, targets = make_case((4, 2))
    padded = Targets.from_list(targets, capacity=6)
    padded.labels[0, 0], padded.labels[0, 1], padded.labels[1, 5] = CLASSES, -3, 99  # the last is padding
    padded.boxes[0, 2, 2], padded.boxes[1, 0, 0], padded.boxes[1, 1, 3] = 0.0, float("nan"), 1.5
    losses = make_criterion()(as_outputs(logits, boxes), padded)
    assert losses["broken_targets"] == 5
    assert losses["broken_predictions"] == 0
    assert losses["loss_ce"].isfinite()


def test_the_padding_has_no_gradient_and_cannot_make_one_nan():
    logits, boxes, targets = make_case((1, 0))
    boxes.data[..., 2:] = 0  # boxes without area, which would divide zero by zero against a padded target
    padded = Targets.from_list(targets, capacity=7)
    losses = make_criterion()(as_outputs(logits, boxes), padded)
    make_criterion().weighted_sum(losses).backward()
    assert boxes.grad.isfinite().all()
    assert (boxes.grad != 0).any(-1).sum() == LAYERS  # one query an image and layer, and one image has none


def test_outputs_and_targets_of_different_batches_are_refused():
    logits, boxes, targets = make_case((1, 2))
    with pytest.raises(
        ValueError, match=r"logits of 2 images and 7 classes .* targets of 1 images and num_classes = 6"
    ):
        make_criterion()(as_outputs(logits, boxes), targets[:1])
    with pytest.raises(ValueError, match=r"got losses \['masks'\]; expected some of labels, boxes, cardinality"):
        SetCriterion(CLASSES, HungarianMatcher(), {}, losses=("masks",))


def test_the_weighted_sum_needs_a_weight_for_something():
    criterion = SetCriterion(CLASSES, HungarianMatcher(), {})
    with pytest.raises(ValueError, match=r"none of the losses \['loss_ce'\] has a weight"):
        criterion.weighted_sum({"loss_ce": torch.zeros(())})


def test_the_weights_are_sent_to_the_device_once_and_follow_changes():
    criterion = SetCriterion(CLASSES, HungarianMatcher(), {"loss_ce": 1.0, "loss_bbox": 5.0})
    losses = {name: torch.full((), value, requires_grad=True) for name, value in (("loss_ce", 2.0), ("loss_bbox", 3.0))}
    with torch.inference_mode():
        assert criterion.weighted_sum(losses) == 17.0
    counts = count(lambda: criterion.weighted_sum(losses).backward())
    assert set(counts.launches) <= {
        f"aten.{name}" for name in ("stack.default", "dot.default", "mul.Tensor", "ones_like.default")
    }
    assert losses["loss_bbox"].grad == 5.0
    criterion.weight_dict["loss_bbox"] = 1.0
    assert criterion.weighted_sum(losses) == 5.0


def test_weights_on_a_schedule_are_not_kept_for_ever_and_never_copied():
    criterion = SetCriterion(CLASSES, HungarianMatcher(), {"loss_ce": 1.0})
    for step in range(100):
        criterion.weight_dict["loss_ce"] = float(step)
        assert criterion.weighted_sum({"loss_ce": torch.ones(())}) == step
    assert 1 <= len(criterion._sum._known) <= 16
    for copied in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert copied._sum._known == {}
        assert copied.weighted_sum({"loss_ce": torch.ones(())}) == 99
    assert criterion._sum._known


def test_weights_that_a_graph_reads_are_kept(monkeypatch):
    criterion = SetCriterion(CLASSES, HungarianMatcher(), {"loss_ce": 1.0})
    losses = {"loss_ce": torch.ones(())}
    criterion.weighted_sum(losses)
    (read,) = map(weakref.ref, criterion._sum._known.values())
    with monkeypatch.context() as capturing:
        for name in ("is_initialized", "is_current_stream_capturing"):
            capturing.setattr(torch.cuda, name, lambda: True)
        criterion.weighted_sum(losses)
    for step in range(100):
        criterion.weight_dict["loss_ce"] = float(step)
        criterion.weighted_sum(losses)
    assert read() is not None


ONE_RANK = """
import sys, torch
from detr_fast.models import ModelConfig, build_criterion

rank, rendezvous = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
count = (3, 0)[rank]
outputs = {"pred_logits": torch.zeros(1, 3, 3), "pred_boxes": torch.full((1, 3, 4), 0.5)}
targets = [{"boxes": torch.full((count, 4), 0.25), "labels": torch.zeros(count, dtype=torch.int64)}]
criterion = build_criterion(ModelConfig(num_classes=2, decoder_layers=1))
print(criterion(outputs, targets)["loss_bbox"].item())
"""


def test_box_losses_are_divided_by_the_mean_number_of_boxes_over_ranks(tmp_path):
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", ONE_RANK, str(rank), str(tmp_path / "rendezvous")],
            stdout=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            text=True,
        )
        for rank in range(2)
    ]
    with_objects, without = (float(rank.communicate(timeout=120)[0]) for rank in ranks)
    assert with_objects == pytest.approx(3 * 4 * 0.25 / 1.5)  # three boxes off by 0.25 in four numbers
    assert without == 0
