"""Attention in which each query has a bias for each row and column of its distance to keys: SAM's image encoder, and ViTDet's.

    score(q, k) = scale * q @ k + q @ rows[y_q - y_k] + q @ columns[x_q - x_k]

The originals write the bias out, (batch, heads, L, L), and where they train its gradient, too. But it is a product: of what q has for each
row and column, H + W numbers, and of what says in which row and column k is. Both are put behind q's and k's own channels, and the
scores stay inside `ops.attention`. Known by all of their code (`base.fingerprint`).
Source: Li et al., 2022, arXiv:2203.16527, section 3; the bias: Li et al., 2021, arXiv:2112.01526.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from detr_fast.adapters.base import Scriptable
from detr_fast.adapters.blocks import comes_apart, is_dispatched
from detr_fast.adapters.hugging_face_hiera import in_windows
from detr_fast.kernels.attention_problem import MAX_HEAD_DIM
from detr_fast.nn.blocks import sum_and_norm
from detr_fast.ops.attention import ATTENTION
from detr_fast.ops.dropout import shared_seed

RUN = 8  # channels: head dimensions that are multiples of it are taken by all of PyTorch's kernels, too


def _takes(attention: Any, x: Any, heads: int, biased: bool) -> bool:
    """Whether tables fit the features, which the originals resize where they do not, and channels an op."""
    if not is_dispatched(x) or not biased:
        return is_dispatched(x)
    height, width = x.shape[1:3]
    fit = (attention.rel_pos_h.shape[0], attention.rel_pos_w.shape[0]) == (2 * height - 1, 2 * width - 1)
    return fit and x.shape[-1] // heads + height + width <= MAX_HEAD_DIM - RUN


def _attended(attention: Any, x: Tensor, heads: int, biased: bool) -> Tensor:
    """What the attention makes of features (B, H, W, C)."""
    size = x.shape[1:3]
    q, k, v = attention.qkv(x).unflatten(-1, (3, heads, -1)).unbind(3)  # (B, H, W, heads, E) each
    if biased:
        q, k = _with_places(q, k, attention.scale, attention.rel_pos_h, attention.rel_pos_w)
    y = ATTENTION(*(t.flatten(1, 2) for t in (q, k, v)), None, None, False, 0.0, 1.0 if biased else attention.scale)
    return attention.proj(y.flatten(2).unflatten(1, size))  # type: ignore[no-any-return]


def _with_places(q: Tensor, k: Tensor, scale: float, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """q, times the scale, and k (B, H, W, heads, E) with what makes the bias of their product."""
    height, width = q.shape[1:3]
    gap = -(q.shape[-1] + height + width) % RUN
    by_row = torch.einsum("byxhc,ykc->byxhk", q, _by_distance(rows, height))
    by_column = torch.einsum("byxhc,xkc->byxhk", q, F.pad(_by_distance(columns, width), (0, 0, 0, gap)))
    y, x = (torch.eye(n, dtype=k.dtype, device=k.device) for n in (height, width))
    places = torch.cat(
        [y[:, None].expand(height, width, height), F.pad(x, (0, gap)).expand(height, width, width + gap)], -1
    )
    places = places[:, :, None].expand(*k.shape[:-1], -1)
    return torch.cat([q * scale, by_row.to(q.dtype), by_column.to(q.dtype)], -1), torch.cat([k, places], -1)


def _by_distance(table: Tensor, length: int) -> Tensor:
    """The entries (length, length, E) of a table (2 * length - 1, E) for pairs of places."""
    place = torch.arange(length, device=table.device)
    return table[place[:, None] - place + (length - 1)]


class SamVisionAttention(Scriptable):
    """That of SAM's image encoder, where transformers runs it on SDPA."""

    def forward(self: Any, hidden_states: Tensor, output_attentions: Any = False) -> tuple[Tensor, None]:
        if output_attentions or not _takes(self, hidden_states, self.num_attention_heads, self.use_rel_pos):
            return super().forward(hidden_states, output_attentions)  # type: ignore[misc]
        return _attended(self, hidden_states, self.num_attention_heads, self.use_rel_pos), None


class VitDetAttention(Scriptable):
    """ViTDet's."""

    def forward(self: Any, hidden_state: Tensor, output_attentions: bool = False) -> tuple[Tensor, ...]:
        biased = self.use_relative_position_embeddings
        if output_attentions or not _takes(self, hidden_state, self.num_heads, biased):
            return super().forward(hidden_state, output_attentions)  # type: ignore[misc]
        return (_attended(self, hidden_state, self.num_heads, biased),)


class VitDetLayer(Scriptable):
    """ViTDet's layer, of features (B, C, H, W)."""

    def forward(self: Any, hidden_states: Tensor, output_attentions: bool = False) -> tuple[Tensor, ...]:
        if output_attentions or not comes_apart(hidden_states, self.norm2):
            return super().forward(hidden_states, output_attentions)  # type: ignore[misc]
        x = hidden_states.permute(0, 2, 3, 1)
        with shared_seed():
            y = in_windows(self.norm1(x), self.window_size, lambda x: self.attention(x)[0], x.shape[1:3])
            x, y = sum_and_norm(self.drop_path(y), x, self.norm2)
            x = (x + self.drop_path(self.mlp(y))).permute(0, 3, 1, 2)
        return (self.residual(x) if self.use_residual_block else x,)
