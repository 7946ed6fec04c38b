"""Decoder layers of transformers' Mask2Former and OneFormer, whose queries attend to what their last masks cover.

They ask their attentions for weights, and drop them where nobody asks for them. Here weights are asked for only then, or where a hook lies on
such an attention. Known by all of their code (`base.fingerprint`), that of their methods and parts too.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from detr_fast.adapters.base import Scriptable, fingerprint
from detr_fast.adapters.blocks import (
    activation_name,
    comes_apart,
    feed_forward_add_norm,
    feed_forward_sum,
    is_plain,
)
from detr_fast.adapters.hugging_face_blocks import parts_of_layer
from detr_fast.nn.bare import is_bare
from detr_fast.nn.blocks import FeedForwardParts, norm_of_sum, probability, sum_and_norm
from detr_fast.ops.dropout import shared_seed

_METHODS = ("forward", "forward_post", "forward_pre", "with_pos_embed")


def _code(kind: Any) -> list[str | None]:
    return [fingerprint(getattr(kind, name, None)) for name in _METHODS]


class Mask2FormerDecoderLayer(Scriptable):
    """Mask2Former's decoder layer."""

    detr_fast_is_known: bool  # whether its methods have the code that we know

    @classmethod
    def attributes_for(cls, original: type[Module]) -> dict[str, Any]:
        code = ["2740326ccce0497b", "16c74428a3b100e7", "a4b5cc56b3ee90c1", "912742e1c8e8d29e"]
        return {"detr_fast_is_known": _code(original) == code}

    def forward(
        self: Any,
        hidden_states: Tensor,
        level_index: int | None = None,
        attention_mask: Tensor | None = None,
        position_embeddings: Any = None,
        query_position_embeddings: Tensor | None = None,
        encoder_hidden_states: Any = None,
        encoder_attention_mask: Tensor | None = None,
        output_attentions: bool | None = False,
    ) -> tuple[Tensor, ...]:
        norms = (self.cross_attn_layer_norm, self.self_attn_layer_norm, self.final_layer_norm)
        taken = self.detr_fast_is_known and not output_attentions and comes_apart(hidden_states, *norms)
        parts = parts_of_layer(self) if taken and is_bare(self.self_attn) and is_bare(self.cross_attn) else None
        position = query_position_embeddings
        if parts is None:
            rest = (encoder_hidden_states, encoder_attention_mask, output_attentions)
            return super().forward(  # type: ignore[misc]
                hidden_states, level_index, attention_mask, position_embeddings, position, *rest
            )
        memory = encoder_hidden_states[level_index]
        keys = self.with_pos_embed(memory, position_embeddings[level_index])

        def cross(x: Tensor) -> Tensor:
            query = self.with_pos_embed(x, position)
            return self.cross_attn(query, keys, memory, attn_mask=encoder_attention_mask, need_weights=False)[0]  # type: ignore[no-any-return]

        def own(x: Tensor) -> Tensor:
            return self.self_attn(hidden_states=x, position_embeddings=position)[0]  # type: ignore[no-any-return]

        p = probability(self.dropout, self.training)
        with shared_seed():
            if self.pre_norm:
                x, y = sum_and_norm(cross(norms[0](hidden_states)), hidden_states, norms[1], p)
                x, y = sum_and_norm(own(y), x, norms[2], p)
                return (feed_forward_sum(y, parts, x),)
            x = norm_of_sum(cross(hidden_states), hidden_states, norms[0], p)
            x = norm_of_sum(own(x), x, norms[1], p)
            return (feed_forward_add_norm(x, parts, norms[2]),)


class OneFormerDecoderLayer(Scriptable):
    """OneFormer's decoder layer, which is made of three. Theirs asks the device which queries see nothing, and waits for the answer."""

    detr_fast_parts: tuple[type, ...]  # the classes of the three, where their code is the one that we know

    @classmethod
    def attributes_for(cls, original: type[Module]) -> dict[str, Any]:
        code = {
            "CrossAttention": ["344493d47f031c03", "b1e72585e0f99ddd", "9061bd16dd5f25fa", "912742e1c8e8d29e"],
            "SelfAttention": ["8721b8246464b8fd", "49f57ae406f73e88", "4c995f54e67da43c", "912742e1c8e8d29e"],
            "FFN": ["4be9bb44ef8cc5d9", "b6c250a104ec301b", "c7e687eac07e3cec", "912742e1c8e8d29e"],
        }
        module = vars(sys.modules[original.__module__])
        kinds = {name: module.get(f"OneFormerTransformerDecoder{name}Layer") for name in code}
        known = all(_code(kinds[name]) == methods for name, methods in code.items())
        return {"detr_fast_parts": tuple(kinds.values()) if known else ()}

    def forward(
        self: Any,
        index: int,
        output: Tensor,
        multi_stage_features: Any,
        multi_stage_positional_embeddings: Any,
        attention_mask: Any = None,
        query_embeddings: Tensor | None = None,
        output_attentions: bool | None = False,
    ) -> tuple[Tensor, ...]:
        features = (multi_stage_features, multi_stage_positional_embeddings)
        is_mask = isinstance(attention_mask, Tensor) and attention_mask.dtype == torch.bool
        parts = self._parts(output) if is_mask and not output_attentions else None
        if parts is None:
            rest = (attention_mask, query_embeddings, output_attentions)
            return super().forward(index, output, *features, *rest)  # type: ignore[misc]
        level = index % self.num_feature_levels
        memory, position = (feature[level] for feature in features)
        attention_mask.masked_fill_(attention_mask.all(-1, keepdim=True), False)
        cross, own, block = self.cross_attn, self.self_attn, self.ffn

        def cross_attend(x: Tensor) -> Tensor:
            query, key = (cross.with_pos_embed(*pair) for pair in ((x, query_embeddings), (memory, position)))
            return cross.multihead_attn(query, key, memory, attn_mask=attention_mask, need_weights=False)[0]  # type: ignore[no-any-return]

        def attend(x: Tensor) -> Tensor:
            return own.self_attn(hidden_states=x, position_embeddings=query_embeddings)[0]  # type: ignore[no-any-return]

        first, second = probability(cross.dropout), probability(own.dropout)
        with shared_seed():
            if cross.normalize_before:
                x, y = sum_and_norm(cross_attend(cross.norm(output)), output, own.norm, first)
                x, y = sum_and_norm(attend(y), x, block.norm, second)
                return (feed_forward_sum(y, parts, x),)
            x = norm_of_sum(cross_attend(output), output, cross.norm, first)
            x = norm_of_sum(attend(x), x, own.norm, second)
            return (feed_forward_add_norm(x, parts, block.norm),)

    def _parts(self: Any, x: Tensor) -> FeedForwardParts | None:
        """The parts of its feed-forward block; None where the original is to run."""
        three = (self.cross_attn, self.self_attn, self.ffn)
        if tuple(map(type, three)) != self.detr_fast_parts or not all(map(is_bare, three)):
            return None
        cross, own, block = three
        attentions = (cross.multihead_attn, own.self_attn)
        plain = (cross.norm, own.norm, block.norm, cross.dropout, own.dropout)
        if not all(map(is_bare, attentions)) or not comes_apart(x, *plain):
            return None
        activation = activation_name(block.activation)
        if activation is None or not all(map(is_plain, (block.linear1, block.linear2, block.dropout))):
            return None
        p = probability(block.dropout)
        return FeedForwardParts(block.linear1, activation, p, block.linear2, p)
