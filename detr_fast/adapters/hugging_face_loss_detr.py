"""transformers' losses of DETR and its like, and of Conditional DETR and its like, with sigmoid focal classification."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.loss import loss_deformable_detr, loss_for_object_detection

from detr_fast import dispatch, ops
from detr_fast.adapters.hugging_face_loss_code import KnownLoss
from detr_fast.adapters.hugging_face_pairs import weighted
from detr_fast.adapters.hugging_face_targets import are_targets, has_values, padded

_ALPHA = 0.25  # of the focal loss on our ops
NAMES = ("loss_ce", "loss_bbox", "loss_giou", "cardinality_error")

Loss = tuple[Tensor, dict[str, Tensor], Any]


@torch.compiler.disable  # numbers of boxes would be constants of a graph, which is compiled again for others
def object_detection_loss(*arguments: Any, **options: Any) -> Loss:
    """transformers' ForObjectDetectionLoss: softmax cross-entropy with "no object" as the last class."""
    return _either(False, loss_for_object_detection.ForObjectDetectionLoss, *arguments, **options)


@torch.compiler.disable
def focal_object_detection_loss(*arguments: Any, **options: Any) -> Loss:
    """transformers' DeformableDetrForObjectDetectionLoss: sigmoid focal loss, and no logit for "no object"."""
    return _either(True, loss_deformable_detr.DeformableDetrForObjectDetectionLoss, *arguments, **options)


def _either(
    focal: bool,
    theirs: Any,
    logits: Tensor,
    labels: Any,
    device: Any,
    pred_boxes: Tensor,
    config: Any,
    outputs_class: Any = None,
    outputs_coord: Any = None,
    **kwargs: Any,
) -> Loss:
    found = _loss(focal, logits, labels, pred_boxes, config, outputs_class, outputs_coord)
    if found is None:
        found = theirs(logits, labels, device, pred_boxes, config, outputs_class, outputs_coord, **kwargs)
    return found


def _loss(
    focal: bool, logits: Tensor, labels: Any, pred_boxes: Tensor, config: Any, outputs_class: Any, outputs_coord: Any
) -> Loss | None:
    """transformers' three results, or None where they are to come from transformers."""
    layers = (outputs_class, outputs_coord) if config.auxiliary_loss else ()
    if not _fits(focal, logits, labels, pred_boxes, config, layers):
        return None
    if not config.auxiliary_loss and has_values(logits) and not dispatch.intervening:
        return None  # of one layer on a CPU, theirs takes 0.8 of the time (benchmarks/test_criterion.py); of two, twice
    auxiliary = None
    logits, boxes = logits[None], pred_boxes[None]
    if config.auxiliary_loss:
        auxiliary = loss_for_object_detection._set_aux_loss(outputs_class, outputs_coord)
        logits = torch.cat((outputs_class[:-1], logits))
        boxes = torch.cat((outputs_coord[:-1], boxes))
    with torch.no_grad():
        # Softmax trains a box labelled "no object" as such; of focal loss, transformers' matcher raises an error.
        # -100, of which there has to be a hundredth logit from behind for its matcher, has no part in cross-entropy.
        targets = padded(labels, logits.device, logits.shape[-1], ignores=not focal and logits.shape[-1] >= 100)
        good = targets.good & (boxes[..., 2:] >= 0).all()
        if has_values(logits) and not good:
            return None  # which says what is wrong
    if focal:
        logits = torch.nn.functional.pad(logits, (0, 1))  # our ops' logit for "no object", which has no part in it
    true = (targets.boxes, targets.counts)
    costs = (config.class_cost, config.bbox_cost, config.giou_cost)
    cost, broken = ops.matching_cost(logits, boxes, targets.labels, *true, weights=costs, focal=focal)
    if has_values(logits) and broken.any():
        return None
    query = ops.linear_assignment(cost, targets.counts)
    total, ranks = boxes_of_all_processes(targets.counts)
    eos_coef = 1.0 if focal else config.eos_coefficient
    values, cardinality, summary = ops.detection_losses(
        logits, boxes, query, targets.trained, *true, broken, total, ranks=ranks, eos_coef=eos_coef, focal=focal
    )
    # Where transformers would look and raise an error, without a look: losses that are NaN, and so are their gradients.
    good = good & (summary[1] == 0)
    by_name = _by_name(values * torch.where(good, 1.0, float("nan")), cardinality)
    return weighted(by_name, weights_of(config, 1.0)), by_name, auxiliary


def _fits(focal: bool, logits: Tensor, labels: Any, boxes: Tensor, config: Any, layers: Sequence[Any]) -> bool:
    """Whether everything is as transformers documents it; if not, transformers' function knows what to do."""
    classes = config.num_labels + (0 if focal else 1)
    predicted = logits.ndim == 3 and logits.shape[-1] == classes and tuple(boxes.shape) == (*logits.shape[:2], 4)
    if not predicted or not are_targets(labels, logits.shape[0], logits.device):
        return False
    if not all(isinstance(one, Tensor) and one.ndim == 4 for one in layers):
        return False
    if focal and config.focal_alpha != _ALPHA:
        return False
    return not config.class_cost == config.bbox_cost == config.giou_cost == 0


