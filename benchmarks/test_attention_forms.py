"""Attention over packed batches, with weights, on fewer heads of keys, in odd sizes and with a mask that is trained, beside what computes
the same.

python -m pytest benchmarks/test_attention_forms.py          # needs a GPU
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

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


@dataclass(frozen=True)
class Form:
    """What an attention of 4 images' 1,000 tokens has that most have not. keys: heads of k and v. trained: a float mask with a gradient."""

    heads: int = sized(8, 2)
    keys: int = sized(8, 2)
    dim: int = 32
    dropout_p: float = 0.0
    trained: bool = False


FORMS = {
    "grouped-query attention": Form(keys=sized(2, 1), dim=64),
    "attention, heads of 33": Form(dim=33),  # rows that start at any even byte
    "attention, heads of 36, dropout": Form(dim=36, dropout_p=0.1),  # d 288 over 8 heads: rows of whole 8 bytes
    "attention, a mask that is trained": Form(trained=True),  # a bias by relative position: one for all images
}
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


def sdpa(backend: SDPBackend, form: Form, dropout_p: float, q: Any, k: Any, v: Any, mask: Any = None) -> Any:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, mask, dropout_p, enable_gqa=form.keys < form.heads).transpose(
            1, 2
        )


def ours(backend: str, form: Form, dropout_p: float, q: Any, k: Any, v: Any, mask: Any = None) -> Any:
    with use_backend(**({} if backend == "auto" else {"attention": backend})):
        return ops.attention(q, k, v, attn_mask=mask, dropout_p=dropout_p, enable_gqa=form.keys < form.heads)


@pytest.mark.parametrize("name", FORMS)
def test_attention_form(name: str) -> None:
    form = FORMS[name]
    batch, length = sized((4, 1000), (1, 6))
    q, k, v, dout = (
        torch.randn(batch, length, heads, form.dim, device=DEVICE, dtype=BF16)
        for heads in (form.heads, form.keys, form.keys, form.heads)
    )
    mask = [torch.randn(1, form.heads, length, length, device=DEVICE, dtype=BF16)] if form.trained else []
    leaves = [t.requires_grad_() for t in (q, k, v, *mask)]
    exact = [t.detach().double().requires_grad_() for t in leaves]

    def step(function: Callable[..., Any], dropout_p: float = form.dropout_p, leaves: Any = leaves) -> Any:
        def run() -> Any:
            out = function(form, dropout_p, *leaves)
            return out, *torch.autograd.grad(out, leaves, dout.to(out.dtype))

        return run

    functions = {backend: partial(ours, backend) for backend in ("auto", "triton")}
    functions |= {backend: partial(sdpa, kind) for backend, kind in BACKENDS.items()}
    eager = partial(ours, "eager")
    compare(
        f"{name} ({batch}, {length}, {form.heads}, {form.dim}) bf16, forward and backward",
        {backend: step(function) for backend, function in functions.items()},
        eager=step(eager, 0.0),
        truth=step(eager, 0.0, exact),
        checks={backend: step(function, 0.0) for backend, function in functions.items()},
        claims=[Claim("attention: over the best peer, other forms", tuple(BACKENDS), 1.0)],
    )
