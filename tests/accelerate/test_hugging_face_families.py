"""Models of transformers that copied layers from each other: known by their code, and as before once accelerated."""

from __future__ import annotations

import importlib
from collections import Counter

import pytest
import torch

import detr_fast
from detr_fast import use_backend
from detr_fast.adapters import feed_forward, hugging_face_layers
from detr_fast.adapters.base import fingerprint, reads
from detr_fast.explanation import explaining

transformers = pytest.importorskip("transformers")

IMAGES = {"image_size": 32, "patch_size": 8}
VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, **IMAGES}
DETECTOR = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "decoder_n_points": 2,
    "num_queries": 5,
    "num_labels": 3,
    "dropout": 0.0,
}
STAGES = {
    "embedding_size": 8,
    "hidden_sizes": [8] * 4,
    "depths": [1] * 4,
    "out_features": ["stage2", "stage3", "stage4"],
}


def rt_detr_config(**options):
    channels = {"encoder_in_channels": [8] * 3, "decoder_in_channels": [32] * 3, "encoder_hidden_dim": 32}
    rest = {"num_attention_heads": 4, "num_denoising": 0, "hidden_expansion": 0.5, **channels, **options}
    backbone = transformers.RTDetrResNetConfig(**STAGES, layer_type="basic")
    return transformers.RTDetrConfig(**DETECTOR, **rest, backbone_config=backbone)


def rt_detr():
    return transformers.RTDetrForObjectDetection(rt_detr_config())


def hybrid_encoder():
    """RT-DETR's encoder layers where they normalise first."""
    config = rt_detr_config(normalize_before=True)
    config._attn_implementation = "sdpa"
    return transformers.models.rt_detr.modeling_rt_detr.RTDetrAIFILayer(config)


def fine_encoder():
    """D-FINE's encoder layers."""
    config = transformers.DFineConfig(**rt_detr_config().to_diff_dict() | {"backbone_config": None})
    config._attn_implementation = "sdpa"
    return transformers.models.d_fine.modeling_d_fine.DFineAIFILayer(config)


def lw_detr_layer():
    """A decoder layer of LW-DETR's."""
    sizes = {
        "d_model": 32,
        "decoder_ffn_dim": 48,
        "decoder_n_points": 2,
        "group_detr": 1,
        "projector_scale_factors": [1.0],
    }
    heads = {"decoder_self_attention_heads": 4, "decoder_cross_attention_heads": 4}
    config = transformers.LwDetrConfig(**sizes, **heads, dropout=0.0, disable_custom_kernels=True)
    config._attn_implementation = "sdpa"
    return transformers.models.lw_detr.modeling_lw_detr.LwDetrDecoderLayer(config, 0)


def decode(layer):
    generator = torch.Generator().manual_seed(2)
    x, position = torch.randn(2, 2, 5, 32, generator=generator, dtype=torch.float64)
    memory = torch.randn(2, 12, 32, generator=generator, dtype=torch.float64)
    points = torch.rand(2, 5, 1, 2, generator=generator, dtype=torch.float64)
    shapes = {"spatial_shapes": torch.tensor([[3, 4]]), "spatial_shapes_list": [(3, 4)]}
    start = torch.tensor([0])
    return [layer(x, position, points, **shapes, level_start_index=start, encoder_hidden_states=memory)]


def encode(model):
    return [model(torch.randn(2, 32, 3, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64))]


def deformable_detr():
    rest = {"num_feature_levels": 3, "encoder_n_points": 2, "use_timm_backbone": False, "disable_custom_kernels": True}
    backbone = transformers.ResNetConfig(**STAGES)
    return transformers.DeformableDetrForObjectDetection(
        transformers.DeformableDetrConfig(**DETECTOR, **rest, backbone_config=backbone)
    )


def detect(model):
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    mask = torch.ones(2, 64, 96, dtype=torch.long)
    mask[1, 40:], mask[1, :, 50:] = 0, 0
    outputs = model(images.to(next(model.parameters()).dtype), pixel_mask=mask)
    return [outputs.logits, outputs.pred_boxes]


def look(model):
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return [model(images.to(next(model.parameters()).dtype)).last_hidden_state]


def vision(kind, **options):
    return getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**{**VISION, **options}))


SPEECH = {"num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": 8}
SEQ2SEQ = {
    "vocab_size": 20,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 16,
    "dropout": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}


def seq2seq(kind, use="Model", **options):
    return getattr(transformers, f"{kind}{use}")(getattr(transformers, f"{kind}Config")(**SEQ2SEQ, **options))


