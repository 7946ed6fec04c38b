from __future__ import annotations

import pytest
import torch
from torch import nn as torch_nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from detr_fast import nn, use_backend
from detr_fast.dispatch import BackendError
from detr_fast.models.transformer import Transformer
from detr_fast.nn.blocks import activation_name
from detr_fast.nn.fusion import followed, norms_ahead
from detr_fast.nn.memory import shared_memory
from detr_fast.testing import count
from tests.layer_stacks import decoders, stacks

FUSED = {"feed_forward": "triton", "linear_add_layer_norm": "triton", "attention": "sdpa"}
KERNELS = {**FUSED, "attention": "triton", "qkv_projection": "triton"}
interpreter = pytest.mark.interpreter
PADDING = torch.tensor([[False] * 4, [False, False, True, True]])


class Unhashable:
    __hash__ = None  # as a dataclass has it

    def __call__(self, x):
        return x.clamp(min=0.0)


def pair(name, **options):
    """One of our layers and torch.nn's with the same parameters."""
    settings = {"d_model": 16, "nhead": 2, "dim_feedforward": 24, "dropout": 0.0, "batch_first": True, **options}
    ours, original = getattr(nn, name)(**settings), getattr(torch_nn, name)(**settings)
    ours.load_state_dict(original.state_dict())
    return ours, original


def gradients(module, inputs, backend=None, **masks):
    leaves = [t.clone().requires_grad_() for t in inputs]
    if backend is None:
        y = module(*leaves, **masks)
    else:
        with use_backend(**backend):
            y = module(*leaves, **masks)
    torch.manual_seed(5)
    return y, torch.autograd.grad(y, [*leaves, *module.parameters()], torch.randn_like(y))


@interpreter
@pytest.mark.parametrize("name", ["TransformerEncoderLayer", "TransformerDecoderLayer"])
@pytest.mark.parametrize(
    "options", [{}, {"batch_first": False, "activation": "gelu"}, {"bias": False}, {"norm_first": True}], ids=str
)
def test_fused_layers_are_torch_nns(name, options):
    ours, original = pair(name, **options)
    shape = (2, 4, 16) if ours.self_attn.batch_first else (4, 2, 16)
    inputs = [torch.randn(shape) for _ in range(1 if "Encoder" in name else 2)]
    masks = {"src_key_padding_mask" if "Encoder" in name else "memory_key_padding_mask": PADDING}
    y, found = gradients(ours, inputs, FUSED, **masks)
    expected, right = gradients(original, inputs, **masks)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    for one, other in zip(found, right):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@interpreter
@pytest.mark.parametrize(
    ("name", "batch_first"), [("TransformerEncoderLayer", False), ("TransformerDecoderLayer", True)]
)
def test_layers_whose_attention_and_projections_are_kernels_are_torch_nns(name, batch_first):
    ours, original = pair(name, batch_first=batch_first)
    inputs = [torch.randn(2, 4, 16) if batch_first else torch.randn(4, 2, 16) for _ in range(1 + ("Decoder" in name))]
    masks = {"src_key_padding_mask" if "Encoder" in name else "memory_key_padding_mask": PADDING}
    y, found = gradients(ours, inputs, KERNELS, **masks)
    expected, right = gradients(original, inputs, **masks)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    for one, other in zip(found, right):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@interpreter
@pytest.mark.parametrize("backend", [FUSED, KERNELS], ids=["products", "kernels"])
def test_fused_detr_is_the_same_detr(backend):
    torch.manual_seed(2)
    model = Transformer(64 if backend is KERNELS else 16, 2, 1, 2, 24, dropout=0.0)
    inputs = [torch.randn(2, 4, model.d_model), torch.randn(1, 4, model.d_model), torch.randn(3, model.d_model)]
    y, found = gradients(model, inputs, backend, key_padding_mask=PADDING)
    expected, right = gradients(model, inputs, key_padding_mask=PADDING)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    for one, other in zip(found, right):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def kernels(layer, *inputs):
    counts = count(layer, *inputs)
    return {name for name in counts.launches if not name.startswith("aten")}


def spoil_hook(layer):
    layer.linear1.register_forward_hook(lambda *_: None)


def spoil_class(layer):
    layer.linear1.__class__ = type("LoRA", (torch_nn.Linear,), {})


def spoil_parametrisation(layer):
    torch_nn.utils.parametrizations.weight_norm(layer.linear1)


