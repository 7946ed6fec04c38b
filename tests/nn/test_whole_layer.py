from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from detr_fast import native, nn, use_backend
from detr_fast.explanation import explaining
from detr_fast.nn import whole_layer
from detr_fast.nn.casts import known_casts
from detr_fast.ops import layers, regimes
from detr_fast.ops.host_program import HostProgram
from detr_fast.ops.layers import DECODER_LAYER, ENCODER_LAYER
from detr_fast.testing import count
from tests.layer_stacks import stacks

interpreter = pytest.mark.interpreter
PADDING = torch.tensor([[False, False, True, True]])


@pytest.fixture(autouse=True)
def _no_programs():
    before = native.host
    yield
    native.use(before)
    for op in (ENCODER_LAYER, DECODER_LAYER):
        op.forget()


def made(name, **options):
    settings = {"d_model": 16, "nhead": 2, "dim_feedforward": 24, "dropout": 0.1, "batch_first": True, **options}
    return getattr(nn, f"Transformer{name}Layer")(**settings)


def inputs_of(name, width=16):
    inputs = [torch.randn(1, 4, width, requires_grad=True) for _ in range(1 + (name == "Decoder"))]
    return inputs, {"memory_key_padding_mask" if name == "Decoder" else "src_key_padding_mask": PADDING}


def step(module, inputs, masks, seed=3, autocast=False):
    torch.manual_seed(seed)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = module(*inputs, **masks)
    dy = torch.linspace(-1, 1, y.numel()).view_as(y)
    return [y, *torch.autograd.grad(y, [*inputs, *module.parameters()], dy)], y.grad_fn.name()


def assert_program_is_its_parts(module, inputs, masks, **settings):
    with use_backend("triton"):
        expected, first = step(module, inputs, masks, **settings)  # seen for the first time: its parts
        found, name = step(module, inputs, masks, **settings)
    assert first != "ProgramNodeBackward"
    assert name == "ProgramNodeBackward"
    assert all(map(torch.equal, found, expected))


@interpreter
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Encoder", {"norm_first": True, "activation": "gelu", "bias": False}),
        ("Encoder", {"autocast": True}),
        ("Decoder", {"batch_first": False}),
    ],
    ids=str,
)
def test_a_layer_is_one_node_and_gives_what_its_parts_give_to_the_bit(name, options):
    options, (inputs, masks) = dict(options), inputs_of(name)
    autocast = options.pop("autocast", False)
    if not options.get("batch_first", True):
        inputs = [x.detach().transpose(0, 1).contiguous().requires_grad_() for x in inputs]
    assert_program_is_its_parts(made(name, **options), inputs, masks, autocast=autocast)


@interpreter
def test_what_a_stacks_layers_leave_for_each_other_passes_through_their_nodes():
    """The norm that follows on a pre-norm layer, and a decoder's memory, which is projected for all layers at once."""
    module, (inputs, masks) = stacks("Decoder", dropout=0.1)[0], inputs_of("Decoder")
    with use_backend("triton"):
        expected, _ = step(module, inputs, masks)
        found, _ = step(module, inputs, masks)
    assert all(map(torch.equal, found, expected))
    assert [type(one) for one in DECODER_LAYER.programs.values()] == [HostProgram] * 2  # a norm follows on one of them


@interpreter
@pytest.mark.parametrize("compiled", [False, True])
def test_a_frozen_layer_whose_following_norm_is_trained_is_a_program(compiled, request):
    native.use(request.getfixturevalue("host") if compiled else None)
    module, theirs = stacks("Encoder")
    (x,), masks = inputs_of("Encoder")
    trained = ("layers.1.norm1.weight", "norm.bias")
    for one in (module, theirs):
        for name, parameter in one.named_parameters():
            parameter.requires_grad_(name in trained)
    results = []
    with use_backend("triton"):
        for one in (theirs, module, module, module):
            y = one(x.detach(), **masks)
            results.append([y, *torch.autograd.grad(y.square().sum(), [one.get_parameter(n) for n in trained])])
    for found in results[1:]:
        torch.testing.assert_close(found, results[0], rtol=1e-3, atol=1e-3)
    assert [type(one) for one in ENCODER_LAYER.programs.values()] == [HostProgram] * 2


