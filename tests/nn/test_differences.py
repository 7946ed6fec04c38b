"""The differences from PyTorch that docs/differences.md lists are all there are known, and are as it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn as torch_nn

import detr_fast
from detr_fast import nn, ops, use_backend
from detr_fast.dispatch import BackendError

DOCUMENT = Path(__file__).parents[2] / "docs" / "differences.md"


def a_query_that_sees_no_key(twins):
    ours, original = twins("MultiheadAttention", 8, 2, batch_first=True)
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    hidden = torch.tensor([[False] * 3, [True] * 3])
    for need_weights in (True, False):
        theirs = original(x, x, x, key_padding_mask=hidden, need_weights=need_weights)[0]
        with use_backend(attention="sdpa"):
            mine = ours(x, x, x, key_padding_mask=hidden, need_weights=need_weights)[0]
        torch.testing.assert_close(mine[0], theirs[0])
        assert torch.equal(mine[1], ours.out_proj.bias.expand(3, 8))
        assert theirs[1].isnan().all() == need_weights
    ours.eval(), original.eval()
    with torch.no_grad():
        for module in (original, ours):
            assert module(x, x, x, key_padding_mask=hidden, need_weights=False)[0][1].isnan().all()
        with use_backend(attention="sdpa"):
            mine = ours(x, x, x, key_padding_mask=hidden, need_weights=False)[0]
    assert torch.equal(mine[1], ours.out_proj.bias.expand(3, 8))


def padded_positions(twins):
    layer = torch_nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True)
    ours, original = nn.TransformerEncoder(layer, 1).eval(), torch_nn.TransformerEncoder(layer, 1).eval()
    x, padding = torch.randn(2, 3, 8), torch.tensor([[False] * 3, [False, False, True]])
    with torch.no_grad():
        theirs = original(x, src_key_padding_mask=padding)
        with use_backend(attention="sdpa"):
            mine = ours(x, src_key_padding_mask=padding)
    torch.testing.assert_close(mine[~padding], theirs[~padding])
    assert (theirs[padding] == 0).all()
    assert (mine[padding] != 0).any()


def nested_tensors(twins):
    ours, original = (m.eval() for m in twins("MultiheadAttention", 8, 2, batch_first=True, dtype=torch.float32))
    x = torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(5, 8)])
    with torch.no_grad():
        original(x, x, x, need_weights=False)
        with use_backend(attention="sdpa"), pytest.raises(BackendError, match="nested tensors"):
            ours(x, x, x, need_weights=False)


def nan_in_hidden_keys(twins):
    ours, original = twins("MultiheadAttention", 8, 2, batch_first=True, dtype=torch.float32)
    x = torch.randn(2, 3, 8)
    spoilt = x.index_fill(1, torch.tensor([2]), float("nan"))
    hidden = torch.tensor([[False, False, True]] * 2)
    with use_backend(attention="triton"):
        mine = ours(x, spoilt, spoilt, key_padding_mask=hidden, need_weights=False)[0]
    torch.testing.assert_close(mine, original(x, x, x, key_padding_mask=hidden)[0])
    assert original(x, spoilt, spoilt, key_padding_mask=hidden)[0].isnan().all()


def a_row_of_lowest_numbers(twins):
    ours, original = twins("MultiheadAttention", 8, 2, batch_first=True, dtype=torch.float32)
    x, mask = torch.randn(2, 3, 8), torch.zeros(3, 3)
    mask[0], mask[1, 2] = torch.finfo(torch.float32).min, torch.finfo(torch.float32).min
    theirs = original(x, x, x, attn_mask=mask, need_weights=False)[0]
    mean = original(x.mean(1, keepdim=True), *(x.mean(1, keepdim=True),) * 2, need_weights=False)[0]
    torch.testing.assert_close(theirs[:, :1], mean)
    with use_backend(attention="triton"):
        mine = ours(x, x, x, attn_mask=mask, need_weights=False)[0]
    torch.testing.assert_close(mine[:, 1:], theirs[:, 1:])
    assert torch.equal(mine[:, 0], ours.out_proj.bias.expand(2, 8))
    with use_backend(attention="eager"):
        torch.testing.assert_close(ours(x, x, x, attn_mask=mask, need_weights=False)[0], theirs)


def a_mask_of_nothing(twins):
    ours, original = twins("MultiheadAttention", 8, 2, batch_first=True, dtype=torch.float32)
    for shape in ((0, 3, 8), (2, 0, 8)):
        x, mask = torch.randn(shape), torch.zeros(shape[1], shape[1])
        padding = torch.zeros(shape[:2], dtype=torch.bool)
        masks = {"attn_mask": mask, "key_padding_mask": padding, "need_weights": False}
        with pytest.raises(RuntimeError, match="cannot reshape tensor of 0 elements"):
            original(x, x, x, **masks)
        for backend in ("sdpa", "eager"):
            with use_backend(attention=backend):
                assert ours(x, x, x, **masks)[0].shape == original(x, x, x, need_weights=False)[0].shape == x.shape


class TransformerEncoderLayer(torch_nn.Module):
    """The original DETR's, as far as the adapter knows it by."""

    def __init__(self):
        super().__init__()
        self.self_attn = torch_nn.MultiheadAttention(8, 2)
        self.linear1, self.linear2 = torch_nn.Linear(8, 12), torch_nn.Linear(12, 8)
        self.norm1, self.norm2 = torch_nn.LayerNorm(8), torch_nn.LayerNorm(8)
        self.dropout = self.dropout1 = self.dropout2 = torch_nn.Identity()
        self.activation, self.normalize_before = torch.relu, False

    def with_pos_embed(self, tensor, pos):
        return tensor if pos is None else tensor + pos

    def forward_post(self, src, src_mask=None, src_key_padding_mask=None, pos=None):
        q = k = self.with_pos_embed(src, pos)
        src = self.norm1(src + self.dropout1(self.self_attn(q, k, src)[0]))
        return self.norm2(src + self.dropout2(self.linear2(self.dropout(self.activation(self.linear1(src))))))

    forward_pre = forward_post

    def forward(self, src, src_mask=None, src_key_padding_mask=None, pos=None):
        if self.normalize_before:
            return self.forward_pre(src, src_mask, src_key_padding_mask, pos)
        return self.forward_post(src, src_mask, src_key_padding_mask, pos)


