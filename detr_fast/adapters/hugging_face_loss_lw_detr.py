"""transformers' loss of LW-DETR and RF-DETR: groups of queries that are matched each by itself, and classes by IoU.

    pairs:     BCE(logit, q), q = max(0.01, sigmoid(logit)^alpha · IoU^(1 - alpha)), without gradient
    elsewhere: sigmoid(logit)² · BCE(logit, 0)

Sources: Chen et al., 2024, arXiv:2406.03459; Cai et al., 2023, arXiv:2303.15833, for the class loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.loss import loss_for_object_detection, loss_lw_detr

from detr_fast.adapters.hugging_face_loss_code import KnownLoss
from detr_fast.adapters.hugging_face_loss_detr import CARDINALITY, MATCH, NAMES, OVERLAPS, SHARED, Loss, weights_of
from detr_fast.adapters.hugging_face_pairs import (
    Batch,
    Matched,
    box_losses,
    cardinality_error,
    class_losses,
    gathered,
    matched,
    named,
    sums,
    together,
    weighted,
)
from detr_fast.adapters.hugging_face_targets import are_predictions, are_targets, counts_of, has_values, padded


@torch.compiler.disable  # numbers of boxes would be constants of a graph, which is compiled again for others
def lw_detr_object_detection_loss(
    logits: Tensor,
    labels: Any,
    device: Any,
    pred_boxes: Tensor,
    config: Any,
    outputs_class: Any = None,
    outputs_coord: Any = None,
    enc_outputs_class: Any = None,
    enc_outputs_coord: Any = None,
    **kwargs: Any,
) -> Loss:
    """transformers' LwDetrForObjectDetectionLoss."""
    layers = (outputs_class, outputs_coord) if config.auxiliary_loss else ()
    found = _loss(logits, labels, pred_boxes, config, layers, (enc_outputs_class, enc_outputs_coord))
    if found is None:
        arguments = (logits, labels, device, pred_boxes, config, outputs_class, outputs_coord)
        found = loss_lw_detr.LwDetrForObjectDetectionLoss(*arguments, enc_outputs_class, enc_outputs_coord, **kwargs)
    return found


def _loss(
    logits: Tensor, labels: Any, boxes: Tensor, config: Any, layers: Sequence[Any], encoder: Sequence[Any]
) -> Loss | None:
    """transformers' three results, or None where they are to come from transformers."""
    if not _fits(logits, labels, boxes, config, layers, encoder):
        return None
    auxiliary = loss_lw_detr._set_aux_loss(*layers) if layers else None
    logits = together(logits, layers[:1], encoder[:1])
    boxes = together(boxes, layers[1:], encoder[1:])
    with torch.no_grad():
        targets = padded(labels, logits.device, config.num_labels)
        good = targets.good & (boxes[..., 2:] >= 0).all()
        if has_values(logits) and not good:
            return None  # which says what is wrong
        costs = (config.class_cost, config.bbox_cost, config.giou_cost)
        found, broken = matched(logits, boxes, targets, costs, True, config.group_detr)
        good = good & ~broken
        if has_values(logits) and not good:
            return None
    pairs = gathered([Batch(logits, boxes, found)])
    distance, apart, iou = box_losses(pairs)
    elements = _class_loss(pairs, iou, config.focal_alpha)
    scales = [1 / _boxes_of_all_processes(sum(counts_of(labels)) * config.group_detr, logits.device)]
    values = torch.stack(
        [
            sums(elements, pairs.logit_sizes, scales),
            sums(distance, pairs.sizes, scales),
            sums(apart, pairs.sizes, scales),
        ]
    )
    # Where transformers would look and raise an error, without a look: losses that are NaN, and so are their gradients.
    values = values * torch.where(good, 1.0, float("nan"))
    ends = ["", *(f"_{n}" for n in range(len(logits) - 2)), "_enc"]
    by_name = named(NAMES, ends, values, cardinality_error(logits, targets.counts))
    weights = weights_of(config, config.class_loss_coefficient)
    return weighted(by_name, weights | {f"{name}_enc": weights[name] for name in NAMES[:3]}), by_name, auxiliary


