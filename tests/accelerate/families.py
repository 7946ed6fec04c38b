"""Small models and layers of transformers' families, and how tests call them."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from tests.accelerate.backbones import BACKBONES
from tests.accelerate.segmenters import SEGMENTERS

transformers = pytest.importorskip("transformers")
mask_former = pytest.importorskip("transformers.models.maskformer.modeling_maskformer_swin")

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
    return transformers.RTDetrConfig(**{**DETECTOR, **rest}, backbone_config=backbone)


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


def fine_layer():
    """A decoder layer of D-FINE's."""
    sizes = {name: size for name, size in DETECTOR.items() if name.startswith(("d_model", "decoder", "dropout"))}
    config = transformers.DFineConfig(**sizes, num_feature_levels=1, backbone_config=None)
    config._attn_implementation = "sdpa"
    return transformers.models.d_fine.modeling_d_fine.DFineDecoderLayer(config)


def refine(layer):
    generator = torch.Generator().manual_seed(2)
    x, position = torch.randn(2, 2, 5, 32, generator=generator, dtype=torch.float64)
    memory = torch.randn(2, 12, 32, generator=generator, dtype=torch.float64)
    boxes = torch.rand(2, 5, 1, 4, generator=generator, dtype=torch.float64) * 0.5 + 0.2
    shapes = {"spatial_shapes": torch.tensor([[3, 4]]), "spatial_shapes_list": [(3, 4)]}
    return [layer(x, position, boxes, **shapes, encoder_hidden_states=memory)]


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


def t5(kind="T5", use="Model", **options):
    sizes = {"vocab_size": 20, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2}
    tokens = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = {"num_heads": 4, "relative_attention_num_buckets": 8, "dropout_rate": 0.0, **sizes, **tokens, **options}
    return with_biases(getattr(transformers, f"{kind}{use}")(getattr(transformers, f"{kind}Config")(**config)))


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


def translate_all(model):
    """The same of whole sentences, whose decoder has no mask but its order."""
    target = {"decoder_input_ids": torch.tensor([[1, 5, 6, 4], [1, 7, 8, 9]])}
    return [*translate(model), model(**source(model), **target).last_hidden_state]


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


def dab_detr_layer(kind):
    sizes = {name: size for name, size in DETECTOR.items() if name.endswith(("heads", "ffn_dim"))}
    config = transformers.DabDetrConfig(
        hidden_size=32, **sizes, num_labels=3, dropout=0.0, backbone_config=transformers.ResNetConfig(**STAGES)
    )
    return getattr(transformers.models.dab_detr.modeling_dab_detr, f"DabDetr{kind}Layer")(config)


@mock.patch.object(torch.nn.functional, "softmax", lambda x, dim, dtype, exact=torch.softmax: exact(x, dim))
def attend(layer, weights=False):
    """In fp64 throughout, where DAB-DETR takes fp32 for its softmax. With padding as large negative numbers."""
    generator = torch.Generator().manual_seed(2)
    queries, position, sine = torch.randn(3, 2, 5, 32, generator=generator, dtype=torch.float64)
    memory, memory_position = torch.randn(2, 2, 12, 32, generator=generator, dtype=torch.float64)
    hidden = torch.zeros(2, 1, 1, 12, dtype=torch.float64)
    hidden[1, ..., 9:] = torch.finfo(torch.float64).min
    if "Encoder" in type(layer).__name__:
        return [*layer(memory, hidden, memory_position, weights)]
    given = (queries, None, memory_position, position, sine, memory, hidden)
    return [*layer(*given, weights)]


def grounding_dino_layer():
    sizes = {"d_model": 32, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "decoder_n_points": 2}
    options = {"num_feature_levels": 1, "dropout": 0.0, "attention_dropout": 0.0, "disable_custom_kernels": True}
    config = transformers.GroundingDinoConfig(**sizes, **options, backbone_config=transformers.ResNetConfig(**STAGES))
    return transformers.models.grounding_dino.modeling_grounding_dino.GroundingDinoDecoderLayer(config)


