"""transformers' detection losses beside ours: the same numbers and gradients, no waits, and left alone what is not known."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.hardware import DEVICE
from detr_fast import use_backend
from detr_fast.testing import count
from tests.seen import AnswersYes, Copies

transformers = pytest.importorskip("transformers")
pytest.importorskip("scipy")

from transformers.loss import loss_deformable_detr, loss_for_object_detection  # noqa: E402

from detr_fast.adapters import hugging_face_loss_detr as adapter  # noqa: E402
from detr_fast.adapters import hugging_face_targets as targets  # noqa: E402

LAYERS, QUERIES, LABELS = 3, 7, 5
PAIRS = {
    "softmax": (loss_for_object_detection.ForObjectDetectionLoss, adapter.object_detection_loss),
    "focal": (loss_deformable_detr.DeformableDetrForObjectDetectionLoss, adapter.focal_object_detection_loss),
}
NAMES = ["loss_ce", "loss_bbox", "loss_giou", "cardinality_error"]
CASES = {"an-image-without": (3, 0, 4), "no-objects": (0, 0), "more-than-queries": (9, 2), "one-image": (1,)}


def config(**options):
    costs = {"class_cost": 1.5, "bbox_cost": 4, "giou_cost": 2.5}
    weights = {"bbox_loss_coefficient": 3, "giou_loss_coefficient": 1.5, "eos_coefficient": 0.2, "focal_alpha": 0.25}
    rest = {"num_labels": LABELS, "auxiliary_loss": True, "decoder_layers": LAYERS}
    return SimpleNamespace(**{**costs, **weights, **rest, **options})


def labels_of(counts, device=None):
    return [
        {
            "class_labels": torch.randint(LABELS, (n,), device=device),
            "boxes": torch.rand(n, 4, device=device) * 0.5 + 0.2,
        }
        for n in counts
    ]


def predictions(name, images, device=None):
    """Leaves: logits and boxes of all layers."""
    logits = torch.randn(LAYERS, images, QUERIES, LABELS + (name == "softmax"), device=device)
    boxes = torch.rand(LAYERS, images, QUERIES, 4, device=device) * 0.5 + 0.2
    return logits.requires_grad_(), boxes.requires_grad_()


def call(function, logits, boxes, labels, config):
    layers = (logits, boxes) if config.auxiliary_loss else (None, None)
    return function(logits[-1], labels, logits.device, boxes[-1], config, *layers)


@pytest.mark.parametrize("auxiliary", [True, False], ids=["auxiliary", "last-layer"])
@pytest.mark.parametrize("counts", CASES.values(), ids=CASES)
@pytest.mark.parametrize("name", PAIRS)
def test_losses_names_and_gradients_are_transformers(name, counts, auxiliary, fp64):
    settings, labels = config(auxiliary_loss=auxiliary), labels_of(counts)
    logits, boxes = predictions(name, len(counts))
    results = []
    for function in PAIRS[name]:
        with use_backend(matching_cost="eager"):
            loss, by_name, layers = call(function, logits, boxes, labels, settings)
        gradients = torch.autograd.grad(loss, (logits, boxes))
        results.append((loss, by_name, layers, gradients))
    (loss, by_name, layers, gradients), (own_loss, own, own_layers, own_gradients) = results
    assert list(own) == list(by_name) == NAMES + [f"{n}_{i}" for i in range(LAYERS - 1) if auxiliary for n in NAMES]
    torch.testing.assert_close(own_loss, loss, rtol=1e-12, atol=1e-12)
    for key, value in by_name.items():
        torch.testing.assert_close(own[key], value, rtol=1e-12 if key[:4] == "loss" else 1e-6, atol=1e-12, msg=key)
    torch.testing.assert_close(own_gradients, gradients, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(own_layers, layers, rtol=0, atol=0)


def test_one_layer_on_a_cpu_is_transformers_which_is_faster_there(monkeypatch):
    labels, (logits, boxes) = labels_of((2, 3)), predictions("softmax", 2)
    asked, theirs = [], loss_for_object_detection.ForObjectDetectionLoss
    monkeypatch.setattr(
        loss_for_object_detection, "ForObjectDetectionLoss", lambda *a, **k: asked.append(a) or theirs(*a, **k)
    )
    for auxiliary, calls in ((True, 0), (False, 1)):
        call(PAIRS["softmax"][1], logits, boxes, labels, config(auxiliary_loss=auxiliary))
        assert len(asked) == calls


def test_layers_without_a_weight_are_in_the_dictionary_and_not_in_the_sum():
    labels, settings = labels_of((2, 3)), config(decoder_layers=2)
    logits, boxes = predictions("softmax", 2)
    theirs, ours = (call(function, logits, boxes, labels, settings) for function in PAIRS["softmax"])
    assert "loss_ce_1" in ours[1]
    torch.testing.assert_close(ours[0], theirs[0])


@pytest.mark.parametrize("name", PAIRS)
def test_under_autocast_the_loss_is_transformers_within_the_rounding_of_predictions(name):
    labels, (logits, boxes) = labels_of((2, 0, 3)), predictions(name, 3)
    with torch.autocast("cpu", torch.bfloat16):
        logits, boxes = logits @ torch.eye(logits.shape[-1]), boxes.bfloat16()
        assert logits.dtype == torch.bfloat16
        theirs, ours = (call(function, logits, boxes, labels, config()) for function in PAIRS[name])
    assert {value.dtype for value in (ours[0], *ours[1].values())} == {torch.float32}
    torch.testing.assert_close(ours[0], theirs[0], rtol=5e-3, atol=0)


def waits(name, function):
    with FakeTensorMode(), torch.device("cuda"), AnswersYes():
        logits, boxes = (t.detach() for t in predictions(name, 2, "cuda"))
        labels = labels_of((3, 2), "cuda")
        return count(lambda: call(function, logits, boxes, labels, config()))


@pytest.mark.parametrize("name", PAIRS)
def test_the_host_never_waits_where_transformers_loss_makes_it_wait_for_every_layer(name, monkeypatch):
    def solve(cost):
        order = torch.arange(cost.shape[1], device="cpu")
        return order, order

    for module in (loss_for_object_detection, loss_deformable_detr):
        monkeypatch.setattr(module, "linear_sum_assignment", solve)
    theirs, ours = PAIRS[name]
    assert waits(name, theirs).total_synchronisations >= 5 * LAYERS
    counts = waits(name, ours)
    assert counts.total_synchronisations == 0, counts.synchronisations
    assert counts.launches["linear_assignment_kernel"] == counts.launches["matching_cost_kernel"] == 1


@pytest.mark.parametrize("name", PAIRS)
def test_backward_never_waits(name):
    logits, boxes = predictions(name, 2, "meta")
    labels = labels_of((3, 2), "meta")
    counts = count(lambda: call(PAIRS[name][1], logits, boxes, labels, config())[0].backward())
    assert counts.total_synchronisations == 0, counts.synchronisations
    assert logits.grad.shape == logits.shape


def test_what_the_host_knows_of_targets_travels_in_one_copy_that_does_not_block():
    labels = labels_of((3, 2), "meta")
    with Copies() as copies:
        targets.padded(labels, torch.device("meta"), LABELS)
    assert copies.blocking == [False]


def test_other_numbers_of_boxes_compile_nothing_again():
    torch._dynamo.reset()
    graphs = CompileCounter()
    ours = PAIRS["softmax"][1]
    compiled = torch.compile(
        lambda logits, boxes, labels: call(ours, logits * 2, boxes, labels, config()), backend=graphs
    )
    logits, boxes = predictions("softmax", 2)
    for n, counts in enumerate(((2, 5), (3, 4), (4, 3), (5, 2))):
        labels = labels_of(counts)
        found = compiled(logits, boxes, labels)[0]
        torch.testing.assert_close(found, call(ours, logits * 2, boxes, labels, config())[0])
        if n == 1:
            before = graphs.frame_count
    assert 0 < graphs.frame_count == before


# ---------------------------------------------------------------------------------------------------------------------
# What ours does not take, and what is wrong.


def wrong(label=None, size=None, center=None, prediction=None):
    labels, (logits, boxes) = labels_of((2, 3)), predictions("softmax", 2)
    with torch.no_grad():
        if label is not None:
            labels[1]["class_labels"][0] = label
        if size is not None:
            labels[1]["boxes"][0, 2] = size
        if center is not None:
            labels[1]["boxes"][0, 0] = center
        if prediction is not None:
            boxes[0, 1, 2] = prediction
    return logits, boxes, labels, config()


@pytest.mark.parametrize(
    "what",
    [{"label": 9}, {"size": -0.1}, {"center": float("nan")}, {"prediction": float("nan")}, {"prediction": -0.1}],
    ids=["label", "negative-size", "nan-target", "nan-box", "negative-box"],
)
def test_what_transformers_refuses_is_refused_on_a_cpu_and_makes_the_loss_nan_where_a_look_would_wait(
    what, monkeypatch
):
    case = wrong(**what)
    errors = []
    for function in PAIRS["softmax"]:
        with pytest.raises((IndexError, ValueError)) as error:
            call(function, *case)
        errors.append(type(error.value))
    assert errors[0] is errors[1]
    monkeypatch.setattr(adapter, "has_values", lambda tensor: False)
    loss, by_name, _ = call(PAIRS["softmax"][1], *case)
    assert loss.isnan()
    assert all(value.isnan() for name, value in by_name.items() if name.startswith("loss"))
    assert torch.autograd.grad(loss, case[0])[0].isnan().any()  # which gradient scalers and logs see
    assert call(PAIRS["softmax"][1], *wrong())[0].isfinite()


@pytest.mark.parametrize("looks", [True, False], ids=["cpu", "where-a-look-would-wait"])
def test_a_box_labelled_no_object_trains_as_transformers_trains_it(looks, monkeypatch, fp64):
    case = wrong(label=LABELS)
    monkeypatch.setattr(adapter, "has_values", lambda tensor: looks)
    (expected, by_name, _), (found, own, _) = (call(function, *case) for function in PAIRS["softmax"])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for name in by_name:
        torch.testing.assert_close(own[name].double(), by_name[name].double(), rtol=1e-6, atol=1e-12, msg=name)
    gradients = (torch.autograd.grad(loss, case[:2]) for loss in (found, expected))
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


@pytest.mark.interpreter
@pytest.mark.parametrize("looks", [True, False], ids=["cpu", "where-a-look-would-wait"])
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_a_box_that_cross_entropy_ignores_has_no_part_in_the_class_loss(backend, looks, monkeypatch):
    labels = labels_of((2, 3))
    labels[1]["class_labels"][0] = -100
    logits = torch.randn(LAYERS, 2, QUERIES, 102).requires_grad_()  # fewer than 100 the matcher has an error for
    boxes = predictions("softmax", 2)[1]
    monkeypatch.setattr(adapter, "has_values", lambda tensor: looks)
    case = logits, boxes, labels, config(num_labels=101)
    expected, by_name, _ = call(PAIRS["softmax"][0], *case)
    with use_backend(detection_losses=backend):
        found, own, _ = call(PAIRS["softmax"][1], *case)
    torch.testing.assert_close(found, expected)
    for name in by_name:
        torch.testing.assert_close(own[name], by_name[name], msg=name)
    torch.testing.assert_close(*(torch.autograd.grad(loss, case[:2]) for loss in (found, expected)))


@pytest.mark.parametrize(("name", "label"), [("softmax", -1), ("softmax", LABELS + 1), ("focal", LABELS)])
def test_other_labels_raise_transformers_error_and_make_the_loss_nan_where_a_look_would_wait(name, label, monkeypatch):
    labels, (logits, boxes) = labels_of((2, 3)), predictions(name, 2)
    labels[1]["class_labels"][0] = label
    for function in PAIRS[name]:
        with pytest.raises(IndexError):
            call(function, logits, boxes, labels, config())
    monkeypatch.setattr(adapter, "has_values", lambda tensor: False)
    assert call(PAIRS[name][1], logits, boxes, labels, config())[0].isnan()


@pytest.mark.parametrize(
    ("change", "settings"),
    [
        (lambda target: target | {"class_labels": target["class_labels"].int()}, {}),
        (lambda target: target | {"boxes": target["boxes"][:0]}, {}),
        (lambda target: {"boxes": target["boxes"]}, {}),
        (lambda target: target, {"num_labels": LABELS - 1}),
        (lambda target: target, {"class_cost": 0, "bbox_cost": 0, "giou_cost": 0}),
    ],
    ids=["int32", "lengths", "no-labels", "classes", "no-costs"],
)
def test_what_is_not_as_documented_is_transformers_to_judge(change, settings):
    labels, (logits, boxes) = [change(t) for t in labels_of((2, 3))], predictions("softmax", 2)
    errors = []
    for function in PAIRS["softmax"]:
        with pytest.raises(Exception) as error:
            call(function, logits, boxes, labels, config(**settings))
        errors.append(str(error.value))
    assert errors[0] == errors[1]


def test_layers_in_a_list_are_transformers():
    labels, (logits, boxes) = labels_of((2, 3)), predictions("softmax", 2)
    layers = ([*logits], [*boxes])
    arguments = (logits[-1], labels, logits.device, boxes[-1], config(), *layers)
    theirs, ours = (function(*arguments)[0] for function in PAIRS["softmax"])
    assert torch.equal(ours, theirs)


def test_another_alpha_is_transformers():
    labels, (logits, boxes) = labels_of((2, 3)), predictions("focal", 2)
    theirs, ours = (call(function, logits, boxes, labels, config(focal_alpha=0.5))[0] for function in PAIRS["focal"])
    assert torch.equal(ours, theirs)


@pytest.mark.gpu
@pytest.mark.parametrize("name", PAIRS)
def test_on_a_gpu_the_loss_is_transformers_and_nothing_waits(name):
    labels, (logits, boxes) = labels_of((3, 0, 4), DEVICE), predictions(name, 3, DEVICE)
    theirs, ours = PAIRS[name]
    expected = call(theirs, logits, boxes, labels, config())[0]
    call(ours, logits, boxes, labels, config())  # compiles, and sends the weights
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = call(ours, logits, boxes, labels, config())[0]
        gradients = torch.autograd.grad(found, (logits, boxes))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, (logits, boxes)), rtol=1e-3, atol=1e-6)
