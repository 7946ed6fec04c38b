"""The modes and transforms that modules are run under: torch.nn's outcome in each."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn as torch_nn
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from detr_fast import use_backend
from detr_fast.explanation import explaining
from detr_fast.nn import stand_ins

NAMES = [
    "LayerNorm",
    "RMSNorm",
    "MultiheadAttention",
    "TransformerEncoderLayer",
    "TransformerDecoderLayer",
    "Transformer",
]
BACKENDS = ["auto", "sdpa", "eager"]


@pytest.fixture
def pair(twins):
    """Both modules in fp32, as functions of (x, memory) that return one tensor."""

    def make(name):
        options = {"d_model": 8, "nhead": 2, "dim_feedforward": 12, "dropout": 0.0, "batch_first": True}
        arguments = {
            "LayerNorm": {"normalized_shape": 8},
            "RMSNorm": {"normalized_shape": 8},
            "MultiheadAttention": {"embed_dim": 8, "num_heads": 2, "batch_first": True},
            "Transformer": {**options, "num_encoder_layers": 1, "num_decoder_layers": 1},
        }.get(name, options)
        ours, original = twins(name, dtype=torch.float32, **arguments)
        return Call(ours), Call(original)

    return make


class Call(torch_nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x, memory):
        if isinstance(self.module, torch_nn.MultiheadAttention):
            return self.module(x, memory, memory)[0]
        takes_two = isinstance(self.module, (torch_nn.Transformer, torch_nn.TransformerDecoderLayer))
        return self.module(x, memory) if takes_two else self.module(x)


def inputs(**kwargs):
    return torch.randn(2, 3, 8, **kwargs), torch.randn(2, 4, 8, **kwargs)


def close(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("name", "backend"),
    [*((name, "auto") for name in NAMES), ("MultiheadAttention", "eager"), ("TransformerEncoderLayer", "sdpa")],
)
def test_torch_compile_takes_one_graph(name, backend, pair):
    ours, original = pair(name)
    x, memory = inputs(requires_grad=True)
    torch._dynamo.reset()
    with use_backend(attention=backend):
        y = torch.compile(ours, fullgraph=True, backend="aot_eager")(x, memory)
    expected = original(x, memory)
    close(y, expected)
    gradients = [torch.autograd.grad(output.square().sum(), (x, memory), allow_unused=True) for output in (y, expected)]
    for mine, theirs in zip(*gradients):
        assert (mine is None) == (theirs is None)
        if theirs is not None:
            close(mine, theirs, 1e-4)


def test_a_compiled_module_notices_use_backend(pair):
    ours, _ = pair("LayerNorm")
    x, memory = inputs()
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    expected = ours(x, memory)
    for backend in ("auto", "eager", "auto"):
        with use_backend(layer_norm=backend):
            close(compiled(x, memory), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_autocast_gives_torch_nns_dtype_and_values(name, backend, pair):
    ours, original = pair(name)
    x, memory = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        expected = original(x, memory)
        with use_backend(attention=backend):
            found = ours(x, memory)
    assert found.dtype == expected.dtype
    close(found, expected, 2e-2)  # bf16 has 8 bits


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", NAMES)
def test_inference_gives_torch_nns_values(name, mode, backend, pair):
    ours, original = pair(name)
    x, memory = inputs()
    for training in (True, False):
        ours.train(training), original.train(training)
        with mode():
            expected = original(x, memory)
            with use_backend(attention=backend):
                found = ours(x, memory)
        assert found.is_inference() == expected.is_inference()
        close(found, expected)


@pytest.mark.parametrize("name", NAMES)
def test_meta_tensors_give_shapes(name, pair):
    ours, original = (m.to("meta") for m in pair(name))
    found = ours(*inputs(device="meta"))
    expected = original(*inputs(device="meta"))
    assert (found.shape, found.dtype, found.device) == (expected.shape, expected.dtype, expected.device)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_activation_checkpointing_gives_the_same_gradients(name, backend, reentrant, pair):
    ours, _ = pair(name)
    x, memory = inputs(requires_grad=True)
    with use_backend(attention=backend):
        plain = torch.autograd.grad(ours(x, memory).square().sum(), list(ours.parameters()))
        checkpoint(ours, x, memory, use_reentrant=reentrant).square().sum().backward()
    for parameter, expected in zip(ours.parameters(), plain):
        close(parameter.grad, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_vmap_of_grad_gives_gradients_for_each_sample(name, backend, pair):
    ours, _ = pair(name)
    x, memory = torch.randn(3, 2, 3, 8), torch.randn(3, 2, 4, 8)
    parameters = {key: value.detach() for key, value in ours.named_parameters()}

    def loss(parameters, x, memory):
        return functional_call(ours, parameters, (x, memory)).square().sum()

    with use_backend(attention=backend):
        found = vmap(grad(loss), (None, 0, 0))(parameters, x, memory)
        for index in range(3):
            expected = grad(loss)(parameters, x[index], memory[index])
            for key, value in expected.items():
                close(found[key][index], value, 1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_gradients_and_tangents_of_the_input_are_torch_nns(name, backend, pair):
    ours, original = pair(name)
    x, memory = inputs()
    tangent = torch.randn_like(x)
    stand_ins._known.cache_clear()  # whose tensors were made outside of transforms by whoever came before

    def derivatives(module):
        gradient = grad(lambda t: module(t, memory).square().sum())(x)
        return gradient, jvp(lambda t: module(t, memory), (x,), (tangent,))

    with use_backend(attention=backend), sdpa_kernel(SDPBackend.MATH):  # the others know no forward mode
        close(derivatives(ours), derivatives(original), 1e-4)


def test_an_ensemble_runs_as_one_vmapped_module(pair):
    models = [pair("TransformerEncoderLayer")[0] for _ in range(3)]
    parameters, buffers = stack_module_state(models)
    base = copy.deepcopy(models[0]).to("meta")
    x, memory = inputs()
    found = vmap(lambda p, b: functional_call(base, (p, b), (x, memory)))(parameters, buffers)
    close(found, torch.stack([model(x, memory) for model in models]))


@pytest.mark.parametrize("name", ["LayerNorm", "TransformerEncoderLayer"])
def test_records_are_made_under_transforms_too(name, pair):
    ours, _ = pair(name)
    x, memory = torch.randn(3, 2, 3, 8), torch.randn(3, 2, 4, 8)
    expected = vmap(ours)(x, memory)
    with explaining(ours) as records:
        close(vmap(ours)(x, memory), expected)
    assert {r.op for r in records} >= {"layer_norm" if name == "LayerNorm" else "add_layer_norm"}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_torch_export_takes_pytorchs_own_ops(name, backend, pair):
    ours, _ = pair(name)
    arguments = inputs()
    with use_backend(attention=backend):
        exported = torch.export.export(ours.eval(), arguments)
    targets = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert not [target for target in targets if "detr_fast" in target]
    close(exported.module()(*arguments), ours(*arguments))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_other_dtypes_give_torch_nns_dtype_and_values(name, backend, dtype, pair):
    ours, original = (m.to(dtype) for m in pair(name))
    x, memory = inputs(dtype=dtype)
    with use_backend(attention=backend):
        found = ours(x, memory)
    expected = original(x, memory)
    assert found.dtype == expected.dtype == dtype
    close(found, expected, {torch.float64: 1e-11, torch.bfloat16: 6e-2, torch.float16: 8e-3}[dtype])


def test_a_tensor_subclass_runs_on_pytorchs_own_ops(pair):
    class Tagged(torch.Tensor):
        pass

    ours, original = pair("TransformerEncoderLayer")
    x, memory = inputs()
    with use_backend(attention="sdpa"):
        found = ours(x.as_subclass(Tagged), memory)
    assert type(found) is Tagged
    close(found.as_subclass(torch.Tensor), original(x, memory))


def test_double_backward_is_torch_nns(pair):
    ours, original = pair("TransformerEncoderLayer")
    x, memory = inputs()

    def second(module, backend):
        leaf = x.clone().requires_grad_()
        with use_backend(attention=backend):
            (first,) = torch.autograd.grad(module(leaf, memory).square().sum(), leaf, create_graph=True)
        return torch.autograd.grad(first.square().sum(), leaf)[0]

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # the fused kernels have none
        close(second(ours, "sdpa"), second(original, "auto"), 1e-3)
        close(second(ours, "eager"), second(original, "auto"), 1e-3)
