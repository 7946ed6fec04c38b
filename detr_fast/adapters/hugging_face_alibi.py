"""BLOOM's and MPT's blocks in transformers, whose attentions add a bias that grows with distance (ALiBi) and write out their scores.

Attentions and feed-forward blocks are computed by their blocks where each is of the class of the block's file whose code is known
(`base.fingerprint`), and nobody looks at it or asks for weights. Bias and mask are added up once for all layers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from detr_fast.adapters.base import Scriptable, fingerprint
from detr_fast.adapters.blocks import activation_name, comes_apart, feed_forward_sum, is_plain
from detr_fast.adapters.windows import attend, packed
from detr_fast.nn.bare import is_bare
from detr_fast.nn.blocks import FeedForwardParts, probability, sum_and_norm
from detr_fast.ops.dropout import shared_seed

_PARTS = {"abd6c2f646425feb", "c2e1df2360df0cc6", "a8018d7fcfd81770", "02edde29657f40b4"}
_JOINED = "_detr_fast_joined"


def joined_with(mask: Tensor | None, others: tuple[Any, ...], join: Callable[[], Tensor]) -> Tensor:
    """A mask joined with what it is given with, which the mask remembers for the layers that follow."""
    if mask is None or torch.compiler.is_compiling():
        return join()
    # A mask that is a user's own may be given again, changed in place.
    version = None if mask.is_inference() else mask._version
    key = (version, torch.is_inference_mode_enabled(), *map(id, others))
    known = getattr(mask, _JOINED, {})
    if key not in known:
        known = dict([*known.items()][-1:])  # of another kind of layer: GPT-Neo's take turns
        known[key] = others, join()  # others are kept, so that no id is given twice
        setattr(mask, _JOINED, known)
    found: Tensor = known[key][1]
    return found


class _Block(Scriptable):
    detr_fast_parts: set[type]  # the classes of parts whose code is known

    @classmethod
    def attributes_for(cls, original: type[Module]) -> dict[str, Any]:
        kinds = [kind for kind in vars(sys.modules[original.__module__]).values() if isinstance(kind, type)]
        return {"detr_fast_parts": {one for one in kinds if fingerprint(getattr(one, "forward", None)) in _PARTS}}

    def _knows(self: Any, *parts: Any) -> bool:
        return all(type(part) in self.detr_fast_parts and is_bare(part) for part in parts)


class BloomBlock(_Block):
    """BLOOM's block."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        alibi: Tensor,
        attention_mask: Tensor,
        layer_past: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:
        x, norm = hidden_states, self.post_attention_layernorm
        if output_attentions or not comes_apart(x, norm) or not self._knows(self.self_attention, self.mlp):
            rest = (layer_past, use_cache, output_attentions)
            return super().forward(x, alibi, attention_mask, *rest, **kwargs)  # type: ignore[misc,no-any-return]
        parts = _bloom_parts(self.mlp)
        split = self.self_attention.pretraining_tp > 1 and self.self_attention.slow_but_exact
        if parts is None or split or not is_plain(self.self_attention.attention_dropout):
            rest = (layer_past, use_cache, output_attentions)
            return super().forward(x, alibi, attention_mask, *rest, **kwargs)  # type: ignore[misc,no-any-return]
        after = self.apply_residual_connection_post_layernorm
        with shared_seed():
            y = self.input_layernorm(x)
            residual = y if after else x
            attention = self.self_attention
            y = _bloom_attention(attention, y, alibi, attention_mask, layer_past)
            p = probability(attention.hidden_dropout, attention.training)
            x, y = sum_and_norm(y, residual, norm, p)
            return feed_forward_sum(y, parts, y if after else x), None


def _bloom_attention(part: Any, x: Tensor, alibi: Tensor, mask: Tensor | None, cache: Any) -> Tensor:
    heads = part.query_key_value(x).unflatten(-1, (part.num_heads, 3, part.head_dim)).transpose(2, 3)
    packs = [heads] if cache is None else cached(cache, part.layer_idx, *heads.unbind(2))
    bias = alibi.unflatten(0, (-1, part.num_heads))  # (B, H, 1, S)
    if mask is not None:
        bias = joined_with(mask, (alibi,), partial(torch.add, bias, mask))
    y = attend(packs, bias, probability(part.attention_dropout), part.inv_norm_factor)
    return part.dense(y)  # type: ignore[no-any-return]


def _bloom_parts(block: Any) -> FeedForwardParts | None:
    first, last = block.dense_h_to_4h, block.dense_4h_to_h
    known = f"{type(block.gelu_impl).__module__}.{type(block.gelu_impl).__qualname__}" == _BLOOM_GELU
    if not known or not all(map(is_bare, block.children())) or (block.pretraining_tp > 1 and block.slow_but_exact):
        return None
    if not (is_plain(first) and is_plain(last)):
        return None
    return FeedForwardParts(first, "gelu_tanh", 0.0, last, probability(block.hidden_dropout, block.training))


_BLOOM_GELU = "transformers.models.bloom.modeling_bloom.BloomGelu"


class MptBlock(_Block):
    """MPT's block."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        position_bias: Tensor,
        attention_mask: Tensor,
        layer_past: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:
        x = hidden_states
        asked = output_attentions or position_bias is None
        taken = not asked and comes_apart(x, self.norm_2, self.resid_attn_dropout)
        parts = _mpt_parts(self.ffn) if taken and self._knows(self.attn, self.ffn) else None
        if parts is None:
            rest = (layer_past, use_cache, output_attentions)
            return super().forward(x, position_bias, attention_mask, *rest, **kwargs)  # type: ignore[misc,no-any-return]
        with shared_seed():
            y = _mpt_attention(self.attn, self.norm_1(x), position_bias, attention_mask, layer_past)
            x, y = sum_and_norm(y, x, self.norm_2, probability(self.resid_attn_dropout))
            return feed_forward_sum(y, parts, x), None


def _mpt_attention(part: Any, x: Tensor, alibi: Tensor, mask: Tensor | None, cache: Any) -> Tensor:
    """alibi: (H, 1, at least S). mask: True = hidden."""
    qkv = part.Wqkv(x)
    if part.clip_qkv:
        qkv = qkv.clamp(min=-part.clip_qkv, max=part.clip_qkv)
    qkv = qkv.unflatten(-1, (3, part.n_heads, part.head_dim))
    packs = [qkv] if cache is None else cached(cache, part.layer_idx, *qkv.unbind(2))
    keys = packs[-1].shape[1]
    bias = alibi[None, :, :, max(0, alibi.shape[2] - keys) :]
    if mask is not None:
        bias = bias.to(torch.promote_types(bias.dtype, qkv.dtype))
        bias = joined_with(mask, (alibi,), partial(bias.masked_fill, mask, torch.finfo(qkv.dtype).min))
    y = attend(packs, bias, probability(part.attn_dropout_p, part.training), part.softmax_scale)
    return part.out_proj(y)  # type: ignore[no-any-return]


def _mpt_parts(block: Any) -> FeedForwardParts | None:
    activation = activation_name(block.act)
    if activation is None or not (is_plain(block.up_proj) and is_plain(block.down_proj)):
        return None
    p = probability(block.hidden_dropout, block.training)
    return FeedForwardParts(block.up_proj, activation, 0.0, block.down_proj, p)


def cached(cache: Any, layer: int, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """Packs of q, and of all keys and values (B, S, H, E) of a cache that holds them with heads first."""
    k, v = cache.update(k.transpose(1, 2), v.transpose(1, 2), layer)
    return packed(q, k.transpose(1, 2), v.transpose(1, 2))
