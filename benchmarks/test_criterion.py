"""Matcher and criterion beside the original's algorithm: 6 layers, 8 images, 20 boxes an image, 100 queries.

python -m pytest benchmarks/test_criterion.py                  # needs a GPU
python -m benchmarks.test_criterion                            # on the CPU: the ratio, both in turn
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.hardware import DEVICE, NEEDS_GPU, sized
from benchmarks.original_step import OriginalCriterion
from benchmarks.timing import Claim, compare
from detr_fast.models import ModelConfig, Targets, build_criterion

pytestmark = NEEDS_GPU

LAYERS, IMAGES, BOXES, QUERIES, CLASSES = sized((6, 8, 20, 100, 91), (2, 2, 3, 10, 91))


def make_case(device: str) -> tuple[dict[str, Any], list[dict[str, Tensor]], Targets]:
    torch.manual_seed(0)
    layers = [
        {
            "pred_logits": torch.randn(IMAGES, QUERIES, CLASSES + 1, device=device).requires_grad_(),
            "pred_boxes": (torch.rand(IMAGES, QUERIES, 4, device=device) * 0.5 + 0.2).requires_grad_(),
        }
        for _ in range(LAYERS)
    ]
    targets = [
        {"boxes": torch.rand(BOXES, 4) * 0.5 + 0.2, "labels": torch.randint(CLASSES, (BOXES,))} for _ in range(IMAGES)
    ]
    padded = Targets.from_list(targets).to(device)
    on_device = [{name: value.to(device) for name, value in target.items()} for target in targets]
    return {**layers[-1], "aux_outputs": layers[:-1]}, on_device, padded


def functions(device: str) -> dict[str, Callable[[], dict[str, Tensor]]]:
    outputs, targets, padded = make_case(device)
    ours, original = build_criterion(ModelConfig(num_classes=CLASSES)), OriginalCriterion(CLASSES)
    found = {"auto": lambda: ours(outputs, padded), "original": lambda: original(outputs, targets)}
    mine, theirs = found["auto"](), found["original"]()
    for name, value in theirs.items():  # a wrong result is never timed
        torch.testing.assert_close(mine[name], value, rtol=1e-4, atol=1e-5)
    return found


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward and backward"])
def test_criterion(backward: bool) -> None:
    found = functions(DEVICE.type)
    weights = build_criterion(ModelConfig(num_classes=CLASSES)).weight_dict

    def step(call: Callable[[], dict[str, Tensor]]) -> Callable[[], list[Tensor]]:
        def run() -> list[Tensor]:
            losses = call()
            if backward:
                weighted(weights, losses).backward()
            return list(losses.values())

        return run

    case = f"matcher and criterion {LAYERS} x {IMAGES} x {BOXES} x {QUERIES}, {'forward and backward' if backward else 'forward'}"
    claims = [Claim("matcher and criterion: over the original's algorithm", ("original",), 4.0)]
    compare(case, {name: step(call) for name, call in found.items()}, claims=claims)


def weighted(weights: Mapping[str, float], losses: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([weights[name] * value for name, value in losses.items() if name in weights]).sum()


def ratio(rounds: int = 30, backward: bool = False) -> tuple[float, float, float]:
    """Median milliseconds of ours and of the original's algorithm on the CPU, in turn, and the median of their ratios."""
    weights = build_criterion(ModelConfig(num_classes=CLASSES)).weight_dict
    times: dict[str, list[float]] = {"auto": [], "original": []}
    found = functions("cpu")
    for _ in range(rounds):
        for name, call in found.items():
            begun = time.perf_counter()
            losses = call()
            if backward:
                weighted(weights, losses).backward()
            times[name].append((time.perf_counter() - begun) * 1e3)
    ratios = [b / a for a, b in zip(times["auto"], times["original"])]
    return statistics.median(times["auto"]), statistics.median(times["original"]), statistics.median(ratios)


if __name__ == "__main__":
    for with_backward in (False, True):
        ours, original, times = ratio(backward=with_backward)
        print(f"backward {with_backward}: ours {ours:.1f} ms, the original's {original:.1f} ms, {times:.1f} times")
