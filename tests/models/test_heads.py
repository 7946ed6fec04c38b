"""DETR's heads on one op while they are plain and bare, and else part by part."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from detr_fast import use_backend
from detr_fast.models import ModelConfig, build_model
from detr_fast.nn.heads import fused_heads

CONFIG = ModelConfig(
    backbone="conv", num_classes=5, num_queries=7, d_model=32, heads=4, encoder_layers=1, decoder_layers=2, feedforward=48,
    dropout=0.0, backbone_width=8,
)  # fmt: skip
KERNEL = "mlp_forward_kernel"


def detections(model, images):
    outputs = model(images)
    return [one[name] for one in (outputs, *outputs["aux_outputs"]) for name in ("pred_logits", "pred_boxes")]


def outcome(model, images, backend, autocast):
    model.zero_grad()
    with use_backend(prediction_heads=backend):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = detections(model, images)
        sum(t.square().sum() for t in found).backward()
    heads = (*model.class_embed.parameters(), *model.bbox_embed.parameters())
    return [*found, *(p.grad for p in (*heads, model.query_embed.weight))]


@pytest.mark.interpreter
@pytest.mark.parametrize("autocast", [False, True])
def test_heads_on_kernels_give_what_they_gave_in_fp32_under_autocast_too(interpreter, autocast):
    torch.manual_seed(0)
    model, images = build_model(CONFIG), torch.rand(2, 3, 64, 80)
    ours, theirs = (outcome(model, images, backend, autocast) for backend in ("triton", "eager"))
    assert interpreter.counts()[KERNEL] == 1
    assert ours[0].dtype is torch.float32
    assert [t.dtype for t in ours] == [t.dtype for t in theirs]
    for a, b in zip(ours[:-1], theirs):  # the last one comes from behind the decoder
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours[-1], theirs[-1], rtol=0.1 if autocast else 1e-4, atol=1e-2 if autocast else 1e-5)


def hooked(model):
    model.class_embed.register_forward_hook(lambda _, __, y: y * 2)


def hooked_layer(model):
    model.bbox_embed.layers[1].register_forward_pre_hook(lambda _, inputs: (inputs[0] * 2,))


def hooked_whole(model):
    model.bbox_embed.register_forward_hook(lambda _, __, y: y * 2)


def patched(model):
    forward = model.bbox_embed.layers[0].forward
    model.bbox_embed.layers[0].forward = lambda x: forward(x) * 2


def parametrised(model):
    weight_norm(model.bbox_embed.layers[2])


class Doubled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def replaced(model):
    layer = Doubled(32, 6)
    layer.load_state_dict(model.class_embed.state_dict())
    model.class_embed = layer


def replaced_whole(model):
    model.bbox_embed = nn.Sequential(model.bbox_embed.layers[0], nn.Tanh(), model.bbox_embed.layers[2])


CHANGES = (hooked, hooked_layer, hooked_whole, patched, parametrised, replaced, replaced_whole)


@pytest.mark.interpreter
@pytest.mark.parametrize("change", CHANGES)
def test_heads_that_are_not_bare_run_part_by_part(interpreter, change):
    torch.manual_seed(0)
    model, images = build_model(CONFIG).eval(), torch.rand(1, 3, 64, 64)
    with torch.no_grad(), use_backend(prediction_heads="triton"):
        change(model)
        changed = detections(model, images)
        assert KERNEL not in interpreter.counts()
        queries = torch.randn(2, 32)
        parts = model.bbox_embed, model.class_embed
        assert fused_heads(queries, [*getattr(parts[0], "layers", [])], parts[1], parts[0], sigmoid=True) is None
    with torch.no_grad(), use_backend(prediction_heads="eager"):
        for a, b in zip(changed, detections(model, images)):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
