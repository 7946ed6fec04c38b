"""Inputs that the tests of deformable attention share, and what is right for one sample."""

from __future__ import annotations

import torch

from detr_fast import ops

SHAPES = [(3, 5), (2, 3), (1, 1)]


def make_case(batch=2, queries=11, heads=2, channels=32, points=(2, 2, 2), shapes=SHAPES, device="cpu"):
    """value, locations, some of them outside, and weights: one dimension for the points of all levels."""
    pixels, total = sum(h * w for h, w in shapes), sum(points)
    value = torch.randn(batch, pixels, heads, channels, device=device)
    locations = torch.rand(batch, queries, heads, total, 2, device=device) * 1.6 - 0.3
    # At a pixel's center gradients jump, and rounding decides for one side: not so near.
    size = torch.tensor([(w, h) for (h, w), n in zip(shapes, points) for _ in range(n)], device=device).view(-1, 2)
    pixel = (locations * size - 0.5).floor()
    locations = (pixel + 0.5 + (locations * size - 0.5 - pixel).clamp(0.01, 0.99)) / size.clamp(min=1)
    return value, locations, torch.rand(batch, queries, heads, total, device=device)


def by_hand(value, locations, weights, points=(2, 2, 2), shapes=SHAPES):
    """One sample after the other, of one image, query and head: the paper's formula, and bilinear interpolation in words."""
    out, first, k = torch.zeros(value.shape[-1], dtype=value.dtype), 0, 0
    for (height, width), n in zip(shapes, points):
        for _ in range(n):
            x, y = (locations[k] * torch.tensor([width, height]) - 0.5).tolist()
            for row in range(height):
                for column in range(width):
                    share = max(0.0, 1 - abs(x - column)) * max(0.0, 1 - abs(y - row))
                    out += weights[k] * share * value[first + row * width + column]
            k += 1
        first += height * width
    return out


def by_points(points, shapes=SHAPES):
    return lambda value, locations, weights: ops.deformable_attention(value, shapes, locations, weights, points)


def make_offsets(coordinates, batch=2, queries=5, heads=2, channels=16, points=(2, 1, 3), shapes=SHAPES, device="cpu"):
    """value, references, offsets and logits: the locations of `make_case`, around points or boxes of each query and level."""
    value, locations, weights = make_case(batch, queries, heads, channels, points, shapes, device)
    references = torch.rand(batch, queries, len(shapes), coordinates, device=device) * 0.5 + 0.25
    parts = []
    for i, (part, (height, width), n) in enumerate(zip(locations.split(points, 3), shapes, points)):
        reference = references[:, :, i, None, None]
        step = (
            torch.tensor([1 / width, 1 / height], device=device)
            if coordinates == 2
            else reference[..., 2:] * 0.5 / max(n, 1)
        )
        parts.append((part - reference[..., :2]) / step)
    return value, references, torch.cat(parts, 3), weights.log() * 2


def by_offsets(points=(2, 1, 3), shapes=SHAPES, **options):
    return lambda *tensors: ops.deformable_attention_from_offsets(tensors[0], shapes, *tensors[1:], points, **options)
