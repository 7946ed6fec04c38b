"""T5's block and its copies: the norms of cross-attention and of the feed-forward block take the sum before them.

A block is made of layers that normalise, attend or feed forward, drop out and add. They are taken apart only where each is of a
class of the block's own file whose code is known (`base.fingerprint`), and nobody looks at it: where weights are asked for,
transformers hooks them. In fp16, which theirs clamps behind each layer, theirs runs.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from detr_fast.adapters.base import Scriptable, fingerprint
from detr_fast.adapters.blocks import is_dispatched, is_plain
from detr_fast.adapters.rms_sums import sum_and_rms_norm, takes_sums
from detr_fast.nn.bare import is_bare
from detr_fast.nn.blocks import probability
from detr_fast.ops.dropout import shared_seed

# By the fingerprint of a layer's forward: what it calls between its norm and its dropout, and by which name it gives it the mask.
_LAYERS = {
    "0cb6f38910840e35": ("SelfAttention", "mask"),
    "8e428e44081fa92a": ("EncDecAttention", "mask"),
    "31ad970ec3a5c8c0": ("SelfAttention", "attention_mask"),  # UMT5's
    "64c9228bad273228": ("EncDecAttention", "attention_mask"),
    "ae317ddb5f945d66": ("LocalSelfAttention", "mask"),  # LongT5's
    "af9e5251a440e5cf": ("TransientGlobalSelfAttention", "mask"),
    "bacbb9e8d3400698": ("DenseReluDense", ""),
    "bfcc20bd51ba75bf": ("mlp", ""),  # Switch Transformers'
}
_WITHOUT_A_CACHE = ("LocalSelfAttention", "TransientGlobalSelfAttention")


class _Block(Scriptable):
    detr_fast_layers: dict[type, tuple[str, str]]  # the classes of layers whose code is known

    @classmethod
    def attributes_for(cls, original: type[Module]) -> dict[str, Any]:
        kinds = [kind for kind in vars(sys.modules[original.__module__]).values() if isinstance(kind, type)]
        found = {kind: _LAYERS.get(fingerprint(getattr(kind, "forward", None)) or "") for kind in kinds}
        return {"detr_fast_layers": {kind: names for kind, names in found.items() if names is not None}}

    def _comes_apart(self: Any, x: Any, layers: list[Any]) -> bool:
        """Whether sums and norms between these layers may be computed together."""
        return (
            is_dispatched(x)
            and x.dtype != torch.float16
            and all(
                type(layer) in self.detr_fast_layers and is_bare(layer) and is_plain(layer.dropout) for layer in layers
            )
            and all(takes_sums(layer.layer_norm) for layer in layers[1:])
        )

    def _fused(self: Any, x: Tensor, layers: list[Any], given: list[dict[str, Any]]) -> tuple[Tensor, list[Any]]:
        """The block's output, and what each attention returned besides its own. given: what each is called with, by name."""
        found = []
        with shared_seed():
            y = layers[0].layer_norm(x)
            for layer, following, named in zip(layers, layers[1:], given, strict=False):
                y, *rest = self._call(layer, y, named)
                found.append(rest)
                x, y = sum_and_rms_norm(y, x, following.layer_norm, probability(layer.dropout))
            x = x + layers[-1].dropout(self._call(layers[-1], y, {}))
        return x, found

    def _call(self: Any, layer: Any, x: Tensor, named: dict[str, Any]) -> Any:
        part, mask = self.detr_fast_layers[type(layer)]
        if part in _WITHOUT_A_CACHE:
            named = {name: one for name, one in named.items() if name not in ("past_key_values", "use_cache")}
        return getattr(layer, part)(
            x, **{mask if name == "attention_mask" else name: one for name, one in named.items()}
        )


class T5Block(_Block):
    """T5's (mT5, UDOP, Pop2Piano, Switch Transformers)."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        encoder_decoder_position_bias: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Any, Any]:
        crosses = self.is_decoder and encoder_hidden_states is not None
        layers = [self.layer[0], *([self.layer[1]] if crosses else []), self.layer[-1]]
        if not self._comes_apart(hidden_states, layers):
            rest = (encoder_hidden_states, encoder_attention_mask, encoder_decoder_position_bias, past_key_values)
            return super().forward(hidden_states, attention_mask, position_bias, *rest, **kwargs)  # type: ignore[misc]
        kwargs["past_key_values"] = past_key_values
        own = {"attention_mask": attention_mask, "position_bias": position_bias, **kwargs}
        cross = {
            "key_value_states": encoder_hidden_states,
            "attention_mask": encoder_attention_mask,
            "position_bias": encoder_decoder_position_bias,
            **kwargs,
        }
        x, found = self._fused(hidden_states, layers, [own, cross])
        return x, found[0][0], found[1][0] if crosses else None


class LongT5Block(_Block):
    """LongT5's, whose encoder attends within windows."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        encoder_decoder_position_bias: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        crosses = self.is_decoder and encoder_hidden_states is not None
        layers = [self.layer[0], *([self.layer[1]] if crosses else []), self.layer[-1]]
        if not self._comes_apart(hidden_states, layers):
            rest = (encoder_hidden_states, encoder_attention_mask, encoder_decoder_position_bias, past_key_values)
            settings = (use_cache, output_attentions, return_dict)
            return super().forward(hidden_states, attention_mask, position_bias, *rest, *settings, **kwargs)  # type: ignore[misc]
        shared = {"past_key_values": past_key_values, "output_attentions": output_attentions}
        own = {"attention_mask": attention_mask, "position_bias": position_bias, "use_cache": use_cache, **shared}
        cross = {
            "key_value_states": encoder_hidden_states,
            "attention_mask": encoder_attention_mask,
            "position_bias": encoder_decoder_position_bias,
            **shared,
        }
        x, found = self._fused(hidden_states, layers, [own, cross])
        return x, *(one for rest in found for one in rest)


class UMT5Block(_Block):
    """UMT5's, whose attentions have a bias each."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        crosses = self.is_decoder and encoder_hidden_states is not None
        layers = [self.layer[0], *([self.layer[1]] if crosses else []), self.layer[-1]]
        if not self._comes_apart(hidden_states, layers):
            rest = (encoder_hidden_states, encoder_attention_mask, past_key_values)
            return super().forward(hidden_states, attention_mask, *rest, **kwargs)  # type: ignore[misc,no-any-return]
        kwargs["past_key_values"] = past_key_values
        own = {"attention_mask": attention_mask, **kwargs}
        cross = {
            "encoder_hidden_states": encoder_hidden_states,
            "attention_mask": encoder_attention_mask,
            **kwargs,
        }
        return self._fused(hidden_states, layers, [own, cross])[0]  # type: ignore[no-any-return]
