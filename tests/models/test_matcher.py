"""Matching: least total cost within each image, whatever the predictions look like."""

from __future__ import annotations

import pytest
import torch

from detr_fast.models import HungarianMatcher, Targets

pytest.importorskip("scipy")


def make_targets(counts: tuple[int, ...], classes: int, capacity: int | None = None) -> Targets:
    return Targets.from_list(
        [{"boxes": torch.rand(n, 4) * 0.5 + 0.2, "labels": torch.randint(classes, (n,))} for n in counts], capacity
    )


def test_costs_never_mix_images_and_layers_are_matched_as_if_alone():
    torch.manual_seed(1)
    targets = make_targets((4, 0, 2), 5)
    logits, boxes = torch.randn(3, 3, 8, 6), torch.rand(3, 3, 8, 4) * 0.5 + 0.2
    matcher = HungarianMatcher()
    together = matcher.match(logits, boxes, targets)
    for layer in range(3):
        for image in range(3):
            only = Targets(*(t[image : image + 1] for t in (targets.boxes, targets.labels, targets.counts)))
            alone = matcher.match(logits[layer, image : image + 1], boxes[layer, image : image + 1], only)
            assert torch.equal(together[layer, image], alone[0])


def test_broken_predictions_are_matched_last():
    torch.manual_seed(2)
    targets = make_targets((3,), 5)
    logits, boxes = torch.randn(1, 6, 6), torch.rand(1, 6, 4) * 0.5 + 0.2
    logits[0, :2] = float("nan")
    boxes[0, 2] = float("nan")
    ((queries, true),) = HungarianMatcher()({"pred_logits": logits, "pred_boxes": boxes}, targets)
    assert queries.tolist() == [3, 4, 5]
    assert sorted(true.tolist()) == [0, 1, 2]


def test_pairs_come_in_the_order_of_queries():
    targets = Targets.from_list(
        [{"boxes": torch.tensor([[0.8, 0.8, 0.1, 0.1], [0.2, 0.2, 0.1, 0.1]]), "labels": torch.tensor([0, 1])}]
    )
    boxes = torch.tensor([[[0.2, 0.2, 0.1, 0.1], [0.5, 0.5, 0.1, 0.1], [0.8, 0.8, 0.1, 0.1]]])
    ((queries, true),) = HungarianMatcher()({"pred_logits": torch.zeros(1, 3, 3), "pred_boxes": boxes}, targets)
    assert queries.tolist() == [0, 2]
    assert true.tolist() == [1, 0]


def test_a_matcher_without_any_cost_is_refused():
    with pytest.raises(ValueError, match="all three matching costs are 0"):
        HungarianMatcher(0, 0, 0)
