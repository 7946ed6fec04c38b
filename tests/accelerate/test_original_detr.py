"""Layers with the code of the original DETR repository's, which is not a dependency: known by name and code."""

from __future__ import annotations

import copy
import pickle
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import detr_fast
from detr_fast import nn as ours
from detr_fast import use_backend
from detr_fast.explanation import explaining
from detr_fast.testing import count


class Layer(nn.Module):
    def __init__(self, d_model, nhead, dim_feedforward, dropout, normalize_before):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(d_model, nhead, dropout=dropout)
        self.linear1 = nn.Linear(d_model, dim_feedforward)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(dim_feedforward, d_model)
        self.norm1 = nn.LayerNorm(d_model)
        self.norm2 = nn.LayerNorm(d_model)
        self.dropout1 = nn.Dropout(dropout)
        self.dropout2 = nn.Dropout(dropout)
        self.activation = F.relu
        self.normalize_before = normalize_before

    def with_pos_embed(self, tensor, pos):
        return tensor if pos is None else tensor + pos


class TransformerEncoderLayer(Layer):
    def forward_post(self, src, src_mask=None, src_key_padding_mask=None, pos=None):
        q = k = self.with_pos_embed(src, pos)
        src2 = self.self_attn(q, k, value=src, attn_mask=src_mask, key_padding_mask=src_key_padding_mask)[0]
        src = self.norm1(src + self.dropout1(src2))
        src2 = self.linear2(self.dropout(self.activation(self.linear1(src))))
        return self.norm2(src + self.dropout2(src2))

    def forward_pre(self, src, src_mask=None, src_key_padding_mask=None, pos=None):
        src2 = self.norm1(src)
        q = k = self.with_pos_embed(src2, pos)
        src2 = self.self_attn(q, k, value=src2, attn_mask=src_mask, key_padding_mask=src_key_padding_mask)[0]
        src = src + self.dropout1(src2)
        src2 = self.linear2(self.dropout(self.activation(self.linear1(self.norm2(src)))))
        return src + self.dropout2(src2)

    def forward(self, src, src_mask=None, src_key_padding_mask=None, pos=None):
        if self.normalize_before:
            return self.forward_pre(src, src_mask, src_key_padding_mask, pos)
        return self.forward_post(src, src_mask, src_key_padding_mask, pos)


class TransformerDecoderLayer(Layer):
    def __init__(self, d_model, nhead, dim_feedforward, dropout, normalize_before):
        super().__init__(d_model, nhead, dim_feedforward, dropout, normalize_before)
        self.multihead_attn = nn.MultiheadAttention(d_model, nhead, dropout=dropout)
        self.norm3 = nn.LayerNorm(d_model)
        self.dropout3 = nn.Dropout(dropout)

    def forward_post(self, tgt, memory, tgt_mask, memory_mask, tgt_padding, memory_padding, pos, query_pos):
        q = k = self.with_pos_embed(tgt, query_pos)
        tgt2 = self.self_attn(q, k, value=tgt, attn_mask=tgt_mask, key_padding_mask=tgt_padding)[0]
        tgt = self.norm1(tgt + self.dropout1(tgt2))
        q, k = self.with_pos_embed(tgt, query_pos), self.with_pos_embed(memory, pos)
        tgt2 = self.multihead_attn(q, k, value=memory, attn_mask=memory_mask, key_padding_mask=memory_padding)[0]
        tgt = self.norm2(tgt + self.dropout2(tgt2))
        tgt2 = self.linear2(self.dropout(self.activation(self.linear1(tgt))))
        return self.norm3(tgt + self.dropout3(tgt2))

    def forward_pre(self, tgt, memory, tgt_mask, memory_mask, tgt_padding, memory_padding, pos, query_pos):
        tgt2 = self.norm1(tgt)
        q = k = self.with_pos_embed(tgt2, query_pos)
        tgt2 = self.self_attn(q, k, value=tgt2, attn_mask=tgt_mask, key_padding_mask=tgt_padding)[0]
        tgt = tgt + self.dropout1(tgt2)
        q, k = self.with_pos_embed(self.norm2(tgt), query_pos), self.with_pos_embed(memory, pos)
        tgt2 = self.multihead_attn(q, k, value=memory, attn_mask=memory_mask, key_padding_mask=memory_padding)[0]
        tgt = tgt + self.dropout2(tgt2)
        tgt2 = self.linear2(self.dropout(self.activation(self.linear1(self.norm3(tgt)))))
        return tgt + self.dropout3(tgt2)

    def forward(
        self,
        tgt,
        memory,
        tgt_mask=None,
        memory_mask=None,
        tgt_key_padding_mask=None,
        memory_key_padding_mask=None,
        pos=None,
        query_pos=None,
    ):
        masks = (tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask)
        if self.normalize_before:
            return self.forward_pre(tgt, memory, *masks, pos, query_pos)
        return self.forward_post(tgt, memory, *masks, pos, query_pos)