def ground(layer, weights=False):
    generator = torch.Generator().manual_seed(2)
    queries, position = torch.randn(2, 2, 5, 32, generator=generator, dtype=torch.float64)
    image, text = (torch.randn(2, n, 32, generator=generator, dtype=torch.float64) for n in (12, 6))
    points = torch.rand(2, 5, 1, 2, generator=generator, dtype=torch.float64)
    hidden = torch.tensor([[0.0] * 6, [0, 0, 0, 0, 1, 1]], dtype=torch.float64) * torch.finfo(torch.float64).min
    words = {
        "text_encoder_hidden_states": text,
        "text_encoder_attention_mask": hidden[:, None, None].repeat(1, 4, 5, 1),
    }
    levels = (points, torch.tensor([[3, 4]]), [(3, 4)], torch.tensor([0]))
    given = {"vision_encoder_hidden_states": image, **words}
    return [*layer(queries, position, *levels, **given, output_attentions=weights)]


def mask2former_attention():
    return transformers.models.mask2former.modeling_mask2former.Mask2FormerAttention(32, 4)


def attend_to_each_other(attention, weights=False):
    """Sequence first, with and without a mask."""
    x, position = torch.randn(2, 5, 2, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    mask = torch.randn(8, 5, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = [attention(x, one, position, output_attentions=weights) for one in (None, mask)]
    return [y for pair in found for y in pair if y is not None]


def two_way_block():
    config = transformers.SamMaskDecoderConfig(hidden_size=32, num_attention_heads=4, mlp_dim=48)
    config._attn_implementation = "sdpa"
    return transformers.models.sam.modeling_sam.SamTwoWayAttentionBlock(config)


def swin(kind="Swin", made=None, **options):
    """Windows of 4 by 4, in the second layer of both stages shifted."""
    sizes = {"patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
    config = getattr(transformers, f"{kind}Config")(**sizes, image_size=24, mlp_ratio=2.0, drop_path_rate=0.0)
    return with_biases((made or getattr(transformers, f"{kind}Model"))(config, **options))


def with_biases(model):
    """Biases by position are zero or small at first."""
    for name, parameter in model.named_parameters():
        if "bias_table" in name or "relative_attention_bias" in name or "logit_scale" in name:
            torch.nn.init.normal_(parameter)
    return model


def mpnet():
    layers = {name: VISION[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = transformers.MPNetConfig(vocab_size=20, **layers, intermediate_size=48, **quiet)
    return with_biases(transformers.MPNetModel(config, add_pooling_layer=False))


def biased_vision(kind):
    """BEiT and its copy, with a bias in each layer."""
    quiet = dict.fromkeys(("drop_path_rate", "hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
    return with_biases(vision(kind, use_relative_position_bias=True, **quiet))


def look_at_windows(model):
    """Of 24 by 20 pixels, in which 4 by 4 windows do not fit."""
    images = torch.randn(2, 3, 24, 20, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return [model(images.to(next(model.parameters()).dtype)).last_hidden_state]


def point(block):
    generator = torch.Generator().manual_seed(2)
    queries, keys, *positions = torch.randn(4, 1, 2, 5, 32, generator=generator, dtype=torch.float64)
    found = []
    for block.skip_first_layer_pe in (False, True):
        found += block(queries, keys, *positions, None)
    return found


# What makes a model and calls it, and how often each op is taken in a forward.
MODELS = {
    # Where no kernel is taken, deformable attention is asked for twice: from offsets, and in transformers' code the sampling alone.
    "RTDetr": (rt_detr, detect, {"attention": 3, "deformable_attention": 4, "add_layer_norm": 8, "feed_forward": 3}),
    "RTDetr, normalised first": (hybrid_encoder, encode, {"attention": 1, "layer_norm": 2, "feed_forward": 1}),
    "DFine": (fine_encoder, encode, {"attention": 1, "add_layer_norm": 2, "feed_forward": 1}),
    "DFine's decoder": (
        fine_layer,
        refine,
        {"attention": 1, "deformable_attention": 2, "add_layer_norm": 2, "layer_norm": 1, "feed_forward": 1},
    ),
    "LwDetr": (
        lw_detr_layer,
        decode,
        {"attention": 1, "deformable_attention": 2, "add_layer_norm": 3, "feed_forward": 1},
    ),
    "DeformableDetr": (
        deformable_detr,
        detect,
        {"attention": 2, "deformable_attention": 6, "add_layer_norm": 8, "feed_forward": 3},
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
    "DabDetr's encoder": (lambda: dab_detr_layer("Encoder"), attend, {"attention": 1, "add_layer_norm": 2}),
    "DabDetr's decoder": (lambda: dab_detr_layer("Decoder"), attend, {"attention": 2, "add_layer_norm": 2}),
    "GroundingDino": (grounding_dino_layer, ground, {"attention": 2, "add_layer_norm": 4, "feed_forward": 1}),
    "Mask2Former": (mask2former_attention, attend_to_each_other, {"attention": 2}),
    **BACKBONES,
    **SEGMENTERS,
    "Sam": (two_way_block, point, {"add_layer_norm": 7, "layer_norm": 1}),
    "Yolos": (
        lambda: vision("Yolos", image_size=[32, 32], hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
        look,
        {"attention": 2, "add_layer_norm": 2, "feed_forward": 2},
    ),
    "CLIPVision": (lambda: vision("CLIPVision"), look, {"attention": 2, "add_layer_norm": 2, "feed_forward": 2}),
    "DINOv3ViT": (
        lambda: vision("DINOv3ViT", pos_embed_rescale=None, num_register_tokens=1),
        look,
        {"attention": 2, "add_layer_norm": 2, "feed_forward": 2},
    ),
    "Swin": (
        lambda: swin(add_pooling_layer=False),
        look_at_windows,
        {"attention": 4, "feed_forward": 4, "add_layer_norm": 4},
    ),
    "Swinv2": (lambda: swin("Swinv2", add_pooling_layer=False), look_at_windows, {"attention": 4}),
    "DonutSwin": (
        lambda: swin("DonutSwin", add_pooling_layer=False),
        look_at_windows,
        {"attention": 4, "add_layer_norm": 4},
    ),
    "MaskFormerSwin": (
        lambda: swin("MaskFormerSwin", mask_former.MaskFormerSwinModel, add_pooling_layer=False),
        look_at_windows,
        {"attention": 4, "add_layer_norm": 4},
    ),
    "MPNet": (mpnet, read, {"attention": 2, "add_layer_norm": 4}),
    "Beit": (
        lambda: biased_vision("Beit"),
        look,
        {"attention": 2, "add_layer_norm": 2, "feed_forward": 2},
    ),
    "Data2VecVision": (lambda: biased_vision("Data2VecVision"), look, {"attention": 2}),
    "T5": (t5, translate_all, {"attention": 12, "add_rms_norm": 12, "feed_forward": 8}),
    "UMT5, gated": (lambda: t5("UMT5"), translate_all, {"attention": 12, "add_rms_norm": 12}),
    "LongT5": (
        lambda: t5("LongT5", local_radius=2, encoder_attention_type="transient-global", global_block_size=2),
        translate,
        {"add_rms_norm": 6},
    ),
    "Bart": (lambda: seq2seq("Bart"), translate, {"attention": 5, "add_layer_norm": 8, "feed_forward": 3}),
    "MBart": (lambda: seq2seq("MBart"), translate, {"attention": 5, "add_layer_norm": 5, "feed_forward": 3}),
    "Whisper": (
        lambda: seq2seq("Whisper", **SPEECH),
        translate,
        {"attention": 5, "add_layer_norm": 5, "feed_forward": 3},
    ),
}
