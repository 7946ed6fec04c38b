from __future__ import annotations

import copy
import io
import itertools

import pytest
import torch
from torch import nn as torch_nn

import detr_fast
from detr_fast import nn, use_backend
from detr_fast.nn.replacements import REPLACEMENTS

NAMES = [c.__name__ for c in REPLACEMENTS]
LAYER = {"d_model": 16, "nhead": 4, "dim_feedforward": 24, "dropout": 0.0}


def twins(name, *args, **kwargs):
    """Ours and torch's with the same weights."""
    torch.manual_seed(1)
    theirs = getattr(torch_nn, name)(*args, **kwargs)
    torch.manual_seed(1)
    ours = getattr(nn, name)(*args, **kwargs)
    return ours, theirs


def build(name, batch_first=True):
    if name == "LayerNorm":
        return twins(name, 16)
    if name == "MultiheadAttention":
        return twins(name, 16, 4, batch_first=batch_first)
    if name == "Transformer":
        return twins(name, 16, 4, 2, 2, 24, 0.0, batch_first=batch_first)
    if name.endswith("Layer"):
        return twins(name, **LAYER, batch_first=batch_first)
    layer = {"TransformerEncoder": "TransformerEncoderLayer", "TransformerDecoder": "TransformerDecoderLayer"}[name]
    torch.manual_seed(1)
    inner = getattr(torch_nn, layer)(**LAYER, batch_first=batch_first)
    return getattr(nn, name)(inner, 2), getattr(torch_nn, name)(inner, 2)


def inputs(name):
    x, memory = torch.randn(3, 5, 16, requires_grad=True), torch.randn(3, 5, 16, requires_grad=True)
    if name == "MultiheadAttention":
        return x, memory, memory
    return (x,) if name == "LayerNorm" or "Encoder" in name else (x, memory)


def first(output):
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_gradients_equal_torchs(name, training, batch_first):
    ours, theirs = build(name, batch_first)
    ours.train(training), theirs.train(training)
    arguments = inputs(name)
    found, expected = first(ours(*arguments)), first(theirs(*arguments))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    weights = torch.randn_like(found)
    for model, output in ((ours, found), (theirs, expected)):
        (output * weights).sum().backward()
    for (key, a), b in zip(ours.named_parameters(), theirs.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=0, msg=key)


@pytest.mark.parametrize("name", NAMES)
def test_initialisation_state_dict_repr_pickle_and_deepcopy_are_torchs(name):
    ours, theirs = build(name)
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for a, b in zip(ours.state_dict().values(), theirs.state_dict().values()):
        assert torch.equal(a, b)
    theirs.load_state_dict(ours.state_dict())
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(ours), torch.load(buffer, weights_only=False)):
        assert [type(m) for m in twin.modules()] == [type(m) for m in ours.modules()]
        assert isinstance(twin, type(theirs))


@pytest.mark.parametrize("name", NAMES)
def test_containers_hold_no_class_of_torchs_that_has_a_replacement(name):
    ours, _ = build(name)
    assert not [m for m in ours.modules() if type(m) in REPLACEMENTS]


def test_names_that_are_not_replaced_are_torchs():
    assert nn.Linear is torch_nn.Linear
    assert nn.functional is torch_nn.functional
    with pytest.raises(AttributeError, match="neither detr_fast.nn nor torch.nn has 'Lienar'"):
        _ = nn.Lienar


OPTIONS = list(
    itertools.product(
        ["self", "memory", "kdim", "bias_kv", "zero_attn", "no_bias"],
        [None, "bool", "float"],
        [None, "bool", "3d", "float", "causal"],
        [True, False],
    )
)


