"""Attention over packed batches and attention that returns its weights, beside what computes the same. A wrong result is never timed.

python -m pytest benchmarks/test_attention_forms.py          # needs a GPU
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.hardware import DEVICE, NEEDS_GPU, check, sized
from detr_fast import ops, use_backend

pytestmark = NEEDS_GPU

BF16 = torch.bfloat16
HEADS, DIM = sized(8, 2), 32
# Tokens of a batch's images: one size; DETR's usual mixture; a wide and a tall one among small ones.
LENGTHS: list[tuple[int, ...]] = sized([(1000,) * 4, (1050, 850, 950, 700), (1400, 500, 450, 400)], [(20, 20), (30, 9)])


def packed(backend):
    def run(q, k, v, ends, longest):
        with use_backend(attention_varlen=backend):
            return ops.attention_varlen(q, k, v, ends, ends, longest, longest)

    return run


def nested(q, k, v, ends, longest):
    """PyTorch's own form of it: SDPA of jagged nested tensors."""
    q, k, v = (torch.nested.nested_tensor_from_jagged(t, ends).transpose(1, 2) for t in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).values()


PACKED = {"triton": packed("triton"), "padded": packed("eager"), "nested": nested}


@pytest.mark.parametrize("peer", PACKED)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_packed_attention_forward_and_backward(benchmark, lengths, peer):
    benchmark.group = f"packed attention {lengths} hd {DIM} bf16, forward and backward"
    q, k, v, dout = (torch.randn(sum(lengths), HEADS, DIM, device=DEVICE, dtype=BF16) for _ in range(4))
    for tensor in (q, k, v):
        tensor.requires_grad_()
    ends = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).to(torch.int32)

    def step(run=PACKED[peer], inputs=(q, k, v), dout=dout):
        out = run(*inputs, ends, max(lengths))
        return out, *torch.autograd.grad(out, inputs, dout)

    def timed():
        step()
        torch.cuda.synchronize()

    try:
        found = step()
    except (RuntimeError, NotImplementedError) as refusal:
        pytest.skip(f"{peer} does not take this call: {str(refusal).splitlines()[0][:80]}")
    exact = tuple(t.detach().double().requires_grad_() for t in (q, k, v))
    truth = step(packed("eager"), exact, dout.double())
    check(peer, found, step(packed("eager")), truth)
    benchmark.pedantic(timed, rounds=20, iterations=4, warmup_rounds=3)


@pytest.mark.parametrize("peer", ["triton", "eager"])
@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("shape", sized([(2, 1000, 1000), (2, 100, 1000)], [(1, 20, 30)]), ids=str)
def test_attention_and_its_weights(benchmark, shape, average, peer):
    """need_weights=True, without a gradient through the weights; eager is what torch.nn.MultiheadAttention computes."""
    batch, queries, keys = shape
    kind = "averaged" if average else "per head"
    benchmark.group = f"attention {shape} hd {DIM} with weights {kind}, bf16, forward and backward"
    lengths = (queries, keys, keys, queries)
    q, k, v, dout = (torch.randn(batch, n, HEADS, DIM, device=DEVICE, dtype=BF16) for n in lengths)
    for tensor in (q, k, v):
        tensor.requires_grad_()

    def step(backend=peer, inputs=(q, k, v), dout=dout):
        with use_backend(attention=backend):
            out, weights = ops.attention_with_weights(*inputs, average=average)
        return out, weights.detach(), *torch.autograd.grad(out, inputs, dout)

    def timed():
        step()
        torch.cuda.synchronize()

    exact = tuple(t.detach().double().requires_grad_() for t in (q, k, v))
    check(peer, step(), step("eager"), step("eager", exact, dout.double()))
    benchmark.pedantic(timed, rounds=20, iterations=4, warmup_rounds=3)
