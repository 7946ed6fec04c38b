"""Which of Hugging Face transformers' attentions run on `ops.attention`, which don't, and how one sees that."""

from __future__ import annotations

import importlib

import pytest
import torch

import detr_fast
from detr_fast import use_backend
from detr_fast.dispatch import BackendError
from detr_fast.explanation import explaining
from detr_fast.testing import count

transformers = pytest.importorskip("transformers")
hugging_face = pytest.importorskip("detr_fast.adapters.hugging_face")

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 30}
TOKENS = torch.arange(18).view(3, 6)
PADDED = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 1, 0]])


def made(kind, **options):
    torch.manual_seed(1)
    sizes = {**SIZES, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**sizes, **options)).eval()


def last(model, mask=PADDED, **options):
    with torch.no_grad():
        return model(TOKENS, attention_mask=mask, **options).last_hidden_state


def test_an_attention_that_is_set_afterwards_is_the_users():
    model = made("Bert")
    detr_fast.accelerate(model)
    model.set_attn_implementation("eager")
    left = {one.reason for one in detr_fast.accelerate(model).left}
    assert ["runs on 'eager' attention" in reason for reason in left] == [True]
    assert model(TOKENS, output_attentions=True).attentions[0] is not None
    model.set_attn_implementation("sdpa")
    assert not detr_fast.accelerate(model).left
    with explaining(model) as records:
        last(model)
    assert sum(r.op == "attention" for r in records) == 2
    model.set_attn_implementation("eager")
    detr_fast.restore(model)
    assert model.config._attn_implementation == "eager"


def test_a_model_that_asks_whether_attention_is_sdpa_is_left_alone():
    torch.manual_seed(1)
    experts = {
        "moe_intermediate_size": 16,
        "n_routed_experts": 2,
        "num_experts_per_tok": 1,
        "n_group": 1,
        "topk_group": 1,
    }
    heads = {"num_key_value_heads": 4, "kv_lora_rank": 8, "q_lora_rank": 16, "v_head_dim": 8, "qk_nope_head_dim": 8}
    index = {"index_topk": 3, "index_head_dim": 16, "index_n_heads": 2, "qk_rope_head_dim": 8}
    config = transformers.DeepseekV32Config(**{**SIZES, **experts, **heads, **index, "first_k_dense_replace": 2})
    model = transformers.DeepseekV32Model(config).eval()
    tokens = torch.arange(2, 22).view(2, 10)
    expected = model(tokens).last_hidden_state
    report = detr_fast.accelerate(model)
    assert torch.equal(model(tokens).last_hidden_state, expected)  # under another name keys would not be hidden
    assert model.config._attn_implementation == "sdpa"
    taken = [one.now for one in report.switched if one.name.endswith("self_attn")]
    assert len(taken) == 2
    assert all(one.startswith("detr_fast.ops.rotary_embedding (its model's code asks whether") for one in taken)
    again = detr_fast.accelerate(model)
    assert torch.equal(model(tokens).last_hidden_state, expected)
    assert model.config._attn_implementation == "sdpa"
    assert len([one for one in again.left if "asks whether attention is 'sdpa'" in one.reason]) == 2


def test_fewer_heads_of_keys_run_on_what_is_asked_for_by_name_and_else_on_transformers_sdpa():
    model = made("Mistral", num_key_value_heads=2)  # which also passes its window on
    for mask in (PADDED, None):
        expected = last(model, mask)
        with detr_fast.accelerated(model):
            with explaining(model) as records:
                assert torch.equal(last(model, mask), expected)
            assert {r.chosen for r in records if r.op == "attention"} == {"transformers' sdpa"}
            assert all("fewer heads" in r.reasons["triton"] for r in records if r.op == "attention")
            with use_backend(attention="eager"), explaining(model) as records:
                torch.testing.assert_close(last(model, mask), expected)
            assert {r.chosen for r in records if r.op == "attention"} == {"eager"}


