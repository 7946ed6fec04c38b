"""What one weight is called in the original repository and in Hugging Face's transformers, and what config a set implies.

Original names are ours. Hugging Face has two spellings, that of its files (since 2020) and that of its modules (since
transformers 5); both are read, the files' is written. Its backbones come from timm, named as
torchvision's, or are its own ResNet, which is only read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from detr_fast.models.build import ModelConfig

StateDict = dict[str, Tensor]

# original name, Hugging Face name; {} stands for a layer's number. Longer names first where one begins another.
_PREFIXES = (
    ("transformer.encoder.layers.", "model.encoder.layers."),
    ("transformer.decoder.layers.", "model.decoder.layers."),
    ("transformer.decoder.norm.", "model.decoder.layernorm."),
    ("backbone.0.body.", "model.backbone.conv_encoder.model."),
    ("backbone.1.row_embed.", "model.position_embedding.row_embeddings."),
    ("backbone.1.col_embed.", "model.position_embedding.column_embeddings."),
    ("input_proj.", "model.input_projection."),
    ("query_embed.", "model.query_position_embeddings."),
    ("class_embed.", "class_labels_classifier."),
    ("bbox_embed.", "bbox_predictor."),
)
_LAYER_PARTS = {
    "encoder": (
        ("self_attn", "self_attn"),
        ("linear1", "fc1"),
        ("linear2", "fc2"),
        ("norm1", "self_attn_layer_norm"),
        ("norm2", "final_layer_norm"),
    ),
    "decoder": (
        ("self_attn", "self_attn"),
        ("multihead_attn", "encoder_attn"),
        ("linear1", "fc1"),
        ("linear2", "fc2"),
        ("norm1", "self_attn_layer_norm"),
        ("norm2", "encoder_attn_layer_norm"),
        ("norm3", "final_layer_norm"),
    ),
}
# From the spelling of transformers 5's modules, and of its own ResNet, to that of its files and of timm.
_SPELLINGS = (
    (r"^(model\.(?:en|de)coder\.layers\.\d+)\.mlp\.", r"\1."),
    (r"^(model\.(?:en|de)coder\.layers\.\d+\.\w+)\.o_proj\.", r"\1.out_proj."),
    (r"^model\.backbone\.model\.", "model.backbone.conv_encoder.model."),
    (r"^model\.backbone\.position_embedding\.", "model.position_embedding."),
    (r"\.embedder\.embedder\.convolution\.", ".conv1."),
    (r"\.embedder\.embedder\.normalization\.", ".bn1."),
    (r"\.encoder\.stages\.(\d+)\.layers\.(\d+)\.", lambda found: f".layer{int(found[1]) + 1}.{found[2]}."),
    (r"\.shortcut\.convolution\.", ".downsample.0."),
    (r"\.shortcut\.normalization\.", ".downsample.1."),
    (r"\.layer\.(\d)\.convolution\.", lambda found: f".conv{int(found[1]) + 1}."),
    (r"\.layer\.(\d)\.normalization\.", lambda found: f".bn{int(found[1]) + 1}."),
)
_BLOCKS: dict[tuple[tuple[int, ...], bool], str] = {  # blocks per stage, whether they are bottlenecks
    ((2, 2, 2, 2), False): "resnet18",
    ((3, 4, 6, 3), False): "resnet34",
    ((3, 4, 6, 3), True): "resnet50",
    ((3, 4, 23, 3), True): "resnet101",
}


def is_huggingface(names: Mapping[str, Any]) -> bool:
    """Do these weights bear Hugging Face's names?"""
    return any(name.startswith(("model.encoder.", "model.decoder.", "class_labels_classifier.")) for name in names)


