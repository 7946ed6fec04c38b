"""transformers' loss of RT-DETR beside ours: the same numbers and gradients, and no waits."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.hardware import DEVICE
from detr_fast import use_backend
from detr_fast.testing import count
from tests.seen import AnswersYes

transformers = pytest.importorskip("transformers")
pytest.importorskip("scipy")

from transformers.loss import loss_rt_detr  # noqa: E402

from detr_fast.adapters import hugging_face_loss_rt_detr as adapter  # noqa: E402
from detr_fast.adapters.hugging_face_loss import why_not_loss  # noqa: E402
from tests.accelerate.test_hugging_face_loss import LABELS, labels_of  # noqa: E402

QUERIES = 9
THEIRS, OURS = loss_rt_detr.RTDetrForObjectDetectionLoss, adapter.rt_detr_object_detection_loss


def config(**options):
    costs = {"matcher_class_cost": 1.5, "matcher_bbox_cost": 4.0, "matcher_giou_cost": 2.5}
    matcher = {"matcher_alpha": 0.25, "matcher_gamma": 2.0, "use_focal_loss": True}
    weights = {"weight_loss_vfl": 1.5, "weight_loss_bbox": 3.0, "weight_loss_giou": 0.5, "eos_coefficient": 1e-4}
    focal = {"focal_loss_alpha": 0.7, "focal_loss_gamma": 2.0}
    return SimpleNamespace(
        **{**costs, **matcher, **weights, **focal, "num_labels": LABELS, "auxiliary_loss": True, **options}
    )


def denoising_of(counts, groups, queries=QUERIES, device=None):
    """As `get_contrastive_denoising_training_group`: each group has its positive queries first, then its negative ones."""
    most = max(counts)
    index = [
        torch.tensor([2 * most * g + n for g in range(groups) for n in range(c)], dtype=torch.int64, device=device)
        for c in counts
    ]
    return {
        "dn_positive_idx": tuple(index),
        "dn_num_group": groups,
        "dn_num_split": [2 * most * groups, queries],
    }


def predictions(counts, layers=3, groups=0, device=None):
    """Leaves: logits and boxes of all layers, (B, L, Q, …), and those of the encoder; and what is known of denoising."""
    denoising = denoising_of(counts, groups, device=device) if groups else None
    queries = QUERIES + (denoising["dn_num_split"][0] if denoising else 0)
    shapes = ((len(counts), layers, queries), (len(counts), QUERIES))
    leaves = []
    for shape in shapes:
        leaves.append(torch.randn(*shape, LABELS, device=device))
        leaves.append(torch.rand(*shape, 4, device=device) * 0.5 + 0.2)
    return [leaf.requires_grad_(device is None) for leaf in leaves], denoising


def call(function, leaves, labels, config, denoising=None, corners=None, references=None):
    """As models call it, RT-DETR's with no corners and references."""
    logits, boxes, encoder, encoder_boxes = leaves
    return function(
        logits[:, -1],
        labels,
        logits.device,
        boxes[:, -1],
        config,
        logits,
        boxes,
        enc_topk_logits=encoder,
        enc_topk_bboxes=encoder_boxes,
        denoising_meta_values=denoising,
        predicted_corners=corners,
        initial_reference_points=references,
    )


def assert_alike(call, functions, leaves, rtol=1e-10, atol=1e-12):
    """Two functions give the same loss, losses in the same order, outputs of earlier layers and gradients."""
    results = []
    for function in functions:
        with use_backend(matching_cost="eager"):  # else one layer goes to transformers
            loss, by_name, auxiliary = call(function)
        results.append((loss, by_name, auxiliary, torch.autograd.grad(loss, leaves, allow_unused=True)))
    (loss, by_name, auxiliary, gradients), (own_loss, own, own_auxiliary, own_gradients) = results
    assert list(own) == list(by_name)
    torch.testing.assert_close(own_loss, loss, rtol=rtol, atol=atol)
    for key, value in by_name.items():
        within = {"rtol": rtol, "atol": atol} if key.startswith("loss") else {"rtol": 1e-6, "atol": 1e-6}
        torch.testing.assert_close(own[key], value, msg=key, **within)
    torch.testing.assert_close(own_auxiliary, auxiliary, rtol=0, atol=0)
    for gradient, own_gradient in zip(gradients, own_gradients):
        if gradient is None or own_gradient is None:  # of no boxes or layers
            assert all(one is None or not one.any() for one in (gradient, own_gradient))
        else:
            torch.testing.assert_close(own_gradient, gradient, rtol=rtol, atol=atol)


def assert_same(leaves, labels, config, denoising):
    assert_alike(lambda function: call(function, leaves, labels, config, denoising), (THEIRS, OURS), leaves)


@pytest.mark.parametrize("seed", range(12))
def test_losses_names_and_gradients_are_transformers(seed, fp64, monkeypatch):
    monkeypatch.setattr(adapter.loss_rt_detr, "RTDetrForObjectDetectionLoss", None)  # ours asks nobody
    torch.manual_seed(seed)
    chance = random.Random(seed)
    counts = [chance.choice((0, 1, 2, 5, QUERIES)) for _ in range(chance.randint(1, 4))]
    layers = 1 + seed % 6
    groups = chance.randint(1, 3) if seed % 3 and max(counts) else 0
    settings = config(
        auxiliary_loss=seed % 5 != 4,
        use_focal_loss=seed % 4 != 3,
        focal_loss_gamma=chance.choice((1.5, 2.0)),
    )
    leaves, denoising = predictions(counts, layers, groups)
    assert_same(leaves, labels_of(counts), settings, denoising)


