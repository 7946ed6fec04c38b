from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn as torch_nn

from detr_fast import dispatch, nn, use_backend
from detr_fast.explanation import explaining

ROUNDING = 1e-10  # in fp64
BACKENDS = [None, {"attention": "sdpa"}, {"attention": "eager", "layer_norm": "eager"}]
CAUSAL = torch.ones(4, 4, dtype=torch.bool).triu(1)
PADDING = torch.tensor([[False] * 4, [False, False, True, True], [False, False, False, True]])
FLOAT = torch.randn(4, 4, dtype=torch.float64)


def layer_arguments(batch_first=True, **kwargs):
    return {"d_model": 8, "nhead": 2, "dim_feedforward": 12, "dropout": 0.0, "batch_first": batch_first, **kwargs}


def tokens(batch_first, length=4, batch=3):
    shape = (batch, length, 8) if batch_first else (length, batch, 8)
    return torch.randn(shape, dtype=torch.float64)


MASKS = [
    {},
    {"mask": CAUSAL},
    {"mask": CAUSAL, "is_causal": True},
    {"padding": PADDING},
    {"mask": CAUSAL, "padding": PADDING},
    {"mask": FLOAT},
    {"mask": FLOAT.expand(6, 4, 4)},
    {"padding": torch.where(PADDING, -1.5, 0.5).double()},
]


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Support for mismatched|enable_nested_tensor|The PyTorch API of nested")
        yield


@pytest.mark.parametrize("masks", MASKS, ids=lambda m: "+".join(m) or "none")
@pytest.mark.parametrize("options", [{}, {"norm_first": True, "batch_first": False}, {"activation": "gelu"}], ids=str)
@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_an_encoder_layer_is_torch_nns(backend, options, masks, twins, assert_same_step):
    ours, original = twins("TransformerEncoderLayer", **layer_arguments(**options))
    x = tokens(ours.self_attn.batch_first)
    kwargs = {"src_mask": masks.get("mask"), "src_key_padding_mask": masks.get("padding")}
    kwargs["is_causal"] = masks.get("is_causal", False)
    for training in (True, False):
        ours.train(training), original.train(training)
        assert_same_step(ours, original, (x,), rtol=ROUNDING, exact=backend is None, backend=backend, **kwargs)


@pytest.mark.parametrize("masks", MASKS, ids=lambda m: "+".join(m) or "none")
@pytest.mark.parametrize("options", [{"batch_first": False}, {"norm_first": True}], ids=str)
@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_a_decoder_layer_is_torch_nns(backend, options, masks, twins, assert_same_step):
    ours, original = twins("TransformerDecoderLayer", **layer_arguments(**options))
    x, memory = (tokens(ours.self_attn.batch_first) for _ in range(2))
    kwargs = {"tgt_mask": masks.get("mask"), "memory_key_padding_mask": masks.get("padding")}
    kwargs["tgt_is_causal"] = masks.get("is_causal", False)
    assert_same_step(ours, original, (x, memory), rtol=ROUNDING, exact=backend is None, backend=backend, **kwargs)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("masks", MASKS, ids=lambda m: "+".join(m) or "none")
@pytest.mark.parametrize("name", ["Encoder", "Decoder"])
@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_stacks_are_torch_nns(backend, name, masks, norm, assert_same_step):
    layer = getattr(torch_nn, f"Transformer{name}Layer")(**layer_arguments(), dtype=torch.float64)
    last = [torch_nn.LayerNorm(8, dtype=torch.float64) if norm else None for _ in range(2)]
    ours = getattr(nn, f"Transformer{name}")(layer, 2, last[0])
    original = getattr(torch_nn, f"Transformer{name}")(layer, 2, last[1])
    x, memory = tokens(True), tokens(True)
    if name == "Encoder":
        inputs, kwargs = (x,), {"mask": masks.get("mask"), "src_key_padding_mask": masks.get("padding")}
        kwargs["is_causal"] = masks.get("is_causal")
    else:
        inputs, kwargs = (x, memory), {"tgt_mask": masks.get("mask"), "tgt_key_padding_mask": masks.get("padding")}
        kwargs["tgt_is_causal"] = masks.get("is_causal")
    for training in (True, False):
        ours.train(training), original.train(training)
        assert_same_step(ours, original, inputs, rtol=ROUNDING, exact=backend is None, backend=backend, **kwargs)


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_a_whole_transformer_is_torch_nns(backend, batched, twins, assert_same_step):
    ours, original = twins("Transformer", 8, 2, 2, 2, 12, 0.0, batch_first=True)
    source, target = tokens(True, 5), tokens(True)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 5])
    if not batched:
        source, target, padding = source[1], target[1], padding[1]
    masks = {"src_key_padding_mask": padding, "memory_key_padding_mask": padding, "tgt_mask": CAUSAL}
    assert_same_step(ours, original, (source, target), rtol=ROUNDING, exact=backend is None, backend=backend, **masks)


