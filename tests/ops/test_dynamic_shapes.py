"""Under torch.compile with dynamic shapes one graph serves all sizes, on kernels too: on meta tensors, where nothing runs."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from detr_fast import nn, ops, use_backend
from detr_fast.models.transformer import Transformer

SIZES = [(4, 5), (6, 19)]  # all different, or torch.compile would take two of them for one
WIDTH, HIDDEN = 16, 32
real = partial(torch.randn, device="meta", requires_grad=True)
VECTOR = (WIDTH,)


def rows(batch, length):
    return real(batch, length, WIDTH)


def heads(batch, length):
    return real(batch, length, 2, 8)


def angles(batch, length):
    return torch.empty(batch, length, 8, device="meta")


def padding(batch, length):
    return torch.zeros(batch, length, dtype=torch.bool, device="meta")


def lengths(batch, length):
    return torch.zeros(batch + 1, dtype=torch.int32, device="meta")


def packed(batch, length):
    return real(batch * length, 2, 8)


def classes(batch, length):
    return torch.zeros(batch, length, dtype=torch.int64, device="meta")


BLOCK = [(HIDDEN, WIDTH), (HIDDEN,), (WIDTH, HIDDEN), VECTOR]
# What each op is called on: functions of the sizes, and shapes that stay the same.
CASES = {
    "layer_norm": (lambda x, *p: ops.layer_norm(x, VECTOR, *p), [rows, VECTOR, VECTOR]),
    "add_layer_norm": (lambda *a: ops.add_layer_norm(*a, dropout_p=0.1), [rows, rows, VECTOR, VECTOR]),
    "rms_norm": (lambda x, w: ops.rms_norm(x, VECTOR, w), [rows, VECTOR]),
    "add_rms_norm": (partial(ops.add_rms_norm, dropout_p=0.1), [rows, rows, VECTOR]),
    "gated_activation": (ops.gated_activation, [rows, rows]),
    "gated_activation, halves": (ops.gated_activation, [rows]),
    "linear_add_layer_norm": (ops.linear_add_layer_norm, [rows, (WIDTH, WIDTH), VECTOR, rows, VECTOR, VECTOR]),
    "feed_forward": (partial(ops.feed_forward, dropout_p=0.1), [rows, *BLOCK]),
    "feed_forward_add_layer_norm": (ops.feed_forward_add_layer_norm, [rows, *BLOCK, VECTOR, VECTOR]),
    "prediction_heads": (
        lambda x, *p: torch.cat(ops.prediction_heads(x, p[:3], p[3:6], *p[6:]), -1),
        [rows, *[(WIDTH, WIDTH)] * 2, (7, WIDTH), *[VECTOR] * 2, (7,), (9, WIDTH), (9,)],
    ),
    "attention": (lambda q, k, v, p: ops.attention(q, k, v, key_padding_mask=p), [heads, heads, heads, padding]),
    "rotary_embedding": (lambda *t: ops.rotary_embedding(*t)[0], [heads, heads, angles, angles]),
    "attention_varlen": (
        lambda q, k, v, c: ops.attention_varlen(q, k, v, c, c, 19, 19),
        [packed, packed, packed, lengths],
    ),
    "linear_cross_entropy": (lambda x, w, t: ops.linear_cross_entropy(x, w, None, t), [rows, (40, WIDTH), classes]),
}


def graphs_for(function, arguments, backend):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(function, backend=backend, fullgraph=True, dynamic=True)
    with use_backend("triton"):
        for size in SIZES:
            inputs = [make(*size) if callable(make) else real(*make) for make in arguments]
            y, expected = compiled(*inputs), function(*inputs)
            assert y.shape == expected.shape
            y.sum().backward()
            assert all(t.grad is None or t.grad.shape == t.shape for t in inputs)
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("op", CASES)
def test_one_graph_with_its_backward_serves_an_op_at_all_sizes(op):
    assert graphs_for(*CASES[op], backend="aot_eager") == 1


LAYER = {"d_model": WIDTH, "nhead": 2, "dim_feedforward": HIDDEN, "batch_first": True}


def test_one_graph_serves_a_transformer_at_all_sizes():
    model = nn.Transformer(num_encoder_layers=1, num_decoder_layers=1, **LAYER).to("meta")

    def call(source, target, hidden):
        return model(source, target, src_key_padding_mask=hidden, memory_key_padding_mask=hidden)

    targets = lambda batch, length: rows(batch, length + 2)  # noqa: E731
    assert graphs_for(call, [rows, targets, padding], backend="eager") == 1


def test_one_graph_serves_detrs_transformer_whatever_runs_without_the_compiler_in_between():
    features = lambda batch, length: real(batch, length, 64)  # noqa: E731
    model = Transformer(64, 2, 1, 1, HIDDEN).to("meta")
    assert graphs_for(model, [features, features, (7, 64), padding], backend="eager") == 1