def from_huggingface(weights: Mapping[str, Tensor]) -> StateDict:
    """Hugging Face's names and separate projections -> the original's; names of no known kind stay as they are."""
    result: StateDict = {}
    projections: dict[str, dict[str, Tensor]] = {}
    for name, tensor in weights.items():
        name = _rename(_respell(name), reverse=True)
        found = re.fullmatch(r"(.*_attn)\.([qkv])_proj\.(weight|bias)", name)
        if found is None:
            result[name] = tensor
        else:
            projections.setdefault(f"{found[1]}.in_proj_{found[3]}", {})[found[2]] = tensor
    for name, parts in projections.items():
        if len(parts) == 3:
            result[name] = torch.cat([parts[part] for part in "qkv"])
    return result


def to_huggingface(weights: Mapping[str, Tensor]) -> StateDict:
    """The original's names and joint projections -> Hugging Face's, as its files have them."""
    result: StateDict = {}
    for name, tensor in weights.items():
        if name.endswith("num_batches_tracked"):
            continue  # its norms are frozen
        name = _rename(name)
        found = re.fullmatch(r"(.*_attn)\.in_proj_(weight|bias)", name)
        if found is None:
            result[name] = tensor
        else:
            result |= {f"{found[1]}.{p}_proj.{found[2]}": t for p, t in zip("qkv", tensor.chunk(3))}
    return result


def _respell(name: str) -> str:
    for pattern, replacement in _SPELLINGS:
        name = re.sub(pattern, replacement, name)
    return name


def _rename(name: str, reverse: bool = False) -> str:
    """original -> Hugging Face, or back."""
    for pair in _PREFIXES:
        before, after = reversed(pair) if reverse else pair
        if not name.startswith(before):
            continue
        rest = name[len(before) :]
        if before.endswith(".layers."):
            number, part, parameter = rest.split(".", 2)
            parts = {(b if reverse else a): (a if reverse else b) for a, b in _LAYER_PARTS[before.split(".")[1]]}
            rest = f"{number}.{parts.get(part, part)}.{parameter}"
        return after + rest
    return name


def infer_config(weights: Mapping[str, Tensor], **known: Any) -> ModelConfig:
    """The model that weights with the original's names belong to.

    Args:
        weights: a state_dict.
        known: settings that no weight's shape shows: heads (by default 8), dilation, dropout, aux_loss.

    Raises:
        KeyError: an essential weight is missing.
        ValueError: a backbone of another kind, or settings unknown.
    """
    layers = {
        part: len({name.split(".")[3] for name in weights if name.startswith(f"transformer.{part}.layers.")})
        for part in ("encoder", "decoder")
    }
    num_queries, d_model = weights["query_embed.weight"].shape
    settings: dict[str, Any] = {
        "num_classes": weights["class_embed.weight"].shape[0] - 1,
        "num_queries": num_queries,
        "d_model": d_model,
        "encoder_layers": layers["encoder"],
        "decoder_layers": layers["decoder"],
        "feedforward": weights["transformer.decoder.layers.0.linear1.weight"].shape[0],
        "pre_norm": "transformer.encoder.norm.weight" in weights,
        "position": "learned" if "backbone.1.row_embed.weight" in weights else "sine",
    }
    return ModelConfig.from_dict(settings | _backbone_settings(weights) | known)


def _backbone_settings(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    body = "backbone.0.body."
    if f"{body}stages.0.0.weight" in weights:
        first = weights[f"{body}stages.0.0.weight"]
        # Strides 8 and 16 begin with the same kernel; 16 is the default.
        return {
            "backbone": "conv",
            "backbone_width": first.shape[0],
            "backbone_stride": 32 if first.shape[2] > 3 else 16,
        }
    blocks = tuple(
        len({name.split(".")[4] for name in weights if name.startswith(f"{body}layer{stage}.")})
        for stage in range(1, 5)
    )
    bottleneck = f"{body}layer1.0.conv3.weight" in weights
    if (blocks, bottleneck) not in _BLOCKS:
        raise ValueError(
            f"the backbone has {blocks} blocks in its four stages; expected a ResNet-18, 34, 50 or 101 or the conv backbone"
        )
    counted = f"{body}bn1.num_batches_tracked" in weights
    return {"backbone": _BLOCKS[blocks, bottleneck], "backbone_norm": "batch" if counted else "frozen"}