@pytest.mark.parametrize("batch_first", [True, False, "unbatched"])
@pytest.mark.parametrize(("kind", "padding", "mask", "need_weights"), OPTIONS)
def test_attention_over_our_ops_equals_torchs(kind, padding, mask, need_weights, batch_first):
    options = {
        "kdim": {"kdim": 12, "vdim": 10},
        "bias_kv": {"add_bias_kv": True},
        "zero_attn": {"add_zero_attn": True},
        "no_bias": {"bias": False},
    }.get(kind, {})
    ours, theirs = twins("MultiheadAttention", 16, 4, batch_first=bool(batch_first), **options)
    ours.eval(), theirs.eval()
    unbatched = batch_first == "unbatched"
    batch, length, keys = 2, 5, (5 if kind == "self" else 7)

    def tokens(n, width):
        shape = (n, width) if unbatched else (batch, n, width) if batch_first else (n, batch, width)
        return torch.randn(shape, requires_grad=True)

    query = tokens(length, 16)
    key, value = (query, query) if kind == "self" else (tokens(keys, ours.kdim), tokens(keys, ours.vdim))
    arguments = {"need_weights": need_weights, "average_attn_weights": padding is None}
    if padding:
        hidden = torch.zeros((keys,) if unbatched else (batch, keys), dtype=torch.bool)
        hidden[..., -2:] = True
        arguments["key_padding_mask"] = hidden if padding == "bool" else torch.randn(hidden.shape)
    if mask in ("bool", "3d"):
        shape = (length, keys) if mask == "bool" else ((1 if unbatched else batch) * 4, length, keys)
        hidden = torch.rand(shape) > 0.6
        hidden[..., 0] = False
        arguments["attn_mask"] = hidden
    elif mask == "float":
        arguments["attn_mask"] = torch.randn(length, keys)
    elif mask == "causal":
        arguments["attn_mask"] = torch.ones(length, keys, dtype=torch.bool).triu(1)
        arguments["is_causal"] = True
    leaves = [query] if kind == "self" else [query, key, value]

    def run(model):
        out, weights = model(query, key, value, **arguments)
        seed = torch.linspace(-1, 1, out.numel()).view(out.shape)
        return (out, weights, *torch.autograd.grad((out * seed).sum(), [*leaves, *model.parameters()]))

    expected = run(theirs)
    for implementation in ("sdpa", "eager"):
        with use_backend(attention=implementation):
            found = run(ours)
        for a, b in zip(found, expected):
            assert (a is None) == (b is None)
            if b is not None:
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_dropout_acts_in_training_only():
    ours, _ = twins("MultiheadAttention", 16, 4, dropout=0.5, batch_first=True)
    x = torch.randn(2, 6, 16)
    with use_backend(attention="sdpa"):
        assert not torch.equal(ours(x, x, x)[0], ours(x, x, x)[0])
        ours.eval()
        assert torch.equal(ours(x, x, x)[0], ours(x, x, x)[0])


def test_explain_lists_every_attention_and_norm_of_a_transformer():
    model = nn.Transformer(16, 4, 1, 1, 24, 0.0, batch_first=True)
    records = detr_fast.explain(model, torch.randn(2, 5, 16), torch.randn(2, 4, 16), quiet=True)
    assert [(r.module, r.op) for r in records if r.op == "attention"] == [
        ("encoder.layers.0.self_attn", "attention"),
        ("decoder.layers.0.self_attn", "attention"),
        ("decoder.layers.0.multihead_attn", "attention"),
    ]
    assert sum(r.op == "layer_norm" for r in records) == 7
    assert all(r.reasons for r in records if r.op == "layer_norm")


@pytest.mark.parametrize("name", NAMES)
def test_a_compiled_module_has_no_graph_break(name):
    ours, _ = build(name)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    arguments = inputs(name)
    torch.testing.assert_close(first(compiled(*arguments)), first(ours(*arguments)))


@pytest.mark.parametrize("name", NAMES)
def test_meta_autocast_inference_and_checkpoint_work(name):
    ours, theirs = build(name)
    arguments = inputs(name)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(first(ours(*arguments)), first(theirs(*arguments)), rtol=0, atol=0)
    with torch.inference_mode():
        torch.testing.assert_close(first(ours(*arguments)), first(theirs(*arguments)), rtol=0, atol=0)
    recomputed = torch.utils.checkpoint.checkpoint(lambda *a: first(ours(*a)), *arguments, use_reentrant=False)
    recomputed.sum().backward()
    assert copy.deepcopy(ours).to("meta")(*(a.to("meta") for a in arguments)) is not None


def test_vmap_and_grad_transforms_work():
    norm = nn.LayerNorm(6)
    x = torch.randn(3, 4, 6)
    torch.testing.assert_close(torch.vmap(norm)(x), norm(x))
    gradient = torch.func.grad(lambda x: norm(x).square().sum())(x[0])
    assert gradient.shape == (4, 6)


def test_nested_tensors_take_torchs_fast_path():
    ours, theirs = build("TransformerEncoder")
    ours.eval(), theirs.eval()
    x, padding = torch.randn(2, 5, 16), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        torch.testing.assert_close(ours(x, src_key_padding_mask=padding), theirs(x, src_key_padding_mask=padding))


