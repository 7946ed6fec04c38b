"""Attentions of transformers with a bias by relative position that write out their scores: Swin's copies, the second Swin's, MPNet's.

SDPA's, as Data2Vec's for images, is one of them, too, and so is Swin's layer. The scores stay inside `ops.attention` where nobody
asks for weights. Known by all of their code (`base.fingerprint`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from detr_fast.adapters.base import Scriptable
from detr_fast.adapters.blocks import comes_apart, is_dispatched, is_plain
from detr_fast.adapters.windows import attend, bias_of, cosines, merged, packed, partition, with_shift
from detr_fast.nn.blocks import norm_of_sum, probability, sum_and_norm
from detr_fast.ops.dropout import shared_seed


def _projected(attention: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    shape = attention.num_attention_heads, -1
    q, k, v = (part(x).unflatten(-1, shape) for part in (attention.query, attention.key, attention.value))
    return q, k, v


def _takes(attention: Any, x: Any, weights: Any) -> bool:
    return not weights and is_dispatched(x) and is_plain(attention.dropout)


class SwinSelfAttention(Scriptable):
    """What Donut, MaskFormer and CLAP copied from an older Swin."""

    def forward(
        self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, output_attentions: bool | None = False
    ) -> tuple[Tensor, ...]:
        if not _takes(self, hidden_states, output_attentions):
            return super().forward(hidden_states, attention_mask, output_attentions)  # type: ignore[misc]
        bias = bias_of(self.relative_position_bias_table, self.relative_position_index)
        mask = with_shift(bias, attention_mask)
        return (attend(packed(*_projected(self, hidden_states)), mask, probability(self.dropout)),)


class Swinv2SelfAttention(Scriptable):
    """The second version's, by cosines, which Swin2SR has, too."""

    def forward(
        self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, output_attentions: bool | None = False
    ) -> tuple[Tensor, ...]:
        if not _takes(self, hidden_states, output_attentions):
            return super().forward(hidden_states, attention_mask, output_attentions)  # type: ignore[misc]
        q, k, v = _projected(self, hidden_states)
        table = self.continuous_position_bias_mlp(self.relative_coords_table).view(-1, self.num_attention_heads)
        bias = 16 * torch.sigmoid(bias_of(table, self.relative_position_index))
        if attention_mask is not None:
            attention_mask = 2 * attention_mask  # transformers adds it twice
        mask = with_shift(bias, attention_mask)
        return (attend(cosines(q, k, v, self.logit_scale), mask, probability(self.dropout), 1.0),)