@interpreter
def test_a_program_is_of_one_signature_and_others_get_their_own():
    layer, (inputs, masks) = made("Encoder"), inputs_of("Encoder")
    with use_backend("triton"):
        for _ in range(2):
            layer(*inputs, **masks)
    layer.dropout1.p = 0.5
    layer.linear1.weight.requires_grad_(False)
    with use_backend("triton"):
        results = []
        for _ in range(2):
            torch.manual_seed(3)
            y = layer(*inputs, **masks).transpose(0, 1)  # whose gradient lies otherwise than the output
            results.append(torch.autograd.grad(y.square().sum(), [*inputs, layer.linear1.bias]))
    assert all(map(torch.equal, *results))
    assert sum(isinstance(one, HostProgram) for one in ENCODER_LAYER.programs.values()) == 2


@interpreter
def test_a_weight_that_changes_before_the_backward_is_noticed():
    layer, (inputs, masks) = made("Encoder"), inputs_of("Encoder")
    with use_backend("triton"):
        for _ in range(2):
            y = layer(*inputs, **masks)
        with torch.no_grad():
            layer.linear1.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@interpreter
@pytest.mark.parametrize("name", ["linear1.bias", "norm2.bias"])
def test_a_parameter_that_is_not_kept_for_backward_may_not_change_before_one_that_is_differentiated(name):
    layer, (inputs, masks) = made("Encoder"), inputs_of("Encoder")
    with use_backend("triton"):
        for _ in range(2):
            y = layer(*inputs, **masks)
        with torch.no_grad():
            layer.get_parameter(name).add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(y.square().sum(), inputs, create_graph=True)


@interpreter
@pytest.mark.parametrize("spoil", ["eval", "eps", "hook"])
def test_a_layer_that_changed_can_not_be_differentiated_twice(spoil):
    layer, (inputs, masks) = made("Encoder"), inputs_of("Encoder")
    with use_backend("triton"):
        for _ in range(2):
            y = layer(*inputs, **masks)
        if spoil == "eval":
            layer.eval()
        elif spoil == "eps":
            layer.norm1.eps = 0.1
        else:
            layer.linear1.register_forward_hook(lambda *_: None)
        with pytest.raises(RuntimeError, match="changed between its forward and a backward with create_graph=True"):
            torch.autograd.grad(y.square().sum(), inputs, create_graph=True)


@interpreter
def test_a_backward_that_is_differentiated_draws_the_forwards_dropout_whatever_is_asked_for_then():
    layer, (inputs, masks) = made("Encoder"), inputs_of("Encoder")
    with use_backend("triton"):
        for _ in range(2):
            y = layer(*inputs, **masks)
    dy = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, inputs, dy, retain_graph=True)
    (found,) = torch.autograd.grad(y, inputs, dy, create_graph=True)
    assert y.grad_fn.name() == "ProgramNodeBackward"
    torch.testing.assert_close(found, expected)


@interpreter
def test_norms_without_weights_and_parameters_that_were_computed_are_left_to_the_parts():
    layer, (inputs, masks) = made("Encoder"), inputs_of("Encoder")
    weights = {name: p.detach().requires_grad_() for name, p in layer.named_parameters()}
    weights["norm2.weight"] = weights["norm1.weight"] * 2
    gradients = []
    with use_backend("triton"):
        for _ in range(3):
            torch.manual_seed(3)
            y = torch.func.functional_call(layer, weights, tuple(inputs), masks)
            gradients += torch.autograd.grad(y.square().sum(), weights["norm1.weight"], retain_graph=True)
        assert torch.equal(gradients[0], gradients[2])
        layer.norm1 = nn.LayerNorm(16, elementwise_affine=False)
        for _ in range(3):
            layer(*inputs, **masks)
    assert not any(isinstance(one, HostProgram) for one in ENCODER_LAYER.programs.values())