@pytest.mark.interpreter
def test_the_layer_norm_kernel_runs_inside_modules_when_asked_for_by_name():
    ours, theirs = build("TransformerEncoderLayer")
    x = torch.randn(2, 5, 16)
    with use_backend(layer_norm="triton"):
        records = detr_fast.explain(ours, x, quiet=True)
        found = ours(x)
    assert {r.chosen for r in records if r.op == "layer_norm"} == {"triton"}
    torch.testing.assert_close(found, theirs(x), rtol=1e-4, atol=1e-5)
    found.sum().backward()
    assert ours.norm1.weight.grad is not None


WRONG = [
    ("LayerNorm", (torch.randn(2, 5, 15),), {}),
    ("LayerNorm", (torch.randn(2, 5, 16, dtype=torch.float64),), {}),
    ("LayerNorm", (torch.ones(2, 16, dtype=torch.int64),), {}),
    ("LayerNorm", ("text",), {}),
    ("LayerNorm", (), {}),
    ("MultiheadAttention", (torch.randn(2, 5, 15),) * 3, {}),
    ("MultiheadAttention", (torch.randn(2, 5, 16), torch.randn(2, 5, 12), torch.randn(2, 5, 16)), {}),
    ("MultiheadAttention", (torch.randn(2, 5, 16), torch.randn(3, 5, 16), torch.randn(3, 5, 16)), {}),
    ("MultiheadAttention", (torch.randn(2, 5, 16), torch.randn(2, 6, 16), torch.randn(2, 7, 16)), {}),
    ("MultiheadAttention", (torch.randn(5, 16), torch.randn(2, 5, 16), torch.randn(2, 5, 16)), {}),
    ("MultiheadAttention", (torch.randn(2, 2, 5, 16),) * 3, {}),
    ("MultiheadAttention", (torch.randn(2, 5, 16),) * 3, {"is_causal": True}),
    ("MultiheadAttention", (torch.randn(2, 5, 16),) * 3, {"attn_mask": torch.zeros(4, 5)}),
    ("MultiheadAttention", (torch.randn(2, 5, 16),) * 3, {"attn_mask": torch.zeros(2, 5, 5)}),
    ("MultiheadAttention", (torch.randn(2, 5, 16),) * 3, {"attn_mask": torch.zeros(5, 5, dtype=torch.int64)}),
    ("MultiheadAttention", (torch.randn(2, 5, 16),) * 3, {"key_padding_mask": torch.zeros(2, 4, dtype=torch.bool)}),
    ("MultiheadAttention", (torch.randn(2, 5, 16),) * 3, {"key_padding_mask": torch.zeros(2, 5, dtype=torch.int32)}),
    ("MultiheadAttention", (torch.randn(2, 0, 16),) * 3, {}),
    ("MultiheadAttention", (torch.randn(0, 5, 16),) * 3, {}),
    ("MultiheadAttention", (torch.randn(2, 5, 16, dtype=torch.float64),) * 3, {}),
    ("TransformerEncoderLayer", (torch.randn(2, 5, 15),), {}),
    ("TransformerDecoderLayer", (torch.randn(2, 5, 16), torch.randn(3, 5, 16)), {}),
    ("Transformer", (torch.randn(2, 5, 16), torch.randn(3, 5, 16)), {}),
]


def outcome(model, arguments, options):
    try:
        return first(model(*arguments, **options))
    except Exception as error:
        return type(error)


@pytest.mark.parametrize(("name", "arguments", "options"), WRONG, ids=range(len(WRONG)))
def test_odd_and_wrong_inputs_have_torchs_outcome(name, arguments, options):
    ours, theirs = build(name)
    expected = outcome(theirs, arguments, options)
    for backend in ("auto", "sdpa"):
        with use_backend(attention=backend):
            found = outcome(ours, arguments, options)
        if isinstance(expected, type):
            assert found is expected
        else:
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("MultiheadAttention", (16, 3)), ("MultiheadAttention", (0, 1)), ("TransformerEncoderLayer", (16, 5))],
)
def test_wrong_constructor_arguments_raise_as_torchs(name, arguments):
    with pytest.raises(Exception) as theirs:
        getattr(torch_nn, name)(*arguments)
    with pytest.raises(theirs.type):
        getattr(nn, name)(*arguments)