class SwinLayer(Scriptable):
    """Swin's layer: the sum behind attention and the second norm are one op."""

    def forward(
        self: Any, hidden_states: Tensor, input_dimensions: Any, always_partition: bool = False, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        if not comes_apart(hidden_states, self.layernorm_after, self.dropout):
            return super().forward(hidden_states, input_dimensions, always_partition, **kwargs)  # type: ignore[misc]
        if not always_partition:
            self.set_shift_and_window_size(input_dimensions)
        height, width = input_dimensions
        with shared_seed():
            x = self.layernorm_before(hidden_states).view(-1, height, width, hidden_states.shape[-1])
            if height % self.window_size or width % self.window_size:  # else it is a copy for nothing
                x, _ = self.maybe_pad(x, height, width)
            size = x.shape[1:3]
            x = partition(self.cyclic_shift(x), self.window_size, self.window_size)
            mask = self.get_attn_mask(*size, dtype=x.dtype, device=x.device)
            y, weights = self.attention(x, mask, **kwargs)
            y = merged(self.dropout(y), self.window_size, self.window_size, *size)
            y = self.cyclic_shift(y, reverse=True)[:, :height, :width].reshape(hidden_states.shape)
            x, y = sum_and_norm(self.drop_path(y), hidden_states, self.layernorm_after)
            return self.dropout(self.mlp(y)) + x, weights


def _in_windows(layer: Any, x: Tensor, size: Any, attend_in: Callable[..., Any]) -> tuple[Tensor, Any]:
    """What a layer that copies an older Swin makes of x (B, height * width, C), and what its attention gives besides.

    attend_in: that attention, of windows and the height and width of the features that they are in.
    """
    height, width = size
    side, shift = layer.window_size, layer.shift_size
    y = layer.layernorm_before(x).unflatten(1, (height, width))
    if height % side or width % side:
        y, _ = layer.maybe_pad(y, height, width)
    padded_height, padded_width = y.shape[1:3]
    if shift > 0:
        y = torch.roll(y, (-shift, -shift), (1, 2))
    y, *weights = attend_in(partition(y, side, side), padded_height, padded_width)
    y = merged(y, side, side, padded_height, padded_width)
    if shift > 0:
        y = torch.roll(y, (shift, shift), (1, 2))
    y = layer.drop_path(y[:, :height, :width].reshape(x.shape))
    x, y = sum_and_norm(y, x, layer.layernorm_after)
    return x + layer.output(layer.intermediate(y)), weights


class DonutSwinLayer(Scriptable):
    """Donut's and CLAP's."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        input_dimensions: Any,
        output_attentions: bool | None = False,
        always_partition: bool | None = False,
    ) -> tuple[Tensor, ...]:
        if not comes_apart(hidden_states, self.layernorm_after):
            return super().forward(hidden_states, input_dimensions, output_attentions, always_partition)  # type: ignore[misc]
        if not always_partition:
            self.set_shift_and_window_size(input_dimensions)

        def attend_in(y: Tensor, height: int, width: int) -> Any:
            mask = self.get_attn_mask(height, width, dtype=y.dtype, device=y.device)
            return self.attention(y, mask, output_attentions=output_attentions)

        with shared_seed():
            x, weights = _in_windows(self, hidden_states, input_dimensions, attend_in)
        return (x, weights[0]) if output_attentions else (x,)


class MaskFormerSwinLayer(Scriptable):
    """MaskFormer's."""

    def forward(
        self: Any, hidden_states: Tensor, input_dimensions: Any, output_attentions: bool = False
    ) -> tuple[Tensor, ...]:
        if not comes_apart(hidden_states, self.layernorm_after):
            return super().forward(hidden_states, input_dimensions, output_attentions)  # type: ignore[misc]

        def attend_in(y: Tensor, height: int, width: int) -> Any:
            mask = self.get_attn_mask((height, width), device=y.device, dtype=y.dtype)
            return self.attention(y, mask, output_attentions=output_attentions)

        with shared_seed():
            x, weights = _in_windows(self, hidden_states, input_dimensions, attend_in)
        return x, *weights


class MPNetSelfAttention(Scriptable):
    """MPNet's, whose bias all layers share."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, ...]:
        if not _takes(self, hidden_states, output_attentions):
            rest = (attention_mask, position_bias, output_attentions)
            return super().forward(hidden_states, *rest, **kwargs)  # type: ignore[misc]
        q, k, v = (
            part(hidden_states).unflatten(-1, (self.num_attention_heads, -1)) for part in (self.q, self.k, self.v)
        )
        mask = position_bias if attention_mask is None else attention_mask
        if attention_mask is not None and position_bias is not None:
            mask = position_bias + attention_mask
        return (self.o(attend(packed(q, k, v), mask, probability(self.dropout))),)


class MPNetAttention(Scriptable):
    """The same with the norm behind it."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, ...]:
        rest = (attention_mask, position_bias)
        if not comes_apart(hidden_states, self.LayerNorm, self.dropout):
            return super().forward(hidden_states, *rest, output_attentions, **kwargs)  # type: ignore[misc]
        y, *weights = self.attn(hidden_states, *rest, output_attentions=output_attentions)
        return norm_of_sum(y, hidden_states, self.LayerNorm, probability(self.dropout)), *weights


class Data2VecVisionSelfAttention(Scriptable):
    """Data2Vec's for images, which is BEiT's as it was."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        output_attentions: bool = False,
        relative_position_bias: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        resolution: Any = None,
    ) -> tuple[Tensor, None]:
        rest = (relative_position_bias, interpolate_pos_encoding, resolution)
        if output_attentions or not is_dispatched(hidden_states):
            return super().forward(hidden_states, output_attentions, *rest)  # type: ignore[misc]
        bias = relative_position_bias
        if self.has_relative_position_bias:
            size = tuple(length // self.config.patch_size for length in resolution)
            own = self.relative_position_bias(size, interpolate_pos_encoding, dim_size=hidden_states.shape[1])
            bias = own if bias is None else own + bias
        p = self.config.attention_probs_dropout_prob if self.training else 0.0
        return attend(packed(*_projected(self, hidden_states)), bias, p), None
