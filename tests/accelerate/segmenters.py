"""Layers of transformers' Mask2Former, OneFormer and Grounding DINO, and how tests call them: a part of `families.MODELS`."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers")

SEGMENTER = {"hidden_dim": 32, "num_attention_heads": 4, "dim_feedforward": 48, "dropout": 0.0}


def mask2former_layer(before):
    """A decoder layer of Mask2Former's."""
    config = transformers.Mask2FormerConfig(**SEGMENTER, pre_norm=before)
    return transformers.models.mask2former.modeling_mask2former.Mask2FormerMaskedAttentionDecoderLayer(config)


def one_former_layer(before):
    """A decoder layer of OneFormer's."""
    config = transformers.OneFormerConfig(**SEGMENTER, pre_norm=before)
    return transformers.models.oneformer.modeling_oneformer.OneFormerTransformerDecoderLayer(config)


def segment(layer, weights=False):
    """Queries that see a part of three levels' tokens each; the first one sees nothing, which OneFormer mends."""
    generator = torch.Generator().manual_seed(2)
    queries, position = torch.randn(2, 5, 2, 32, generator=generator, dtype=torch.float64)
    levels, positions = torch.randn(2, 3, 12, 2, 32, generator=generator, dtype=torch.float64)
    hidden = torch.rand(8, 5, 12, generator=generator) < 0.5
    mends = hasattr(layer, "ffn")
    hidden[0, 0] = mends
    found = []
    for level in range(3):
        if mends:
            found += layer(level, queries, [*levels], [*positions], hidden.clone(), position, weights)
        else:
            given = {"encoder_hidden_states": [*levels], "encoder_attention_mask": hidden}
            found += layer(queries, level, None, [*positions], position, **given, output_attentions=weights)
    return found


def pixel_layer(family):
    """An encoder layer over several levels of an image's features."""
    sizes = {"d_model": 32, "encoder_attention_heads": 4, "encoder_ffn_dim": 48, "encoder_n_points": 2, "dropout": 0.0}
    if family == "GroundingDino":
        options = {"num_feature_levels": 3, "activation_dropout": 0.0, "disable_custom_kernels": True}
        config = transformers.GroundingDinoConfig(**sizes, **options)
        return transformers.models.grounding_dino.modeling_grounding_dino.GroundingDinoDeformableLayer(config)
    options = {"encoder_feedforward_dim": 48, "feature_strides": [4, 8], "feature_size": 32}
    if family == "OneFormer":
        config = transformers.OneFormerConfig(**SEGMENTER, **options, conv_dim=32, is_training=True)
        return transformers.models.oneformer.modeling_oneformer.OneFormerPixelDecoderEncoderLayer(config)
    config = transformers.Mask2FormerConfig(**SEGMENTER, **options)
    return transformers.models.mask2former.modeling_mask2former.Mask2FormerPixelDecoderEncoderLayer(config)


def encode_pixels(layer, weights=False):
    generator = torch.Generator().manual_seed(2)
    x, position = torch.randn(2, 2, 12, 32, generator=generator, dtype=torch.float64)
    points = torch.rand(2, 12, 3, 2, generator=generator, dtype=torch.float64)
    sizes = [(2, 3), (2, 2), (1, 2)]
    padding = torch.arange(12).expand(2, 12) >= torch.tensor([[12], [9]])
    levels = {"spatial_shapes_list": sizes, "level_start_index": torch.tensor([0, 6, 10])}
    if "Mask2Former" not in type(layer).__name__:
        levels["spatial_shapes"] = torch.tensor(sizes)
    found = layer(x, padding, position, points, **levels, output_attentions=weights)
    return [y for y in found if y is not None][: 2 if weights else 1]


def omdet_layer(kind):
    sizes = {
        "encoder_hidden_dim": 32,
        "decoder_hidden_dim": 32,
        "d_model": 32,
        "num_attention_heads": 4,
        "decoder_num_heads": 4,
    }
    sizes |= {
        "encoder_dim_feedforward": 48,
        "decoder_dim_feedforward": 48,
        "decoder_num_points": 2,
        "num_feature_levels": 3,
    }
    quiet = {"encoder_dropout": 0.0, "encoder_feedforward_dropout": 0.0, "decoder_dropout": 0.0}
    backbone = {"backbone_config": transformers.ResNetConfig(), "text_config": transformers.CLIPTextConfig()}
    config = transformers.OmDetTurboConfig(**sizes, **quiet, **backbone, disable_custom_kernels=True)
    return getattr(transformers.models.omdet_turbo.modeling_omdet_turbo, f"OmDetTurbo{kind}Layer")(config)


