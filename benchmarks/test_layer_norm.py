"""LayerNorm, forward and backward, beside its peers. A wrong result is never timed.

python -m pytest benchmarks/test_layer_norm.py          # needs a GPU
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from benchmarks.hardware import DEVICE, NEEDS_GPU, sized
from detr_fast import ops, use_backend

pytestmark = NEEDS_GPU

# queries, a batch of images, …
SHAPES = sized([(200, 256), (4_000, 256), (32_000, 256), (500_000, 256), (32_000, 1024)], [(20, 256), (9, 1024)])


def eager(x, weight, bias):
    return F.layer_norm(x, x.shape[-1:], weight, bias)


def ours(x, weight, bias):
    with use_backend(layer_norm="triton"):
        return ops.layer_norm(x, x.shape[-1:], weight, bias)


def auto(x, weight, bias):
    return ops.layer_norm(x, x.shape[-1:], weight, bias)


PEERS = {"eager": eager, "triton": ours, "auto": auto, "torch.compile": torch.compile(eager)}


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layer_norm_forward_and_backward(benchmark, shape, peer):
    benchmark.group = f"layer_norm {shape} bf16, forward and backward"
    x, dy = (torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    weight, bias = (torch.randn(shape[-1], device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    x.requires_grad_()

    def step():
        y = PEERS[peer](x, weight, bias)
        gradients = torch.autograd.grad(y, (x, weight, bias), dy)
        torch.cuda.synchronize()
        return y, *gradients

    y = eager(x, weight, bias)
    for found, expected in zip(step(), (y, *torch.autograd.grad(y, (x, weight, bias), dy))):
        error = (found - expected).float().norm() / expected.float().norm()
        assert error < 2e-2, f"{peer} is wrong (relative error {error:.2e}): not timed"
    benchmark.pedantic(step, rounds=50, iterations=4, warmup_rounds=5)
