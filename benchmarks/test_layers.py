"""Whole layers, their feed-forward block and their other parts, forward and backward, beside their peers.

python -m pytest benchmarks/test_layers.py          # needs a GPU
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn as torch_nn

from benchmarks.hardware import DEVICE, NEEDS_GPU, sized
from benchmarks.timing import Claim, compare, compiled
from detr_fast import nn, ops, use_backend

pytestmark = NEEDS_GPU

WIDTH, HEADS, HIDDEN = sized((256, 8, 2048), (32, 2, 48))
ROWS = sized([6800, 800, 3400, 27200], [20])  # 8 images' tokens at stride 32; their queries; 4 images'; 8 at stride 16
BATCHES = sized(
    [
        (4, 1050, True, False),
        (4, 1050, True, True),
        (2, 850, True, False),
        (8, 850, False, False),
        (8, 100, False, False),
    ],
    [(2, 6, True, False)],
)  # images, tokens, padded, norm first
DROPOUT = 0.1
FUSED = dict.fromkeys(
    ("attention", "linear_add_layer_norm", "feed_forward", "encoder_layer", "decoder_layer"), "triton"
)
BACKENDS = {"eager": {}, "torch.compile": {}, "auto": {}, "triton": FUSED}
BY_NAME = {name: FUSED | {"feed_forward": name} for name in ("triton_recompute", "triton_one_kernel")}
PEERS: dict[str, dict[str, str]] = BACKENDS | BY_NAME


def eager_block(x, w1, b1, w2, b2, norm_weight, norm_bias, dropout_p=0.0, output_dropout_p=0.0):
    y = F.linear(F.dropout(F.linear(x, w1, b1).relu(), dropout_p), w2, b2)
    return F.layer_norm(x + F.dropout(y, output_dropout_p), (WIDTH,), norm_weight, norm_bias)


@pytest.mark.parametrize("batch", BATCHES, ids=str)
def test_encoder_layer(batch):
    images, tokens, padded, norm_first = batch
    form = f"({images}, {tokens}{', padded' * padded}{', pre-norm' * norm_first})"
    padding = {"src_key_padding_mask": padding_of(images, tokens)} if padded else {}
    claims = [
        Claim("encoder layer: over eager torch.nn, forward and backward", ("eager",), 2.0),
        Claim("encoder layer: over torch.compile, forward and backward", ("torch.compile",), 1.3),
    ]
    compare_layer("Encoder", form, [(images, tokens)], padding, PEERS, claims, norm_first=norm_first)


@pytest.mark.parametrize("batch", sized([(4, 100, 1050), (2, 100, 850)], [(1, 3, 4)]), ids=str)
def test_decoder_layer(batch):
    images, queries, tokens = batch
    padding = {"memory_key_padding_mask": padding_of(images, tokens)}
    claims = [
        Claim("decoder layer: over eager torch.nn, forward and backward", ("eager",), 1.0),
        Claim("decoder layer: over torch.compile, forward and backward", ("torch.compile",), 1.0),
    ]
    lengths = [(images, queries), (images, tokens)]
    compare_layer("Decoder", f"{batch}".replace(")", ", padded)"), lengths, padding, BACKENDS, claims)


def padding_of(images, tokens):
    ends = torch.linspace(tokens, tokens * 2 // 3, images, device=DEVICE)
    return torch.arange(tokens, device=DEVICE) >= ends[:, None]


def compare_layer(kind, form, lengths, padding, peers, claims, norm_first=False):
    """A layer on inputs of such (images, tokens), with gradients of all of them and of its parameters."""
    settings: dict[str, Any] = {
        "d_model": WIDTH,
        "nhead": HEADS,
        "dim_feedforward": HIDDEN,
        "batch_first": True,
        "device": DEVICE,
        "dtype": torch.bfloat16,
        "norm_first": norm_first,
    }
    name = f"Transformer{kind}Layer"
    original = getattr(torch_nn, name)(**settings, dropout=0.0)
    exact = copy.deepcopy(original).double()
    inputs = [torch.randn(*some, WIDTH, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for some in lengths]
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    dy = torch.randn_like(inputs[0])

    def made(peer, dropout):
        source = torch_nn if peer in ("eager", "torch.compile") else nn
        layer = getattr(source, name)(**settings, dropout=dropout)
        layer.load_state_dict(original.state_dict())
        return compiled(layer) if peer == "torch.compile" else layer

    def step(layer, inputs=inputs, **backends):
        def run():
            with use_backend(**backends):
                y = layer(*inputs, **padding)
                return y, *torch.autograd.grad(y, (*inputs, *layer.parameters()), dy.to(y.dtype))

        return run

    compare(
        f"{kind.lower()} layer {form} d {WIDTH} hidden {HIDDEN} dropout {DROPOUT} bf16",
        {peer: step(made(peer, DROPOUT), **backends) for peer, backends in peers.items()},
        eager=step(original),
        truth=step(exact, exact_inputs),
        checks={peer: step(made(peer, 0.0), **backends) for peer, backends in peers.items()},
        claims=claims,
    )


# With dropout in 16 bits, the backward reads a bit for each hidden element.
@pytest.mark.parametrize(("rows", "p"), [*[(rows, 0.0) for rows in sized(ROWS, [])], (ROWS[0], DROPOUT)])
def test_feed_forward_block(rows, p):
    shapes = [(rows, WIDTH), (HIDDEN, WIDTH), (HIDDEN,), (WIDTH, HIDDEN), *[(WIDTH,)] * 3]
    tensors = [torch.randn(s, device=DEVICE, dtype=torch.bfloat16) * s[-1] ** -0.5 for s in shapes]
    compare_function(
        f"feed-forward block{' with dropout' * (p > 0)} ({rows}, {WIDTH}) hidden {HIDDEN} bf16, forward and backward",
        dict.fromkeys(PEERS, ops.feed_forward_add_layer_norm),
        eager_block,
        [t.requires_grad_() for t in tensors],
        PEERS,
        [Claim("feed-forward: at least eager's speed, or not chosen", ("eager",), 1.0)],
        **({"dropout_p": p, "output_dropout_p": p} if p > 0 else {}),
    )


C = sized(256, 64)  # two thirds of 3 * 64 columns are whole tiles
PARTS: dict[str, tuple[Any, Any, list[tuple[int, ...]]]] = {  # ours, eager, shapes behind those of x (rows, C)
    "linear_add_layer_norm": (
        ops.linear_add_layer_norm,
        lambda x, w1, b1, residual, w, b: F.layer_norm(residual + F.linear(x, w1, b1), (C,), w, b),
        [(C, C), (C,), (-1, C), (C,), (C,)],
    ),
    "qkv_projection": (
        ops.qkv_projection,
        lambda x, w, b, position: torch.cat(
            [F.linear(x + position, w[: 2 * C], b[: 2 * C]), F.linear(x, w[2 * C :], b[2 * C :])], -1
        ),
        [(3 * C, C), (3 * C,), (-1, C)],
    ),
}


@pytest.mark.parametrize("rows", ROWS[:2])
@pytest.mark.parametrize("name", PARTS)
def test_part_of_a_layer(name, rows):
    ours, original, shapes = PARTS[name]
    tensors = [
        (torch.randn(rows if n < 0 else n, *rest, device=DEVICE) / (rest[-1] if n > 0 and rest else 1) ** 0.5)
        .to(torch.bfloat16)
        .requires_grad_()
        for n, *rest in ((rows, C), *shapes)
    ]
    peers = {"eager": {}, "torch.compile": {}, "auto": {}, "triton": {name: "triton"}}
    compare_function(
        f"{name} ({rows}, {C}) bf16, forward and backward",
        dict.fromkeys(peers, ours),
        original,
        tensors,
        peers,
        [Claim(f"{name}: at least eager's speed, or not chosen", ("eager",), 1.0)],
    )


def compare_function(case, functions, original, tensors, backends, claims, **dropout):
    """`functions` under their backends beside the original and what torch.compile makes of it: the result and all gradients.

    dropout: arguments of what is timed, not of what is checked.
    """
    dy = torch.randn_like(original(*tensors))
    exact = [t.detach().double().requires_grad_() for t in tensors]

    def step(function, backends=None, tensors=tensors, **options):
        def run():
            with use_backend(**(backends or {})):
                y = function(*tensors, **options)
                return y, *torch.autograd.grad(y, tensors, dy.to(y.dtype))

        return run

    functions = functions | {"eager": original, "torch.compile": compiled(original)}
    peers = {peer: step(function, backends[peer], **dropout) for peer, function in functions.items()}
    checks = {peer: step(function, backends[peer]) for peer, function in functions.items()} if dropout else None
    compare(case, peers, eager=step(original), truth=step(original, tensors=exact), checks=checks, claims=claims)
