"""Where in the image a feature lies, as a vector to add to the feature: sines (fixed) or learned rows and columns."""

from __future__ import annotations

import torch
from torch import Tensor

from detr_fast import nn


class PositionEmbeddingSine(nn.SinePositionEmbedding2D):
    """`nn.SinePositionEmbedding2D` of a backbone's feature map, returned for the attention layers to add.

    Args:
        features: per axis; the embedding has twice as many channels, rows first.
        temperature: ratio between the longest and the shortest wavelength.
    """

    def __init__(self, features: int, temperature: float = 10_000.0) -> None:
        super().__init__(2 * features, temperature, add=False)

    def forward(self, feature_map: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, C, H, W) feature map, (B, H, W) bool mask with True = padding -> (B, H, W, 2 * features).

        Without a mask the result is the same for all images and has B = 1.
        """
        return super().forward(feature_map.permute(0, 2, 3, 1), mask)


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
