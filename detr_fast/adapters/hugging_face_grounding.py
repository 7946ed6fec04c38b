"""Grounding DINO's encoder in transformers, in which the image and the words attend to each other, and OmDet-Turbo's layers.

Grounding DINO's layers return the weights of their attentions, and the encoder keeps them only where it is asked to. It is the encoder that knows, and
tells its layers. The attention between an image and words would otherwise write out (batch, heads, pixels, words) many times over.
Known by all of their code (`base.fingerprint`).
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from detr_fast.adapters.base import Scriptable
from detr_fast.adapters.blocks import activation_name, comes_apart, feed_forward_add_norm, is_dispatched, is_plain
from detr_fast.adapters.hugging_face_blocks import Told, finite, told
from detr_fast.adapters.hugging_face_weighing import GroundingDinoAttention
from detr_fast.nn.bare import is_bare
from detr_fast.nn.blocks import FeedForwardParts, norm_of_sum, probability
from detr_fast.ops.attention import ATTENTION
from detr_fast.ops.dropout import shared_seed


class GroundingDinoEncoder(Scriptable):
    """The encoder; where weights or all hidden states are asked for, its own code runs."""

    detr_fast_output: type  # what it returns

    @classmethod
    def attributes_for(cls, original: type[Module]) -> dict[str, Any]:
        return {"detr_fast_output": getattr(sys.modules[original.__module__], f"{original.__name__}Output")}

    def forward(
        self: Any,
        vision_features: Tensor,
        vision_attention_mask: Tensor,
        vision_position_embedding: Tensor,
        spatial_shapes: Tensor,
        spatial_shapes_list: Any,
        level_start_index: Tensor,
        valid_ratios: Any = None,
        text_features: Any = None,
        text_attention_mask: Tensor | None = None,
        text_position_embedding: Tensor | None = None,
        text_self_attention_masks: Any = None,
        text_position_ids: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        config, position = self.config, text_position_embedding
        weights, states, named = (
            getattr(config, name) if given is None else given
            for name, given in (
                ("output_attentions", output_attentions),
                ("output_hidden_states", output_hidden_states),
                ("return_dict", return_dict),
            )
        )
        image = (vision_features, vision_attention_mask, vision_position_embedding)
        levels = (spatial_shapes, spatial_shapes_list, level_start_index)
        if weights or states or not is_dispatched(vision_features):
            words = (text_features, text_attention_mask, position, text_self_attention_masks, text_position_ids)
            asked = (output_attentions, output_hidden_states, return_dict)
            return super().forward(*image, *levels, valid_ratios, *words, *asked, **kwargs)  # type: ignore[misc]
        points = self.get_reference_points(spatial_shapes_list, valid_ratios, device=vision_features.device)
        x, words = vision_features, text_features
        for layer in self.layers:
            if text_position_embedding is None and (position is None or position.dtype != words.dtype):
                position = layer.get_text_position_embeddings(words, None, text_position_ids)
            (x, words), _ = layer(
                vision_features=x,
                vision_position_embedding=vision_position_embedding,
                spatial_shapes=spatial_shapes,
                spatial_shapes_list=spatial_shapes_list,
                level_start_index=level_start_index,
                key_padding_mask=vision_attention_mask,
                reference_points=points,
                text_features=words,
                text_attention_mask=text_attention_mask,
                text_position_embedding=position,
                text_self_attention_masks=text_self_attention_masks,
                text_position_ids=text_position_ids,
                **told(layer),
            )
        found = {"last_hidden_state_vision": x, "last_hidden_state_text": words}
        return self.detr_fast_output(**found) if named else tuple(found.values())


class GroundingDinoEncoderLayer(Told):
    """A layer of it."""

    def forward(
        self: Any,
        vision_features: Tensor,
        vision_position_embedding: Tensor,
        spatial_shapes: Tensor,
        spatial_shapes_list: Any,
        level_start_index: Tensor,
        key_padding_mask: Tensor,
        reference_points: Tensor,
        text_features: Any = None,
        text_attention_mask: Tensor | None = None,
        text_position_embedding: Tensor | None = None,
        text_self_attention_masks: Any = None,
        text_position_ids: Tensor | None = None,
        weights_are_dropped: bool = False,
    ) -> Any:
        position = text_position_embedding
        levels = {
            "spatial_shapes": spatial_shapes,
            "spatial_shapes_list": spatial_shapes_list,
            "level_start_index": level_start_index,
            "reference_points": reference_points,
        }
        if not weights_are_dropped:
            return super().forward(  # type: ignore[misc]
                vision_features,
                vision_position_embedding,
                key_padding_mask=key_padding_mask,
                text_features=text_features,
                text_attention_mask=text_attention_mask,
                text_position_embedding=position,
                text_self_attention_masks=text_self_attention_masks,
                text_position_ids=text_position_ids,
                **levels,
            )
        position = self.get_text_position_embeddings(text_features, position, text_position_ids)
        (x, _), (words, _) = self.fusion_layer(
            vision_features=vision_features,
            text_features=text_features,
            attention_mask_vision=key_padding_mask,
            attention_mask_text=text_attention_mask,
            **told(self.fusion_layer),
        )
        words, _ = self.text_enhancer_layer(
            hidden_states=words,
            attention_masks=~text_self_attention_masks,
            position_embeddings=position,
            **told(self.text_enhancer_layer),
        )
        x, _ = self.deformable_layer(
            hidden_states=x,
            attention_mask=~key_padding_mask,
            position_embeddings=vision_position_embedding,
            **levels,
            **told(self.deformable_layer),
        )
        return (x, words), (None,) * 4


class GroundingDinoFusionLayer(Told):
    """The part of a layer in which the image and the words attend to each other."""

    def forward(
        self: Any,
        vision_features: Tensor,
        text_features: Tensor,
        attention_mask_vision: Tensor | None = None,
        attention_mask_text: Tensor | None = None,
        weights_are_dropped: bool = False,
    ) -> Any:
        masks = (attention_mask_vision, attention_mask_text)
        if not weights_are_dropped:
            return super().forward(vision_features, text_features, *masks)  # type: ignore[misc]
        x, words = self.layer_norm_vision(vision_features), self.layer_norm_text(text_features)
        with shared_seed():
            (to_image, _), (to_words, _) = self.attn(
                x, words, vision_attention_mask=masks[0], text_attention_mask=masks[1], **told(self.attn)
            )
        x = x + self.drop_path(self.vision_param * to_image)
        words = words + self.drop_path(self.text_param * to_words)
        return (x, None), (words, None)


class GroundingDinoBiAttention(Told):
    """The attention in it: both directions have the same scores.

    The original shifts them by their largest, as softmax does by itself, and then keeps them above -50,000, where their weights are zero.
    """

    def forward(
        self: Any,
        vision_features: Tensor,
        text_features: Tensor,
        vision_attention_mask: Tensor | None = None,
        text_attention_mask: Tensor | None = None,
        weights_are_dropped: bool = False,
    ) -> Any:
        masks = (vision_attention_mask, text_attention_mask)
        known = all(mask is None or mask.dtype == torch.bool for mask in masks)
        if not (weights_are_dropped and known and is_dispatched(vision_features)):
            return super().forward(vision_features, text_features, *masks)  # type: ignore[misc]

        def heads(projection: Any, x: Tensor) -> Tensor:
            return projection(x).unflatten(-1, (self.num_heads, self.head_dim))  # type: ignore[no-any-return]

        image, words = heads(self.vision_proj, vision_features), heads(self.text_proj, text_features)
        image_values = heads(self.values_vision_proj, vision_features)
        word_values = heads(self.values_text_proj, text_features)
        rest = (None, False, probability(self.dropout, self.training), self.scale)
        to_image = ATTENTION(image, words, word_values, text_attention_mask, *rest)
        to_words = ATTENTION(words, image, image_values, vision_attention_mask, *rest)
        return (self.out_vision_proj(to_image.flatten(2)), None), (self.out_text_proj(to_words.flatten(2)), None)


class GroundingDinoTextEnhancerLayer(Told):
    """The part of a layer in which words attend to each other: those of a phrase, by a mask (batch, L, L)."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_masks: Any = None,
        position_embeddings: Tensor | None = None,
        weights_are_dropped: bool = False,
    ) -> tuple[Tensor, Any]:
        parts = self._parts(hidden_states) if weights_are_dropped else None
        bools = attention_masks.dtype == torch.bool and attention_masks.shape[:-2] == hidden_states.shape[:1]
        if parts is None or not bools:
            return super().forward(hidden_states, attention_masks, position_embeddings)  # type: ignore[misc]
        q = self.with_pos_embed(hidden_states, position_embeddings)
        with shared_seed():
            y = self.self_attn.attended(q, q, hidden_states, attention_masks[:, None])
            x = norm_of_sum(y, hidden_states, self.layer_norm_before, parts.output_dropout_p)
            return feed_forward_add_norm(x, parts, self.layer_norm_after), None

    def _parts(self: Any, x: Any) -> FeedForwardParts | None:
        """Those of its feed-forward block; None where the original is to run."""
        activation = activation_name(self.activation)
        attention = isinstance(self.self_attn, GroundingDinoAttention) and is_bare(self.self_attn)
        apart = attention and comes_apart(x, self.layer_norm_before, self.layer_norm_after)
        if activation is None or not (apart and is_plain(self.fc1) and is_plain(self.fc2)):
            return None
        p = probability(self.dropout, self.training)
        return FeedForwardParts(self.fc1, activation, p, self.fc2, p)


