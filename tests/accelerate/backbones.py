"""Small backbones of transformers, and layers of SAM 3's detector, and how tests call them: a part of `families.MODELS`."""

from __future__ import annotations

import importlib

import pytest
import torch

transformers = pytest.importorskip("transformers")

WINDOWS = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "mlp_ratio": 2,
    "image_size": 32,
    "patch_size": 8,
    "out_indices": [2],
}
PYRAMID = {
    "num_encoder_blocks": 2,
    "depths": [1, 1],
    "sr_ratios": [2, 1],
    "hidden_sizes": [16, 32],
    "patch_sizes": [7, 3],
    "strides": [4, 2],
    "num_attention_heads": [2, 4],
    "mlp_ratios": [2, 2],
    "drop_path_rate": 0.0,
}


def parts(model, file):
    return importlib.import_module(f"transformers.models.{model}.{file}_{model}")


def backbone(model, kind, **options):
    """Of two layers: one attends in windows, one in all of the image."""
    config = getattr(parts(model, "configuration"), f"{kind}Config")(**WINDOWS, **options)
    made = getattr(parts(model, "modeling"), f"{kind}Backbone")(config)
    for name, parameter in made.named_parameters():
        if "gamma" in name:  # which are not set at first
            torch.nn.init.normal_(parameter)
    return made


def features(model):
    """What a backbone or a model makes of two images."""
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = model(images.to(next(model.parameters()).dtype))
    return [*found.feature_maps] if "feature_maps" in found else [found.last_hidden_state]


def pyramid(kind, **options):
    return getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**PYRAMID | options))


