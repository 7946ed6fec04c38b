"""Padded images and padded targets; bad targets are refused on the host, by name."""

from __future__ import annotations

import pytest
import torch

from detr_fast.models import NestedTensor, TargetError, Targets, nested_tensor_from_list


def test_images_are_padded_to_the_right_and_to_the_bottom():
    images = [torch.rand(3, 4, 6), torch.rand(3, 5, 2)]
    batch = nested_tensor_from_list(images)
    assert batch.tensors.shape == (2, 3, 5, 6)
    assert batch.padded
    for image, tensor, mask in zip(images, batch.tensors, batch.mask):
        height, width = image.shape[1:]
        assert torch.equal(tensor[:, :height, :width], image)
        assert tensor.sum() == pytest.approx(image.sum().item(), rel=1e-5)  # zeros elsewhere
        assert not mask[:height, :width].any()
        assert mask.sum() == mask.numel() - height * width


@pytest.mark.parametrize(
    ("arguments", "shape"),
    [
        ({}, (5, 6)),
        ({"size": (7, 9)}, (7, 9)),
        ({"size_divisor": 4}, (8, 8)),
        ({"size": (7, 9), "size_divisor": 8}, (8, 16)),
    ],
)
def test_the_padded_size_is_the_largest_or_the_given_one_rounded_up(arguments, shape):
    batch = nested_tensor_from_list([torch.rand(3, 4, 6), torch.rand(3, 5, 2)], **arguments)
    assert batch.tensors.shape[2:] == shape
    assert batch.mask.shape[1:] == shape


def test_a_batch_of_equal_images_promises_that_nothing_is_padded():
    batch = nested_tensor_from_list([torch.rand(3, 4, 6)] * 2)
    assert not batch.padded
    assert not batch.mask.any()
    assert nested_tensor_from_list([torch.rand(3, 4, 6)] * 2, size=(4, 8)).padded


@pytest.mark.parametrize(
    ("images", "size", "message"),
    [
        ([], None, "got no images"),
        ([torch.rand(3, 4, 4), torch.rand(1, 4, 4)], None, r"image 1 has shape \(1, 4, 4\); expected \(3, H, W\)"),
        ([torch.rand(3, 4, 9)], (8, 8), "image 0 is 4×9 .* but the batch is 8×8"),
    ],
)
def test_images_that_make_no_batch_are_refused(images, size, message):
    with pytest.raises(ValueError, match=message):
        nested_tensor_from_list(images, size)


def test_nested_tensors_keep_their_promise_when_they_move():
    batch = NestedTensor(torch.rand(1, 3, 2, 2), torch.zeros(1, 2, 2, dtype=torch.bool), padded=False)
    moved = batch.to("meta", non_blocking=True)
    assert moved.tensors.is_meta
    assert moved.mask.is_meta
    assert not moved.padded
    assert moved.decompose()[0] is moved.tensors


def one(boxes: list[list[float]], labels: list[int], **extra: object) -> dict:
    return {"boxes": torch.tensor(boxes).view(-1, 4), "labels": torch.tensor(labels, dtype=torch.int64), **extra}


GOOD = [0.5, 0.5, 0.25, 0.25]


def test_targets_are_padded_to_the_capacity():
    targets = Targets.from_list([one([GOOD, [0.1, 0.2, 0.1, 0.1]], [3, 1]), one([], [])], capacity=4)
    assert targets.boxes.shape == (2, 4, 4)
    assert targets.labels.tolist() == [[3, 1, 0, 0], [0, 0, 0, 0]]
    assert targets.counts.tolist() == [2, 0]
    assert targets.valid.tolist() == [[True, True, False, False], [False] * 4]
    assert targets.boxes[0, 0].tolist() == GOOD
    assert not targets.boxes[0, 2:].any()
    assert not targets.boxes[1].any()
    assert targets.to("meta").valid.shape == (2, 4)


def test_without_a_capacity_the_largest_image_sets_it():
    assert Targets.from_list([one([GOOD] * 3, [0, 1, 2]), one([GOOD], [0])]).boxes.shape == (2, 3, 4)
    assert Targets.from_list([one([], []), one([], [])]).boxes.shape == (2, 0, 4)


def test_an_empty_list_of_boxes_is_legal_however_it_is_shaped():
    targets = Targets.from_list(
        [{"boxes": torch.tensor([]), "labels": torch.tensor([], dtype=torch.int64)}], capacity=2
    )
    assert targets.counts.tolist() == [0]


def test_boxes_that_touch_the_border_are_legal():
    # (0.7 + 0.3 in float32 is a little over 1)
    assert Targets.from_list([one([[0.5, 0.5, 1.0, 1.0 + 1e-7]], [0])]).counts.tolist() == [1]


@pytest.mark.parametrize(
    ("box", "shown"),
    [
        ([120.0, 80.0, 40.0, 30.0], "[120.0, 80.0, 40.0, 30.0]"),
        ([0.5, 0.5, 0.0, 0.2], "[0.5, 0.5, 0.0, 0.2]"),
        ([0.5, 0.5, 0.2, -0.1], "-0.1]"),
        ([0.5, -0.1, 0.2, 0.1], "-0.1"),
        ([0.5, 0.5, float("nan"), 0.1], "nan"),
        ([0.5, 0.5, float("inf"), 0.1], "inf"),
    ],
)
def test_boxes_outside_the_image_or_without_area_are_refused_by_image(box, shown):
    targets = [one([GOOD], [0], image_id=torch.tensor(7)), one([GOOD, box], [0, 0], image_id=torch.tensor(42))]
    with pytest.raises(TargetError) as error:
        Targets.from_list(targets)
    assert str(error.value).startswith("image 42 has the box [")
    assert shown in str(error.value)
    assert "within [0, 1]" in str(error.value)
    for target in targets:
        del target["image_id"]
    with pytest.raises(TargetError, match=r"^image 1 of the batch has the box"):
        Targets.from_list(targets)


@pytest.mark.parametrize(
    ("label", "classes", "limit"), [(-1, None, "0 or more"), (5, 5, r"0 to 4 \(num_classes = 5\)")]
)
def test_labels_out_of_range_are_refused_by_image(label, classes, limit):
    with pytest.raises(TargetError, match=f"image 1 of the batch has label {label}; expected {limit}"):
        Targets.from_list([one([GOOD], [0]), one([GOOD], [label])], num_classes=classes)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([], "got no targets"),
        ([one([GOOD], [0]), {"boxes": torch.zeros(0, 4)}], r"target 1 lacks \['labels'\] and has \['boxes'\]"),
        (one([GOOD], [0]), r"got one dict with \['boxes', 'labels'\]; expected a list with one dict per image"),
        (
            [one([GOOD], [0]) | {"labels": torch.tensor([0.5])}],
            r"image 0 of the batch has labels of torch\.float32; expected integers",
        ),
        ([one([GOOD], [0, 1])], r"image 0 of the batch has boxes of shape \(1, 4\) and labels of shape \(2,\)"),
        (
            [one([GOOD], [0]), one([GOOD] * 3, [0] * 3, image_id=9)],
            "image 9 has 3 boxes but the targets' capacity is 2",
        ),
    ],
)
def test_targets_of_another_form_are_refused(targets, message):
    with pytest.raises(TargetError, match=message):
        Targets.from_list(targets, capacity=2)
