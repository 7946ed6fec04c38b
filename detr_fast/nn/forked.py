"""A convolution beside which its input goes on, as in residual blocks: one gradient of the input, added up inside the product."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detr_fast.ops.bottlenecks import is_product
from detr_fast.ops.boundary import wants_grad


def forks(conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether the convolution is a product of pixels and channels, and x is trained through it."""
    return is_product(conv) and wants_grad(x)


class Forked(torch.autograd.Function):
    """A 1×1 convolution of x, and x, which goes on beside it: their gradients are added up inside the product.

    x (B, C, H, W), channels last best; weight (N, C, 1, 1), of x's dtype. Only one may read what goes on, and give its gradient in memory of its own.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight)
        ctx.set_materialize_grads(False)
        return F.conv2d(x, weight), x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dx: Tensor | None) -> Any:
        x, weight = ctx.saved_tensors
        if dy is None:
            return dx, None
        rows, matrix = _pixels(dy), weight.flatten(1)
        d_weight = (rows.t() @ _pixels(x)).view(weight.shape) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, d_weight
        if dx is None:
            total = rows @ matrix
        elif torch.is_grad_enabled():  # to be differentiated once more
            total = torch.addmm(_pixels(dx), rows, matrix)
        else:  # in place: out of place, cuBLAS would copy dx first. Nobody else sees what was just written.
            total = _pixels(dx).addmm_(rows, matrix)
        batch, channels, height, width = x.shape
        return total.view(batch, height, width, channels).permute(0, 3, 1, 2), d_weight


def _pixels(x: Tensor) -> Tensor:
    """(B, C, H, W) as (B * H * W, C); a view where x is channels last."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
