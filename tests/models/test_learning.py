"""The parts together learn: what no comparison of single values would notice."""

from __future__ import annotations

import pytest
import torch

from detr_fast.models import ModelConfig, PostProcess, Targets, build_criterion, build_model

pytest.importorskip("scipy")


def test_a_small_detector_learns_where_a_square_is_and_of_which_colour():
    torch.manual_seed(0)
    config = ModelConfig(
        backbone="conv", num_classes=2, num_queries=4, d_model=64, heads=4, encoder_layers=1, decoder_layers=2,
        feedforward=128, dropout=0.0, backbone_width=8,
    )  # fmt: skip
    images, rows = torch.zeros(8, 3, 64, 64), []
    for index, (x, y) in enumerate(((8, 8), (40, 8), (8, 40), (40, 40)) * 2):
        label = index // 4
        images[index, label, y : y + 16, x : x + 16] = 1.0
        box = torch.tensor([[x + 8, y + 8, 16, 16]]) / 64
        rows.append({"boxes": box, "labels": torch.tensor([label])})
    targets = Targets.from_list(rows, capacity=3, num_classes=2)
    model, criterion = build_model(config), build_criterion(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(80):
        optimizer.zero_grad()
        losses = criterion(model(images), targets)
        criterion.weighted_sum(losses).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
    assert losses["class_error"] == 0
    assert losses["loss_giou"] < 0.3
    results = PostProcess()(model(images), torch.full((8, 2), 64))
    for result, row in zip(results, rows):
        best = result["scores"].argmax()
        assert result["labels"][best] == row["labels"][0]
        assert (result["boxes"][best, :2] + 8 - row["boxes"][0, :2] * 64).abs().max() < 6
