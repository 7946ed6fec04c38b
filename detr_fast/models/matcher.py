"""Which query predicts which true box: costs for all decoder layers and images at once, then one assignment each.

Source: Carion et al., 2020, arXiv:2005.12872, section 3.1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from detr_fast import nn, ops
from detr_fast.models.boxes import generalized_iou
from detr_fast.models.structures import Targets

# NaN and infinite costs become this: far above any cost that a sigmoid's boxes can have, so that such a pair is matched
# last, yet small enough that the other costs keep 8 digits behind the point beside it in fp64.
INVALID_COST = 1e8


def matching_cost(
    logits: Tensor,
    boxes: Tensor,
    targets: Targets,
    *,
    cost_class: float,
    cost_bbox: float,
    cost_giou: float,
    focal: bool = False,
) -> Tensor:
    """What it costs to let a query predict a true box, never mixing images.

    Args:
        logits: (..., B, Q, K), any leading shape, such as the decoder layers.
        boxes: (..., B, Q, 4), center boxes.
        targets: N slots an image.
        cost_class, cost_bbox, cost_giou: weights of -probability, L1 distance and -GIoU.
        focal: the class cost of sigmoid scores rather than softmax ones.

    Returns:
        (..., B, N, Q), fp32 (fp64 for fp64 logits); +inf in the slots behind each image's last box, and only there.
    """
    if logits.dtype != torch.float64:
        logits, boxes = logits.float(), boxes.float()
    true_boxes = targets.boxes.to(boxes.dtype)
    index = targets.labels[:, None, :].expand(*logits.shape[:-1], -1)
    chosen = logits.gather(-1, index)
    class_cost = _focal_class_cost(chosen) if focal else -(chosen - logits.logsumexp(-1, keepdim=True)).exp()
    cost = cost_class * class_cost.transpose(-1, -2)
    # Each coordinate a plane of its own, as the arithmetic below goes from plane to plane.
    predicted, true = boxes.movedim(-1, 0).contiguous().movedim(0, -1).unsqueeze(-3), true_boxes.unsqueeze(-2)
    x, y, width, height = ((p - t).abs_() for p, t in zip(predicted.unbind(-1), true.unbind(-1)))
    distance = x.add_(y).add_(width).add_(height)
    cost = cost + cost_bbox * distance - cost_giou * generalized_iou(predicted, true)
    cost = cost.nan_to_num(INVALID_COST, INVALID_COST, INVALID_COST).clamp(-INVALID_COST, INVALID_COST)
    return cost.masked_fill(~targets.valid[:, :, None], float("inf"))


def _focal_class_cost(logits: Tensor, alpha: float = 0.25) -> Tensor:
    """Focal loss (gamma 2) of calling it the class, less that of calling it none. Source: arXiv:2010.04159."""
    probability = logits.sigmoid()
    positive = alpha * (1 - probability) ** 2 * -nn.functional.logsigmoid(logits)
    negative = (1 - alpha) * probability**2 * -nn.functional.logsigmoid(-logits)
    return positive - negative


class HungarianMatcher(nn.Module):
    """One-to-one matching of queries and true boxes with the least total cost.

    Args:
        cost_class, cost_bbox, cost_giou: weights of the parts, see matching_cost.
        focal: as matching_cost's.

    Raises:
        ValueError: all weights are 0.
    """

    def __init__(self, cost_class: float = 1, cost_bbox: float = 5, cost_giou: float = 2, focal: bool = False) -> None:
        super().__init__()
        if cost_class == cost_bbox == cost_giou == 0:
            raise ValueError("all three matching costs are 0; give at least one a weight")
        self.cost_class = cost_class
        self.cost_bbox = cost_bbox
        self.cost_giou = cost_giou
        self.focal = focal

    @torch.no_grad()
    def match(self, logits: Tensor, boxes: Tensor, targets: Targets) -> Tensor:
        """(..., B, Q, K) logits and (..., B, Q, 4) boxes -> (..., B, N) int64, the query of each true box or -1."""
        cost = matching_cost(
            logits,
            boxes,
            targets,
            cost_class=self.cost_class,
            cost_bbox=self.cost_bbox,
            cost_giou=self.cost_giou,
            focal=self.focal,
        )
        return ops.linear_assignment(cost, targets.counts)

    def forward(
        self, outputs: Mapping[str, Any], targets: Targets | Sequence[Mapping[str, Tensor]]
    ) -> list[tuple[Tensor, Tensor]]:
        """The original's interface: match the last layer's predictions.

        Returns:
            for each image (queries, true boxes), both (min(Q, n),) int64 on the CPU, queries ascending
        """
        if not isinstance(targets, Targets):
            targets = Targets.from_list(targets)
        pairs = []
        for query in self.match(outputs["pred_logits"], outputs["pred_boxes"], targets).cpu():
            box = torch.nonzero(query >= 0)[:, 0]
            order = query[box].argsort()
            pairs.append((query[box][order], box[order]))
        return pairs
