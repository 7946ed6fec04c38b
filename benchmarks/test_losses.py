"""DETR's losses, and a linear layer's cross-entropy over a large vocabulary, forward and backward, beside their peers.

python -m pytest benchmarks/test_losses.py          # needs a GPU
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import libraries
from benchmarks.hardware import DEVICE, NEEDS_GPU, sized
from benchmarks.timing import Claim, compare, compiled
from detr_fast import ops, use_backend

pytestmark = NEEDS_GPU

LAYERS, QUERIES, CLASSES, BOXES = sized((6, 100, 92, 20), (1, 9, 8, 3))
IMAGES = sized([4, 32], [2])
HEADS = sized([(4096, 256, 32000), (4096, 1024, 128000)], [(6, 16, 40)])  # rows, features, classes

Function = Callable[..., Tensor]


def compare_losses(
    case: str,
    functions: Mapping[str, Function],
    eager: Function,
    leaves: Sequence[Tensor],
    rest: Sequence[Any],
    claims: Sequence[Claim],
) -> None:
    """The result and all gradients of `function(*leaves, *rest)`."""

    def step(function: Function, leaves: Sequence[Tensor] = leaves) -> Callable[[], Sequence[Tensor]]:
        def run() -> Sequence[Tensor]:
            losses = function(*leaves, *rest)
            return [losses, *torch.autograd.grad(losses.sum(), leaves)]

        return run

    exact = [t.detach().double().requires_grad_() for t in leaves]
    peers = {name: step(function) for name, function in functions.items()}
    compare(case, peers, eager=step(eager), truth=step(eager, exact), claims=claims)


@pytest.mark.parametrize("focal", [False, True], ids=["softmax", "focal"])
@pytest.mark.parametrize("images", IMAGES)
def test_detection_losses(images: int, focal: bool) -> None:
    torch.manual_seed(0)
    logits = torch.randn(LAYERS, images, QUERIES, CLASSES, device=DEVICE).requires_grad_()
    boxes = (torch.rand(LAYERS, images, QUERIES, 4, device=DEVICE) * 0.5 + 0.2).requires_grad_()
    query = torch.rand(LAYERS, images, QUERIES, device=DEVICE).argsort(-1)[..., :BOXES]
    labels = torch.randint(CLASSES - 1, (images, BOXES), device=DEVICE)
    true_boxes = torch.rand(images, BOXES, 4, device=DEVICE) * 0.5 + 0.2
    counts = labels.new_full((images,), BOXES)
    broken = torch.zeros(LAYERS, images, QUERIES, dtype=torch.bool, device=DEVICE)
    rest = (query, labels, true_boxes, counts, broken, counts)

    def named(backend: str) -> Function:
        def run(*case: Any) -> Tensor:
            with use_backend(detection_losses=backend):
                return ops.detection_losses(*case, focal=focal)[0]

        return run

    functions = {name: named(name) for name in ("eager", "auto", "triton")} | {
        "torch.compile": compiled(named("eager"))
    }
    case = f"DETR's {'focal ' * focal}losses, {LAYERS} x {images} x {QUERIES} x {CLASSES} fp32, forward and backward"
    claims = [Claim("DETR's losses: at least eager's speed, or not chosen", ("eager",), 1.0)]
    compare_losses(case, functions, named("eager"), [logits, boxes], rest, claims)


def named(backend: str) -> Function:
    def run(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        with use_backend(linear_cross_entropy=backend):
            return ops.linear_cross_entropy(x, weight, None, target)

    return run


def eager(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight), target)


@pytest.mark.parametrize("head", HEADS, ids=str)
def test_linear_cross_entropy(head: tuple[int, int, int]) -> None:
    rows, features, classes = head
    torch.manual_seed(0)
    x, weight = (
        (torch.randn(n, features, device=DEVICE) * features**-0.25).bfloat16().requires_grad_() for n in (rows, classes)
    )
    target = torch.randint(classes, (rows,), device=DEVICE)
    target[::7] = -100
    functions = {"eager": eager} | {name: named(name) for name in ("auto", "chunked", "triton")}
    functions |= {"torch.compile": compiled(eager)} | libraries.CROSS_ENTROPIES
    case = f"linear_cross_entropy ({rows}, {features}) x {classes} bf16, forward and backward"
    claims = [Claim("linear_cross_entropy: over the best library", tuple(libraries.CROSS_ENTROPIES), 1.0)]
    compare_losses(case, functions, eager, [x, weight], [target], claims)
