"""Switching classes in place, on models of torch.nn's parts: what changes, what does not, and what is left alone."""

from __future__ import annotations

import copy
import io
import pickle
import re
import time

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import detr_fast
from detr_fast import nn as ours
from detr_fast import use_backend
from detr_fast.explanation import explaining
from detr_fast.nn.replacements import REPLACEMENTS


def transformer(**options):
    torch.manual_seed(0)
    settings = {"dropout": 0.0, "batch_first": True, **options}
    return nn.Transformer(16, 2, 2, 2, 24, **settings)


def classes(model):
    return [type(module) for module in model.modules()]


def reasons(report):
    return {one.name: one.reason for one in report.left}


def padded(model):
    dtype = next(model.parameters()).dtype
    generator = torch.Generator().manual_seed(1)
    source, target = (torch.randn(3, length, 16, generator=generator).to(dtype) for length in (5, 4))
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 5])
    causal = torch.ones(4, 4, dtype=torch.bool).triu(1)
    masks = {"src_key_padding_mask": padding, "memory_key_padding_mask": padding, "tgt_mask": causal}
    return [model(source, target, **masks)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, {"norm_first": True}], ids=str)
def test_a_transformer_computes_what_it_did(options, training, assert_unchanged):
    model = transformer(**options).train(training)
    report = assert_unchanged(model, padded)
    assert not report.left
    assert {type(m) for m in model.modules()} & set(REPLACEMENTS) == set()
    assert len(report.switched) == sum(type(m) in REPLACEMENTS.values() for m in model.modules())


def test_only_classes_change_and_restore_changes_them_back():
    model = transformer()
    seen = []
    model.encoder.norm.register_forward_hook(lambda module, args, y: seen.append(type(module)))
    before, tensors = classes(model), {n: (id(t), t.clone()) for n, t in model.state_dict(keep_vars=True).items()}
    dictionaries = [set(m.__dict__) for m in model.modules()]
    modules, text = list(model.modules()), repr(model)
    detr_fast.accelerate(model)
    assert classes(model) == [REPLACEMENTS.get(kind, kind) for kind in before]
    padded(model)
    assert seen == [ours.LayerNorm]
    assert repr(model) == text
    report = detr_fast.restore(model)
    assert classes(model) == before
    assert [set(m.__dict__) for m in model.modules()] == dictionaries
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    after = model.state_dict(keep_vars=True)
    assert all(id(after[n]) == i and torch.equal(after[n], t) for n, (i, t) in tensors.items())
    others = ("LinearCrossEntropyLoss", "RMSNorm")
    assert {one.now for one in report.switched} == {
        f"torch.nn.{original.__name__}" for original in REPLACEMENTS if original.__name__ not in others
    }


def test_it_is_idempotent():
    model = transformer()
    first = detr_fast.accelerate(model)
    before = classes(model)
    second = detr_fast.accelerate(model)
    assert classes(model) == before
    assert not second.switched
    assert second.already == len(first.switched)
    detr_fast.restore(model)
    assert not detr_fast.restore(model).switched


def test_accelerated_undoes_only_its_own_even_after_an_error():
    model = transformer()
    detr_fast.accelerate(model, only="encoder")
    before = classes(model)

    def fail():
        with detr_fast.accelerated(model) as report:
            assert type(model.decoder) is ours.TransformerDecoder
            assert all(one.name == "" or one.name.startswith("decoder") for one in report.switched)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert classes(model) == before


@pytest.mark.parametrize("switch", [detr_fast.accelerate, lambda m, **o: detr_fast.accelerated(m, **o).__enter__()])
def test_example_inputs_that_do_not_fit_leave_the_model_as_it_was(switch):
    model = transformer()
    detr_fast.accelerate(model, only="encoder")
    before = classes(model)
    with pytest.raises(RuntimeError, match="feature number"):
        switch(model, example_inputs=(torch.ones(2, 3, 7), torch.ones(2, 3, 7)))
    assert classes(model) == before


