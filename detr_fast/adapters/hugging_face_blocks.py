"""What layers of DETR-like detectors in Hugging Face transformers share: attentions and blocks with the norms behind them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from detr_fast.adapters.base import Scriptable
from detr_fast.adapters.blocks import activation_name, comes_apart, feed_forward_add_norm, is_plain
from detr_fast.adapters.feed_forward import parts_of
from detr_fast.adapters.hugging_face_attention import attend_add_norm
from detr_fast.nn.bare import is_bare
from detr_fast.nn.blocks import FeedForwardParts, norm_of_sum, probability


class Told(Scriptable):
    """A module that returns its attention's weights unless `weights_are_dropped` tells it that nobody looks at them."""


def told(part: Any) -> dict[str, bool]:
    """What such a module is given by name where its weights are dropped; hooks may look at them."""
    return {"weights_are_dropped": True} if isinstance(part, Told) and is_bare(part) else {}


def finite(layer: Any, x: Tensor, training: bool | None = None) -> Tensor:
    """What the originals clamp in training can be infinite only in fp16: a norm's output is at most sqrt(C) times its weight.

    training: where it is not the layer's mode that counts.
    """
    training = layer.training if training is None else training
    return clamped(x) if training and x.dtype == torch.float16 else x


def clamped(x: Tensor) -> Tensor:
    """As the originals do in training where not all is finite, but without asking."""
    limit = torch.finfo(x.dtype).max - 1000  # which only fp16 can tell from its largest number
    inside = x.clamp(min=-limit, max=limit)
    return inside if x.dtype != torch.float16 else torch.where(torch.isfinite(x).all(), x, inside)


def decoder_comes_apart(layer: Any, x: Tensor) -> bool:
    return comes_apart(x, layer.self_attn_layer_norm, layer.encoder_attn_layer_norm, layer.final_layer_norm)


def decode(layer: Any, x: Tensor, own: dict[str, Any], cross: dict[str, Any] | None) -> Tensor:
    p = probability(layer.dropout, layer.training)
    x = attend_add_norm(layer.self_attn, layer.self_attn_layer_norm, p, x, own)
    if cross is not None:
        x = attend_add_norm(layer.encoder_attn, layer.encoder_attn_layer_norm, p, x, cross)
    return block_add_norm(layer.mlp, x, layer.final_layer_norm)


def block_add_norm(block: Any, x: Tensor, norm: Any) -> Tensor:
    parts = parts_of(block) if is_bare(block) else None
    return norm_of_sum(block(x), x, norm) if parts is None else feed_forward_add_norm(x, parts, norm)


def parts_of_layer(
    layer: Any, inner: str | None = "activation_dropout", training: bool | None = None
) -> FeedForwardParts | None:
    """The feed-forward block of a layer that holds its parts itself; None where it has to be called.

    inner: its first dropout's name, None where there is none. training: where it is not the layer's mode that counts.
    """
    activation = activation_name(layer.activation_fn)
    if activation is None or not (is_plain(layer.fc1) and is_plain(layer.fc2)):
        return None
    training = layer.training if training is None else training
    first = 0.0 if inner is None else probability(getattr(layer, inner), training)
    last = probability(layer.dropout, training)
    return FeedForwardParts(layer.fc1, activation, first, layer.fc2, last)
