"""Batches: static shapes, grouping by aspect ratio, and the same run whatever the workers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from detr_fast.data import (
    CocoDetection,
    CocoFolder,
    GroupedBatchSampler,
    TransformConfig,
    build_loader,
    collate,
    train_transforms,
)
from detr_fast.data.scenes import generate_scenes

CONFIG = TransformConfig(sizes=(40, 48), max_size=64, eval_size=48)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = generate_scenes(tmp_path_factory.mktemp("scenes") / "set", train=30, val=2, size=48)
    return CocoFolder.open(folder)


@pytest.fixture
def dataset(scenes):
    return CocoDetection(scenes, "train", train_transforms(CONFIG))


def indices(sampler):
    return [[index for index, _ in batch] for batch in sampler]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("count", [1, 7, 8, 100, 103])
def test_each_image_comes_once_an_epoch_in_a_fixed_number_of_batches(count, drop_last, shuffle):
    random = np.random.default_rng(0)
    sizes = [tuple(side) for side in random.integers(20, 100, size=(count, 2))]
    sampler = GroupedBatchSampler(sizes, 8, shuffle=shuffle, drop_last=drop_last)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        batches = indices(sampler)
        seen = [index for batch in batches for index in batch]
        assert len(batches) == len(sampler) == (count // 8 if drop_last else -(-count // 8))
        assert len(set(seen)) == len(seen) == (count - count % 8 if drop_last else count)
        assert sum(len(batch) < 8 for batch in batches) == (0 if drop_last or count % 8 == 0 else 1)


def test_wide_and_tall_images_do_not_share_a_batch():
    """One of each in a batch would pad both to a square: four times the memory of these images."""
    sizes = [(100, 400), (400, 100)] * 20
    for shuffle in (False, True):
        for batch in indices(GroupedBatchSampler(sizes, 4, shuffle=shuffle)):
            assert len({sizes[index] for index in batch}) == 1


def test_leftovers_are_batched_by_aspect_ratio():
    sizes = [(100, 400), (400, 100), (100, 390), (390, 100)]
    assert sorted(map(sorted, indices(GroupedBatchSampler(sizes, 2, shuffle=True)))) == [[0, 2], [1, 3]]


def test_the_order_is_a_function_of_seed_and_epoch():
    def run(seed, epoch, shuffle=True):
        sampler = GroupedBatchSampler([(10, 10)] * 50, 4, shuffle=shuffle, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert run(0, 0) == run(0, 0)
    assert run(0, 0) != run(0, 1)
    assert run(0, 0) != run(1, 0)
    assert [index for batch in run(3, 2, shuffle=False) for index, _ in batch] == list(range(50))


def test_a_pass_can_start_in_mid_epoch():
    sampler = GroupedBatchSampler([(10, 10)] * 50, 4, shuffle=True)
    sampler.set_epoch(3)
    whole = list(sampler)
    sampler.set_epoch(3, start=5)
    assert list(sampler) == whole[5:]
    assert len(sampler) == len(whole) - 5
    sampler.set_epoch(4)
    assert len(list(sampler)) == len(whole)


def test_a_batch_size_below_one_is_refused():
    with pytest.raises(ValueError, match="batch_size is 0"):
        GroupedBatchSampler([(10, 10)], 0, shuffle=False)


def batches(loader, epochs):
    out = []
    for epoch in epochs:
        loader.batch_sampler.set_epoch(epoch)
        out += [(b.images.tensors, b.targets.boxes, [m["image_id"] for m in b.metadata]) for b in loader]
    return out


def assert_same_batches(left, right):
    assert len(left) == len(right)
    for (images, boxes, ids), (other_images, other_boxes, other_ids) in zip(left, right):
        assert ids == other_ids
        assert torch.equal(images, other_images)
        assert torch.equal(boxes, other_boxes)


def test_workers_change_nothing_over_several_epochs(dataset):
    alone = batches(build_loader(dataset, 8, shuffle=True, seed=3), (0, 1))
    helped = batches(build_loader(dataset, 8, shuffle=True, seed=3, workers=2), (0, 1))
    assert_same_batches(alone, helped)


def test_an_epoch_can_be_repeated_alone(dataset):
    both = batches(build_loader(dataset, 8, shuffle=True), (0, 1))
    second = batches(build_loader(dataset, 8, shuffle=True), (1,))
    assert_same_batches(both[4:], second)


def test_augmentation_differs_between_epochs_and_images(dataset):
    (first, _, ids), (other, _, other_ids) = batches(build_loader(dataset, 30, shuffle=False, size=(64, 64)), (0, 1))
    assert ids == other_ids
    assert not torch.equal(first, other)


def test_loading_leaves_the_global_random_state_alone(dataset):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    list(build_loader(dataset, 8, shuffle=True))
    assert torch.equal(torch.rand(3), expected)


def test_targets_have_the_same_shape_in_every_batch_of_a_run(dataset):
    shapes = {b.targets.boxes.shape[1] for b in build_loader(dataset, 4, shuffle=True)}
    assert shapes == {dataset.max_boxes}
    shapes = {b.targets.boxes.shape[1] for b in build_loader(dataset, 4, shuffle=True, capacity=11)}
    assert shapes == {11}


def test_a_fixed_size_gives_one_shape_and_a_divisor_few(dataset):
    loader = build_loader(dataset, 8, shuffle=True, size=(64, 64), drop_last=True)
    assert {tuple(b.images.tensors.shape) for b in loader} == {(8, 3, 64, 64)}
    for batch in build_loader(dataset, 8, shuffle=True, size_divisor=32):
        assert batch.images.tensors.shape[2] % 32 == 0
        assert batch.images.tensors.shape[3] % 32 == 0


def test_images_lie_in_the_upper_left_corner_with_the_rest_masked(dataset):
    items = [dataset[index, 0] for index in range(6)]
    batch = collate(items, size=(64, 64))
    for index, (image, target) in enumerate(items):
        height, width = image.shape[1:]
        assert torch.equal(batch.images.tensors[index, :, :height, :width], image)
        assert not batch.images.mask[index, :height, :width].any()
        assert int(batch.images.mask[index].sum()) == 64 * 64 - height * width
        count = int(batch.targets.counts[index])
        assert torch.equal(batch.targets.boxes[index, :count], target["boxes"])
        assert torch.equal(batch.targets.labels[index, :count], target["labels"])
        assert batch.metadata[index]["size"] == (height, width)


def test_a_batch_knows_on_the_host_whether_anything_is_padded(dataset):
    item = dataset[0, 0]
    assert not collate([item, item]).images.padded
    assert collate([item, item], size=(64, 64)).images.padded


def test_a_whole_batch_without_objects_is_legal(write_coco):
    folder = CocoFolder.open(write_coco(edit=lambda raw: raw["annotations"].clear()))
    dataset = CocoDetection(folder, "train", train_transforms(CONFIG))
    (batch,) = build_loader(dataset, 3, shuffle=False)
    assert batch.targets.counts.tolist() == [0, 0, 0]
    assert batch.targets.boxes.shape == (3, 1, 4)


def test_a_batch_moves_as_a_whole(dataset):
    (batch, *_) = build_loader(dataset, 4, shuffle=False)
    moved = batch.to("meta")
    assert moved.images.tensors.device.type == moved.targets.boxes.device.type == "meta"
    assert moved.metadata == batch.metadata
    assert len(moved) == 4


def wide_and_tall(height=20, width=60, count=1):
    """One wide and one tall image with `count` boxes each."""
    items = []
    for number, size in enumerate(((height, width), (width, height))):
        target = {
            "boxes": torch.tensor([[0.5, 0.25, 0.5, 0.2]] * count).reshape(-1, 4),
            "labels": torch.zeros(count, dtype=torch.int64),
            "image_id": torch.tensor(number),
            "orig_size": torch.tensor(size),
            "size": torch.tensor(size),
        }
        items.append((torch.linspace(0, 1, 3 * height * width).view(3, *size), target))
    return items


def test_a_wide_and_a_tall_image_are_shrunk_together_until_their_canvas_is_no_larger_than_allowed():
    items = wide_and_tall()
    assert collate(items).images.tensors.shape == (2, 3, 60, 60)
    batch = collate(items, max_area=1200)
    height, width = batch.images.tensors.shape[2:]
    assert 1000 < height * width <= 1200
    sizes = [entry["size"] for entry in batch.metadata]
    assert sizes == [(height // 3, width), (height, width // 3)]  # still of their own shape
    assert [int((~mask).sum()) for mask in batch.images.mask] == [h * w for h, w in sizes]
    assert torch.equal(batch.targets.boxes[:, 0], torch.cat([target["boxes"] for _, target in items]))
    assert [entry["orig_size"] for entry in batch.metadata] == [(20, 60), (60, 20)]
    means = [batch.images.tensors[i, :, :h, :w].mean() for i, (h, w) in enumerate(sizes)]
    torch.testing.assert_close(torch.stack(means), torch.stack([image.mean() for image, _ in items]), rtol=1e-2, atol=0)


def test_images_that_fit_the_allowed_canvas_are_left_as_they_are(dataset):
    items = [dataset[index, 0] for index in range(4)]
    plain, limited = collate(items), collate(items, max_area=CONFIG.max_area)
    assert torch.equal(plain.images.tensors, limited.images.tensors)
    assert CONFIG.max_area == 48 * 64
