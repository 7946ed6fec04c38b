"""Image encoders of transformers that pool as they go deeper, and attend in windows: SAM 2's and Hiera; and SAM 3's, which only has windows.

The residual sum behind attention and the second norm are one op, and features in which windows fit are not copied to pad nothing. Hiera's
attention no longer writes out its scores, and SAM 2's leaves out what transformers computes there for nothing. Known by all of their
code (`base.fingerprint`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from detr_fast.adapters.base import Scriptable
from detr_fast.adapters.blocks import comes_apart, is_dispatched
from detr_fast.adapters.hugging_face import NAME, unknown_of
from detr_fast.adapters.windows import attend, merged, partition
from detr_fast.nn.blocks import sum_and_norm
from detr_fast.ops.dropout import shared_seed


def _pooled(x: Tensor, stride: Any) -> Tensor:
    """The largest of each patch of features (B, height, width, C)."""
    return F.max_pool2d(x.permute(0, 3, 1, 2), stride, stride).permute(0, 2, 3, 1) if stride else x


def in_windows(x: Tensor, side: int, attend_in: Callable[[Tensor], Tensor], size: Sequence[int]) -> Tensor:
    """What an attention makes of features (B, height, width, C) in windows of `side`, or of all of them where that is 0.

    size: height and width of what it makes, which is smaller where it pools.
    """
    if not side:
        return attend_in(x)
    height, width = x.shape[1:3]
    below, right = -height % side, -width % side
    if below or right:
        x = F.pad(x, (0, 0, 0, right, 0, below))
    y = attend_in(partition(x, side, side).unflatten(1, (side, side)))
    side = y.shape[1]
    height, width = (length + -length % side for length in size)
    return merged(y.flatten(1, 2), side, side, height, width)[:, : size[0], : size[1]].contiguous()


class Sam2Block(Scriptable):
    """SAM 2's block."""

    def forward(self: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        if not comes_apart(hidden_states, self.layer_norm2):
            return super().forward(hidden_states, **kwargs)  # type: ignore[misc]
        y, shortcut = self.layer_norm1(hidden_states), hidden_states
        if self.dim != self.dim_out:
            shortcut = _pooled(self.proj(y), self.query_stride)
        with shared_seed():
            size = shortcut.shape[1:3]
            y = in_windows(y, self.window_size, lambda x: self.attn(hidden_states=x, **kwargs), size)
            x, y = sum_and_norm(y, shortcut, self.layer_norm2)
            return x + self.mlp(y)  # type: ignore[no-any-return]


class Sam2Attention(Scriptable):
    """SAM 2's attention; transformers' code also lets the heads of each token attend to each other, and drops what comes of it.

    What its model is set to run on otherwise, and arguments that are not known here, are for the registry.
    """

    def forward(self: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        ours = self.config._attn_implementation == NAME and not unknown_of(kwargs)
        if not (ours and is_dispatched(hidden_states)):
            return super().forward(hidden_states, **kwargs)  # type: ignore[misc]
        size = hidden_states.shape[1:3]
        qkv = self.qkv(hidden_states).flatten(1, 2).unflatten(-1, (3, self.num_attention_heads, -1))
        packs = [qkv]
        if self.query_stride:
            q, kv = qkv.split((1, 2), dim=2)
            q = _pooled(q.flatten(2).unflatten(1, size), self.query_stride)
            size = q.shape[1:3]
            packs = [q.flatten(1, 2).unflatten(-1, (1, self.num_attention_heads, -1)), kv]
        return self.proj(attend(packs, None, 0.0, self.scale).unflatten(1, size))  # type: ignore[no-any-return]


class Sam3ViTLayer(Scriptable):
    """The layer of SAM 3's image encoder, whose attention turns queries and keys by their positions."""

    def forward(self: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        if not comes_apart(hidden_states, self.layer_norm2):
            return super().forward(hidden_states, **kwargs)  # type: ignore[misc]

        def attend_in(x: Tensor) -> Tensor:
            return self.attention(x, self.rotary_emb(x, self.position_ids), **kwargs)[0]  # type: ignore[no-any-return]

        with shared_seed():
            size = hidden_states.shape[1:3]
            y = in_windows(self.layer_norm1(hidden_states), self.window_size, attend_in, size)
            x, y = sum_and_norm(y, hidden_states, self.layer_norm2)
            return x + self.dropout(self.mlp(y))  # type: ignore[no-any-return]


class HieraLayer(Scriptable):
    """Hiera's layer, whose tokens lie in the order in which they are pooled."""

    def forward(self: Any, hidden_states: Tensor, output_attentions: bool = False) -> tuple[Tensor, Tensor | None]:
        if not comes_apart(hidden_states, self.layernorm_after):
            return super().forward(hidden_states, output_attentions)  # type: ignore[misc]
        y, shortcut = self.layernorm_before(hidden_states), hidden_states
        if self.hidden_size != self.hidden_size_output:
            shortcut = self.proj(y).unflatten(1, (self.query_stride, -1)).max(dim=1).values
        with shared_seed():
            y, weights = self.attn(y, output_attentions=output_attentions)
            x, y = sum_and_norm(self.drop_path(y), shortcut, self.layernorm_after)
            return x + self.drop_path(self.mlp(y)), weights


class HieraAttention(Scriptable):
    """Its attention, within windows or among all tokens; a window's tokens lie apart from each other."""

    def forward(self: Any, hidden_states: Tensor, output_attentions: bool = False) -> tuple[Tensor, Tensor | None]:
        if output_attentions or not is_dispatched(hidden_states):
            return super().forward(hidden_states, output_attentions)  # type: ignore[misc]
        batch, tokens, _ = hidden_states.shape
        count = tokens // (self.query_stride * self.window_size) if self.use_mask_unit_attn else 1
        x = hidden_states.unflatten(1, (-1, count)).transpose(1, 2).flatten(0, 1)  # (B * windows, a window's tokens, C)
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        packs = [qkv]
        if self.query_stride > 1:
            q, kv = qkv.split((1, 2), dim=2)
            packs = [q.unflatten(1, (self.query_stride, -1)).max(dim=1).values, kv]
        y = self.proj(attend(packs, None, 0.0, self.scale))
        return y.unflatten(0, (batch, count)).transpose(1, 2).flatten(1, 2), None
