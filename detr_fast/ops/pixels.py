"""Images that lie channels last as rows of pixels, which kernels and products take."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rows_of(x: Tensor | None) -> Any:
    """(B, C, H, W) as (B, H, W, C): a view, and contiguous where x is channels last."""
    return None if x is None else x.permute(0, 2, 3, 1)


def images_of(rows: Tensor) -> Tensor:
    """(B, H, W, C) as (B, C, H, W)."""
    return rows.permute(0, 3, 1, 2)


def pixels_of(x: Tensor) -> Tensor:
    """(B, C, H, W) as (B * H * W, C); a view where x is channels last."""
    return rows_of(x).reshape(-1, x.shape[1])  # type: ignore[no-any-return]


def input_gradient(g: Tensor, weight: Tensor, like: Tensor, added: Tensor | None = None) -> Tensor:
    """That of a 1×1 convolution, `like` its input: g @ weight + added. In added's memory, which nobody else may read: out of place, cuBLAS
    would copy it first. Not where that is to be differentiated once more.
    """
    rows = pixels_of(g)
    if added is None:
        total = rows @ weight
    elif torch.is_grad_enabled():
        total = torch.addmm(pixels_of(added), rows, weight)
    else:
        total = pixels_of(added).addmm_(rows, weight)
    batch, channels, height, width = like.shape
    return images_of(total.view(batch, height, width, channels))
