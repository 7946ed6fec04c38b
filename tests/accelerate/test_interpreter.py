"""Accelerated models on Triton's kernels, in its interpreter: at most twice as wrong as the model was before."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn

import detr_fast
from detr_fast import use_backend
from detr_fast.testing.accuracy import assert_close_to_truth


def encoder():
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24, 0.0, batch_first=True), 1, nn.LayerNorm(16))


def encode(model, x):
    return model(x, src_key_padding_mask=torch.tensor([[False] * 4, [False, False, False, True]]))


def bert():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return transformers.BertModel(transformers.BertConfig(vocab_size=5, **sizes, **quiet), add_pooling_layer=False)


def read(model, x, **rest):
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    return model(inputs_embeds=x, attention_mask=mask, **rest).last_hidden_state


def t5():
    transformers = pytest.importorskip("transformers")
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "relative_attention_num_buckets": 6}
    return transformers.T5Model(transformers.T5Config(vocab_size=5, **sizes, dropout_rate=0.0))


def translate(model, x):
    return read(model, x, decoder_inputs_embeds=x)


def block():
    pytest.importorskip("timm")
    from timm.models.vision_transformer import Block

    return Block(16, 2, qkv_bias=True)


def windows(version):
    pytest.importorskip("torchvision")
    from torchvision.models import swin_transformer as swin

    kind = swin.ShiftedWindowAttention if version == 1 else swin.ShiftedWindowAttentionV2
    return kind(8, [2, 2], [1, 1], 2)


def shift(model, x):
    return model(x.view(2, 2, 4, 8)).view(x.shape)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("make", "call"),
    [
        (encoder, encode),
        (bert, read),
        (t5, translate),
        (partial(windows, 1), shift),
        (partial(windows, 2), shift),
        (block, lambda model, x: model(x)),
    ],
)
def test_an_accelerated_model_is_as_accurate_on_triton_as_it_was(make, call):
    torch.manual_seed(0)
    plain = make().train()
    fast, exact = copy.deepcopy(plain), copy.deepcopy(plain).double()
    detr_fast.accelerate(fast)
    x = torch.randn(2, 4, 16)
    upstream = torch.randn(2, 4, 16)

    def step(model, dtype):
        y = call(model, x.to(dtype))
        y.backward(upstream.to(dtype))
        return {"output": y.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}

    truth, eager = step(exact, torch.float64), step(plain, torch.float32)
    with use_backend("triton"):
        ours = step(fast, torch.float32)
    assert ours.keys() == truth.keys()
    for name, expected in truth.items():
        if expected.abs().max() > 1e-9:  # keys' biases cancel in softmax: their gradient is rounding
            assert_close_to_truth(name, ours[name], eager[name], expected)
