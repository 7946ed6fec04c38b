"""Attention over packed sequences in plain PyTorch: one after the other, or padded."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from detr_fast import dispatch
from detr_fast.dispatch import Implementation
from detr_fast.ops.attention import ATTENTION, EagerAttention
from detr_fast.ops.attention_call import autocast_dtype, computed_dtype
from detr_fast.ops.attention_varlen_call import VarlenCall


class PerSequence(Implementation):
    """SDPA, one sequence after the other: no work on padding, but the host must know the lengths."""

    name = "sdpa"
    plain = True

    def why_not(self, call: VarlenCall) -> str | None:
        if call.device_type != "cpu":
            return f"the lengths are on {call.device_type}: to read them would make the host wait"
        if call.situation.regime == "compiled" or call.tensor_type is dispatch.FakeTensor:
            return "the lengths are not known while tracing"
        if call.attn_mask is not None:
            return "attn_mask is by position in a padded batch"
        return "it does not return the log-sum-exp" if call.return_lse else None

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_q: int,
        max_k: int,
        mask: Tensor | None,
        is_causal: bool,
        dropout_p: float,
        scale: float | None,
        enable_gqa: bool = False,
        return_lse: bool = False,
    ) -> Tensor:
        ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
        pieces = []
        for start_q, end_q, start_k, end_k in zip(ends_q, ends_q[1:], ends_k, ends_k[1:]):
            if start_k == end_k:  # SDPA's math path gives NaN
                pieces.append(_zeros(q[start_q:end_q], k, v))
                continue
            own_q = q[start_q:end_q].transpose(0, 1)[None]
            own_k, own_v = (t[start_k:end_k].transpose(0, 1)[None] for t in (k, v))
            y = F.scaled_dot_product_attention(
                own_q, own_k, own_v, None, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
            pieces.append(y[0].transpose(0, 1))
        pieces.append(_zeros(q[ends_q[-1] :], k, v))
        return torch.cat(pieces)


class Padded(Implementation):
    """Unpack into (B, max, H, E), attend with a mask, pack again: any device, without a look at the lengths.

    With dropout it is the kernels' twin: it drops what they drop.
    """

    name = "eager"

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_q: int,
        max_k: int,
        mask: Tensor | None,
        is_causal: bool,
        dropout_p: float,
        scale: float | None,
        enable_gqa: bool = False,
        return_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        def attend(q: Tensor, k: Tensor, v: Tensor, padding: Tensor, mask: Tensor | None) -> Any:
            arguments = (q, k, v, padding, mask, is_causal, dropout_p, scale, enable_gqa, return_lse)
            return EagerAttention().run(*arguments) if dropout_p > 0.0 else ATTENTION(*arguments)

        return padded(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, mask, attend, return_lse)


def padded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_q: int,
    max_k: int,
    mask: Tensor | None,
    attend: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Any],
    with_lse: bool = False,
) -> Any:
    """`attend(q, k, v, padding, mask)` of the sequences as a padded batch, packed again; zeros for surplus tokens.

    with_lse: it gives the log-sum-exp (B, H, max_q) as well.
    """
    sequences = len(cu_seqlens_q) - 1
    if not (q.shape[0] and k.shape[0] and sequences and max_q and max_k):
        y = _zeros(q, k, v)
        if mask is not None and mask.is_floating_point():
            y = y + mask.flatten()[:0].sum().to(y.dtype)
        # A function of q all the same, as y is: its gradient is zero, not missing.
        nothing = y.sum().float() * 0 - math.inf
        return (y, nothing.expand(sequences, q.shape[1], max_q)) if with_lse else y
    index_q, ended = _slots(cu_seqlens_q, max_q)
    index_k, padding = _slots(cu_seqlens_k, max_k)
    if mask is not None and mask.is_floating_point():
        # What it holds behind a sequence's queries no result reads, but of NaN their gradients would be NaN, times zero.
        mask = mask.masked_fill(ended[:, None, :, None], 0.0)
    y = attend(q[index_q], k[index_k], v[index_k], padding, mask)
    y, lse = y if with_lse else (y, None)
    token = torch.arange(q.shape[0], device=q.device)
    sequence = torch.searchsorted(cu_seqlens_q[1:].contiguous(), token, right=True)
    surplus = sequence == sequences
    sequence = sequence.masked_fill(surplus, 0)
    position = (token - cu_seqlens_q[sequence]).clamp(max=max_q - 1)
    y = y[sequence, position].masked_fill(surplus[:, None, None], 0)
    return y if lse is None else (y, lse.masked_fill(ended[:, None], -math.inf))


def _zeros(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Zeros for queries that see nothing, part of the graph all the same: their gradients are zero, not missing."""
    zeros = (q[..., :0].sum(-1, keepdim=True) + k[:0].sum() + v[:0].sum()).expand(*q.shape[:2], v.shape[2])
    return zeros.to(computed_dtype(q.dtype, autocast_dtype(q)))


def _slots(cu_seqlens: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """(B, longest): the token in each slot of a padded batch, and whether the slot is padding; padding reads token 0.

    Token 0 exists wherever there is a token at all; a surplus one could hold anything, NaN too.
    """
    position = torch.arange(longest, device=cu_seqlens.device)
    index = cu_seqlens[:-1, None] + position
    padding = index >= cu_seqlens[1:, None]
    return index.masked_fill(padding, 0), padding
