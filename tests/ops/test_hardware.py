"""What only hardware can show of ops that other files test: random bits, masks' gradients, shared keys and offsets over 2³¹."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from benchmarks.hardware import DEVICE, REHEARSAL, sized
from detr_fast import ops, use_backend
from detr_fast.ops.attention import EagerAttention
from detr_fast.ops.dropout import next_seed
from detr_fast.ops.products import dropped
from detr_fast.testing import assert_as_accurate_as_eager

pytestmark = pytest.mark.gpu


def qkv(batch, queries, keys, heads, dim):
    return [torch.randn(batch, n, heads, dim, device=DEVICE) for n in (queries, keys, keys)]


def seeded(function):
    """The same random bits on each call."""

    def run(*inputs):
        torch.manual_seed(7)
        return function(*inputs)

    return run


@pytest.mark.parametrize("dtype", sized([torch.bfloat16, torch.float32], [torch.bfloat16]))
def test_attention_drops_what_its_eager_twin_drops(dtype):
    length = sized(300, 20)
    with use_backend(attention="triton"):
        assert_as_accurate_as_eager(
            seeded(lambda q, k, v: ops.attention(q, k, v, dropout_p=0.3)),
            reference=seeded(lambda q, k, v: EagerAttention().run(q, k, v, None, None, False, 0.3, None)),
            inputs=qkv(2, length, length, sized(8, 1), 32),
            dtype=dtype,
        )


def twin(tensor, p, *, hidden=False):
    """`tensor` as the next op that drops would drop it."""
    return dropped(tensor, *next_seed(tensor.device), p, hidden=hidden)


@pytest.mark.parametrize("columns", [256, 250])  # 250: rows that are read one element at a time
def test_norms_drop_what_their_twin_drops(columns):
    shape = sized(300, 20), columns
    with use_backend(add_layer_norm="triton"):
        assert_as_accurate_as_eager(
            seeded(lambda x, residual, weight: ops.add_layer_norm(x, residual, weight, dropout_p=0.3)),
            reference=seeded(lambda x, residual, weight: F.layer_norm(residual + twin(x, 0.3), (columns,), weight)),
            inputs=[torch.randn(size, device=DEVICE) for size in (shape, shape, (columns,))],
            dtype=torch.bfloat16,
        )


def test_a_feed_forward_drops_what_its_twin_drops_and_its_backward_reads_which_elements_were_kept():
    rows, width, hidden = sized((300, 256, 2048), (20, 64, 128))

    def ours(x, w1, b1, w2):
        return ops.feed_forward(x, w1, b1, w2, None, "relu", 0.3)

    def eager(x, w1, b1, w2):
        return F.linear(twin(F.linear(x, w1, b1).relu(), 0.3, hidden=True), w2)

    with use_backend(feed_forward="triton"):
        assert_as_accurate_as_eager(
            seeded(ours),
            reference=seeded(eager),
            inputs=[
                torch.randn(size, device=DEVICE) * size[-1] ** -0.5
                for size in ((rows, width), (hidden, width), (hidden,), (width, hidden))
            ],
            dtype=torch.bfloat16,
        )


def test_a_float_masks_gradient_is_as_accurate_as_eagers():
    queries, keys = sized((100, 333), (10, 20))
    with use_backend(attention="triton"):
        assert_as_accurate_as_eager(
            lambda q, k, v, mask: ops.attention(q, k, v, attn_mask=mask),
            reference=lambda q, k, v, mask: EagerAttention().run(q, k, v, None, mask, False, 0.0, None),
            inputs=[*qkv(2, queries, keys, sized(4, 1), 32), torch.randn(1, 1, queries, keys, device=DEVICE)],
            dtype=torch.bfloat16,
        )


def test_few_queries_whose_programs_share_the_keys_are_as_accurate_as_eager():
    queries, keys = sized((100, 1000), (5, 150))
    padding = torch.arange(keys, device=DEVICE) >= torch.tensor([[keys], [keys // 3]], device=DEVICE)
    with use_backend(attention="triton"):
        assert_as_accurate_as_eager(
            lambda q, k, v: ops.attention(q, k, v, key_padding_mask=padding),
            reference=lambda q, k, v: EagerAttention().run(q, k, v, padding, None, False, 0.0, None),
            inputs=qkv(2, queries, keys, sized(8, 1), 32),
            dtype=torch.bfloat16,
        )


@pytest.mark.parametrize("op", ["attention", "layer_norm"])
def test_deterministic_gradients_are_the_same_bits_each_time(op):
    if op == "attention":
        leaves = [t.bfloat16().requires_grad_() for t in qkv(2, sized(850, 20), sized(850, 20), sized(8, 1), 32)]
        function = ops.attention
    else:
        x, weight = torch.randn(sized(6800, 40), 256, device=DEVICE), torch.randn(256, device=DEVICE)
        leaves = [t.bfloat16().requires_grad_() for t in (x, weight)]

        def function(x, weight):
            return ops.layer_norm(x, (256,), weight)

    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with use_backend(**{op: "triton"}):
            y = function(*leaves)
            dy = torch.randn_like(y)
            first = torch.autograd.grad(y, leaves, dy)
            for _ in range(sized(10, 1)):
                again = torch.autograd.grad(function(*leaves), leaves, dy)
                assert all(torch.equal(a, b) for a, b in zip(first, again))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.skipif(REHEARSAL, reason="takes 9 GB")
def test_rows_beyond_two_to_the_31_elements_are_normalised():
    rows = 2**31 // 256 + 1000
    x = torch.empty(rows, 256, device=DEVICE, dtype=torch.bfloat16).normal_()
    with use_backend(layer_norm="triton"):
        y = ops.layer_norm(x, (256,))
    for part in (slice(0, 500), slice(rows - 1500, rows)):
        torch.testing.assert_close(y[part], F.layer_norm(x[part], (256,)))
