"""transformers' loss of Grounding DINO beside ours: the same numbers and gradients, and no waits."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.hardware import DEVICE
from detr_fast.testing import count
from tests.seen import AnswersYes

transformers = pytest.importorskip("transformers")
pytest.importorskip("scipy")

from transformers.loss import loss_for_object_detection, loss_grounding_dino  # noqa: E402

from detr_fast.adapters import hugging_face_loss_grounding as adapter  # noqa: E402
from tests.accelerate.test_rt_detr_loss import assert_alike  # noqa: E402

QUERIES, WORDS = 7, 11
THEIRS, OURS = loss_grounding_dino.GroundingDinoForObjectDetectionLoss, adapter.grounding_dino_object_detection_loss


def config(**options):
    costs = {"class_cost": 1.5, "bbox_cost": 4.0, "giou_cost": 2.5}
    weights = {"bbox_loss_coefficient": 3.0, "giou_loss_coefficient": 0.5, "focal_alpha": 0.3}
    rest = {"auxiliary_loss": True, "decoder_layers": 3, "two_stage": True}
    return SimpleNamespace(**{**costs, **weights, **rest, **options})


class Case(SimpleNamespace):
    """Predictions as leaves, their labels, and the prompts' words."""


def case(counts, settings, classes=None, device=None):
    """classes: of each image's prompt; each is 1 to 3 words, and behind the prompt there is none."""
    classes = classes or [3] * len(counts)
    images = len(counts)
    maps, mask = [], torch.zeros(images, QUERIES, WORDS, dtype=torch.bool)
    for image, number in enumerate(classes):
        words = torch.zeros(number, WORDS, dtype=torch.int64)
        start = 1
        for one in range(number):
            length = 1 + (one + image) % 2
            words[one, start : start + length] = 1
            start += length + 1
        maps.append(words.to(device))
        mask[image, :, : start + 1] = True
    mask = mask.to(device)
    leaves = []
    for shape in ((settings.decoder_layers, images, QUERIES), (images, QUERIES)):
        leaves.append(torch.randn(*shape, WORDS, device=device).requires_grad_(device is None))
        leaves.append((torch.rand(*shape, 4, device=device) * 0.5 + 0.2).requires_grad_(device is None))
    labels = [
        {
            "class_labels": torch.randint(number, (n,), device=device),
            "boxes": torch.rand(n, 4, device=device) * 0.5 + 0.2,
        }
        for n, number in zip(counts, classes)
    ]
    return Case(leaves=leaves, labels=labels, maps=tuple(maps), mask=mask, hidden=float("-inf"), config=settings)


def call(function, case):
    logits, boxes, encoder, encoder_boxes = case.leaves
    logits, encoder = (one.masked_fill(~case.mask, case.hidden) for one in (logits, encoder))
    return function(
        logits[-1],
        case.labels,
        logits.device,
        boxes[-1],
        case.config,
        case.maps,
        case.mask,
        outputs_class=logits,
        outputs_coord=boxes,
        encoder_logits=encoder,
        encoder_pred_boxes=encoder_boxes,
    )


@pytest.mark.parametrize("seed", range(10))
def test_losses_names_and_gradients_are_transformers(seed, fp64, monkeypatch):
    monkeypatch.setattr(adapter.loss_grounding_dino, "GroundingDinoForObjectDetectionLoss", None)  # ours asks nobody
    focal = loss_grounding_dino.sigmoid_focal_loss  # whose targets come in fp32, in which it then adds up
    in_fp64 = lambda inputs, targets, **k: focal(inputs, targets.to(inputs.dtype), **k)  # noqa: E731
    monkeypatch.setattr(loss_grounding_dino, "sigmoid_focal_loss", in_fp64)
    torch.manual_seed(seed)
    chance = random.Random(seed)
    counts = [chance.choice((0, 1, 2, 5, QUERIES)) for _ in range(chance.randint(1, 4))]
    settings = config(
        auxiliary_loss=seed % 4 != 3,
        two_stage=seed % 3 != 2,
        decoder_layers=1 + seed % 6,
        focal_alpha=-1 if seed == 7 else 0.3,
    )
    one = case(counts, settings, [chance.randint(1, 3)] * len(counts) if seed % 2 else [4, *[2] * (len(counts) - 1)])
    if seed % 4 == 1:
        one.hidden = 3.0  # the models' are -inf
    assert_alike(lambda function: call(function, one), (THEIRS, OURS), one.leaves)


