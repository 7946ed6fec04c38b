"""Where in the image a feature lies, as a vector to add to the feature: sines (fixed) or learned rows and columns."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from detr_fast import nn


class PositionEmbeddingSine(nn.Module):
    """Sines and cosines of the row and the column, both normalised to the image's visible part.

    Source: Carion et al., 2020, arXiv:2005.12872, section A.4.

    Args:
        features: per axis; the embedding has twice as many channels, rows first.
        temperature: ratio between the longest and the shortest wavelength.
    """

    def __init__(self, features: int, temperature: float = 10_000.0) -> None:
        super().__init__()
        if features % 2:
            raise ValueError(f"got {features} features per axis; expected an even number (a sine and a cosine each)")
        self.features = features
        self.temperature = temperature

    def forward(self, feature_map: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, C, H, W) feature map, (B, H, W) bool mask with True = padding -> (B, H, W, 2 * features).

        Without a mask the result is the same for all images and has B = 1.
        """
        height, width = feature_map.shape[-2:]
        device = feature_map.device
        if mask is None:
            rows = torch.arange(1, height + 1, dtype=torch.float32, device=device).view(1, -1, 1)
            columns = torch.arange(1, width + 1, dtype=torch.float32, device=device).view(1, 1, -1)
        else:
            visible = ~mask
            rows = visible.cumsum(1, dtype=torch.float32)
            columns = visible.cumsum(2, dtype=torch.float32)
        rows = rows / (rows[:, -1:, :] + 1e-6) * (2 * math.pi)
        columns = columns / (columns[:, :, -1:] + 1e-6) * (2 * math.pi)
        pair = torch.arange(self.features // 2, dtype=torch.float32, device=device)
        period = self.temperature ** (2 * pair / self.features)
        shape = (*torch.broadcast_shapes(rows.shape, columns.shape), self.features)
        embedding = torch.cat([_waves(axis, period).expand(shape) for axis in (rows, columns)], dim=-1)
        return embedding.to(feature_map.dtype)


def _waves(position: Tensor, period: Tensor) -> Tensor:
    angle = position[..., None] / period
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(-2)


class PositionEmbeddingLearned(nn.Module):
    """A learned vector for each row and each column of the feature map, up to 50 of each.

    Args:
        features: per axis; the embedding has twice as many channels, columns first.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.row_embed = nn.Embedding(50, features)
        self.col_embed = nn.Embedding(50, features)
        nn.init.uniform_(self.row_embed.weight)
        nn.init.uniform_(self.col_embed.weight)

    def forward(self, feature_map: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, C, H, W) feature map -> (1, H, W, 2 * features); the mask plays no part."""
        height, width = feature_map.shape[-2:]
        limit = self.row_embed.num_embeddings
        if height > limit or width > limit:
            raise ValueError(
                f"the feature map is {height}×{width} but learned positions end at {limit}×{limit}; "
                "use smaller images or position='sine'"
            )
        rows = self.row_embed.weight[:height, None].expand(-1, width, -1)
        columns = self.col_embed.weight[None, :width].expand(height, -1, -1)
        return torch.cat((columns, rows), dim=-1)[None].to(feature_map.dtype)


def build_position_embedding(
    kind: str, d_model: int, temperature: float = 10_000.0
) -> PositionEmbeddingSine | PositionEmbeddingLearned:
    """`kind` is "sine" (of that `temperature`) or "learned"; the embedding has `d_model` channels."""
    if kind == "sine":
        return PositionEmbeddingSine(d_model // 2, temperature)
    if kind == "learned":
        return PositionEmbeddingLearned(d_model // 2)
    raise ValueError(f"got position={kind!r}; expected 'sine' or 'learned'")