@interpreter
def test_weights_that_are_cast_together_are_no_computed_parameters():
    layer, (inputs, masks) = made("Encoder"), inputs_of("Encoder")
    with use_backend("triton"), torch.autocast("cpu", torch.bfloat16):
        for _ in range(3):
            casts = {id(p): p.bfloat16() for name, p in layer.named_parameters() if "norm" not in name}
            with known_casts(casts):
                y = layer(*inputs, **masks)
    assert y.grad_fn.name() == "ProgramNodeBackward"


@interpreter
def test_each_device_has_programs_of_its_own(monkeypatch):
    native.use(None)  # which asks tensors themselves, not Python, where they lie
    layer, (inputs, masks) = made("Encoder"), inputs_of("Encoder")
    with use_backend("triton"):
        for _ in range(2):
            layer(*inputs, **masks)
        monkeypatch.setattr(torch.Tensor, "get_device", lambda t: 1)
        assert layer(*inputs, **masks).grad_fn.name() != "ProgramNodeBackward"


@interpreter
@pytest.mark.parametrize("compiled", [False, True])
def test_a_layer_that_keeps_what_it_gave_is_freed_all_the_same(compiled, request):
    native.use(request.getfixturevalue("host") if compiled else None)
    layer, (inputs, masks) = made("Encoder"), inputs_of("Encoder")
    with use_backend("triton"):
        for _ in range(3):
            y = layer(*inputs, **masks)
    assert y.grad_fn.name() == "ProgramNodeBackward"
    layer.last, seen = y, weakref.ref(layer)
    del layer
    gc.collect()
    dy = torch.ones_like(y)
    if seen() is None:  # what is left of it, y, can still be differentiated once
        torch.autograd.grad(y, inputs, dy, retain_graph=True)
        with pytest.raises(RuntimeError, match="freed between"):
            torch.autograd.grad(y, inputs, dy, create_graph=True)
    del y
    gc.collect()
    assert seen() is None


def other_parameter(layer):
    layer.linear1.weight = torch.nn.Parameter(torch.ones(24, 16))


def other_part(layer):
    layer.linear1 = torch.nn.Linear(16, 24)


def other_parts(layer):
    layer.linear1 = torch.nn.Sequential(torch.nn.Linear(16, 24))


@interpreter
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("change", [other_parameter, other_part, other_parts])
def test_parameters_that_a_layer_has_no_more_are_freed_at_once(change, compiled, request):
    native.use(request.getfixturevalue("host") if compiled else None)
    layer, (inputs, masks) = made("Encoder", dropout=0.0), inputs_of("Encoder")
    with use_backend("triton"):
        for _ in range(3):
            before = layer(*inputs, **masks)
        assert before.grad_fn.name() == "ProgramNodeBackward"
        del before
        seen = weakref.ref(layer.linear1.weight)
        gc.collect()
        gc.disable()  # nothing is left to that
        change(layer)
        gc.enable()
        assert seen() is None
        found = [layer(*inputs, **masks) for _ in range(3)]
    with use_backend("eager"):
        torch.testing.assert_close(found, [layer(*inputs, **masks)] * 3)


@interpreter
def test_computed_parameters_are_freed():
    layer, (inputs, masks) = made("Encoder"), inputs_of("Encoder")
    with use_backend("triton"):
        for _ in range(2):
            layer(*inputs, **masks)
        others = {name: parameter * 2 for name, parameter in layer.named_parameters()}
        seen = weakref.ref(others["linear1.weight"])
        torch.func.functional_call(layer, others, tuple(inputs), masks)
        del others
    gc.collect()
    assert seen() is None


