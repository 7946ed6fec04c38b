"""Hugging Face transformers' models, with random weights: the same numbers, padding hidden, registries left as found."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections import Counter

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import detr_fast
from detr_fast import nn, use_backend
from detr_fast.explanation import explaining
from detr_fast.ops import regimes
from detr_fast.ops.layers import ENCODER_LAYER
from detr_fast.testing.counters import count

transformers = pytest.importorskip("transformers")

DETECTOR = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "num_queries": 5,
    "num_labels": 3,
    "dropout": 0.0,
    "use_timm_backbone": False,
}
TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def detector(kind, **options):
    torch.manual_seed(1)
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], out_features=["stage4"]
    )
    config = getattr(transformers, f"{kind}Config")(**{**DETECTOR, **options}, backbone_config=backbone)
    return getattr(transformers, f"{kind}ForObjectDetection")(config).requires_grad_(True)


def detect(model):
    """Two images, the second one padded on both sides; running statistics of the backbone stay as they are."""
    parameter = next(model.parameters())
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(2)).to(parameter.dtype)
    mask = torch.ones(2, 64, 96, dtype=torch.long)
    mask[1, 40:], mask[1, :, 50:] = 0, 0
    outputs = model(images, pixel_mask=mask)
    return [outputs.logits, outputs.pred_boxes]


def bert(**options):
    torch.manual_seed(1)
    config = transformers.BertConfig(vocab_size=30, **TEXT, **{**NO_DROPOUT, **options})
    return transformers.BertModel(config, add_pooling_layer=False)


PADDED = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 1, 0]])


def read(model, mask=PADDED):
    tokens = torch.arange(18).view(3, 6) % 30
    return [model(tokens, attention_mask=mask).last_hidden_state]


def vit(**options):
    torch.manual_seed(1)
    config = transformers.ViTConfig(**TEXT, **{**NO_DROPOUT, **options}, image_size=24, patch_size=8, num_labels=3)
    return transformers.ViTForImageClassification(config)


def look(model):
    dtype = next(model.parameters()).dtype
    return [model(torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(2)).to(dtype)).logits]


MODELS = {
    "Detr": (lambda **options: detector("Detr", **options), detect),
    "ConditionalDetr": (lambda **options: detector("ConditionalDetr", **options), detect),
    "TableTransformer": (lambda **options: detector("TableTransformer", **options), detect),
    "Bert": (bert, read),
    "ViT": (vit, look),
}
ATTENTIONS = {"Detr": 6, "ConditionalDetr": 6, "TableTransformer": 6, "Bert": 2, "ViT": 2}


def freeze_statistics(model):
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    return model


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_are_as_before(name, training, assert_unchanged):
    make, call = MODELS[name]
    model = freeze_statistics(make().train(training))
    report = assert_unchanged(model, call)
    assert not report.left
    switched = [one for one in report.switched if "Attention" in one.original]
    assert len(switched) == ATTENTIONS[name]
    assert sum(one.original == "torch.nn.LayerNorm" for one in report.switched) == sum(
        isinstance(m, torch.nn.LayerNorm) for m in model.modules()
    )


# Norms that are computed with the sum before them, and those that are not: a layer's first, and those behind stacks.
SUMS = {"Detr": (10, 1), "ConditionalDetr": (10, 1), "TableTransformer": (6, 6), "Bert": (4, 1), "ViT": (2, 3)}


@pytest.mark.parametrize("name", MODELS)
def test_residual_sums_and_norms_are_one_op_and_feed_forward_blocks_another(name):
    make, call = MODELS[name]
    model = make().eval()
    detr_fast.accelerate(model)
    with explaining(model) as records, torch.no_grad():
        call(model)
    counts = Counter()
    for record in records:
        counts[record.op] += record.calls
    assert (counts["add_layer_norm"], counts["layer_norm"]) == SUMS[name]
    assert counts["feed_forward"] >= (2 if name in ("Bert", "ViT") else 4)
    whole = [r for r in records if "+ norm" in r.shapes]  # a block with its norm, which no kernel takes here
    assert bool(whole) is (name not in ("ViT", "TableTransformer"))
    assert all(str(r).startswith(f"{r.module}: feed_forward {r.shapes} -> its parts") for r in whole)


@pytest.mark.parametrize("name", MODELS)
def test_every_attention_runs_on_the_op_and_padding_reaches_it(name):
    make, call = MODELS[name]
    model = make().eval()
    detr_fast.accelerate(model)
    with explaining(model) as records, torch.no_grad():
        call(model)
    attentions = [r for r in records if r.op == "attention"]
    assert len(attentions) == ATTENTIONS[name]
    assert all(r.calls == 1 for r in attentions)
    expected = {"Bert": 2, "ViT": 0}.get(name, 4)  # a detector's encoder layers, and its decoder's attention to memory
    assert sum("key_padding_mask" in r.shapes for r in attentions) == expected


@pytest.mark.parametrize("backend", ["auto", "sdpa", "eager"])
def test_hidden_tokens_change_nothing(backend):
    model = bert().eval()
    detr_fast.accelerate(model)
    tokens = torch.arange(18).view(3, 6) % 30
    others = torch.where(PADDED.bool(), tokens, (tokens + 7) % 30)
    with use_backend(attention=backend), torch.no_grad():
        found, expected = (model(t, attention_mask=PADDED).last_hidden_state for t in (others, tokens))
    torch.testing.assert_close(found[PADDED.bool()], expected[PADDED.bool()])


@pytest.mark.parametrize("name", MODELS)
def test_restore_brings_back_classes_and_configuration(name):
    make, call = MODELS[name]
    model = make().eval()
    before = [type(m) for m in model.modules()], [set(m.__dict__) for m in model.modules()]
    implementation, expected = model.config._attn_implementation, call(model)
    detr_fast.accelerate(model)
    detr_fast.restore(model)
    assert ([type(m) for m in model.modules()], [set(m.__dict__) for m in model.modules()]) == before
    assert model.config._attn_implementation == implementation
    assert all(map(torch.equal, call(model), expected))


@pytest.mark.parametrize("name", ["Detr", "TableTransformer"])
def test_copies_pickles_and_state_dicts_keep_it_accelerated(name):
    make, call = MODELS[name]
    model = make().eval()
    keys, expected = list(model.state_dict()), call(model)
    detr_fast.accelerate(model)
    assert list(model.state_dict()) == keys
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with explaining(twin) as records:
            torch.testing.assert_close(call(twin), expected)
        assert sum(r.op == "attention" for r in records) == 6
        detr_fast.restore(twin)
        with explaining(twin) as records:
            call(twin)
        assert not records


def test_a_pickle_is_read_by_a_process_that_has_accelerated_nothing(tmp_path):
    model = bert().eval()
    expected = read(model)[0]
    detr_fast.accelerate(model)
    torch.save((model, expected), tmp_path / "model.pt")
    script = (
        "import sys, torch; model, expected = torch.load(sys.argv[1], weights_only=False)\n"
        "mask = torch.tensor([[1]*6, [1]*3+[0]*3, [0]+[1]*4+[0]])\n"
        "y = model(torch.arange(18).view(3, 6) % 30, attention_mask=mask).last_hidden_state\n"
        "torch.testing.assert_close(y, expected)"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "model.pt")], check=True, timeout=300)


def test_a_saved_configuration_does_not_name_us(tmp_path):
    model = bert()
    detr_fast.accelerate(model)
    model.save_pretrained(tmp_path)
    assert "detr_fast" not in (tmp_path / "config.json").read_text()
    again = transformers.BertModel.from_pretrained(tmp_path, add_pooling_layer=False).eval()
    assert again.config._attn_implementation == "sdpa"
    torch.testing.assert_close(read(again), read(model.eval()))


def test_only_the_modules_selected_run_on_the_op():
    model = detector("Detr").eval()
    expected = detect(model)
    detr_fast.accelerate(model, only="model.encoder")
    with explaining(model) as records:
        found = detect(model)
    torch.testing.assert_close(found, expected)
    assert {r.module.split(".")[1] for r in records} == {"encoder"}
    assert sum(r.op == "attention" for r in records) == 2


def test_another_model_of_the_same_configuration_runs_as_before():
    config = transformers.BertConfig(vocab_size=30, **TEXT, **NO_DROPOUT)
    first, second = (transformers.BertModel(config, add_pooling_layer=False).eval() for _ in range(2))
    expected = read(second)
    detr_fast.accelerate(first)
    with explaining(second) as records:
        found = read(second)
    assert not records
    assert torch.equal(found[0], expected[0])


@pytest.mark.parametrize("implementation", ["eager", "flex_attention"])
def test_a_model_on_another_attention_is_left_on_it_with_a_reason(implementation):
    model = bert()
    model.set_attn_implementation(implementation)
    report = detr_fast.accelerate(model)
    assert model.config._attn_implementation == implementation
    assert {one.reason for one in report.left} == {
        f"its model runs on {implementation!r} attention, which returns or needs what SDPA does not; "
        "call model.set_attn_implementation('sdpa') first"
    }
    assert not [one for one in report.switched if "attention" in one.now]


def test_a_causal_model_stays_causal():
    torch.manual_seed(1)
    config = transformers.BertConfig(vocab_size=30, **TEXT, **NO_DROPOUT, is_decoder=True)
    model = transformers.BertLMHeadModel(config).eval()
    tokens = torch.arange(12).view(2, 6)
    masks = (None, torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]]))
    with torch.no_grad():
        expected = [model(tokens, attention_mask=m).logits for m in masks]
        generated = model.generate(tokens[:, :3], max_new_tokens=3, do_sample=False)
        detr_fast.accelerate(model)
        with explaining(model) as records:
            for m, logits in zip(masks, expected):
                torch.testing.assert_close(model(tokens, attention_mask=m).logits, logits)
            assert torch.equal(model.generate(tokens[:, :3], max_new_tokens=3, do_sample=False), generated)
    assert any("causal" in r.shapes for r in records)


def test_a_batch_without_padding_needs_no_mask():
    model = bert().eval()
    detr_fast.accelerate(model)
    with explaining(model) as records:
        read(model, torch.ones(3, 6, dtype=torch.long))
    assert not [r for r in records if "mask" in r.shapes]


def test_weights_that_are_asked_for_come_from_table_transformers_own_forward():
    model = detector("TableTransformer").eval()
    images = torch.randn(1, 3, 64, 64)
    expected = model(images, output_attentions=True)
    detr_fast.accelerate(model)
    with use_backend(attention="sdpa"):
        found = model(images, output_attentions=True)
    for mine, theirs in zip(found.encoder_attentions, expected.encoder_attentions, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("name", MODELS)
def test_dropout_draws_what_it_drew(name):
    make, call = MODELS[name]
    options = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2} if name in ("Bert", "ViT") else {}
    model = freeze_statistics(make(**(options or {"attention_dropout": 0.2})).train())
    torch.manual_seed(4)
    expected = call(model)
    detr_fast.accelerate(model)
    torch.manual_seed(4)
    assert all(map(torch.equal, call(model), expected))


@pytest.mark.parametrize("name", ["Detr", "ConditionalDetr", "Bert", "ViT"])
def test_dropout_before_a_sum_draws_what_it_drew(name):
    make, call = MODELS[name]
    options = {"hidden_dropout_prob": 0.2} if name in ("Bert", "ViT") else {"dropout": 0.2, "activation_dropout": 0.2}
    model = freeze_statistics(make(**options).train())
    torch.manual_seed(4)
    expected = call(model)
    detr_fast.accelerate(model)
    torch.manual_seed(4)
    with use_backend(attention="sdpa"):
        for found, y in zip(call(model), expected, strict=True):
            torch.testing.assert_close(found, y)


@pytest.mark.parametrize("name", ["Detr", "Bert", "ViT"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_gradients_that_it_gave(name, reentrant, step):
    make, call = MODELS[name]
    model = freeze_statistics(make().train())
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    _, expected = step(model, call)
    detr_fast.accelerate(model)
    _, found = step(model, call, {"attention": "sdpa"})
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["Detr", "TableTransformer"])
def test_an_encoder_layer_in_training_does_not_ask_the_device_whether_all_is_finite(name):
    model = detector(name).train()
    layer = model.model.encoder.layers[0].to("meta")  # tensors that hold nothing: whoever asks fails
    arguments = (torch.empty(2, 6, 32, device="meta"), None, torch.empty(2, 6, 32, device="meta"))
    with pytest.raises(Exception, match=r"item\(\)|meta"):
        layer(*arguments)
    detr_fast.accelerate(layer)
    with use_backend(attention="sdpa"):
        layer(*arguments)


def test_a_decoder_layer_in_training_launches_16_instead_of_25():
    layer = detector("Detr", dropout=0.1).train().model.decoder.layers[0].to("meta")
    x, queries, memory, positions = (torch.empty(2, n, 32, device="meta", requires_grad=True) for n in (5, 5, 40, 40))

    def forward():
        return layer(x, None, positions, queries, memory, None)

    before = count(forward).total_launches
    detr_fast.accelerate(layer)
    with use_backend("triton"):
        after = count(forward).total_launches
    assert (before, after) == (25, 16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [1.0, float("inf"), float("-inf"), float("nan"), "largest"])
def test_what_is_not_finite_is_clamped_as_transformers_does(dtype, value):
    from detr_fast.adapters.hugging_face_blocks import clamped

    x = torch.tensor([0.5, torch.finfo(dtype).max if value == "largest" else value]).to(dtype)
    expected = x
    if not torch.isfinite(x).all():
        limit = torch.finfo(dtype).max - 1000
        expected = torch.clamp(x, min=-limit, max=limit)
    torch.testing.assert_close(clamped(x), expected, rtol=0, atol=0, equal_nan=True)


PARTS = {
    "Detr": ["encoder.layers.0.mlp", "encoder.layers.0.mlp.fc2", "decoder.layers.1.final_layer_norm"],
    "TableTransformer": ["encoder.layers.0.fc1", "decoder.layers.0.encoder_attn_layer_norm"],
    "Bert": [
        "encoder.layer.0.output",
        "encoder.layer.0.intermediate.intermediate_act_fn",
        "encoder.layer.0.intermediate",
        "encoder.layer.1.attention.output.LayerNorm",
    ],
    "ViT": ["layers.0.mlp", "layers.1.layernorm_after"],
}


@pytest.mark.parametrize(("name", "part"), [(name, part) for name, parts in PARTS.items() for part in parts])
@pytest.mark.parametrize("way", ["a hook", "a forward of its own"])  # as offloading libraries give modules
def test_a_part_that_is_hooked_later_is_called(name, part, way):
    make, call = MODELS[name]
    model, seen = make().eval(), []
    detr_fast.accelerate(model)
    (module,) = [m for n, m in model.named_modules() if n.endswith(part)]
    if way == "a hook":
        module.register_forward_hook(lambda *_: seen.append(1))
    else:
        forward = module.forward
        module.forward = lambda *args, **kwargs: (seen.append(1), forward(*args, **kwargs))[1]
    with explaining(model):
        call(model)
    assert seen == [1]


def test_a_layer_whose_block_is_skipped_calls_it():
    model = detector("Detr").eval()
    expected = detect(model)
    detr_fast.accelerate(model, skip="*.mlp")
    with explaining(model) as records:
        torch.testing.assert_close(detect(model), expected)
    assert not [r for r in records if r.op == "feed_forward"]
    assert sum(r.calls for r in records if r.op == "add_layer_norm") == 10


def test_leaving_accelerated_keeps_the_modules_running_that_were_switched_before():
    model = bert().eval()
    detr_fast.accelerate(model, only="encoder.layer.0")
    with detr_fast.accelerated(model):
        pass
    with explaining(model) as records:
        read(model)
    assert [r.module for r in records if r.op == "attention"] == ["encoder.layer.0.attention.self"]


@pytest.mark.parametrize("name", ["Detr", "Bert"])
def test_a_padded_batch_compiles_to_one_graph(name):
    make, call = MODELS[name]
    model = make().eval()
    expected = call(model)
    detr_fast.accelerate(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(call(compiled), expected)


def test_a_layer_that_was_measured_to_be_faster_launches_what_torch_nns_does(monkeypatch):
    """An H100 that was measured to be faster with whole layers, and the copies by which weights are joined."""
    monkeypatch.setattr(regimes, "known", lambda: (regimes.Regime("encoder_layer", "sm_90", 1, 0, "a test"),))
    ENCODER_LAYER.forget()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with FakeTensorMode(), torch.device("cuda"):
            layer = detector("Detr", d_model=256, dropout=0.1).model.encoder.layers[0].train()
            x = torch.randn(2, 850, 256)
            detr_fast.accelerate(layer)
            found = count(layer, x, None).launches
            expected = count(nn.TransformerEncoderLayer(256, 4, 48, batch_first=True), x).launches
    finally:
        torch.set_default_dtype(torch.float32)
        ENCODER_LAYER.forget()
    assert found - expected == {"aten.cat.default": 2}
    assert not expected - found
