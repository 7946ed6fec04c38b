"""Adapters' modules under the modes and transforms of PyTorch; torch.nn's own are in tests/nn/test_contexts.py."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint

import detr_fast
from detr_fast import use_backend

transformers = pytest.importorskip("transformers")
timm = pytest.importorskip("timm")

BACKENDS = ["auto", "sdpa"]


class Bert(nn.Module):
    """One layer of it, on embeddings, with a padding mask that the model turns into its own."""

    def __init__(self):
        super().__init__()
        config = transformers.BertConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=24,
            vocab_size=5,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        self.inner = transformers.BertModel(config, add_pooling_layer=False)
        self.register_buffer("mask", torch.tensor([[1, 1, 1], [1, 1, 0]]))

    def forward(self, x):
        return self.inner(inputs_embeds=x, attention_mask=self.mask).last_hidden_state


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        from transformers.models.table_transformer.modeling_table_transformer import TableTransformerAttention

        self.inner = TableTransformerAttention(16, 2)
        self.register_buffer("mask", torch.tensor([[0.0, 0, 0], [0, 0, -1e30]])[:, None, None].repeat(1, 1, 3, 1))

    def forward(self, x):
        return self.inner(x, self.mask.to(x.dtype), 0.5 * x)[0]


class Timm(nn.Module):
    def __init__(self):
        super().__init__()
        from timm.models.vision_transformer import Block

        self.inner = Block(16, 2, qkv_bias=True)

    def forward(self, x):
        return self.inner(x)


MODELS = {model.__name__: model for model in (Bert, Table, Timm)}


@pytest.fixture
def pair():
    """A model and its accelerated copy."""

    def make(name):
        plain = MODELS[name]()
        fast = copy.deepcopy(plain)
        report = detr_fast.accelerate(fast)
        assert any("ttention" in one.original for one in report.switched)
        return fast, plain

    return make


def close(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MODELS)
def test_autocast_inference_mode_and_checkpointing_are_as_before(name, backend, pair):
    fast, plain = pair(name)
    x = torch.randn(2, 3, 16)
    with use_backend(attention=backend):
        with torch.autocast("cpu", torch.bfloat16):
            found, expected = fast(x), plain(x)
        assert found.dtype == expected.dtype
        close(found, expected, 4e-2)
        with torch.inference_mode():
            close(fast(x), plain(x))
        for reentrant in (False, True):
            leaves = [x.clone().requires_grad_() for _ in range(2)]
            checkpoint(fast, leaves[0], use_reentrant=reentrant).square().sum().backward()
            plain(leaves[1]).square().sum().backward()
            close(leaves[0].grad, leaves[1].grad, 1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MODELS)
def test_transforms_and_export_are_as_before(name, backend, pair):
    fast, plain = pair(name)
    x = torch.randn(2, 3, 16)
    parameters = {key: value.detach() for key, value in plain.named_parameters()}

    def gradient(model):
        return grad(lambda p: functional_call(model, p, (x,)).square().sum())(parameters)

    with use_backend(attention=backend):
        found, expected = gradient(fast), gradient(plain)
        for key, value in expected.items():
            close(found[key], value, 1e-4)
        if name != "Bert":  # transformers looks into the mask, which vmap forbids
            close(vmap(fast)(x[None])[0], plain(x))
        exported = torch.export.export(fast.eval(), (x,))
    assert not [n for n in exported.graph.nodes if n.op == "call_function" and "detr_fast" in str(n.target)]
    close(exported.module()(x), plain.eval()(x))


@pytest.mark.filterwarnings("error:Dynamo detected a call")  # of functions with a cache: transformers has none here
@pytest.mark.parametrize("name", MODELS)
def test_one_graph_under_torch_compile_with_gradients(name, pair):
    fast, plain = pair(name)
    leaves = [torch.randn(2, 3, 16).requires_grad_()]
    leaves.append(leaves[0].detach().clone().requires_grad_())
    torch._dynamo.reset()
    with use_backend(attention="sdpa"):
        y = torch.compile(fast, fullgraph=True, backend="aot_eager")(leaves[0])
    expected = plain(leaves[1])
    close(y, expected)
    for output in (y, expected):
        output.square().sum().backward()
    close(leaves[0].grad, leaves[1].grad, 1e-4)


@pytest.mark.parametrize("name", ["Table", "Timm"])
def test_meta_tensors_give_shapes(name, pair):
    fast, _ = pair(name)
    with use_backend(attention="sdpa"):
        y = fast.to("meta")(torch.empty(2, 3, 16, device="meta"))
    assert (y.shape, y.device.type) == ((2, 3, 16), "meta")


def _sharded(name):
    import torchvision
    from transformers.models.bert.modeling_bert import BertLayer
    from transformers.models.table_transformer.modeling_table_transformer import TableTransformerEncoderLayer

    if name == "torchvision":
        return torchvision.models.vision_transformer.EncoderBlock(2, 16, 24, 0.0, 0.0)
    if name == "timm":
        return timm.models.vision_transformer.Block(16, 2)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
    if name == "Bert":
        return BertLayer(transformers.BertConfig(vocab_size=5, **sizes, attn_implementation="sdpa"))
    return TableTransformerEncoderLayer(transformers.TableTransformerConfig(d_model=16, encoder_attention_heads=2))


@pytest.mark.parametrize("name", ["torchvision", "timm", "Bert", "TableTransformer"])
def test_a_layer_that_fsdp2_has_sharded_is_left_alone_with_that_reason(name):
    from torch.distributed.fsdp import FSDPModule

    pytest.importorskip("torchvision")
    layer = _sharded(name)
    kind = type(layer)
    layer.__class__ = type(f"FSDP{kind.__name__}", (FSDPModule, kind), {})  # as fully_shard does
    report = detr_fast.accelerate(layer)
    assert isinstance(layer, FSDPModule)
    assert [one.reason for one in report.left if one.name == ""] == [
        "fully_shard (FSDP2) has replaced its class: accelerate the model before it is sharded"
    ]
    assert report.switched
