"""Attention over packed batches and attention that returns its weights, beside what computes the same.

python -m pytest benchmarks/test_attention_forms.py          # needs a GPU
"""

from __future__ import annotations

import pytest
import torch

from benchmarks import libraries
from benchmarks.hardware import DEVICE, NEEDS_GPU, sized
from benchmarks.timing import Claim, compare
from detr_fast import ops, use_backend

pytestmark = NEEDS_GPU

BF16 = torch.bfloat16
HEADS, DIM = sized(8, 2), 32
# Tokens of a batch's images: DETR's usual mixture; a wide and a tall one among small ones; one size.
LENGTHS: list[tuple[int, ...]] = sized([(1050, 850, 950, 700), (1400, 500, 450, 400), (1000,) * 4], [(20, 20), (30, 9)])


def packed(backend):
    def run(q, k, v, ends, longest):
        with use_backend(attention_varlen=backend):
            return ops.attention_varlen(q, k, v, ends, ends, longest, longest)

    return run


def nested(q, k, v, ends, longest):
    """PyTorch's own form of it: SDPA of jagged nested tensors."""
    q, k, v = (torch.nested.nested_tensor_from_jagged(t, ends).transpose(1, 2) for t in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).values()


PACKED = {
    "triton": packed("triton"),
    "triton_atomics": packed("triton_atomics"),
    "padded": packed("eager"),
    "nested": nested,
    "varlen_attn": libraries.varlen_packed,
    "flash_attn": libraries.flash_packed,
}


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_packed_attention(lengths):
    q, k, v, dout = (torch.randn(sum(lengths), HEADS, DIM, device=DEVICE, dtype=BF16) for _ in range(4))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    ends = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).to(torch.int32)

    def step(run, leaves=leaves):
        def taken():
            out = run(*leaves, ends, max(lengths))
            return out, *torch.autograd.grad(out, leaves, dout.to(out.dtype))

        return taken

    others = ("nested", "varlen_attn", "flash_attn")
    compare(
        f"packed attention {lengths} hd {DIM} bf16, forward and backward",
        {name: step(run) for name, run in PACKED.items()},
        eager=step(PACKED["padded"]),
        truth=step(PACKED["padded"], exact),
        claims=[Claim("packed attention: over the best peer", ("padded", *others), 1.0, "triton")],
    )


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("shape", sized([(2, 1000, 1000), (2, 100, 1000)], [(1, 20, 30)]), ids=str)
def test_attention_and_its_weights(shape, average):
    """need_weights=True, without a gradient through the weights; eager is what torch.nn.MultiheadAttention computes."""
    batch, queries, keys = shape
    lengths = (queries, keys, keys, queries)
    q, k, v, dout = (torch.randn(batch, n, HEADS, DIM, device=DEVICE, dtype=BF16) for n in lengths)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    exact = [t.detach().double().requires_grad_() for t in leaves]

    def step(backend, leaves=leaves):
        def taken():
            with use_backend(attention=backend):
                out, weights = ops.attention_with_weights(*leaves, average=average)
            return out, weights.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))

        return taken

    compare(
        f"attention {shape} hd {DIM} with weights {'averaged' if average else 'per head'}, bf16, forward and backward",
        {name: step(name) for name in ("auto", "triton", "eager")},
        eager=step("eager"),
        truth=step("eager", exact),
        claims=[Claim("attention with weights: over eager", ("eager",), 1.0)],
    )
