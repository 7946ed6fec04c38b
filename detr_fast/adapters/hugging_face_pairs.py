"""Predictions matched with true boxes, of all decoder layers at once: which pairs, and what their boxes' losses are.

A batch of predictions is (P, B, Q, …), P decoder layers or others of B images and Q queries. Several batches, as with
denoising queries, are taken as one list of queries, batch by batch, in which pairs have places: as many operations as for one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from detr_fast import ops
from detr_fast.adapters.hugging_face_targets import Targets
from detr_fast.nn.weighted_sum import WeightedSum
from detr_fast.ops.boxes import both_ious

_sum = WeightedSum()


class Pairs(NamedTuple):
    """The M pairs of each of P × B images' queries, or the same in all P where `query` is (1, M)."""

    query: Tensor  # (P or 1, M), in B * Q
    labels: Tensor  # (M,)
    boxes: Tensor  # (M, 4)


class Batch(NamedTuple):
    """Predictions, and their pairs."""

    logits: Tensor  # (P, B, Q, K)
    boxes: Tensor  # (P, B, Q, 4)
    pairs: Pairs


def together(last: Tensor, layers: Sequence[Tensor], encoder: Sequence[Tensor]) -> Tensor:
    """The last layer's predictions (B, Q, …), the earlier of all layers', and the encoder's: (P, B, Q, …)."""
    return torch.cat((last[None], *(one[:-1] for one in layers), *(one[None] for one in encoder)))


def matched(
    logits: Tensor, boxes: Tensor, targets: Targets, costs: tuple[float, float, float], focal: bool, groups: int = 1
) -> tuple[Pairs, Tensor]:
    """The pairs of least cost, each true box with one query of each group of Q // groups, and whether a prediction is broken.

    No image has more boxes than a group has queries.
    """
    true = (targets.labels, targets.boxes, targets.counts)
    cost, broken = ops.matching_cost(logits, boxes, *true, weights=costs, focal=focal)
    return pairs_of(cost, targets, groups), broken.any()


def pairs_of(cost: Tensor, targets: Targets, groups: int = 1) -> Pairs:
    """The pairs of least cost (P, B, N, Q)."""
    queries = cost.shape[-1]
    each = queries // groups
    # (P, groups, B, N, queries of a group)
    cost = cost[..., : groups * each].unflatten(-1, (groups, each)).movedim(-2, 1)
    query = ops.linear_assignment(cost, targets.counts).flatten(2)  # (P, groups, B * N)
    query = query.index_select(2, targets.slot) + targets.image * queries
    if groups == 1:
        return Pairs(query[:, 0], targets.all_labels, targets.all_boxes)
    query = query + torch.arange(0, groups * each, each, device=query.device)[:, None]
    return Pairs(query.flatten(1), targets.all_labels.repeat(groups), targets.all_boxes.repeat(groups, 1))


class Matched(NamedTuple):
    """All pairs of some batches, T in all, as one list."""

    logits: Tensor  # all of them, flat, fp32 or fp64
    positive: Tensor  # (T,), where in these a pair's class is
    boxes: Tensor  # (T, 4), predicted
    true: Tensor  # (T, 4)
    rows: Tensor  # (T,), where in the list of all queries
    sizes: list[tuple[int, int]]  # of each batch: P and its pairs
    logit_sizes: list[tuple[int, int]]  # of each batch: P and its logits


def gathered(batches: Sequence[Batch]) -> Matched:
    """What losses of pairs need."""
    dtype = torch.float64 if batches[0].logits.dtype == torch.float64 else torch.float32
    classes, start, rows, labels, true = batches[0].logits.shape[-1], 0, [], [], []
    sizes = [(len(one.logits), one.pairs.query.shape[1]) for one in batches]
    queries = [one.boxes[0, ..., 0].numel() for one in batches]
    for batch, (sets, each), length in zip(batches, sizes, queries):
        first = torch.arange(start, start + sets * length, length, device=batch.logits.device)[:, None]
        rows.append((batch.pairs.query + first).flatten())
        labels.append(batch.pairs.labels.expand(sets, each).flatten())
        true.append(batch.pairs.boxes.expand(sets, each, 4).flatten(0, 1))
        start += sets * length
    row = torch.cat(rows)
    return Matched(
        logits=torch.cat([one.logits.reshape(-1) for one in batches]).to(dtype),
        positive=row * classes + torch.cat(labels),
        boxes=torch.cat([one.boxes.reshape(-1, 4) for one in batches]).to(dtype).index_select(0, row),
        true=torch.cat(true).to(dtype),
        rows=row,
        sizes=sizes,
        logit_sizes=[(sets, length * classes) for (sets, _), length in zip(sizes, queries)],
    )


def box_losses(pairs: Matched) -> tuple[Tensor, Tensor, Tensor]:
    """Of each pair |box - true box|₁ and 1 - GIoU, and IoU without gradient: (T,) each."""
    iou, generalized = both_ious(pairs.boxes, pairs.true)
    return (pairs.boxes - pairs.true).abs().sum(1), 1 - generalized, iou.detach()


def class_losses(pairs: Matched, elsewhere: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Of each logit: weight · BCE(logit, target) where it is a pair's class, and elsewhere · BCE(logit, 0)."""
    # The threshold beyond which softplus(x) is x: there its distance to x is rounded in fp64, too.
    losses = elsewhere * F.softplus(pairs.logits, threshold=40)
    positive = pairs.logits.index_select(0, pairs.positive)
    return losses.scatter_(
        0, pairs.positive, F.binary_cross_entropy_with_logits(positive, target, weight, reduction="none")
    )


def sums(values: Tensor, sizes: Sequence[tuple[int, int]], scales: Sequence[float]) -> Tensor:
    """Of (P, number of values) for each batch: the sum of each of its P, times its scale, one after the other."""
    parts = values.split([sets * each for sets, each in sizes])
    return torch.cat([part.view(size).sum(1) * scale for part, size, scale in zip(parts, sizes, scales)])


def cardinality_error(logits: Tensor, counts: Tensor) -> Tensor:
    """(P,): by how many objects an image's predictions (P, B, Q, K) are off, on average; an object's sigmoid is over 0.5."""
    found = (logits.detach().amax(-1).sigmoid() > 0.5).sum(-1)
    return (found - counts).abs().float().mean(-1)


def named(names: Sequence[str], ends: Sequence[str], *values: Tensor) -> dict[str, Tensor]:
    """Scalars under transformers' names: of all values together, a row for each name and a column for each ending."""
    # Rows all at once: one launch then puts their gradients together.
    scalars = [one for part in values for one in part.flatten().unbind(0)]
    return {
        name + end: scalars[row * len(ends) + column]
        for column, end in enumerate(ends)
        for row, name in enumerate(names)
    }


def weighted(by_name: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """The sum of what has a weight, times that."""
    names = [name for name in by_name if name in weights]
    return _sum([by_name[name] for name in names], [weights[name] for name in names])
