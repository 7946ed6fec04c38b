"""transformers' loss of D-FINE: RT-DETR's, and two for the distributions by which decoder layers refine a box's edges.

An edge's distribution is over bins + 1 distances W(n) from its place in a reference box. Fine-grained localization: cross-entropy
with the two bins around the true distance, times the pair's IoU. Distillation: T² KL(last layer ‖ layer), T = 5, times IoU in pairs and
the last layer's confidence elsewhere, the mean over pairs and that over others weighed by the roots of their numbers.
Source: Peng et al., 2024, arXiv:2410.13842.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.loss import loss_d_fine, loss_for_object_detection, loss_rt_detr

from detr_fast.adapters.hugging_face_loss_code import KnownLoss
from detr_fast.adapters.hugging_face_loss_detr import Loss
from detr_fast.adapters.hugging_face_loss_rt_detr import NAMES, RT_DETR, Found, of_all_layers, why_not
from detr_fast.adapters.hugging_face_pairs import named
from detr_fast.adapters.hugging_face_targets import sent

_TEMPERATURE = 5


@torch.compiler.disable  # numbers of boxes would be constants of a graph, which is compiled again for others
def d_fine_object_detection_loss(
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
    predicted_corners: Any = None,
    initial_reference_points: Any = None,
    **kwargs: Any,
) -> Loss:
    """transformers' DFineForObjectDetectionLoss."""
    layers = (outputs_class, outputs_coord, enc_topk_logits, enc_topk_bboxes)
    edges = (predicted_corners, initial_reference_points)
    found = _loss(logits, labels, pred_boxes, config, layers, denoising_meta_values, edges)
    if found is None:
        arguments = (logits, labels, device, pred_boxes, config, *layers, denoising_meta_values, *edges)
        found = loss_d_fine.DFineForObjectDetectionLoss(*arguments, **kwargs)
    return found


def _loss(
    logits: Tensor,
    labels: Any,
    boxes: Tensor,
    config: Any,
    layers: Sequence[Any],
    denoising: Any,
    edges: Sequence[Any],
) -> Loss | None:
    """transformers' three results, or None where they are to come from transformers."""
    if not config.auxiliary_loss:
        layers, edges = (), ()
    if not all(isinstance(one, Tensor) for one in layers) or not _are_edges(edges, layers, config.max_num_bins):
        return None
    layers = [one.clamp(min=0, max=1) if n % 2 else one for n, one in enumerate(layers)]
    # A model also predicts before its first layer: theirs pairs first with first, as many as there are of both.
    every = min(len(one[0]) for one in (*layers[:1], *edges)) if layers else 0
    found = of_all_layers(
        logits,
        labels,
        boxes.clamp(min=0, max=1),
        config,
        [*(one[:, :every] for one in layers[:2]), *layers[2:]],
        denoising,
    )
    if found is None:
        return None
    by_name, loss = named(NAMES, found.ends, found.values), found.values.sum()
    if not layers:
        return loss, by_name, None
    noisy = denoising["dn_num_split"][0] if denoising else 0
    by_layer = [one.transpose(0, 1) for one in (*layers[:2], *edges)]
    of_layers, noise = ([one[:, :, part] for one in by_layer] for part in (slice(noisy, None), slice(noisy)))
    teachers, of_noise = ((one[2][-1], one[0][-1]) for one in (of_layers, noise))
    students = [one[: every - 1] for one in of_layers]
    auxiliary: Any = loss_d_fine._set_aux_loss2(students[0], students[1], students[2], students[3], *teachers)
    auxiliary.extend(loss_d_fine._set_aux_loss([layers[2]], [layers[3]]))
    last = len(auxiliary)  # of these layers, or the encoder
    parts = [_of_edges(found, 0, students[2:], *teachers, config)]
    if denoising:
        parts.append(_of_edges(found, 1, [one[:every] for one in noise[2:]], *of_noise, config))
    values = torch.cat(parts, 1) * found.good
    of_edges = named(("loss_fgl", "loss_ddf"), [*found.ends[1:last], *found.ends[last + 1 :]], values)
    by_name = {
        name + end: (by_name | of_edges)[name + end]
        for end in found.ends
        for name in (*NAMES, "loss_fgl", "loss_ddf")
        if name + end in by_name or name + end in of_edges
    }
    return loss + values.sum(), by_name, auxiliary


def _are_edges(edges: Sequence[Any], layers: Sequence[Any], bins: int) -> bool:
    """Whether there are distributions of an even number of bins, and reference boxes, for queries as the predictions'."""
    return not edges or (
        bins >= 4
        and bins % 2 == 0
        and all(one.ndim == 4 and one.shape[1] > 0 for one in layers[:2])
        and all(isinstance(one, Tensor) and one.is_floating_point() and one.ndim == 4 for one in edges)
        and all(one.shape[:2] == edges[0].shape[:2] and one.shape[1] > 0 for one in edges)
        and all(
            (len(one), *one.shape[2:]) == (len(layers[0]), layers[0].shape[2], size)
            for one, size in zip(edges, (4 * (bins + 1), 4))
        )
    )


