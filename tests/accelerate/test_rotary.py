"""Attentions of transformers that turn queries and keys by rotary positions: as before, in one launch."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import detr_fast
from detr_fast import use_backend
from detr_fast.explanation import explaining
from detr_fast.testing import count
from detr_fast.testing.interpreter import checked_interpreter

transformers = pytest.importorskip("transformers")
llama = pytest.importorskip("transformers.models.llama.modeling_llama")

from detr_fast.adapters import rotary_functions  # noqa: E402
from detr_fast.adapters.rotary_functions import place_of  # noqa: E402

TOKENS = {"vocab_size": 20, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WIDTHS = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
GROUPED = {**WIDTHS, "num_key_value_heads": 2, "head_dim": 8}
VISION = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
# What has each kind of function: a class and its configuration.
MODELS = {
    "Llama": ("LlamaForCausalLM", GROUPED),
    "Qwen3": ("Qwen3ForCausalLM", GROUPED),
    "Mistral": ("MistralForCausalLM", {**GROUPED, "sliding_window": 3}),
    "Gemma2": ("Gemma2ForCausalLM", GROUPED),
    "OLMo": ("OlmoForCausalLM", WIDTHS),
    "GPTNeoX, a quarter of channels": ("GPTNeoXForCausalLM", {**WIDTHS, "rotary_pct": 0.25}),
    "Phi3": ("Phi3ForCausalLM", WIDTHS),
    "Cohere, neighbours": ("CohereForCausalLM", {**WIDTHS, "num_key_value_heads": 2}),
    "GLM, neighbours by half of the angles": ("GlmForCausalLM", {**GROUPED, "partial_rotary_factor": 0.5}),
    "Helium": ("HeliumForCausalLM", GROUPED),
    "gpt-oss, one number a pair": ("GptOssForCausalLM", {**GROUPED, "num_local_experts": 2, "num_experts_per_tok": 1}),
    "DeepSeek V3, neighbours that come as halves": (
        "DeepseekV3ForCausalLM",
        {
            **WIDTHS,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 1,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
    ),
    "DeepSeek V2, complex numbers": (
        "DeepseekV2ForCausalLM",
        {
            **WIDTHS,
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 1,
            "first_k_dense_replace": 1,
        },
    ),
    "Llama 4, complex numbers": (
        "Llama4ForCausalLM",
        {**GROUPED, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 2, "attention_chunk_size": 4},
    ),
    "nanochat, the other way": ("NanoChatForCausalLM", WIDTHS),
    "GPTJ, neighbours by one number a pair": (
        "GPTJForCausalLM",
        {
            "n_embd": 32,
            "n_layer": 1,
            "n_head": 4,
            "rotary_dim": 4,
            "attn_pdrop": 0.0,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
        },
    ),
    "ModernBERT": ("ModernBertModel", {**WIDTHS, "cls_token_id": 1, "sep_token_id": 2}),
}
CONFIGS = {"Llama4ForCausalLM": "Llama4TextConfig"}
IDS = torch.arange(3, 15).view(2, 6)
RIGHT = torch.tensor([[1] * 6, [1, 1, 1, 1, 0, 0]])
LEFT = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])


def made(name, **options):
    torch.manual_seed(1)
    kind, sizes = MODELS[name]
    settings = getattr(
        transformers, CONFIGS.get(kind) or kind.replace("ForCausalLM", "Config").replace("Model", "Config")
    )
    model = getattr(transformers, kind)(settings(**{**TOKENS, **sizes, **options}))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.1)
    return model.train()


def read(model):
    return [model(input_ids=IDS, attention_mask=RIGHT)[0]]


def assert_close(found, expected):
    (outputs, gradients), (theirs, others) = found, expected
    torch.testing.assert_close(outputs, theirs, rtol=1e-4, atol=1e-5)
    assert gradients.keys() == others.keys()
    largest = max(float(one.abs().max()) for one in others.values())
    for name, one in others.items():
        close = {"rtol": 1e-3, "atol": 1e-5 * largest}
        torch.testing.assert_close(gradients[name], one, **close, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", [name for name in MODELS if "GPTJ" not in name])  # which has an attention of ours
def test_a_model_is_as_before_to_the_bit_where_no_kernel_runs(name, step):
    model = made(name)
    before = step(model, read)
    names = list(model.state_dict())
    report = detr_fast.accelerate(model)
    assert any("rotary_embedding" in one.now for one in report.switched)
    for backend in (None, {"rotary_embedding": "eager", "attention": "sdpa"}):
        outputs, gradients = step(model, read, backend)
        assert torch.equal(outputs[0], before[0][0])
        assert all(torch.equal(gradients[name], one) for name, one in before[1].items())
    detr_fast.restore(model)
    assert list(model.state_dict()) == names
    assert not any("detr_fast" in type(module).__module__ for module in model.modules())


@pytest.mark.interpreter
@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_as_before_on_the_kernel(name, step):
    model = made(name)
    before = step(model, read)
    detr_fast.accelerate(model)
    with explaining(model) as records, checked_interpreter():
        assert_close(step(model, read, {"rotary_embedding": "triton"}), before)
    assert {"triton"} == {r.chosen for r in records if r.op == "rotary_embedding"}


def vision_of(name):
    torch.manual_seed(1)
    if "EVA" in name:
        eva = pytest.importorskip("timm.models.eva")
        sizes = {"img_size": 24, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 3}
        model = eva.Eva(**sizes, use_rot_pos_emb=True, rope_rotate_half="halves" in name)
        return model, lambda model: [model(torch.randn(2, 3, 24, 24))]
    if name == "DINOv3":
        config = transformers.DINOv3ViTConfig(**VISION, image_size=32, patch_size=8, num_register_tokens=2)
        return transformers.DINOv3ViTModel(config), lambda model: [model(torch.randn(2, 3, 32, 32)).last_hidden_state]
    if name == "SAM 3":
        from transformers.models.sam3.modeling_sam3 import Sam3ViTModel

        config = transformers.Sam3ViTConfig(
            **VISION, image_size=32, patch_size=8, window_size=2, global_attn_indexes=[0], pretrain_image_size=32
        )
        return Sam3ViTModel(config), lambda model: [model(torch.randn(2, 3, 32, 32)).last_hidden_state]
    from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel as Vision

    config = Qwen2VLVisionConfig(depth=1, embed_dim=32, hidden_size=32, num_heads=2, patch_size=4)
    grid = torch.tensor([[1, 4, 4], [1, 2, 4]])
    pixels = 3 * 2 * 4 * 4
    return Vision(config), lambda model: [model(torch.randn(24, pixels), grid_thw=grid)[0]]


@pytest.mark.interpreter
@pytest.mark.parametrize("name", ["DINOv3", "SAM 3", "Qwen2-VL", "timm's EVA", "timm's EVA, halves"])
def test_a_vision_model_is_as_before_on_the_kernel(name, step):
    model, see = vision_of(name)
    model = model.eval()

    def seen(model):
        torch.manual_seed(2)
        return see(model)

    before = step(model, seen)
    detr_fast.accelerate(model)
    with explaining(model) as records, checked_interpreter():
        assert_close(step(model, seen, {"rotary_embedding": "triton"}), before)
    assert {"triton"} == {r.chosen for r in records if r.op == "rotary_embedding"}


@pytest.mark.interpreter
@pytest.mark.parametrize("name", ["Llama", "Phi3"])
@pytest.mark.parametrize("cache", ["dynamic", "static", None])
def test_what_is_generated_stays_the_same_with_and_without_a_cache(name, cache):
    model = made(name).eval()
    options = {"max_new_tokens": 3, "do_sample": False, "use_cache": cache is not None, "cache_implementation": cache}
    expected = model.generate(input_ids=IDS, attention_mask=LEFT, **options)
    detr_fast.accelerate(model)
    with use_backend(rotary_embedding="triton"), explaining(model) as records:
        assert torch.equal(model.generate(input_ids=IDS, attention_mask=LEFT, **options), expected)
    assert {"triton"} == {r.chosen for r in records if r.op == "rotary_embedding"}


@pytest.mark.interpreter
def test_checkpointed_layers_give_the_same_gradients(step):
    model = made("Llama")
    before = step(model, read)
    model.gradient_checkpointing_enable()
    detr_fast.accelerate(model)
    assert_close(step(model, read, {"rotary_embedding": "triton"}), before)


@pytest.mark.interpreter
def test_under_autocast_results_have_the_dtype_that_theirs_have():
    module = made("Llama").model.layers[0].self_attn
    seen = []
    x, angles = torch.randn(2, 6, 32), tuple(torch.randn(2, 1, 6, 8))

    class Cache:
        def update(self, k, v, layer):
            seen.append(k)
            return k, v

    def run():
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            return module(x, angles, None, past_key_values=Cache())[0]

    expected = run()
    detr_fast.accelerate(module)
    with use_backend(rotary_embedding="triton"):
        found = run()
    assert seen[0].dtype == seen[1].dtype == torch.float32
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


def test_projections_that_are_wrapped_are_called(step):
    model = made("Llama")
    attention = model.model.layers[0].self_attn

    class Adapted(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.more = base, torch.nn.Linear(base.in_features, base.out_features)

        def forward(self, x):
            return self.base(x) + self.more(x)

    attention.q_proj = Adapted(attention.q_proj)
    before = step(model, read)
    detr_fast.accelerate(model)
    assert "detr_fast" in type(attention).__mro__[2].__module__
    outputs, gradients = step(model, read)
    assert torch.equal(outputs[0], before[0][0])
    assert "model.layers.0.self_attn.q_proj.more.weight" in gradients


def test_copies_and_pickles_run_and_are_restored():
    model = made("Llama").eval()
    (expected,) = read(model)
    detr_fast.accelerate(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(read(other)[0], expected)
        detr_fast.restore(other)
        assert type(other.model.layers[0].self_attn) is llama.LlamaAttention


def test_a_compiled_model_is_one_graph_of_pytorchs_operations():
    model = made("Llama").eval()
    (expected,) = read(model)
    detr_fast.accelerate(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(input_ids=IDS, attention_mask=RIGHT)[0], expected, rtol=1e-4, atol=1e-5)


def test_a_function_of_other_code_is_left_to_transformers_registry(monkeypatch):
    def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):
        return q + cos.unsqueeze(unsqueeze_dim), k

    monkeypatch.setattr(llama, "apply_rotary_pos_emb", apply_rotary_pos_emb)
    model = made("Llama").eval()
    (expected,) = read(model)
    report = detr_fast.accelerate(model)
    (attention,) = (one for one in report.switched if one.original == "transformers.LlamaAttention")
    assert attention.now == "detr_fast.ops.attention (transformers' registry)"
    assert torch.equal(read(model)[0], expected)


def test_a_function_that_calls_another_than_before_is_left_alone(monkeypatch):
    assert place_of(llama.apply_rotary_pos_emb) is not None
    monkeypatch.setattr(llama, "rotate_half", lambda x: x)
    assert place_of(llama.apply_rotary_pos_emb) is None


@pytest.mark.parametrize("name", ["eager_attention_forward", "apply_rotary_pos_emb"])
def test_functions_of_transformers_that_are_patched_later_are_called(name, monkeypatch):
    model = made("Llama", attn_implementation="eager").eval()
    detr_fast.accelerate(model)
    before = read(model)[0]
    called, theirs = [], getattr(llama, name)

    def patched(*args, **kwargs):
        called.append(name)
        return theirs(*args, **kwargs)

    monkeypatch.setattr(llama, name, patched)
    assert torch.equal(read(model)[0], before)
    assert called
    monkeypatch.undo()
    called.clear()
    with use_backend(rotary_embedding="eager"), explaining(model) as records:
        read(model)
    assert not called
    assert "rotary_embedding" in {record.op for record in records}


def test_what_a_function_of_transformers_calls_may_be_patched_later(monkeypatch):
    model, asked = made("Llama", attn_implementation="eager").eval(), []
    detr_fast.accelerate(model)
    monkeypatch.setattr(rotary_functions, "turned", lambda *given: asked.append(given))  # which kernels are asked by
    with use_backend(rotary_embedding="eager"):
        before = read(model)[0]
        assert asked
        for rotated in (torch.zeros_like, lambda x: x):
            asked.clear()
            with monkeypatch.context() as patch:
                patch.setattr(llama, "rotate_half", rotated)
                assert not torch.allclose(read(model)[0], before)
            assert not asked
        assert torch.equal(read(model)[0], before)
        assert asked


def test_a_forward_that_transformers_class_got_later_is_what_runs(monkeypatch):
    model = made("Llama", attn_implementation="eager").eval()
    detr_fast.accelerate(model)
    before, theirs = read(model)[0], llama.LlamaAttention.forward

    def twice(*args, **kwargs):
        y, *rest = theirs(*args, **kwargs)
        return 2 * y, *rest

    monkeypatch.setattr(llama.LlamaAttention, "forward", twice)
    patched = read(model)[0]
    detr_fast.restore(model)
    assert torch.equal(patched, read(model)[0])
    assert not torch.allclose(patched, before)


def test_of_a_model_on_another_attention_only_that_is_left_until_it_is_set_to_sdpa():
    model = made("Llama", attn_implementation="eager").eval()
    (expected,) = read(model)
    report = detr_fast.accelerate(model)
    assert [one.now for one in report.switched if "Attention" in one.original] == [
        "detr_fast.ops.rotary_embedding (its model does not run on SDPA: the rest stays transformers')"
    ]
    assert model.config._attn_implementation == "eager"
    assert torch.equal(read(model)[0], expected)
    assert "its model runs on 'eager' attention" in detr_fast.accelerate(model).left[0].reason
    model.set_attn_implementation("sdpa")
    assert not detr_fast.accelerate(model).left
    with use_backend(attention="eager"), explaining(model) as records:
        torch.testing.assert_close(read(model)[0], expected, rtol=1e-4, atol=1e-5)
    assert "attention" in {record.op for record in records}
    detr_fast.restore(model)
    assert model.config._attn_implementation == "sdpa"


def test_a_llamas_attention_turns_in_two_launches_in_place_of_26():
    config = transformers.LlamaConfig(**TOKENS, hidden_size=768, num_attention_heads=12, num_hidden_layers=1)
    config._attn_implementation = "sdpa"
    module = llama.LlamaAttention(config, 0).to(torch.bfloat16).to("meta")
    x = torch.empty(8, 512, 768, dtype=torch.bfloat16, device="meta", requires_grad=True)
    angles = tuple(torch.empty(2, 1, 512, 64, dtype=torch.bfloat16, device="meta"))

    def run():
        y = module(x, angles, None)[0]
        y.backward(torch.empty_like(y))

    before = count(run)
    detr_fast.accelerate(module)
    with use_backend(rotary_embedding="triton"):
        after = count(run)
    assert after.launches["rotary_embedding_kernel"] == 2
    assert (before.total_launches, after.total_launches) == (42, 23)
    assert after.bytes_moved < 0.6 * before.bytes_moved
    assert after.saved_bytes == before.saved_bytes
