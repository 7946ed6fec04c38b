"""What turns inputs into tokens: ids, the positions of a feature map, patches of an image. Tokens are (N, L, C)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Pair = int | tuple[int, int]


class TokenEmbedding(nn.Embedding):
    """`torch.nn.Embedding` that knows the transformer's conventions.

    Args:
        num_embeddings: size of the vocabulary.
        embedding_dim: C.
        padding_idx: the id that fills up short sequences: its vector is zero and gets no gradient.
        scaled: multiply by sqrt(C), and draw the weights from N(0, 1 / C) so that tokens start with unit variance and the
            same weights can serve as a head. Source: Vaswani et al., 2017, arXiv:1706.03762, section 3.4.
        kwargs: torch.nn.Embedding's others (`device`, `dtype`, `sparse`, …).
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        scaled: bool = False,
        **kwargs: Any,
    ) -> None:
        self.scaled = scaled  # before the original's constructor, which draws the weights
        super().__init__(num_embeddings, embedding_dim, padding_idx, **kwargs)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.embedding_dim**-0.5 if self.scaled else 1.0)
        self._fill_padding_idx_with_zero()

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (…) int32 or int64 -> (…, C).

        Raises:
            TypeError: tokens of another dtype.
            IndexError: on the CPU, a token that is no row of the weights.
        """
        if tokens.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"TokenEmbedding takes ids of dtype int32 or int64; got {tokens.dtype}: use tokens.long()")
        try:
            embedded = super().forward(tokens)
        except IndexError:
            low, high = (int(limit) for limit in tokens.aminmax())
            raise IndexError(
                f"tokens must lie in [0, {self.num_embeddings}), the vocabulary; got ids from {low} to {high}"
            ) from None
        return embedded * self.embedding_dim**0.5 if self.scaled else embedded

    def padding_mask(self, tokens: Tensor) -> Tensor | None:
        """tokens (N, L) -> (N, L) bool, True = padding, as every `key_padding_mask`; None without a padding index."""
        return None if self.padding_idx is None else tokens == self.padding_idx

    def extra_repr(self) -> str:
        return super().extra_repr() + (", scaled=True" if self.scaled else "")


class PixelEmbedding(nn.Module):
    """Every position of a feature map is a token: a linear map of its channels, as DETR's input projection.

    Args:
        in_channels: of the feature map.
        embed_dim: C.
        flatten: give (N, H·W, C), row by row; False keeps the grid, (N, H, W, C), as two-dimensional positions want it.
    """

    def __init__(
        self,
        in_channels: int,
        embed_dim: int,
        *,
        flatten: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.flatten = flatten
        self.projection = nn.Linear(in_channels, embed_dim, device=device, dtype=dtype)

    def forward(self, feature_map: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, H·W, C), or (N, H, W, C).

        Raises:
            ValueError: another number of dimensions or channels.
        """
        _check_images(self, feature_map)
        tokens = self.projection(feature_map.permute(0, 2, 3, 1))
        return tokens.flatten(1, 2) if self.flatten else tokens

    def token_mask(self, mask: Tensor) -> Tensor:
        """(N, H, W) bool, True = padding -> the tokens' mask, in the order of `forward`; ValueError for another mask."""
        _check_mask(mask)
        return mask.flatten(1) if self.flatten else mask


class PatchEmbedding(nn.Module):
    """Every patch of an image is a token: a linear map of its pixels, as a convolution computes it.

    Pixels at the right and bottom edge that fill no patch are left out, as torch.nn.Conv2d does.
    Source: Dosovitskiy et al., 2021, arXiv:2010.11929.

    Args:
        in_channels: of the image.
        embed_dim: C.
        patch_size: of one patch, a number or (height, width).
        stride: from patch to patch; None: patches neither overlap nor leave gaps.
        padding: zeros added at every edge.
        flatten: give (N, H'·W', C), row by row; False keeps the grid, (N, H', W', C), as two-dimensional positions want it.
    """

    def __init__(
        self,
        in_channels: int,
        embed_dim: int,
        patch_size: Pair,
        stride: Pair | None = None,
        padding: Pair = 0,
        *,
        flatten: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value, least in (("patch_size", patch_size, 1), ("stride", stride, 1), ("padding", padding, 0)):
            if value is not None and min(_pair(value)) < least:
                raise ValueError(f"got {name}={value}; expected at least {least}")
        stride = patch_size if stride is None else stride
        self.in_channels = in_channels
        self.flatten = flatten
        self.padding = _pair(padding)
        self.projection = nn.Conv2d(
            in_channels, embed_dim, _pair(patch_size), _pair(stride), self.padding, device=device, dtype=dtype
        )

    def forward(self, images: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, H'·W', C), or (N, H', W', C).

        Raises:
            ValueError: another number of dimensions or channels, or an image smaller than a patch.
        """
        _check_images(self, images)
        patch = self.projection.kernel_size
        sizes = [size + 2 * padding for size, padding in zip(images.shape[2:], self.padding)]
        if sizes[0] < patch[0] or sizes[1] < patch[1]:
            raise ValueError(
                f"images of {images.shape[2]}×{images.shape[3]} pixels hold no patch of {patch[0]}×{patch[1]}; "
                "use larger images, a smaller patch_size or more padding"
            )
        tokens = self.projection(images).permute(0, 2, 3, 1)
        return tokens.flatten(1, 2) if self.flatten else tokens

    def token_mask(self, mask: Tensor) -> Tensor:
        """(N, H, W) bool, True = padding -> the tokens' mask, in the order of `forward`: padding is what sees no pixel.

        Raises ValueError for another mask.
        """
        _check_mask(mask)
        # Zeros around the image are no pixels; max_pool2d itself pads by half a window at most.
        rows, columns = self.padding
        visible = F.pad((~mask).to(torch.float32), (columns, columns, rows, rows))
        pooled = F.max_pool2d(visible[:, None], self.projection.kernel_size, self.projection.stride)
        hidden = pooled.squeeze(1) == 0
        return hidden.flatten(1) if self.flatten else hidden


def _pair(value: Pair) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


def _check_images(module: PixelEmbedding | PatchEmbedding, images: Tensor) -> None:
    if images.ndim != 4 or images.shape[1] != module.in_channels:
        raise ValueError(
            f"{type(module).__name__} takes (N, {module.in_channels}, H, W); got {tuple(images.shape)}"
            + (": add a batch dimension" if images.ndim == 3 and images.shape[0] == module.in_channels else "")
        )


def _check_mask(mask: Tensor) -> None:
    if mask.dtype != torch.bool or mask.ndim != 3:
        raise ValueError(
            f"the mask must be bool of shape (N, H, W), True = padding; got {mask.dtype} {tuple(mask.shape)}: "
            "of a mask with 1 = visible take mask == 0"
        )
