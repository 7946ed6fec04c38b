"""The Transformer classes: torch.nn's own containers around our attention and norms.

In training, and wherever attention runs on one of our kernels, the parts run one by one and boolean masks reach attention
as they were given; otherwise the originals run, with their inference fast path and nested tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.transformer import _detect_is_causal_mask, _get_seq_len

from detr_fast import dispatch
from detr_fast.nn.fusion import (
    attend_add_norm,
    feed_forward_add_norm,
    feed_forward_sum,
    followed,
    normed,
    norms_ahead,
)
from detr_fast.nn.memory import readers, shared_memory
from detr_fast.nn.multihead_attention import MultiheadAttention, is_mask
from detr_fast.nn.replacements import converts_children, replaces
from detr_fast.nn.tracing import keeps_whole
from detr_fast.nn.whole_layer import whole
from detr_fast.ops.dropout import shared_seed
from detr_fast.ops.layers import DECODER_LAYER, ENCODER_LAYER


@replaces(nn.TransformerEncoderLayer)
@keeps_whole
@converts_children
class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """`torch.nn.TransformerEncoderLayer`, each block in as few launches as the dispatcher finds worth it.

    Arguments, shapes, state_dict and errors are its own.
    """

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """As torch.nn.TransformerEncoderLayer's."""
        if not self.runs_parts(src, src_mask, src_key_padding_mask, is_causal):
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        if _overrides(self, "_sa_block", "_ff_block"):
            return self._parts(src, src_mask, src_key_padding_mask, is_causal)
        with shared_seed():
            return whole(ENCODER_LAYER, self, self._fused, (src, src_mask, src_key_padding_mask), (is_causal,))

    def _fused(self, src: Tensor, mask: Tensor | None, padding: Tensor | None, is_causal: bool) -> Tensor:
        masks: Any = {"attn_mask": mask, "key_padding_mask": padding, "is_causal": is_causal}
        hidden = (self.linear1, self.activation, self.dropout, self.linear2)
        if self.norm_first:
            n = normed(self.norm1, src)
            x, n = attend_add_norm(self.self_attn, self.dropout1, self.norm2, n, residual=src, **masks)
            return feed_forward_sum(self, n, x, *hidden, self.dropout2)
        x = attend_add_norm(self.self_attn, self.dropout1, self.norm1, src, **masks)
        return feed_forward_add_norm(x, *hidden, self.dropout2, self.norm2)

    def _parts(self, src: Tensor, mask: Tensor | None, padding: Tensor | None, is_causal: bool) -> Tensor:
        if self.norm_first:
            x = src + self._sa_block(self.norm1(src), mask, padding, is_causal)
            return x + self._ff_block(self.norm2(x))
        x = self.norm1(src + self._sa_block(src, mask, padding, is_causal))
        return self.norm2(x + self._ff_block(x))

    def runs_parts(self, src: Tensor, mask: Tensor | None, padding: Tensor | None, is_causal: bool) -> bool:
        """Whether the parts run one by one here, rather than the original's forward."""
        if not (dispatch.intervening or src.is_cuda) or src.is_nested:
            return False
        if not all(m is None or is_mask(m) for m in (mask, padding)):
            return False  # the original says what is wrong
        if dispatch.intervening or self.training:  # a fused layer would neither obey nor be explained part by part
            return True
        attention = self.self_attn
        return isinstance(attention, MultiheadAttention) and attention.runs_here(
            src, src, src, padding, mask, is_causal
        )


@replaces(nn.TransformerEncoder)
@keeps_whole
@converts_children
class TransformerEncoder(nn.TransformerEncoder):
    """`torch.nn.TransformerEncoder` over our layers. Arguments, shapes, state_dict and errors are its own."""

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """As torch.nn.TransformerEncoder's."""
        is_causal = _affordable_hint(mask, is_causal)
        first = self.layers[0]
        if not all(type(layer) is TransformerEncoderLayer for layer in self.layers) or not first.runs_parts(
            src, mask, src_key_padding_mask, is_causal is True
        ):
            return super().forward(src, mask, src_key_padding_mask, is_causal)
        is_causal = _detect_is_causal_mask(mask, is_causal, _get_seq_len(src, first.self_attn.batch_first))
        x = src
        with shared_seed(), norms_ahead(followed(self.layers, self.norm)):
            for layer in self.layers:
                x = layer(x, src_mask=mask, is_causal=is_causal, src_key_padding_mask=src_key_padding_mask)
            return x if self.norm is None else normed(self.norm, x)


