"""Language models of transformers whose attentions write out their scores, or whose layers are no Llama's: as before, on our ops."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

import detr_fast
from detr_fast import use_backend
from detr_fast.explanation import explaining

transformers = pytest.importorskip("transformers")
bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom")

TOKENS = {"vocab_size": 20, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WIDTHS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
QUIET = dict.fromkeys(("hidden_dropout", "attention_dropout", "dropout", "resid_dropout", "embed_dropout"), 0.0)
QUIET |= dict.fromkeys(
    ("hidden_dropout_prob", "attention_probs_dropout_prob", "attn_pdrop", "resid_pdrop", "embd_pdrop"), 0.0
)
NEO = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}
BLOOM = {"hidden_size": 32, "n_layer": 2, "n_head": 4}
FEED_FORWARD = {"attention": 2, "add_layer_norm": 2, "feed_forward": 2}
# A class, its configuration, and how often each op is taken in a forward.
MODELS = {
    "OPT": ("OPTForCausalLM", {**WIDTHS, "ffn_dim": 48, "word_embed_proj_dim": 32}, FEED_FORWARD),
    "OPT, normalised behind": (
        "OPTForCausalLM",
        {**WIDTHS, "ffn_dim": 48, "word_embed_proj_dim": 32, "do_layer_norm_before": False},
        {**FEED_FORWARD, "add_layer_norm": 4},
    ),
    "BioGpt": ("BioGptForCausalLM", {**WIDTHS, "intermediate_size": 48}, FEED_FORWARD),
    "GPTNeo": ("GPTNeoForCausalLM", {**NEO, "window_size": 3}, FEED_FORWARD),
    "GPTJ": (
        "GPTJForCausalLM",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
        {"attention": 2, "feed_forward": 2},
    ),
    "Bloom": ("BloomForCausalLM", BLOOM, FEED_FORWARD),
    "Bloom, sums of norms": (
        "BloomForCausalLM",
        {**BLOOM, "apply_residual_connection_post_layernorm": True},
        FEED_FORWARD,
    ),
    "Mpt": (
        "MptForCausalLM",
        {"d_model": 32, "n_layers": 2, "n_heads": 4, "attn_config": {"clip_qkv": 0.5}},
        FEED_FORWARD,
    ),
}
IDS = torch.arange(3, 15).view(2, 6)
RIGHT = torch.tensor([[1] * 6, [1, 1, 1, 1, 0, 0]])
LEFT = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])


def made(name, **options):
    torch.manual_seed(1)
    kind, sizes, _ = MODELS[name]
    settings = getattr(transformers, kind.replace("ForCausalLM", "Config"))
    model = getattr(transformers, kind)(settings(**{**QUIET, **TOKENS, **sizes, **options}))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.1)
    return model.train()


def read(model):
    return [model(input_ids=IDS, attention_mask=RIGHT).logits]


def assert_close(found, expected):
    """In fp32, as some of theirs compute their scores in it whatever the model's dtype is."""
    outputs, gradients = expected
    torch.testing.assert_close(found[0], outputs, rtol=1e-4, atol=1e-5)
    assert found[1].keys() == gradients.keys()
    largest = max(float(one.abs().max()) for one in gradients.values())
    for name, one in gradients.items():
        torch.testing.assert_close(
            found[1][name], one, rtol=1e-3, atol=1e-5 * largest, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_as_before_and_runs_on_our_ops(name, step):
    model = made(name)
    before = step(model, read)
    names = list(model.state_dict())
    report = detr_fast.accelerate(model)
    assert not report.left
    for exact, backend in ((True, None), (False, {"attention": "eager"}), (False, {"attention": "sdpa"})):
        found = step(model, read, backend)
        assert_close(found, before)
        assert not exact or torch.equal(found[0][0], before[0][0])
    with explaining(model) as records, torch.no_grad(), use_backend(attention="eager"):
        read(model)
    taken = Counter()
    for record in records:
        taken[record.op] += 0 if "+ norm" in record.shapes or "+ residual" in record.shapes else record.calls
    ops = MODELS[name][2]
    assert {op: taken[op] for op in ops} == ops
    detr_fast.restore(model)
    assert list(model.state_dict()) == names
    assert not any("detr_fast" in type(module).__module__ for module in model.modules())


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("name", "one_layer"),
    [
        ("GPTNeo", {"num_layers": 1, "attention_types": [[["local"], 1]]}),
        ("Bloom", {"n_layer": 1}),
        ("Mpt", {"n_layers": 1}),
    ],
)
def test_a_model_is_as_before_on_kernels(name, one_layer, step):
    model = made(name, **one_layer)
    before = step(model, read)
    detr_fast.accelerate(model)
    with explaining(model) as records:
        assert_close(step(model, read, {"*": "triton"}), before)
    assert {"attention", "add_layer_norm"} <= {r.op for r in records if r.chosen == "triton"}


