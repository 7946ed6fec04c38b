"""Layers with hooks, pruning, parametrisations or wrappers in between run as torch.nn's do."""

from __future__ import annotations

import pytest
import torch
from torch import nn as torch_nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import spectral_norm
from torch.nn.utils.parametrize import register_parametrization

from detr_fast import nn, use_backend
from detr_fast.models.transformer import Transformer
from detr_fast.nn.bare import is_bare
from tests.layer_stacks import decoders, stacks


def transformer(name):
    """Our stack of three pre-norm or post-norm layers, or DETR's transformer, its layers, and what it is called with."""
    x, memory, position = torch.randn(2, 4, 16), torch.randn(2, 3, 16), torch.randn(1, 4, 16)
    if "detr" in name:
        model = Transformer(16, 2, 3, 3, 24, dropout=0.0, pre_norm="pre-norm" in name).eval()
        return model, [*model.encoder.layers, *model.decoder.layers], (x, position, torch.randn(3, 16))
    if "encoder" in name:
        model = stacks("Encoder", layers=3)[0].eval()
        return model, model.layers, (x,)
    model = (stacks("Decoder", layers=3) if "pre-norm" in name else decoders())[0].eval()
    return model, model.layers, (x, memory)


PRE_NORM_MODELS = ["pre-norm encoder", "pre-norm decoder", "pre-norm detr"]
MODELS = [*PRE_NORM_MODELS, "decoder", "detr"]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", PRE_NORM_MODELS)
def test_what_a_layers_hook_changes_in_place_counts_as_what_it_returns(name, when):
    model, layers, inputs = transformer(name)

    def outcome(change):
        one = layers[1]
        if when == "after":
            handle = one.register_forward_hook(lambda module, inputs, output: change(output))
        else:
            handle = one.register_forward_pre_hook(lambda module, inputs: (change(inputs[0]), *inputs[1:]))
        with torch.no_grad(), use_backend(attention="sdpa"), handle:
            return model(*inputs)

    torch.testing.assert_close(outcome(torch.sin_), outcome(torch.sin))


def offload(layer):
    """The layer's parameters are there only while it runs."""
    held = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.to("meta")
    layer.register_forward_pre_hook(lambda *_: layer.load_state_dict(held, assign=True) and None)
    layer.register_forward_hook(lambda *_: layer.to("meta") and None)


@pytest.mark.parametrize("name", MODELS)
def test_layers_whose_hooks_bring_their_parameters_run_on_these(name):
    model, layers, inputs = transformer(name)
    with torch.no_grad(), use_backend(attention="sdpa"):
        expected = model(*inputs)
        for layer in layers:
            offload(layer)
        torch.testing.assert_close(model(*inputs), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["pre-norm decoder", "decoder", "detr"])
def test_a_pruned_decoder_reads_its_memory_with_the_newest_weights(name):
    model, layers, inputs = transformer(name)
    attentions = [layer.multihead_attn for layer in layers if hasattr(layer, "multihead_attn")]
    for attention in attentions:
        prune.l1_unstructured(attention, "in_proj_weight", 0.5)
    with torch.no_grad(), use_backend(attention="sdpa"):
        for attention in attentions:
            attention.in_proj_weight_orig.mul_(3)  # as a step of an optimizer
        found = model(*inputs)
        for attention in attentions:
            prune.remove(attention, "in_proj_weight")
        torch.testing.assert_close(found, model(*inputs), rtol=1e-4, atol=1e-4)


class Doubled(torch_nn.Module):
    def forward(self, weight):
        return 2 * weight


def fully_sharded(part):
    part.__class__ = type(f"FSDP{type(part).__name__}", (FSDPModule, type(part)), {})  # as fully_shard does


CHANGES = {
    "forward hook": lambda part: part.register_forward_hook(lambda *_: None),
    "forward pre-hook": lambda part: part.register_forward_pre_hook(lambda *_: None),
    "backward hook": lambda part: part.register_full_backward_hook(lambda *_: None),
    "backward pre-hook": lambda part: part.register_full_backward_pre_hook(lambda *_: None),
    "own forward": lambda part: setattr(part, "forward", part.forward),
    "parametrisation": lambda part: register_parametrization(part, "weight", Doubled()),
    "FSDP2": fully_sharded,
}


@pytest.mark.parametrize("need_weights", [True, False])
def test_a_normed_projection_goes_one_step_in_each_forward_as_in_torch_nn(need_weights, twins):
    x, states = torch.randn(2, 4, 16, dtype=torch.float64), []
    for attention in twins("MultiheadAttention", 16, 2):
        torch.manual_seed(0)  # spectral_norm starts at random, and goes a step whenever the weight is read
        spectral_norm(attention.out_proj)
        with use_backend("eager"):
            attention(x, x, x, need_weights=need_weights)
        states.append(attention.state_dict())
    torch.testing.assert_close(*states)


@pytest.mark.parametrize("change", CHANGES)
def test_a_module_is_bare_until_something_comes_between_its_call_and_its_class(change):
    part = nn.LayerNorm(4)
    assert is_bare(part)
    CHANGES[change](part)
    assert not is_bare(part)