def _fits(
    logits: Tensor, labels: Any, boxes: Tensor, config: Any, layers: Sequence[Any], encoder: Sequence[Any]
) -> bool:
    """Whether everything is as transformers documents it; if not, transformers' function knows what to do."""
    if logits.ndim != 3 or not are_targets(labels, logits.shape[0], logits.device):
        return False
    if config.class_cost == config.bbox_cost == config.giou_cost == 0:
        return False
    shapes: list[tuple[int, ...]] = [tuple(logits.shape[:2])] * 4
    if layers and isinstance(layers[0], Tensor) and layers[0].ndim == 4:
        shapes += [(len(layers[0]), *logits.shape[:2])] * 2
    return (
        logits.shape[-1] == config.num_labels
        and max(1, *counts_of(labels)) <= logits.shape[1] // config.group_detr
        and are_predictions((logits, boxes, *encoder, *layers), shapes, config.num_labels)
    )


def _class_loss(pairs: Matched, iou: Tensor, alpha: float) -> Tensor:
    """Of each logit."""
    likely = pairs.logits.detach().index_select(0, pairs.positive).sigmoid()
    quality = (likely.pow(alpha) * iou.pow(1 - alpha)).clamp(min=0.01)
    return class_losses(pairs, pairs.logits.sigmoid().square(), quality)


def _boxes_of_all_processes(boxes: int, device: torch.device) -> Any:
    """The number that transformers divides by: the mean over torch.distributed's processes, or 1 if that is more."""
    if not loss_lw_detr._is_torch_distributed_initialized():
        return max(1, boxes)
    # As theirs, to the dtype: another process's batch may be one that goes to transformers.
    total = torch.full((1,), boxes, dtype=torch.float, device=device)
    torch.distributed.all_reduce(total)
    return (total / torch.distributed.get_world_size()).clamp(min=1)


KNOWN = {
    "LwDetrForObjectDetectionLoss": KnownLoss(
        lw_detr_object_detection_loss,
        {
            "LwDetrForObjectDetectionLoss": "LwDetrHungarianMatcher LwDetrImageLoss _set_aux_loss auxiliary_loss bbox_cost "
            "bbox_loss_coefficient class_cost class_loss_coefficient decoder_layers focal_alpha giou_cost giou_loss_coefficient "
            "group_detr items num_labels range sum to update",
            "LwDetrHungarianMatcher.__init__": SHARED["HungarianMatcher.__init__"],
            "LwDetrHungarianMatcher.forward": MATCH + "0.25 1e-08 2.0 concatenate float32 log np range sigmoid to zip",
            "LwDetrImageLoss.__init__": "__init__ focal_alpha group_detr losses matcher num_classes super",
            "LwDetrImageLoss.loss_labels": "0.01 KeyError _get_source_permutation_idx box_iou cat center_to_corners_format clamp "
            "clone detach diag dtype focal_alpha log pow sigmoid sum to torch zeros_like zip",
            "LwDetrImageLoss.loss_cardinality": CARDINALITY,
            "LwDetrImageLoss.loss_boxes": SHARED["ImageLoss.loss_boxes"],
            "LwDetrImageLoss._get_source_permutation_idx": SHARED["ImageLoss._get_source_permutation_idx"],
            "LwDetrImageLoss.get_loss": SHARED["ImageLoss.get_loss"],
            "LwDetrImageLoss.forward": "ReduceOp SUM _is_torch_distributed_initialized all_reduce as_tensor clamp device dist "
            "enumerate float get_loss get_world_size group_detr item items iter len losses matcher next sum torch training update "
            "values",
            "_set_aux_loss": SHARED["_set_aux_loss"],
            **OVERLAPS,
        },
        (loss_lw_detr, loss_for_object_detection),
        lambda config: None,
    )
}