@pytest.mark.parametrize("name", ["GPTNeo", "GPTJ", "Bloom", "Mpt"])
def test_weights_that_are_asked_for_are_theirs(name):
    model = made(name).eval()
    expected = model(input_ids=IDS, attention_mask=RIGHT, output_attentions=True)
    detr_fast.accelerate(model)
    with use_backend(attention="eager"):
        found = model(input_ids=IDS, attention_mask=RIGHT, output_attentions=True)
    torch.testing.assert_close(found.logits, expected.logits)
    torch.testing.assert_close(found.attentions, expected.attentions)
    assert all(one is not None for one in found.attentions)


@pytest.mark.parametrize("name", ["OPT", "GPTNeo", "GPTJ", "Bloom", "Mpt"])
@pytest.mark.parametrize("cache", ["dynamic", "static", None])
def test_what_is_generated_stays_the_same_with_and_without_a_cache(name, cache):
    model = made(name).eval()
    options = {"max_new_tokens": 4, "do_sample": False, "use_cache": cache is not None, "cache_implementation": cache}
    expected = model.generate(input_ids=IDS, attention_mask=LEFT, **options)
    detr_fast.accelerate(model)
    with use_backend(attention="eager"):
        assert torch.equal(model.generate(input_ids=IDS, attention_mask=LEFT, **options), expected)


@pytest.mark.parametrize("name", ["OPT", "GPTNeo", "Bloom"])
def test_a_layers_dropout_draws_what_it_drew(name):
    model = made(name, **dict.fromkeys(("dropout", "hidden_dropout", "resid_dropout"), 0.2))
    torch.manual_seed(4)
    (expected,) = read(model)
    detr_fast.accelerate(model)
    torch.manual_seed(4)
    with use_backend(attention="eager"):
        torch.testing.assert_close(read(model)[0], expected)


def test_a_parts_own_mode_says_whether_it_drops():
    model = made("Bloom", hidden_dropout=0.5)
    for block in model.transformer.h:
        block.self_attention.eval()
    torch.manual_seed(4)
    (expected,) = read(model)
    detr_fast.accelerate(model)
    torch.manual_seed(4)
    with use_backend(attention="eager"):
        torch.testing.assert_close(read(model)[0], expected)


def test_blocks_whose_parts_somebody_looks_at_or_replaced_call_them():
    model = made("Bloom").eval()
    expected = read(model)
    detr_fast.accelerate(model)
    seen = []
    model.transformer.h[0].self_attention.register_forward_hook(lambda *given: seen.append(given[2][1].shape))
    model.transformer.h[1].mlp.__class__ = type("Mine", (bloom.BloomMLP,), {})
    with use_backend(attention="eager"), explaining(model) as records:
        torch.testing.assert_close(read(model), expected)
    assert seen == [(2, 4, 6, 6)]
    assert not any(one.op == "attention" for one in records)


def test_bias_and_mask_are_added_up_once_for_all_layers():
    model = made("Bloom").eval()
    detr_fast.accelerate(model)
    with use_backend(attention="sdpa"), torch.profiler.profile(record_shapes=True) as profile, torch.no_grad():
        read(model)
    sums = [one for one in profile.events() if one.name == "aten::add" and one.input_shapes[:1] == [[2, 4, 1, 6]]]
    assert len(sums) == 1
