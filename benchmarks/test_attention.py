"""Attention at DETR's shapes, beside PyTorch's backends, flex attention and other libraries' kernels.

python -m pytest benchmarks/test_attention.py          # needs a GPU
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import libraries
from benchmarks.hardware import DEVICE, NEEDS_GPU, sized
from benchmarks.timing import Claim, compare, compiled
from detr_fast import ops, use_backend
from detr_fast.ops.attention import EagerAttention

pytestmark = NEEDS_GPU

# batch, queries, keys, heads, head dimension: the encoder at stride 32, and of one large image at 16; the decoder's cross and
# self attention; more images; larger heads
SHAPES = sized(
    [
        (4, 1000, 1000, 8, 32),
        (2, 100, 1000, 8, 32),
        (2, 100, 100, 8, 32),
        (16, 850, 850, 8, 32),
        (1, 4200, 4200, 8, 32),
        (4, 1000, 1000, 4, 64),
        (4, 1000, 1000, 4, 128),
        (1, 850, 850, 8, 32),
        (8, 100, 1000, 8, 32),
    ],
    [(2, 40, 40, 1, 32), (1, 20, 30, 2, 128)],
)
CASES = {  # with padding, dropout, backward, and of how many shapes
    "padding and dropout, forward and backward": (True, 0.1, True, 9),
    "padding, forward and backward": (True, 0.0, True, 9),
    "plain, forward and backward": (False, 0.0, True, 7),
    "padding, forward": (True, 0.0, False, 5),
}
FLEX = SHAPES[:3]  # compiled for each shape, some 10 s each
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
PEERS = (*BACKENDS, "flex", *libraries.ATTENTIONS)


def ours(backend, padding, q, k, v, dropout_p):
    with nullcontext() if backend == "auto" else use_backend(attention=backend):
        return ops.attention(q, k, v, key_padding_mask=padding, dropout_p=dropout_p)


def sdpa(backend, bias, q, k, v, dropout_p):
    """The mask comes as the backends want it, made once."""
    if bias is not None and backend == SDPBackend.FLASH_ATTENTION:
        raise NotImplementedError("PyTorch's flash backend takes no mask")
    with sdpa_kernel(backend):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, bias, dropout_p).transpose(1, 2)


def flex(function, mask, q, k, v, dropout_p):
    if dropout_p:
        raise NotImplementedError("flex attention has no dropout")
    return function(*(t.transpose(1, 2) for t in (q, k, v)), block_mask=mask).transpose(1, 2)


def flex_peer(padding, shape):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    batch, queries, keys, *_ = shape
    mask = None
    if padding is not None:
        mask = create_block_mask(lambda b, h, i, j: ~padding[b, j], batch, None, queries, keys, DEVICE)
    return partial(flex, compiled(flex_attention), mask)


@pytest.mark.parametrize(
    ("case", "shape"), [(name, s) for name, case in CASES.items() for s in SHAPES[: case[-1]]], ids=str
)
def test_attention(case, shape):
    batch, queries, keys, heads, dim = shape
    with_padding, dropout_p, backward, _ = CASES[case]
    lengths = (queries, keys, keys, queries)
    q, k, v, dout = (torch.randn(batch, n, heads, dim, device=DEVICE, dtype=torch.bfloat16) for n in lengths)
    leaves = [t.requires_grad_(backward) for t in (q, k, v)]
    exact = [t.detach().double().requires_grad_(backward) for t in leaves]
    padding = padded = None
    if with_padding:
        ends = torch.linspace(keys * 2 // 3, keys, batch, device=DEVICE)  # one image: two thirds
        padding = torch.arange(keys, device=DEVICE) >= ends[:, None]
        padded = libraries.Padded(~padding, queries, torch.bfloat16)

    def step(function, dropout_p, leaves=leaves):
        def run():
            out = function(*leaves, dropout_p)
            return (out, *torch.autograd.grad(out, leaves, dout.to(out.dtype))) if backward else (out,)

        return run

    atomics = ["triton_atomics"] if backward and dim <= 64 else []  # which takes no larger heads
    names = ("auto", "triton", *atomics)
    functions: dict[str, Callable[..., Any]] = {name: partial(ours, name, padding) for name in names}
    bias = None if padded is None else padded.bias
    functions |= {name: partial(sdpa, backend, bias) for name, backend in BACKENDS.items()}
    if shape in FLEX and not dropout_p:
        functions["flex"] = flex_peer(padding, shape)
    for name, attention in libraries.ATTENTIONS.items():
        if name == "varlen_attn" and (dropout_p or not with_padding):  # it has none, and plainly it is SDPA's flash
            continue
        functions[name] = lambda q, k, v, p, attention=attention: attention(q, k, v, padded, p)

    def eager(q, k, v, _):
        return EagerAttention().run(q, k, v, padding, None, False, 0.0, None)

    hard = with_padding and dropout_p > 0 and dim == 32
    text = "attention: over the best peer, mask, dropout, hd 32" if hard else "attention: over the best peer, elsewhere"
    compare(
        f"attention {shape} bf16, {case}",
        {name: step(function, dropout_p) for name, function in functions.items()},
        eager=step(eager, 0.0),
        truth=step(eager, 0.0, exact),
        checks={name: step(function, 0.0) for name, function in functions.items()},
        claims=[Claim(text, PEERS, 1.3 if hard else 1.0)],
    )
