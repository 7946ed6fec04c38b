"""Cross-entropy of a linear layer by PyTorch's operations, on a block of rows at a time; see `linear_cross_entropy`.

What is kept for backward is one number a row, the logarithm of the softmax's sum; backward computes each block again.
Source: Wijmans et al., 2024, arXiv:2411.09009, "Cut Your Losses in Large-Vocabulary Language Models".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from detr_fast.ops import linear_probabilities
from detr_fast.ops.products import eager_gradients


@dataclass(frozen=True)
class _Labels:
    """What the rows are: labels and counts (N,), class_weight (V,) or None, present (N,), 0 where ignored, else 1.

    share: the label smoothing; where it is 0, present is None.
    """

    labels: Tensor
    counts: Tensor
    class_weight: Tensor | None
    present: Tensor | None
    share: float


def _losses(logits: Tensor, lse: Tensor, of: _Labels, rows: slice) -> Tensor:
    loss = (lse - logits.gather(1, of.labels[rows, None])[:, 0]) * of.counts[rows]
    if of.present is None:
        return loss
    class_weight = of.class_weight
    if class_weight is None:
        everything = lse * logits.shape[1] - logits.sum(1)
    else:
        everything = lse * class_weight.sum() - logits @ class_weight
    return loss * (1.0 - of.share) + everything * of.present[rows] * (of.share / logits.shape[1])


def _logit_gradient(logits: Tensor, lse: Tensor, of: _Labels, rows: slice, g: Tensor) -> Tensor:
    """Of the rows' losses, weighted with g (n,), for the logits, in whose memory it lies."""
    probability = logits.sub_(lse[:, None]).exp_()
    at_label = g * of.counts[rows]
    if of.present is None:
        return probability.mul_(at_label[:, None]).scatter_add_(1, of.labels[rows, None], -at_label[:, None])
    class_weight = of.class_weight
    at_label = at_label * (1.0 - of.share)
    everywhere = g * of.present[rows] * (of.share / logits.shape[1])
    total = float(logits.shape[1]) if class_weight is None else class_weight.sum()
    probability.mul_((at_label + everywhere * total)[:, None])
    probability.scatter_add_(1, of.labels[rows, None], -at_label[:, None])
    return probability.sub_(everywhere[:, None] if class_weight is None else everywhere[:, None] * class_weight)


class Chunked(torch.autograd.Function):
    """Losses (N,) of rows x (N, E): fp32 at least, not yet divided."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        counts: Tensor,
        class_weight: Tensor | None,
        present: Tensor | None,
        share: float,
    ) -> Tensor:
        of = _Labels(labels, counts, class_weight, present, share)
        losses, lses = torch.empty_like(counts), torch.empty_like(counts)
        with torch.autocast(x.device.type, enabled=False):
            for rows in _blocks(x, weight):
                logits = F.linear(x[rows], weight, bias).to(counts.dtype)
                lses[rows] = lse = logits.logsumexp(1)
                losses[rows] = _losses(logits, lse, of, rows)
        ctx.save_for_backward(x, weight, bias, lses, labels, counts, class_weight, present)
        ctx.share = share
        return losses

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, weight, bias, lses, labels, counts, class_weight, present = ctx.saved_tensors
        of, wanted = _Labels(labels, counts, class_weight, present, ctx.share), ctx.needs_input_grad[:3]
        dtype = of.counts.dtype
        # The mean over nothing divides by zero: what is ignored has no gradient even so, as in PyTorch.
        g = g.masked_fill((counts if present is None else present) == 0, 0.0)
        if torch.is_grad_enabled():  # a double backward will follow: through PyTorch's own ops

            def again(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
                logits = F.linear(x, weight, bias).to(dtype)
                return _losses(logits, logits.logsumexp(1), of, slice(None))

            return (*eager_gradients(again, (x, weight, bias), g, wanted), *[None] * 5)

        dx = torch.empty_like(x) if wanted[0] else None
        dw = torch.zeros_like(weight, dtype=dtype) if wanted[1] else None
        db = torch.zeros_like(bias, dtype=dtype) if wanted[2] else None
        for rows in _blocks(x, weight):
            logits = F.linear(x[rows], weight, bias).to(dtype)
            gradient = _logit_gradient(logits, lses[rows], of, rows, g[rows])
            if db is not None:
                db += gradient.sum(0)
            gradient = gradient.to(x.dtype)
            if dx is not None:
                dx[rows] = gradient @ weight
            if dw is not None:
                dw += gradient.mT @ x[rows]
        dw, db = (None if d is None else d.to(x.dtype) for d in (dw, db))
        return dx, dw, db, None, None, None, None, None


def _blocks(x: Tensor, weight: Tensor) -> list[slice]:
    size = max(1, linear_probabilities.BLOCK_ELEMENTS // weight.shape[0])
    return [slice(start, start + size) for start in range(0, x.shape[0], size)]
