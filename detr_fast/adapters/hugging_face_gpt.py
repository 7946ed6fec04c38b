"""Layers of OPT, BioGPT and GPT-Neo in transformers: their residual sums with the norms behind them are one op.

The attentions of GPT-Neo, global or of a window, and of GPT-J write out their scores in fp32; here they stay in `ops.attention`, where nobody
asks for weights.
Known by all of their code (`base.fingerprint`).
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from detr_fast.adapters.base import Scriptable
from detr_fast.adapters.blocks import comes_apart, feed_forward_add_norm, feed_forward_sum, is_dispatched, is_plain
from detr_fast.adapters.hugging_face_alibi import cached, joined_with
from detr_fast.adapters.hugging_face_blocks import parts_of_layer
from detr_fast.adapters.rotary_functions import Form, turned
from detr_fast.adapters.windows import attend, packed
from detr_fast.nn.blocks import FeedForwardParts, norm_of_sum, probability, sum_and_norm
from detr_fast.ops.dropout import shared_seed


class OPTDecoderLayer(Scriptable):
    """OPT's layer, which normalises first or behind its sums, and drops nothing within its feed-forward block."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        taken = comes_apart(hidden_states, self.self_attn_layer_norm, self.final_layer_norm)
        parts = self._parts() if taken else None
        if parts is None:
            rest = (past_key_values, use_cache, position_ids)
            return super().forward(hidden_states, attention_mask, *rest, **kwargs)  # type: ignore[misc,no-any-return]
        given = {"past_key_values": past_key_values, "position_ids": position_ids, "attention_mask": attention_mask}
        x, p = hidden_states, parts.output_dropout_p
        first = getattr(self, "do_layer_norm_before", True)
        with shared_seed():
            y = self.self_attn_layer_norm(x) if first else x
            y = self.self_attn(hidden_states=y, **given, **kwargs)[0]
            if first:
                x, y = sum_and_norm(y, x, self.final_layer_norm, p)
                return feed_forward_sum(y, parts, x)
            x = norm_of_sum(y, x, self.self_attn_layer_norm, p)
            return feed_forward_add_norm(x, parts, self.final_layer_norm)

    def _parts(self: Any) -> FeedForwardParts | None:
        return parts_of_layer(self, "activation_dropout" if hasattr(self, "activation_dropout") else None)


class GPTNeoBlock(Scriptable):
    """GPT-Neo's layer."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        layer_past: Any = None,
        attention_mask: Tensor | None = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:
        if not comes_apart(hidden_states, self.ln_2):
            rest = (layer_past, attention_mask, use_cache, output_attentions)
            return super().forward(hidden_states, *rest, **kwargs)  # type: ignore[misc,no-any-return]
        given = {"layer_past": layer_past, "attention_mask": attention_mask, "use_cache": use_cache}
        with shared_seed():
            y, weights = self.attn(self.ln_1(hidden_states), **given, output_attentions=output_attentions)
            x, y = sum_and_norm(y, hidden_states, self.ln_2)
            return x + self.mlp(y), weights


class GPTNeoSelfAttention(Scriptable):
    """GPT-Neo's attention."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        layer_past: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:
        # Of a static cache theirs places windows by its end, so that rows are left without keys: what they get is theirs.
        displaced = self.attention_type == "local" and getattr(layer_past, "is_compileable", False)
        if output_attentions or displaced or not is_dispatched(hidden_states) or not is_plain(self.attn_dropout):
            rest = (attention_mask, layer_past, use_cache, output_attentions)
            return super().forward(hidden_states, *rest, **kwargs)  # type: ignore[misc,no-any-return]
        shape = self.num_heads, self.head_dim
        q, k, v = (part(hidden_states).unflatten(-1, shape) for part in (self.q_proj, self.k_proj, self.v_proj))
        packs = packed(q, k, v) if layer_past is None else cached(layer_past, self.layer_id, q, k, v)
        keys = packs[-1].shape[1]
        order = self.bias[:, :, keys - q.shape[1] : keys, :keys]  # True = may attend
        mask = joined_with(attention_mask, (self.attention_type,), partial(_joined, order, attention_mask, q.dtype))
        y = attend(packs, mask, probability(self.attn_dropout), 1.0)
        return self.resid_dropout(self.out_proj(y)), None


class GPTJAttention(Scriptable):
    """GPT-J's attention, with rotary positions."""

    @classmethod
    def attributes_for(cls, original: type[Module]) -> dict[str, Any]:
        rotate = vars(sys.modules[original.__module__])["apply_rotary_pos_emb"]
        return {"detr_fast_rotate": staticmethod(rotate)}

    def forward(
        self: Any,
        hidden_states: Tensor,
        layer_past: Any = None,
        attention_mask: Tensor | None = None,
        position_ids: Any = None,
        use_cache: bool | None = False,
        output_attentions: bool | None = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:
        scale = self.scale_attn
        taken = not output_attentions and is_dispatched(hidden_states) and is_plain(self.attn_dropout)
        if not (taken and isinstance(scale, float)):
            rest = (layer_past, attention_mask, position_ids, use_cache, output_attentions)
            return super().forward(hidden_states, *rest, **kwargs)  # type: ignore[misc,no-any-return]
        shape = self.num_attention_heads, self.head_dim
        q, k, v = (part(hidden_states).unflatten(-1, shape) for part in (self.q_proj, self.k_proj, self.v_proj))
        table = self._get_embed_positions(position_ids)
        places = position_ids.unsqueeze(-1).expand(-1, -1, table.shape[-1])
        sin, cos = torch.gather(table, 1, places).to(k.dtype).chunk(2, -1)
        found = turned(_PAIRS, q, k, cos, sin, False)
        q, k = (self._turned(one, (sin, cos)) for one in (q, k)) if found is None else found
        packs = packed(q, k, v) if layer_past is None else cached(layer_past, self.layer_idx, q, k, v)
        y = attend(packs, attention_mask, probability(self.attn_dropout), 1 / scale)
        return self.resid_dropout(self.out_proj(y)), None

    def _turned(self: Any, x: Tensor, angles: tuple[Tensor, ...]) -> Tensor:
        if self.rotary_dim is None:
            return self.detr_fast_rotate(x, *angles)  # type: ignore[no-any-return]
        turned = self.detr_fast_rotate(x[..., : self.rotary_dim], *angles)
        return torch.cat([turned, x[..., self.rotary_dim :]], -1)


_PAIRS = Form(interleaved=True, per_pair=True, partial=True)  # GPT-J's


def _joined(order: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What is added to scores: the lowest number for what order hides, and a mask of numbers."""
    dtype = dtype if mask is None else mask.dtype
    hidden = torch.zeros_like(order, dtype=dtype).masked_fill(~order, torch.finfo(dtype).min)
    return hidden if mask is None else hidden + mask
