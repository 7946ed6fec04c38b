"""Attentions of transformers' detectors that write out their scores (DAB-DETR, Grounding DINO, Mask2Former), and the layers around them.

The scores stay inside `ops.attention` where nobody asks for weights; some of these layers always ask, and then drop them.
Known by all of their code (`base.fingerprint`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from detr_fast.adapters.base import Scriptable
from detr_fast.adapters.blocks import comes_apart, feed_forward_add_norm, is_dispatched
from detr_fast.adapters.hugging_face_blocks import parts_of_layer, told
from detr_fast.nn.bare import is_bare
from detr_fast.nn.blocks import norm_of_sum, probability
from detr_fast.ops.attention import ATTENTION
from detr_fast.ops.dropout import shared_seed


def _takes(x: Any, mask: Tensor | None, weights: Any) -> bool:
    """A mask of another kind than numbers is added all the same by the originals, which is theirs to do."""
    return not weights and is_dispatched(x) and (mask is None or mask.is_floating_point())


def attend(
    q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None, p: float, scale: float | None = None
) -> Tensor:
    """Attention of q, k and v (B, L, H * E) with numbers that are added to scores, or bools, True = may attend."""
    q, k, v = (t.unflatten(-1, (heads, -1)) for t in (q, k, v))
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    y: Tensor = ATTENTION(q, k, v, None, mask, False, p, scale)
    return y.flatten(2)


def _block_add_norm(layer: Any, x: Tensor, norm: Any, inner: str) -> Tensor:
    """Of a layer that holds its feed-forward block's parts itself; DAB-DETR's activation (PReLU) is none of the fused block's."""
    parts = parts_of_layer(layer, inner)
    if parts is not None:
        return feed_forward_add_norm(x, parts, norm)
    first, last = (probability(getattr(layer, name), layer.training) for name in (inner, "dropout"))
    y = layer.fc2(F.dropout(layer.activation_fn(layer.fc1(x)), first))
    return norm_of_sum(y, x, norm, last)


class DabDetrEncoderAttention(Scriptable):
    """What DAB-DETR's encoder attends with."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        object_queries: Tensor | None = None,
        key_value_states: Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if object_queries is None or not _takes(hidden_states, attention_mask, output_attentions):
            rest = (object_queries, key_value_states, output_attentions)
            return super().forward(hidden_states, attention_mask, *rest)  # type: ignore[misc]
        x = hidden_states + object_queries
        p = probability(self.attention_dropout, self.training)
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(hidden_states)
        return self.out_proj(attend(q, k, v, self.num_heads, attention_mask, p, self.scaling)), None


class DabDetrAttention(Scriptable):
    """What DAB-DETR's decoder attends with: its queries and keys may have twice its values' head dimension."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        key_states: Any = None,
        value_states: Any = None,
        output_attentions: bool | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        if not _takes(hidden_states, attention_mask, output_attentions):
            rest = (key_states, value_states, output_attentions)
            return super().forward(hidden_states, attention_mask, *rest)  # type: ignore[misc]
        p = probability(self.attention_dropout, self.training)
        heads = (self.attention_heads, attention_mask, p, self.scaling)
        return self.output_proj(attend(hidden_states, key_states, value_states, *heads)), None


class DabDetrSelfAttention(Scriptable):
    """The first part of DAB-DETR's decoder layer."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        query_position_embeddings: Any = None,
        attention_mask: Tensor | None = None,
        output_attentions: bool | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        looked_at = output_attentions or not (is_bare(self) and is_bare(self.self_attn))
        if looked_at or not comes_apart(hidden_states, self.self_attn_layer_norm):
            rest = (query_position_embeddings, attention_mask, output_attentions)
            return super().forward(hidden_states, *rest)  # type: ignore[misc]
        position = query_position_embeddings
        y = self.self_attn(
            hidden_states=self.self_attn_query_content_proj(hidden_states) + self.self_attn_query_pos_proj(position),
            attention_mask=attention_mask,
            key_states=self.self_attn_key_content_proj(hidden_states) + self.self_attn_key_pos_proj(position),
            value_states=self.self_attn_value_proj(hidden_states),
        )[0]
        p = probability(self.dropout, self.training)
        return norm_of_sum(y, hidden_states, self.self_attn_layer_norm, p), None


class DabDetrFeedForward(Scriptable):
    """The last part of DAB-DETR's decoder layer."""

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        if not comes_apart(hidden_states, self.final_layer_norm):
            return super().forward(hidden_states)  # type: ignore[misc]
        return _block_add_norm(self, hidden_states, self.final_layer_norm, "activation_dropout")


