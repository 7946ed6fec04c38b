"""Hugging Face's DETR layers as one host program and one node of autograd's each: to the bit what their parts do."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import detr_fast
from detr_fast import native, use_backend
from detr_fast.ops.host_program import HostProgram
from detr_fast.ops.layers import DECODER_LAYER, ENCODER_LAYER
from detr_fast.testing.accuracy import assert_close_to_truth

transformers = pytest.importorskip("transformers")
from transformers.masking_utils import bidirectional_mask_function  # noqa: E402

pytestmark = pytest.mark.interpreter
SIZES = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "num_queries": 3, "use_timm_backbone": False}
HEADS = dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2)
WIDTHS = dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 24)
DROPOUTS = dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), 0.1)
ONE = "ProgramNodeBackward"


@pytest.fixture(autouse=True)
def _no_programs():
    before = native.host
    yield
    native.use(before)
    for op in (ENCODER_LAYER, DECODER_LAYER):
        op.forget()


@pytest.fixture
def launched(monkeypatch):
    """What kernels are launched with, that is no tensor, and where its tensors lie; they do nothing, which takes no time."""
    from detr_fast.kernels import launch
    from triton.runtime.interpreter import GridExecutor

    def observe(one):
        given = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in one.arguments]
        plain = [a for a in one.arguments if not isinstance(a, torch.Tensor)]
        found.append((one.variant, one.grid, plain, given))

    found = []
    monkeypatch.setattr(GridExecutor, "__call__", lambda *_, **__: None)
    launch.observers.append(observe)
    yield found
    launch.observers.remove(observe)


def config(width=16, **options):
    backbone = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], out_features=["stage1"])
    made = transformers.DetrConfig(
        **{**SIZES, **HEADS, **WIDTHS, **DROPOUTS, **options, "d_model": width}, backbone_config=backbone
    )
    made._attn_implementation = "sdpa"
    return made


def made(kind, width=16, **options):
    """An accelerated layer in training, and a step's arguments: with padding, and positions that want gradients."""
    from detr_fast.adapters import hugging_face, table_transformer

    torch.manual_seed(1)
    models = transformers.models
    table = models.table_transformer.modeling_table_transformer
    layers = {
        "encoder": models.detr.modeling_detr.DetrEncoderLayer,
        "decoder": models.detr.modeling_detr.DetrDecoderLayer,
        "Conditional DETR's encoder": models.conditional_detr.modeling_conditional_detr.ConditionalDetrEncoderLayer,
        "Table Transformer's encoder": table.TableTransformerEncoderLayer,
        "Table Transformer's decoder": table.TableTransformerDecoderLayer,
        "RT-DETR's encoder": models.rt_detr.modeling_rt_detr.RTDetrEncoderLayer,
    }
    settings = config(width, **options)
    settings.encoder_hidden_dim, settings.num_attention_heads = width, 2  # as RT-DETR's calls them
    settings.normalize_before, settings.layer_norm_eps, settings.encoder_activation_function = False, 1e-5, "silu"
    layer = layers[kind](settings).train()
    detr_fast.accelerate(layer)
    x, queries, memory, positions = (torch.randn(2, n, width, requires_grad=True) for n in (3, 3, 4, 4))
    visible = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    length = 3 if "decoder" in kind else 4
    mask = table_transformer.mask if "Table" in kind else hugging_face.mask
    padded = mask(2, length, 4, mask_function=bidirectional_mask_function, attention_mask=visible)
    if "encoder" in kind:
        return layer, (memory, padded, positions)
    return layer, (x, None, positions, queries, memory, padded)


def step(layer, arguments, seed=3, **context):
    torch.manual_seed(seed)
    with torch.autocast("cpu", torch.bfloat16, enabled=context.pop("autocast", False)), use_backend("triton"):
        y = layer(*arguments, **context)
    y = y[0] if isinstance(y, tuple) else y  # as Table Transformer's gives it
    dy = torch.linspace(-1, 1, y.numel()).view_as(y)
    leaves = [t for t in (*arguments, *layer.parameters()) if t is not None and t.requires_grad]
    found = torch.autograd.grad(y, leaves, dy, allow_unused=True)
    return y.grad_fn.name(), [y, *(g for g in found if g is not None)]


def same(one, other):
    return len(one) == len(other) and all(map(torch.equal, one, other))


@pytest.mark.parametrize(
    ("kind", "way"),
    [
        ("Conditional DETR's encoder", "compiled"),
        ("RT-DETR's encoder", "autocast"),
        ("decoder", "from Python"),
        ("Table Transformer's encoder", "from Python"),
        ("Table Transformer's decoder", "compiled"),
    ],
)
def test_a_layer_is_one_node_that_launches_and_gives_what_its_parts_do_to_the_bit(kind, way, request, interpreter):
    native.use(request.getfixturevalue("host") if way == "compiled" else None)
    layer, arguments = made(kind)
    steps, launches = [], []
    for _ in range(3):  # by its parts, recorded, and once more
        interpreter.launches.clear()
        steps.append(step(layer, arguments, autocast=way == "autocast"))
        launches.append(interpreter.counts())
    assert [name == ONE for name, _ in steps] == [False, True, True]
    assert all(same(found, steps[0][1]) for _, found in steps[1:])
    assert launches[2] == launches[0] != {}


