"""transformers' loss of LW-DETR and RF-DETR beside ours: the same numbers and gradients, and no waits."""

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

from transformers.loss import loss_lw_detr  # noqa: E402

from detr_fast.adapters import hugging_face_loss_lw_detr as adapter  # noqa: E402
from tests.accelerate.test_hugging_face_loss import LABELS, labels_of  # noqa: E402
from tests.accelerate.test_rt_detr_loss import assert_alike  # noqa: E402

QUERIES = 7  # of a group
THEIRS, OURS = loss_lw_detr.LwDetrForObjectDetectionLoss, adapter.lw_detr_object_detection_loss


def config(**options):
    costs = {"class_cost": 1.5, "bbox_cost": 4.0, "giou_cost": 2.5}
    weights = {"class_loss_coefficient": 1.5, "bbox_loss_coefficient": 3.0, "giou_loss_coefficient": 0.5}
    rest = {"num_labels": LABELS, "auxiliary_loss": True, "decoder_layers": 3, "focal_alpha": 0.3, "group_detr": 2}
    return SimpleNamespace(**{**costs, **weights, **rest, **options})


def predictions(images, settings, queries=None, device=None):
    """Leaves: logits and boxes of all layers, (L, B, Q, …), and those of the encoder."""
    queries = QUERIES * settings.group_detr if queries is None else queries
    leaves = []
    for shape in ((settings.decoder_layers, images, queries), (images, queries)):
        leaves.append(torch.randn(*shape, LABELS, device=device))
        leaves.append(torch.rand(*shape, 4, device=device) * 0.5 + 0.2)
    return [leaf.requires_grad_(device is None) for leaf in leaves]


def call(function, leaves, labels, config):
    logits, boxes, *encoder = leaves
    layers = (logits, boxes) if config.auxiliary_loss else (None, None)
    return function(logits[-1], labels, logits.device, boxes[-1], config, *layers, *encoder)


@pytest.mark.parametrize("seed", range(10))
def test_losses_names_and_gradients_are_transformers(seed, fp64, monkeypatch):
    monkeypatch.setattr(adapter.loss_lw_detr, "LwDetrForObjectDetectionLoss", None)  # ours asks nobody
    torch.manual_seed(seed)
    chance = random.Random(seed)
    counts = [chance.choice((0, 1, 2, 5, QUERIES)) for _ in range(chance.randint(1, 4))]
    groups = chance.randint(1, 3)
    settings = config(auxiliary_loss=seed % 4 != 3, decoder_layers=1 + seed % 6, group_detr=groups)
    # In evaluation there is one group of queries, which the loss takes for several, and leaves some out.
    leaves = predictions(len(counts), settings, QUERIES * groups + seed % groups)
    labels = labels_of(counts)
    assert_alike(lambda function: call(function, leaves, labels, settings), (THEIRS, OURS), leaves, atol=1e-12)


def test_layers_without_a_weight_are_in_the_dictionary_and_not_in_the_sum():
    settings = config()
    leaves, labels = predictions(2, settings), labels_of((2, 3))
    settings.decoder_layers = 2
    theirs, ours = (call(function, leaves, labels, settings) for function in (THEIRS, OURS))
    assert "loss_ce_1" in ours[1]
    torch.testing.assert_close(ours[0], theirs[0])


def test_a_logit_whose_sigmoid_is_one_or_none_is_no_reason_for_an_infinite_loss():
    settings = config()
    leaves, labels = predictions(2, settings), labels_of((2, 3))
    with torch.no_grad():
        leaves[0][0, 0, 0, :2] = torch.tensor([40.0, -120.0])
    theirs, ours = (call(function, leaves, labels, settings)[0] for function in (THEIRS, OURS))
    assert not theirs.isfinite()
    assert ours.isfinite()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(ours, leaves))


def test_under_autocast_the_loss_is_transformers_within_the_rounding_of_predictions():
    settings = config()
    leaves, labels = predictions(3, settings), labels_of((2, 0, 3))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = [leaf.bfloat16() for leaf in leaves]
        theirs, ours = (call(function, rounded, labels, settings) for function in (THEIRS, OURS))
    assert {value.dtype for value in (ours[0], *ours[1].values())} == {torch.float32}
    torch.testing.assert_close(ours[0], theirs[0].float(), rtol=2e-2, atol=0)


