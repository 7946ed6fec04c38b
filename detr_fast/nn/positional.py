"""Where a token stands, as a vector: added to the token, or returned for attention layers that add it themselves."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from detr_fast import ops
from detr_fast.ops.sine_positions import waves


class _Positional(nn.Module):
    """What all share: positions are added to the tokens unless `add` is False, in the tokens' dtype."""

    def __init__(self, d_model: int, add: bool) -> None:
        super().__init__()
        self.d_model = d_model
        self.add = add

    def _finish(self, tokens: Tensor, positions: Tensor) -> Tensor:
        positions = positions.to(tokens.dtype)
        return tokens + positions if self.add else positions

    def _check(self, tokens: Tensor, shape: str, dims_fit: bool) -> None:
        # Returned positions depend on where tokens are, not on how many channels they have.
        if not dims_fit or (self.add and tokens.shape[-1] != self.d_model):
            raise ValueError(f"{type(self).__name__} takes tokens {shape}; got {tuple(tokens.shape)}")

    def extra_repr(self) -> str:
        return f"{self.d_model}" + ("" if self.add else ", add=False")


class SinusoidalPositionalEncoding(_Positional):
    """Sines and cosines of the position in a sequence, of any length.

        p[2i] = sin(position / temperature^(2i / C)),   p[2i + 1] = cos(position / temperature^(2i / C))

    Source: Vaswani et al., 2017, arXiv:1706.03762, section 3.5.

    Args:
        d_model: C, even.
        temperature: ratio between the longest and the shortest wavelength.
        add: return tokens + positions; False: only the positions, (L, C).
    """

    def __init__(self, d_model: int, temperature: float = 10_000.0, *, add: bool = True) -> None:
        super().__init__(d_model, add)
        if d_model < 2 or d_model % 2:
            raise ValueError(f"got d_model {d_model}; expected an even number (a sine and a cosine each)")
        self.temperature = temperature

    def forward(self, tokens: Tensor, start: int | Tensor = 0) -> Tensor:
        """tokens (…, L, C), the first of which stands at `start` -> (…, L, C), or (L, C) where positions are returned.

        `start` may be a tensor of one element, as incremental decoding on a GPU needs it.
        """
        self._check(tokens, f"(…, L, {self.d_model})", tokens.ndim >= 2)
        dtype = torch.float64 if tokens.dtype == torch.float64 else torch.float32
        position = torch.arange(tokens.shape[-2], dtype=dtype, device=tokens.device) + start
        pair = torch.arange(self.d_model // 2, dtype=dtype, device=tokens.device)
        return self._finish(tokens, waves(position, self.temperature ** (2 * pair / self.d_model)))


class SinePositionEmbedding2D(_Positional):
    """Sines and cosines of the row and the column, both normalised to the image's visible part, rows first.

    Source: Carion et al., 2020, arXiv:2005.12872, section A.4.

    Args:
        d_model: C, a multiple of 4; half of the channels tell the row, half the column.
        temperature: ratio between the longest and the shortest wavelength.
        add: return tokens + positions; False: only the positions, with N = 1 if there is no mask.
    """

    def __init__(self, d_model: int, temperature: float = 10_000.0, *, add: bool = True) -> None:
        super().__init__(d_model, add)
        if d_model < 4 or d_model % 4:
            raise ValueError(
                f"got d_model {d_model}; expected a multiple of 4 (a sine and a cosine for rows and columns)"
            )
        self.temperature = temperature

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """tokens (N, H, W, C), mask (N, H, W) bool with True = padding -> (N, H, W, C)."""
        self._check(tokens, f"(N, H, W, {self.d_model}), with their grid", tokens.ndim == 4)
        if mask is None:
            mask = torch.zeros((1, *tokens.shape[1:3]), dtype=torch.bool, device=tokens.device)
        elif mask.dtype != torch.bool or mask.shape != tokens.shape[:3]:
            raise ValueError(
                f"the mask must be bool of shape {tuple(tokens.shape[:3])}, True = padding; "
                f"got {mask.dtype} {tuple(mask.shape)}"
            )
        positions = ops.sine_positions(mask, self.d_model // 2, self.temperature, dtype=tokens.dtype)
        return self._finish(tokens, positions)


class LearnedPositionalEmbedding(_Positional):
    """A learned vector for each position of a sequence, or of a grid.

    Sources: Gehring et al., 2017, arXiv:1705.03122; for grids Dosovitskiy et al., 2021, arXiv:2010.11929.

    Args:
        size: the longest sequence, or (height, width) of the largest grid.
        d_model: C.
        add: return tokens + positions; False: only the positions, (L, C) or (H, W, C).

    Attributes:
        weight: (*size, C), drawn from N(0, 0.02²).
    """

    def __init__(
        self,
        size: int | tuple[int, int],
        d_model: int,
        *,
        add: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(d_model, add)
        self.size = (size,) if isinstance(size, int) else tuple(size)
        if len(self.size) not in (1, 2) or min(self.size) < 1:
            raise ValueError(f"got size {size}; expected a length or (height, width), at least 1")
        self.weight = nn.Parameter(torch.empty(*self.size, d_model, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, tokens: Tensor, start: int | Tensor = 0) -> Tensor:
        """tokens (…, L, C), the first of which stands at `start`, or (…, H, W, C), from the grid's corner -> the same shape.

        Where positions are returned, (L, C) or (H, W, C). `start` may be a tensor of one element, whose value is not checked.

        Raises:
            ValueError: more tokens than positions.
        """
        axes = len(self.size)
        self._check(tokens, f"(…, {'H, W' if axes == 2 else 'L'}, {self.d_model})", tokens.ndim > axes)
        shape = tokens.shape[-axes - 1 : -1]
        if isinstance(start, Tensor):
            index = torch.arange(shape[0], device=tokens.device) + start
            return self._finish(tokens, self.weight.index_select(0, index))
        if start < 0 or any(start + found > size for found, size in zip(shape, self.size)):
            raise ValueError(
                f"tokens of {'×'.join(map(str, shape))}{f' from {start} on' if start else ''} "
                f"but learned positions go from 0 to {'×'.join(map(str, self.size))}; use a larger size, or sines"
            )
        positions = self.weight[start : start + shape[0]]
        return self._finish(tokens, positions if axes == 1 else positions[:, : shape[1]])

    def extra_repr(self) -> str:
        size = self.size[0] if len(self.size) == 1 else self.size
        return f"{size}, {super().extra_repr()}"
