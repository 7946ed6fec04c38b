"""What `tune` measures of `ops.pointwise_affine`: products of ResNet-50's stages, images of 800×1066, forward and backward."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from detr_fast.ops.pointwise_affine import measured_as, pointwise_affine


class Size(NamedTuple):
    """Of x (images, width, *pixels), to so many channels; residual: of the result's shape."""

    images: int
    pixels: tuple[int, int]
    width: int
    channels: int
    residual: bool

    @property
    def regime(self) -> str:
        return measured_as(self.residual, self.width, self.channels)

    @property
    def nbytes(self) -> int:
        """Of x."""
        return 2 * self.images * self.pixels[0] * self.pixels[1] * self.width

    def __str__(self) -> str:
        return f"({self.images}, {self.width}, {self.pixels[0]}, {self.pixels[1]}) -> {self.channels}"


# By stage: pixels, and channels inside a bottleneck, which has four times as many outside. The first product of a block goes in, the
# last one out again, where the residual comes in. Of many images the last stage's longest products are as large as earlier ones'.
STAGES = {1: ((200, 267), 64), 2: ((100, 134), 128), 3: ((50, 67), 256), 4: ((25, 34), 512)}
SIZES = tuple(
    Size(images, pixels, *((inside, 4 * inside) if residual else (4 * inside, inside)), residual)
    for residual in (True, False)
    for images, stage in ((1, 1), (4, 2), (4, 1), (1, 3), (4, 4), (4, 3), (16, 4))
    for pixels, inside in (STAGES[stage],)
)


def inputs(device: torch.device, size: Size) -> tuple[list[Tensor], Tensor, Tensor]:
    """x, the weight and, where there is one, the residual, in bf16, which train; and scale and shift."""

    def features(channels: int) -> Tensor:
        drawn = torch.randn(size.images, channels, *size.pixels, device=device)
        return drawn.to(torch.bfloat16, memory_format=torch.channels_last)

    weight = size.width**-0.5 * torch.randn(size.channels, size.width, 1, 1, device=device)
    trained = [features(size.width), weight.to(torch.bfloat16)]
    trained += [features(size.channels)] if size.residual else []
    scale, shift = torch.rand(size.channels, device=device) + 0.5, torch.randn(size.channels, device=device)
    return [t.requires_grad_() for t in trained], scale, shift


def run(scale: Tensor, shift: Tensor, x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Tensor:
    return pointwise_affine(x, weight, scale, shift, residual)
