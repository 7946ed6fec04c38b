"""DETR's encoder-decoder: positions are added to queries and keys in every attention, never to values.

Tensors are batch-first inside, (B, L, C). Parameter names are the original repository's.
Source: Carion et al., 2020, arXiv:2005.12872, section A.3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from detr_fast import nn
from detr_fast.models.casting import cast_weights
from detr_fast.models.packing import Packing
from detr_fast.nn.fusion import (
    attend_add_norm,
    feed_forward_add_norm,
    feed_forward_sum,
    followed,
    normed,
    norms_ahead,
    project_add_norm,
)
from detr_fast.nn.memory import readers, shared_memory
from detr_fast.nn.whole_layer import whole
from detr_fast.ops.dropout import shared_seed
from detr_fast.ops.layers import DECODER_LAYER, ENCODER_LAYER


class TransformerEncoderLayer(nn.Module):
    """Self-attention over the image's features, then a feed-forward block.

    Args:
        d_model, heads, feedforward, dropout: as torch.nn.TransformerEncoderLayer's.
        pre_norm: normalise before each block rather than after its residual.
    """

    def __init__(self, d_model: int, heads: int, feedforward: int, dropout: float, pre_norm: bool) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(d_model, heads, dropout=dropout, batch_first=True)
        self.linear1 = nn.Linear(d_model, feedforward)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(feedforward, d_model)
        self.norm1 = nn.LayerNorm(d_model)
        self.norm2 = nn.LayerNorm(d_model)
        self.dropout1 = nn.Dropout(dropout)
        self.dropout2 = nn.Dropout(dropout)
        self.pre_norm = pre_norm

    def forward(
        self,
        source: Tensor,
        position: Tensor,
        key_padding_mask: Tensor | None = None,
        packing: Packing | None = None,
    ) -> Tensor:
        """source (B, L, C), position (B or 1, L, C), key_padding_mask (B, L) with True = padding -> (B, L, C).

        With a packing, all of them are packed, (1, T, C), and there is no mask.
        """
        if packing is not None:
            return self._fused(source, position, None, packing)
        with shared_seed():
            return whole(ENCODER_LAYER, self, self._fused, (source, position, key_padding_mask))

    def _fused(
        self, source: Tensor, position: Tensor, key_padding_mask: Tensor | None, packing: Packing | None = None
    ) -> Tensor:
        x, residual = (normed(self.norm1, source), source) if self.pre_norm else (source, None)
        behind = (self.self_attn, self.dropout1, self.norm2 if self.pre_norm else self.norm1)
        if packing is not None:
            query = x + position
            heads = packing.heads(self.self_attn, query, query, x)
            found = project_add_norm(*behind, heads, source, self.pre_norm)
        else:
            masks: Any = {"key_padding_mask": key_padding_mask}
            found = attend_add_norm(*behind, x, residual=residual, position=position, **masks)
        hidden = (self.linear1, nn.functional.relu, self.dropout, self.linear2)
        if self.pre_norm:
            source, x = found
            return feed_forward_sum(self, x, source, *hidden, self.dropout2)
        return feed_forward_add_norm(found, *hidden, self.dropout2, self.norm2)


class TransformerDecoderLayer(nn.Module):
    """Self-attention among the object queries, attention to the image's features, then a feed-forward block."""

    def __init__(self, d_model: int, heads: int, feedforward: int, dropout: float, pre_norm: bool) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(d_model, heads, dropout=dropout, batch_first=True)
        self.multihead_attn = nn.MultiheadAttention(d_model, heads, dropout=dropout, batch_first=True)
        self.linear1 = nn.Linear(d_model, feedforward)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(feedforward, d_model)
        self.norm1 = nn.LayerNorm(d_model)
        self.norm2 = nn.LayerNorm(d_model)
        self.norm3 = nn.LayerNorm(d_model)
        self.dropout1 = nn.Dropout(dropout)
        self.dropout2 = nn.Dropout(dropout)
        self.dropout3 = nn.Dropout(dropout)
        self.pre_norm = pre_norm

    def forward(
        self,
        target: Tensor,
        memory: Tensor,
        memory_key: Tensor,
        query_position: Tensor,
        key_padding_mask: Tensor | None = None,
        packing: Packing | None = None,
    ) -> Tensor:
        """One round of refining the queries.

        Args:
            target: (B, Q, C), the queries' content.
            memory: (B, L, C), the encoder's output; the values.
            memory_key: (B, L, C), memory + position; the keys, equal for all layers and so added up only once.
            query_position: (1 or B, Q, C), learned.
            key_padding_mask: (B, L), True = padding.
            packing: how memory and memory_key are packed, (1, T, C), instead of masked.

        Returns:
            (B, Q, C)
        """
        tensors = (target, memory, memory_key, query_position, key_padding_mask)
        if packing is not None:
            return self._fused(*tensors, packing)
        with shared_seed():
            source = (self.multihead_attn, memory, memory_key)
            return whole(DECODER_LAYER, self, self._fused, tensors, memory=source)

    def _fused(
        self,
        target: Tensor,
        memory: Tensor,
        memory_key: Tensor,
        query_position: Tensor,
        key_padding_mask: Tensor | None,
        packing: Packing | None = None,
    ) -> Tensor:
        cross: Any = {"key_padding_mask": key_padding_mask, "packing": packing}
        hidden = (self.linear1, nn.functional.relu, self.dropout, self.linear2)
        if self.pre_norm:
            x = normed(self.norm1, target)
            parts = (self.self_attn, self.dropout1, self.norm2)
            target, x = attend_add_norm(*parts, x, residual=target, position=query_position)
            target, x = self._attend_to_memory(self.norm3, x, target, memory, memory_key, query_position, **cross)
            return feed_forward_sum(self, x, target, *hidden, self.dropout3)
        target = attend_add_norm(self.self_attn, self.dropout1, self.norm1, target, position=query_position)
        target = self._attend_to_memory(self.norm2, target, None, memory, memory_key, query_position, **cross)
        return feed_forward_add_norm(target, *hidden, self.dropout3, self.norm3)

    def _attend_to_memory(
        self,
        norm: Any,
        x: Tensor,
        residual: Tensor | None,
        memory: Tensor,
        memory_key: Tensor,
        position: Tensor,
        *,
        key_padding_mask: Tensor | None,
        packing: Packing | None,
    ) -> Any:
        """Attention to the memory, its residual and `norm`: as `attend_add_norm`."""
        parts = (self.multihead_attn, self.dropout2, norm)
        if packing is None:
            sources: Any = {"memory_key": memory_key, "position": position, "key_padding_mask": key_padding_mask}
            return attend_add_norm(*parts, x, memory, residual=residual, **sources)
        heads = packing.heads(self.multihead_attn, x + position, memory_key, memory)
        return project_add_norm(*parts, heads, x if residual is None else residual, residual is not None)


