"""Attention inside of windows, as Swin's: with a bias by relative position, which all windows share, and a mask where they are shifted.

The scores stay inside `ops.attention`. Bias and mask are added up once: (1, heads, N, N), or where windows are shifted a matrix for each
window of an image, which all images share.
Sources: Liu et al., 2021, arXiv:2103.14030; Liu et al., 2022, arXiv:2111.09883 (the second version, by cosines).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from detr_fast.ops.attention import ATTENTION, Sdpa
from detr_fast.ops.attention_call import autocast_dtype, computed_dtype
from detr_fast.ops.attention_packed import run_packed, unpacked


def attend(packs: list[Tensor], mask: Tensor | None, p: float, scale: float | None = None) -> Tensor:
    """Attention of packs of q, k and v (see `run_packed`) with numbers that are added to the scores, as (B, N, H * E).

    Under autocast the mask stays as it is: the originals add it to scores that it makes fp32.
    """
    dtype = autocast_dtype(packs[0])
    if dtype is not None:
        packs = [pack.to(computed_dtype(pack.dtype, dtype)) for pack in packs]
        with torch.autocast(packs[0].device.type, enabled=False):
            return _attend(packs, mask, p, scale)
    return _attend(packs, mask, p, scale)


def _attend(packs: list[Tensor], mask: Tensor | None, p: float, scale: float | None) -> Tensor:
    chosen = ATTENTION.choose(*unpacked(packs), None, mask, False, p, scale)
    if isinstance(chosen, Sdpa) and mask is not None:  # some of its kernels take q's dtype only
        mask = mask.to(packs[0].dtype)
    return run_packed(chosen, packs, None, mask, False, p, scale).flatten(2)


def partition(x: Tensor, rows: int, columns: int) -> Tensor:
    """x (B, height, width, C) as windows (B * n, rows * columns, C)."""
    batch, height, width, channels = x.shape
    x = x.view(batch, height // rows, rows, width // columns, columns, channels)
    return x.transpose(2, 3).reshape(-1, rows * columns, channels)


def merged(x: Tensor, rows: int, columns: int, height: int, width: int) -> Tensor:
    """Windows (B * n, rows * columns, C) as (B, height, width, C)."""
    x = x.view(-1, height // rows, width // columns, rows, columns, x.shape[-1])
    return x.transpose(2, 3).reshape(-1, height, width, x.shape[-1])


def bias_of(table: Tensor, index: Tensor) -> Tensor:
    """The bias (heads, N, N) that a table (positions, heads) has for each of N * N pairs."""
    tokens = math.isqrt(index.numel())
    return table[index.view(-1)].view(tokens, tokens, -1).permute(2, 0, 1).contiguous()


def with_shift(bias: Tensor, shift: Tensor | None) -> Tensor:
    """bias (heads, N, N) and the mask of an image's shifted windows (n, N, N), or None: what `ops.attention` takes for all images."""
    return bias[None] if shift is None else (bias + shift[:, None])[None]


def cosines(q: Tensor, k: Tensor, v: Tensor, logit_scale: Tensor) -> list[Tensor]:
    """Packs of q, k and v (B, N, H, E) whose products are the second version's scores; logit_scale: the logarithm of a factor, (H, 1, 1)."""
    factor = torch.clamp(logit_scale, max=math.log(100.0)).exp()
    return packed(F.normalize(q, dim=-1) * factor.view(-1, 1), F.normalize(k, dim=-1), v)


def packed(*tensors: Tensor) -> list[Tensor]:
    """A pack of each."""
    return [tensor.unsqueeze(2) for tensor in tensors]


def shift_mask(like: Tensor, size: tuple[int, int], window: list[int], shift: list[int]) -> Tensor:
    """What is added to scores in windows of features that were rolled by `shift`: -100 where tokens were no neighbours before.

    size: of the features, in tokens. The result is (windows of an image, N, N), of the dtype and on the device of `like`.
    """
    (height, width), (rows, columns) = size, window
    regions = torch.zeros((height, width), dtype=torch.long, device=like.device)
    for length, side, moved, shape in ((height, rows, shift[0], (-1, 1)), (width, columns, shift[1], (1, -1))):
        if moved:
            place = torch.arange(length, device=like.device)
            own = (place >= length - side).long() + (place >= length - moved)
            regions = 3 * regions + own.view(shape)
    regions = regions.view(height // rows, rows, width // columns, columns).transpose(1, 2).reshape(-1, rows * columns)
    together = regions[:, None] == regions[:, :, None]
    return torch.zeros_like(together, dtype=like.dtype).masked_fill(~together, -100.0)
