"""Layers of more families in Hugging Face transformers: their residual sums with the norms behind them are one op.

Known by all of their code (`base.fingerprint`). Attentions, caches, layer scales and stochastic depth are called as before.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor
from torch.nn import Module

from detr_fast.adapters.base import Scriptable, fingerprint
from detr_fast.adapters.blocks import activation_name, comes_apart, feed_forward_add_norm, is_plain
from detr_fast.adapters.hugging_face_blocks import block_add_norm
from detr_fast.nn.bare import is_bare
from detr_fast.nn.blocks import FeedForwardParts, norm_of_sum, probability, sum_and_norm
from detr_fast.ops.dropout import shared_seed


class Wav2Vec2Layer(Scriptable):
    """The layer of Wav2Vec2 and HuBERT, which normalises behind sums."""

    def forward(self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        if not comes_apart(hidden_states, self.layer_norm, self.final_layer_norm, self.dropout):
            return super().forward(hidden_states, attention_mask, **kwargs)  # type: ignore[misc]
        with shared_seed():
            y = self.attention(hidden_states, attention_mask=attention_mask, **kwargs)[0]
            x = norm_of_sum(y, hidden_states, self.layer_norm, probability(self.dropout))
            return block_add_norm(self.feed_forward, x, self.final_layer_norm)


class Wav2Vec2StableLayer(Scriptable):
    """The same where it normalises first; with an adapter behind it, transformers' own runs."""

    def forward(self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        if self.adapter_layer is not None or not comes_apart(hidden_states, self.final_layer_norm, self.dropout):
            return super().forward(hidden_states, attention_mask, **kwargs)  # type: ignore[misc]
        with shared_seed():
            y = self.attention(self.layer_norm(hidden_states), attention_mask=attention_mask, **kwargs)[0]
            x, y = sum_and_norm(y, hidden_states, self.final_layer_norm, probability(self.dropout))
            return x + self.feed_forward(y)  # type: ignore[no-any-return]


class BlipLayer(Scriptable):
    """The layer of BLIP's vision model, which normalises first and drops nothing."""

    def forward(self: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        if not comes_apart(hidden_states, self.layer_norm2):
            return super().forward(hidden_states, **kwargs)  # type: ignore[misc]
        with shared_seed():
            y = self.self_attn(hidden_states=self.layer_norm1(hidden_states), **kwargs)[0]
            x, y = sum_and_norm(y, hidden_states, self.layer_norm2)
            return self.mlp(y) + x  # type: ignore[no-any-return]


class Dinov2Layer(Scriptable):
    """DINOv2's layer, which normalises first and scales what it adds."""

    def forward(self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        if not comes_apart(hidden_states, self.norm2):
            return super().forward(hidden_states, attention_mask, **kwargs)  # type: ignore[misc]
        with shared_seed():
            y = self.attention(self.norm1(hidden_states), attention_mask=attention_mask, **kwargs)[0]
            x, y = sum_and_norm(self.drop_path(self.layer_scale1(y)), hidden_states, self.norm2)
            return self.drop_path(self.layer_scale2(self.mlp(y))) + x  # type: ignore[no-any-return]


class GPT2Block(Scriptable):
    """GPT-2's layer; with an encoder's output, transformers' own runs."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        use_cache: bool | None = False,
        **kwargs: Any,
    ) -> Tensor:
        if encoder_hidden_states is not None or not comes_apart(hidden_states, self.ln_2):
            rest = (encoder_hidden_states, encoder_attention_mask, use_cache)
            return super().forward(hidden_states, past_key_values, attention_mask, *rest, **kwargs)  # type: ignore[misc]
        with shared_seed():
            y = self.attn(
                self.ln_1(hidden_states),
                past_key_values=past_key_values,
                attention_mask=attention_mask,
                use_cache=use_cache,
                **kwargs,
            )[0]
            x, y = sum_and_norm(y, hidden_states, self.ln_2)
            return x + self.mlp(y)  # type: ignore[no-any-return]


class DistilBertLayer(Scriptable):
    """DistilBERT's layer, whose feed-forward block is a module that may compute in chunks."""

    detr_fast_block: type | None  # the block's class, where its code is the one that we know

    @classmethod
    def attributes_for(cls, original: type[Module]) -> dict[str, Any]:
        kind = vars(sys.modules[original.__module__]).get("FFN")
        code = [fingerprint(getattr(kind, name, None)) for name in ("forward", "ff_chunk")]
        return {"detr_fast_block": kind if code == ["0292cb7d3043858f", "5185a1886bd5a82f"] else None}

    def forward(self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        if not comes_apart(hidden_states, self.sa_layer_norm, self.output_layer_norm):
            return super().forward(hidden_states, attention_mask, **kwargs)  # type: ignore[misc]
        with shared_seed():
            y = self.attention(hidden_states, attention_mask=attention_mask, **kwargs)[0]
            x = norm_of_sum(y, hidden_states, self.sa_layer_norm)
            parts = self._parts(self.ffn)
            if parts is None:
                return norm_of_sum(self.ffn(x), x, self.output_layer_norm)
            return feed_forward_add_norm(x, parts, self.output_layer_norm)

    def _parts(self: Any, block: Any) -> FeedForwardParts | None:
        """Of a block that hands its input whole to its other method; None where it has to be called."""
        if type(block) is not self.detr_fast_block or not is_bare(block) or block.chunk_size_feed_forward:
            return None
        activation = activation_name(block.activation)
        if activation is None or not all(map(is_plain, (block.lin1, block.lin2, block.dropout))):
            return None
        return FeedForwardParts(block.lin1, activation, 0.0, block.lin2, probability(block.dropout))


class SamTwoWayBlock(Scriptable):
    """The block of SAM's mask decoder, in which points and the image attend to each other."""

    def forward(
        self: Any,
        queries: Tensor,
        keys: Tensor,
        query_point_embedding: Tensor,
        key_point_embedding: Tensor,
        attention_similarity: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        norms = (self.layer_norm1, self.layer_norm2, self.layer_norm3, self.layer_norm4)
        if not comes_apart(queries, *norms):
            embeddings = (query_point_embedding, key_point_embedding)
            return super().forward(queries, keys, *embeddings, attention_similarity, **kwargs)  # type: ignore[misc]
        with shared_seed():
            if self.skip_first_layer_pe:
                queries = norms[0](self.self_attn(query=queries, key=queries, value=queries)[0])
            else:
                query = queries + query_point_embedding
                y = self.self_attn(query=query, key=query, value=queries)[0]
                queries = norm_of_sum(y, queries, norms[0])
            key = keys + key_point_embedding
            y = self.cross_attn_token_to_image(
                query=queries + query_point_embedding, key=key, value=keys, attention_similarity=attention_similarity
            )[0]
            queries = norm_of_sum(y, queries, norms[1])
            queries = block_add_norm(self.mlp, queries, norms[2])
            y = self.cross_attn_image_to_token(query=key, key=queries + query_point_embedding, value=queries)[0]
            return queries, norm_of_sum(y, keys, norms[3]), y
