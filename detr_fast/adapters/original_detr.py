"""The original DETR repository's transformer layers, known by name and code: the repository is not imported.

Its layers throw the attention weights away, but don't tell nn.MultiheadAttention, which then writes them to memory, in
fp32 and for each head, only to average and drop them. Here they are asked for only where a hook might look at them, as the
repository's own visualisation does. Layers run on the same fused blocks as torch.nn's.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor
from torch.nn import Module

from detr_fast.adapters.base import (
    Adapter,
    Scriptable,
    joined,
    joined_of,
    names_used,
    reads,
    times_read,
    why_not_switch,
)
from detr_fast.adapters.blocks import is_dispatched
from detr_fast.nn import fusion
from detr_fast.nn.multihead_attention import attention_inputs
from detr_fast.nn.whole_layer import whole
from detr_fast.ops.dropout import shared_seed
from detr_fast.ops.layers import DECODER_LAYER, ENCODER_LAYER

# The code that we know: the names that forward, forward_post and forward_pre read, and how often the two read them.
_FORWARD = frozenset({"normalize_before", "forward_pre", "forward_post"})
_BODY = "with_pos_embed self_attn dropout1 norm1 linear2 dropout activation linear1 dropout2 norm2"
_KNOWN = {
    "TransformerEncoderLayer": Counter(_BODY.split()),
    # Positions are added to both attentions' queries and to memory's keys, never to values.
    "TransformerDecoderLayer": Counter(f"{_BODY} multihead_attn with_pos_embed with_pos_embed dropout3 norm3".split()),
}


def attend(attention: Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, padding: Any) -> Tensor:
    """The attention's output; weights are computed only where a hook could see them."""
    seen = bool(attention._forward_hooks)
    return attention(query, key, value, attn_mask=mask, key_padding_mask=padding, need_weights=seen)[0]


def attend_add_norm(
    attention: Module,
    dropout: Any,
    norm: Any,
    x: Tensor,
    mask: Any,
    padding: Any,
    memory: Any = None,
    residual: Any = None,
    **sources: Any,
) -> Any:
    """norm(x + dropout(attention(...))), or (sum, norm) with a residual; as `fusion.attend_add_norm` takes positions."""
    if attention._forward_hooks:
        inputs = attention_inputs(x, memory, sources.get("position"), sources.get("memory_key"))
        y = dropout(attend(attention, *inputs, mask, padding))
        total = (x if residual is None else residual) + y
        return norm(total) if residual is None else (total, norm(total))
    masks = {"attn_mask": mask, "key_padding_mask": padding, "residual": residual}
    return fusion.attend_add_norm(attention, dropout, norm, x, memory, **sources, **masks)


class EncoderLayer(Scriptable):
    """The forward of an encoder layer (L, N, E); everything else is the class's that this is mixed into."""

    def forward(
        self: Any, src: Tensor, src_mask: Any = None, src_key_padding_mask: Any = None, pos: Any = None
    ) -> Tensor:
        """As the original's: positions are added to queries and keys, not to values."""
        with shared_seed():
            tensors = (src, src_mask, src_key_padding_mask, pos)
            return whole(ENCODER_LAYER, self, self._fused, tensors) if is_dispatched(src) else self._fused(*tensors)

    def _fused(self: Any, src: Tensor, mask: Any, padding: Any, pos: Any) -> Tensor:
        if not self.normalize_before:
            x = attend_add_norm(self.self_attn, self.dropout1, self.norm1, src, mask, padding, position=pos)
            return fusion.feed_forward_add_norm(x, *_hidden(self), self.dropout2, self.norm2)
        parts = (self.self_attn, self.dropout1, self.norm2)
        x, n = attend_add_norm(*parts, self.norm1(src), mask, padding, residual=src, position=pos)
        return fusion.feed_forward_sum(self, n, x, *_hidden(self), self.dropout2)


class DecoderLayer(Scriptable):
    """The forward of a decoder layer (L, N, E); everything else is the class's that this is mixed into."""

    def forward(
        self: Any,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Any = None,
        memory_mask: Any = None,
        tgt_key_padding_mask: Any = None,
        memory_key_padding_mask: Any = None,
        pos: Any = None,
        query_pos: Any = None,
    ) -> Tensor:
        """As the original's: query positions are added to queries and self-attention's keys, positions to memory's keys."""
        masks = (tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask)
        memory_key = None if pos is None else self.with_pos_embed(memory, pos)
        tensors = (tgt, memory, memory_key, *masks, query_pos)
        with shared_seed():
            source = (self.multihead_attn, memory, memory_key)
            if is_dispatched(tgt):
                return whole(DECODER_LAYER, self, self._fused, tensors, memory=source)
            return self._fused(*tensors)

    def _fused(
        self: Any,
        tgt: Tensor,
        memory: Tensor,
        memory_key: Any,
        mask: Any,
        memory_mask: Any,
        padding: Any,
        memory_padding: Any,
        query_pos: Any,
    ) -> Tensor:
        own, cross = (mask, padding), (memory_mask, memory_padding)
        sources = {"memory": memory, "memory_key": memory_key, "position": query_pos}
        if not self.normalize_before:
            x = attend_add_norm(self.self_attn, self.dropout1, self.norm1, tgt, *own, position=query_pos)
            x = attend_add_norm(self.multihead_attn, self.dropout2, self.norm2, x, *cross, **sources)
            return fusion.feed_forward_add_norm(x, *_hidden(self), self.dropout3, self.norm3)
        parts = (self.self_attn, self.dropout1, self.norm2)
        x, n = attend_add_norm(*parts, self.norm1(tgt), *own, residual=tgt, position=query_pos)
        parts = (self.multihead_attn, self.dropout2, self.norm3)
        x, n = attend_add_norm(*parts, n, *cross, residual=x, **sources)
        return fusion.feed_forward_sum(self, n, x, *_hidden(self), self.dropout3)


def _hidden(layer: Any) -> tuple[Any, Any, Any, Any]:
    return layer.linear1, layer.activation, layer.dropout, layer.linear2


_MIXINS = {"TransformerEncoderLayer": EncoderLayer, "TransformerDecoderLayer": DecoderLayer}


class OriginalDetr(Adapter):
    """Classes called TransformerEncoderLayer and TransformerDecoderLayer that have the original DETR's code."""

    @classmethod
    def consider(cls, module: Module) -> type[Module] | str | None:
        kind = type(module)
        if kind.__name__ not in _MIXINS or not hasattr(kind, "forward_post") or not hasattr(kind, "forward_pre"):
            return None
        mixin = _MIXINS[kind.__name__]
        if isinstance(module, mixin):
            return None
        known = _KNOWN[kind.__name__]
        methods: Any = kind
        if names_used(methods.forward) != _FORWARD or not (
            times_read(methods.forward_post) == times_read(methods.forward_pre) == known
            and reads(methods.with_pos_embed) == ("self tensor pos", "")
        ):
            return "its name is that of the original DETR's layer, its code is not"
        return why_not_switch(module) or joined(mixin, kind, kind)

    @classmethod
    def describe(cls, replacement: type[Module]) -> str:
        return f"detr_fast.adapters.original_detr.{joined_of(replacement).__name__}"