def spoil_forward(layer):
    layer.linear1.forward = layer.linear1.forward


def spoil_activation(layer):
    layer.activation = torch.tanh


@pytest.mark.parametrize(
    "spoil", [spoil_hook, spoil_class, spoil_parametrisation, spoil_forward, spoil_activation], ids=lambda f: f.__name__
)
def test_a_part_that_is_not_the_expected_class_is_called_itself(spoil):
    layer, x = pair("TransformerEncoderLayer")[0].to("meta"), torch.randn(2, 4, 16, device="meta")
    with use_backend(**FUSED):
        assert kernels(layer, x) == {"linear_kernel", "linear_norm_kernel"}
        spoil(layer)
        assert kernels(layer, x) == {"linear_norm_kernel"}


def test_rows_that_fit_no_tile_meet_their_residual_and_norm_in_one_kernel():
    layer = pair("TransformerEncoderLayer", d_model=512)[0].to("meta")
    x = torch.randn(2, 4, 512, device="meta")
    with use_backend("triton", attention="sdpa"):
        assert kernels(layer, x) == {"linear_kernel", "add_layer_norm_forward_kernel"}
    with use_backend(linear_add_layer_norm="triton"), pytest.raises(BackendError, match="512 columns"):
        layer(x)


@interpreter
def test_a_block_that_the_sum_broadcasts_is_torch_nns():
    ours, original = pair("TransformerEncoderLayer", norm_first=True)
    for layer in (ours, original):
        torch.manual_seed(1)
        layer.linear2 = torch_nn.Linear(24, 1)
    x = torch.randn(2, 4, 16)
    with use_backend(add_layer_norm="triton", layer_norm="triton"):
        torch.testing.assert_close(ours(x), original(x))
    ours.norm_first = original.norm_first = False
    with use_backend(add_layer_norm="triton"):
        torch.testing.assert_close(ours(x), original(x))


def test_who_asks_for_another_norm_by_name_gets_it():
    layer, x = pair("TransformerEncoderLayer")[0].to("meta"), torch.randn(2, 4, 16, device="meta")
    with use_backend(**FUSED, layer_norm="eager"):
        assert kernels(layer, x) == set()


def test_unmeasured_gpus_run_the_parts(unmeasured):
    with FakeTensorMode():
        layer = nn.TransformerEncoderLayer(16, 2, 24, device="cuda")
        assert kernels(layer, torch.randn(2, 4, 16, device="cuda")) == set()


@pytest.mark.parametrize(
    ("activation", "name"),
    [
        (torch.nn.functional.relu, "relu"),
        (torch_nn.GELU("tanh"), "gelu_tanh"),
        (torch_nn.GELU(), "gelu"),
        (torch_nn.SiLU(), "silu"),
        (torch_nn.ReLU(), "relu"),
        (torch_nn.Tanh(), None),
        (torch.sin, None),
        (Unhashable(), None),
    ],
)
def test_activations_are_known_by_function_or_module(activation, name):
    assert activation_name(activation) == name


def step(layer, inputs, backend):
    """Launches of forward and of backward, without the draw of the step's seed, and bytes kept for backward."""
    with use_backend(**backend):
        forward = count(layer, *inputs)
        for leaf in (*inputs, *layer.parameters()):
            leaf.grad = None  # an accumulation into what is there would count
        both = count(lambda *a: layer(*a).backward(torch.empty_like(a[0])), *inputs)
    seeds = sum(n for name, n in forward.launches.items() if "randint" in name)
    ahead = forward.total_launches - seeds
    return ahead, both.total_launches - forward.total_launches, forward.saved_bytes


OPTIONS = {"d_model": 256, "nhead": 8, "dim_feedforward": 2048, "dropout": 0.1, "batch_first": True, "device": "meta"}
FEWEST = {"feed_forward": "triton", "linear_add_layer_norm": "triton", "attention": "triton"}