class TransformerEncoder(nn.Module):
    """A stack of encoder layers; with pre_norm, a norm after the last."""

    def __init__(self, layers: list[TransformerEncoderLayer], norm: nn.LayerNorm | None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = norm

    def forward(
        self,
        source: Tensor,
        position: Tensor,
        key_padding_mask: Tensor | None = None,
        packing: Packing | None = None,
    ) -> Tensor:
        """As each layer's."""
        with norms_ahead(followed(self.layers, self.norm)):
            for layer in self.layers:
                source = layer(source, position, key_padding_mask, packing)
            return source if self.norm is None else normed(self.norm, source)


class TransformerDecoder(nn.Module):
    """A stack of decoder layers and one norm, which every layer's output passes on its way to the heads."""

    def __init__(self, layers: list[TransformerDecoderLayer], norm: nn.LayerNorm) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = norm

    def forward(
        self,
        memory: Tensor,
        position: Tensor,
        query_position: Tensor,
        key_padding_mask: Tensor | None = None,
        all_layers: bool = True,
        packing: Packing | None = None,
    ) -> Tensor:
        """memory and position (B, L, C) or packed, query_position (Q, C) -> (layers or 1, B, Q, C)."""
        memory_key = memory + position
        query_position = query_position[None]
        batch = memory.shape[0] if packing is None else len(packing.cu_seqlens) - 1
        target = torch.zeros_like(query_position).expand(batch, -1, -1)
        outputs = []
        shared = shared_memory(readers(self.layers), memory, position, memory_key)
        with shared, norms_ahead(followed(self.layers, None)):
            for layer in self.layers:
                target = layer(target, memory, memory_key, query_position, key_padding_mask, packing)
                outputs.append(target)
        return self.norm(torch.stack(outputs if all_layers else outputs[-1:]))


class Transformer(nn.Module):
    """DETR's transformer.

    Args:
        d_model: C, the width of all features.
        heads: number of attention heads.
        encoder_layers, decoder_layers: how many of each.
        feedforward: hidden width of the feed-forward blocks.
        dropout: probability, in every block.
        pre_norm: normalise before each block rather than after its residual.
    """

    def __init__(
        self,
        d_model: int = 256,
        heads: int = 8,
        encoder_layers: int = 6,
        decoder_layers: int = 6,
        feedforward: int = 2048,
        dropout: float = 0.1,
        pre_norm: bool = False,
    ) -> None:
        super().__init__()
        settings = (d_model, heads, feedforward, dropout, pre_norm)
        self.d_model = d_model
        self.heads = heads
        self.encoder = TransformerEncoder(
            [TransformerEncoderLayer(*settings) for _ in range(encoder_layers)],
            nn.LayerNorm(d_model) if pre_norm else None,
        )
        self.decoder = TransformerDecoder(
            [TransformerDecoderLayer(*settings) for _ in range(decoder_layers)], nn.LayerNorm(d_model)
        )
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(
        self,
        source: Tensor,
        position: Tensor,
        query_position: Tensor,
        key_padding_mask: Tensor | None = None,
        all_layers: bool = True,
        packing: Packing | None = None,
    ) -> Tensor:
        """From image features to object queries.

        Args:
            source: (B, L, C) features.
            position: (B or 1, L, C), where they lie.
            query_position: (Q, C), learned.
            key_padding_mask: (B, L) bool, True = padding; None if nothing is padded, which is faster.
            all_layers: return every decoder layer's output rather than only the last one's.
            packing: work on the real tokens only; the mask then plays no part.

        Returns:
            (layers or 1, B, Q, C)
        """
        if packing is not None:
            source, position, key_padding_mask = packing.pack(source), packing.pack(position), None
        with shared_seed(), cast_weights((self.encoder.layers, self.decoder.layers), source.device):
            memory = self.encoder(source, position, key_padding_mask, packing)
            return self.decoder(memory, position, query_position, key_padding_mask, all_layers, packing)