def sam_vision():
    """In whose windows of 2 by 2 an image of 5 by 5 patches does not fit."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "mlp_dim": 48, "output_channels": 8}
    image = {"image_size": 40, "patch_size": 8, "window_size": 2, "global_attn_indexes": [1]}
    config = transformers.SamVisionConfig(**sizes, **image)
    return by_distance(transformers.models.sam.modeling_sam.SamVisionEncoder(config).layers)


def vit_det(**options):
    config = transformers.VitDetConfig(**WINDOWS | options, use_relative_position_embeddings=True)
    return by_distance(transformers.VitDetModel(config))


def by_distance(model):
    """Tables by distance are zero at first."""
    for name, parameter in model.named_parameters():
        if "rel_pos_" in name:
            torch.nn.init.normal_(parameter)
    return model


def through(layers, *size):
    x = torch.randn(2, *(size or (5, 5, 32)), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for layer in layers:
        x = layer(x)
    return [x]


def sam2_vision():
    """Of three stages: in windows in which an image of 14 by 15 patches does not fit, pooled in such, and in all of the image."""
    stages = {
        "embed_dim_per_stage": [16, 32, 64],
        "num_attention_heads_per_stage": [1, 2, 4],
        "window_size_per_stage": [4, 4, 2],
    }
    config = parts("sam2", "configuration").Sam2HieraDetConfig(
        **stages, blocks_per_stage=[1, 2, 1], num_query_pool_stages=2, global_attention_blocks=[2], hidden_size=16
    )
    config._attn_implementation = "sdpa"
    kind = parts("sam2", "modeling").Sam2MultiScaleBlock
    places = [(0, 0), (1, 0), (1, 1), (2, 0)]
    return torch.nn.ModuleList(kind(config, *place, block) for block, place in enumerate(places))


def sam3_vision():
    image = {"image_size": 40, "patch_size": 8, "pretrain_image_size": 40, "window_size": 2, "global_attn_indexes": [1]}
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = parts("sam3", "configuration").Sam3ViTConfig(**sizes, **image)
    config._attn_implementation = "sdpa"
    kind = parts("sam3", "modeling").Sam3ViTLayer
    return torch.nn.ModuleList([kind(config, 2), kind(config, 0)])


def hiera():
    """Its first layer attends in windows, its second pools in such, its third attends to all, and its last pools all."""
    stages = {
        "depths": [1, 2, 1],
        "num_heads": [1, 2, 4],
        "masked_unit_attention": [True, False, False],
        "num_query_pool": 2,
    }
    config = transformers.HieraConfig(
        embed_dim=16, image_size=[32, 32], masked_unit_size=[4, 4], mlp_ratio=2.0, **stages
    )
    return transformers.HieraModel(config, add_pooling_layer=False)


def sam3_layer(kind):
    config = getattr(parts("sam3", "configuration"), f"Sam3DETR{kind}Config")(
        hidden_size=32, num_attention_heads=4, intermediate_size=48, dropout=0.0
    )
    config._attn_implementation = "sdpa"
    return getattr(parts("sam3", "modeling"), f"Sam3Detr{kind}Layer")(config)


def prompt(layer):
    generator = torch.Generator().manual_seed(2)
    image, position = torch.randn(2, 2, 12, 32, generator=generator, dtype=torch.float64)
    words, queries, query_position = torch.randn(3, 2, 6, 32, generator=generator, dtype=torch.float64)
    if "Encoder" in type(layer).__name__:
        return [layer(image, words, position)]
    return [layer(queries, query_position[:, 1:], words, image, position)]


BACKBONES = {
    "RfDetr's backbone": (
        lambda: backbone("rf_detr", "RfDetrDinov2", num_windows=2, window_block_indexes=[0], use_mask_token=False),
        features,
        {"attention": 2, "add_layer_norm": 2, "feed_forward": 2},
    ),
    "LwDetr's backbone": (
        lambda: backbone("lw_detr", "LwDetrViT", num_windows=4, window_block_indices=[0], pretrain_image_size=32),
        features,
        {"attention": 2, "add_layer_norm": 2, "feed_forward": 2},
    ),
    "Segformer": (lambda: pyramid("Segformer"), features, {"attention": 2, "add_layer_norm": 2}),
    "PvtV2": (lambda: pyramid("PvtV2", image_size=32), features, {"attention": 2, "add_layer_norm": 2}),
    "PvtV2, linear": (lambda: pyramid("PvtV2", image_size=32, linear_attention=True), features, {"attention": 2}),
    "Pvt": (
        lambda: pyramid("Pvt", image_size=32, patch_sizes=[4, 2], sequence_reduction_ratios=[2, 1]),
        features,
        {"attention": 2},
    ),
    "Sam2Vision": (
        sam2_vision,
        lambda layers: through(layers, 14, 15, 16),
        {"attention": 4, "add_layer_norm": 4, "feed_forward": 4},
    ),
    "Sam3Vision": (sam3_vision, through, {"attention": 2, "add_layer_norm": 2, "feed_forward": 2}),
    "Hiera": (hiera, features, {"attention": 4, "add_layer_norm": 4, "feed_forward": 4}),
    "VitDet": (
        lambda: vit_det(window_block_indices=[0], window_size=3, residual_block_indices=[1]),
        features,
        {"attention": 2, "add_layer_norm": 2, "feed_forward": 2},
    ),
    "VitDet, of another size": (
        lambda: vit_det(image_size=64, out_indices=[2]),
        features,
        {"attention": 0, "add_layer_norm": 2, "feed_forward": 2},
    ),
    "SamVision": (sam_vision, through, {"attention": 2, "add_layer_norm": 2, "feed_forward": 2}),
    "ConvNext": (  # with norms of images, channels first and last
        lambda: transformers.ConvNextModel(
            transformers.ConvNextConfig(num_stages=2, hidden_sizes=[8, 16], depths=[1, 1])
        ),
        features,
        {"layer_norm": 5},
    ),
    "Sam3's encoder": (lambda: sam3_layer("Encoder"), prompt, {"attention": 2, "add_layer_norm": 2, "feed_forward": 1}),
    "Sam3's decoder": (lambda: sam3_layer("Decoder"), prompt, {"attention": 3, "add_layer_norm": 4}),
}