class OmDetTurboEncoderLayer(Scriptable):
    """OmDet-Turbo's encoder layer."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Any,
        position_embeddings: Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, ...]:
        inside, behind = self.encoder_feedforward_dropout, self.dropout
        apart = comes_apart(hidden_states, self.self_attn_layer_norm, self.final_layer_norm, inside, behind)
        parts = _parts_of((self.fc1, self.activation_fn, inside, self.fc2, behind)) if apart else None
        if output_attentions or parts is None:
            return super().forward(hidden_states, attention_mask, position_embeddings, output_attentions)  # type: ignore[misc]
        q = self.with_pos_embed(hidden_states, position_embeddings)
        with shared_seed():
            y = self.self_attn(queries=q, keys=q, values=hidden_states, attention_mask=attention_mask)[0]
            x = norm_of_sum(y, hidden_states, self.self_attn_layer_norm, parts.output_dropout_p)
            return (finite(self, feed_forward_add_norm(x, parts, self.final_layer_norm)),)


class OmDetTurboDecoderLayer(Scriptable):
    """OmDet-Turbo's decoder layer, whose queries attend to each other and to words at once."""

    def forward(
        self: Any,
        decoder_embeddings: Tensor,
        task_features: Tensor,
        reference_points: Tensor,
        vision_features: Tensor,
        vision_shapes: Tensor,
        vision_shapes_list: Any,
        level_start_index: Any = None,
        attention_mask: Any = None,
        padding_mask: Any = None,
        query_position: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> tuple[Any, ...]:
        asked = self.output_attentions if output_attentions is None else output_attentions
        plain = (self.norm1, self.norm2, self.norm3, self.dropout1, self.dropout2)
        apart = not asked and comes_apart(decoder_embeddings, *plain)
        parts = _parts_of((self.linear1, self.act, self.dropout3, self.linear2, self.dropout4)) if apart else None
        if parts is None:
            image = (reference_points, vision_features, vision_shapes, vision_shapes_list, level_start_index)
            rest = (attention_mask, padding_mask, query_position, output_attentions, output_hidden_states)
            return super().forward(decoder_embeddings, task_features, *image, *rest)  # type: ignore[misc]
        x, words, count = decoder_embeddings, task_features.transpose(0, 1), decoder_embeddings.shape[1]
        with shared_seed():
            q = torch.cat((self.with_pos_embed(x, query_position), words), dim=1)
            x = torch.cat((x, words), dim=1)
            y = self.self_attn(q, q, x, attention_mask=attention_mask)[0]
            x, words = norm_of_sum(y, x, self.norm1, probability(self.dropout1)).tensor_split((count,), dim=1)
            y = self.cross_attn(
                hidden_states=self.with_pos_embed(x, query_position),
                attention_mask=padding_mask,
                encoder_hidden_states=vision_features,
                reference_points=reference_points.unsqueeze(2),
                spatial_shapes=vision_shapes,
                spatial_shapes_list=vision_shapes_list,
                level_start_index=level_start_index,
                **told(self.cross_attn),
            )[0]
            x = norm_of_sum(y, x, self.norm2, probability(self.dropout2))
            return feed_forward_add_norm(x, parts, self.norm3), words.transpose(0, 1), None, None


def _parts_of(modules: tuple[Any, Any, Any, Any, Any]) -> FeedForwardParts | None:
    """A feed-forward block of two linear layers, what lies between them, and the dropout behind; None where they are to be called."""
    first, activation, inside, second, behind = modules
    name = activation_name(activation)
    if name is None or not all(map(is_plain, (first, inside, second, behind))):
        return None
    return FeedForwardParts(first, name, probability(inside), second, probability(behind))
