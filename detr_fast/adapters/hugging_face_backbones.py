"""Layers of backbones in transformers that normalise first: their residual sums with the norms behind them are one op.

Those of RF-DETR, LW-DETR and SAM 3 among detectors; DINOv3's, SegFormer's, BEiT's, PVT's and SAM's. Known by all of their code
(`base.fingerprint`). Attentions, windows, layer scales and stochastic depth are called as before; PVT's attentions no longer write out
their scores.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from detr_fast.adapters.base import Scriptable
from detr_fast.adapters.blocks import comes_apart, is_dispatched, is_plain
from detr_fast.adapters.hugging_face_blocks import block_add_norm
from detr_fast.adapters.hugging_face_weighing import attend
from detr_fast.nn.blocks import norm_of_sum, probability, sum_and_norm
from detr_fast.ops.dropout import shared_seed


class RfDetrDinov2Layer(Scriptable):
    """The layer of RF-DETR's backbone, which attends in windows or, in some layers, in all of the image."""

    def forward(self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        if not comes_apart(hidden_states, self.norm2):
            return super().forward(hidden_states, attention_mask, **kwargs)  # type: ignore[misc]
        with shared_seed():
            x = hidden_states
            if self.global_attention:
                x = self.window_unpartition_before_attention(x)
            y = self.attention(self.norm1(x), attention_mask=attention_mask, **kwargs)[0]
            if self.global_attention:
                y = self.window_partition_after_attention(x.shape, y)
            x, y = sum_and_norm(self.drop_path(self.layer_scale1(y)), hidden_states, self.norm2)
            return self.drop_path(self.layer_scale2(self.mlp(y))) + x  # type: ignore[no-any-return]


class LwDetrViTLayer(Scriptable):
    """The layer of LW-DETR's backbone, likewise."""

    def forward(self: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        if not comes_apart(hidden_states, self.layernorm_after):
            return super().forward(hidden_states, **kwargs)  # type: ignore[misc]
        batch, length, channels = hidden_states.shape
        with shared_seed():
            y = self.layernorm_before(hidden_states)
            if not self.window:
                y = y.reshape(batch // self.num_windows, self.num_windows * length, channels)
            y = (self.attention(y, **kwargs)[0] * self.gamma_1).reshape(hidden_states.shape)
            x, y = sum_and_norm(y, hidden_states, self.layernorm_after)
            return x + self.intermediate(y) * self.gamma_2  # type: ignore[no-any-return]


class DINOv3Layer(Scriptable):
    """DINOv3's layer, which scales what it adds."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        given = {"attention_mask": attention_mask, "position_embeddings": position_embeddings, **kwargs}
        if not comes_apart(hidden_states, self.norm2):
            return super().forward(hidden_states, **given)  # type: ignore[misc]
        with shared_seed():
            y = self.attention(self.norm1(hidden_states), **given)[0]
            x, y = sum_and_norm(self.drop_path(self.layer_scale1(y)), hidden_states, self.norm2)
            return self.drop_path(self.layer_scale2(self.mlp(y))) + x  # type: ignore[no-any-return]


class SegformerLayer(Scriptable):
    """SegFormer's layer."""

    def forward(self: Any, hidden_states: Tensor, height: int, width: int, **kwargs: Any) -> Tensor:
        if not comes_apart(hidden_states, self.layernorm_after):
            return super().forward(hidden_states, height, width, **kwargs)  # type: ignore[misc]
        with shared_seed():
            y = self.attention(self.layernorm_before(hidden_states), height, width, **kwargs)[0]
            y = self.drop_path(self.hidden_dropout(y))
            x, y = sum_and_norm(y, hidden_states, self.layernorm_after)
            return self.drop_path(self.mlp(y, height, width)) + x  # type: ignore[no-any-return]


class PvtV2Layer(Scriptable):
    """The layer of the second PVT, a backbone of Deformable DETR's."""

    def forward(
        self: Any, hidden_states: Tensor, height: int, width: int, output_attentions: bool = False
    ) -> tuple[Tensor, ...]:
        if not comes_apart(hidden_states, self.layer_norm_2):
            return super().forward(hidden_states, height, width, output_attentions)  # type: ignore[misc]
        with shared_seed():
            y = self.layer_norm_1(hidden_states)
            size = {"height": height, "width": width}
            y, *weights = self.attention(hidden_states=y, **size, output_attentions=output_attentions)
            x, y = sum_and_norm(self.drop_path(y), hidden_states, self.layer_norm_2)
            return x + self.drop_path(self.mlp(y, height, width)), *weights


class PvtV2SelfAttention(Scriptable):
    """The attention of the second PVT to features of fewer pixels."""

    def forward(
        self: Any, hidden_states: Tensor, height: int, width: int, output_attentions: bool = False
    ) -> tuple[Tensor, ...]:
        if output_attentions or not is_dispatched(hidden_states) or not is_plain(self.attn_drop):
            return super().forward(hidden_states, height, width, output_attentions)  # type: ignore[misc]
        x = hidden_states
        if self.linear_attention or self.spatial_reduction_ratio > 1:
            features = x.transpose(1, 2).unflatten(2, (height, width))
            if self.linear_attention:
                features = self.pool(features)
            x = self.layer_norm(self.spatial_reduction(features).flatten(2).transpose(1, 2))
            if self.linear_attention:
                x = self.act(x)
        q, k, v = self.query(hidden_states), self.key(x), self.value(x)
        y = attend(q, k, v, self.num_attention_heads, None, probability(self.attn_drop))
        return (self.proj_drop(self.proj(y)),)


class PvtSelfAttention(Scriptable):
    """The first PVT's, likewise."""

    def forward(
        self: Any, hidden_states: Tensor, height: int, width: int, output_attentions: bool = False
    ) -> tuple[Tensor, ...]:
        if output_attentions or not is_dispatched(hidden_states) or not is_plain(self.dropout):
            return super().forward(hidden_states, height, width, output_attentions)  # type: ignore[misc]
        x = hidden_states
        if self.sequences_reduction_ratio > 1:
            features = self.sequence_reduction(x.transpose(1, 2).unflatten(2, (height, width)))
            x = self.layer_norm(features.flatten(2).transpose(1, 2))
        q, k, v = self.query(hidden_states), self.key(x), self.value(x)
        return (attend(q, k, v, self.num_attention_heads, None, probability(self.dropout)),)


class BeitLayer(Scriptable):
    """BEiT's layer, whose attention may have a bias by relative position."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        resolution: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if not comes_apart(hidden_states, self.layernorm_after):
            rest = (attention_mask, interpolate_pos_encoding, resolution)
            return super().forward(hidden_states, *rest, **kwargs)  # type: ignore[misc]
        if self.relative_position_bias is not None:
            size = tuple(length // self.patch_size for length in resolution)  # type: ignore[union-attr]
            bias = self.relative_position_bias(size, interpolate_pos_encoding, dim_size=hidden_states.shape[1])
            attention_mask = bias if attention_mask is None else bias + attention_mask
        with shared_seed():
            y = self.attention(self.layernorm_before(hidden_states), attention_mask=attention_mask, **kwargs)[0]
            y = self.drop_path(self.lambda_1 * self.dropout(y))
            x, y = sum_and_norm(y, hidden_states, self.layernorm_after)
            return self.drop_path(self.lambda_2 * self.dropout(self.mlp(y))) + x  # type: ignore[no-any-return]


class SamVisionLayer(Scriptable):
    """The layer of SAM's image encoder, whose attention writes out its scores, as those have a bias by each query's relative positions."""

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        if not comes_apart(hidden_states, self.layer_norm2):
            return super().forward(hidden_states)  # type: ignore[misc]
        with shared_seed():
            y = self.layer_norm1(hidden_states)
            if self.window_size > 0:
                y, padded = self.window_partition(y, self.window_size)
            y = self.attn(hidden_states=y)[0]
            if self.window_size > 0:
                y = self.window_unpartition(y, self.window_size, padded, tuple(hidden_states.shape[1:3]))
            x, y = sum_and_norm(y, hidden_states, self.layer_norm2)
            return x + self.mlp(y)  # type: ignore[no-any-return]


class Sam3DetrEncoderLayer(Scriptable):
    """The encoder layer of SAM 3's detector: of image features, which attend to the prompt, too."""

    def forward(
        self: Any,
        vision_feats: Tensor,
        prompt_feats: Tensor,
        vision_pos_encoding: Tensor,
        prompt_cross_attn_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        x, prompt, mask = vision_feats, prompt_feats, prompt_cross_attn_mask
        if not comes_apart(x, self.layer_norm2, self.layer_norm3, self.dropout):
            return super().forward(x, prompt, vision_pos_encoding, mask, **kwargs)  # type: ignore[misc]
        p = probability(self.dropout)
        with shared_seed():
            y = self.layer_norm1(x)
            query = y + vision_pos_encoding
            y = self.self_attn(query=query, key=query, value=y, **kwargs)[0]
            x, y = sum_and_norm(y, x, self.layer_norm2, p)
            y = self.cross_attn(query=y, key=prompt, value=prompt, attention_mask=mask, **kwargs)[0]
            x, y = sum_and_norm(y, x, self.layer_norm3, p)
            return self.dropout(self.mlp(y)) + x  # type: ignore[no-any-return]


class Sam3DetrDecoderLayer(Scriptable):
    """The decoder layer of SAM 3's detector, which normalises behind sums."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        query_pos: Tensor,
        text_features: Tensor,
        vision_features: Tensor,
        vision_pos_encoding: Tensor,
        text_cross_attn_mask: Tensor | None = None,
        vision_cross_attn_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        text, image = (text_features, text_cross_attn_mask), (vision_features, vision_cross_attn_mask)
        names = ("self_attn", "text_cross_attn", "vision_cross_attn", "mlp")
        norms = [getattr(self, f"{name}_layer_norm") for name in names]
        dropouts = [getattr(self, f"{name}_dropout") for name in names]
        if not comes_apart(hidden_states, *norms, *dropouts):
            rest = (text[0], image[0], vision_pos_encoding, text[1], image[1])
            return super().forward(hidden_states, query_pos, *rest, **kwargs)  # type: ignore[misc]
        ps = [probability(dropout) for dropout in dropouts]
        position = F.pad(query_pos, (0, 0, 1, 0))  # the first query asks whether there is anything at all
        with shared_seed():
            x, query = hidden_states, hidden_states + position
            y = self.self_attn(query=query, key=query, value=x, attention_mask=None, **kwargs)[0]
            x = norm_of_sum(y, x, norms[0], ps[0])
            y = self.text_cross_attn(query=x + position, key=text[0], value=text[0], attention_mask=text[1], **kwargs)[
                0
            ]
            x = norm_of_sum(y, x, norms[1], ps[1])
            key = image[0] + vision_pos_encoding
            y = self.vision_cross_attn(query=x + position, key=key, value=image[0], attention_mask=image[1], **kwargs)[
                0
            ]
            x = norm_of_sum(y, x, norms[2], ps[2])
            if ps[3]:
                return norm_of_sum(self.mlp(x), x, norms[3], ps[3])
            return block_add_norm(self.mlp, x, norms[3])