class Model(nn.Module):
    """Encoder and decoder layers called as the original's stacks call them."""

    def __init__(self, normalize_before=False, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        options = (32, 4, 48, dropout, normalize_before)
        self.encoder = nn.ModuleList(TransformerEncoderLayer(*options) for _ in range(2))
        self.decoder = nn.ModuleList(TransformerDecoderLayer(*options) for _ in range(2))

    def forward(self, src, mask, pos, query_pos):
        memory, x = src, torch.zeros_like(query_pos)
        for layer in self.encoder:
            memory = layer(memory, src_key_padding_mask=mask, pos=pos)
        for layer in self.decoder:
            x = layer(x, memory, memory_key_padding_mask=mask, pos=pos, query_pos=query_pos)
        return x


def padded(model):
    generator = torch.Generator().manual_seed(1)
    src, pos, query_pos = (torch.randn(n, 3, 32, generator=generator) for n in (6, 6, 4))
    mask = torch.tensor([[False] * 6, [False] * 4 + [True] * 2, [False] * 6])
    dtype = next(model.parameters()).dtype
    return [model(src.to(dtype), mask, pos.to(dtype), query_pos.to(dtype))]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("normalize_before", [True, False])
def test_outputs_and_gradients_are_as_before(normalize_before, training, assert_unchanged):
    model = Model(normalize_before).train(training)
    kinds = [type(m) for m in model.modules()]
    report = assert_unchanged(model, padded)
    assert not report.left
    layers = {one.name for one in report.switched if "original_detr" in one.now}
    assert layers == {f"{part}.{i}" for part in ("encoder", "decoder") for i in (0, 1)}
    assert all(isinstance(m, kind) for m, kind in zip(model.modules(), kinds))
    assert all(isinstance(m, ours.LayerNorm) for m in model.modules() if isinstance(m, nn.LayerNorm))


def test_attention_weights_are_not_computed_unless_a_hook_may_look_at_them(monkeypatch):
    asked = []
    forward = nn.MultiheadAttention.forward

    def spy(self, query, key, value, key_padding_mask=None, need_weights=True, *rest):
        asked.append(need_weights)
        return forward(self, query, key, value, key_padding_mask, need_weights, *rest)

    model = Model()
    monkeypatch.setattr(nn.MultiheadAttention, "forward", spy)
    detr_fast.accelerate(model)
    padded(model)
    assert asked == [False] * 6
    weights = []
    model.encoder[1].self_attn.register_forward_hook(lambda module, args, output: weights.append(output[1]))
    padded(model)
    assert weights[0].shape == (3, 6, 6)
    assert asked[6:] == [False, True, False, False, False, False]


def test_layers_of_both_kinds_ask_for_the_fused_blocks():
    counts = []
    for normalize_before in (False, True):
        model = Model(normalize_before)
        detr_fast.accelerate(model)
        with explaining(model) as records:
            padded(model)
        counts.append(Counter({op: sum(r.calls for r in records if r.op == op) for op in {r.op for r in records}}))
    post, pre = counts
    assert (post["linear_add_layer_norm"], post["feed_forward"]) == (6, 4)
    assert (pre["linear_add_layer_norm"], pre["feed_forward"], pre["layer_norm"]) == (6, 4, 4)


def test_a_pre_norm_layer_is_few_launches():
    model = Model(normalize_before=True, dropout=0.1).to("meta")
    detr_fast.accelerate(model)
    src, pos = (torch.empty(6, 3, 32, device="meta", requires_grad=True) for _ in range(2))
    query_pos = torch.empty(4, 3, 32, device="meta", requires_grad=True)
    with use_backend("triton", qkv_projection="auto"):
        launches = count(model, src, None, pos, query_pos).launches
    assert launches["linear_norm_kernel"] == 6 + 4  # behind each attention and each feed-forward block
    assert launches["layer_norm_forward_kernel"] == 4  # each layer's first
    assert launches["aten.native_dropout.default"] == 0


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_of_the_same_class_and_can_be_restored(way, monkeypatch):
    import sys
    import types

    module = types.ModuleType(__name__)  # tests are not importable by name; pickle looks classes up in a module
    module.__dict__.update(globals())
    monkeypatch.setitem(sys.modules, __name__, module)
    model = Model()
    text, expected = repr(model), padded(model)[0]
    detr_fast.accelerate(model)
    twin = way(model)
    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
    assert repr(twin) == text
    torch.testing.assert_close(padded(twin)[0], expected)
    detr_fast.restore(twin)
    assert type(twin.encoder[0]) is TransformerEncoderLayer
    assert "__reduce_ex__" not in type(twin.encoder[0]).__dict__


def test_a_layer_of_the_same_name_with_other_code_is_left_alone():
    class TransformerEncoderLayer(Layer):
        forward = globals()["TransformerEncoderLayer"].forward
        forward_pre = globals()["TransformerEncoderLayer"].forward_pre

        def forward_post(self, src, src_mask=None, src_key_padding_mask=None, pos=None):
            q = k = self.with_pos_embed(src, pos)
            src = src + self.self_attn(q, k, value=src, attn_mask=src_mask, key_padding_mask=src_key_padding_mask)[0]
            return self.norm2(src + self.linear2(self.activation(self.linear1(src))))

    report = detr_fast.accelerate(nn.Sequential(TransformerEncoderLayer(32, 4, 48, 0.0, False)))
    (left,) = report.left
    assert left.reason == "its name is that of the original DETR's layer, its code is not"


def test_a_layer_that_adds_positions_to_values_too_is_left_alone():
    class TransformerEncoderLayer(Layer):
        forward = globals()["TransformerEncoderLayer"].forward

        def forward_post(self, src, src_mask=None, src_key_padding_mask=None, pos=None):
            q = k = self.with_pos_embed(src, pos)
            v = self.with_pos_embed(src, pos)
            src2 = self.self_attn(q, k, value=v, attn_mask=src_mask, key_padding_mask=src_key_padding_mask)[0]
            src = self.norm1(src + self.dropout1(src2))
            src2 = self.linear2(self.dropout(self.activation(self.linear1(src))))
            return self.norm2(src + self.dropout2(src2))

        forward_pre = forward_post

    layer = TransformerEncoderLayer(32, 4, 48, 0.0, False)
    x, position = torch.randn(2, 5, 2, 32).unbind(0)
    expected = layer(x, pos=position)
    (left,) = detr_fast.accelerate(layer).left
    assert left.reason == "its name is that of the original DETR's layer, its code is not"
    with use_backend(attention="eager"):
        torch.testing.assert_close(layer(x, pos=position), expected)


def test_dropout_draws_what_it_drew():
    model = Model(dropout=0.2)
    detr_fast.accelerate(model)
    with use_backend(attention="eager"):
        torch.manual_seed(3)
        first = padded(model)[0]
        torch.manual_seed(3)
        assert torch.equal(padded(model)[0], first)
        assert not torch.equal(padded(model)[0], first)