@pytest.mark.parametrize(
    ("name", "norm_first", "forward", "backward"),
    [
        ("TransformerEncoderLayer", False, 5, 15),
        ("TransformerDecoderLayer", False, 9, 29),
        ("TransformerEncoderLayer", True, 6, 17),  # by itself: the norm before it as well
        ("TransformerDecoderLayer", True, 10, 31),
    ],
)
def test_a_fused_layer_takes_few_launches_and_keeps_little(name, norm_first, forward, backward):
    ours, original = (getattr(source, name)(**OPTIONS, norm_first=norm_first) for source in (nn, torch_nn))
    inputs = [torch.randn(2, 500, 256, device="meta", requires_grad=True) for _ in range(1 if "Encoder" in name else 2)]
    eager, fused = step(original, inputs, {}), step(ours, inputs, FEWEST)
    recomputing, one = (
        step(ours, inputs, FEWEST | {"feed_forward": f"triton_{n}"}) for n in ("recompute", "one_kernel")
    )
    assert fused[:2] == (forward, backward)
    assert recomputing[:2] == (forward, backward)
    assert one[:2] == (forward - 1, backward)
    assert one[2] == recomputing[2]
    assert forward + backward < 0.55 * sum(eager[:2])
    assert fused[2] <= 0.61 * eager[2]
    assert recomputing[2] <= 0.38 * eager[2]


@pytest.mark.parametrize(("name", "forward", "backward"), [("Encoder", 5, 15), ("Decoder", 8, 24)])
def test_a_pre_norm_layer_in_a_stack_launches_no_more_than_a_post_norm_one(name, forward, backward):
    def stack(layers):
        layer = getattr(nn, f"Transformer{name}Layer")(**OPTIONS, norm_first=True)
        model = getattr(nn, f"Transformer{name}")(layer, layers, nn.LayerNorm(256, device="meta"))
        inputs = [torch.randn(2, 500, 256, device="meta", requires_grad=True) for _ in range(1 + (name == "Decoder"))]
        return step(model, inputs, FEWEST)

    # A decoder's layers share one product for the memory's keys and values.
    assert [more - few for few, more in zip(stack(3)[:2], stack(4)[:2])] == [forward, backward]


@interpreter
@pytest.mark.parametrize("options", [{}, {"batch_first": False}, {"bias": False}], ids=str)
def test_a_memory_that_is_projected_for_all_layers_gives_torch_nns_gradients(options):
    ours, original = decoders(**options)
    shapes = [(2, 3, 16), (2, 4, 16)] if options.get("batch_first", True) else [(3, 2, 16), (4, 2, 16)]
    inputs = [torch.randn(s) for s in shapes]
    y, found = gradients(ours, inputs, KERNELS | {"attention": "sdpa"}, memory_key_padding_mask=PADDING)
    expected, right = gradients(original, inputs, memory_key_padding_mask=PADDING)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    for one, other in zip(found, right):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def products(model, *inputs):
    with use_backend(feed_forward="triton", linear_add_layer_norm="triton", attention="triton"):
        return count(model, *inputs).launches["aten.addmm.default"]


def test_a_decoders_memory_is_projected_in_one_product():
    ours = decoders()[0].to("meta")
    inputs = torch.randn(2, 3, 16, device="meta"), torch.randn(2, 4, 16, device="meta")
    assert products(ours, *inputs) == 2 * 3 + 1  # two a layer for its own stream
    ours.layers[1].multihead_attn.__class__ = type("LoRA", (nn.MultiheadAttention,), {})
    assert products(ours, *inputs) > 2 * 3 + 1


def test_what_a_memorys_projection_joins_gets_its_gradients_in_one_launch_and_its_own_in_one_more():
    class Dimensions(TorchDispatchMode):
        found = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.stack.default:
                self.found = args[0][0].ndim + 1  # PyTorch has one launch for up to four
            return func(*args, **(kwargs or {}))

    ours = decoders()[0].to("meta")
    inputs = torch.randn(2, 3, 16, device="meta"), torch.randn(2, 4, 16, device="meta", requires_grad=True)
    with use_backend(**FEWEST), Dimensions() as stack:
        forward, both = count(ours, *inputs), count(lambda *a: ours(*a).sum().backward(), *inputs)
    backward = both.launches - forward.launches
    assert (forward.launches["aten.cat.default"], backward["aten.cat.default"]) == (2, 0)
    assert (backward["aten._foreach_copy_.default"], backward["aten.stack.default"]) == (1, 1)
    assert stack.found == 3


def test_a_frozen_layer_that_shares_its_memory_has_no_backward():
    ours = decoders()[0].to("meta")
    inputs = torch.randn(2, 3, 16, device="meta"), torch.randn(2, 4, 16, device="meta")

    def backward():
        with use_backend(**FEWEST):
            forward, both = count(ours, *inputs), count(lambda *a: ours(*a).sum().backward(), *inputs)
        launches = both.launches - forward.launches
        return sum(n for name, n in launches.items() if name.startswith("attention_backward"))

    all_trained = backward()
    ours.layers[0].requires_grad_(False)
    assert backward() == all_trained // 3 * 2 > 0