@pytest.mark.parametrize("kind", ["encoder", "decoder", "Table Transformer's decoder"])
def test_a_layer_in_parts_of_kernels_is_as_accurate_as_transformers_own(kind, interpreter):
    """At a width whose position is added inside the projection."""
    layer, arguments = made(kind, 64, dropout=0.0, attention_dropout=0.0, activation_dropout=0.0)

    def results(dtype, backend="auto"):
        given = [t.detach().to(dtype).requires_grad_() if t is not None and t.requires_grad else t for t in arguments]
        twin = copy.deepcopy(layer).to(dtype)
        if backend == "auto":
            detr_fast.restore(twin)
        with use_backend(backend):
            y = twin(*given)
        y = y[0] if isinstance(y, tuple) else y
        leaves = {str(i): t for i, t in enumerate(given) if t is not None and t.requires_grad}
        leaves |= dict(twin.named_parameters())
        dy = torch.linspace(-1, 1, y.numel(), dtype=dtype).view_as(y)
        return {"output": y, **dict(zip(leaves, torch.autograd.grad(y, [*leaves.values()], dy)))}

    truth, eager = results(torch.float64), results(torch.float32)
    ours = results(torch.float32, "triton")
    assert interpreter.counts()["linear_norm_kernel"] == {"encoder": 2}.get(kind, 3)
    for name, expected in truth.items():
        if expected.abs().max() > 1e-9:  # keys' biases cancel in softmax: their gradient is rounding
            assert_close_to_truth(name, ours[name], eager[name], expected)


TABLE = "Table Transformer's encoder"


def block_of(layer):
    """The module that holds the parts of the feed-forward block: Table Transformer's layers do themselves."""
    return getattr(layer, "mlp", layer)


def change(layer, what):
    if what in ("dropout", "activation_dropout"):
        setattr({"dropout": layer, "activation_dropout": block_of(layer)}[what], what, 0.5)
    elif what == "attention_dropout":
        setattr(layer.self_attn, what if hasattr(layer.self_attn, what) else "dropout", 0.5)
    elif what == "output dropout":
        layer.mlp.dropout = 0.5
    elif what == "eps":
        layer.final_layer_norm.eps = 0.1
    elif what == "eval":
        layer.eval()
    elif what == "the block's mode":
        layer.mlp.eval()
    elif what == "frozen":
        block_of(layer).fc1.weight.requires_grad_(False)
    else:
        block_of(layer).activation_fn = torch.nn.GELU()


CHANGES = [
    "dropout",
    "attention_dropout",
    "activation_dropout",
    "output dropout",
    "eps",
    "eval",
    "the block's mode",
    "frozen",
    "activation",
]


def launches_of(launched, layer, arguments):
    """Of a step: its node, and what kernels were given besides tensors, and how many gradients there are."""
    launched.clear()
    name, found = step(layer, arguments)
    return name, ([one[:3] for one in launched], len(found))


IN_TABLE = ("dropout", "attention_dropout", "activation_dropout", "eps", "activation")


@pytest.mark.parametrize(("kind", "what"), [*(("encoder", w) for w in CHANGES), *((TABLE, w) for w in IN_TABLE)])
def test_a_layer_that_changed_gets_a_program_of_its_own(kind, what, launched):
    native.use(None)
    layer, arguments = made(kind)
    before = [launches_of(launched, layer, arguments) for _ in range(3)][2]
    change(layer, what)
    steps = [launches_of(launched, layer, arguments) for _ in range(3)]
    assert [before[0] == ONE, *(name == ONE for name, _ in steps)] == [True, False, True, True]
    assert steps[0][1] == steps[2][1] != before[1]


def test_a_weight_in_anothers_place_is_what_the_program_then_reads(launched):
    native.use(None)
    layer, arguments = made("encoder")
    for _ in range(2):
        step(layer, arguments)
    layer.mlp.fc1.weight = torch.nn.Parameter(torch.randn(24, 16))
    launched.clear()
    assert step(layer, arguments)[0] == ONE
    assert any(layer.mlp.fc1.weight.data_ptr() in one[3] for one in launched)


def disturb(layer, what, monkeypatch):
    """Let somebody look at a part, or have a say in what it is."""
    attention = layer.self_attn
    if what == "a hook":
        attention.register_forward_hook(lambda *_: None)
    elif what == "a product's hook":
        block_of(layer).fc2.register_forward_pre_hook(lambda *_: None)
    elif what == "LoRA":
        attention.v_proj.__class__ = type("LoraLinear", (torch.nn.Linear,), {})
    elif what == "a forward":
        attention.forward = attention.forward
    elif what == "another scale":
        attention.scaling *= 2
    elif what == "another attention":
        attention.config._attn_implementation = "sdpa"
    elif what == "restored attention":
        detr_fast.restore(attention)
    elif what == "restored block":
        detr_fast.restore(layer.mlp)
    elif what == "another function of that name":
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        function = ALL_ATTENTION_FUNCTIONS["detr_fast"]
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "detr_fast", lambda *a, **k: function(*a, **k))
    else:
        forward = type(attention).forward
        monkeypatch.setattr(type(attention), "forward", lambda self, *a, **k: forward(self, *a, **k))