def look_for_words(layer, weights=False):
    """Five queries, and three words, of which the second image has two."""
    generator = torch.Generator().manual_seed(2)
    x, position = torch.randn(2, 2, 5, 32, generator=generator, dtype=torch.float64)
    words = torch.randn(3, 2, 32, generator=generator, dtype=torch.float64)
    image = torch.randn(2, 12, 32, generator=generator, dtype=torch.float64)
    boxes = torch.rand(2, 5, 4, generator=generator, dtype=torch.float64) * 0.5 + 0.2
    hidden = (torch.arange(8) >= torch.tensor([[8], [7]])).double() * torch.finfo(torch.float64).min
    mask = hidden[:, None, None]
    if "Encoder" in type(layer).__name__:
        return [*layer(x, mask[..., 3:], position, weights)]
    sizes = [(2, 3), (2, 2), (1, 2)]
    levels = (torch.tensor(sizes), sizes, torch.tensor([0, 6, 10]))
    given = {"query_position": position, "output_attentions": weights}
    return [y for y in layer(x, words, boxes, image, *levels, mask, **given) if y is not None]


def grounding_encoder(kind="GroundingDino"):
    sizes = {
        "d_model": 32,
        "encoder_layers": 2,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "encoder_n_points": 2,
    }
    quiet = dict.fromkeys(
        ("dropout", "activation_dropout", "attention_dropout", "fusion_dropout", "fusion_droppath"), 0.0
    )
    options = {"num_feature_levels": 3, "text_enhancer_dropout": 0.0, "disable_custom_kernels": True, **sizes, **quiet}
    config = getattr(transformers, f"{kind}Config")(**options)
    file = "mm_grounding_dino" if kind.startswith("MM") else "grounding_dino"
    encoder = getattr(getattr(transformers.models, file), f"modeling_{file}")
    encoder = getattr(encoder, f"{kind}Encoder")(config)
    for name, parameter in encoder.named_parameters():
        if name.endswith("_param"):  # what scales, which is near zero at first
            torch.nn.init.normal_(parameter)
    return encoder


def enhance(encoder, weights=False):
    """Pixels and words, of both of which the second image has fewer; words see those of their own phrase."""
    generator = torch.Generator().manual_seed(2)
    x, position = torch.randn(2, 2, 12, 32, generator=generator, dtype=torch.float64)
    words = torch.randn(2, 6, 32, generator=generator, dtype=torch.float64)
    phrases = torch.tensor([[0, 0, 1, 1, 1, 2], [0, 0, 1, 1, 2, 3]])
    found = encoder(
        vision_features=x,
        vision_attention_mask=torch.arange(12).expand(2, 12) >= torch.tensor([[12], [9]]),
        vision_position_embedding=position,
        spatial_shapes=torch.tensor([(2, 3), (2, 2), (1, 2)]),
        spatial_shapes_list=[(2, 3), (2, 2), (1, 2)],
        level_start_index=torch.tensor([0, 6, 10]),
        valid_ratios=torch.ones(2, 3, 2, dtype=torch.float64),
        text_features=words,
        text_attention_mask=torch.arange(6).expand(2, 6) >= torch.tensor([[6], [4]]),
        text_self_attention_masks=phrases[:, None] != phrases[:, :, None],
        text_position_ids=torch.tensor([[0, 1, 0, 1, 2, 0], [0, 1, 0, 1, 0, 0]]),
        output_attentions=weights,
    )
    every = [] if found.attentions is None else [y for kind in found.attentions for y in kind]
    return [found.last_hidden_state_vision, found.last_hidden_state_text, *every]


SEGMENTERS = {
    **{
        f"{name}'s decoder{how}": (
            lambda make=make, before=bool(how): make(before),
            segment,
            {"attention": 6, "add_layer_norm": 6 if how else 9, "feed_forward": 3},
        )
        for name, make in (("Mask2Former", mask2former_layer), ("OneFormer", one_former_layer))
        for how in ("", ", normalised first")
    },
    **{
        f"{name}'s pixels": (
            lambda name=name: pixel_layer(name),
            encode_pixels,
            {"add_layer_norm": 2, "feed_forward": 1},
        )
        for name in ("GroundingDino", "Mask2Former", "OneFormer")
    },
    "OmDetTurbo's encoder": (
        lambda: omdet_layer("Encoder"),
        look_for_words,
        {"attention": 1, "add_layer_norm": 2, "feed_forward": 1},
    ),
    "OmDetTurbo's decoder": (
        lambda: omdet_layer("DeformableTransformerDecoder"),
        look_for_words,
        {"attention": 1, "deformable_attention": 2, "add_layer_norm": 3, "feed_forward": 1},
    ),
    # Where no kernel samples, deformable attention is asked for twice.
    **{
        f"{kind}'s encoder": (
            lambda kind=kind: grounding_encoder(kind),
            enhance,
            {"attention": 6, "deformable_attention": 4, "add_layer_norm": 8, "feed_forward": 4},
        )
        for kind in ("GroundingDino", "MMGroundingDino")
    },
}
