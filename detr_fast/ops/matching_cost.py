"""Costs between all queries and true boxes of an image: the contract, its eager reference, its Triton kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from detr_fast import dispatch
from detr_fast.dispatch import Call, Implementation, Op, Situation, TritonImplementation
from detr_fast.kernels import matching_cost as kernels
from detr_fast.kernels.matching_cost import INVALID_COST as INVALID_COST
from detr_fast.kernels.set_tiles import too_large
from detr_fast.ops import regimes
from detr_fast.ops.boundary import SEVERAL_DEVICES, define, integers, on_one_device
from detr_fast.ops.boxes import generalized_iou

Weights = tuple[float, float, float]


def matching_cost(
    logits: Tensor,
    boxes: Tensor,
    labels: Tensor,
    true_boxes: Tensor,
    counts: Tensor,
    *,
    weights: Weights = (1.0, 5.0, 2.0),
    focal: bool = False,
) -> tuple[Tensor, Tensor]:
    """What it costs to let a query predict a true box, never mixing images; and which predictions are broken.

    cost = a · class + b · |box - true box|₁ - c · GIoU, with (a, b, c) = weights; class is minus the label's softmax
    probability or, with `focal`, the focal loss (alpha 0.25, gamma 2) of calling it the label less that of calling it none.

    Shapes: logits (..., B, Q, K) and boxes (..., B, Q, 4), any leading shape, such as the decoder layers; labels (B, N)
    int64, true_boxes (B, N, 4), counts (B,) int64. Boxes are (center x, center y, width, height). Labels out of range
    count as the nearest in range: nothing here ends a CUDA context.
    Returns the cost (..., B, N, Q), fp32 (fp64 for fp64 logits): finite, NaN and what is beyond ±1e8 being 1e8, except
    +inf in the rows behind an image's count; and (..., B, Q) bool, True where the logits' logsumexp or a coordinate of
    the box is NaN or infinite. There is no gradient. Other integers than int64 are
    converted. Raises ValueError where the shapes do not fit, TypeError where labels or counts are no integers.
    Sources: arXiv:2005.12872, section 3.1; arXiv:2010.04159 for focal.
    """
    images = logits.shape[-3] if logits.ndim >= 3 else -1
    if (
        boxes.shape != (*logits.shape[:-1], 4)
        or logits.shape[-1:].numel() < 1
        or labels.ndim != 2
        or labels.shape[0] != images
        or true_boxes.shape != (*labels.shape, 4)
        or tuple(counts.shape) != (images,)
    ):
        raise ValueError(
            f"got logits {tuple(logits.shape)}, boxes {tuple(boxes.shape)}, labels {tuple(labels.shape)}, true boxes "
            f"{tuple(true_boxes.shape)} and counts {tuple(counts.shape)}; expected (..., B, Q, K), (..., B, Q, 4), "
            "(B, N), (B, N, 4) and (B,), with K over 0"
        )
    labels, counts = integers(labels=labels, counts=counts)
    tensors = (logits.detach(), boxes.detach(), labels, true_boxes, counts)
    if not (dispatch.intervening or logits.is_cuda):
        return _eager(*tensors, weights, focal)
    return MATCHING_COST(*tensors, weights, focal)


@dataclass(frozen=True)
class MatchingCostCall(Call):
    boxes_dtype: torch.dtype
    problems: int
    targets: int
    queries: int
    classes: int
    focal: bool
    one_device: bool

    def shapes(self) -> str:
        return f"{self.problems} × ({self.targets}, {self.queries}), {self.classes} classes"


def _signature(logits: Tensor, boxes: Tensor, labels: Tensor, *rest: Any) -> tuple[Any, ...]:
    places = ((type(t), t.device) for t in (logits, boxes, labels, *rest[:2]))
    return logits.shape, logits.dtype, *places, boxes.dtype, labels.shape, rest[-1]


def _describe(logits: Tensor, boxes: Tensor, labels: Tensor, *rest: Any, situation: Situation) -> MatchingCostCall:
    return MatchingCostCall(
        device=logits.device,
        architecture=dispatch.architecture(logits.device),
        dtype=logits.dtype,
        tensor_type=dispatch.tensor_type((logits, boxes, labels, *rest[:2])),
        needs_grad=False,
        situation=situation,
        boxes_dtype=boxes.dtype,
        problems=logits.shape[:-2].numel(),
        targets=labels.shape[1],
        queries=logits.shape[-2],
        classes=logits.shape[-1],
        focal=rest[-1],
        one_device=on_one_device(logits, boxes, labels, *rest[:2]),
    )


class TritonMatchingCost(TritonImplementation):
    def why_not(self, call: MatchingCostCall) -> str | None:
        if not call.one_device:
            return SEVERAL_DEVICES
        if call.boxes_dtype not in self.dtypes:
            return f"{str(call.boxes_dtype).removeprefix('torch.')} boxes: it takes bfloat16, float16, float32"
        return too_large(call.queries, call.classes, call.targets)

    def advice(self, call: MatchingCostCall) -> str | None:
        if regimes.find("matching_cost", call.architecture) is None:
            return None  # unmeasured; but it is one launch where eager makes over 30
        return regimes.advice("matching_cost", call, call.problems * call.targets * call.queries * 4)

    def note(self, call: MatchingCostCall) -> str | None:
        return regimes.note("matching_cost", call)

    def compiled_key(self, call: MatchingCostCall) -> Any:
        return call.device, call.dtype, call.boxes_dtype, call.focal

    def prepare(self, call: MatchingCostCall) -> None:
        kernels.compile_matching_cost(call.dtype, call.boxes_dtype, call.focal, call.device)

    def run(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        *tensors, weights, focal = arguments
        return _matching_cost(*tensors, list(weights), focal)


class EagerMatchingCost(Implementation):
    name = "eager"

    def run(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        return _eager(*arguments)


MATCHING_COST = Op(
    "matching_cost",
    signature=_signature,
    describe=_describe,
    implementations=(TritonMatchingCost(), EagerMatchingCost()),
)


def _eager(
    logits: Tensor, boxes: Tensor, labels: Tensor, true_boxes: Tensor, counts: Tensor, weights: Weights, focal: bool
) -> tuple[Tensor, Tensor]:
    """All images and layers at once."""
    if logits.dtype != torch.float64:
        logits, boxes = logits.float(), boxes.float()
    true_boxes = true_boxes.to(boxes.dtype)
    index = labels.clamp(0, logits.shape[-1] - 1)[:, None, :].expand(*logits.shape[:-1], -1)
    chosen = logits.gather(-1, index)
    lse = logits.logsumexp(-1, keepdim=True)
    class_cost = _focal_class_cost(chosen) if focal else -(chosen - lse).exp()
    cost = weights[0] * class_cost.transpose(-1, -2)
    # Each coordinate a plane of its own, as the arithmetic below goes from plane to plane.
    predicted, true = boxes.movedim(-1, 0).contiguous().movedim(0, -1).unsqueeze(-3), true_boxes.unsqueeze(-2)
    x, y, width, height = ((p - t).abs_() for p, t in zip(predicted.unbind(-1), true.unbind(-1)))
    distance = x.add_(y).add_(width).add_(height)
    cost = cost + weights[1] * distance - weights[2] * generalized_iou(predicted, true)
    cost = cost.nan_to_num(INVALID_COST, INVALID_COST, INVALID_COST).clamp(-INVALID_COST, INVALID_COST)
    behind = torch.arange(labels.shape[1], device=counts.device) >= counts[:, None]
    broken = ~(lse.isfinite() & boxes.isfinite().all(-1, keepdim=True)).squeeze(-1)
    return cost.masked_fill(behind[:, :, None], float("inf")), broken


def _focal_class_cost(logits: Tensor, alpha: float = 0.25) -> Tensor:
    """Focal loss (gamma 2) of calling it the class, less that of calling it none. Source: arXiv:2010.04159."""
    probability = logits.sigmoid()
    positive = alpha * (1 - probability) ** 2 * -F.logsigmoid(logits)
    negative = (1 - alpha) * probability**2 * -F.logsigmoid(-logits)
    return positive - negative


def _run(
    logits: Tensor,
    boxes: Tensor,
    labels: Tensor,
    true_boxes: Tensor,
    counts: Tensor,
    weights: list[float],
    focal: bool,
) -> tuple[Tensor, Tensor]:
    lead = logits.shape[:-3]
    flat = (t.reshape(lead.numel(), *t.shape[-3:]) for t in (logits, boxes))
    a, b, c = weights
    cost, broken = kernels.matching_cost(*flat, labels, true_boxes.float(), counts, (a, b, c), focal)
    return cost.view(*lead, *cost.shape[1:]), broken.view(*lead, *broken.shape[1:])


def _fake(logits: Tensor, boxes: Tensor, labels: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    shape = (*logits.shape[:-2], labels.shape[1], logits.shape[-2])
    return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(logits.shape[:-1], dtype=torch.bool)


def _autograd(*arguments: Any) -> Any:
    return _matching_cost.below(*arguments)


_matching_cost = define(
    "matching_cost(Tensor logits, Tensor boxes, Tensor labels, Tensor true_boxes, Tensor counts, float[] weights, "
    "bool focal) -> (Tensor, Tensor)",
    run=_run,
    fake=_fake,
    autograd=_autograd,
)
