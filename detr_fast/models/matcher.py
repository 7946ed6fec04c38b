"""Which query predicts which true box: costs for all decoder layers and images at once, then one assignment each.

Source: Carion et al., 2020, arXiv:2005.12872, section 3.1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from detr_fast import nn, ops
from detr_fast.models.structures import Targets


class HungarianMatcher(nn.Module):
    """One-to-one matching of queries and true boxes with the least total cost.

    Args:
        cost_class, cost_bbox, cost_giou: weights of the parts, see ops.matching_cost.
        focal: as ops.matching_cost's.

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
        return self.match_and_check(logits, boxes, targets)[0]

    @torch.no_grad()
    def match_and_check(self, logits: Tensor, boxes: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
        """As `match`; also (..., B, Q) bool, True for predictions that are NaN or infinite."""
        cost, broken = ops.matching_cost(
            logits,
            boxes,
            targets.labels,
            targets.boxes,
            targets.counts,
            weights=(self.cost_class, self.cost_bbox, self.cost_giou),
            focal=self.focal,
        )
        return ops.linear_assignment(cost, targets.counts), broken

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
