"""What FlopCounterMode counts of models on our kernels; on meta tensors, and attention as on GPUs."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import detr_fast
from detr_fast import ops, use_backend
from detr_fast.models import detr_resnet50
from detr_fast.testing.counters import _composites_as_on_cuda


def meta(*shape, grad=True):
    return torch.empty(shape, device="meta", requires_grad=grad)


def flops(function, *inputs, backend="triton", **by_op):
    """Of forward, and of forward and backward; and the names of what was counted."""
    with use_backend(backend, **by_op), _composites_as_on_cuda():
        with FlopCounterMode(display=False) as forward:
            y = function(*inputs)
        with FlopCounterMode(display=False) as both:
            y = function(*inputs)
            if y.requires_grad:
                y.sum().backward()
    return forward.get_total_flops(), both.get_total_flops(), {str(name) for name in both.get_flop_counts()["Global"]}


def assert_as_eager(function, *inputs, expected, plain=None):
    """plain: what is compared with, where that is not the same by PyTorch's operations."""
    ours, theirs = flops(function, *inputs), flops(plain or function, *inputs, backend="eager", attention="sdpa")
    assert ours[:2] == theirs[:2]
    assert {f"detr_fast.{name}" for name in expected.split()} <= ours[2]
    assert theirs[0] > 0


def x(tokens=50, width=64):
    return meta(3, tokens, width)


LAYER = "attention_packed attention_packed_backward linear_add_layer_norm feed_forward feed_forward_backward"


@pytest.mark.parametrize("padding", [False, True])
def test_an_accelerated_encoder_layer_counts_what_it_counted(padding):
    plain = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, device="meta")
    layer = copy.deepcopy(plain)
    detr_fast.accelerate(layer)
    mask = torch.zeros(3, 50, dtype=torch.bool, device="meta") if padding else None
    ours, theirs = (partial(one, src_key_padding_mask=mask) for one in (layer, plain))
    assert_as_eager(ours, x(), expected=LAYER, plain=theirs)


def test_an_accelerated_decoder_counts_what_it_counted():
    plain = nn.TransformerDecoder(nn.TransformerDecoderLayer(64, 4, 128, norm_first=True, device="meta"), 2)
    decoder = copy.deepcopy(plain)
    detr_fast.accelerate(decoder)
    inputs = meta(20, 3, 64), meta(50, 3, 64)
    assert_as_eager(decoder, *inputs, expected="attention_packed feed_forward feed_forward_backward", plain=plain)


def test_the_whole_detector_counts_what_eager_counts():
    with torch.device("meta"):
        model = detr_resnet50(num_classes=91)
    model.query_embed.requires_grad_(False)  # of queries' positions our gradient is a product of its own
    images = meta(2, 3, 128, 96, grad=False), torch.zeros(2, 128, 96, dtype=torch.bool, device="meta")
    detect = lambda *inputs: sum(t.sum() for t in model(inputs).values() if isinstance(t, torch.Tensor))  # noqa: E731
    assert_as_eager(detect, *images, expected=LAYER)


@pytest.mark.parametrize("keys", [2, 4], ids="{} heads of keys".format)
@pytest.mark.parametrize("masked", [False, True])
def test_attention_counts_five_products_of_its_backward(keys, masked):
    q, k, v = meta(3, 50, 4, 16), meta(3, 30, keys, 16), meta(3, 30, keys, 8)
    mask = meta(50, 30) if masked else None
    forward, both, names = flops(lambda *qkv: ops.attention(*qkv, attn_mask=mask, enable_gqa=True), q, k, v)
    scores = 2 * 3 * 4 * 50 * 30
    assert (forward, both - forward) == (scores * (16 + 8), scores * (3 * 16 + 2 * 8))
    assert names == {"detr_fast.attention", "detr_fast.attention_backward"}


@pytest.mark.interpreter
def test_sequences_one_behind_the_other_count_by_their_lengths():
    lengths = torch.tensor([0, 3, 10], dtype=torch.int32)
    q, k, v = (torch.randn(10, 2, 16, requires_grad=True) for _ in range(3))
    forward, both, _ = flops(lambda *qkv: ops.attention_varlen(*qkv, lengths, lengths, 7, 7), q, k, v)
    scores = 2 * 2 * (3 * 3 + 7 * 7)
    assert (forward, both - forward) == (scores * 32, scores * 80)


def test_products_with_what_follows_them_count_what_eager_counts():
    weight, norm = meta(64, 64), (meta(64), meta(64))
    hidden, projection = meta(128, 64), meta(192, 64)
    position = meta(50, 64, grad=False)
    assert_as_eager(
        lambda x: ops.linear_add_layer_norm(x, weight, None, x * 1, *norm), x(), expected="linear_add_layer_norm"
    )
    assert_as_eager(
        lambda x: ops.feed_forward(x, hidden, None, hidden.t() * 1, None),
        x(),
        expected="feed_forward feed_forward_backward",
    )
    assert_as_eager(lambda x: ops.qkv_projection(x, projection, None, position, 128), x(), expected="qkv_projection")


def test_a_product_of_pixels_counts_what_a_convolution_counts():
    x, weight, residual = (meta(*shape).bfloat16() for shape in [(2, 64, 9, 8), (128, 64, 1, 1), (2, 128, 9, 8)])
    scale, shift = meta(128, grad=False), meta(128, grad=False)
    assert_as_eager(ops.pointwise_affine, x, weight, scale, shift, residual, expected="pointwise_affine")


def test_a_stem_counts_its_convolution_of_seven_by_seven():
    frozen = [meta(*shape, grad=False) for shape in [(2, 3, 64, 48), (64, 3, 7, 7), (64,), (64,)]]
    assert_as_eager(ops.resnet_stem, *frozen, expected="affine_pool")


@pytest.mark.parametrize("learns", [True, False])
def test_a_loss_counts_its_gradients_products_with_its_own(learns):
    weight, target = meta(1000, 64, grad=learns), torch.zeros(150, dtype=torch.long, device="meta")
    inputs = meta(150, 64)
    ours = flops(lambda x: ops.linear_cross_entropy(x, weight, None, target), inputs)
    theirs = flops(lambda x: ops.linear_cross_entropy(x, weight, None, target), inputs, backend="eager")
    assert ours[1] == theirs[1] == 2 * 150 * 64 * 1000 * (3 if learns else 2)
    assert "detr_fast.linear_cross_entropy" in ours[2]


def test_what_is_computed_again_counts_again():
    tensors = x(), meta(128, 64), meta(128), meta(64, 128), meta(64)
    kept, again = (flops(ops.feed_forward, *tensors, feed_forward=name) for name in ("triton", "triton_recompute"))
    assert again[0] == kept[0]
    assert again[1] - kept[1] == 2 * 150 * 64 * 128