def boxes_of_all_processes(counts: Tensor) -> tuple[Tensor, int]:
    """Numbers whose sum divided by the second result is the number of boxes that transformers divides by.

    It takes accelerate's mean over processes, and divides that by their number once more.
    """
    theirs: Any = loss_for_object_detection
    state = getattr(theirs, "PartialState", None)  # where accelerate is installed
    if state is None or state._shared_state == {} or (processes := state().num_processes) == 1:
        return counts, 1
    # As theirs, to the dtype: another process's batch may be one that goes to transformers.
    return theirs.reduce(counts.sum().float()[None], "sum").long(), processes**2


def _by_name(values: Tensor, cardinality: Tensor) -> dict[str, Tensor]:
    """The last layer's losses, then the others', under transformers' names and in its order."""
    layers = len(cardinality)
    scalars = values.flatten().unbind(0)  # all at once: one launch then puts their gradients together
    rows = (*(scalars[start : start + layers] for start in (0, layers, 2 * layers)), cardinality.float().unbind(0))
    by_name = {name: row[-1] for name, row in zip(NAMES, rows)}
    for layer in range(layers - 1):
        by_name |= {f"{name}_{layer}": row[layer] for name, row in zip(NAMES, rows)}
    return by_name


def weights_of(config: Any, of_class: float) -> dict[str, float]:
    """What transformers multiplies the last and the earlier layers' losses with."""
    weights = {
        "loss_ce": float(of_class),
        "loss_bbox": float(config.bbox_loss_coefficient),
        "loss_giou": float(config.giou_loss_coefficient),
    }
    earlier = range(config.decoder_layers - 1) if config.auxiliary_loss else ()
    return weights | {f"{name}_{layer}": weight for layer in earlier for name, weight in weights.items()}


def _why_not(config: Any) -> str | None:
    alpha = getattr(config, "focal_alpha", _ALPHA)
    return None if alpha == _ALPHA else f"its focal_alpha is {alpha}, and our focal loss has {_ALPHA}"


_TOTAL = (
    "_set_aux_loss auxiliary_loss bbox_cost bbox_loss_coefficient class_cost decoder_layers giou_cost giou_loss_coefficient items "
    "num_labels range sum to update "
)
MATCH = (
    "as_tensor bbox_cost cat cdist center_to_corners_format class_cost cpu dtype enumerate finfo flatten generalized_box_iou "
    "giou_cost int64 len linear_sum_assignment max nan_to_num shape split torch view "
)
CARDINALITY = "0.5 as_tensor device float functional l1_loss len max nn sigmoid sum torch values"
# What the functions read whose results ours gives; others compute something else.
OVERLAPS = {
    "generalized_box_iou": "ValueError all box_iou clamp max min torch",
    "box_iou": "box_area clamp max min torch",
    "box_area": "_upcast",
}
SHARED = {
    "_set_aux_loss": "zip",
    "ImageLoss.forward": "PartialState _shared_state as_tensor clamp device enumerate float get_loss is_accelerate_available item "
    "items iter len losses matcher next num_processes reduce sum torch update values",
    "ImageLoss.get_loss": "ValueError loss_boxes loss_cardinality loss_labels loss_masks",
    "ImageLoss.loss_boxes": "KeyError _get_source_permutation_idx cat center_to_corners_format diag functional "
    "generalized_box_iou l1_loss nn sum torch zip",
    "ImageLoss._get_source_permutation_idx": "cat enumerate full_like torch",
    "HungarianMatcher.__init__": "ValueError __init__ bbox_cost class_cost giou_cost requires_backends super",
    **OVERLAPS,
}
KNOWN = {
    "ForObjectDetectionLoss": KnownLoss(
        object_detection_loss,
        {
            "ForObjectDetectionLoss": _TOTAL + "HungarianMatcher ImageLoss eos_coefficient",
        }
        | SHARED
        | {
            "ImageLoss.__init__": "Buffer __init__ empty_weight eos_coef losses matcher nn num_classes ones super torch",
            "ImageLoss.loss_labels": "KeyError _get_source_permutation_idx cat cross_entropy device empty_weight full functional "
            "int64 nn num_classes shape torch transpose zip",
            "ImageLoss.loss_cardinality": "argmax as_tensor device float functional l1_loss len nn shape sum torch",
            "HungarianMatcher.forward": MATCH + "softmax",
        },
        (loss_for_object_detection,),
        lambda config: None,
    ),
    "DeformableDetrForObjectDetectionLoss": KnownLoss(
        focal_object_detection_loss,
        {
            "DeformableDetrForObjectDetectionLoss": _TOTAL
            + "DeformableDetrHungarianMatcher DeformableDetrImageLoss focal_alpha",
        }
        | SHARED
        | {
            "DeformableDetrImageLoss.__init__": "Module __init__ focal_alpha losses matcher nn num_classes",
            "DeformableDetrImageLoss.loss_labels": "KeyError _get_source_permutation_idx cat device dtype focal_alpha full int64 "
            "layout num_classes scatter_ shape sigmoid_focal_loss torch unsqueeze zeros zip",
            "DeformableDetrImageLoss.loss_cardinality": CARDINALITY,
            "DeformableDetrHungarianMatcher.forward": MATCH + "0.25 1e-08 2.0 log sigmoid",
            "sigmoid_focal_loss": "binary_cross_entropy_with_logits functional mean nn sigmoid sum",
        },
        (loss_deformable_detr, loss_for_object_detection),
        _why_not,
    ),
}
