"""Everything about a module but its forward: torch.nn's own, to the letter."""

from __future__ import annotations

import copy
import importlib
import inspect
import io
import pickle

import pytest
import torch
from torch import nn as torch_nn
from torch.nn.utils import parametrizations

from detr_fast import nn
from detr_fast.nn.replacements import REPLACEMENTS, convert

NAMES = [original.__name__ for original in REPLACEMENTS]
SCRIPTABLE = [name for name in NAMES if name != "LinearCrossEntropyLoss"]  # of torch.nn's own, too
NORMS = ("LayerNorm", "RMSNorm")
LAYER = {"d_model": 16, "nhead": 4, "dim_feedforward": 24, "dropout": 0.0, "batch_first": True}


def build(source, name, **kwargs):
    """A small module of `source` (our nn or torch's) and inputs for it."""
    torch.manual_seed(1)
    if name in NORMS:
        module = getattr(source, name)(16, **kwargs)
    elif name == "MultiheadAttention":
        module = source.MultiheadAttention(16, 4, batch_first=True, **kwargs)
    elif name == "LinearCrossEntropyLoss":
        module = source.LinearCrossEntropyLoss(16, 12, **kwargs)
    elif name == "Transformer":
        module = source.Transformer(16, 4, 2, 2, 24, 0.0, batch_first=True, **kwargs)
    elif name.endswith("Layer"):
        module = getattr(source, name)(**LAYER, **kwargs)
    else:
        module = getattr(source, name)(getattr(source, f"{name}Layer")(**LAYER, **kwargs), 2)
    torch.manual_seed(2)
    device, dtype = kwargs.get("device"), kwargs.get("dtype")
    x, memory = (torch.randn(3, length, 16, device=device, dtype=dtype) for length in (4, 5))
    if name == "MultiheadAttention":
        return module, (x, memory, memory)
    if name == "LinearCrossEntropyLoss":
        return module, (x[0], torch.tensor([3, -100, 0, 11], device=device))
    return module, (x,) if name in NORMS or "Encoder" in name else (x, memory)


def first(output):
    return output if isinstance(output, torch.Tensor) else output[0]


@pytest.mark.parametrize("name", NAMES)
def test_signatures_are_torch_nns(name):
    ours, original = getattr(nn, name), getattr(torch_nn, name)
    assert issubclass(ours, original)
    assert inspect.signature(ours) == inspect.signature(original)
    parameters = [inspect.signature(c.forward).parameters for c in (ours, original)]
    assert [(p.name, p.default, p.kind) for p in parameters[0].values()] == [
        (p.name, p.default, p.kind) for p in parameters[1].values()
    ]


@pytest.mark.parametrize("kwargs", [{}, {"dtype": torch.float64}, {"bias": False}], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_initialisation_repr_and_state_dict_are_torch_nns(name, kwargs):
    if name == "RMSNorm" and kwargs.pop("bias", True) is False:
        kwargs = {"elementwise_affine": False}  # of biases it has none
    (ours, _), (original, _) = build(nn, name, **kwargs), build(torch_nn, name, **kwargs)
    assert repr(ours) == repr(original)
    mine, theirs = ours.state_dict(), original.state_dict()
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[key], theirs[key]) and mine[key].dtype == theirs[key].dtype for key in theirs)
    original.load_state_dict(mine)
    ours.load_state_dict(theirs)