@replaces(nn.TransformerDecoderLayer)
@keeps_whole
@converts_children
class TransformerDecoderLayer(nn.TransformerDecoderLayer):
    """`torch.nn.TransformerDecoderLayer`, each block in as few launches as the dispatcher finds worth it.

    Arguments, shapes, state_dict and errors are its own.
    """

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """As torch.nn.TransformerDecoderLayer's."""
        masks = (tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask)
        if (
            not (dispatch.intervening or tgt.is_cuda)
            or tgt.is_nested
            or not all(m is None or is_mask(m) for m in masks)
            or _overrides(self, "_sa_block", "_mha_block", "_ff_block")
        ):
            return super().forward(tgt, memory, *masks, tgt_is_causal, memory_is_causal)
        hints = (tgt_is_causal, memory_is_causal)
        with shared_seed():
            source = (self.multihead_attn, memory, None)
            return whole(DECODER_LAYER, self, self._fused, (tgt, memory, *masks), hints, source)

    def _fused(
        self,
        tgt: Tensor,
        memory: Tensor,
        mask: Tensor | None,
        memory_mask: Tensor | None,
        padding: Tensor | None,
        memory_padding: Tensor | None,
        is_causal: bool,
        memory_is_causal: bool,
    ) -> Tensor:
        own: Any = {"attn_mask": mask, "key_padding_mask": padding, "is_causal": is_causal}
        cross: Any = {"attn_mask": memory_mask, "key_padding_mask": memory_padding, "is_causal": memory_is_causal}
        hidden = (self.linear1, self.activation, self.dropout, self.linear2)
        if self.norm_first:
            n = normed(self.norm1, tgt)
            x, n = attend_add_norm(self.self_attn, self.dropout1, self.norm2, n, residual=tgt, **own)
            parts = (self.multihead_attn, self.dropout2, self.norm3)
            x, n = attend_add_norm(*parts, n, memory, residual=x, **cross)
            return feed_forward_sum(self, n, x, *hidden, self.dropout3)
        x = attend_add_norm(self.self_attn, self.dropout1, self.norm1, tgt, **own)
        x = attend_add_norm(self.multihead_attn, self.dropout2, self.norm2, x, memory, **cross)
        return feed_forward_add_norm(x, *hidden, self.dropout3, self.norm3)


@replaces(nn.TransformerDecoder)
@keeps_whole
@converts_children
class TransformerDecoder(nn.TransformerDecoder):
    """`torch.nn.TransformerDecoder` over our layers. Arguments, shapes, state_dict and errors are its own."""

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """As torch.nn.TransformerDecoder's."""
        masks = (tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask)
        hint = _affordable_hint(tgt_mask, tgt_is_causal)
        ours = all(type(layer) is TransformerDecoderLayer for layer in self.layers)
        shares = ours and (dispatch.intervening or tgt.is_cuda) and not tgt.is_nested
        if not shares or torch.compiler.is_compiling():  # in a graph nothing is shared
            return super().forward(tgt, memory, *masks, hint, memory_is_causal)
        shared = shared_memory(readers(self.layers), memory)
        with shared_seed(), shared, norms_ahead(followed(self.layers, None)):
            return super().forward(tgt, memory, *masks, hint, memory_is_causal)


@replaces(nn.Transformer)
@keeps_whole
@converts_children
class Transformer(nn.Transformer):
    """`torch.nn.Transformer` over our encoder and decoder. Arguments, shapes, state_dict and errors are its own."""


def _overrides(layer: nn.Module, *blocks: str) -> bool:
    """Whether a user's subclass, or the user in this layer, brings blocks of its own, which must run."""
    originals = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
    original = next(one for one in originals if isinstance(layer, one))
    return any(name in layer.__dict__ or getattr(type(layer), name) is not getattr(original, name) for name in blocks)


def _affordable_hint(mask: Tensor | None, is_causal: bool | None) -> bool | None:
    """The hint, False instead of None where finding out would break a graph: it makes the host wait for the mask.

    The mask itself is applied either way.
    """
    if is_causal is not None or mask is None:
        return is_causal
    graph = torch.compiler.is_compiling() or (mask.is_cuda and torch.cuda.is_current_stream_capturing())
    return False if graph else None
