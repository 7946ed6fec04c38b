"""The gradient of a 1×1 convolution's input with what follows it back to the product before, of a ResNet of frozen batch norms.

Registration alone: `ops.bottlenecks_autograd` calls it where products run on kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from detr_fast.kernels.pointwise import pointwise_backward, pointwise_forward
from detr_fast.ops.boundary import define, wants_grad
from detr_fast.ops.pixels import images_of, rows_of


def _run(g: Tensor, weight: Tensor, added: Tensor | None, y: Tensor | None, scale: Tensor | None) -> Tensor:
    return images_of(pointwise_backward(rows_of(g), weight, rows_of(added), rows_of(y), scale))


def _fake(g: Tensor, weight: Tensor, *beside: Any) -> Tensor:
    batch, _, height, width = g.shape
    return images_of(g.new_empty((batch, height, width, weight.shape[1])))


def _eager(g: Tensor, weight: Tensor, added: Tensor | None, y: Tensor | None, scale: Tensor | None) -> Tensor:
    found = rows_of(g) @ weight
    if added is not None:
        found = found + rows_of(added)
    if y is not None:
        found = found.masked_fill(rows_of(y) <= 0, 0.0)
    return images_of(found if scale is None else (found * scale).to(g.dtype))


def _autograd(g: Tensor, weight: Tensor, added: Tensor | None, *rest: Any) -> Tensor:
    below = _eager if wants_grad(g, weight, added) else pointwise_gradient.below
    return below(g, weight, added, *rest)  # type: ignore[no-any-return]


# (g @ weight + added) * scale where y > 0: g (B, N, H, W), weight (N, K), added, y and the result (B, K, H, W), channels last; scale
# fp32 (K,). What may be left out is.
pointwise_gradient = define(
    "pointwise_gradient(Tensor g, Tensor weight, Tensor? added, Tensor? y, Tensor? scale) -> Tensor",
    run=_run,
    fake=_fake,
    autograd=_autograd,
)


def rehearse(entering: int, middle: int, leaving: int, shortcut: bool, dtype: torch.dtype) -> None:
    """Of a bottleneck's two products, forward and backward, on meta tensors; shortcut: whether its residual has a scale."""

    def made(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, z, y = made(1, entering), made(1, middle), made(1, leaving)
    first, last = made(middle, entering), made(leaving, middle)
    inner, outer = (made(n, dtype=torch.float32) for n in (middle, leaving))
    pointwise_forward(x, first, inner, inner)
    pointwise_forward(z, last, outer, outer, y, outer if shortcut else None)
    pointwise_backward(y, last, None, z, inner)
    pointwise_backward(z, first, x, x, None)
