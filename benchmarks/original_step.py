"""The matcher and criterion of the original repository, as an algorithm: a peer for timings and for counting synchronisations.

Written from its description. For every decoder layer on its own: one cost matrix between all queries of the batch and all
true boxes of the batch, sent to the host and solved image by image with SciPy; assertions on boxes; losses over indices
made on the host; and `.item()` for the number of boxes and for each logged value.
Source: Carion et al., 2020, arXiv:2005.12872; facebookresearch/detr.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Target = Mapping[str, Tensor]
Pairs = list[tuple[Tensor, Tensor]]


def corners(boxes: Tensor) -> Tensor:
    x, y, width, height = boxes.unbind(-1)
    return torch.stack((x - width / 2, y - height / 2, x + width / 2, y + height / 2), -1)


def pairwise_giou(a: Tensor, b: Tensor) -> Tensor:
    """Of all pairs of corner boxes; refuses boxes whose ends lie before their starts, which is a look at the device."""
    assert (a[:, 2:] >= a[:, :2]).all()
    assert (b[:, 2:] >= b[:, :2]).all()
    overlap = (torch.min(a[:, None, 2:], b[:, 2:]) - torch.max(a[:, None, :2], b[:, :2])).clamp(min=0).prod(-1)
    areas_a, areas_b = (a[:, 2:] - a[:, :2]).prod(-1), (b[:, 2:] - b[:, :2]).prod(-1)
    union = areas_a[:, None] + areas_b - overlap
    hull = (torch.max(a[:, None, 2:], b[:, 2:]) - torch.min(a[:, None, :2], b[:, :2])).clamp(min=0).prod(-1)
    return overlap / union - (hull - union) / hull


class OriginalCriterion:
    """Losses of all decoder layers: `criterion(outputs, targets)`.

    solve: an image's (Q, n) costs on the host -> the matched queries and boxes; SciPy's by default.
    """

    def __init__(self, num_classes: int, eos_coef: float = 0.1, solve: Callable[[Tensor], Any] | None = None) -> None:
        if solve is None:
            from scipy.optimize import linear_sum_assignment

            solve = linear_sum_assignment
        self.num_classes = num_classes
        self.eos_coef = eos_coef
        self.solve = solve

    @torch.no_grad()
    def match(self, outputs: Mapping[str, Any], targets: Sequence[Target]) -> Pairs:
        images, queries = outputs["pred_logits"].shape[:2]
        probabilities = outputs["pred_logits"].flatten(0, 1).softmax(-1)
        boxes = outputs["pred_boxes"].flatten(0, 1)
        labels, true = torch.cat([t["labels"] for t in targets]), torch.cat([t["boxes"] for t in targets])
        cost = 5 * torch.cdist(boxes, true, p=1) - probabilities[:, labels]
        cost = cost - 2 * pairwise_giou(corners(boxes), corners(true))
        per_image = cost.view(images, queries, -1).cpu().split([len(t["boxes"]) for t in targets], -1)
        solved = [self.solve(costs[image]) for image, costs in enumerate(per_image)]
        return [(torch.as_tensor(q), torch.as_tensor(n)) for q, n in solved]

    def layer(self, outputs: Mapping[str, Any], targets: Sequence[Target], num_boxes: float) -> dict[str, Tensor]:
        pairs = self.match(outputs, targets)
        logits, boxes = outputs["pred_logits"], outputs["pred_boxes"]
        image = torch.cat([torch.full_like(q, i) for i, (q, _) in enumerate(pairs)])
        place = image, torch.cat([q for q, _ in pairs])
        classes = torch.full(logits.shape[:2], self.num_classes, dtype=torch.int64, device=logits.device)
        classes[place] = torch.cat([t["labels"][n] for t, (_, n) in zip(targets, pairs)])
        weight = torch.ones(self.num_classes + 1, device=logits.device, dtype=logits.dtype)
        weight[-1] = self.eos_coef
        predicted = boxes[place]
        true = torch.cat([t["boxes"][n] for t, (_, n) in zip(targets, pairs)])
        overlap = torch.diag(pairwise_giou(corners(predicted), corners(true)))
        counts = torch.as_tensor([len(t["labels"]) for t in targets], device=logits.device)
        found = (logits.argmax(-1) != self.num_classes).sum(1)
        return {
            "loss_ce": F.cross_entropy(logits.transpose(1, 2), classes, weight),
            "loss_bbox": F.l1_loss(predicted, true, reduction="none").sum() / num_boxes,
            "loss_giou": (1 - overlap).sum() / num_boxes,
            "cardinality_error": F.l1_loss(found.float(), counts.float()),
        }

    def __call__(self, outputs: Mapping[str, Any], targets: Sequence[Target]) -> dict[str, Tensor]:
        count = torch.as_tensor(
            [sum(len(t["labels"]) for t in targets)], dtype=torch.float, device=targets[0]["boxes"].device
        )
        num_boxes = count.clamp(min=1).item()
        losses = self.layer(outputs, targets, num_boxes)
        for index, earlier in enumerate(outputs.get("aux_outputs", ())):
            losses |= {f"{name}_{index}": value for name, value in self.layer(earlier, targets, num_boxes).items()}
        return losses


def logged(losses: Mapping[str, Tensor], weights: Mapping[str, float]) -> dict[str, float]:
    """What the original's loop reads from the device after each step: each loss, each weighted loss, and their sum."""
    weighted = {name: value * weights[name] for name, value in losses.items() if name in weights}
    values = {f"{name}_unscaled": value.item() for name, value in losses.items()}
    values |= {name: value.item() for name, value in weighted.items()}
    return values | {"loss": sum(weighted.values()).item()}  # type: ignore[union-attr]