def test_more_boxes_than_a_group_has_queries_and_an_encoder_without_predictions_are_transformers(monkeypatch):
    calls = []
    monkeypatch.setattr(
        adapter.loss_lw_detr, "LwDetrForObjectDetectionLoss", lambda *a, **k: calls.append(a) or THEIRS(*a, **k)
    )
    settings, labels = config(), labels_of((QUERIES + 2, 1))
    leaves = predictions(2, settings)
    found, expected = (call(function, leaves, labels, settings)[0] for function in (OURS, THEIRS))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    with pytest.raises(AttributeError):
        call(OURS, (*leaves[:2], None, None), labels_of((1, 1)), settings)
    assert len(calls) == 2


def test_numbers_of_boxes_are_averaged_over_processes(monkeypatch):
    settings = config()
    leaves, labels = predictions(2, settings), labels_of((2, 3))
    monkeypatch.setattr(loss_lw_detr, "_is_torch_distributed_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda total, **options: total.add_(3.0))
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    theirs, ours = (call(function, leaves, labels, settings)[0] for function in (THEIRS, OURS))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("what", ["label", "prediction", "encoder"])
def test_what_transformers_refuses_is_refused_on_a_cpu_and_makes_the_loss_nan_where_a_look_would_wait(
    what, monkeypatch
):
    settings = config()
    leaves, labels = predictions(2, settings), labels_of((2, 3))
    with torch.no_grad():
        if what == "label":
            labels[1]["class_labels"][0] = LABELS + 1
        else:
            leaves[3 if what == "encoder" else 1][0, 1, ..., 2] = -0.1
    for function in (THEIRS, OURS):
        with pytest.raises((IndexError, ValueError, RuntimeError)):
            call(function, leaves, labels, settings)
    monkeypatch.setattr(adapter, "has_values", lambda tensor: False)
    loss, by_name, _ = call(OURS, leaves, labels, settings)
    assert loss.isnan()
    assert all(value.isnan() for name, value in by_name.items() if name.startswith("loss"))


def waits(function):
    settings = config()
    with FakeTensorMode(), torch.device("cuda"), AnswersYes():
        leaves, labels = predictions(2, settings, device="cuda"), labels_of((3, 2), "cuda")
        return count(lambda: call(function, leaves, labels, settings))


def test_the_host_never_waits_where_transformers_loss_makes_it_wait_for_every_layer(monkeypatch):
    def solve(cost):
        import numpy as np

        return np.arange(cost.shape[1]), np.arange(cost.shape[1])

    monkeypatch.setattr(loss_lw_detr, "linear_sum_assignment", solve)
    theirs, ours = waits(THEIRS), waits(OURS)
    assert theirs.total_synchronisations >= 5 * 4
    assert ours.total_synchronisations == 0, ours.synchronisations
    assert ours.launches["linear_assignment_kernel"] == ours.launches["matching_cost_kernel"] == 1
    assert 4 * ours.total_launches < theirs.total_launches


def test_backward_never_waits():
    settings = config()
    leaves = [leaf.requires_grad_() for leaf in predictions(2, settings, device="meta")]
    counts = count(lambda: call(OURS, leaves, labels_of((3, 2), "meta"), settings)[0].backward())
    assert counts.total_synchronisations == 0, counts.synchronisations
    assert all(leaf.grad.shape == leaf.shape for leaf in leaves)


@pytest.mark.gpu
def test_on_a_gpu_the_loss_is_transformers_and_nothing_waits():
    settings = config()
    leaves = [leaf.requires_grad_() for leaf in predictions(3, settings, device=DEVICE)]
    labels = labels_of((3, 0, 4), DEVICE)
    call(OURS, leaves, labels, settings)  # compiles, and sends the weights
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(OURS, leaves, labels, settings)[0].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_alike(lambda f: call(f, leaves, labels, settings), (THEIRS, OURS), leaves, rtol=1e-3, atol=1e-5)
