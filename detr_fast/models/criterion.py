"""DETR's losses: masked sums over padded targets, all decoder layers and images in one pass.

Nothing here looks at a tensor's value on the host or loops over layers or images; on a GPU, nor does the assignment.
Source: Carion et al., 2020, arXiv:2005.12872, sections 3.1 and A.2.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from detr_fast import nn
from detr_fast.models.matcher import HungarianMatcher
from detr_fast.models.structures import BORDER_SLACK, Targets
from detr_fast.ops.boxes import generalized_iou

LOSSES = ("labels", "boxes", "cardinality")


class SetCriterion(nn.Module):
    """Match predictions with true boxes, then compute the losses of every decoder layer.

    Args:
        num_classes: number of label values, as the model's.
        matcher: finds the pairs.
        weight_dict: the weight of each loss in the sum; of the last layer's ("loss_ce", "loss_bbox", "loss_giou") and
            of the others' ("loss_ce_0", ...).
        eos_coef: weight of "no object" in the classification loss, as there are so many queries that have none.
        losses: which of "labels", "boxes" and "cardinality".
        focal: classify by sigmoid focal loss (alpha 0.25, gamma 2, as arXiv:2010.04159 trains DETR-like models)
            rather than softmax cross-entropy; the last logit, "no object", then has no part, nor has eos_coef.
    """

    def __init__(
        self,
        num_classes: int,
        matcher: HungarianMatcher,
        weight_dict: Mapping[str, float],
        eos_coef: float = 0.1,
        losses: Sequence[str] = LOSSES,
        focal: bool = False,
    ) -> None:
        super().__init__()
        unknown = set(losses) - set(LOSSES)
        if unknown:
            raise ValueError(f"got losses {sorted(unknown)}; expected some of {', '.join(LOSSES)}")
        self.num_classes = num_classes
        self.matcher = matcher
        self.weight_dict = dict(weight_dict)
        self.eos_coef = eos_coef
        self.losses = tuple(losses)
        self.focal = focal

    def forward(
        self, outputs: Mapping[str, Any], targets: Targets | Sequence[Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Compute the losses.

        Args:
            outputs: the model's; "aux_outputs" may be missing.
            targets: padded targets on the outputs' device, or one {"boxes": (n, 4), "labels": (n,)} per image, which
                are then checked and padded here.

        Returns:
            scalars "loss_ce", "class_error" (percent of matched queries with the wrong class; 100 without objects),
            "loss_bbox", "loss_giou", "cardinality_error" of the last layer; the earlier layers' with "_0", "_1", ...
            (class_error only of the last). And two counts that should be 0, for whoever reads the losses to raise an
            error: "broken_predictions", queries of all layers that are NaN or infinite, and "broken_targets", boxes
            with a label or a coordinate out of range. Neither ends a CUDA context: such labels are clamped.
        """
        logits, boxes = _stack_layers(outputs)
        if not isinstance(targets, Targets):
            targets = Targets.from_list(targets, num_classes=self.num_classes).to(logits.device)
        if logits.shape[1] != targets.counts.shape[0] or logits.shape[-1] != self.num_classes + 1:
            raise ValueError(
                f"got logits of {logits.shape[1]} images and {logits.shape[-1]} classes ('no object' included) but "
                f"targets of {targets.counts.shape[0]} images and num_classes = {self.num_classes}"
            )
        num_boxes, pending = _start_mean_over_ranks(targets.counts.sum().to(logits.dtype))
        query, broken = self.matcher.match_and_check(logits, boxes, targets)
        labels = targets.labels.clamp(0, self.num_classes - 1)
        matched = query >= 0
        query = query.clamp(min=0)
        if pending is not None:
            pending.wait()
        num_boxes = num_boxes.clamp(min=1)

        per_layer: dict[str, Tensor] = {}
        losses: dict[str, Tensor] = {}
        if "labels" in self.losses:
            classes = _target_classes(query, matched, labels, logits.shape[2], self.num_classes)
            if self.focal:
                per_layer["loss_ce"] = _focal_loss(logits[..., :-1], classes, num_boxes)
            else:
                per_layer["loss_ce"] = _cross_entropy(logits, classes, self.num_classes, self.eos_coef)
            losses["class_error"] = _class_error(logits[-1], classes[-1], self.num_classes, self.focal)
        if "boxes" in self.losses:
            per_layer |= _box_losses(boxes, query, matched, targets.boxes, num_boxes)
        if "cardinality" in self.losses:
            per_layer["cardinality_error"] = _cardinality_error(logits.detach(), targets.counts, self.focal)
        for name, values in per_layer.items():
            *earlier, last = values.unbind(0)
            losses[name] = last
            losses |= {f"{name}_{layer}": value for layer, value in enumerate(earlier)}
        losses["broken_predictions"] = broken.sum().to(logits.dtype)
        losses["broken_targets"] = _count_broken(targets, self.num_classes).to(logits.dtype)
        return losses

    def weighted_sum(self, losses: Mapping[str, Tensor]) -> Tensor:
        """The scalar to call backward on: each loss times its weight; what has no weight is left out."""
        by_weight: dict[float, list[Tensor]] = {}
        for name, value in losses.items():
            if name in self.weight_dict:
                by_weight.setdefault(self.weight_dict[name], []).append(value)
        if not by_weight:
            raise ValueError(f"none of the losses {sorted(losses)} has a weight; weights: {sorted(self.weight_dict)}")
        # One sum per distinct weight: three additions on the device rather than one per layer and loss.
        return torch.stack([weight * torch.stack(values).sum() for weight, values in by_weight.items()]).sum()