@interpreter
@pytest.mark.parametrize("compiled", [False, True])
def test_a_batch_of_gradients_goes_through_a_layer_at_once(compiled, request):
    native.use(request.getfixturevalue("host") if compiled else None)
    layer, (inputs, masks) = made("Encoder"), inputs_of("Encoder")
    leaves = [*inputs, *layer.parameters()]
    with use_backend("triton"):
        for _ in range(3):
            y = layer(*inputs, **masks)
        assert y.grad_fn.name() == "ProgramNodeBackward"
        upstream = torch.randn(2, *y.shape)
        single = [torch.autograd.grad(y, leaves, one, retain_graph=True) for one in upstream]
        for found, expected in zip(torch.autograd.grad(y, leaves, upstream, is_grads_batched=True), zip(*single)):
            torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_programs_called_least_recently_go_first(monkeypatch):
    monkeypatch.setattr(layers, "MAX_PROGRAMS", 2)
    ENCODER_LAYER.keep("hot", "reason")
    ENCODER_LAYER.keep("once", 1)
    assert ENCODER_LAYER.known("hot") == "reason"
    ENCODER_LAYER.keep("new", 1)
    assert list(ENCODER_LAYER.programs) == ["hot", "new"]
    ENCODER_LAYER.keep("new", "reason")  # in its own place
    assert list(ENCODER_LAYER.programs) == ["hot", "new"]
    assert "once" not in ENCODER_LAYER.programs


def test_shapes_that_vary_for_ever_are_soon_recorded_no_more(monkeypatch):
    """A stack of six layers meets each shape six times; once in a recording, which the other calls do not pay for."""
    recorded = []

    def layers_meet(shape, times=6):
        for _ in range(times):
            if ENCODER_LAYER.known(shape) is not None:
                ENCODER_LAYER.saved()
            elif ENCODER_LAYER.is_due(shape):
                recorded.append(shape)
                ENCODER_LAYER.keep(shape, "reason")

    for shape in range(60):
        layers_meet(shape)
    assert recorded == list(range(len(recorded)))
    assert 32 <= len(recorded) < 60
    layers_meet("often", 17)
    assert recorded[-1] == "often"
    layers_meet("often", 40)  # which pays for the next ones
    for shape in range(60, 62):
        layers_meet(shape)
    assert recorded[-2:] == [60, 61]
    assert not ENCODER_LAYER.is_due(61)  # by another thread


@interpreter
def test_a_layer_that_met_too_little_memory_runs_its_parts_and_is_recorded_some_calls_later(monkeypatch):
    tried = []

    def full(*_):
        tried.append(len(names))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB")

    names = []
    layer, (inputs, masks) = made("Encoder"), inputs_of("Encoder")
    monkeypatch.setattr(layers, "LATER", 2)
    with use_backend("triton"), monkeypatch.context() as short:
        short.setattr(whole_layer, "record", full)
        for _ in range(4):
            names.append(step(layer, inputs, masks)[1])
    assert tried == [1]
    with use_backend("triton"):
        names += [step(layer, inputs, masks)[1] for _ in range(3)]
    # The first call is not recorded, the second finds no memory, nor is any of three more.
    assert [name == "ProgramNodeBackward" for name in names] == [False] * 5 + [True] * 2


@interpreter
def test_the_double_backward_is_the_parts_own():
    layer, (inputs, masks) = made("Encoder"), inputs_of("Encoder")

    def twice():
        torch.manual_seed(3)
        y = layer(*inputs, **masks)
        (dx,) = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
        return y.grad_fn.name(), dx, *torch.autograd.grad(dx.square().sum(), [*inputs, layer.linear1.weight])

    with use_backend("triton"):
        _, *expected = twice()
        name, *found = twice()
    assert name == "ProgramNodeBackward"
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@interpreter
def test_a_checkpointed_layer_keeps_what_its_parts_keep():
    layer, (inputs, masks) = made("Encoder"), inputs_of("Encoder")
    with use_backend("triton"):
        layer(*inputs, **masks)
        torch.manual_seed(3)
        expected = torch.autograd.grad(layer(*inputs, **masks).sum(), inputs)[0]
        torch.manual_seed(3)
        checkpoint(layer, *inputs, use_reentrant=False, src_key_padding_mask=PADDING).sum().backward()
    assert torch.equal(inputs[0].grad, expected)