def weights_of_the_original_detr(twins):
    layer, seen = TransformerEncoderLayer(), []
    forward = torch_nn.MultiheadAttention.forward

    def spy(self, *args, **kwargs):
        seen.append(forward(self, *args, **kwargs)[1])
        return forward(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_nn.MultiheadAttention, "forward", spy)
        layer(torch.randn(3, 2, 8))
        detr_fast.accelerate(layer)
        layer(torch.randn(3, 2, 8))
        layer.self_attn.register_forward_hook(lambda module, args, output: seen.append(output[1]))
        layer(torch.randn(3, 2, 8))
    assert [weights is None for weights in seen] == [False, True, False, False]


def table_positions(twins):
    theirs = pytest.importorskip("transformers.models.table_transformer.modeling_table_transformer")
    original, ours = theirs.TableTransformerAttention(8, 2), theirs.TableTransformerAttention(8, 2)
    detr_fast.accelerate(ours)
    x = torch.randn(2, 3, 8)
    with pytest.raises(UnboundLocalError):
        original(x)
    with use_backend(attention="sdpa"):
        assert ours(x)[0].shape == x.shape


def refused_targets(twins):
    transformers = pytest.importorskip("transformers")
    from detr_fast.adapters import hugging_face_loss_detr

    config = transformers.DetrConfig(num_labels=3)
    labels = [{"class_labels": torch.tensor([7]), "boxes": torch.full((1, 4), 0.5)}]
    arguments = (torch.zeros(1, 2, 4), labels, "cpu", torch.full((1, 2, 4), 0.5), config)
    with pytest.raises(IndexError):
        hugging_face_loss_detr.object_detection_loss(*arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hugging_face_loss_detr, "has_values", lambda tensor: False)  # as on a GPU
        assert hugging_face_loss_detr.object_detection_loss(*arguments)[0].isnan()


def features_of_16_bits(twins):
    torchvision = pytest.importorskip("torchvision")
    norm = torchvision.ops.FrozenBatchNorm2d
    block = torchvision.models.resnet.BasicBlock(8, 8, norm_layer=norm)
    x = torch.randn(1, 8, 4, 4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        theirs = block(x)
        detr_fast.accelerate(block)
        with use_backend(channel_affine="eager"):  # as on a GPU
            mine = block(x)
    assert (theirs.dtype, mine.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(mine.float(), theirs, rtol=0.02, atol=0.02)


def infinite_heads(_):
    x, weight, bias = torch.tensor([[torch.inf, 1.0]]), torch.full((2, 2), 0.1), torch.zeros(2)
    found = []
    for backend in ("triton", "eager"):
        with use_backend(prediction_heads=backend):
            boxes, classes = ops.prediction_heads(x, [weight, weight], [bias, bias], weight, bias)
        found.append((boxes, classes))
    for mine, theirs in zip(*found):
        assert mine.isnan().all()
        assert theirs.isposinf().all()


def gradients_that_stay(_):
    kept = []
    for backend in ("triton", "eager"):
        parameter = torch.ones(4, requires_grad=True)
        optimizer = torch.optim.AdamW([parameter], fused=True)
        parameter.sum().backward()
        with use_backend(optimizer_step=backend):
            ops.optimizer_step(optimizer, [parameter], max_norm=0.5)
        kept.append(parameter.grad.norm())
    assert kept == pytest.approx([2.0, 0.5])


DIFFERENCES = {
    "Queries that see no key": a_query_that_sees_no_key,
    "NaN and infinity in keys that are hidden": nan_in_hidden_keys,
    "Rows masked by a dtype's lowest number": a_row_of_lowest_numbers,
    "A mask beside an empty batch": a_mask_of_nothing,
    "Padded positions of an encoder's output in inference": padded_positions,
    "Nested tensors with an implementation asked for by name": nested_tensors,
    "Attention weights inside the original DETR's layers": weights_of_the_original_detr,
    "Table Transformer's attention without positions": table_positions,
    "Labels and boxes that transformers' detection loss refuses": refused_targets,
    "Features of ResNets with frozen norms under autocast": features_of_16_bits,
    "Infinities in fp32 heads on tensor cores": infinite_heads,
    "Gradients behind a captured step": gradients_that_stay,
}


def test_the_document_lists_exactly_what_is_tested_here_each_with_its_reason():
    sections = re.split(r"^## ", DOCUMENT.read_text(), flags=re.MULTILINE)[1:]
    titles, bodies = zip(*(section.split("\n", 1) for section in sections))
    assert list(titles) == list(DIFFERENCES)
    assert all("*Reason:*" in body for body in bodies)


IN_THE_INTERPRETER = {
    "NaN and infinity in keys that are hidden",
    "Rows masked by a dtype's lowest number",
    "Infinities in fp32 heads on tensor cores",
    "Gradients behind a captured step",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "title",
    [pytest.param(t, marks=[pytest.mark.interpreter] * (t in IN_THE_INTERPRETER)) for t in DIFFERENCES],
)
def test_a_difference_is_as_documented(title, twins):
    DIFFERENCES[title](twins)
