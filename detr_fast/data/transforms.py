"""Augmentation: the original repository's recipe in torchvision's transforms v2.

Training: horizontal flip; then, by a coin, a resize to a random size, or a random crop of the picture resized smaller
and then that resize. Evaluation: one fixed resize. Both end in ImageNet's normalisation. Images stay uint8 until there.
Source: Carion et al., 2020, arXiv:2005.12872, and facebookresearch/detr.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class TransformConfig:
    """Sizes in pixels; the defaults are the original's for COCO.

    Attributes:
        sizes: the shorter side in training, one drawn for each image.
        max_size: the longer side never exceeds it (the shorter then falls below its size).
        crop: half of the training images are random crops.
        eval_size: the shorter side in evaluation.
        horizontal_flip: its probability. 0 where left and right differ in meaning, as in text.
        vertical_flip: its probability. For pictures without an upside, as from microscopes and satellites.
        color_jitter: strength of random brightness, contrast and saturation; 0 is none.
    """

    sizes: tuple[int, ...] = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    max_size: int = 1333
    crop: bool = True
    eval_size: int = 800
    horizontal_flip: float = 0.5
    vertical_flip: float = 0.0
    color_jitter: float = 0.0

    def __post_init__(self) -> None:
        if not self.sizes or min(*self.sizes, self.eval_size, self.max_size) < 1:
            raise ValueError(
                f"sizes {self.sizes}, eval_size {self.eval_size}, max_size {self.max_size}: "
                "expected at least one size, and all of them 1 or more"
            )

    @property
    def max_area(self) -> int:
        """The most pixels that a training image can have."""
        return max(self.sizes) * self.max_size


def train_transforms(config: TransformConfig) -> v2.Transform:
    """The augmenting transform of (image uint8 (3, H, W), target) to (image float32, target)."""
    steps: list[v2.Transform] = []
    if config.horizontal_flip:
        steps.append(v2.RandomHorizontalFlip(config.horizontal_flip))
    if config.vertical_flip:
        steps.append(v2.RandomVerticalFlip(config.vertical_flip))
    resize = RandomShorterSide(config.sizes, config.max_size)
    steps.append(v2.RandomChoice([resize, RandomSizedCrop(config.sizes, config.max_size)]) if config.crop else resize)
    if config.color_jitter:
        strength = config.color_jitter
        steps.append(v2.ColorJitter(brightness=strength, contrast=strength, saturation=strength))
    return v2.Compose([*steps, *_normalise()])


def eval_transforms(config: TransformConfig) -> v2.Transform:
    """The deterministic transform of (image uint8 (3, H, W), target) to (image float32, target)."""
    return v2.Compose([RandomShorterSide((config.eval_size,), config.max_size), *_normalise()])


def _normalise() -> list[v2.Transform]:
    to_float = v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True)
    return [to_float, v2.Normalize(IMAGENET_MEAN, IMAGENET_STD, inplace=True)]


def fit(height: int, width: int, shorter: int, longest: int) -> tuple[int, int]:
    """Height and width scaled so that the shorter side is `shorter`, or the longer one `longest` if that is smaller."""
    scale = min(shorter / min(height, width), longest / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def _draw(low: int, high: int) -> int:
    """An integer from low to high, both included."""
    return int(torch.randint(low, high + 1, ())) if high > low else low


class RandomShorterSide(v2.Transform):
    """Resize so that the shorter side is one of `sizes`; unlike v2.RandomShortestSize, never to less than one pixel."""

    def __init__(self, sizes: Sequence[int], max_size: int) -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        self.max_size = max_size

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = v2.query_size(flat_inputs)
        return {"size": list(fit(height, width, self.sizes[_draw(0, len(self.sizes) - 1)], self.max_size))}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return self._call_kernel(F.resize, inpt, size=params["size"], antialias=True)


class RandomSizedCrop(v2.Transform):
    """The original's resize, crop, resize in one interpolation.

    The original resizes the shorter side to 400, 500 or 600, crops a window of 384 to 600 pixels a side, and resizes
    that to the training sizes of 480 to 800. Here the same window is cut out of the source and resized once; for other
    sizes, those figures keep their ratio to the largest size.
    """

    def __init__(self, sizes: Sequence[int], max_size: int) -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        self.max_size = max_size
        unit = max(sizes) / 800
        self.first_sizes = tuple(round(unit * size) for size in (400, 500, 600))
        self.window = (round(unit * 384), round(unit * 600))

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = v2.query_size(flat_inputs)
        scale = self.first_sizes[_draw(0, 2)] / min(height, width)
        spans = []
        for length in (height, width):
            scaled = max(1, round(length * scale))
            window = _draw(min(self.window[0], scaled), min(self.window[1], scaled))
            start = _draw(0, scaled - window)
            first = min(length - 1, round(start / scale))
            spans.append((first, max(1, min(length - first, round(window / scale)))))
        (top, crop_height), (left, crop_width) = spans
        size = fit(crop_height, crop_width, self.sizes[_draw(0, len(self.sizes) - 1)], self.max_size)
        return {"top": top, "left": left, "height": crop_height, "width": crop_width, "size": list(size)}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return self._call_kernel(F.resized_crop, inpt, **params, antialias=True)
