"""Batches: padding with static targets, grouping by aspect ratio, and seeds that no worker can disturb."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, Sampler

from detr_fast.data.buckets import ShapeBuckets
from detr_fast.data.coco import CocoDetection, Target
from detr_fast.models.structures import NestedTensor, Targets, nested_tensor_from_list

# Borders between groups of width / height: images of one group fill at least half of a batch they are padded into.
ASPECT_BORDERS = (0.5, 0.71, 1.0, 1.41, 2.0)


@dataclass(frozen=True)
class Batch:
    """What a training step takes.

    Attributes:
        images: B padded images with their mask.
        targets: their boxes and labels, padded to one number a run.
        metadata: for each image {"image_id": int, "orig_size": (height, width), "size": (height, width)}, on the host.
    """

    images: NestedTensor
    targets: Targets
    metadata: list[dict[str, Any]]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        images = self.images.to(device, non_blocking=non_blocking)
        return Batch(images, self.targets.to(device, non_blocking=non_blocking), self.metadata)

    def pin_memory(self) -> Batch:
        return Batch(self.images.pin_memory(), self.targets.pin_memory(), self.metadata)

    def __len__(self) -> int:
        return len(self.metadata)


def collate(
    items: Sequence[tuple[Tensor, Target]],
    capacity: int | None = None,
    size_divisor: int = 1,
    size: tuple[int, int] | None = None,
    max_area: int | None = None,
    buckets: ShapeBuckets | None = None,
) -> Batch:
    """Put samples together.

    Args:
        items: (image (3, H, W), target) as `CocoDetection` gives them.
        capacity: boxes that targets have room for; by default the most that one of these images has.
        size_divisor: the padded height and width are multiples of it.
        size: the padded (height, width), for the same shape in every batch; by default the smallest that fits.
        max_area: most pixels of the padded height times width. Images that need more, as one wide and one tall do, are all
            shrunk by one factor so that they fit.
        buckets: the padded size is one of theirs, for few shapes; `size` and `size_divisor` then have no say.
    """
    if max_area is not None:
        items = _fitted(items, max_area)
    if buckets is not None:
        size = buckets.of(max(image.shape[1] for image, _ in items), max(image.shape[2] for image, _ in items))
        size_divisor = 1
    images = nested_tensor_from_list([image for image, _ in items], size=size, size_divisor=size_divisor)
    if buckets is not None:  # always with a mask, so that a size is one shape and not two
        images = replace(images, padded=True)
    targets = [target for _, target in items]
    metadata = [
        {
            "image_id": int(target["image_id"]),
            "orig_size": tuple(target["orig_size"].tolist()),
            "size": tuple(target["size"].tolist()),
        }
        for target in targets
    ]
    return Batch(images, Targets.from_list(targets, capacity), metadata)


def _fitted(items: Sequence[tuple[Tensor, Target]], max_area: int) -> Sequence[tuple[Tensor, Target]]:
    area = max(image.shape[1] for image, _ in items) * max(image.shape[2] for image, _ in items)
    if area <= max_area:
        return items
    scale = math.sqrt(max_area / area)
    fitted = []
    for image, target in items:
        size = [max(1, int(length * scale)) for length in image.shape[1:]]
        small = interpolate(image[None], size, mode="bilinear", antialias=True)[0]
        fitted.append((small, target | {"size": torch.tensor(size)}))
    return fitted


class GroupedBatchSampler(Sampler[list[tuple[int, int]]]):
    """Batches of images of like aspect ratio, so that little is padded.

    Each image comes once an epoch. What a group has left over after its full batches is put together in order of aspect
    ratio, so there are always ceil(N / batch_size) batches (floor with `drop_last`).

    Batches are lists of (index, seed), the seed being a function of (seed, epoch, index): `CocoDetection` augments from
    it, so a run is the same with any number of workers. Call `set_epoch` before each epoch; `start` skips the first
    batches of the next pass, for resuming in mid-epoch.
    """

    def __init__(
        self,
        image_sizes: Sequence[tuple[int, int]],
        batch_size: int,
        *,
        shuffle: bool,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, expected 1 or more")
        self.aspects = np.array([width / height for height, width in image_sizes])
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.drop_last = drop_last
        self.epoch = 0
        self.start = 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """The next pass is that of `epoch`, from its batch `start` on."""
        self.epoch = epoch
        self.start = start

    def __len__(self) -> int:
        count = len(self.aspects)
        batches = count // self.batch_size if self.drop_last else -(-count // self.batch_size)
        return max(0, batches - self.start)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        random = np.random.default_rng((self.seed, self.epoch))
        seeds = random.integers(2**62, size=len(self.aspects))  # drawn first: the same for every batch size
        for batch in self._batches(random)[self.start :]:
            yield [(int(index), int(seeds[index])) for index in batch]

    def _batches(self, random: np.random.Generator) -> list[np.ndarray]:
        count = len(self.aspects)
        order = random.permutation(count) if self.shuffle else np.arange(count)
        groups = np.digitize(self.aspects[order], ASPECT_BORDERS)
        full: list[np.ndarray] = []
        left: list[np.ndarray] = []
        for group in range(len(ASPECT_BORDERS) + 1):
            own = order[groups == group]
            whole = len(own) - len(own) % self.batch_size
            full += np.split(own[:whole], range(self.batch_size, whole, self.batch_size)) if whole else []
            left.append(own[whole:])  # in order of aspect ratio, as the groups are
        rest = np.concatenate(left)
        mixed = [rest[start : start + self.batch_size] for start in range(0, len(rest), self.batch_size)]
        if self.drop_last and mixed and len(mixed[-1]) < self.batch_size:
            mixed.pop()
        batches = full + mixed
        return [batches[i] for i in random.permutation(len(batches))] if self.shuffle else batches


def build_loader(
    dataset: CocoDetection,
    batch_size: int,
    *,
    shuffle: bool,
    workers: int = 0,
    seed: int = 0,
    drop_last: bool = False,
    capacity: int | None = None,
    size_divisor: int = 1,
    size: tuple[int, int] | None = None,
    max_area: int | None = None,
    buckets: ShapeBuckets | None = None,
    pin_memory: bool = False,
) -> DataLoader[Any]:
    """A loader of `Batch`es, the same for (seed, epoch) whatever `workers` is; call `loader.batch_sampler.set_epoch`.

    Images of a data set that fits in its cache are decoded here, so that the workers share them and a damaged file is
    met now instead of in mid-run.

    Args:
        dataset: its transforms must give float images.
        batch_size: images a batch.
        shuffle: a new order each epoch; otherwise the order is fixed. Either way images are grouped by aspect ratio.
        workers: worker processes; they persist across epochs. 0 loads in this process.
        seed: of order and augmentation.
        drop_last: leave out the last, smaller batch.
        capacity: boxes that targets have room for; by default the data set's `max_boxes` (at least 1).
        size_divisor, size, max_area, buckets: see `collate`.
        pin_memory: page-locked batches, for copies to a GPU that don't block.
    """
    dataset.images.preload()
    room = max(1, dataset.max_boxes) if capacity is None else capacity
    return DataLoader(
        dataset,
        batch_sampler=GroupedBatchSampler(
            dataset.image_sizes, batch_size, shuffle=shuffle, seed=seed, drop_last=drop_last
        ),
        num_workers=workers,
        collate_fn=partial(
            collate, capacity=room, size_divisor=size_divisor, size=size, max_area=max_area, buckets=buckets
        ),
        pin_memory=pin_memory,
        generator=torch.Generator().manual_seed(seed),  # DataLoader would draw from the global random state
        persistent_workers=workers > 0,
    )