def _of_edges(
    found: Found, number: int, layers: Sequence[Tensor], teacher: Tensor, scores: Tensor, config: Any
) -> Tensor:
    """Both losses (2, L) of a batch's layers that have distributions (L, B, Q, 4 (bins + 1)) and boxes that these refine."""
    pairs, (sets, each) = found.batches[number].pairs, found.pairs.sizes[number]
    first = sum(a * b for a, b in found.pairs.sizes[:number])
    iou = found.iou[first : first + sets * each].view(sets, each)
    corners, references = layers
    if number == 0:  # the last layer comes first, and the encoder behind all others
        pairs, iou = pairs._replace(query=pairs.query[1:-1]), iou[1:-1]
    layers_of, rows, bins = len(corners), corners.shape[1:3].numel(), config.max_num_bins
    place = (pairs.query + torch.arange(0, layers_of * rows, rows, device=corners.device)[:, None]).flatten()
    corners = corners.to(iou.dtype).reshape(layers_of * rows, 4, bins + 1)
    references = references.detach().to(iou.dtype).reshape(layers_of * rows, 4).index_select(0, place)
    with torch.no_grad():
        left, to_right = _between(references, pairs.boxes.to(iou.dtype).repeat(layers_of, 1), config)
    likely = corners.index_select(0, place).log_softmax(-1)
    entropy = -(likely.gather(-1, left) * (1 - to_right) + likely.gather(-1, left + 1) * to_right)
    localization = (entropy.view(layers_of, each, 4) * iou[..., None]).sum((1, 2)) * found.scales[number]

    teacher = teacher.detach().to(iou.dtype).reshape(rows, 4, bins + 1)
    of_pair, elsewhere = _shares(each, rows - each)
    weight = (scores.detach().amax(-1).sigmoid().to(iou.dtype) * elsewhere).flatten().repeat(layers_of)
    weight = weight.index_copy_(0, place, iou.flatten() * of_pair).view(layers_of, rows)
    student = (corners / _TEMPERATURE).log_softmax(-1).view(layers_of, rows, 4, bins + 1)
    target = (teacher / _TEMPERATURE).softmax(-1).expand_as(student)
    distillation = (F.kl_div(student, target, reduction="none").sum((2, 3)) * weight).sum(1)
    alike = (corners.view(layers_of, rows, 4, bins + 1) == teacher).all(-1).all(-1).all(-1)
    distillation = torch.where(alike, 0.0, distillation)
    return torch.stack((localization * config.weight_loss_fgl, distillation * config.weight_loss_ddf))


def _shares(pairs: int, others: int) -> tuple[float, float]:
    """What a query's divergence weighs in pairs and elsewhere: each kind's mean over edges, by the root of its number."""
    both = pairs**0.5 + others**0.5
    of_pair, elsewhere = (_TEMPERATURE**2 / both / (4 * n**0.5) if n else 0.0 for n in (pairs, others))
    return of_pair, elsewhere


def _between(references: Tensor, true: Tensor, config: Any) -> tuple[Tensor, Tensor]:
    """Of each edge (T, 4) of true boxes, (T, 4, 1): the bin to its left, and how far it is from there to the next, 0 to 1."""
    bins, scale = config.max_num_bins, abs(config.reg_scale)
    unit = references[:, 2:] / scale + 1e-16
    half = true[:, 2:] / 2
    starts = (references[:, :2] - (true[:, :2] - half)) / unit
    ends = (true[:, :2] + half - references[:, :2]) / unit
    distance = torch.cat((starts, ends), 1) - 0.5 * scale
    of_bins = sent(torch.tensor(_distances(bins, abs(config.up) * scale), dtype=true.dtype, device="cpu"), true.device)
    left = torch.searchsorted(of_bins, distance, right=True) - 1
    inside = left.clamp(0, bins - 1)
    behind, ahead = (distance - of_bins[inside]).abs(), (of_bins[inside + 1] - distance).abs()
    to_right = torch.where(left < bins, behind / (behind + ahead), 1.0)
    return inside[..., None], torch.where(left < 0, 0.0, to_right)[..., None]


def _distances(bins: int, bound: float) -> list[float]:
    """W(n) of all bins + 1: steps that grow by one factor to both sides of 0, up to `bound`, and twice that at the ends."""
    step = (bound + 1) ** (2 / (bins - 2))
    right = [step**n - 1 for n in range(1, bins // 2)] + [2 * bound]
    return [-one for one in reversed(right)] + [0.0] + right


KNOWN = {
    "DFineForObjectDetectionLoss": KnownLoss(
        d_fine_object_detection_loss,
        {
            "DFineForObjectDetectionLoss": "DFineLoss _set_aux_loss _set_aux_loss2 auxiliary_loss clamp extend split sum to torch "
            "transpose values",
            "_set_aux_loss2": "zip",
            "weighting_function": "abs cat dim range torch unsqueeze zeros_like",
            "translate_gt": "0.0 0.1 1.0 abs float long reshape sum torch unsqueeze weighting_function zeros_like",
            "bbox2distance": "0.5 1e-16 abs clamp detach reshape stack torch translate_gt",
            "DFineLoss.__init__": "Parameter RTDetrHungarianMatcher __init__ losses matcher max_num_bins nn reg_scale super tensor "
            "torch up weight_dict weight_loss_bbox weight_loss_ddf weight_loss_fgl weight_loss_giou weight_loss_vfl",
            "DFineLoss.unimodal_distribution_focal_loss": "F cross_entropy float long mean reshape sum",
            "DFineLoss.loss_local": "0.5 F KLDivLoss _get_source_permutation_idx any bbox2distance bool box_iou cat "
            "center_to_corners_format detach diag dtype equal fgl_targets log_softmax max max_num_bins mean nn no_grad num_neg "
            "num_pos reg_scale repeat reshape reshape_as shape sigmoid softmax sum to torch unimodal_distribution_focal_loss "
            "unsqueeze up zeros_like zip",
            "DFineLoss.get_loss": "ValueError loss_boxes loss_cardinality loss_labels_focal loss_labels_vfl loss_local",
            "DFineLoss.forward": RT_DETR["RTDetrLoss.forward"],
            **RT_DETR,
        },
        (loss_d_fine, loss_rt_detr, loss_for_object_detection),
        why_not,
        splits=6,
    )
}