def test_norms_of_images_call_ours_and_survive_copies_pickles_and_the_compiler():
    convnext = pytest.importorskip("transformers.models.convnext.modeling_convnext")
    for form, x in (("channels_first", torch.randn(2, 8, 3, 4)), ("channels_last", torch.randn(2, 3, 4, 8))):
        module = convnext.ConvNextLayerNorm(8, data_format=form)
        expected = module(x)
        report = detr_fast.accelerate(module)
        assert [one.now for one in report.switched] == ["detr_fast.nn.LayerNorm"]
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        for one in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module)), compiled):
            assert torch.equal(one(x), expected)
        with explaining(module) as records:
            module(x)
        assert [record.op for record in records] == ["layer_norm"]
        detr_fast.restore(module)
        assert type(module) is convnext.ConvNextLayerNorm


def test_modules_built_from_our_nn_are_not_restored():
    model = nn.Sequential(ours.LayerNorm(4), nn.LayerNorm(4))
    assert len(detr_fast.accelerate(model).switched) == 1
    detr_fast.restore(model)
    assert [type(m) for m in model] == [ours.LayerNorm, nn.LayerNorm]


@pytest.mark.parametrize("option", ["only", "skip"])
@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        ("encoder.layers.0", {"encoder.layers.0", *(f"encoder.layers.0.{p}" for p in ("self_attn", "norm1", "norm2"))}),
        ("*.norm1", {f"{part}.layers.{i}.norm1" for part in ("encoder", "decoder") for i in (0, 1)}),
        (["encoder.norm", "decoder.norm"], {"encoder.norm", "decoder.norm"}),
        (nn.TransformerEncoder, None),
    ],
    ids=["a layer", "a pattern", "names", "a class"],
)
def test_modules_are_selected_by_name_pattern_or_class(selection, expected, option):
    everything = {one.name for one in detr_fast.accelerate(transformer()).switched}
    if expected is None:
        expected = {name for name in everything if name.split(".")[0] == "encoder"}
    report = detr_fast.accelerate(transformer(), **{option: selection})
    assert {one.name for one in report.switched} == (expected if option == "only" else everything - expected)


def test_a_selection_among_thousands_of_modules_takes_no_longer_than_switching_them():
    model = nn.Sequential(*(nn.Sequential(*(nn.LayerNorm(1) for _ in range(9))) for _ in range(200)))
    start = time.process_time()
    assert len(detr_fast.accelerate(model, only="*").switched) == 1800
    assert time.process_time() - start < 1.0


def test_a_selection_that_matches_nothing_is_an_error_and_changes_nothing():
    model = transformer()
    before = classes(model)
    for option in ("only", "skip"):
        with pytest.raises(ValueError, match=rf"{option}: 'encodr' matches none.*named_modules"):
            detr_fast.accelerate(model, **{option: ["encoder", "encodr"]})
        with pytest.raises(ValueError, match="GRU matches none"):
            detr_fast.accelerate(model, **{option: nn.GRU})
        with pytest.raises(TypeError, match="takes names, glob patterns and classes; got 3"):
            detr_fast.accelerate(model, **{option: [3]})
        with pytest.raises(TypeError, match=rf"{option} takes names, glob patterns and classes; got LayerNorm"):
            detr_fast.accelerate(model, **{option: model.encoder.norm})
    assert classes(model) == before


@pytest.mark.parametrize("function", [detr_fast.accelerate, detr_fast.restore])
def test_what_is_no_module_is_refused(function):
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got list"):
        function([nn.LayerNorm(4)])


class Scaled(nn.LayerNorm):
    def forward(self, input):
        return 2 * super().forward(input)


class Renamed(nn.LayerNorm):
    """A subclass that adds something besides forward."""

    def scale(self):
        return self.weight.abs().max()


