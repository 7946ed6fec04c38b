"""Deformable attention by PyTorch's operations: the reference, and what is deterministic and has derivatives of any order."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from detr_fast.kernels.deformable_attention import Level
from detr_fast.ops.boundary import wants_grad

Levels = tuple[Level, ...]


def located(
    references: Tensor, offsets: Tensor, logits: Tensor, levels: Levels, spread: float
) -> tuple[Tensor, Tensor]:
    """Locations (B, Q, H, K, 2) and weights (B, Q, H, K) that `deformable_attention_from_offsets` samples by."""
    parts = []
    for i, (part, (height, width, n)) in enumerate(zip(offsets.split([n for *_, n in levels], 3), levels)):
        reference = references[:, :, min(i, references.shape[2] - 1), None, None]
        if references.shape[-1] == 2:
            step = torch.stack([part[..., 0] / max(width, 1), part[..., 1] / max(height, 1)], -1)
        else:
            step = part * (spread / max(n, 1)) * reference[..., 2:]
        parts.append(reference[..., :2] + step)
    return torch.cat(parts, 3), logits.softmax(-1)


def sized(levels: Levels, shapes: Tensor | None) -> Levels:
    """The levels with heights and widths that the device holds, for which the host waits."""
    if shapes is None:
        return levels
    return tuple((height, width, n) for (height, width), (*_, n) in zip(shapes.tolist(), levels))


def result_of(value: Tensor, weights: Tensor) -> torch.dtype:
    return torch.promote_types(value.dtype, weights.dtype)


def eager(value: Tensor, locations: Tensor, weights: Tensor, levels: Levels) -> Tensor:
    """By PyTorch's grid_sample; where that has no deterministic backward, or no forward-mode derivative, by indexing."""
    deterministic = value.is_cuda and torch.are_deterministic_algorithms_enabled()
    if (deterministic and wants_grad(value, locations, weights)) or forward_ad._current_level >= 0:
        return by_indexing(value, locations, weights, levels)
    if not (value.numel() and weights.numel()):  # which grid_sample refuses
        nothing = sum(t.flatten()[:0].sum() for t in (value, locations, weights))  # 0, whatever they hold
        return nothing.expand(*weights.shape[:3], value.shape[-1]).to(result_of(value, weights)).contiguous()  # type: ignore[union-attr]
    images, _, heads = weights.shape[:3]
    dtype = torch.promote_types(value.dtype, locations.dtype)
    planes = value.permute(0, 2, 3, 1).flatten(0, 1).to(dtype)  # (B · H, E, S)
    # Of an infinite place grid_sample makes 0 · inf. No pixel is read farther than half a level outside.
    grid = (2 * locations.to(dtype) - 1).clamp(-3.0, 3.0).transpose(1, 2).flatten(0, 1)  # (B · H, Q, K, 2)
    sizes = [height * width for height, width, _ in levels]
    samples = []
    for plane, places, (height, width, n) in zip(
        planes.split(sizes, -1), grid.split([n for *_, n in levels], 2), levels
    ):
        if height * width == 0:
            samples.append(plane.new_zeros(*plane.shape[:2], places.shape[1], n))
            continue
        image = plane.unflatten(-1, (height, width))
        samples.append(F.grid_sample(image, places, mode="bilinear", padding_mode="zeros", align_corners=False))
    share = weights.transpose(1, 2).flatten(0, 1)[:, None]  # (B · H, 1, Q, K)
    out = (torch.cat(samples, -1) * share).sum(-1)  # (B · H, E, Q)
    return out.unflatten(0, (images, heads)).permute(0, 3, 1, 2).to(result_of(value, weights)).contiguous()


def by_indexing(value: Tensor, locations: Tensor, weights: Tensor, levels: Levels) -> Tensor:
    """The same by indexing, whose backward is deterministic, and has a backward of its own."""
    dtype = torch.promote_types(torch.promote_types(value.dtype, locations.dtype), torch.float32)
    images, _, heads, _ = value.shape

    def per_point(numbers: Iterable[int], kind: torch.dtype) -> Tensor:
        """One number of each level, as often as it has points; written by the device, so that a CUDA graph may hold it."""
        pairs = zip(numbers, levels)
        return torch.cat([torch.full((n,), number, dtype=kind, device=value.device) for number, (*_, n) in pairs])

    heights, widths = zip(*(level[:2] for level in levels))
    first = per_point(accumulate((h * w for h, w, _ in levels[:-1]), initial=0), torch.int64)
    size = torch.stack([per_point(widths, dtype), per_point(heights, dtype)], -1)
    # As far outside as any: what is farther, infinitely, would be NaN.
    position = (locations.to(dtype) * size - 0.5).clamp(min=-2.0).minimum(size + 1.0)
    pixel = position.detach().floor()
    way = position - pixel
    image = torch.arange(images, device=value.device)[:, None, None, None]
    head = torch.arange(heads, device=value.device)[:, None]
    out: Any = 0
    for right in (0, 1):
        for below in (0, 1):
            corner = torch.stack([pixel[..., 0] + right, pixel[..., 1] + below], -1)
            there = ((corner >= 0) & (corner < size)).all(-1)
            x, y = torch.where(there[..., None], corner, 0.0).long().unbind(-1)
            row = torch.where(there, first + y * size[:, 0].long() + x, 0)
            share = (way[..., 0] if right else 1 - way[..., 0]) * (way[..., 1] if below else 1 - way[..., 1])
            found = value.to(dtype)[image, row, head]  # (B, Q, H, K, E)
            out = out + ((share * there * weights.to(dtype))[..., None] * found).sum(-2)
    return out.to(result_of(value, weights))  # type: ignore[no-any-return]
