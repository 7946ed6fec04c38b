"""The augmentation recipe: sizes, boxes that stay on their objects, and what a crop drops."""

from __future__ import annotations

import pytest
import torch
from torchvision import tv_tensors

from detr_fast.data import TransformConfig, eval_transforms, train_transforms
from detr_fast.data.transforms import IMAGENET_MEAN, IMAGENET_STD, fit

SMALL = TransformConfig(sizes=(48, 64), max_size=96, eval_size=64)


def sample(height, width, boxes):
    """A black picture whose boxes are filled white."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    for x0, y0, x1, y1 in boxes:
        image[:, y0:y1, x0:x1] = 255
    corners = tv_tensors.BoundingBoxes(
        torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), format="XYXY", canvas_size=(height, width)
    )
    return tv_tensors.Image(image), {"boxes": corners, "labels": torch.arange(len(boxes))}


def is_white(image):
    """Where the picture is white, the normalisation taken back."""
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    return (image.as_subclass(torch.Tensor) * std[:, None, None] + mean[:, None, None]).mean(0) > 0.5


@pytest.mark.parametrize("crop", [False, True])
@pytest.mark.parametrize("flips", [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0)])
def test_boxes_follow_their_objects_through_flips_resizes_and_crops(crop, flips):
    config = TransformConfig(
        sizes=(48, 64, 80), max_size=120, crop=crop, horizontal_flip=flips[0], vertical_flip=flips[1]
    )
    transform = train_transforms(config)
    torch.manual_seed(0)
    for _ in range(30):
        image, target = transform(*sample(100, 140, [(20, 10, 70, 90)]))
        rows, columns = torch.nonzero(is_white(image), as_tuple=True)
        x0, y0, x1, y1 = target["boxes"][0].tolist()
        if x1 - x0 < 4 or y1 - y0 < 4:  # a crop left a sliver
            continue
        found = [columns.min().item(), rows.min().item(), columns.max().item() + 1, rows.max().item() + 1]
        assert found == pytest.approx([x0, y0, x1, y1], abs=2.0)  # a crop falls on whole pixels, then is enlarged


def test_a_flip_is_a_flip():
    config = TransformConfig(sizes=(100,), max_size=140, crop=False, horizontal_flip=1.0)
    _, target = train_transforms(config)(*sample(100, 140, [(20, 10, 70, 90)]))
    assert target["boxes"].tolist() == [[70, 10, 120, 90]]


@pytest.mark.parametrize("crop", [False, True])
def test_the_shorter_side_is_one_of_the_sizes_and_the_longer_at_most_the_maximum(crop):
    transform = train_transforms(TransformConfig(sizes=(48, 64), max_size=96, crop=crop))
    torch.manual_seed(0)
    shorter = set()
    for height, width in [(100, 100), (90, 140), (140, 90), (30, 400)] * 20:
        image, target = transform(*sample(height, width, [(2, 2, 25, 25)]))
        assert target["boxes"].canvas_size == image.shape[1:]
        assert max(image.shape[1:]) <= 96
        if max(image.shape[1:]) < 96:
            assert min(image.shape[1:]) in (48, 64)
        shorter.add(min(image.shape[1:]))
    assert {48, 64} <= shorter


def test_half_of_the_images_are_crops():
    transform = train_transforms(TransformConfig(sizes=(64,), max_size=128, crop=True))
    torch.manual_seed(0)
    whole = sum(
        bool(is_white(transform(*sample(64, 64, [(0, 0, 1, 64), (63, 0, 64, 64)]))[0])[:, [0, -1]].all())
        for _ in range(200)
    )
    assert 70 < whole < 130


def test_crops_have_the_originals_share_of_the_picture():
    """A window of 384 to 600 out of a shorter side of 400, 500 or 600: 64 % to 100 % of it."""
    from detr_fast.data.transforms import RandomSizedCrop

    crop = RandomSizedCrop((480, 800), 1333)
    assert crop.first_sizes == (400, 500, 600)
    assert crop.window == (384, 600)
    torch.manual_seed(0)
    image, _ = sample(480, 640, [])
    shares = [crop.make_params([image])["height"] / 480 for _ in range(300)]
    assert 0.63 < min(shares) < 0.72
    assert max(shares) == 1.0


def test_evaluation_is_deterministic_and_resizes_only():
    transform = eval_transforms(SMALL)
    first, target = transform(*sample(100, 140, [(20, 10, 70, 90)]))
    second, _ = transform(*sample(100, 140, [(20, 10, 70, 90)]))
    assert torch.equal(first, second)
    assert first.shape == (3, 64, 90)
    assert target["boxes"][0].tolist() == pytest.approx([20 * 90 / 140, 6.4, 45, 57.6])


def test_pixels_are_normalised_by_imagenets_statistics():
    image, _ = eval_transforms(SMALL)(*sample(64, 64, [(0, 0, 64, 64)]))
    expected = [(1 - mean) / std for mean, std in zip(IMAGENET_MEAN, IMAGENET_STD)]
    assert image.dtype == torch.float32
    assert image.mean(dim=(1, 2)).tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (480, 640, (800, 1067)),
        (640, 480, (1067, 800)),
        (100, 1000, (133, 1333)),
        (1, 5000, (1, 1333)),
        (49, 49, (800, 800)),
    ],
)
def test_fit_keeps_the_aspect_ratio_and_at_least_one_pixel(height, width, expected):
    assert fit(height, width, 800, 1333) == expected


def test_images_without_objects_pass(tmp_path):
    torch.manual_seed(0)
    for _ in range(10):
        _, target = train_transforms(SMALL)(*sample(50, 70, []))
        assert target["boxes"].shape == (0, 4)


def test_boxes_that_a_crop_cuts_away_are_dropped_with_their_labels(write_coco):
    from detr_fast.data import CocoDetection, CocoFolder

    def edit(raw):
        raw["annotations"] = [
            {"id": i, "image_id": 10, "category_id": 2 if x < 30 else 9, "bbox": [x, y, 2, 2]}
            for i, (x, y) in enumerate([(0, 0), (58, 0), (0, 28), (58, 28), (29, 14)])
        ]

    config = TransformConfig(sizes=(30,), max_size=60, horizontal_flip=0)
    dataset = CocoDetection(CocoFolder.open(write_coco(edit=edit)), "train", train_transforms(config))
    counts = set()
    for seed in range(60):
        _, target = dataset[0, seed]
        assert len(target["boxes"]) == len(target["labels"])
        assert (target["boxes"][:, 2:] > 0).all()
        low, high = (
            target["boxes"][:, :2] - target["boxes"][:, 2:] / 2,
            target["boxes"][:, :2] + target["boxes"][:, 2:] / 2,
        )
        assert (low > -1e-6).all()
        assert (high < 1 + 1e-6).all()
        counts.add(len(target["boxes"]))
    assert 5 in counts
    assert min(counts) < 5


def test_sizes_below_one_are_refused():
    with pytest.raises(ValueError, match="expected at least one size"):
        TransformConfig(sizes=())
    with pytest.raises(ValueError, match="eval_size 0"):
        TransformConfig(eval_size=0)