@pytest.mark.parametrize("name", NAMES)
def test_factory_arguments_place_every_parameter(name):
    ours, inputs = build(nn, name, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in ours.parameters()} == {("meta", torch.bfloat16)}
    assert first(ours(*inputs)).device.type == "meta"


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("name", NAMES)
def test_copies_keep_classes_and_results(name, way):
    ours, inputs = build(nn, name)
    if way == "deepcopy":
        twin = copy.deepcopy(ours)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(ours))
    else:
        buffer = io.BytesIO()
        torch.save(ours, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert [type(m) for m in twin.modules()] == [type(m) for m in ours.modules()]
    assert torch.equal(first(twin(*inputs)), first(ours(*inputs)))


@pytest.mark.parametrize("name", NAMES)
def test_nothing_inside_a_container_is_left_to_torch_nn_that_we_replace(name):
    ours, _ = build(nn, name)
    assert not [m for m in ours.modules() if type(m) in REPLACEMENTS]


def test_containers_convert_what_they_are_given():
    layer = torch_nn.TransformerEncoderLayer(**LAYER)
    norm = torch_nn.LayerNorm(16)
    encoder = nn.TransformerEncoder(layer, 2, norm)
    assert {type(m) for m in encoder.layers} == {nn.TransformerEncoderLayer}
    assert encoder.norm is norm
    assert type(norm) is nn.LayerNorm
    assert type(layer) is torch_nn.TransformerEncoderLayer  # it was cloned, and is the caller's own


def test_conversion_leaves_subclasses_and_parametrised_modules_alone():
    class Scaled(torch_nn.LayerNorm):
        def forward(self, input):
            return 2 * super().forward(input)

    parametrised = parametrizations.weight_norm(torch_nn.LayerNorm([4, 4]))
    model = torch_nn.Sequential(Scaled(4), parametrised, torch_nn.LayerNorm(4))
    before = [type(m) for m in model]
    convert(model)
    assert [type(m) for m in model] == [*before[:2], nn.LayerNorm]


def test_a_converted_module_keeps_its_parameters_hooks_and_attributes():
    norm = torch_nn.LayerNorm(4)
    norm.note = "mine"
    seen = []
    norm.register_forward_hook(lambda module, args, output: seen.append(type(module)))
    weight, identity = norm.weight, id(norm)
    convert(norm)
    norm(torch.randn(2, 4))
    assert norm.weight is weight
    assert id(norm) == identity
    assert norm.note == "mine"
    assert seen == [nn.LayerNorm]


@pytest.mark.parametrize("name", NAMES)
def test_hooks_see_what_they_see_on_torch_nn(name):
    def run(source):
        module, inputs = build(source, name)
        calls = []
        for path, part in module.named_modules():
            part.register_forward_pre_hook(lambda m, args, path=path: calls.append((path, "before", len(args))))
            part.register_forward_hook(lambda m, args, y, path=path: calls.append((path, "after", first(y).shape)))
            part.register_full_backward_hook(lambda m, gi, go, path=path: calls.append((path, "backward", len(go))))
        first(module(*inputs)).sum().backward()
        return calls

    assert run(nn) == run(torch_nn)


def test_every_other_name_is_torch_nns():
    for name in dir(torch_nn):
        if name not in NAMES and not name.startswith("__"):
            assert getattr(nn, name) is getattr(torch_nn, name)
    assert {"Linear", "LayerNorm", "functional"} <= set(dir(nn))
    with pytest.raises(AttributeError, match=r"neither detr_fast\.nn nor torch\.nn has 'Lienar'"):
        _ = nn.Lienar


@pytest.mark.parametrize(
    "name",
    [
        "utils",
        "utils.rnn",
        "utils.parametrize",
        "functional",
        "init",
        "parallel",
        "parameter",
        "modules.activation",
        "attention.bias",
    ],
)
def test_submodules_are_torch_nns_own(name):
    theirs = importlib.import_module(f"torch.nn.{name}")
    spec = theirs.__spec__
    assert importlib.import_module(f"detr_fast.nn.{name}") is theirs
    assert theirs.__spec__ is spec


def test_names_are_imported_from_submodules():
    import detr_fast.nn.functional as F
    from detr_fast.nn.utils import clip_grad_norm_

    assert (clip_grad_norm_, F) == (torch_nn.utils.clip_grad_norm_, torch_nn.functional)
    with pytest.raises(ModuleNotFoundError, match=r"detr_fast\.nn\.nothing"):
        importlib.import_module("detr_fast.nn.nothing")


def test_a_star_import_brings_all_of_it():
    namespace: dict[str, object] = {}
    exec("from detr_fast.nn import *", namespace)
    assert namespace["LayerNorm"] is nn.LayerNorm
    assert namespace["Conv2d"] is torch_nn.Conv2d


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", SCRIPTABLE)
def test_torchscript_gets_the_original_on_the_same_parameters(name):
    ours, inputs = build(nn, name)
    scripted = torch.jit.script(ours.eval())
    torch.testing.assert_close(first(scripted(*inputs)), first(ours(*inputs)))
    assert type(ours) is getattr(nn, name)
    assert next(scripted.parameters()).data_ptr() == next(ours.parameters()).data_ptr()


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", NAMES)
def test_jit_tracing_follows_the_originals(name):
    ours, inputs = build(nn, name)
    traced = torch.jit.trace(ours.eval().requires_grad_(False), inputs)
    torch.testing.assert_close(first(traced(*inputs)), first(ours(*inputs)))


class Wrapped(torch_nn.Module):
    def __init__(self, inner, inputs):
        super().__init__()
        self.inner = inner
        self.inputs = inputs

    def forward(self, x, memory):
        output = self.inner(*(x, memory, memory)[: self.inputs])
        return output[0] if self.inputs == 3 else output


@pytest.mark.parametrize("name", NAMES)
def test_torch_fx_keeps_them_whole_as_it_keeps_torch_nns(name):
    ours, inputs = build(nn, name)
    model = Wrapped(ours, len(inputs))
    graph = torch.fx.symbolic_trace(model)
    assert [str(n.target) for n in graph.graph.nodes if n.op == "call_module"] == ["inner"]
    assert torch.equal(graph(inputs[0], inputs[-1]), model(inputs[0], inputs[-1]))


def test_torch_fx_looks_into_a_users_subclass():
    class Doubled(nn.LayerNorm):
        def forward(self, input):
            return 2 * super().forward(input)

    model = torch_nn.Sequential(Doubled(4))
    x = torch.randn(3, 4)
    assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))


class Called(torch_nn.Module):
    """Calls a module by keywords, or with a first argument that is not traced."""

    def __init__(self, inner, call):
        super().__init__()
        self.inner, self.call = inner, call

    def forward(self, x):
        return self.call(self.inner, x)


CONSTANT = torch.linspace(-1, 1, 2 * 3 * 16).view(2, 3, 16)
CALLS = {
    "LayerNorm": lambda module, x: module(input=x),
    "RMSNorm": lambda module, x: module(x=x),
    "MultiheadAttention": lambda module, x: module(CONSTANT, key=x, value=x)[0],
    "TransformerEncoderLayer": lambda module, x: module(src=x),
    "TransformerEncoder": lambda module, x: module(src=x),
    "TransformerDecoderLayer": lambda module, x: module(CONSTANT, memory=x),
    "TransformerDecoder": lambda module, x: module(tgt=x, memory=x),
    "Transformer": lambda module, x: module(CONSTANT, tgt=x),
    "LinearCrossEntropyLoss": lambda module, x: module(target=torch.tensor([1, 7]), input=x[:, 0]),
}
CALLS = {name: call for name, call in CALLS.items() if name in NAMES}  # older PyTorch has no such loss


@pytest.mark.parametrize("name", CALLS)
def test_torch_fx_keeps_them_whole_whatever_of_their_arguments_is_traced(name):
    model = Called(build(nn, name)[0], CALLS[name])
    graph = torch.fx.symbolic_trace(model)
    assert [str(n.target) for n in graph.graph.nodes if n.op == "call_module"] == ["inner"]
    assert torch.equal(graph(CONSTANT), model(CONSTANT))