@pytest.mark.parametrize(
    ("kind", "options", "apart"),
    [
        ("Bert", {"is_decoder": True}, True),
        ("Mistral", {"num_key_value_heads": 2, "sliding_window": 8}, False),  # whose mask is also the window's
    ],
)
def test_causal_order_and_padding_stay_apart_where_a_mask_is_made_of_both(kind, options, apart):
    model = made(kind, **options)
    expected = last(model)
    detr_fast.accelerate(model)
    assert torch.equal(last(model), expected)
    for backend in ("eager", "sdpa"):
        with use_backend(attention=backend), explaining(model) as records:
            torch.testing.assert_close(last(model), expected)
        shapes = {r.shapes for r in records if r.op == "attention" and r.chosen == backend}
        assert all(one.endswith("key_padding_mask causal") == apart for one in shapes)
    with use_backend(attention="eager"), torch.no_grad():
        cache = model(TOKENS[:, :4], attention_mask=PADDED[:, :4], use_cache=True).past_key_values
        found = model(TOKENS[:, 4:], attention_mask=PADDED, past_key_values=cache).last_hidden_state
    torch.testing.assert_close(found, expected[:, 4:])


class Attends(torch.nn.Module):
    """One of transformers' attentions, asked of a model that runs on its SDPA."""

    def __init__(self, model, kind, **options):
        super().__init__()
        module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
        config = transformers.WhisperConfig(d_model=16, decoder_attention_heads=2)
        config._attn_implementation = "sdpa"
        self.attention = getattr(module, kind)(16, 2, config=config, **options)

    def forward(self, x, **given):
        return self.attention(x, **given)[0]


@pytest.mark.parametrize(
    ("model", "kind", "options"),
    [
        ("whisper", "WhisperAttention", {}),
        ("whisper", "WhisperAttention", {"is_causal": True, "is_decoder": True, "layer_idx": 0}),
        ("qwen2_audio", "Qwen2AudioAttention", {}),
    ],
)
def test_an_attention_that_copied_queries_keys_and_values_no_longer_does(model, kind, options, assert_unchanged):
    torch.manual_seed(1)
    layer = Attends(model, kind, **options)
    meta = Attends(model, kind, **options).to("meta", torch.bfloat16)
    x, memory = torch.randn(2, 3, 4, 16, dtype=torch.float64)
    mask = torch.ones(3, 1, 4, 4, dtype=torch.bool).tril()
    report = assert_unchanged(layer, lambda one: [one(x), one(x, attention_mask=mask)])
    assert len(report.switched) == 1
    assert not report.left
    if kind == "WhisperAttention":
        detr_fast.restore(layer)
        assert_unchanged(layer, lambda one: [one(x, key_value_states=memory)])
    empty = torch.empty(3, 4, 16, device="meta", dtype=torch.bfloat16)
    before = count(lambda: meta(empty)).total_launches
    detr_fast.accelerate(meta)
    with use_backend("triton"):
        assert (before, count(lambda: meta(empty)).total_launches) == (10, 5)


def test_what_attention_is_given_beyond_ours_is_transformers_and_refused_by_name():
    model = made("Bert")
    expected = last(model)
    detr_fast.accelerate(model)
    with explaining(model) as records:
        assert torch.equal(last(model, max_length_q=6), expected)
    assert "gives it max_length_q" in next(r for r in records if r.op == "attention").reasons["triton"]
    with use_backend(attention="sdpa"):
        assert torch.equal(last(model, max_length_q=6), expected)
    with use_backend(attention="eager"), pytest.raises(BackendError, match="BertSelfAttention gives it max_length_q"):
        last(model, max_length_q=6)


def test_a_transformers_that_asks_for_masks_by_other_arguments_keeps_its_attention(monkeypatch):
    def sdpa_mask(batch_size, cache_position, kv_length, kv_offset=0, **options):  # as transformers 5.0 has it
        raise AssertionError("ours would be called so, too")

    monkeypatch.setattr(hugging_face, "sdpa_mask", sdpa_mask)
    model = made("Bert")
    expected = last(model)
    reasons = {one.reason for one in detr_fast.accelerate(model).left}
    given = "(batch_size, cache_position, kv_length, kv_offset, options)"
    assert reasons == {f"transformers {transformers.__version__} asks for masks differently {given}: use a newer one"}
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(last(model), expected)
