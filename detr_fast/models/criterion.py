"""DETR's losses: masked sums over padded targets, all decoder layers and images in one pass.

Nothing here looks at a tensor's value on the host or loops over layers or images; on a GPU, nor does the assignment.
Source: Carion et al., 2020, arXiv:2005.12872, sections 3.1 and A.2.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from detr_fast import nn, ops
from detr_fast.models.matcher import HungarianMatcher
from detr_fast.models.structures import Targets
from detr_fast.nn.weighted_sum import WeightedSum

LOSSES = {"labels": ("loss_ce",), "boxes": ("loss_bbox", "loss_giou"), "cardinality": ("cardinality_error",)}


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
        losses: Sequence[str] = tuple(LOSSES),
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
        self._sum = WeightedSum()

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
        total, ranks, pending = _start_sum_over_ranks(targets.counts)
        query, broken = self.matcher.match_and_check(logits, boxes, targets)
        if pending is not None:
            pending.wait()
        values, cardinality, summary = ops.detection_losses(
            logits if "labels" in self.losses else logits.detach(),
            boxes if "boxes" in self.losses else boxes.detach(),
            query,
            targets.labels,
            targets.boxes,
            targets.counts,
            broken,
            total,
            ranks=ranks,
            eos_coef=self.eos_coef,
            focal=self.focal,
        )
        scalars = values.flatten().unbind(0)  # all at once: one launch then puts their gradients together
        layers = logits.shape[0]
        rows = (scalars[:layers], scalars[layers : 2 * layers], scalars[2 * layers :], cardinality.unbind(0))
        by_name = dict(zip(("loss_ce", "loss_bbox", "loss_giou", "cardinality_error"), rows))
        losses: dict[str, Tensor] = {}
        for name in (name for part in self.losses for name in LOSSES[part]):
            *earlier, losses[name] = by_name[name]
            losses |= {f"{name}_{layer}": value for layer, value in enumerate(earlier)}
        class_error, losses["broken_predictions"], losses["broken_targets"] = summary.unbind(0)
        return losses | ({"class_error": class_error} if "labels" in self.losses else {})

    def weighted_sum(self, losses: Mapping[str, Tensor]) -> Tensor:
        """The scalar to call backward on: each loss times its weight; what has no weight is left out."""
        weighted = {name: self.weight_dict[name] for name in losses if name in self.weight_dict}
        if not weighted:
            raise ValueError(f"none of the losses {sorted(losses)} has a weight; weights: {sorted(self.weight_dict)}")
        return self._sum([losses[name] for name in weighted], tuple(weighted.values()))


def loss_weights(
    decoder_layers: int, *, aux_loss: bool = True, ce: float = 1.0, bbox: float = 5.0, giou: float = 2.0
) -> dict[str, float]:
    """The weight of each loss, the same for all decoder layers."""
    weights = {"loss_ce": ce, "loss_bbox": bbox, "loss_giou": giou}
    earlier = range(decoder_layers - 1 if aux_loss else 0)
    return weights | {f"{name}_{layer}": weight for layer in earlier for name, weight in weights.items()}


def _stack_layers(outputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """(L, B, Q, K) logits and (L, B, Q, 4) boxes, the last layer last."""
    layers: Iterable[Mapping[str, Tensor]] = [*outputs.get("aux_outputs", ()), outputs]
    return torch.stack([layer["pred_logits"] for layer in layers]), torch.stack(
        [layer["pred_boxes"] for layer in layers]
    )


def _start_sum_over_ranks(counts: Tensor) -> tuple[Tensor, int, Any]:
    """Counts whose sum is that of `counts` over all processes, valid after the third result's wait() if it is not None."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return counts, 1, None
    total = counts.sum()[None]
    return total, distributed.get_world_size(), distributed.all_reduce(total, async_op=True)
