"""Box arithmetic on (center x, center y, width, height) boxes."""

from __future__ import annotations

import torch
from torch import Tensor


def to_corners(boxes: Tensor) -> Tensor:
    """(..., 4) center boxes -> (..., 4) corner boxes (x0, y0, x1, y1)."""
    center, size = boxes[..., :2], boxes[..., 2:]
    half = size * 0.5
    return torch.cat((center - half, center + half), dim=-1)
