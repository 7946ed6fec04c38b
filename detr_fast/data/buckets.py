"""Few padded sizes for all batches of a run: a captured step needs a CUDA graph for each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from detr_fast.data.transforms import RandomShorterSide, RandomSizedCrop, TransformConfig

Size = tuple[int, int]


@dataclass(frozen=True)
class ShapeBuckets:
    """Padded (height, width) sizes, the smallest area first.

    Attributes:
        sizes: in pixels.
        step: what a batch that fits into none of them is rounded up to.
    """

    sizes: tuple[Size, ...]
    step: int = 32

    def of(self, height: int, width: int) -> Size:
        """The smallest size that a batch of this height and width fits into; where there is none, its own, rounded up."""
        for size in self.sizes:
            if height <= size[0] and width <= size[1]:
                return size
        return -(-height // self.step) * self.step, -(-width // self.step) * self.step

    @classmethod
    def fit(cls, batches: Sequence[Size], count: int, step: int = 32) -> ShapeBuckets:
        """Choose up to `count` sizes, multiples of `step`, that leave little to pad in batches of the given sizes.

        Greedy: again and again the size that saves most, a batch without one counting as the largest of all. Sizes are
        made of the batches' own heights and widths, and no larger in area than the largest batch, unless so few sizes
        could not hold all.
        """
        if not batches or count < 1:
            raise ValueError(f"got {len(batches)} batches and {count} sizes; expected at least one of each")
        needed = -(-np.array(batches) // step) * step
        largest = int(needed.max(axis=0).prod())
        heights, widths = np.unique(needed[:, 0]), np.unique(needed[:, 1])
        candidates = np.stack(np.meshgrid(heights, widths, indexing="ij"), -1).reshape(-1, 2)
        candidates = candidates[
            candidates.prod(axis=1) <= needed.prod(axis=1).max()
        ]  # no more memory than a batch needs
        areas = candidates.prod(axis=1)
        needed, times = np.unique(needed, axis=0, return_counts=True)
        holds = np.all(needed[:, None] <= candidates, axis=-1)
        cost = np.full(len(needed), largest + 1, dtype=np.int64)
        chosen: list[Size] = []
        for _ in range(count):
            saved = (np.where(holds, cost[:, None] - areas, 0).clip(min=0) * times[:, None]).sum(axis=0)
            best = int(saved.argmax())
            if saved[best] == 0:
                break
            chosen.append((int(candidates[best, 0]), int(candidates[best, 1])))
            cost = np.where(holds[:, best], np.minimum(cost, areas[best]), cost)
        if (cost > largest).any():  # too few sizes: the last one must hold everything
            chosen[-1] = (int(heights[-1]), int(widths[-1]))
        return cls(tuple(sorted(chosen, key=lambda size: size[0] * size[1])), step)

    def waste(self, batches: Sequence[Size]) -> float:
        """Pixels padded beyond the batches' own sizes, as a share of all."""
        own = sum(height * width for height, width in batches)
        padded = sum(height * width for height, width in (self.of(*batch) for batch in batches))
        return 1 - own / padded


def simulate_batches(
    image_sizes: Sequence[Size], config: TransformConfig, batch_size: int, batches: int = 1000, seed: int = 0
) -> list[Size]:
    """Padded sizes that batches of the training augmentation have, without an image being read.

    image_sizes: (height, width) of the data set's images. Batches are grouped by aspect ratio, as in training.
    """
    from detr_fast.data.batching import GroupedBatchSampler

    resize, crop = RandomShorterSide(config.sizes, config.max_size), RandomSizedCrop(config.sizes, config.max_size)
    sampler = GroupedBatchSampler(image_sizes, batch_size, shuffle=True, seed=seed, drop_last=True)
    found: list[Size] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        while len(found) < batches and len(sampler):
            sampler.set_epoch(sampler.epoch + 1)
            for batch in sampler:
                sizes = []
                for index, _ in batch:
                    image = torch.empty(1, dtype=torch.uint8).expand(3, *image_sizes[index])
                    chosen = crop if config.crop and torch.rand(()) < 0.5 else resize
                    sizes.append(chosen.make_params([image])["size"])
                height, width = (max(lengths) for lengths in zip(*sizes))
                scale = min(1.0, math.sqrt(config.max_area / (height * width)))  # as `collate` shrinks them
                found.append((int(height * scale), int(width * scale)))
                if len(found) == batches:
                    break
    return found
