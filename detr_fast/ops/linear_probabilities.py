"""The last linear layer of a classifier with its softmax, in inference: all probabilities, or the k largest.

probabilities = softmax(x @ weight.T + bias)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from detr_fast.ops.boundary import wants_grad
from detr_fast.ops.products import flat

BLOCK_ELEMENTS = 1 << 24  # logits that exist at once: 64 MiB in fp32


def linear_softmax(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.softmax(F.linear(x, weight, bias), -1)` for inference, (..., V) in x's dtype: only the result is whole in memory.

    Shapes: x (..., E), weight (V, E), bias (V,) or None. Differentiable by PyTorch's own ops, which keep more.
    Raises ValueError for shapes that do not fit. Source: Milakov and Gimelshein, 2018, arXiv:1805.02867.
    """
    check_linear(x, weight, bias)
    if wants_grad(x, weight, bias) or x.numel() == 0:
        return F.softmax(F.linear(x, weight, bias), -1)
    rows = x.reshape(-1, x.shape[-1])
    size = max(1, BLOCK_ELEMENTS // weight.shape[0])
    if rows.shape[0] <= size:
        return F.softmax(F.linear(x, weight, bias), -1)
    dtype = F.softmax(F.linear(rows[:0], weight, bias), -1).dtype  # autocast decides
    result = rows.new_empty((rows.shape[0], weight.shape[0]), dtype=dtype)
    for start in range(0, rows.shape[0], size):
        block = slice(start, start + size)
        torch.softmax(F.linear(rows[block], weight, bias), -1, dtype=dtype, out=result[block])
    return result.view(*x.shape[:-1], weight.shape[0])


def linear_softmax_topk(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of `linear_softmax`'s probabilities and their classes, (..., k), in falling order.

    The probabilities are never written: blocks of the vocabulary leave their k largest logits and the sum so far.
    Shapes: x (..., E), weight (V, E), bias (V,) or None. The probabilities are fp32 at least.
    Not differentiable. Raises ValueError for shapes that do not fit or k outside [1, V].
    Source: Milakov and Gimelshein, 2018, arXiv:1805.02867.
    """
    check_linear(x, weight, bias)
    classes = weight.shape[0]
    if not 1 <= k <= classes:
        raise ValueError(f"k must lie in [1, V] = [1, {classes}]; got {k}")
    with torch.no_grad():
        rows = flat(x)
        size = max(k, BLOCK_ELEMENTS // max(1, rows.shape[0]))
        wide = torch.promote_types(x.dtype, torch.float32)
        for start in range(0, classes, size):
            block = slice(start, start + size)
            logits = F.linear(rows, weight[block], None if bias is None else bias[block]).to(wide)
            values, places = logits.topk(min(k, logits.shape[-1]), -1)
            block_total = logits.logsumexp(-1, keepdim=True)
            if start == 0:  # at least k classes, as size is
                best, index, total = values, places, block_total
                continue
            total = torch.logaddexp(total, block_total)
            best, chosen = torch.cat([best, values], -1).topk(k, -1)
            index = torch.cat([index, places + start], -1).gather(-1, chosen)
        shape = (*x.shape[:-1], k)
        return (best - total).exp().view(shape), index.view(shape)


def check_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if weight.ndim != 2 or x.ndim == 0 or weight.shape[1] != x.shape[-1] or weight.shape[0] == 0:
        raise ValueError(f"takes x (..., E) and weight (V, E) with V over 0; got {shape_of(x)} and {shape_of(weight)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be (V,) = ({weight.shape[0]},); got {shape_of(bias)}")


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