class DabDetrEncoderLayer(Scriptable):
    """DAB-DETR's encoder layer."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        object_queries: Tensor | None,
        output_attentions: bool | None = None,
    ) -> tuple[Tensor, ...]:
        norms = (self.self_attn_layer_norm, self.final_layer_norm)
        given = {"attention_mask": attention_mask, "object_queries": object_queries}
        if not comes_apart(hidden_states, *norms):
            return super().forward(hidden_states, **given, output_attentions=output_attentions)  # type: ignore[misc]
        with shared_seed():
            y, weights = self.self_attn(hidden_states=hidden_states, **given, output_attentions=output_attentions)
            x = norm_of_sum(y, hidden_states, norms[0], probability(self.dropout, self.training))
            x = _block_add_norm(self, x, norms[1], "dropout")
        return (x, weights) if output_attentions else (x,)


class GroundingDinoAttention(Scriptable):
    """What Grounding DINO and OmDet-Turbo attend with among queries and to words."""

    def forward(
        self: Any,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool | None = False,
    ) -> tuple[Tensor, ...]:
        if not _takes(queries, attention_mask, output_attentions):
            return super().forward(queries, keys, values, attention_mask, output_attentions)  # type: ignore[misc]
        return (self.attended(queries, keys, values, attention_mask),)

    def attended(self: Any, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """What it returns without weights; the mask may also be bool, True = may attend."""
        q, k, v = self.query(queries), self.key(keys), self.value(values)
        y = attend(q, k, v, self.num_attention_heads, mask, probability(self.dropout))
        return self.out_proj(y)  # type: ignore[no-any-return]


class GroundingDinoDecoderLayer(Scriptable):
    """Grounding DINO's decoder layer; where weights are asked for, or an attention has hooks that may see them, transformers' own."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        position_embeddings: Tensor | None = None,
        reference_points: Any = None,
        spatial_shapes: Any = None,
        spatial_shapes_list: Any = None,
        level_start_index: Any = None,
        vision_encoder_hidden_states: Tensor | None = None,
        vision_encoder_attention_mask: Tensor | None = None,
        text_encoder_hidden_states: Tensor | None = None,
        text_encoder_attention_mask: Tensor | None = None,
        self_attn_mask: Tensor | None = None,
        output_attentions: bool | None = False,
    ) -> tuple[Tensor, ...]:
        norms = (self.self_attn_layer_norm, self.encoder_attn_text_layer_norm, self.encoder_attn_layer_norm)
        looked_at = output_attentions or not (is_bare(self.self_attn) and is_bare(self.encoder_attn_text))
        apart = not looked_at and comes_apart(hidden_states, *norms, self.final_layer_norm)
        parts = parts_of_layer(self) if apart else None
        levels = {
            "reference_points": reference_points,
            "spatial_shapes": spatial_shapes,
            "spatial_shapes_list": spatial_shapes_list,
            "level_start_index": level_start_index,
            "position_embeddings": position_embeddings,
            "output_attentions": output_attentions,
        }
        text, text_mask = text_encoder_hidden_states, text_encoder_attention_mask
        image, image_mask = vision_encoder_hidden_states, vision_encoder_attention_mask
        if parts is None:
            return super().forward(  # type: ignore[misc]
                hidden_states,
                vision_encoder_hidden_states=image,
                vision_encoder_attention_mask=image_mask,
                text_encoder_hidden_states=text,
                text_encoder_attention_mask=text_mask,
                self_attn_mask=self_attn_mask,
                **levels,
            )
        p = parts.output_dropout_p
        with shared_seed():
            q = self.with_pos_embed(hidden_states, position_embeddings)
            y = self.self_attn(queries=q, keys=q, values=hidden_states, attention_mask=self_attn_mask)[0]
            x = norm_of_sum(y, hidden_states, norms[0], p)
            q = self.with_pos_embed(x, position_embeddings)
            y = self.encoder_attn_text(queries=q, keys=text, values=text, attention_mask=text_mask)[0]
            x = norm_of_sum(y, x, norms[1], p)
            image_masks = {"attention_mask": image_mask, "encoder_attention_mask": image_mask}
            dropped = told(self.encoder_attn)
            y = self.encoder_attn(hidden_states=x, encoder_hidden_states=image, **image_masks, **levels, **dropped)[0]
            x = norm_of_sum(y, x, norms[2], p)
            return (feed_forward_add_norm(x, parts, self.final_layer_norm),)


class Mask2FormerAttention(Scriptable):
    """What Mask2Former's and OneFormer's queries attend to each other with: sequence first; its mask (batch times heads, L, S)."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: Tensor | None = None,
        key_value_states: Tensor | None = None,
        key_value_position_embeddings: Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        own = key_value_states is None and position_embeddings is not None
        mask = attention_mask
        if not own or not _takes(hidden_states, mask, output_attentions):
            memory = (key_value_states, key_value_position_embeddings)
            return super().forward(hidden_states, mask, position_embeddings, *memory, output_attentions)  # type: ignore[misc]
        x = hidden_states.transpose(0, 1)
        keys = x + position_embeddings.transpose(0, 1)  # type: ignore[union-attr]
        if mask is not None:
            mask = mask.view(x.shape[0], self.num_heads, x.shape[1], x.shape[1])
        p = probability(self.dropout, self.training)
        q, k, v = self.q_proj(keys), self.k_proj(keys), self.v_proj(x)
        return self.out_proj(attend(q, k, v, self.num_heads, mask, p, self.scaling)).transpose(0, 1), None
