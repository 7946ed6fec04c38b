"""Layers of transformers' detectors with deformable attention: all that is around that attention, which stays theirs.

Known by all of their code (`base.fingerprint`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from detr_fast.adapters.base import Scriptable
from detr_fast.adapters.blocks import (
    activation_name,
    comes_apart,
    feed_forward_add_norm,
    feed_forward_sum,
    is_dispatched,
    is_plain,
)
from detr_fast.adapters.hugging_face_blocks import (
    Told,
    block_add_norm,
    decode,
    decoder_comes_apart,
    finite,
    parts_of_layer,
    told,
)
from detr_fast.nn.bare import is_bare
from detr_fast.nn.blocks import FeedForwardParts, norm_of_sum, probability
from detr_fast.ops.dropout import shared_seed

Given = dict[str, Any]  # what an attention is given by name
_LEVELS = ("reference_points", "spatial_shapes", "spatial_shapes_list", "level_start_index")  # of deformable attention


class DeformableDetrEncoderLayer(Scriptable):
    """Deformable DETR's encoder layer: all but its attention."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor,
        spatial_position_embeddings: Tensor | None = None,
        reference_points: Any = None,
        spatial_shapes: Any = None,
        spatial_shapes_list: Any = None,
        level_start_index: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        levels = (reference_points, spatial_shapes, spatial_shapes_list, level_start_index)
        if not comes_apart(hidden_states, self.self_attn_layer_norm, self.final_layer_norm):
            given = (hidden_states, attention_mask, spatial_position_embeddings, *levels)
            return super().forward(*given, **kwargs)  # type: ignore[misc]
        with shared_seed():
            y = self.self_attn(
                hidden_states=hidden_states,
                attention_mask=attention_mask,
                encoder_hidden_states=hidden_states,
                encoder_attention_mask=attention_mask,
                position_embeddings=spatial_position_embeddings,
                **dict(zip(_LEVELS, levels)),
            )[0]
            p = probability(self.dropout, self.training)
            x = norm_of_sum(y, hidden_states, self.self_attn_layer_norm, p)
            return finite(self, block_add_norm(self.mlp, x, self.final_layer_norm))


class DeformableDetrDecoderLayer(Scriptable):
    """Deformable DETR's decoder layer: all but its attention to the memory."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        object_queries_position_embeddings: Tensor | None = None,
        reference_points: Any = None,
        spatial_shapes: Any = None,
        spatial_shapes_list: Any = None,
        level_start_index: Any = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        position = object_queries_position_embeddings
        levels = (reference_points, spatial_shapes, spatial_shapes_list, level_start_index)
        memory = (encoder_hidden_states, encoder_attention_mask)
        if not decoder_comes_apart(self, hidden_states):
            return super().forward(hidden_states, position, *levels, *memory, **kwargs)  # type: ignore[misc]
        own, cross = self._options(encoder_attention_mask, kwargs)
        cross = {"encoder_hidden_states": encoder_hidden_states, **cross}
        with shared_seed():
            return decode(
                self,
                hidden_states,
                {"position_embeddings": position, **own},
                {"position_embeddings": position, **dict(zip(_LEVELS, levels)), **cross},
            )

    @staticmethod
    def _options(mask: Tensor | None, more: Given) -> tuple[Given, Given]:
        """What else the two attentions are given, by name."""
        return more, {"attention_mask": mask, "encoder_attention_mask": mask}


class RTDetrDecoderLayer(DeformableDetrDecoderLayer):
    """RT-DETR's decoder layer, which gives its attentions other masks than Deformable DETR's does."""

    @staticmethod
    def _options(mask: Tensor | None, more: Given) -> tuple[Given, Given]:
        return {"attention_mask": mask, **more}, more


class DFineDecoderLayer(Scriptable):
    """D-FINE's decoder layer, in which a gate is between attention and norm; what it clamps is given to its last norm as it is."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        position_embeddings: Tensor | None = None,
        reference_points: Any = None,
        spatial_shapes: Any = None,
        spatial_shapes_list: Any = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        position = position_embeddings
        levels = dict(zip(_LEVELS, (reference_points, spatial_shapes, spatial_shapes_list)))
        memory = {"encoder_hidden_states": encoder_hidden_states}
        if not comes_apart(hidden_states, self.self_attn_layer_norm):
            mask = {"encoder_attention_mask": encoder_attention_mask}
            return super().forward(hidden_states, position, **levels, **memory, **mask, **kwargs)  # type: ignore[misc]
        p = probability(self.dropout, self.training)
        with shared_seed():
            given = {"attention_mask": encoder_attention_mask, "position_embeddings": position, **kwargs}
            y = self.self_attn(hidden_states=hidden_states, **given)[0]
            x = norm_of_sum(y, hidden_states, self.self_attn_layer_norm, p)
            query = x if position is None else x + position
            y = self.encoder_attn(hidden_states=query, **memory, **levels)[0]
            x = self.gateway(x, F.dropout(y, p))
            return self.final_layer_norm((x + self.mlp(x)).clamp(min=-65504, max=65504))  # type: ignore[no-any-return]


