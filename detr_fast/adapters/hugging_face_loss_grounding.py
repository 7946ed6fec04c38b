"""transformers' loss of Grounding DINO and MM Grounding DINO: sigmoid focal classification of a prompt's words.

A class is the words that name it: a row of its image's label map, (classes, words). Classes' costs are those of its words on average,
and a pair's words are positive. Source: Liu et al., 2023, arXiv:2303.05499.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.loss import loss_for_object_detection, loss_grounding_dino

from detr_fast import dispatch, ops
from detr_fast.adapters.hugging_face_loss_code import KnownLoss
from detr_fast.adapters.hugging_face_loss_detr import (
    CARDINALITY,
    MATCH,
    NAMES,
    SHARED,
    Loss,
    boxes_of_all_processes,
    weights_of,
)
from detr_fast.adapters.hugging_face_pairs import (
    Batch,
    Matched,
    box_losses,
    cardinality_error,
    gathered,
    named,
    pairs_of,
    sums,
    together,
    weighted,
)
from detr_fast.adapters.hugging_face_targets import (
    Targets,
    are_predictions,
    are_targets,
    counts_of,
    has_values,
    padded,
)


@torch.compiler.disable  # numbers of boxes would be constants of a graph, which is compiled again for others
def grounding_dino_object_detection_loss(
    logits: Tensor,
    labels: Any,
    device: Any,
    pred_boxes: Tensor,
    config: Any,
    label_maps: Any,
    text_mask: Any,
    outputs_class: Any = None,
    outputs_coord: Any = None,
    encoder_logits: Any = None,
    encoder_pred_boxes: Any = None,
) -> Loss:
    """transformers' GroundingDinoForObjectDetectionLoss."""
    layers = (outputs_class, outputs_coord) if config.auxiliary_loss else ()
    encoder = (encoder_logits, encoder_pred_boxes) if config.two_stage else ()
    found = _loss(logits, labels, pred_boxes, config, label_maps, text_mask, layers, encoder)
    if found is None:
        words = (label_maps, text_mask, outputs_class, outputs_coord, encoder_logits, encoder_pred_boxes)
        found = loss_grounding_dino.GroundingDinoForObjectDetectionLoss(
            logits, labels, device, pred_boxes, config, *words
        )
    return found


def _loss(
    logits: Tensor,
    labels: Any,
    boxes: Tensor,
    config: Any,
    label_maps: Any,
    text_mask: Any,
    layers: Sequence[Any],
    encoder: Sequence[Any],
) -> Loss | None:
    """transformers' three results, or None where they are to come from transformers."""
    if not _fits(logits, labels, boxes, config, label_maps, text_mask, layers, encoder):
        return None
    if not layers and not encoder and has_values(logits) and not dispatch.intervening:
        return None  # of one layer on a CPU
    auxiliary = None
    if layers:
        auxiliary = loss_grounding_dino._set_aux_loss(*layers)
        for one in auxiliary:
            one |= {"label_maps": label_maps, "text_mask": text_mask}
    every = (logits, *layers[:1], *encoder[:1])
    with torch.no_grad():
        likeliest = together(*_parts([one.amax(-1, keepdim=True) for one in every], bool(layers)))
    every = tuple(one[..., : _words_used(label_maps, text_mask)] for one in every)
    logits = together(*_parts(every, bool(layers)))
    boxes = together(boxes, layers[1:], encoder[1:])
    with torch.no_grad():
        targets, words = _targets(labels, [one[:, : logits.shape[-1]] for one in label_maps], logits.device)
        good = targets.good & (boxes[..., 2:] >= 0).all()
        if has_values(logits) and not good:
            return None  # which says what is wrong
        cost, broken = _cost(logits, boxes, targets, words, config)
        good = good & ~broken
        if has_values(logits) and not good:
            return None
    pairs = gathered([Batch(logits, boxes, pairs_of(cost, targets))])
    distance, apart, _ = box_losses(pairs)
    elements = _class_loss(logits, pairs, words.of_loss, text_mask[..., : logits.shape[-1]], config.focal_alpha)
    scales = [_scale(targets, labels)]
    if encoder:  # whose boxes theirs counts again, and all processes have to
        _scale(targets, labels)
    values = torch.stack(
        [
            sums(elements, pairs.logit_sizes, scales),
            sums(distance, pairs.sizes, scales),
            sums(apart, pairs.sizes, scales),
        ]
    )
    # Where transformers would look and raise an error, without a look: losses that are NaN, and so are their gradients.
    values = values * torch.where(good, 1.0, float("nan"))
    ends = ["", *(f"_{n}" for n in range(len(logits) - (2 if encoder else 1))), *["_enc"] * bool(encoder)]
    by_name = named(NAMES, ends, values, cardinality_error(likeliest, targets.counts))
    weights = weights_of(config, 2.0)
    if encoder:
        weights |= {f"{name}_enc": weights[name] for name in NAMES[:3]}
    return weighted(by_name, weights), by_name, auxiliary