def test_under_autocast_the_loss_is_transformers_within_the_rounding_of_predictions():
    one = case((2, 0, 3), config())
    with torch.autocast("cpu", torch.bfloat16):
        one.leaves = [leaf.bfloat16() for leaf in one.leaves]
        theirs, ours = (call(function, one) for function in (THEIRS, OURS))
    assert {value.dtype for value in (ours[0], *ours[1].values())} == {torch.float32}
    torch.testing.assert_close(ours[0], theirs[0].float(), rtol=2e-2, atol=0)


def test_what_is_not_as_documented_is_transformers_to_judge(monkeypatch):
    calls = []
    monkeypatch.setattr(
        adapter.loss_grounding_dino,
        "GroundingDinoForObjectDetectionLoss",
        lambda *a, **k: calls.append(a) or THEIRS(*a, **k),
    )
    one = case((QUERIES + 2, 1), config())
    torch.testing.assert_close(call(OURS, one)[0], call(THEIRS, one)[0], rtol=0, atol=0)
    one = case((1, 2), config())
    one.maps = one.maps[:1]
    for function in (THEIRS, OURS):
        with pytest.raises((IndexError, RuntimeError)):
            call(function, one)
    assert len(calls) == 2


@pytest.mark.parametrize("two_stage", [True, False])
def test_numbers_of_boxes_are_averaged_over_processes_as_often_as_theirs(two_stage, monkeypatch):
    one, asked = case((2, 3), config(two_stage=two_stage)), []

    class State:
        _shared_state = {"there": True}  # noqa: RUF012
        num_processes = 2

    def reduce(number, reduction="mean"):
        asked.append(number.dtype)
        return (number + 3) / (2 if reduction == "mean" else 1)

    monkeypatch.setattr(loss_for_object_detection, "PartialState", State, raising=False)
    monkeypatch.setattr(loss_for_object_detection, "reduce", reduce, raising=False)
    monkeypatch.setattr(loss_for_object_detection, "is_accelerate_available", lambda: True)
    theirs, ours = (call(function, one)[0] for function in (THEIRS, OURS))
    torch.testing.assert_close(ours, theirs)
    assert asked == [torch.float32] * 2 * (2 if two_stage else 1)


@pytest.mark.parametrize("what", ["label", "prediction", "encoder"])
def test_what_transformers_refuses_is_refused_on_a_cpu_and_makes_the_loss_nan_where_a_look_would_wait(
    what, monkeypatch
):
    one = case((2, 3), config(), [3, 2])
    with torch.no_grad():
        if what == "label":
            one.labels[1]["class_labels"][0] = 2
        else:
            one.leaves[3 if what == "encoder" else 1][0, 1, ..., 2] = -0.1
    for function in (THEIRS, OURS):
        with pytest.raises((IndexError, ValueError, RuntimeError)):
            call(function, one)
    monkeypatch.setattr(adapter, "has_values", lambda tensor: False)
    loss, by_name, _ = call(OURS, one)
    assert loss.isnan()
    assert all(value.isnan() for name, value in by_name.items() if name.startswith("loss"))


def test_the_host_never_waits_where_transformers_loss_makes_it_wait_for_every_layer(monkeypatch):
    def solve(cost):
        order = torch.arange(cost.shape[1], device="cpu")
        return order, order

    monkeypatch.setattr(loss_grounding_dino, "linear_sum_assignment", solve)
    # It waits for the number of elements; a fake tensor has none to tell.
    monkeypatch.setattr(torch, "masked_select", lambda x, mask: x.flatten())
    found = []
    for function in (THEIRS, OURS):
        with FakeTensorMode(), torch.device("cuda"), AnswersYes():
            one = case((3, 2), config(), device="cuda")
            found.append(count(lambda function=function, one=one: call(function, one)))
    theirs, ours = found
    assert theirs.total_synchronisations >= 5 * 4
    assert ours.total_synchronisations == 0, ours.synchronisations
    assert ours.launches["linear_assignment_kernel"] == ours.launches["matching_cost_kernel"] == 1
    assert 4 * ours.total_launches < theirs.total_launches


def test_backward_never_waits():
    one = case((3, 2), config(), device="meta")
    one.leaves = [leaf.requires_grad_() for leaf in one.leaves]
    counts = count(lambda: call(OURS, one)[0].backward())
    assert counts.total_synchronisations == 0, counts.synchronisations
    assert all(leaf.grad.shape == leaf.shape for leaf in one.leaves)


@pytest.mark.gpu
def test_on_a_gpu_the_loss_is_transformers_and_nothing_waits():
    one = case((3, 0, 4), config(), device=DEVICE)
    one.leaves = [leaf.requires_grad_() for leaf in one.leaves]
    call(OURS, one)  # compiles, and sends the weights
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(OURS, one)[0].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_alike(lambda function: call(function, one), (THEIRS, OURS), one.leaves, rtol=1e-3, atol=1e-5)
