"""transformers' loss of RT-DETR (both versions): varifocal classification, and denoising queries, whose pairs are known.

loss = Σ w · BCE(logit, IoU of the pair, 0 elsewhere), w = IoU of the pair, alpha · sigmoid(logit)^gamma elsewhere; without
gradient for w. Sources: Zhang et al., 2021, arXiv:2008.13367; Lv et al., 2023, arXiv:2304.08069.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.loss import loss_for_object_detection, loss_rt_detr

from detr_fast import dispatch
from detr_fast.adapters.hugging_face_loss_code import KnownLoss
from detr_fast.adapters.hugging_face_loss_detr import MATCH, OVERLAPS, SHARED, Loss
from detr_fast.adapters.hugging_face_pairs import (
    Batch,
    Matched,
    Pairs,
    box_losses,
    class_losses,
    gathered,
    matched,
    named,
    sums,
)
from detr_fast.adapters.hugging_face_targets import Targets, are_predictions, are_targets, counts_of, has_values, padded

NAMES = ("loss_vfl", "loss_bbox", "loss_giou")


@torch.compiler.disable  # numbers of boxes would be constants of a graph, which is compiled again for others
def rt_detr_object_detection_loss(
    logits: Tensor,
    labels: Any,
    device: Any,
    pred_boxes: Tensor,
    config: Any,
    outputs_class: Any = None,
    outputs_coord: Any = None,
    enc_topk_logits: Any = None,
    enc_topk_bboxes: Any = None,
    denoising_meta_values: Any = None,
    **kwargs: Any,
) -> Loss:
    """transformers' RTDetrForObjectDetectionLoss."""
    layers = (outputs_class, outputs_coord, enc_topk_logits, enc_topk_bboxes) if config.auxiliary_loss else ()
    found = _loss(logits, labels, pred_boxes, config, layers, denoising_meta_values)
    if found is None:
        arguments = (logits, labels, device, pred_boxes, config, outputs_class, outputs_coord)
        encoders = (enc_topk_logits, enc_topk_bboxes, denoising_meta_values)
        found = loss_rt_detr.RTDetrForObjectDetectionLoss(*arguments, *encoders, **kwargs)
    return found


def _loss(
    logits: Tensor, labels: Any, boxes: Tensor, config: Any, layers: Sequence[Any], denoising: Any
) -> Loss | None:
    """transformers' three results, or None where they are to come from transformers."""
    found = of_all_layers(logits, labels, boxes, config, layers, denoising)
    if found is None:
        return None
    auxiliary = None
    if layers:
        noisy = denoising["dn_num_split"][0] if denoising else 0
        auxiliary = loss_rt_detr._set_aux_loss(*(one[:, :-1, noisy:].transpose(0, 1) for one in layers[:2]))
        auxiliary.extend(loss_rt_detr._set_aux_loss([layers[2]], [layers[3]]))
    return found.values.sum(), named(NAMES, found.ends, found.values), auxiliary


class Found(NamedTuple):
    """The losses that all of RT-DETR's line have, and what they are of: one column a layer."""

    values: Tensor  # (3, layers), with their weights, NaN where transformers would raise an error
    ends: list[str]  # of their names
    batches: list[
        Batch
    ]  # the layers' predictions, the last first and the encoder's last, and those of denoising queries
    pairs: Matched
    iou: Tensor  # of each pair
    scales: list[float]  # of each batch, by which sums are multiplied
    good: Tensor  # 1, or NaN


