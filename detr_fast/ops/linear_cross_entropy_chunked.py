"""Cross-entropy of a linear layer by PyTorch's operations, on a block of rows at a time; see `linear_cross_entropy`.

What is kept for backward is one number a row, the logarithm of the label's probability; backward computes each block again.
Products are in x's dtype with sums in fp32, the loss is in fp32, and the gradient of the logits in x's dtype, as eager's.
Source: Wijmans et al., 2024, arXiv:2411.09009, "Cut Your Losses in Large-Vocabulary Language Models".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from detr_fast.kernels.product_tiles import plus_product
from detr_fast.ops import linear_probabilities
from detr_fast.ops.products import eager_gradients, goes_by_eager_ops

# On a GPU, in which small blocks leave multiprocessors idle: as many logits at once, but at least so many rows, in whole tiles.
# On an H200 4,096 bf16 rows of 1,024 by 128,000 classes take 13 ms forward and backward, of 256 by 32,000 2.2.
GPU_ELEMENTS, GPU_ROWS, TILE = 1 << 25, 512, 128


@dataclass(frozen=True)
class _Labels:
    """What the rows are: labels and counts (N,), class_weight (V,) or None, present (N,), 0 where ignored, else 1.

    share: the label smoothing; where it is 0 and there are no class weights, present is None, as counts say it.
    """

    labels: Tensor
    counts: Tensor
    class_weight: Tensor | None
    present: Tensor | None
    share: float


def _ignored(of: _Labels) -> Tensor:
    """The rows (N,) that have no loss."""
    return (of.counts if of.present is None else of.present) == 0


def _losses(logs: Tensor, of: _Labels, rows: slice) -> tuple[Tensor, Tensor]:
    """Of the logarithms of rows' probabilities (n, V): the losses, and the labels' logarithms, (n,) each."""
    at_label = logs.gather(1, of.labels[rows, None])[:, 0]
    loss = -at_label * of.counts[rows]
    if of.share == 0.0 or of.present is None:
        return loss, at_label
    everything = logs.sum(1) if of.class_weight is None else logs @ of.class_weight
    return loss * (1.0 - of.share) - everything * of.present[rows] * (of.share / logs.shape[1]), at_label


def _logit_gradient(logits: Tensor, at_labels: Tensor, of: _Labels, rows: slice) -> tuple[Tensor, Tensor]:
    """Of the rows' losses for the logits, (n, V) in their dtype, but for a factor of each row; and that factor, (n,).

    at_labels: (n,), the logarithms of the labels' probabilities. The factor meets x and the product with weight instead, which
    have fewer elements.
    """
    counts, label = of.counts[rows], of.labels[rows, None]
    classes = logits.shape[1]
    chosen = at_labels.exp()  # 1 less 16 bits of it would be 0 too often
    gradient = logits.softmax(1)
    if of.share == 0.0 or of.present is None:
        return gradient.scatter_(1, label, (chosen - 1.0)[:, None].to(gradient.dtype)), counts
    class_weight, everywhere = of.class_weight, of.present[rows] * (of.share / classes)
    at_label = counts * (1.0 - of.share)
    factor = at_label + everywhere * (classes if class_weight is None else class_weight.sum())
    at_label, everywhere = (torch.where(factor == 0.0, 0.0, part / factor) for part in (at_label, everywhere))
    if class_weight is None:
        gradient.sub_(everywhere[:, None])
        chosen -= at_label + everywhere
    else:
        gradient.addcmul_(everywhere[:, None], class_weight, value=-1.0)
        chosen -= at_label + everywhere * class_weight[label[:, 0]]
    return gradient.scatter_(1, label, chosen[:, None].to(gradient.dtype)), factor


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
        losses, at_labels = torch.empty_like(counts), torch.empty_like(counts)
        with torch.autocast(x.device.type, enabled=False):
            for rows in _blocks(x, weight):
                logs = F.linear(x[rows], weight, bias).to(counts.dtype).log_softmax(1)
                losses[rows], at_labels[rows] = _losses(logs, of, rows)
                del logs  # or the next block's would be computed beside them
        # Their logits may be NaN. Not in place, which torch 2.11 compiles to losses without gradients.
        losses = losses.masked_fill(_ignored(of), 0.0)
        ctx.save_for_backward(x, weight, bias, at_labels, labels, counts, class_weight, present)
        ctx.share = share
        return losses

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, weight, bias, at_labels, labels, counts, class_weight, present = ctx.saved_tensors
        of, wanted = _Labels(labels, counts, class_weight, present, ctx.share), ctx.needs_input_grad[:3]
        dtype = of.counts.dtype
        # The mean over nothing divides by zero: what is ignored has no gradient even so, as in PyTorch.
        g = g.masked_fill(_ignored(of), 0.0)
        if goes_by_eager_ops(g):

            def again(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
                logits = F.linear(x, weight, bias).to(dtype)
                return _losses(logits.log_softmax(1), of, slice(None))[0]

            return (*eager_gradients(again, (x, weight, bias), g, wanted), *[None] * 5)

        dx = torch.empty_like(x) if wanted[0] else None
        dw = db = None
        for rows in _blocks(x, weight):
            gradient, factor = _logit_gradient(F.linear(x[rows], weight, bias), at_labels[rows], of, rows)
            factor = (factor * g[rows])[:, None]
            if dx is not None:
                torch.mul(gradient @ weight, factor, out=dx[rows])
            if wanted[1]:
                dw = plus_product(dw, gradient.mT, (x[rows] * factor).to(x.dtype))
            if wanted[2]:
                own = (gradient * factor).sum(0)
                db = own if db is None else db.add_(own)
            del gradient
        dw = torch.zeros_like(weight) if wanted[1] and dw is None else dw
        db = torch.zeros_like(bias) if wanted[2] and db is None else db
        dw, db = (None if d is None else d.to(x.dtype) for d in (dw, db))
        return dx, dw, db, None, None, None, None, None


def _blocks(x: Tensor, weight: Tensor) -> list[slice]:
    elements, least = (GPU_ELEMENTS, GPU_ROWS) if x.is_cuda else (linear_probabilities.BLOCK_ELEMENTS, 1)
    size = rows_at_once(elements, weight.shape[0], least)
    return [slice(start, start + size) for start in range(0, x.shape[0], size)]


def rows_at_once(elements: int, classes: int, least: int) -> int:
    """How many rows of logits make about so many `elements`, but at least so many; whole tiles of a product's."""
    rows = max(least, elements // classes)
    return rows if rows < TILE else rows // TILE * TILE