@pytest.mark.parametrize("grad", [False, True])
def test_inference_takes_torch_nns_fused_layers_and_nested_tensors(grad, monkeypatch):
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(**layer_arguments()), 2).eval()
    nested = []
    layer = torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(
        torch, "_transformer_encoder_layer_fwd", lambda x, *rest: nested.append(x.is_nested) or layer(x, *rest)
    )
    with torch.set_grad_enabled(grad):
        y = encoder(tokens(True).float(), src_key_padding_mask=PADDING)
    assert nested == ([] if grad else [True, True])
    assert grad or (y[PADDING] == 0).all()


@pytest.mark.parametrize("training", [True, False])
def test_boolean_masks_reach_attention_as_they_were_given(training, monkeypatch):
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(**layer_arguments()), 2).train(training)
    seen = []
    forward = nn.MultiheadAttention.forward

    def spy(self, *args, **kwargs):
        seen.append((kwargs["key_padding_mask"], kwargs["attn_mask"], kwargs["is_causal"]))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(nn.MultiheadAttention, "forward", spy)
    with use_backend(attention="sdpa"):
        encoder(tokens(True).float(), CAUSAL, PADDING)
    assert len(seen) == 2
    assert all(padding is PADDING and mask is CAUSAL and is_causal for padding, mask, is_causal in seen)


def test_a_stack_of_someone_elses_layers_gets_the_masks_that_torch_nn_gives():
    class Layer(torch_nn.TransformerEncoderLayer):
        def forward(self, src, src_mask=None, src_key_padding_mask=None, is_causal=False):
            assert src_key_padding_mask.dtype == src.dtype
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)

    encoder = nn.TransformerEncoder(Layer(**layer_arguments(), dtype=torch.float64), 2)
    assert type(encoder.layers[0]) is Layer
    assert type(encoder.layers[0].self_attn) is nn.MultiheadAttention
    with use_backend(attention="sdpa"):
        encoder(tokens(True), src_key_padding_mask=PADDING)


def test_a_subclass_may_replace_one_part():
    class Quiet(nn.TransformerEncoderLayer):
        def _ff_block(self, x):
            return torch.zeros_like(x)

    layer = Quiet(**layer_arguments(), dtype=torch.float64)
    x = tokens(True)
    with use_backend(attention="sdpa"):
        y = layer(x)
    expected = layer.norm2(layer.norm1(x + layer.self_attn(x, x, x)[0]))
    torch.testing.assert_close(y, expected, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize(
    ("name", "block"), [("Encoder", "_sa_block"), ("Encoder", "_ff_block"), ("Decoder", "_mha_block")]
)
def test_a_block_that_is_replaced_in_one_layer_runs(name, block, twins):
    ours, original = twins(f"Transformer{name}Layer", **layer_arguments())
    for layer in (ours, original):
        setattr(layer, block, lambda x, *_, **__: 3 * x)
    inputs = [tokens(True)] * (1 + (name == "Decoder"))
    with use_backend(attention="sdpa"):
        torch.testing.assert_close(ours(*inputs), original(*inputs), rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("training", [True, False])
def test_explain_has_one_record_for_each_attention_and_each_kind_of_norm(training):
    model = nn.Transformer(8, 2, 2, 1, 12, 0.0, batch_first=True).train(training)
    with explaining(model) as every:
        model(tokens(True).float(), tokens(True).float(), src_key_padding_mask=PADDING)
    fused = ("feed_forward", "linear_add_layer_norm", "encoder_layer", "decoder_layer")
    blocks = [r for r in every if r.op in fused]  # or not, and why
    assert {r.module for r in blocks} == {"encoder.layers.0", "encoder.layers.1", "decoder.layers.0"}
    assert all(r.chosen == "its parts" for r in blocks)
    records = [r for r in every if r not in blocks]
    encoder = [f"encoder.layers.{i}{part}" for i in (0, 1) for part in (".self_attn", "")]
    decoder = [f"decoder.layers.0{part}" for part in (".self_attn", "", ".multihead_attn")]
    assert [r.module for r in records] == [*encoder, "encoder.norm", *decoder, "decoder.norm"]
    assert {r.op for r in records} == {"attention", "add_layer_norm", "layer_norm"}
    norms = {r.module: r.calls for r in records if r.op == "add_layer_norm"}  # each with the sum before it
    assert norms == {"encoder.layers.0": 2, "encoder.layers.1": 2, "decoder.layers.0": 3}
    assert not dispatch.intervening


@pytest.mark.parametrize("name", ["Encoder", "Decoder"])
def test_a_mask_without_a_hint_does_not_break_the_graph(name):
    layer = getattr(nn, f"Transformer{name}Layer")(**layer_arguments(), dtype=torch.float64)
    stack = getattr(nn, f"Transformer{name}")(layer, 2)
    x = tokens(True)
    arguments = (x, CAUSAL) if name == "Encoder" else (x, x, CAUSAL)
    compiled = torch.compile(stack, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), stack(*arguments), rtol=ROUNDING, atol=ROUNDING)