def of_all_layers(
    logits: Tensor, labels: Any, boxes: Tensor, config: Any, layers: Sequence[Any], denoising: Any
) -> Found | None:
    """Those losses, or None where they are to come from transformers."""
    if not _fits(logits, labels, boxes, config, layers, denoising):
        return None
    if not layers and has_values(logits) and not dispatch.intervening:
        return None  # of one layer on a CPU
    counts, groups = counts_of(labels), denoising["dn_num_group"] if denoising else 0
    noisy = denoising["dn_num_split"][0] if denoising else 0
    logits, boxes = logits[None, :, noisy:], boxes[None, :, noisy:]
    if layers:
        every, every_box = (one.transpose(0, 1) for one in layers[:2])
        logits = torch.cat((logits, every[:-1, :, noisy:], layers[2][None]))
        boxes = torch.cat((boxes, every_box[:-1, :, noisy:], layers[3][None]))
    with torch.no_grad():
        targets = padded(labels, logits.device, config.num_labels, [_denoised(counts, groups)])
        good = targets.good & (boxes[..., 2:] >= 0).all()
        if has_values(logits) and not good:
            return None  # which says what is wrong
        costs = (config.matcher_class_cost, config.matcher_bbox_cost, config.matcher_giou_cost)
        found, broken = matched(logits, boxes, targets, costs, config.use_focal_loss)
    batches, scales = [Batch(logits, boxes, found)], [1 / max(1, sum(counts))]
    if layers and denoising:
        known = _known_pairs(targets, denoising["dn_positive_idx"], noisy)
        batches.append(Batch(every[:, :, :noisy], every_box[:, :, :noisy], known))
        scales.append(scales[0] / groups)
    pairs = gathered(batches)
    with torch.no_grad():
        good = good & ~broken & (pairs.boxes[:, 2:] >= 0).all()
        if has_values(logits) and not (good and (pairs.boxes == pairs.boxes).all()):  # elsewhere NaN shows in the loss
            return None
    distance, apart, iou = box_losses(pairs)
    elements = _varifocal(pairs, iou, config.focal_loss_alpha, config.focal_loss_gamma)
    values = torch.stack(
        (
            sums(elements, pairs.logit_sizes, [scale * config.weight_loss_vfl for scale in scales]),
            sums(distance, pairs.sizes, [scale * config.weight_loss_bbox for scale in scales]),
            sums(apart, pairs.sizes, [scale * config.weight_loss_giou for scale in scales]),
        )
    )
    # Where transformers would look and raise an error, without a look: losses that are NaN, and so are their gradients.
    one = torch.where(good, 1.0, float("nan"))
    ends = [
        "",
        *(f"_aux_{n}" for n in range(len(logits) - 1)),
        *(f"_dn_{n}" for batch in batches[1:] for n in range(len(batch.logits))),
    ]
    return Found(values * one, ends, batches, pairs, iou, scales, one)


def _fits(logits: Tensor, labels: Any, boxes: Tensor, config: Any, layers: Sequence[Any], denoising: Any) -> bool:
    """Whether everything is as transformers documents it; if not, transformers' function knows what to do."""
    if logits.ndim != 3 or not are_targets(labels, logits.shape[0], logits.device) or why_not(config) is not None:
        return False
    if config.matcher_class_cost == config.matcher_bbox_cost == config.matcher_giou_cost == 0:
        return False
    counts, (images, queries, classes) = counts_of(labels), logits.shape
    noisy = 0
    if denoising is not None:
        if not _is_denoising(denoising, counts, queries):
            return False
        noisy = denoising["dn_num_split"][0]
    if layers and not (isinstance(layers[0], Tensor) and layers[0].ndim == 4):
        return False
    shapes: list[tuple[int, ...]] = [(images, queries), (images, queries)]
    if layers:
        shapes += [(images, layers[0].shape[1], queries)] * 2 + [(images, queries - noisy)] * 2
    return (
        classes == config.num_labels
        and max(counts) <= queries - noisy
        and are_predictions((logits, boxes, *layers), shapes, classes)
    )


def _is_denoising(denoising: Any, counts: Sequence[int], queries: int) -> bool:
    """Whether what a model says of its denoising queries is as RT-DETR's."""
    if not isinstance(denoising, Mapping):
        return False
    index, groups, split = (denoising.get(f"dn_{name}") for name in ("positive_idx", "num_group", "num_split"))
    return (
        isinstance(groups, int)
        and groups > 0
        and isinstance(split, (list, tuple))
        and len(split) == 2
        and all(isinstance(one, int) and one > 0 for one in split)
        and sum(split) == queries
        and isinstance(index, (list, tuple))
        and all(isinstance(one, Tensor) and one.dtype == torch.int64 for one in index)
        and [tuple(one.shape) for one in index] == [(count * groups,) for count in counts]
    )