@interpreter
@pytest.mark.parametrize("spoil", ["hook", "class", "weight hook"])
def test_a_layer_whose_parts_somebody_looks_at_runs_them(spoil):
    layer, (inputs, masks) = made("Encoder"), inputs_of("Encoder")
    if spoil == "hook":
        layer.linear1.register_forward_hook(lambda *_: None)
    elif spoil == "class":
        layer.linear1.__class__ = type("LoRA", (torch.nn.Linear,), {})
    else:
        layer.linear1.weight.register_hook(lambda gradient: gradient)
    with use_backend("triton"):
        for _ in range(2):
            assert layer(*inputs, **masks).grad_fn.name() != "ProgramNodeBackward"


@interpreter
def test_views_in_the_place_of_parameters_are_what_a_layer_computes_from():
    """As FSDP puts them there, anew for each call, where it is not asked to keep the original parameters."""
    layer, (inputs, masks) = made("Encoder").eval(), inputs_of("Encoder")
    twin = copy.deepcopy(layer)
    places = [(part, name) for part in layer.modules() for name, p in part._parameters.items() if p is not None]
    for part, name in places:
        delattr(part, name)
    with torch.no_grad(), use_backend("triton"):
        for _ in range(4):
            for (part, name), parameter in zip(places, twin.parameters()):
                parameter.mul_(1.1)
                setattr(part, name, parameter.detach().clone())
            assert torch.equal(layer(*inputs, **masks), twin(*inputs, **masks))


@interpreter
def test_without_gradients_the_program_gives_the_output_alone():
    layer, (inputs, masks) = made("Encoder").eval(), inputs_of("Encoder")
    with use_backend("triton"), torch.no_grad():
        assert torch.equal(layer(*inputs, **masks), layer(*inputs, **masks))
    assert any(isinstance(one, HostProgram) for one in ENCODER_LAYER.programs.values())


@pytest.fixture
def measured(monkeypatch):
    """An H100 that was measured to be faster with whole layers from 100 kB on, and with none of their parts."""
    parts = (
        "attention",
        "attention_masked",
        "feed_forward",
        "linear_add_layer_norm",
        "qkv_projection",
        "add_layer_norm",
    )
    entries = [regimes.Regime(name, "sm_90", regimes.NEVER, 0, "a test") for name in parts]
    entries += [regimes.Regime(f"{kind}_layer", "sm_90", 100_000, 0, "a test") for kind in ("encoder", "decoder")]
    monkeypatch.setattr(regimes, "known", lambda: tuple(entries))
    for op in (ENCODER_LAYER, DECODER_LAYER):
        op.forget()


def kernels(layer, *inputs):
    return {name for name in count(layer, *inputs).launches if not name.startswith("aten")}


@pytest.mark.parametrize(("tokens", "whole"), [(850, True), (85, False)])
def test_a_layer_that_was_measured_to_be_faster_binds_its_parts(measured, tokens, whole):
    with FakeTensorMode():
        layer = nn.TransformerEncoderLayer(256, 8, 2048, batch_first=True, device="cuda", dtype=torch.bfloat16)
        x = torch.randn(2, tokens, 256, device="cuda", dtype=torch.bfloat16)
        with explaining(layer) as records:
            layer(x)
        launches = kernels(layer, x)
        assert kernels(layer.eval(), x) == set()  # measured in training
    fused = {"attention_forward_kernel", "linear_kernel", "linear_norm_kernel"}
    assert fused & launches == (fused if whole else set())
    of_layer = next(r for r in records if r.op == "encoder_layer")
    assert of_layer.chosen == ("triton" if whole else "its parts")
    assert ("one node" in str(of_layer)) == whole
    assert all((r.chosen == "triton") == whole for r in records)


def test_parts_that_were_asked_for_by_name_are_chosen_one_by_one(measured):
    with FakeTensorMode(), use_backend(feed_forward="triton"):
        layer = nn.TransformerEncoderLayer(256, 8, 2048, batch_first=True, device="cuda", dtype=torch.bfloat16)
        x = torch.randn(2, 850, 256, device="cuda", dtype=torch.bfloat16)
        assert "linear_kernel" in (launches := kernels(layer, x))
        assert "attention_forward_kernel" not in launches
