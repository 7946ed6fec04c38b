"""activation(gate) * up of gated feed-forward blocks, of two tensors and of the halves of one, beside its peers.

python -m pytest benchmarks/test_gated_activation.py          # needs a GPU
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from benchmarks import libraries
from benchmarks.hardware import DEVICE, NEEDS_GPU, sized
from benchmarks.timing import Claim, compare, compiled
from detr_fast import ops, use_backend

pytestmark = NEEDS_GPU

# Llama 2's 7 billion parameters at 4,096 tokens, DINOv2's giant at 4 images of 1,369 tokens, a width of no whole runs.
SHAPES = sized([(4096, 11_008), (5476, 4096), (4096, 2730)], [(5, 24), (3, 22)])
LARGE = sized(16_000_000, 0)
ACTIVATIONS = {"silu": F.silu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


def split(both):
    return both.chunk(2, dim=-1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("activation", "joined", "backward"),
    [("silu", False, True), ("silu", False, False), ("silu", True, True), ("gelu_tanh", False, True)],
)
def test_gate(activation, joined, backward, shape):
    rows, columns = shape
    shapes = [(rows, 2 * columns)] if joined else [shape, shape]
    given = [torch.randn(one, device=DEVICE).to(torch.bfloat16) for one in shapes]
    dy = torch.randn(shape, device=DEVICE).to(torch.bfloat16)

    def original(gate, up=None):
        gate, up = split(gate) if up is None else (gate, up)
        return ACTIVATIONS[activation](gate) * up

    def ours(gate, up=None):
        return ops.gated_activation(gate, up, activation)

    def kernel(gate, up=None):
        with use_backend(gated_activation="triton"):
            return ours(gate, up)

    def copies(tensors=given):
        return [t.clone().requires_grad_(backward) for t in tensors]

    def step(function, leaves=None):
        leaves = copies() if leaves is None else leaves

        def run():
            y = function(*leaves)
            return (y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))) if backward else (y,)

        return run

    # gate and up in, y out; then both and y's gradient in, and their gradients out.
    moves = (3 + 5 * backward) * dy.numel() * dy.element_size()
    source, target = (torch.empty(moves // 2, dtype=torch.int8, device=DEVICE) for _ in range(2))
    peers = {
        "auto": step(ours),
        "triton": step(kernel),
        "eager": step(original),
        "torch.compile": step(compiled(original)),
        "copy": lambda: [target.copy_(source)],  # as many bytes, and nothing else
    }
    others = libraries.GATES.get((activation, joined), {})
    peers |= {name: step(function) for name, function in others.items()}
    # Liger's gradients are written over what it was given.
    checks = {name: lambda function=function: step(function)() for name, function in others.items()}
    claims = [Claim("gate: no slower than eager", ("eager",), 1.0)]
    if columns % 8 == 0 and dy.numel() * dy.element_size() >= LARGE:
        claims.append(Claim("gate: copy bandwidth from 16 MB up", ("copy",), 0.85, "triton", ("gpu",)))
    if others:
        claims.append(Claim("gate: over other libraries", tuple(others), 1.0, "triton", ("gpu",)))
    compare(
        f"gated_activation {activation}{' of halves' if joined else ''} {shape} bf16, "
        f"{'forward and backward' if backward else 'forward'}",
        peers,
        eager=step(original),
        truth=step(original, [t.double().requires_grad_(backward) for t in given]),
        checks={"copy": step(original)} | checks,
        claims=claims,
        moves=moves,
    )