def _denoised(counts: Sequence[int], groups: int) -> list[int]:
    """The true boxes, in the order of `dn_positive_idx`: image by image, in each group by group."""
    starts = [0, *accumulate(counts)]
    return [start + n for start, count in zip(starts, counts) for _ in range(groups) for n in range(count)]


def _known_pairs(targets: Targets, positive: Sequence[Tensor], queries: int) -> Pairs:
    """Of the denoising queries, the same in all layers."""
    (true,) = targets.more
    query = torch.cat(list(positive)) + targets.image[true] * queries
    return Pairs(query[None], targets.all_labels[true], targets.all_boxes[true])


def _varifocal(pairs: Matched, iou: Tensor, alpha: float, gamma: float) -> Tensor:
    """Of each logit."""
    return class_losses(pairs, alpha * pairs.logits.detach().sigmoid().pow(gamma), iou, iou)


def why_not(config: Any) -> str | None:
    alpha, gamma = config.matcher_alpha, config.matcher_gamma
    if config.use_focal_loss and (alpha, gamma) != (0.25, 2.0):
        return f"its matcher_alpha and matcher_gamma are {alpha} and {gamma}, and our focal cost has 0.25 and 2.0"
    return None


_MATCHER = {
    "RTDetrHungarianMatcher.__init__": "ValueError __init__ alpha bbox_cost class_cost gamma giou_cost matcher_alpha "
    "matcher_bbox_cost matcher_class_cost matcher_gamma matcher_giou_cost requires_backends super use_focal_loss",
    "RTDetrHungarianMatcher.forward": MATCH + "1e-08 F alpha gamma log sigmoid softmax use_focal_loss",
}
RT_DETR = {
    **_MATCHER,
    **OVERLAPS,
    "_set_aux_loss": "zip",
    "RTDetrLoss.__init__": "Buffer RTDetrHungarianMatcher __init__ alpha empty_weight eos_coef eos_coefficient focal_loss_alpha "
    "focal_loss_gamma gamma losses matcher nn num_classes num_labels ones super torch weight_dict weight_loss_bbox "
    "weight_loss_giou weight_loss_vfl",
    "RTDetrLoss.loss_labels_vfl": "F KeyError _get_source_permutation_idx alpha binary_cross_entropy_with_logits box_iou cat "
    "center_to_corners_format detach device diag dtype full gamma int64 mean num_classes one_hot pow shape sigmoid sum to torch "
    "unsqueeze zeros_like zip",
    "RTDetrLoss.loss_boxes": "F KeyError _get_source_permutation_idx cat center_to_corners_format diag generalized_box_iou l1_loss "
    "sum torch zip",
    "RTDetrLoss._get_source_permutation_idx": SHARED["ImageLoss._get_source_permutation_idx"],
    "RTDetrLoss.get_loss": "ValueError loss_boxes loss_cardinality loss_labels loss_labels_bce loss_labels_focal loss_labels_vfl "
    "loss_masks",
    "RTDetrLoss.get_cdn_matched_indices": "append arange device enumerate int64 len tile torch zeros",
    "RTDetrLoss.forward": "ValueError as_tensor clamp device enumerate float get_cdn_matched_indices get_loss item items iter len "
    "losses matcher next sum torch update values weight_dict",
}
KNOWN = {
    "RTDetrForObjectDetectionLoss": KnownLoss(
        rt_detr_object_detection_loss,
        {
            "RTDetrForObjectDetectionLoss": "RTDetrLoss _set_aux_loss auxiliary_loss extend split sum to torch transpose values",
            **RT_DETR,
        },
        (loss_rt_detr, loss_for_object_detection),
        why_not,
        splits=4,
    )
}
