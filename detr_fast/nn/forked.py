"""A convolution beside which its input goes on, as in residual blocks: one gradient of the input, added up inside the product."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detr_fast.ops.bottlenecks import is_product
from detr_fast.ops.boundary import wants_grad
from detr_fast.ops.pixels import input_gradient, pixels_of


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
        d_weight = (pixels_of(dy).t() @ pixels_of(x)).view(weight.shape) if ctx.needs_input_grad[1] else None
        # Nobody else sees dx, which was just written.
        return input_gradient(dy, weight.flatten(1), x, dx) if ctx.needs_input_grad[0] else None, d_weight