class DFineGate(Scriptable):
    """D-FINE's gate, which weighs what a sum and its norm are of."""

    def forward(self: Any, second_residual: Tensor, hidden_states: Tensor) -> Tensor:
        if not comes_apart(hidden_states, self.norm):
            return super().forward(second_residual, hidden_states)  # type: ignore[misc]
        x, y = second_residual, hidden_states
        first, second = torch.sigmoid(self.gate(torch.cat([x, y], dim=-1))).chunk(2, dim=-1)
        return norm_of_sum(second * y, first * x, self.norm)


class LwDetrDecoderLayer(Scriptable):
    """The decoder layer of LW-DETR and RF-DETR: all but its attention to the memory."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        position_embeddings: Tensor | None = None,
        reference_points: Any = None,
        spatial_shapes: Any = None,
        spatial_shapes_list: Any = None,
        level_start_index: Any = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        levels = (reference_points, spatial_shapes, spatial_shapes_list, level_start_index)
        memory = (encoder_hidden_states, encoder_attention_mask)
        if not comes_apart(hidden_states, self.self_attn_layer_norm, self.cross_attn_layer_norm, self.layer_norm):
            return super().forward(hidden_states, position_embeddings, *levels, *memory, **kwargs)  # type: ignore[misc]
        p = probability(self.dropout, self.training)
        with shared_seed():
            y = self.self_attn(hidden_states, position_embeddings=position_embeddings, **kwargs)[0]
            x = norm_of_sum(y, hidden_states, self.self_attn_layer_norm, p)
            y = self.cross_attn(
                hidden_states=x,
                attention_mask=encoder_attention_mask,
                encoder_hidden_states=encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask,
                position_embeddings=position_embeddings,
                **dict(zip(_LEVELS, levels)),
                **kwargs,
            )[0]
            x = norm_of_sum(y, x, self.cross_attn_layer_norm, p)
            parts = self.mlp.parts() if isinstance(self.mlp, LwDetrMLP) else None
            return self.layer_norm(self.mlp(x)) if parts is None else feed_forward_add_norm(x, parts, self.layer_norm)


class LwDetrMLP(Scriptable):
    """The feed-forward block of LW-DETR and RF-DETR, which adds its input."""

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        parts = self.parts() if is_dispatched(hidden_states) else None
        if parts is None:
            return super().forward(hidden_states)  # type: ignore[misc]
        return feed_forward_sum(hidden_states, parts, hidden_states)

    def parts(self: Any) -> FeedForwardParts | None:
        """None where it has to be called."""
        activation = activation_name(self.activation_fn)
        if activation is None or not (is_bare(self) and is_plain(self.fc1) and is_plain(self.fc2)):
            return None
        p = probability(self.dropout, self.training)
        return FeedForwardParts(self.fc1, activation, p, self.fc2, p)


class _PixelLayer(Scriptable):
    """An encoder layer that holds its feed-forward block's parts itself."""

    def _trains(self: Any) -> bool:
        """Whether it drops, and clamps what it gives."""
        return self.training  # type: ignore[no-any-return]

    def _parts(self: Any, x: Any) -> FeedForwardParts | None:
        """None where the original is to run."""
        if not comes_apart(x, self.self_attn_layer_norm, self.final_layer_norm):
            return None
        return parts_of_layer(self, training=self._trains())

    def _encoded(self: Any, parts: FeedForwardParts, x: Tensor, mask: Any, **given: Any) -> tuple[Tensor, Any]:
        """What the layer makes of x, and the weights of its attention."""
        with shared_seed():
            y, weights = self.self_attn(
                hidden_states=x,
                attention_mask=mask,
                encoder_hidden_states=x,
                encoder_attention_mask=mask,
                **given,
            )
            x = norm_of_sum(y, x, self.self_attn_layer_norm, parts.output_dropout_p)
            x = feed_forward_add_norm(x, parts, self.final_layer_norm)
            return finite(self, x, self._trains()), weights