def source(model):
    """Two sentences, the second one padded, or two recordings."""
    if model.main_input_name == "input_features":
        features = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        return {"input_features": features.to(next(model.parameters()).dtype)}
    return {
        "input_ids": torch.arange(3, 15).view(2, 6),
        "attention_mask": torch.tensor([[1] * 6, [1, 1, 1, 1, 0, 0]]),
    }


def translate(model):
    target = {"decoder_input_ids": torch.tensor([[1, 5, 6], [1, 7, 8]])}
    if model.main_input_name == "input_ids":
        target["decoder_attention_mask"] = torch.tensor([[1, 1, 1], [1, 1, 0]])
    return [model(**source(model), **target).last_hidden_state]


def read(model):
    return [model(**source(model)).last_hidden_state]


def distil_bert():
    sizes = {"vocab_size": 20, "dim": 32, "n_layers": 1, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 8}
    return transformers.DistilBertModel(transformers.DistilBertConfig(**sizes, dropout=0.0, attention_dropout=0.0))


def hubert(stable):
    zeros = "hidden_dropout activation_dropout attention_dropout feat_proj_dropout layerdrop mask_time_prob"
    sizes = {"vocab_size": 20, "conv_dim": [8], "conv_stride": [2], "conv_kernel": [3], "num_conv_pos_embeddings": 4}
    layers = {name: VISION[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    options = {"num_conv_pos_embedding_groups": 2, "do_stable_layer_norm": stable, **dict.fromkeys(zeros.split(), 0.0)}
    return transformers.HubertModel(transformers.HubertConfig(**sizes, **layers, intermediate_size=48, **options))


def hear(model):
    sound = torch.randn(2, 40, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, 30:] = 0
    return [model(sound, attention_mask=mask).last_hidden_state]


def two_way_block():
    config = transformers.SamMaskDecoderConfig(hidden_size=32, num_attention_heads=4, mlp_dim=48)
    config._attn_implementation = "sdpa"
    return transformers.models.sam.modeling_sam.SamTwoWayAttentionBlock(config)


def point(block):
    generator = torch.Generator().manual_seed(2)
    queries, keys, *positions = torch.randn(4, 1, 2, 5, 32, generator=generator, dtype=torch.float64)
    found = []
    for block.skip_first_layer_pe in (False, True):
        found += block(queries, keys, *positions, None)
    return found


# What makes a model and calls it, and how often each op is taken in a forward.
MODELS = {
    "RTDetr": (rt_detr, detect, {"attention": 3, "deformable_attention": 2, "add_layer_norm": 8, "feed_forward": 3}),
    "RTDetr, normalised first": (hybrid_encoder, encode, {"attention": 1, "layer_norm": 2, "feed_forward": 1}),
    "DFine": (fine_encoder, encode, {"attention": 1, "add_layer_norm": 2, "feed_forward": 1}),
    "LwDetr": (
        lw_detr_layer,
        decode,
        {"attention": 1, "deformable_attention": 1, "add_layer_norm": 3, "feed_forward": 1},
    ),
    "DeformableDetr": (
        deformable_detr,
        detect,
        {"attention": 2, "deformable_attention": 3, "add_layer_norm": 8, "feed_forward": 3},
    ),
    "SiglipVision": (
        lambda: vision("SiglipVision", vision_use_head=False),
        look,
        {"attention": 2, "add_layer_norm": 2, "feed_forward": 2},
    ),
    "Dinov2": (lambda: vision("Dinov2"), look, {"attention": 2, "add_layer_norm": 2, "feed_forward": 2}),
    "BlipVision": (lambda: vision("BlipVision"), look, {"add_layer_norm": 2, "feed_forward": 2}),
    "DistilBert": (distil_bert, read, {"attention": 1, "add_layer_norm": 2, "feed_forward": 1}),
    "Hubert": (lambda: hubert(False), hear, {"attention": 2, "add_layer_norm": 4, "feed_forward": 2}),
    "Hubert, normalised first": (lambda: hubert(True), hear, {"add_layer_norm": 2, "feed_forward": 2}),
    "Sam": (two_way_block, point, {"add_layer_norm": 7, "layer_norm": 1}),
    "Yolos": (
        lambda: vision("Yolos", image_size=[32, 32], hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
        look,
        {"attention": 2, "add_layer_norm": 2},
    ),
    "VitDet": (lambda: vision("VitDet"), look, {"feed_forward": 2}),
    "CLIPVision": (lambda: vision("CLIPVision"), look, {"attention": 2, "add_layer_norm": 2, "feed_forward": 2}),
    "DINOv3ViT": (
        lambda: vision("DINOv3ViT", pos_embed_rescale=None, num_register_tokens=1),
        look,
        {"attention": 2, "feed_forward": 2},
    ),
    "Bart": (lambda: seq2seq("Bart"), translate, {"attention": 5, "add_layer_norm": 8, "feed_forward": 3}),
    "MBart": (lambda: seq2seq("MBart"), translate, {"attention": 5, "add_layer_norm": 5, "feed_forward": 3}),
    "Whisper": (
        lambda: seq2seq("Whisper", **SPEECH),
        translate,
        {"attention": 5, "add_layer_norm": 5, "feed_forward": 3},
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_copied_layers_are_as_before_and_run_on_our_ops(name, assert_unchanged):
    torch.manual_seed(1)
    make, call, ops = MODELS[name]
    model = make().train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    report = assert_unchanged(model, call)
    assert all("loss" in one.reason for one in report.left)
    with explaining(model) as records, torch.no_grad(), use_backend(attention="eager"):
        call(model)
    taken = Counter()
    for record in records:
        taken[record.op] += 0 if "+ norm" in record.shapes or "+ residual" in record.shapes else record.calls
    assert {op: taken[op] for op in ops} == ops
    detr_fast.restore(model)
    assert not any("detr_fast" in type(module).__module__ for module in model.modules())


GENERATORS = {
    "Bart": lambda: seq2seq("Bart", "ForConditionalGeneration"),
    "Whisper": lambda: seq2seq("Whisper", "ForConditionalGeneration", **SPEECH),
    "GPT2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=20, n_embd=32, n_layer=1, n_head=4, bos_token_id=1, eos_token_id=2, pad_token_id=0
        )
    ),
}


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("cached", [True, False])
def test_what_is_generated_stays_the_same_with_and_without_a_cache(name, cached):
    torch.manual_seed(1)
    model = GENERATORS[name]().double().eval()
    options = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False, "use_cache": cached}
    expected = model.generate(**source(model), **options)
    detr_fast.accelerate(model)
    with explaining(model) as records:
        assert torch.equal(model.generate(**source(model), **options), expected)
    assert any(one.op == "add_layer_norm" for one in records)


@pytest.mark.parametrize("kind", ["Bart", "Whisper"])
def test_a_layers_dropout_draws_what_it_drew(kind):
    model = seq2seq(kind, activation_dropout=0.2, attention_dropout=0.2, **(SPEECH if kind == "Whisper" else {}))
    model.config.dropout = 0.2
    for module in model.modules():
        if isinstance(getattr(module, "activation_dropout", None), float):
            module.dropout = 0.2
    torch.manual_seed(4)
    (expected,) = translate(model.double().train())
    detr_fast.accelerate(model)
    torch.manual_seed(4)
    with use_backend(attention="sdpa"):
        torch.testing.assert_close(translate(model)[0], expected)


def test_a_block_takes_its_input_by_the_name_that_it_had():
    block = vision("CLIPVision").encoder.layers[0].mlp
    x = torch.randn(2, 3, 32)
    expected = block(hidden_states=x)
    detr_fast.accelerate(block)
    with explaining(block) as records:
        torch.testing.assert_close(block(hidden_states=x), expected)
    assert [one.op for one in records] == ["feed_forward"]


def test_a_block_whose_layers_differ_in_dtype_is_called():
    """T5's second layer stays in fp32 where the model is in fp16."""
    config = transformers.T5Config(d_model=16, d_ff=24, dropout_rate=0.0, feed_forward_proj="relu")
    block = transformers.models.t5.modeling_t5.T5DenseActDense(config).half()
    block.wo.float()
    x = torch.randn(2, 3, 16, dtype=torch.float16)
    expected = block(x)
    detr_fast.accelerate(block)
    with explaining(block) as records:
        assert torch.equal(block(x), expected)
        block.wo.half()
        block(x)
    assert [one.op for one in records] == ["feed_forward"]


def test_layers_that_read_the_same_are_told_apart_by_what_they_give_their_attentions():
    layers = [transformers.models.rt_detr.modeling_rt_detr.RTDetrDecoderLayer]
    layers += [transformers.models.deformable_detr.modeling_deformable_detr.DeformableDetrDecoderLayer]
    first, second = (layer.forward for layer in layers)
    assert reads(first) == reads(second)
    found = [hugging_face_layers._CODE[fingerprint(forward)].__name__ for forward in (first, second)]
    assert found == ["RTDetrDecoderLayer", "DeformableDetrDecoderLayer"]


def test_a_fingerprint_is_of_what_code_says():
    def one(self, x: int, *, y=None) -> int:
        """Adds."""
        return self.add(x, y)  # here

    def same(self, x, *, y=None):
        return self.add(
            x,
            y,
        )

    def another(self, x, *, y=None):
        return self.add(y, x)

    def other_default(self, x, *, y=0):
        return self.add(x, y)

    assert fingerprint(one) == fingerprint(same) == "40ce2c86bcca5ecb"
    assert len({fingerprint(f) for f in (one, another, other_default)}) == 3
    assert fingerprint(len) is None
    assert fingerprint(eval("lambda self: self")) is None
    two = lambda self: self; assert fingerprint(two) is None  # fmt: skip  # noqa: E702, E731


# Each fingerprint is of a class that transformers has: where it changes, ours has to be looked at again.
KNOWN = {
    "clip.CLIPMLP": feed_forward,
    "detr.DetrMLP": feed_forward,
    "d_fine.DFineMLP": feed_forward,
    "vitdet.VitDetMlp": feed_forward,
    "wav2vec2.Wav2Vec2FeedForward": feed_forward,
    "sam.SamMLPBlock": feed_forward,
    "dinov3_vit.DINOv3ViTMLP": feed_forward,
    "qwen3_vl.Qwen3VLVisionMLP": feed_forward,
    "qwen2_vl.VisionMlp": feed_forward,
    "llava.LlavaMultiModalProjector": feed_forward,
    "voxtral.VoxtralMultiModalProjector": feed_forward,
    "gpt_neo.GPTNeoMLP": feed_forward,
    "gptj.GPTJMLP": feed_forward,
    "gpt_neox.GPTNeoXMLP": feed_forward,
    "focalnet.FocalNetMlp": feed_forward,
    "parakeet.ParakeetEncoderFeedForward": feed_forward,
    "vitpose_backbone.VitPoseBackboneMLP": feed_forward,
    "t5.T5DenseActDense": feed_forward,
    "nllb_moe.NllbMoeDenseActDense": feed_forward,
    "clip.CLIPEncoderLayer": hugging_face_layers,
    "pp_ocrv5_mobile_rec.PPOCRV5MobileRecBlock": hugging_face_layers,
    "yolos.YolosLayer": hugging_face_layers,
    "bart.BartEncoderLayer": hugging_face_layers,
    "mbart.MBartEncoderLayer": hugging_face_layers,
    "bart.BartDecoderLayer": hugging_face_layers,
    "mbart.MBartDecoderLayer": hugging_face_layers,
    "whisper.WhisperDecoderLayer": hugging_face_layers,
    "wav2vec2.Wav2Vec2EncoderLayer": hugging_face_layers,
    "wav2vec2.Wav2Vec2EncoderLayerStableLayerNorm": hugging_face_layers,
    "blip.BlipEncoderLayer": hugging_face_layers,
    "dinov2.Dinov2Layer": hugging_face_layers,
    "gpt2.GPT2Block": hugging_face_layers,
    "distilbert.TransformerBlock": hugging_face_layers,
    "sam.SamTwoWayAttentionBlock": hugging_face_layers,
    "deformable_detr.DeformableDetrEncoderLayer": hugging_face_layers,
    "deformable_detr.DeformableDetrDecoderLayer": hugging_face_layers,
    "rt_detr.RTDetrDecoderLayer": hugging_face_layers,
    "lw_detr.LwDetrDecoderLayer": hugging_face_layers,
    "lw_detr.LwDetrMLP": hugging_face_layers,
}


def test_all_code_that_is_known_is_transformers():
    found = {feed_forward: set(), hugging_face_layers: set()}
    for name, adapter in KNOWN.items():
        model, kind = name.split(".")
        module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
        found[adapter].add(fingerprint(getattr(module, kind).forward))
    assert all(prints == set(adapter._CODE) for adapter, prints in found.items())


@pytest.mark.parametrize("name", ["LwDetr", "SiglipVision"])
def test_where_kernels_are_asked_about_it_still_compiles_to_one_graph(name):
    make, call, _ = MODELS[name]
    model = make().double().eval()
    with torch.no_grad():
        expected = call(model)[0]
        detr_fast.accelerate(model)
        torch.compiler.reset()
        with use_backend("eager"):
            found = call(torch.compile(model, fullgraph=True, backend="eager"))[0]
    torch.testing.assert_close(found, expected)
