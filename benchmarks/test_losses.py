"""DETR's losses, and a linear layer's cross-entropy over a large vocabulary, forward and backward, beside their peers.

python -m pytest benchmarks/test_losses.py          # needs a GPU

A wrong result is never timed; a peer that is not installed is skipped, and says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.hardware import DEVICE, NEEDS_GPU, check, sized
from detr_fast import ops, use_backend

pytestmark = NEEDS_GPU

LAYERS, QUERIES, CLASSES, BOXES = sized((6, 100, 92, 20), (2, 9, 8, 3))
IMAGES = sized([4, 32], [2])
HEADS = sized([(4096, 256, 32000), (4096, 1024, 128000)], [(6, 16, 40)])  # rows, features, classes

Function = Callable[..., Tensor]


def run_checked(
    benchmark: Any, peer: str, function: Function, eager: Function, leaves: Sequence[Tensor], rest: Sequence[Any] = ()
) -> None:
    """Check the result and all gradients of `function(*leaves, *rest)`, then time them."""

    def step(function: Function = function, leaves: Sequence[Tensor] = leaves) -> list[Tensor]:
        losses = function(*leaves, *rest)
        return [losses, *torch.autograd.grad(losses.sum(), leaves)]

    exact = [t.detach().double().requires_grad_() for t in leaves]
    check(peer, step(), step(eager), step(eager, exact))
    torch.cuda.reset_peak_memory_stats()

    def synchronised() -> None:
        step()
        torch.cuda.synchronize()

    benchmark.pedantic(synchronised, rounds=30, iterations=1, warmup_rounds=5)
    benchmark.extra_info["peak MiB"] = torch.cuda.max_memory_allocated() >> 20


@pytest.mark.parametrize("peer", ["eager", "auto", "triton", "torch.compile"])
@pytest.mark.parametrize("focal", [False, True], ids=["softmax", "focal"])
@pytest.mark.parametrize("images", IMAGES)
def test_detection_losses(benchmark: Any, images: int, focal: bool, peer: str) -> None:
    kind = "focal " * focal
    benchmark.group = f"DETR's {kind}losses, {LAYERS} x {images} x {QUERIES} x {CLASSES} fp32, forward and backward"
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

    function = torch.compile(named("eager")) if peer == "torch.compile" else named(peer)
    run_checked(benchmark, peer, function, named("eager"), [logits, boxes], rest)


def liger(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    transformers = pytest.importorskip("liger_kernel.transformers", reason="Liger's kernels are not installed")
    return transformers.LigerFusedLinearCrossEntropyLoss()(weight, x, target)


def cut_cross_entropy(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    module = pytest.importorskip("cut_cross_entropy", reason="Apple's cut_cross_entropy is not installed")
    return module.linear_cross_entropy(x, weight, target)


def named(backend: str) -> Function:
    def run(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        with use_backend(linear_cross_entropy=backend):
            return ops.linear_cross_entropy(x, weight, None, target)

    return run


def eager(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight), target)


PEERS: dict[str, Function] = {
    "eager": eager,
    "auto": named("auto"),
    "chunked": named("chunked"),
    "triton": named("triton"),
    "torch.compile": torch.compile(eager),
    "liger": liger,
    "cut_cross_entropy": cut_cross_entropy,
}


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("head", HEADS, ids=str)
def test_linear_cross_entropy(benchmark: Any, head: tuple[int, int, int], peer: str) -> None:
    rows, features, classes = head
    benchmark.group = f"linear_cross_entropy ({rows}, {features}) x {classes} bf16, forward and backward"
    torch.manual_seed(0)
    x, weight = (
        (torch.randn(n, features, device=DEVICE) * features**-0.25).bfloat16().requires_grad_() for n in (rows, classes)
    )
    target = torch.randint(classes, (rows,), device=DEVICE)
    target[::7] = -100
    run_checked(benchmark, peer, PEERS[peer], eager, [x, weight], [target])
