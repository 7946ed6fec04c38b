"""Attention at DETR's shapes, forward and backward, beside its peers. A wrong result is never timed.

python -m pytest benchmarks/test_attention.py          # needs a GPU
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.hardware import DEVICE, NEEDS_GPU, sized
from detr_fast import ops, use_backend
from detr_fast.ops.attention import EagerAttention

pytestmark = NEEDS_GPU

# batch, queries, keys, heads, head dimension: encoder, decoder's self and cross attention, larger heads
SHAPES = sized(
    [
        (2, 1000, 1000, 8, 32),
        (8, 1000, 1000, 8, 32),
        (2, 100, 100, 8, 32),
        (2, 100, 1000, 8, 32),
        (4, 1000, 1000, 4, 128),
    ],
    [(2, 40, 40, 2, 32), (1, 20, 30, 1, 128)],
)
CASES = {"plain": (False, 0.0), "padding": (True, 0.0), "padding and dropout": (True, 0.1)}


def named(backend):
    def run(q, k, v, padding, dropout_p):
        with use_backend(attention=backend):
            return ops.attention(q, k, v, key_padding_mask=padding, dropout_p=dropout_p)

    return run


def sdpa(kind):
    def run(q, k, v, padding, dropout_p):
        with sdpa_kernel(kind):
            return named("sdpa")(q, k, v, padding, dropout_p)

    return run


def flex(q, k, v, padding, dropout_p):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if dropout_p:
        raise RuntimeError("flex attention has no dropout")
    mask = None
    if padding is not None:
        mask = create_block_mask(lambda b, h, i, j: ~padding[b, j], q.shape[0], None, q.shape[1], k.shape[1], DEVICE)
    return _compiled(flex_attention)(*(t.transpose(1, 2) for t in (q, k, v)), block_mask=mask).transpose(1, 2)


_compiled = functools.cache(torch.compile)
PEERS = {
    "triton": named("triton"),
    "auto": named("auto"),
    "flash": sdpa(SDPBackend.FLASH_ATTENTION),
    "efficient": sdpa(SDPBackend.EFFICIENT_ATTENTION),
    "cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
    "flex": flex,
}


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_forward_and_backward(benchmark, shape, case, peer):
    batch, queries, keys, heads, dim = shape
    padded, dropout_p = CASES[case]
    benchmark.group = f"attention {shape} {case} bf16, forward and backward"
    lengths = (queries, keys, keys, queries)
    q, k, v, dout = (torch.randn(batch, n, heads, dim, device=DEVICE, dtype=torch.bfloat16) for n in lengths)
    for tensor in (q, k, v):
        tensor.requires_grad_()
    padding = None
    if padded:
        padding = (
            torch.arange(keys, device=DEVICE) >= torch.linspace(keys, keys * 2 // 3, batch, device=DEVICE)[:, None]
        )

    def step(dropout_p=dropout_p):
        out = PEERS[peer](q, k, v, padding, dropout_p)
        gradients = torch.autograd.grad(out, (q, k, v), dout)
        torch.cuda.synchronize()
        return out, *gradients

    expected = EagerAttention().run(q, k, v, padding, None, False, 0.0, None)
    assert isinstance(expected, torch.Tensor)
    try:
        found = step(0.0)
        step()
    except RuntimeError as refusal:
        pytest.skip(f"{peer} does not take this call: {str(refusal).splitlines()[0][:80]}")
    for ours, right in zip(found, (expected, *torch.autograd.grad(expected, (q, k, v), dout))):
        error = (ours - right).float().norm() / right.float().norm()
        assert error < 2e-2, f"{peer} is wrong (relative error {error:.2e}): not timed"
    benchmark.pedantic(step, rounds=20, iterations=4, warmup_rounds=3)
