"""What transformers' labels say of true boxes, as tensors: what the host knows of them travels in one copy that it does not wait for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


class Targets(NamedTuple):
    """The M true boxes of a batch of B images, in order, and padded to N an image by copies of others."""

    boxes: Tensor  # (B, N, 4), center x, center y, width, height
    labels: Tensor  # (B, N), those out of range the nearest in range
    counts: Tensor  # (B,)
    good: Tensor  # bool: labels are in range, boxes are boxes
    all_boxes: Tensor  # (M, 4)
    all_labels: Tensor  # (M,)
    image: Tensor  # (M,), whose box it is
    slot: Tensor  # (M,), where in (B, N) it is
    more: list[Tensor]  # of the host's, what else was to travel
    trained: Tensor  # (B, N), labels, and -100 where that is ignored


def padded(
    labels: Sequence[Mapping[str, Tensor]],
    device: torch.device,
    num_labels: int,
    more: Sequence[Sequence[int]] = (),
    *,
    ignores: bool = False,
) -> Targets:
    """What the shapes say travels to the device in one copy that the host does not wait for; `more` lists come along.

    ignores: -100 is a label, too, which is not trained, and is matched as the hundredth from behind.
    """
    counts = counts_of(labels)
    most = max(counts)
    starts = [0, *accumulate(counts)]
    last = max(starts[-1] - 1, 0)
    places = [min(start + n, last) for start in starts[:-1] for n in range(most)]
    image = [b for b, count in enumerate(counts) for _ in range(count)]
    slot = [b * most + n for b, count in enumerate(counts) for n in range(count)]
    lists = (counts, places, image, slot, *more)
    on_host = torch.tensor([number for one in lists for number in one], dtype=torch.int64, device="cpu")
    count, place, of_image, of_slot, *rest = sent(on_host, device).split([len(one) for one in lists])
    place = place.view(len(counts), most)
    all_labels = torch.cat([target["class_labels"] for target in labels])
    all_boxes = torch.cat([target["boxes"] for target in labels])
    nearest = all_labels.clamp(
        0, num_labels - 1
    )  # where they are used as places: those out of range end a CUDA context
    if ignores:
        nearest = torch.where(all_labels == -100, num_labels - 100, nearest)
        in_range = ((all_labels == nearest) | (all_labels == -100)).all()
    else:
        in_range = (all_labels == nearest).all()
    good = in_range & (all_boxes[..., 2:] >= 0).all() & (all_boxes == all_boxes).all()
    found = nearest[place]
    trained = torch.where(all_labels[place] == -100, -100, found) if ignores else found
    return Targets(
        all_boxes[place], found, count, good, all_boxes, nearest, of_image, of_slot, list(rest), trained=trained
    )


def sent(on_host: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host's on the device, without waiting for it."""
    if device.type == "cuda" and torch.cuda.is_available():
        on_host = on_host.pin_memory()
    return on_host.to(device, non_blocking=True)


def counts_of(labels: Sequence[Mapping[str, Tensor]]) -> list[int]:
    """How many true boxes each image has, without a look at the device."""
    return [len(target["class_labels"]) for target in labels]


def are_targets(labels: Any, images: int, device: torch.device) -> bool:
    """Whether labels are as transformers documents them, an int64 class and a box each."""
    if device.type not in ("cpu", "cuda", "meta"):  # where the assignment has an implementation
        return False
    if not isinstance(labels, Sequence) or not labels or len(labels) != images:
        return False
    return all(_is_target(target, device) for target in labels)


def _is_target(target: Any, device: torch.device) -> bool:
    if not isinstance(target, Mapping) or "class_labels" not in target or "boxes" not in target:
        return False
    labels, boxes = target["class_labels"], target["boxes"]
    return (
        isinstance(labels, Tensor)
        and isinstance(boxes, Tensor)
        and labels.dtype == torch.int64
        and boxes.is_floating_point()
        and labels.ndim == 1
        and tuple(boxes.shape) == (len(labels), 4)
        and labels.device == boxes.device == device
    )


def are_predictions(given: Sequence[Any], shapes: Sequence[Sequence[int]], classes: int) -> bool:
    """Whether what is given is logits and boxes in turn, of these shapes before the classes or coordinates."""
    return len(given) == len(shapes) and all(
        isinstance(one, Tensor) and one.is_floating_point() and one.shape == (*shape, (classes, 4)[n % 2])
        for n, (one, shape) in enumerate(zip(given, shapes))
    )


def has_values(tensor: Tensor) -> bool:
    """Whether a look costs nothing and there is something to see."""
    traced = isinstance(tensor, FakeTensor) or torch.jit.is_tracing()
    return tensor.device.type == "cpu" and not traced
