"""Whisper's attention in transformers and its copies, which scale queries by a pass of their own and copy queries, keys and values.

Without a cache that is spared: what is asked takes the views that projections give. What else is true of attentions that ask transformers'
registry holds for them, too.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from detr_fast.adapters.base import Scriptable
from detr_fast.adapters.blocks import is_dispatched
from detr_fast.adapters.hugging_face import NAME, attention, unknown_of


class _Attention(Scriptable):
    def _takes(self: Any, x: Any, given: dict[str, Any]) -> bool:
        return self.config._attn_implementation == NAME and not unknown_of(given) and is_dispatched(x)

    def _attend(self: Any, x: Tensor, memory: Tensor, mask: Tensor | None, given: dict[str, Any]) -> Tensor:
        """The output, of queries (B, L, C) and what keys and values are made of (B, S, C)."""
        shape = -1, self.head_dim
        parts = ((self.q_proj, x), (self.k_proj, memory), (self.v_proj, memory))
        q, k, v = (part(source).unflatten(-1, shape).transpose(1, 2) for part, source in parts)
        p = self.dropout if self.training else 0.0
        y, _ = attention(self, q, k, v, mask, dropout=p, scaling=self.scaling, **given)
        return self.out_proj(y.flatten(2))  # type: ignore[no-any-return]


class WhisperAttention(_Attention):
    """Whisper's (and Audio Flamingo 3's)."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        memory = hidden_states if key_value_states is None else key_value_states
        taken = past_key_values is None and not output_attentions and self._takes(hidden_states, kwargs)
        if not taken or memory.shape[0] != hidden_states.shape[0]:
            rest = (key_value_states, past_key_values, attention_mask, output_attentions)
            return super().forward(hidden_states, *rest, **kwargs)  # type: ignore[misc,no-any-return]
        return self._attend(hidden_states, memory, attention_mask, kwargs), None


class AudioAttention(_Attention):
    """That of its encoder as Qwen2-Audio, Voxtral and MOSS have it, which knows no cache."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if output_attentions or not self._takes(hidden_states, kwargs):
            return super().forward(hidden_states, attention_mask, output_attentions, **kwargs)  # type: ignore[misc,no-any-return]
        return self._attend(hidden_states, hidden_states, attention_mask, kwargs), None
