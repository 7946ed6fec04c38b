"""Gradients for several upstream gradients at once, `torch.autograd.grad(…, is_grads_batched=True)`, as Jacobians take them."""

from __future__ import annotations

import pytest
import torch

from detr_fast import ops, use_backend
from detr_fast.nn.multihead_attention import MultiheadAttention
from detr_fast.ops import linear_probabilities
from detr_fast.ops.qkv_projection import project

TARGET = torch.tensor([0, 3, -100])


def leaves(*shapes):
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def tapped_projection(x, weight, bias, position):
    y, again = project(x, weight, bias, position, 128)
    return torch.cat([y, again * 2], -1)


CASES = {
    "layer_norm": (lambda x, w, b: ops.layer_norm(x, (8,), w, b), [(3, 8), (8,), (8,)]),
    "rms_norm": (lambda x, w: ops.rms_norm(x, (8,), w), [(3, 8), (8,)]),
    "gated_activation": (ops.gated_activation, [(3, 8), (3, 8)]),
    "gated_activation, halves": (ops.gated_activation, [(3, 8)]),
    "prediction_heads": (
        lambda x, *p: torch.cat(ops.prediction_heads(x, p[:2], p[2:4], *p[4:], sigmoid=True), -1),
        [(3, 8), (6, 8), (4, 6), (6,), (4,), (5, 8), (5,)],
    ),
    "attention, dropped out": (lambda q, k, v: ops.attention(q, k, v, dropout_p=0.2), [(1, 3, 2, 8)] * 3),
    "linear_cross_entropy": (lambda *x: ops.linear_cross_entropy(*x, TARGET), [(3, 8), (5, 8), (5,)]),
    "qkv_projection": (lambda *x: ops.qkv_projection(*x), [(1, 3, 8), (192, 8), (192,), (1, 3, 8)]),
    "a position in all columns, the same for each image": (
        lambda *x: ops.qkv_projection(*x, 192),
        [(2, 3, 8), (192, 8), (192,), (1, 3, 8)],
    ),
    "a projection whose input goes on": (tapped_projection, [(1, 3, 8), (192, 8), (192,), (1, 3, 8)]),
}


def assert_a_batch_is_its_parts(function, inputs):
    y = function(*inputs)
    upstream = torch.randn(2, *y.shape)
    single = [torch.autograd.grad(y, inputs, one, retain_graph=True) for one in upstream]
    for ours, theirs in zip(torch.autograd.grad(y, inputs, upstream, is_grads_batched=True), zip(*single)):
        assert torch.allclose(ours, torch.stack(theirs), atol=1e-6)


@pytest.mark.interpreter
@pytest.mark.parametrize("name", CASES)
def test_kernels_take_a_batch_of_gradients_at_once(name):
    function, shapes = CASES[name]
    with use_backend("triton"):
        assert_a_batch_is_its_parts(function, leaves(*shapes))


@pytest.mark.interpreter
def test_attention_on_one_projections_output_takes_them_too():
    attention = MultiheadAttention(8, 2, batch_first=True)

    def function(x):
        with use_backend("triton"):
            return attention(x, x, x, need_weights=False)[0]

    assert_a_batch_is_its_parts(function, leaves((1, 3, 8)))


def test_chunked_cross_entropy_takes_them_too(monkeypatch):
    monkeypatch.setattr(linear_probabilities, "BLOCK_ELEMENTS", 10)
    for reduction in ("mean", "none"):

        def function(*inputs, reduction=reduction):
            with use_backend(linear_cross_entropy="chunked"):
                return ops.linear_cross_entropy(*inputs, TARGET, reduction=reduction, label_smoothing=0.1)

        assert_a_batch_is_its_parts(function, leaves((3, 8), (5, 8), (5,)))