LOOKS = [
    "a hook",
    "a product's hook",
    "LoRA",
    "a forward",
    "another scale",
    "another attention",
    "restored attention",
    "restored block",
    "another function of that name",
    "another forward of its class",
]


AT_TABLE = ("a hook", "a product's hook", "LoRA", "a forward", "another scale")


@pytest.mark.parametrize(("kind", "what"), [*(("encoder", w) for w in LOOKS), *((TABLE, w) for w in AT_TABLE)])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_layer_whose_parts_somebody_looks_at_or_replaces_runs_them(
    kind, what, compiled, request, monkeypatch, launched
):
    native.use(request.getfixturevalue("host") if compiled else None)
    layer, arguments = made(kind)
    for _ in range(3):
        name, _ = step(layer, arguments)
    assert name == ONE
    disturb(layer, what, monkeypatch)
    for _ in range(2):
        assert step(layer, arguments)[0] != ONE


class Quantised(torch.Tensor):
    """A weight that can't be joined with others, as quantised ones can't."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.cat:
            raise NotImplementedError("no cat of quantised weights")
        if function is torch.nn.functional.linear:
            args = [a.as_subclass(torch.Tensor) if isinstance(a, cls) else a for a in args]
            return function(*args, **(kwargs or {}))
        return super().__torch_function__(function, types, args, kwargs)


@pytest.mark.parametrize("name", ["q_proj", "o_proj"])
@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_weights_that_are_no_plain_tensors_are_left_to_the_attention(kind, name, launched):
    layer, arguments = made(kind)
    projection = getattr(layer.self_attn, name)
    weight = projection.weight.detach()
    with torch.no_grad(), use_backend("triton"):
        layer(*arguments)
        projection.weight = torch.nn.Parameter(weight.as_subclass(Quantised), requires_grad=False)
        for _ in range(3):
            layer(*arguments)


def test_what_is_passed_on_to_the_parts_reaches_them(launched):
    layer, arguments = made("encoder")
    seen = []
    for _ in range(2):
        step(layer, arguments)
    assert step(layer, arguments, output_hidden_states=True)[0] != ONE
    layer.self_attn.register_forward_pre_hook(lambda *given: seen.append(given[2]), with_kwargs=True)
    step(layer, arguments, output_hidden_states=True)
    assert seen[0]["output_hidden_states"] is True


def test_what_transformers_captures_is_captured():
    """Its hooks lie on the layers, whose output they see, and, once any output was asked for, on their attentions."""
    torch.manual_seed(1)
    model = transformers.models.detr.modeling_detr.DetrEncoder(config()).train()
    detr_fast.accelerate(model)
    x, position = torch.randn(2, 1, 4, 16)
    given = {"inputs_embeds": x, "attention_mask": None, "spatial_position_embeddings": position}
    found = []
    with use_backend("triton"):
        for options in ({}, {}, {"output_hidden_states": True}):
            torch.manual_seed(3)
            found.append(model(**given, **options))
    y = found[0].last_hidden_state
    assert all(torch.equal(one.last_hidden_state, y) for one in found)
    assert [one.last_hidden_state.grad_fn.name() == ONE for one in found] == [False, True, False]
    assert found[2].hidden_states[1] is found[2].last_hidden_state


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_layer_gives_the_gradients_that_it_gave(reentrant):
    layer, arguments = made("encoder")
    for _ in range(2):
        _, expected = step(layer, arguments)
    layer.gradient_checkpointing = True
    layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=reentrant)
    torch.manual_seed(3)
    with use_backend("triton"):
        y = layer(*arguments)
        y.backward(torch.linspace(-1, 1, y.numel()).view_as(y))
    assert same([y, arguments[0].grad, arguments[2].grad, *(p.grad for p in layer.parameters())], expected)


def test_the_double_backward_is_the_parts_own():
    layer, arguments = made("encoder")
    leaves = [t for t in arguments if t is not None and t.requires_grad]

    def twice():
        torch.manual_seed(3)
        y = layer(*arguments)
        (dx,) = torch.autograd.grad(y.square().sum(), leaves[0], create_graph=True)
        return y.grad_fn.name(), dx, *torch.autograd.grad(dx.square().sum(), [*leaves, layer.mlp.fc1.weight])

    with use_backend("triton"):
        first, *expected = twice()
        name, *found = twice()
        assert (first != ONE, name) == (True, ONE)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        y = layer(*arguments)
        layer.self_attn.attention_dropout = 0.0
        with pytest.raises(RuntimeError, match="changed between its forward and a backward with create_graph=True"):
            torch.autograd.grad(y.square().sum(), leaves, create_graph=True)


def test_layers_that_are_alike_share_a_program(launched):
    first, arguments = made("encoder")
    second, _ = made("encoder")
    step(first, arguments)
    assert step(second, arguments)[0] == ONE
    assert [type(one) for one in ENCODER_LAYER.programs.values()] == [HostProgram]
