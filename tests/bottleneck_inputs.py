"""Bottlenecks of a ResNet with frozen norms, and what goes into them."""

from __future__ import annotations

import torch

from detr_fast.ops.bottlenecks import PRODUCT, Bottleneck, Geometry

# Stride and dilation of the first block's 3×3 convolution, and whether it has a shortcut of its own.
FIRST = {"strided": (2, 1, True), "dilated": (1, 2, True), "inner": (1, 1, False)}


def make_blocks(kind="strided", count=3, wide=16, middle=8, dtype=torch.float64, spread=1.0, device="cpu"):
    """scales: between 1 / spread and spread, of either sign."""
    stride, dilation, shortcut = FIRST[kind]
    blocks = []
    for i in range(count):
        first = i == 0 and shortcut
        entering = wide // 2 if first else wide
        step = stride if i == 0 else 1
        shapes = [(middle, entering, 1, 1), (middle, middle, 3, 3), (wide, middle, 1, 1)]
        geometries = [PRODUCT, Geometry((step,) * 2, (dilation,) * 2, (dilation,) * 2, 1), PRODUCT]
        if first:
            shapes.append((wide, entering, 1, 1))
            geometries.append(PRODUCT._replace(stride=(step,) * 2))
        weights = [
            torch.randn(shape, device=device) * 2 / shape[1:].numel() ** 0.5 for shape in map(torch.Size, shapes)
        ]
        scales = [
            spread ** (2 * torch.rand(n, device=device) - 1) * torch.randn(n, device=device).sign() for n, *_ in shapes
        ]
        shifts = [torch.randn(n, device=device) * 0.2 for n, *_ in shapes[:3]]
        wider = torch.promote_types(dtype, torch.float32)
        blocks.append(
            Bottleneck(
                tuple(w.to(dtype).contiguous(memory_format=torch.channels_last) for w in weights),
                *(tuple(t.to(wider) for t in ts) for ts in (scales, shifts)),
                tuple(geometries),
            )
        )
    return blocks


def make_input(blocks, size=(5, 7)):
    weight = blocks[0].weights[0]
    x = torch.randn(2, weight.shape[1], *size, dtype=weight.dtype, device=weight.device).relu()
    return x.contiguous(memory_format=torch.channels_last)
