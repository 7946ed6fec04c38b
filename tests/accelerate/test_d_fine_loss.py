"""transformers' loss of D-FINE beside ours: the same numbers and gradients, and no waits."""

from __future__ import annotations

import random

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.hardware import DEVICE
from detr_fast.testing import count
from tests.seen import AnswersYes

transformers = pytest.importorskip("transformers")
pytest.importorskip("scipy")

from transformers.loss import loss_d_fine, loss_rt_detr  # noqa: E402

from detr_fast.adapters import hugging_face_loss_d_fine as adapter  # noqa: E402
from detr_fast.adapters import hugging_face_loss_rt_detr as rt_detr  # noqa: E402
from detr_fast.adapters.hugging_face_loss import why_not_loss  # noqa: E402
from tests.accelerate import test_rt_detr_loss as base  # noqa: E402
from tests.accelerate.test_hugging_face_loss import LABELS, labels_of  # noqa: E402

QUERIES, BINS = base.QUERIES, 8
THEIRS, OURS = loss_d_fine.DFineForObjectDetectionLoss, adapter.d_fine_object_detection_loss


def config(**options):
    edges = {"weight_loss_fgl": 0.75, "weight_loss_ddf": 1.5, "max_num_bins": BINS, "reg_scale": 4.0, "up": 0.5}
    return base.config(**edges, **options)


def predictions(counts, layers=3, groups=0, device=None, before=0):
    """RT-DETR's leaves, of which some boxes lie beyond the image, and the edges' distributions; then their references.

    before: how many more predictions there are than distributions, as models also predict before their first layer.
    """
    leaves, denoising = base.predictions(counts, layers + before, groups, device)
    with torch.no_grad():
        leaves[1].mul_(1.5)
    shape = (len(counts), layers, leaves[0].shape[2])
    corners = torch.randn(*shape, 4 * (BINS + 1), device=device) * 3
    references = torch.rand(*shape, 4, device=device) * 0.5 + 0.2
    return [*leaves, corners.requires_grad_(device is None)], denoising, references


def call(function, leaves, labels, config, denoising, references):
    *leaves, corners = leaves
    return base.call(function, leaves, labels, config, denoising, corners, references)


@pytest.mark.parametrize("seed", range(12))
def test_losses_names_and_gradients_are_transformers(seed, fp64, monkeypatch):
    monkeypatch.setattr(adapter.loss_d_fine, "DFineForObjectDetectionLoss", None)  # ours asks nobody
    monkeypatch.setattr(
        torch.Tensor, "float", torch.Tensor.double
    )  # theirs mixes fp32 into fp64, which PyTorch refuses
    torch.manual_seed(seed)
    chance = random.Random(seed)
    counts = [chance.choice((0, 1, 2, 5, QUERIES)) for _ in range(chance.randint(1, 4))]
    layers = 1 + seed % 6
    groups = chance.randint(1, 3) if seed % 3 and max(counts) else 0
    settings = config(auxiliary_loss=seed % 5 != 4)
    leaves, denoising, references = predictions(counts, layers, groups, before=seed % 2)
    labels = labels_of(counts)
    base.assert_alike(
        lambda function: call(function, leaves, labels, settings, denoising, references), (THEIRS, OURS), leaves
    )


def test_layers_that_are_alike_have_nothing_to_distil():
    counts = (2, 1)
    leaves, denoising, references = predictions(counts, groups=1)
    with torch.no_grad():
        leaves[4][:, 1] = leaves[4][:, 2]
    labels = labels_of(counts)
    found, expected = (call(f, leaves, labels, config(), denoising, references)[1] for f in (OURS, THEIRS))
    for name in ("loss_ddf_aux_1", "loss_ddf_dn_1", "loss_ddf_dn_2"):
        assert found[name] == expected[name] == 0
    assert found["loss_ddf_aux_0"] > 0


def test_under_autocast_the_loss_is_transformers_within_the_rounding_of_predictions():
    counts = (2, 0, 3)
    leaves, denoising, references = predictions(counts, groups=2)
    labels = labels_of(counts)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = [leaf.bfloat16() for leaf in leaves]
        theirs, ours = (call(f, rounded, labels, config(), denoising, references)[0] for f in (THEIRS, OURS))
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs.float(), rtol=2e-2, atol=0)


def test_what_is_not_as_documented_is_transformers_to_judge(monkeypatch):
    calls = []
    monkeypatch.setattr(
        adapter.loss_d_fine, "DFineForObjectDetectionLoss", lambda *a, **k: calls.append(a) or THEIRS(*a, **k)
    )
    counts = (QUERIES + 2, 1)
    leaves, denoising, references = predictions(counts)
    labels = labels_of(counts)
    found, expected = (call(f, leaves, labels, config(), denoising, references)[0] for f in (OURS, THEIRS))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    for function in (THEIRS, OURS):
        with pytest.raises((IndexError, RuntimeError)):
            call(function, leaves, labels_of((1, 1)), config(), denoising, references[:, :, :2])
    assert len(calls) == 2


def test_a_label_that_transformers_refuses_makes_the_loss_nan_where_a_look_would_wait(monkeypatch):
    counts = (2, 3)
    leaves, denoising, references = predictions(counts, groups=1)
    labels = labels_of(counts)
    labels[1]["class_labels"][0] = LABELS + 1
    for function in (THEIRS, OURS):
        with pytest.raises((IndexError, RuntimeError)):
            call(function, leaves, labels, config(), denoising, references)
    monkeypatch.setattr(rt_detr, "has_values", lambda tensor: False)
    loss, by_name, _ = call(OURS, leaves, labels, config(), denoising, references)
    assert loss.isnan()
    assert all(value.isnan() for value in by_name.values())


def test_the_host_never_waits_where_transformers_loss_makes_it_wait_for_every_layer(monkeypatch):
    def solve(cost):
        order = torch.arange(cost.shape[1], device="cpu")
        return order, order

    monkeypatch.setattr(loss_rt_detr, "linear_sum_assignment", solve)
    with FakeTensorMode(), torch.device("cuda"), AnswersYes():
        leaves, denoising, references = predictions((3, 2), groups=2, device="cuda")
        labels = labels_of((3, 2), "cuda")
        ours = count(lambda: call(OURS, leaves, labels, config(), denoising, references))
    assert ours.total_synchronisations == 0, ours.synchronisations
    assert ours.launches["linear_assignment_kernel"] == ours.launches["matching_cost_kernel"] == 1


def test_backward_never_waits():
    leaves, denoising, references = predictions((3, 2), groups=2, device="meta")
    leaves = [leaf.requires_grad_() for leaf in leaves]
    labels = labels_of((3, 2), "meta")
    counts = count(lambda: call(OURS, leaves, labels, config(), denoising, references)[0].backward())
    assert counts.total_synchronisations == 0, counts.synchronisations
    assert all(leaf.grad.shape == leaf.shape for leaf in leaves)


@pytest.mark.gpu
def test_on_a_gpu_the_loss_is_transformers_and_nothing_waits():
    counts = (3, 0, 4)
    leaves, denoising, references = predictions(counts, groups=2, device=DEVICE)
    leaves, labels = [leaf.requires_grad_() for leaf in leaves], labels_of(counts, DEVICE)
    call(OURS, leaves, labels, config(), denoising, references)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(OURS, leaves, labels, config(), denoising, references)[0].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    if reason := why_not_loss(THEIRS, config()):
        pytest.skip(reason)  # and `accelerate` leaves it alone
    base.assert_alike(
        lambda f: call(f, leaves, labels, config(), denoising, references), (THEIRS, OURS), leaves, 1e-3, 1e-5
    )
