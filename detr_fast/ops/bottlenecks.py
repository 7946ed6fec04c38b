"""Bottlenecks of a ResNet with frozen norms, as ops take them, and what is known of their sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

# As many bytes as a GPU moves while it launches one small kernel: 2.5 µs (with the gap before it) at 4.1 TB/s, on an H200.
LAUNCH = 10 << 20


class Geometry(NamedTuple):
    """Of a convolution, as `torch.nn.functional.conv2d` takes it."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def size(self, height: int, width: int, weight: Tensor) -> tuple[int, int]:
        """Of what comes out."""
        high, wide = (
            (length + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for length, kernel, stride, padding, dilation in zip(
                (height, width), weight.shape[2:], self.stride, self.padding, self.dilation
            )
        )
        return high, wide


PRODUCT = Geometry((1, 1), (0, 0), (1, 1), 1)  # of a 1×1 convolution that is a product of pixels and channels


class Bottleneck(NamedTuple):
    """y = relu(s3 * conv3(z2) + b3 + residual), z2 = relu(s2 * conv2(z1) + b2), z1 = relu(s1 * conv1(x) + b1).

    weights: of conv1, conv2, conv3 and, where the residual is s4 * conv4(x) and not x, of conv4; conv1 and conv3 are products
    (`is_product`). scales: (C,) for each weight, shifts: b1, b2, b3, which need no gradient, fp32 (fp64 for fp64).
    """

    weights: tuple[Tensor, ...]
    scales: tuple[Tensor, ...]
    shifts: tuple[Tensor, ...]
    geometries: tuple[Geometry, ...]


def is_product(conv: nn.Conv2d) -> bool:
    """Whether a convolution without bias is a product of pixels and channels."""
    plain = conv.kernel_size == (1, 1) and conv.stride == (1, 1) and conv.padding == (0, 0) and conv.groups == 1
    return plain and conv.bias is None


def as_bottleneck(
    convs: Sequence[nn.Conv2d], weights: Sequence[Tensor], scales: Sequence[Tensor], shifts: Sequence[Tensor]
) -> Bottleneck | None:
    """Of conv1 to conv3 and, where there is one, conv4; None for other blocks, and where one pads otherwise than with so many zeros."""
    if len(convs) < 3 or not (is_product(convs[0]) and is_product(convs[2])):
        return None
    if any(conv.padding_mode != "zeros" or isinstance(conv.padding, str) or conv.bias is not None for conv in convs):
        return None
    geometries = tuple(Geometry(conv.stride, conv.padding, conv.dilation, conv.groups) for conv in convs)  # type: ignore[arg-type]
    return Bottleneck(tuple(weights), tuple(scales), tuple(shifts), geometries)