class GroundingDinoDeformableLayer(_PixelLayer, Told):
    """The part of Grounding DINO's encoder layer that is for the image."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor,
        position_embeddings: Tensor | None = None,
        reference_points: Any = None,
        spatial_shapes: Any = None,
        spatial_shapes_list: Any = None,
        level_start_index: Any = None,
        output_attentions: bool = False,
        weights_are_dropped: bool = False,
    ) -> tuple[Tensor, Any]:
        levels = dict(
            zip(_LEVELS, (reference_points, spatial_shapes, spatial_shapes_list, level_start_index)),
            position_embeddings=position_embeddings,
            output_attentions=output_attentions,
        )
        parts = self._parts(hidden_states)
        if parts is None:
            return super().forward(hidden_states, attention_mask, **levels)  # type: ignore[misc]
        dropped = told(self.self_attn) if weights_are_dropped else {}
        return self._encoded(parts, hidden_states, attention_mask, **levels, **dropped)


class Mask2FormerPixelLayer(_PixelLayer):
    """The encoder layer of Mask2Former's pixel decoder."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor,
        position_embeddings: Tensor | None = None,
        reference_points: Any = None,
        spatial_shapes_list: Any = None,
        level_start_index: Any = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, ...]:
        levels = {
            "position_embeddings": position_embeddings,
            "reference_points": reference_points,
            "spatial_shapes_list": spatial_shapes_list,
            "level_start_index": level_start_index,
            "output_attentions": output_attentions,
        }
        parts = self._parts(hidden_states)
        if parts is None:
            return super().forward(hidden_states, attention_mask, **levels)  # type: ignore[misc]
        x, weights = self._encoded(parts, hidden_states, attention_mask, **levels)
        return (x, weights.transpose(1, 0)) if output_attentions else (x,)


class OneFormerPixelLayer(_PixelLayer):
    """The encoder layer of OneFormer's pixel decoder, which its configuration tells whether it trains."""

    def _trains(self: Any) -> bool:
        return self.is_training  # type: ignore[no-any-return]

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor,
        position_embeddings: Tensor | None = None,
        reference_points: Any = None,
        spatial_shapes: Any = None,
        level_start_index: Any = None,
        output_attentions: bool = False,
        spatial_shapes_list: Any = None,
    ) -> tuple[Tensor, ...]:
        levels = dict(
            zip(_LEVELS, (reference_points, spatial_shapes, spatial_shapes_list, level_start_index)),
            position_embeddings=position_embeddings,
            output_attentions=output_attentions,
        )
        parts = self._parts(hidden_states)
        if parts is None:
            return super().forward(hidden_states, attention_mask, **levels)  # type: ignore[misc]
        x, weights = self._encoded(parts, hidden_states, attention_mask, **levels)
        return (x, weights) if output_attentions else (x,)