def test_without_any_box_the_loss_is_transformers(fp64):
    leaves, _ = predictions((0, 0))
    assert_same(leaves, labels_of((0, 0)), config(), None)


def test_under_autocast_the_loss_is_transformers_within_the_rounding_of_predictions():
    counts = (2, 0, 3)
    labels, (leaves, denoising) = labels_of(counts), predictions(counts, groups=2)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = [leaf.bfloat16() for leaf in leaves]
        theirs, ours = (call(function, rounded, labels, config(), denoising) for function in (THEIRS, OURS))
    assert {value.dtype for value in (ours[0], *ours[1].values())} == {torch.float32}
    torch.testing.assert_close(ours[0], theirs[0].float(), rtol=1e-2, atol=0)


def test_more_boxes_than_queries_and_other_costs_are_transformers(monkeypatch):
    calls = []
    monkeypatch.setattr(
        adapter.loss_rt_detr, "RTDetrForObjectDetectionLoss", lambda *a, **k: calls.append(a) or THEIRS(*a, **k)
    )
    counts = (QUERIES + 2, 1)
    labels, (leaves, _) = labels_of(counts), predictions(counts)
    for changed in ({}, {"matcher_alpha": 0.5}, {"matcher_gamma": 1.0}):
        found, expected = (call(function, leaves, labels, config(**changed))[0] for function in (OURS, THEIRS))
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        labels = labels_of((1, 2))
    assert len(calls) == 3
    call(OURS, leaves, labels, config())
    assert len(calls) == 3


@pytest.mark.parametrize("what", ["label", "target", "prediction", "denoising"])
def test_what_transformers_refuses_is_refused_on_a_cpu_and_makes_the_loss_nan_where_a_look_would_wait(
    what, monkeypatch
):
    counts = (2, 3)
    labels, (leaves, denoising) = labels_of(counts), predictions(counts, groups=1)
    queries = denoising["dn_num_split"][0]
    with torch.no_grad():
        if what == "label":
            labels[1]["class_labels"][0] = LABELS + 1
        elif what == "target":
            labels[1]["boxes"][0, 2] = -0.1
        elif what == "prediction":
            leaves[1][0, 0, queries + 1, 2] = -0.1
        else:
            leaves[1][0, 0, denoising["dn_positive_idx"][0][1], 2] = -0.1
    for function in (THEIRS, OURS):
        with pytest.raises((IndexError, ValueError, RuntimeError)):
            call(function, leaves, labels, config(), denoising)
    monkeypatch.setattr(adapter, "has_values", lambda tensor: False)
    loss, by_name, _ = call(OURS, leaves, labels, config(), denoising)
    assert loss.isnan()
    assert all(value.isnan() for value in by_name.values())
    assert torch.autograd.grad(loss, leaves[0])[0].isnan().any()  # which gradient scalers and logs see


def test_a_denoising_box_whose_centre_is_no_number_is_refused_on_a_cpu(monkeypatch):
    counts = (2, 3)
    labels, (leaves, denoising) = labels_of(counts), predictions(counts, groups=1)
    with torch.no_grad():
        leaves[1][0, 0, denoising["dn_positive_idx"][0][1], 0] = torch.nan
    for function in (THEIRS, OURS):
        with pytest.raises(ValueError, match="boxes1 must be"):
            call(function, leaves, labels, config(), denoising)
    monkeypatch.setattr(adapter, "has_values", lambda tensor: False)
    assert call(OURS, leaves, labels, config(), denoising)[0].isnan()


def waits(function):
    with FakeTensorMode(), torch.device("cuda"), AnswersYes():
        leaves, denoising = predictions((3, 2), groups=2, device="cuda")
        labels = labels_of((3, 2), "cuda")
        return count(lambda: call(function, leaves, labels, config(), denoising))


def test_the_host_never_waits_where_transformers_loss_makes_it_wait_for_every_layer(monkeypatch):
    def solve(cost):
        order = torch.arange(cost.shape[1], device="cpu")
        return order, order

    monkeypatch.setattr(loss_rt_detr, "linear_sum_assignment", solve)
    theirs, ours = waits(THEIRS), waits(OURS)
    assert theirs.total_synchronisations >= 5 * 4
    assert ours.total_synchronisations == 0, ours.synchronisations
    assert ours.launches["linear_assignment_kernel"] == ours.launches["matching_cost_kernel"] == 1
    assert 5 * ours.total_launches < theirs.total_launches


def test_backward_never_waits():
    leaves, denoising = predictions((3, 2), groups=2, device="meta")
    leaves = [leaf.requires_grad_() for leaf in leaves]
    counts = count(lambda: call(OURS, leaves, labels_of((3, 2), "meta"), config(), denoising)[0].backward())
    assert counts.total_synchronisations == 0, counts.synchronisations
    assert all(leaf.grad.shape == leaf.shape for leaf in leaves)


@pytest.mark.gpu
def test_on_a_gpu_the_loss_is_transformers_and_nothing_waits():
    counts = (3, 0, 4)
    labels, (leaves, denoising) = labels_of(counts, DEVICE), predictions(counts, groups=2, device=DEVICE)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    call(OURS, leaves, labels, config(), denoising)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(OURS, leaves, labels, config(), denoising)[0].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    if reason := why_not_loss(THEIRS, config()):
        pytest.skip(reason)  # and `accelerate` leaves it alone
    both = (THEIRS, OURS)
    assert_alike(lambda f: call(f, leaves, labels, config(), denoising), both, leaves, rtol=1e-3, atol=1e-5)