def _fits(
    logits: Tensor,
    labels: Any,
    boxes: Tensor,
    config: Any,
    label_maps: Any,
    text_mask: Any,
    layers: Sequence[Any],
    encoder: Sequence[Any],
) -> bool:
    """Whether everything is as transformers documents it; if not, transformers' function knows what to do."""
    if logits.ndim != 3 or not are_targets(labels, logits.shape[0], logits.device):
        return False
    if config.class_cost == config.bbox_cost == config.giou_cost == 0:
        return False
    images, queries, words = logits.shape
    shapes: list[tuple[int, ...]] = [(images, queries)] * (2 + len(encoder))
    if layers and isinstance(layers[0], Tensor) and layers[0].ndim == 4:
        shapes += [(len(layers[0]), images, queries)] * 2
    return (
        max(counts_of(labels)) <= queries
        and are_predictions((logits, boxes, *encoder, *layers), shapes, words)
        and isinstance(text_mask, Tensor)
        and text_mask.dtype == torch.bool
        and text_mask.shape == logits.shape
        and isinstance(label_maps, (list, tuple))
        and len(label_maps) == images
        and all(isinstance(one, Tensor) and one.ndim == 2 and one.shape[1] == words for one in label_maps)
        and any(len(one) for one in label_maps)
        and {one.device for one in (text_mask, *label_maps)} == {logits.device}
    )


class _Words(NamedTuple):
    """The words of true boxes' classes."""

    of_matching: Tensor  # (B, N, words), an average over a class's words
    of_loss: Tensor  # (M, words), 1 where a word is one of the class


def _targets(labels: Any, label_maps: Sequence[Tensor], device: torch.device) -> tuple[Targets, _Words]:
    classes = [len(one) for one in label_maps]
    starts = list(accumulate(classes, initial=0))
    # For the loss, transformers adds to each label but the first image's the number of its own image's classes.
    offsets = [0, *classes[1:]]
    targets = padded(labels, device, max(classes), (classes, starts[:-1], offsets))
    of_image, start, offset = targets.more
    last = of_image.clamp(min=1) - 1
    maps = torch.cat(list(label_maps))
    own = maps[(start[:, None] + torch.minimum(targets.labels, last[:, None])).clamp(max=len(maps) - 1)]
    place = targets.all_labels + offset[targets.image]
    good = (targets.all_labels <= last[targets.image]).all() & (place < len(maps)).all() & targets.good
    words = _Words(own / own.sum(-1, keepdim=True), maps[place.clamp(max=len(maps) - 1)].long())
    return targets._replace(good=good), words


def _cost(logits: Tensor, boxes: Tensor, targets: Targets, words: _Words, config: Any) -> tuple[Tensor, Tensor]:
    """(P, B, N, Q), and whether a box is no number; logits of words that are none are -inf."""
    nothing = boxes.new_zeros(()).expand(*boxes.shape[:-1], 1)
    weights = (0.0, config.bbox_cost, config.giou_cost)
    true = (targets.labels, targets.boxes, targets.counts)
    cost, broken = ops.matching_cost(nothing, boxes, *true, weights=weights, focal=True)
    likely = logits.to(cost.dtype).sigmoid()
    less = 1 - likely
    of_word = (less + 1e-8).log_().mul_(likely).mul_(likely).mul_(0.75)
    of_word.sub_((likely + 1e-8).log_().mul_(less).mul_(less).mul_(0.25))
    kind = logits.device.type
    with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
        of_class = words.of_matching.to(cost.dtype) @ of_word.transpose(-1, -2)
    return cost + config.class_cost * of_class, broken.any()