class LowRank(nn.Module):
    """What a LoRA library puts in a linear layer's place."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down, self.up = (nn.Linear(a, b, bias=False) for a, b in ((base.in_features, 2), (2, base.out_features)))
        self.weight, self.bias = base.weight, base.bias

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def lone(module):
    return nn.ModuleDict({"part": module})


def layer():
    return nn.TransformerEncoderLayer(16, 2, 24, 0.0, batch_first=True)


def replaced_forward():
    module = nn.LayerNorm(16)
    module.forward = lambda x: x
    return lone(module)


def hooked(register):
    def make():
        part = layer()
        getattr(part.linear2, register)(lambda *_: None)
        return lone(part)

    return make


def pruned():
    part = layer()
    prune.l1_unstructured(part.linear1, "weight", 0.5)
    return lone(part)


def low_rank():
    part = layer()
    part.linear1 = LowRank(part.linear1)
    return lone(part)


def low_rank_projection():
    part = nn.MultiheadAttention(16, 2)
    part.out_proj = LowRank(part.out_proj)
    return lone(part)


def quantized():
    return lone(torch.ao.quantization.quantize_dynamic(layer(), {nn.Linear}, torch.qint8))


def parametrised_part():
    part = layer()
    parametrizations.weight_norm(part.linear1)
    return lone(part)


@pytest.mark.filterwarnings("ignore:.*deprecated")
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: lone(Scaled(16)), "Scaled overrides forward of torch.nn.LayerNorm"),
        (replaced_forward, "its forward was replaced on the instance"),
        (lambda: lone(parametrizations.weight_norm(nn.LayerNorm([4, 4]))), "weight is parametrised"),
        (
            lambda: lone(parametrizations.orthogonal(nn.MultiheadAttention(16, 2), "in_proj_weight")),
            "in_proj_weight is",
        ),
        (lambda: lone(torch.ao.nn.quantizable.MultiheadAttention(16, 2)), "it is quantised"),
        (quantized, "linear1 is a torch.ao.Linear where torch.nn.Linear is expected"),
        (parametrised_part, "linear1: weight is parametrised"),
        (low_rank, r"linear1 is a .*LowRank where torch.nn.Linear is expected: wrapped \(LoRA\)"),
        (low_rank_projection, "out_proj is a .*LowRank"),
        (pruned, "linear1 has hooks"),
        (hooked("register_forward_hook"), "linear2 has hooks, which must see its calls"),
        (hooked("register_forward_pre_hook"), "linear2 has hooks"),
        (hooked("register_full_backward_hook"), "linear2 has hooks"),
        (hooked("register_full_backward_pre_hook"), "linear2 has hooks"),
    ],
)
def test_what_is_not_as_torch_nn_made_it_is_left_alone_with_a_reason(make, reason):
    model = make()
    kind = type(model["part"])
    report = detr_fast.accelerate(model)
    assert type(model["part"]) is kind
    (left,) = [one for one in report.left if one.name == "part"]
    assert re.match(reason, left.reason), left.reason
    assert left.reason in str(report)


def test_hooked_and_wrapped_parts_run_in_a_layer_that_is_left_alone():
    model = lone(layer())
    model["part"].linear1 = LowRank(model["part"].linear1)
    seen = []
    model["part"].linear2.register_forward_hook(lambda *_: seen.append(1))
    x = torch.randn(2, 3, 16)
    expected = model["part"](x)
    detr_fast.accelerate(model)
    seen.clear()
    torch.testing.assert_close(model["part"](x), expected)
    assert seen == [1]
    assert type(model["part"].norm1) is ours.LayerNorm


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_a_subclass_that_keeps_forward_is_switched_and_stays_its_class(way):
    model = nn.Sequential(Renamed(16))
    x, text = torch.randn(3, 16), repr(model)
    expected = model(x)
    report = detr_fast.accelerate(model)
    assert [one.name for one in report.switched] == ["0"]
    twin = copied(model, way)
    for one in (model, twin):
        assert isinstance(one[0], Renamed)
        assert isinstance(one[0], ours.LayerNorm)
        assert repr(one) == text
        assert one[0].scale() == 1
        with use_backend(layer_norm="eager"):
            assert torch.equal(one(x), expected)
        detr_fast.restore(one)
        assert type(one[0]) is Renamed


def copied(model, way):
    if way == "deepcopy":
        return copy.deepcopy(model)
    if way == "pickle":
        return pickle.loads(pickle.dumps(model))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_accelerated_and_can_be_restored(way):
    model = transformer()
    before, expected = classes(model), padded(model)[0]
    detr_fast.accelerate(model)
    twin = copied(model, way)
    assert classes(twin) == classes(model)
    assert torch.equal(padded(twin)[0], expected)
    detr_fast.restore(twin)
    assert classes(twin) == before
    assert classes(model) != before


def test_state_dicts_go_both_ways():
    plain, fast = transformer(), transformer()
    detr_fast.accelerate(fast)
    assert list(plain.state_dict()) == list(fast.state_dict())
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(0.1)
    fast.load_state_dict(plain.state_dict())
    torch.testing.assert_close(padded(fast), padded(plain))
    plain.load_state_dict(fast.state_dict())


def test_training_goes_on_where_it_was_with_the_optimizers_state():
    def train(model, steps, optimizer):
        losses = []
        for step in range(steps):
            torch.manual_seed(step)
            optimizer.zero_grad()
            loss = (padded(model)[0] - torch.randn(3, 4, 16)).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    histories = []
    for switch in (False, True):
        model = transformer()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        history = train(model, 3, optimizer)
        if switch:
            detr_fast.accelerate(model)
        with use_backend(**({"attention": "sdpa"} if switch else {"attention": "auto"})):
            history += train(model, 3, optimizer)
        if switch:
            detr_fast.restore(model)
        histories.append(history + train(model, 2, optimizer))
    torch.testing.assert_close(*map(torch.tensor, histories))
    assert histories[0][-1] < histories[0][0]


def test_the_same_random_numbers_are_drawn():
    plain, fast = (transformer(dropout=0.3) for _ in range(2))
    detr_fast.accelerate(fast)
    found = []
    for model in (plain, fast):
        torch.manual_seed(5)
        found.append(padded(model)[0])
    assert torch.equal(*found)


def test_a_shared_module_is_switched_once():
    norm = nn.LayerNorm(16)
    model = nn.ModuleList([norm, norm])
    assert len(detr_fast.accelerate(model).switched) == 1
    assert type(norm) is ours.LayerNorm


def test_a_shared_module_is_selected_by_each_of_its_names():
    norm = nn.LayerNorm(16)
    model = nn.ModuleList([norm, norm])
    assert not detr_fast.accelerate(model, skip="1").switched
    assert [one.name for one in detr_fast.accelerate(model, only="1").switched] == ["0"]


def test_the_report_says_what_was_switched_left_and_how_much_it_costs():
    model = nn.Sequential(nn.LayerNorm(8), Scaled(8), nn.LayerNorm(8))
    report = detr_fast.accelerate(model, example_inputs=(torch.ones(3, 8),))
    assert repr(report) == str(report)  # what a notebook shows
    lines = str(report).splitlines()
    assert lines[0] == "Sequential: 2 modules switched, 1 left alone"
    assert "  2 × torch.nn.LayerNorm -> detr_fast.nn.LayerNorm" in lines
    assert any(line.startswith("  left alone: 1 (") and "Scaled overrides forward" in line for line in lines)
    assert any(line.startswith("0: layer_norm (3, 8) float32 -> ") and "1 launch" in line for line in lines)
    assert lines[-1].startswith("in all: 4 launches")  # three norms and Scaled's product
    data = report.as_dict()
    assert [one["name"] for one in data["switched"]] == ["0", "2"]
    assert data["explanation"][0]["launches"] == 1


def test_example_inputs_may_be_keywords_and_must_be_one_or_the_other():
    model = nn.Sequential(nn.LayerNorm(8))
    assert detr_fast.accelerate(model, example_inputs={"input": torch.ones(2, 8)}).explanation[0].op == "layer_norm"
    with pytest.raises(TypeError, match=r"example_inputs must be a tuple.*got Tensor. Write example_inputs=\(x,\)"):
        detr_fast.accelerate(model, example_inputs=torch.ones(2, 8))


def test_a_model_with_nothing_known_in_it_says_what_would_be():
    report = str(detr_fast.accelerate(nn.Linear(2, 2)))
    assert report.splitlines()[0] == "Linear: 0 modules switched, 0 left alone"
    assert "nothing that is known was found, or selected: torch.nn's transformer parts" in report
    built = detr_fast.accelerate(detr_fast.nn.TransformerEncoderLayer(8, 2, 8))
    assert f"{built.own} are of detr_fast.nn, which needs no switching" in str(built)
    assert built.own == built.as_dict()["own"] == 4  # the layer, its attention and its norms
