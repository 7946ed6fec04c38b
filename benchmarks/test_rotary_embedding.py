"""Rotary embedding of queries and keys, beside its peers.

python -m pytest benchmarks/test_rotary_embedding.py          # needs a GPU
"""

from __future__ import annotations

import pytest
import torch

from benchmarks import libraries
from benchmarks.hardware import DEVICE, NEEDS_GPU, sized
from benchmarks.timing import Claim, compare, compiled
from detr_fast import ops, use_backend

pytestmark = NEEDS_GPU

# Sequences, tokens, heads of queries and of keys, channels: a batch of a small Llama's and a long sequence of a large one's.
SHAPES = sized([(8, 512, 12, 12, 64), (1, 16_384, 32, 8, 128)], [(2, 5, 4, 2, 8)])


def original(q, k, cos, sin):
    """As transformers' Llama computes it, of (B, H, L, E)."""

    def turned(x):
        a, b = x.chunk(2, -1)
        return x * cos[:, None] + torch.cat((-b, a), -1) * sin[:, None]

    return turned(q), turned(k)


def ours(q, k, cos, sin):
    q, k = ops.rotary_embedding(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    return q.transpose(1, 2), k.transpose(1, 2)


def by_kernel(*tensors):
    with use_backend(rotary_embedding="triton"):
        return ours(*tensors)


@pytest.mark.parametrize("backward", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rotary_embedding(shape, backward):
    batch, tokens, heads, k_heads, columns = shape
    made = [torch.randn(batch, tokens, n, columns, device=DEVICE) for n in (heads, k_heads, heads, k_heads)]
    q, k, *arriving = (t.to(torch.bfloat16).transpose(1, 2) for t in made)
    places = torch.arange(tokens, device=DEVICE)[:, None]
    angles = places * 10000.0 ** (-torch.arange(columns // 2, device=DEVICE) / (columns // 2))
    cos, sin = (f(angles).repeat(1, 2)[None].to(torch.bfloat16) for f in (torch.cos, torch.sin))
    leaves = [t.requires_grad_(backward) for t in (q, k)]
    exact = [t.detach().double().requires_grad_(backward) for t in leaves]

    def step(function, leaves=leaves, angles=(cos, sin), arriving=arriving, take=lambda t: t):
        def run():
            results = function(*map(take, leaves), *angles)
            given = [take(g).to(results[0].dtype) for g in arriving]
            return (*results, *torch.autograd.grad(results, leaves, given)) if backward else results

        return run

    own = [t.detach().clone().requires_grad_(backward) for t in leaves], [g.clone() for g in arriving]

    peers = {
        "auto": step(ours),
        "triton": step(by_kernel),
        "eager": step(original),
        "torch.compile": step(compiled(original)),
        "liger": step(libraries.liger_rope, own[0], arriving=own[1]),  # turns its own in place, again and again
    }
    moves = (4 if backward else 2) * (q.numel() + k.numel()) * 2
    compare(
        f"rotary_embedding {shape} bf16, {'forward and backward' if backward else 'forward'}",
        peers,
        eager=step(original),
        truth=step(original, exact, (cos.double(), sin.double())),
        checks={"liger": step(libraries.liger_rope, take=torch.clone)},
        claims=[Claim("rotary embedding: over eager", ("eager",), 1.5, "triton")],
        moves=moves,
    )
