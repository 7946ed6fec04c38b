"""The last linear layer of a classifier with its softmax: cross-entropy in training, probabilities in inference.

    logits = x @ weight.T + bias,   loss = cross_entropy(logits, target),   probabilities = softmax(logits)

Over large vocabularies the (N, V) logits are what fills the memory: here they exist a block of rows at a time, and what
is kept for backward is one number a row, the logarithm of the softmax's sum; backward computes each block again.
Source: Wijmans et al., 2024, arXiv:2411.09009, "Cut Your Losses in Large-Vocabulary Language Models".
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from detr_fast import dispatch
from detr_fast.dispatch import Call, Implementation, Op, Situation
from detr_fast.ops.boundary import wants_grad

BLOCK_ELEMENTS = 1 << 24  # logits that exist at once: 64 MiB in fp32
WHOLE_ELEMENTS = 1 << 26  # up to 256 MiB of fp32 logits are materialised: that saves backward a matmul


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """`F.cross_entropy(F.linear(x, weight, bias), target, …)` that need not materialise the logits.

    Shapes: x (..., E), weight (V, E), bias (V,) or None, target (...) int64 with values in [0, V) or `ignore_index`,
    class_weight (V,) or None. reduction: "mean" (over the class weights of what is not ignored), "sum", or "none", which
    gives (...). The loss is in x's dtype (fp32 under autocast); the softmax is computed in fp32 at least.
    Raises ValueError for shapes or a reduction that do not fit, BackendError as `use_backend` says.
    """
    _check(x, weight, bias)
    if target.shape != x.shape[:-1]:
        raise ValueError(f"target must be x's shape without the last dimension, {_shape(x)[:-1]}; got {_shape(target)}")
    if class_weight is not None and class_weight.shape != weight.shape[:1]:
        raise ValueError(f"class_weight must be (V,) = ({weight.shape[0]},); got {_shape(class_weight)}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"got reduction {reduction!r}; expected 'mean', 'sum' or 'none'")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must lie in [0, 1]; got {label_smoothing}")
    arguments = (x, weight, bias, target, class_weight, ignore_index, reduction, label_smoothing)
    if not (dispatch.intervening or x.is_cuda or target.numel() * weight.shape[0] > WHOLE_ELEMENTS):
        return _eager(*arguments)
    return LINEAR_CROSS_ENTROPY(*arguments)


def linear_softmax(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.softmax(F.linear(x, weight, bias), -1)` for inference, (..., V) in x's dtype: only the result is whole in memory.

    Shapes: x (..., E), weight (V, E), bias (V,) or None. Differentiable by PyTorch's own ops, which keep more.
    Raises ValueError for shapes that do not fit.
    """
    _check(x, weight, bias)
    if wants_grad(x, weight, bias) or x.numel() == 0:
        return F.softmax(F.linear(x, weight, bias), -1)
    rows = x.reshape(-1, x.shape[-1])
    size = max(1, BLOCK_ELEMENTS // weight.shape[0])
    if rows.shape[0] <= size:
        return F.softmax(F.linear(x, weight, bias), -1)
    first = F.softmax(F.linear(rows[:size], weight, bias), -1)  # tells the dtype, which autocast decides
    result = first.new_empty(rows.shape[0], weight.shape[0])
    result[:size] = first
    for start in range(size, rows.shape[0], size):
        result[start : start + size] = F.softmax(F.linear(rows[start : start + size], weight, bias), -1)
    return result.view(*x.shape[:-1], weight.shape[0])


def linear_softmax_topk(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of `linear_softmax`'s probabilities and their classes, (..., k), in falling order.

    The probabilities are never written: blocks of the vocabulary leave their k largest logits and the sum so far.
    The probabilities are fp32 at least. Not differentiable. Raises ValueError for shapes that do not fit or k outside [1, V].
    """
    _check(x, weight, bias)
    classes = weight.shape[0]
    if not 1 <= k <= classes:
        raise ValueError(f"k must lie in [1, V] = [1, {classes}]; got {k}")
    with torch.no_grad():
        rows = x.reshape(-1, x.shape[-1])
        size = max(k, BLOCK_ELEMENTS // max(1, rows.shape[0]))
        wide = torch.promote_types(x.dtype, torch.float32)
        best, index = rows.new_empty((rows.shape[0], 0), dtype=wide), torch.empty_like(rows[:, :0], dtype=torch.int64)
        total = rows.new_full((rows.shape[0], 1), -math.inf, dtype=wide)
        for start in range(0, classes, size):
            block = slice(start, start + size)
            logits = F.linear(rows, weight[block], None if bias is None else bias[block]).to(wide)
            total = torch.logaddexp(total, logits.logsumexp(-1, keepdim=True))
            values, places = logits.topk(min(k, logits.shape[-1]), -1)
            best, chosen = torch.cat([best, values], -1).topk(k, -1)
            index = torch.cat([index, places + start], -1).gather(-1, chosen)
        shape = (*x.shape[:-1], k)
        return (best - total).exp().view(shape), index.view(shape)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if weight.ndim != 2 or x.ndim == 0 or weight.shape[1] != x.shape[-1] or weight.shape[0] == 0:
        raise ValueError(f"takes x (..., E) and weight (V, E) with V over 0; got {_shape(x)} and {_shape(weight)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be (V,) = ({weight.shape[0]},); got {_shape(bias)}")


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _eager(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
) -> Tensor:
    logits = F.linear(x, weight, bias).reshape(-1, weight.shape[0])
    if class_weight is not None:
        class_weight = class_weight.to(logits.dtype)
    loss = F.cross_entropy(
        logits,
        target.flatten(),
        class_weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )
    return loss.view(target.shape) if reduction == "none" else loss


@dataclass(frozen=True)
class LinearCrossEntropyCall(Call):
    rows: int
    classes: int
    features: int

    def shapes(self) -> str:
        return f"({self.rows}, {self.features}) × {self.classes} classes {str(self.dtype).removeprefix('torch.')}"


def _signature(x: Tensor, weight: Tensor, bias: Any, target: Tensor, class_weight: Any, *rest: Any) -> tuple[Any, ...]:
    tensors = (x, weight, bias, target, class_weight)
    return tuple(None if t is None else (type(t), t.shape, t.dtype, t.device, t.requires_grad) for t in tensors)


def _describe(
    x: Tensor, weight: Tensor, bias: Any, target: Tensor, class_weight: Any, *rest: Any, situation: Situation
) -> LinearCrossEntropyCall:
    return LinearCrossEntropyCall(
        device=x.device,
        architecture=dispatch.architecture(x.device),
        dtype=x.dtype,
        tensor_type=dispatch.tensor_type((x, weight, bias, target, class_weight)),
        needs_grad=wants_grad(x, weight, bias),
        situation=situation,
        rows=target.numel(),
        classes=weight.shape[0],
        features=weight.shape[1],
    )


class ChunkedLinearCrossEntropy(Implementation):
    """PyTorch's matmuls on a block of rows at a time."""

    name = "chunked"
    plain = True

    def why_not(self, call: LinearCrossEntropyCall) -> str | None:
        if not call.dtype.is_floating_point:
            return f"{call.dtype} inputs: it takes floating-point ones"
        return None

    def advice(self, call: LinearCrossEntropyCall) -> str | None:
        if call.rows * call.classes <= WHOLE_ELEMENTS:
            return f"{call.rows * call.classes * 4 >> 20} MiB of fp32 logits fit: keeping them saves backward a matmul"
        return None

    def run(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        class_weight: Tensor | None,
        ignore_index: int,
        reduction: str,
        label_smoothing: float,
    ) -> Tensor:
        out_dtype = x.dtype
        if torch.is_autocast_enabled(x.device.type):
            # Once here, not in every block; the loss is fp32, as torch's own.
            low, out_dtype = torch.get_autocast_dtype(x.device.type), torch.float32
            x, weight, bias = x.to(low), weight.to(low), None if bias is None else bias.to(low)
        labels = target.flatten()
        ignored = labels == ignore_index
        labels = labels.masked_fill(ignored, 0)
        # What an example counts: its class's weight, or nothing where it is ignored.
        counts = torch.ones_like(labels, dtype=torch.promote_types(x.dtype, torch.float32))
        if class_weight is not None:
            class_weight = class_weight.to(counts.dtype)
            counts = class_weight[labels]
        counts = counts.masked_fill(ignored, 0.0)
        present = (~ignored).to(counts.dtype) if label_smoothing > 0.0 else None
        loss = _Chunked.apply(x.flatten(0, -2), weight, bias, labels, counts, class_weight, present, label_smoothing)
        if reduction == "none":
            return loss.view(target.shape).to(out_dtype)
        return (loss.sum() / counts.sum() if reduction == "mean" else loss.sum()).to(out_dtype)


class EagerLinearCrossEntropy(Implementation):
    """PyTorch's linear and cross_entropy."""

    name = "eager"

    def run(self, *args: Any) -> Tensor:
        return _eager(*args)


LINEAR_CROSS_ENTROPY = Op(
    "linear_cross_entropy",
    signature=_signature,
    describe=_describe,
    implementations=(ChunkedLinearCrossEntropy(), EagerLinearCrossEntropy()),
)


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


class _Chunked(torch.autograd.Function):
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
        if torch.is_grad_enabled():  # a double backward will follow: through PyTorch's own ops
            logits = F.linear(x, weight, bias).to(dtype)
            losses = _losses(logits, logits.logsumexp(1), of, slice(None))
            inputs = [t for t, want in zip((x, weight, bias), wanted) if want]
            found = iter(torch.autograd.grad(losses, inputs, g, create_graph=True))
            return (*(next(found) if want else None for want in wanted), None, None, None, None, None)

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
    size = max(1, BLOCK_ELEMENTS // weight.shape[0])
    return [slice(start, start + size) for start in range(0, x.shape[0], size)]
