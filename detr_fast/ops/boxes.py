"""Overlaps of (center x, center y, width, height) boxes, with broadcasting."""

from __future__ import annotations

import torch
from torch import Tensor

BORDER_SLACK = 1e-5  # float32 rounding of a box that touches the border


def generalized_iou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised intersection over union of center boxes: (..., 4) with (..., 4), broadcast, -> (...).

    Source: Rezatofighi et al., 2019, arXiv:1902.09630.
    """
    return both_ious(a, b)[1]


def both_ious(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Intersection over union, and the generalised one."""
    a_x, a_y, a_width, a_height = a.unbind(-1)
    b_x, b_y, b_width, b_height = b.unbind(-1)
    overlap_x, enclosing_x = _overlap(a_x, a_width, b_x, b_width)
    overlap_y, enclosing_y = _overlap(a_y, a_height, b_y, b_height)
    intersection = overlap_x * overlap_y
    union = a_width * a_height + b_width * b_height - intersection
    enclosing = enclosing_x * enclosing_y
    iou = intersection / union
    return iou, iou + union / enclosing - 1


def _overlap(a: Tensor, a_length: Tensor, b: Tensor, b_length: Tensor) -> tuple[Tensor, Tensor]:
    """Of two intervals: the length that both cover, and the length from the first start to the last end."""
    a_half, b_half = a_length * 0.5, b_length * 0.5
    signed = torch.minimum(a + a_half, b + b_half) - torch.maximum(a - a_half, b - b_half)
    # max(x) + min(x) = sum(x), so the enclosing length needs no minimum and maximum of its own.
    return signed.clamp(min=0), a_length + b_length - signed