def loss_weights(
    decoder_layers: int, *, aux_loss: bool = True, ce: float = 1.0, bbox: float = 5.0, giou: float = 2.0
) -> dict[str, float]:
    """The weight of each loss, the same for all decoder layers."""
    weights = {"loss_ce": ce, "loss_bbox": bbox, "loss_giou": giou}
    earlier = range(decoder_layers - 1 if aux_loss else 0)
    return weights | {f"{name}_{layer}": weight for layer in earlier for name, weight in weights.items()}


def _stack_layers(outputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """(L, B, Q, K) logits and (L, B, Q, 4) boxes, the last layer last, in fp32 or fp64."""
    layers: Iterable[Mapping[str, Tensor]] = [*outputs.get("aux_outputs", ()), outputs]
    logits = torch.stack([layer["pred_logits"] for layer in layers])
    boxes = torch.stack([layer["pred_boxes"] for layer in layers])
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return logits.to(dtype), boxes.to(dtype)


def _start_mean_over_ranks(count: Tensor) -> tuple[Tensor, Any]:
    """The mean of `count` over all processes, valid after the second result's wait(), if that is not None."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return count, None
    count = count / distributed.get_world_size()
    return count, distributed.all_reduce(count, async_op=True)


def _count_broken(targets: Targets, num_classes: int) -> Tensor:
    """How many true boxes are none, or have a label out of range: `Targets.from_list` refuses them, others may not."""
    boxes, labels = targets.boxes, targets.labels
    # Written so that NaN fails.
    good = ((boxes >= 0) & (boxes <= 1 + BORDER_SLACK)).all(-1) & (boxes[..., 2:] > 0).all(-1)
    good &= (labels >= 0) & (labels < num_classes)
    return (targets.valid & ~good).sum()


def _target_classes(query: Tensor, matched: Tensor, labels: Tensor, num_queries: int, no_object: int) -> Tensor:
    """(L, B, Q): the label of the box that each query is matched with, or `no_object`."""
    # Unmatched slots write into one column more, which is then cut off.
    classes = torch.full((*query.shape[:2], num_queries + 1), no_object, device=query.device)
    slot = torch.where(matched, query, num_queries)
    return classes.scatter_(2, slot, labels.expand_as(slot))[..., :num_queries]


def _cross_entropy(logits: Tensor, classes: Tensor, no_object: int, eos_coef: float) -> Tensor:
    """(L,): each layer's weighted mean."""
    nll = nn.functional.cross_entropy(logits.flatten(0, 2), classes.flatten(), reduction="none").view(classes.shape)
    weight = torch.ones_like(nll).masked_fill(classes == no_object, eos_coef)
    return (nll * weight).sum((1, 2)) / weight.sum((1, 2))


def _focal_loss(logits: Tensor, classes: Tensor, num_boxes: Tensor, alpha: float = 0.25) -> Tensor:
    """(L,): the sum over queries and classes, divided by the number of boxes."""
    positive = nn.functional.one_hot(classes, logits.shape[-1] + 1)[..., :-1].to(logits.dtype)
    probability = logits.sigmoid()
    entropy = nn.functional.binary_cross_entropy_with_logits(logits, positive, reduction="none")
    error = probability + positive - 2 * probability * positive
    weight = 1 - alpha + (2 * alpha - 1) * positive
    return (weight * error**2 * entropy).sum((1, 2, 3)) / num_boxes


@torch.no_grad()
def _class_error(logits: Tensor, classes: Tensor, no_object: int, focal: bool) -> Tensor:
    """Percent of the queries matched in one layer, (B, Q, K) and (B, Q), that have the wrong class."""
    has_object = classes != no_object
    guess = (logits[..., :-1] if focal else logits).argmax(-1)
    correct = (has_object & (guess == classes)).sum()
    return 100 - 100 * correct / has_object.sum().clamp(min=1)


@torch.no_grad()
def _cardinality_error(logits: Tensor, counts: Tensor, focal: bool) -> Tensor:
    """(L,): by how many objects an image's prediction is off, on average. For logging; it has no gradient."""
    # The largest logit is not the last one's: amax takes a fifth of argmax's time on a CPU.
    found = logits[..., :-1].amax(-1) >= (0 if focal else logits[..., -1])
    return (found.sum(-1) - counts).abs().to(logits.dtype).mean(-1)


def _box_losses(
    boxes: Tensor, query: Tensor, matched: Tensor, true_boxes: Tensor, num_boxes: Tensor
) -> dict[str, Tensor]:
    """{"loss_bbox": (L,), "loss_giou": (L,)}: sums over the matched pairs, divided by the number of boxes."""
    predicted = boxes.gather(2, query[..., None].expand(-1, -1, -1, 4))
    true = true_boxes.to(boxes.dtype).expand_as(predicted)
    # Padding compares a harmless box with itself: multiplying a NaN by zero would not make it harmless.
    predicted = torch.where(matched[..., None], predicted, 0.5)
    true = torch.where(matched[..., None], true, 0.5)
    distance = (predicted - true).abs().sum((1, 2, 3))
    missing_overlap = (1 - generalized_iou(predicted, true)).sum((1, 2))
    return {"loss_bbox": distance / num_boxes, "loss_giou": missing_overlap / num_boxes}