def _class_loss(logits: Tensor, pairs: Matched, words: Tensor, text_mask: Tensor, alpha: float) -> Tensor:
    """Of each logit, 0 where there is no word."""
    other, own = (1 - alpha, 2 * alpha - 1) if alpha >= 0 else (1.0, 0.0)
    there = text_mask.expand(logits.shape).reshape(-1)
    scores = torch.where(there, pairs.logits, -torch.inf).view(-1, logits.shape[-1])
    losses = (scores.sigmoid().square() * other) * F.softplus(scores, threshold=40)  # 0 · 0 at -inf
    # And in the rows of pairs, where some words are positive.
    target, scores = words.to(scores.dtype).repeat(len(logits), 1), scores.index_select(0, pairs.rows)
    is_word = scores > -torch.inf
    scores = torch.where(is_word, scores, 0.0)
    likely = scores.sigmoid()
    of_pairs = F.binary_cross_entropy_with_logits(scores, target, reduction="none")
    of_pairs = of_pairs * (likely + target - 2 * likely * target) ** 2 * (other + own * target)
    return losses.index_copy_(0, pairs.rows, torch.where(is_word, of_pairs, 0.0)).view(-1)


def _words_used(label_maps: Sequence[Tensor], text_mask: Tensor) -> int:
    """How many of the words that there may be are in use, or all where a look would wait."""
    words = text_mask.shape[-1]
    if not has_values(text_mask):
        return words
    used = text_mask.any(0).any(0) | torch.cat(list(label_maps)).any(0)
    return int((used * torch.arange(1, words + 1)).amax().clamp(min=1))


def _parts(every: Sequence[Tensor], layers: bool) -> tuple[Tensor, Sequence[Tensor], Sequence[Tensor]]:
    """The last layer's, all layers' if they are there, and the encoder's if that is."""
    return every[0], every[1 : 1 + layers], every[1 + layers :]


def _scale(targets: Targets, labels: Any) -> Any:
    """What sums are multiplied with: 1 by the number of boxes, as transformers counts those of several processes."""
    total, ranks = boxes_of_all_processes(targets.counts)
    return 1 / max(1, sum(counts_of(labels))) if ranks == 1 else 1 / (total.sum() / ranks).clamp(min=1)


KNOWN = {
    "GroundingDinoForObjectDetectionLoss": KnownLoss(
        grounding_dino_object_detection_loss,
        {
            "GroundingDinoForObjectDetectionLoss": "2.0 GroundingDinoHungarianMatcher GroundingDinoImageLoss _set_aux_loss "
            "auxiliary_loss bbox_cost bbox_loss_coefficient class_cost decoder_layers focal_alpha giou_cost giou_loss_coefficient "
            "items range sum to two_stage update",
            "GroundingDinoHungarianMatcher.forward": MATCH + "0.25 1e-08 2.0 log sigmoid sum t zip",
            "GroundingDinoImageLoss.__init__": "Module __init__ focal_alpha losses matcher nn",
            "GroundingDinoImageLoss.loss_labels": "KeyError _get_target_classes_one_hot float focal_alpha masked_select "
            "sigmoid_focal_loss torch",
            "GroundingDinoImageLoss._get_target_classes_one_hot": "_get_source_permutation_idx cat device enumerate len long to "
            "torch zeros_like zip",
            "GroundingDinoImageLoss.loss_cardinality": CARDINALITY,
            "sigmoid_focal_loss": "binary_cross_entropy_with_logits functional nn sigmoid sum",
            **SHARED,
        },
        (loss_grounding_dino, loss_for_object_detection),
        lambda config: None,
    )
}
