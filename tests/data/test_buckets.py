"""Few padded sizes: they hold every batch, the more the tighter, and are as simulated without reading an image."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from detr_fast.data.batching import collate
from detr_fast.data.buckets import ShapeBuckets, simulate_batches
from detr_fast.data.transforms import TransformConfig

SIZES = [(480, 640), (640, 480), (427, 640), (640, 640)] * 10


def test_a_batch_gets_the_smallest_size_that_holds_it():
    buckets = ShapeBuckets(((32, 64), (64, 32), (64, 96)))
    assert buckets.of(20, 64) == (32, 64)
    assert buckets.of(33, 30) == (64, 32)
    assert buckets.of(33, 33) == (64, 96)
    assert buckets.of(70, 33) == (96, 64)  # larger than all: its own, rounded up


def test_fitted_sizes_hold_every_batch_and_more_of_them_waste_less():
    random = np.random.default_rng(0)
    batches = [(int(h), int(w)) for h, w in random.integers(200, 800, (300, 2))]
    wasted = []
    for count in (1, 2, 4, 8, 16):
        buckets = ShapeBuckets.fit(batches, count)
        assert len(buckets.sizes) == count
        assert all(h % 32 == w % 32 == 0 for h, w in buckets.sizes)
        for batch in batches:
            assert buckets.of(*batch) in buckets.sizes
        wasted.append(buckets.waste(batches))
    assert wasted == sorted(wasted, reverse=True)
    assert wasted[-1] < wasted[0] / 2


def test_no_more_sizes_are_made_than_help():
    assert ShapeBuckets.fit([(64, 96), (64, 90), (128, 96)], 10).sizes == ((64, 96), (128, 96))
    with pytest.raises(ValueError, match="got 0 batches and 3 sizes"):
        ShapeBuckets.fit([], 3)


def test_simulated_batches_are_those_of_the_augmentation():
    config = TransformConfig(sizes=(48, 64), max_size=96, crop=False)
    state = torch.get_rng_state()
    found = simulate_batches(SIZES, config, batch_size=2, batches=30)
    assert torch.equal(torch.get_rng_state(), state)  # training's own random numbers stay as they were
    assert len(found) == 30
    assert found == simulate_batches(SIZES, config, batch_size=2, batches=30)
    assert max(map(max, found)) <= 96
    assert {min(size) for size in found} == {48, 64}


def test_batches_are_padded_to_a_bucket_and_always_masked():
    items = [
        (
            torch.rand(3, 32, 64),
            {
                "boxes": torch.zeros(0, 4),
                "labels": torch.zeros(0, dtype=torch.int64),
                "image_id": torch.tensor(1),
                "orig_size": torch.tensor([32, 64]),
                "size": torch.tensor([32, 64]),
            },
        )
    ]
    exact = collate(items, buckets=ShapeBuckets(((32, 64),)))
    assert exact.images.tensors.shape == (1, 3, 32, 64)
    assert exact.images.padded
    assert not exact.images.mask.any()
    assert collate(items, buckets=ShapeBuckets(((64, 64),))).images.tensors.shape == (1, 3, 64, 64)
