"""BART's layers in Hugging Face transformers and their copies, those that normalise first included: all but their attentions.

Their feed-forward block is no module of its own. Attentions are called as before, with the cache that they are given.
Known by all of their code (`base.fingerprint`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from detr_fast.adapters.base import Scriptable
from detr_fast.adapters.blocks import comes_apart, feed_forward_add_norm, feed_forward_sum
from detr_fast.adapters.hugging_face_blocks import clamped, parts_of_layer
from detr_fast.nn.blocks import FeedForwardParts, norm_of_sum, sum_and_norm
from detr_fast.ops.dropout import shared_seed


def _parts(layer: Any, x: Any, memory: Tensor | None = None) -> FeedForwardParts | None:
    """The layer's feed-forward block; None where its original is to run."""
    norms = [layer.self_attn_layer_norm, layer.final_layer_norm]
    if memory is not None:
        norms.append(getattr(layer, "encoder_attn_layer_norm", None))
    return parts_of_layer(layer) if comes_apart(x, *norms) else None


class BartEncoderLayer(Scriptable):
    """BART's encoder layer (Marian, PLBart, Blenderbot Small, …)."""

    def forward(self: Any, hidden_states: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Tensor:
        parts = _parts(self, hidden_states)
        if parts is None:
            return super().forward(hidden_states, attention_mask, **kwargs)  # type: ignore[misc]
        with shared_seed():
            y = self.self_attn(hidden_states, attention_mask=attention_mask, **kwargs)[0]
            x = norm_of_sum(y, hidden_states, self.self_attn_layer_norm, parts.output_dropout_p)
            x = feed_forward_add_norm(x, parts, self.final_layer_norm)
        return clamped(x) if x.dtype == torch.float16 else x


class MBartEncoderLayer(Scriptable):
    """mBART's encoder layer, which normalises first (Whisper, Pegasus, M2M100, Blenderbot, Speech2Text, …)."""

    def forward(self: Any, hidden_states: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Tensor:
        parts = _parts(self, hidden_states)
        if parts is None:
            return super().forward(hidden_states, attention_mask, **kwargs)  # type: ignore[misc]
        with shared_seed():
            y = self.self_attn_layer_norm(hidden_states)
            y = self.self_attn(hidden_states=y, attention_mask=attention_mask, **kwargs)[0]
            x, y = sum_and_norm(y, hidden_states, self.final_layer_norm, parts.output_dropout_p)
            x = feed_forward_sum(y, parts, x)
        if x.dtype != torch.float16:
            return x
        limit = torch.finfo(x.dtype).max - 1000
        return x.clamp(min=-limit, max=limit)


class BartDecoderLayer(Scriptable):
    """BART's decoder layer."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = True,
        **kwargs: Any,
    ) -> Tensor:
        parts = _parts(self, hidden_states, encoder_hidden_states)
        if parts is None:
            memory = (encoder_hidden_states, encoder_attention_mask)
            return super().forward(hidden_states, attention_mask, *memory, past_key_values, use_cache, **kwargs)  # type: ignore[misc]
        own = {"past_key_values": past_key_values, "attention_mask": attention_mask, **kwargs}
        cross = {
            "key_value_states": encoder_hidden_states,
            "attention_mask": encoder_attention_mask,
            "past_key_values": past_key_values,
            **kwargs,
        }
        with shared_seed():
            return self._fused(parts, hidden_states, own, None if encoder_hidden_states is None else cross)  # type: ignore[no-any-return]

    def _fused(
        self: Any, parts: FeedForwardParts, x: Tensor, own: dict[str, Any], cross: dict[str, Any] | None
    ) -> Tensor:
        p = parts.output_dropout_p
        x = norm_of_sum(self.self_attn(x, **own)[0], x, self.self_attn_layer_norm, p)
        if cross is not None:
            x = norm_of_sum(self.encoder_attn(x, **cross)[0], x, self.encoder_attn_layer_norm, p)
        return feed_forward_add_norm(x, parts, self.final_layer_norm)


class WhisperDecoderLayer(BartDecoderLayer):
    """Whisper's decoder layer, which normalises first (Speech2Text, XGLM, MusicGen)."""

    def _fused(
        self: Any, parts: FeedForwardParts, x: Tensor, own: dict[str, Any], cross: dict[str, Any] | None
    ) -> Tensor:
        p = parts.output_dropout_p
        y = self._attend(self.self_attn, self.self_attn_layer_norm(x), own)
        if cross is not None:
            x, y = sum_and_norm(y, x, self.encoder_attn_layer_norm, p)
            y = self._attend(self.encoder_attn, y, cross)
        x, y = sum_and_norm(y, x, self.final_layer_norm, p)
        return feed_forward_sum(y, parts, x)

    @staticmethod
    def _attend(attention: Any, x: Tensor, given: dict[str, Any]) -> Tensor:
        y: Tensor = attention(x, **given)[0]
        return y


class MBartDecoderLayer(WhisperDecoderLayer):
    """mBART's decoder layer (Pegasus, M2M100, Blenderbot, …), which differs in how hooks see the attentions' input: by name."""

    @staticmethod
    def _attend(attention: Any, x: Tensor, given: dict[str, Any]) -> Tensor:
        y: Tensor = attention(hidden_states=x, **given)[0]
        return y