def test_a_checkpointed_layer_projects_the_memory_by_itself():
    layer = pair("TransformerDecoderLayer")[0].to("meta")
    x, memory = (torch.randn(2, n, 16, device="meta", requires_grad=True) for n in (3, 4))

    def run(x, memory):
        with shared_memory([layer.multihead_attn, decoders()[0].layers[0].multihead_attn.to("meta")], memory):
            return checkpoint(layer, x, memory, use_reentrant=False)

    with use_backend(feed_forward="triton", linear_add_layer_norm="triton", attention="triton"):
        run(x, memory).sum().backward()
    assert products(run, x, memory) == 3


PRE_NORM = FUSED | {"add_layer_norm": "triton"}


@interpreter
@pytest.mark.parametrize("name", ["Encoder", "Decoder"])
def test_pre_norm_stacks_are_torch_nns(name):
    ours, original = stacks(name)
    inputs = [torch.randn(2, 4, 16) for _ in range(1 if name == "Encoder" else 2)]
    masks = {"src_key_padding_mask" if name == "Encoder" else "memory_key_padding_mask": PADDING}
    y, found = gradients(ours, inputs, PRE_NORM, **masks)
    expected, right = gradients(original, inputs, **masks)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    for one, other in zip(found, right):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


@interpreter
def test_pre_norm_detr_is_the_same_detr():
    torch.manual_seed(2)
    model = Transformer(16, 2, 2, 2, 24, dropout=0.0, pre_norm=True)
    inputs = [torch.randn(2, 4, 16), torch.randn(1, 4, 16), torch.randn(3, 16)]
    y, found = gradients(model, inputs, PRE_NORM, key_padding_mask=PADDING)
    expected, right = gradients(model, inputs, key_padding_mask=PADDING)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    for one, other in zip(found, right):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("backend", "kernel"),
    [
        ({"add_layer_norm": "triton", "attention": "triton"}, "add_layer_norm_forward_kernel"),
        (KERNELS, "linear_norm_kernel"),
    ],
    ids=["norms", "products"],
)
def test_a_pre_norm_stack_takes_each_sum_with_the_norm_behind_it(backend, kernel):
    ours = stacks("Encoder", layers=3, dropout=0.1)[0].to("meta")
    x = torch.randn(2, 4, 16, device="meta", requires_grad=True)
    with use_backend(**backend, layer_norm="triton"):
        launches = count(ours, x).launches
    assert launches[kernel] == 2 * 3
    assert launches["layer_norm_forward_kernel"] == 1  # the very first
    assert launches["aten.add.Tensor"] == 0
    assert launches["aten.native_dropout.default"] == (0 if backend is KERNELS else 3)  # the hidden activation's


def test_a_norm_with_a_hook_is_called_and_its_output_counts():
    ours, original = (stack.train(False) for stack in stacks("Encoder", dropout=0.0))
    seen = []
    for stack in (ours, original):
        stack.layers[1].norm1.register_forward_hook(lambda module, inputs, output: seen.append(output) or output * 2)
    x = torch.randn(2, 4, 16)
    with use_backend(attention="sdpa"):
        torch.testing.assert_close(ours(x), original(x), rtol=1e-4, atol=1e-4)
    assert len(seen) == 2


def test_a_checkpointed_pre_norm_layer_takes_no_norm_ahead():
    stack = stacks("Encoder")[0].to("meta")
    x = torch.randn(2, 4, 16, device="meta", requires_grad=True)
    first, second = stack.layers

    def run(x):
        with norms_ahead([(first, second.norm1)]):
            return second(checkpoint(first, x, use_reentrant=False))

    with use_backend("triton"):
        run(x).sum().backward()
        assert count(run, x).launches["layer_norm_forward_kernel"] == 2


def test_only_a_pre_norm_layer_that_occurs_once_before_another_has_its_norm_taken_ahead():
    first, second, post = (
        nn.TransformerEncoderLayer(16, 2, 32, norm_first=pre_norm) for pre_norm in (True, True, False)
    )
    last = nn.LayerNorm(16)
    assert followed([first, second], last) == [(first, second.norm1), (second, last)]
    assert followed([first, second, first], last) == [(second, first.norm1)]
    assert followed([first, post, second], last) == [(second, last)]
