"""DETR's losses, and a linear layer's cross-entropy over large vocabularies, forward and backward, beside their peers.

python -m pytest benchmarks/test_losses.py          # on the CPU, at small sizes; and on a GPU where there is one

A wrong result is never timed; a peer that is not installed is skipped, and says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from detr_fast import ops, use_backend

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
HEADS = {"cpu": (512, 64, 4000), "cuda": (8192, 1024, 32000)}  # rows, features, classes: a language model's head
QUERIES = {"cpu": (2, 100), "cuda": (8, 300)}  # images, queries


def run_checked(benchmark: Any, peer: str, device: str, step: Callable[[], Any], reference: Callable[[], Any]) -> None:
    """Compare one step's results with the reference's, then time it."""
    for found, expected in zip(step(), reference(), strict=True):
        error = (found.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-6)
        assert error < 2e-2, f"{peer} is wrong (relative error {error:.2e}): not timed"

    def synchronised() -> None:
        step()
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(synchronised, rounds=30 if device == "cuda" else 5, iterations=1, warmup_rounds=3)


def with_gradients(function: Callable[..., Tensor], leaves: Sequence[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    def step() -> tuple[Tensor, ...]:
        losses = function()
        return (losses, *torch.autograd.grad(losses.sum(), leaves))

    return step


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("focal", [False, True], ids=["softmax", "focal"])
@pytest.mark.parametrize("peer", ["eager", "auto", "triton", "torch.compile"])
def test_detection_losses(benchmark: Any, peer: str, focal: bool, device: str) -> None:
    if device == "cpu" and peer not in ("eager", "auto"):
        pytest.skip("kernels and compiled code are timed on a GPU")
    images, queries = QUERIES[device]
    benchmark.group = f"DETR's {'focal ' * focal}losses, 6 x {images} x {queries} x 92 {device}, forward and backward"
    torch.manual_seed(0)
    logits, boxes = torch.randn(6, images, queries, 92), torch.rand(6, images, queries, 4) * 0.5 + 0.2
    query = torch.rand(6, images, queries).argsort(-1)[..., :20]
    labels, true_boxes = torch.randint(91, (images, 20)), torch.rand(images, 20, 4) * 0.5 + 0.2
    counts, broken = torch.full((images,), 20), torch.zeros(6, images, queries, dtype=torch.bool)
    case = [t.to(device) for t in (logits, boxes, query, labels, true_boxes, counts, broken, counts)]
    leaves = [t.requires_grad_() for t in case[:2]]

    def losses(backend: str) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with use_backend(detection_losses=backend):
                return ops.detection_losses(*case, focal=focal)[0]

        return run

    run = losses("eager" if peer == "torch.compile" else peer)
    step = with_gradients(torch.compile(run) if peer == "torch.compile" else run, leaves)
    run_checked(benchmark, peer, device, step, with_gradients(losses("eager"), leaves))


def liger(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    transformers = pytest.importorskip("liger_kernel.transformers", reason="Liger's kernels are not installed")
    return transformers.LigerFusedLinearCrossEntropyLoss()(weight, x, target)


def cut_cross_entropy(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    module = pytest.importorskip("cut_cross_entropy", reason="Apple's cut_cross_entropy is not installed")
    return module.linear_cross_entropy(x, weight, target)


def named(backend: str) -> Callable[..., Tensor]:
    def run(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        with use_backend(linear_cross_entropy=backend):
            return ops.linear_cross_entropy(x, weight, None, target)

    return run


def eager(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight), target)


PEERS: dict[str, Callable[..., Tensor]] = {
    "eager": eager,
    "auto": named("auto"),
    "chunked": named("chunked"),
    "triton": named("triton"),
    "torch.compile": torch.compile(eager),
    "liger": liger,
    "cut_cross_entropy": cut_cross_entropy,
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("peer", PEERS)
def test_linear_cross_entropy(benchmark: Any, peer: str, device: str) -> None:
    if device == "cpu" and peer not in ("eager", "auto", "chunked"):
        pytest.skip("kernels and compiled code are timed on a GPU")
    rows, features, classes = HEADS[device]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    benchmark.group = f"linear_cross_entropy ({rows}, {features}) x {classes} {device}, forward and backward"
    torch.manual_seed(0)
    x, weight = (torch.randn(n, features, device=device, dtype=dtype) * features**-0.25 for n in (rows, classes))
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    target = torch.randint(classes, (rows,), device=device)
    target[::7] = -100

    def of(function: Callable[..., Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        return with_gradients(lambda: function(x, weight, target), leaves)

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        of(PEERS[peer])()
        benchmark.extra_info["peak MiB"] = torch.cuda.max_memory_allocated() >> 20
    run_checked(benchmark, peer, device, of(PEERS[peer]), of(eager))
