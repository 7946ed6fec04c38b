"""What a training step takes: padded images with their mask, and padded targets of one static shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from detr_fast.models.packing import Packing
from detr_fast.ops.boxes import BORDER_SLACK


class TargetError(ValueError):
    """A target that no detector can learn from; the message names the image, the value and the remedy."""


@dataclass(frozen=True)
class NestedTensor:
    """Images of different sizes in one tensor.

    Attributes:
        tensors: (B, 3, H, W) float; each image in the upper left corner, zeros elsewhere.
        mask: (B, H, W) bool; True = padding.
        padded: False promises that no mask entry is True. It is known on the host when a batch is put together, so
            the model can drop the mask, and use the faster attention without one, with no look at the device.
        sizes: height and width of each image, where they are known on the host; what packing needs.
        packing: where the real tokens lie, made beforehand; see `Detr.with_packing`.
    """

    tensors: Tensor
    mask: Tensor
    padded: bool = True
    sizes: tuple[tuple[int, int], ...] | None = None
    packing: Packing | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> NestedTensor:
        return NestedTensor(
            self.tensors.to(device, non_blocking=non_blocking),
            self.mask.to(device, non_blocking=non_blocking),
            self.padded,
            self.sizes,
            None if self.packing is None else self.packing.to(device, non_blocking),
        )

    def pin_memory(self) -> NestedTensor:
        packing = None if self.packing is None else self.packing.pin_memory()
        return NestedTensor(self.tensors.pin_memory(), self.mask.pin_memory(), self.padded, self.sizes, packing)

    def decompose(self) -> tuple[Tensor, Tensor]:
        return self.tensors, self.mask


def nested_tensor_from_list(
    images: Sequence[Tensor], size: tuple[int, int] | None = None, size_divisor: int = 1
) -> NestedTensor:
    """Pad images to the right and to the bottom, to one common size.

    Args:
        images: (3, H_i, W_i) tensors of one dtype and device.
        size: (H, W) of the result; by default the largest height and the largest width among the images.
        size_divisor: H and W are rounded up to multiples of it.

    Raises:
        ValueError: no images, an image that is not (3, H, W), or one that is larger than `size`.
    """
    if not images:
        raise ValueError("got no images; a batch needs at least one (3, H, W) tensor")
    for index, image in enumerate(images):
        if image.ndim != 3 or image.shape[0] != 3:
            raise ValueError(f"image {index} has shape {tuple(image.shape)}; expected (3, H, W)")
    height, width = size or (max(i.shape[1] for i in images), max(i.shape[2] for i in images))
    height, width = (-(-length // size_divisor) * size_divisor for length in (height, width))
    for index, image in enumerate(images):
        if image.shape[1] > height or image.shape[2] > width:
            raise ValueError(
                f"image {index} is {image.shape[1]}×{image.shape[2]} (height × width) but the batch is "
                f"{height}×{width}; resize the image or give a larger size"
            )
    if all(image.shape[1:] == (height, width) for image in images):
        tensors = torch.stack(list(images))
        return NestedTensor(tensors, tensors.new_zeros((len(images), height, width), dtype=torch.bool), padded=False)
    tensors = images[0].new_zeros((len(images), 3, height, width))
    mask = tensors.new_ones((len(images), height, width), dtype=torch.bool)
    for index, image in enumerate(images):
        tensors[index, :, : image.shape[1], : image.shape[2]] = image
        mask[index, : image.shape[1], : image.shape[2]] = False
    return NestedTensor(tensors, mask, sizes=tuple((image.shape[1], image.shape[2]) for image in images))


@dataclass(frozen=True)
class Targets:
    """The true boxes of a batch, padded to a static shape so that a training step never asks for their number.

    Attributes:
        boxes: (B, N, 4) float; (center x, center y, width, height) as fractions of the image; zeros behind the last.
        labels: (B, N) int64, zeros behind the last.
        counts: (B,) int64, how many of the N belong to each image.
    """

    boxes: Tensor
    labels: Tensor
    counts: Tensor

    @property
    def valid(self) -> Tensor:
        """(B, N) bool: True where there is a box, False where there is padding."""
        return torch.arange(self.labels.shape[1], device=self.counts.device) < self.counts[:, None]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Targets:
        return Targets(*(t.to(device, non_blocking=non_blocking) for t in (self.boxes, self.labels, self.counts)))

    def pin_memory(self) -> Targets:
        return Targets(self.boxes.pin_memory(), self.labels.pin_memory(), self.counts.pin_memory())

    @classmethod
    def from_list(
        cls, targets: Sequence[Mapping[str, Tensor]], capacity: int | None = None, num_classes: int | None = None
    ) -> Targets:
        """Pad one dict {"boxes": (n, 4), "labels": (n,)} per image.

        The values are checked here, on the host, before they travel to a device. An "image_id" entry, if there, names
        the image in errors.

        Args:
            targets: one dict per image, tensors on the CPU (elsewhere it works, but waits for the device).
            capacity: N; by default the largest number of boxes in this batch. Give the data set's maximum for a
                static shape over the whole run.
            num_classes: labels must be below it; by default only negative ones are refused.

        Raises:
            TargetError: no list of dicts, shapes that disagree, labels that are no integers, more boxes than `capacity`, coordinates outside [0, 1] or not finite,
                boxes without area, labels out of range.
        """
        if not targets:
            raise TargetError("got no targets; expected one dict per image (with empty tensors for no boxes)")
        if isinstance(targets, Mapping):
            raise TargetError(f"got one dict with {sorted(map(str, targets))}; expected a list with one dict per image")
        counts = [_checked_count(index, target) for index, target in enumerate(targets)]
        room = max(counts) if capacity is None else capacity
        if max(counts) > room:
            worst = counts.index(max(counts))
            raise TargetError(
                f"{_image_name(worst, targets)} has {counts[worst]} boxes but the targets' capacity is {room}; "
                "set the capacity to the data set's largest number of boxes"
            )
        _check_values(targets, counts, num_classes)
        first = targets[0]["boxes"]
        boxes = first.new_zeros((len(targets), room, 4), dtype=_float_dtype(first))
        labels = first.new_zeros((len(targets), room), dtype=torch.int64)
        for index, (target, count) in enumerate(zip(targets, counts)):
            if count:
                boxes[index, :count] = target["boxes"]
                labels[index, :count] = target["labels"]
        return cls(boxes, labels, torch.tensor(counts, device=first.device))


def _float_dtype(boxes: Tensor) -> torch.dtype:
    return boxes.dtype if boxes.is_floating_point() else torch.float32


def _image_name(index: int, targets: Sequence[Mapping[str, Tensor]]) -> str:
    image_id = targets[index].get("image_id")
    return f"image {index} of the batch" if image_id is None else f"image {int(image_id)}"


def _checked_count(index: int, target: Mapping[str, Tensor]) -> int:
    missing = {"boxes", "labels"} - target.keys()
    if missing:
        raise TargetError(
            f"target {index} lacks {sorted(missing)} and has {sorted(target)}; expected the keys 'boxes' and 'labels'"
        )
    boxes, labels = target["boxes"], target["labels"]
    count = labels.shape[0] if labels.ndim == 1 else -1
    # An empty list of boxes becomes a tensor of shape (0,), which is as good as (0, 4).
    if count < 0 or (tuple(boxes.shape) != (count, 4) and not (count == 0 and boxes.numel() == 0)):
        raise TargetError(
            f"{_image_name(index, [target] * (index + 1))} has boxes of shape {tuple(boxes.shape)} and labels of shape "
            f"{tuple(labels.shape)}; expected (n, 4) and (n,)"
        )
    if count and (labels.is_floating_point() or labels.is_complex()):
        raise TargetError(
            f"{_image_name(index, [target] * (index + 1))} has labels of {labels.dtype}; expected integers, such as int64"
        )
    return count


def _check_values(targets: Sequence[Mapping[str, Tensor]], counts: Sequence[int], num_classes: int | None) -> None:
    used = [index for index, count in enumerate(counts) if count]
    if not used:
        return
    boxes = torch.cat([targets[index]["boxes"] for index in used]).cpu()
    labels = torch.cat([targets[index]["labels"] for index in used]).cpu()
    owners = torch.repeat_interleave(torch.tensor(used), torch.tensor([counts[index] for index in used]))
    # Written so that NaN fails.
    good = ((boxes >= 0) & (boxes <= 1 + BORDER_SLACK)).all(-1) & (boxes[:, 2:] > 0).all(-1)
    if not bool(good.all()):
        worst = int(torch.nonzero(~good)[0])
        box = [round(value, 4) for value in boxes[worst].tolist()]
        raise TargetError(
            f"{_image_name(int(owners[worst]), targets)} has the box {box}; expected (center x, center y, width, "
            "height) as fractions of the image, within [0, 1], width and height above 0: divide pixels by the image's "
            "size, clip boxes to the image and drop those without area"
        )
    top = labels.max() if num_classes is None else num_classes - 1
    good = (labels >= 0) & (labels <= top)
    if not bool(good.all()):
        worst = int(torch.nonzero(~good)[0])
        limit = "0 or more" if num_classes is None else f"0 to {num_classes - 1} (num_classes = {num_classes})"
        raise TargetError(
            f"{_image_name(int(owners[worst]), targets)} has label {int(labels[worst])}; expected {limit}: "
            "renumber the labels or raise num_classes"
        )
