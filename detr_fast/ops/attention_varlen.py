"""Attention over sequences of different lengths, packed one behind the other without padding.

    out[i] = softmax(scale * q_i @ k_i^T) @ v_i    for each sequence i, whose tokens are cu_seqlens[i] to cu_seqlens[i + 1]

The layout is that of FlashAttention's variable-length form: Dao et al., 2022, arXiv:2205.14135.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from detr_fast import dispatch
from detr_fast.dispatch import Call, Implementation, Op, Situation
from detr_fast.ops.attention import attention
from detr_fast.ops.boundary import wants_grad


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """Attention of each sequence to the keys of the same number.

    Args:
        q: (Tq, H, E); all sequences' queries, one sequence behind the other.
        k: (Tk, H, E).
        v: (Tk, H, Ev).
        cu_seqlens_q, cu_seqlens_k: (B + 1,) int32 on q's device: 0, then the end of each sequence. Tokens behind the
            last end are surplus (a fixed capacity): they are not read, and their output and gradients are zero.
        max_q, max_k: no sequence is longer; known on the host, so that nothing waits for the device.
        is_causal: a query sees keys up to its own position within its sequence (aligned top-left).
        dropout_p: of the attention weights.
        scale: 1 / sqrt(E) by default.

    Returns:
        (Tq, H, Ev) in q's dtype (autocast's under autocast). A query of a sequence without keys gives zeros.

    Raises:
        ValueError: shapes or lengths that do not fit (lengths are checked on the CPU only).
    """
    _check(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, dropout_p)
    return ATTENTION_VARLEN(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, is_causal, dropout_p, scale)


@dataclass(frozen=True)
class VarlenCall(Call):
    sequences: int
    queries: int
    keys: int
    max_q: int
    max_k: int
    heads: int
    head_dim: int
    value_dim: int
    is_causal: bool
    dropout: bool

    def shapes(self) -> str:
        text = (
            f"{self.sequences} sequences H {self.heads} {self.queries}×{self.keys} tokens, at most "
            f"{self.max_q}×{self.max_k} hd {self.head_dim} {str(self.dtype).removeprefix('torch.')}"
        )
        return text + (" causal" if self.is_causal else "") + (" dropout" if self.dropout else "")


class PerSequence(Implementation):
    """SDPA, one sequence after the other: no work on padding, but the host must know the lengths."""

    name = "sdpa"
    plain = True

    def why_not(self, call: VarlenCall) -> str | None:
        if call.device_type != "cpu":
            return f"the lengths are on {call.device_type}: to read them would make the host wait"
        if call.situation.regime == "compiled" or call.tensor_type is dispatch.FakeTensor:
            return "the lengths are not known while tracing"
        return None

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_q: int,
        max_k: int,
        is_causal: bool,
        dropout_p: float,
        scale: float | None,
    ) -> Tensor:
        ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
        pieces = []
        for start_q, end_q, start_k, end_k in zip(ends_q, ends_q[1:], ends_k, ends_k[1:]):
            if start_k == end_k:  # SDPA's math path gives NaN
                pieces.append(_zeros(q[start_q:end_q], k, v))
                continue
            own_q = q[start_q:end_q].transpose(0, 1)[None]
            own_k, own_v = (t[start_k:end_k].transpose(0, 1)[None] for t in (k, v))
            y = F.scaled_dot_product_attention(own_q, own_k, own_v, None, dropout_p, is_causal, scale=scale)
            pieces.append(y[0].transpose(0, 1))
        pieces.append(_zeros(q[ends_q[-1] :], k, v))
        dtype = pieces[0].dtype
        return torch.cat([piece.to(dtype) for piece in pieces])


class Padded(Implementation):
    """Unpack into (B, max, H, E), attend with a mask, pack again: any device, without a look at the lengths."""

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
        is_causal: bool,
        dropout_p: float,
        scale: float | None,
    ) -> Tensor:
        if not q.shape[0] or not k.shape[0]:
            return _zeros(q, k, v)
        index_q, _ = _slots(cu_seqlens_q, max_q)
        index_k, padding = _slots(cu_seqlens_k, max_k)
        y = attention(
            q[index_q],
            k[index_k],
            v[index_k],
            key_padding_mask=padding,
            is_causal=is_causal,
            dropout_p=dropout_p,
            scale=scale,
        )
        token = torch.arange(q.shape[0], device=q.device)
        sequence = torch.searchsorted(cu_seqlens_q[1:].contiguous(), token, right=True)
        surplus = sequence == len(cu_seqlens_q) - 1
        sequence = sequence.masked_fill(surplus, 0)
        position = (token - cu_seqlens_q[sequence]).clamp(max=max_q - 1)
        return y[sequence, position].masked_fill(surplus[:, None, None], 0)


def _zeros(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Zeros for queries that see nothing, part of the graph all the same: their gradients are zero, not missing."""
    return (q[..., :0].sum(-1, keepdim=True) + k[:0].sum() + v[:0].sum()).expand(*q.shape[:2], v.shape[2])


def _slots(cu_seqlens: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """(B, longest): the token in each slot of a padded batch, and whether the slot is padding; padding reads token 0.

    Token 0 exists wherever there is a token at all; a surplus one could hold anything, NaN too.
    """
    position = torch.arange(longest, device=cu_seqlens.device)
    index = cu_seqlens[:-1, None] + position
    padding = index >= cu_seqlens[1:, None]
    return index.masked_fill(padding, 0), padding


def _check(
    q: Tensor, k: Tensor, v: Tensor, ends_q: Tensor, ends_k: Tensor, max_q: int, max_k: int, dropout_p: float
) -> None:
    shapes = f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not (q.ndim == k.ndim == v.ndim == 3):
        raise ValueError(f"attention_varlen takes q (Tq, H, E), k (Tk, H, E), v (Tk, H, Ev), without a batch; {shapes}")
    if k.shape[1:] != q.shape[1:] or v.shape[:2] != k.shape[:2]:
        raise ValueError(
            f"q, k and v must have the same H, q and k the same E, k and v the same number of tokens; {shapes}"
        )
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p must lie in [0, 1]; got {dropout_p}")
    for name, ends in (("cu_seqlens_q", ends_q), ("cu_seqlens_k", ends_k)):
        if ends.ndim != 1 or len(ends) < 1 or ends.dtype != torch.int32 or ends.device != q.device:
            raise ValueError(
                f"{name} must be int32 of shape (B + 1,) on {q.device}: 0, then the end of each sequence; "
                f"got {ends.dtype} {tuple(ends.shape)} on {ends.device}"
            )
    if len(ends_q) != len(ends_k):
        raise ValueError(f"cu_seqlens_q is of {len(ends_q) - 1} sequences and cu_seqlens_k of {len(ends_k) - 1}")
    if q.device.type == "cpu" and not isinstance(ends_q, dispatch.FakeTensor) and not torch.compiler.is_compiling():
        _check_lengths("q", ends_q.tolist(), q.shape[0], max_q)
        _check_lengths("k", ends_k.tolist(), k.shape[0], max_k)


def _check_lengths(which: str, ends: list[int], tokens: int, longest: int) -> None:
    lengths = [end - start for start, end in pairwise(ends)]
    if ends[0] != 0 or min(lengths, default=0) < 0 or ends[-1] > tokens:
        raise ValueError(
            f"cu_seqlens_{which} must start at 0, never fall and end at {tokens} tokens or before; got {ends}"
        )
    if max(lengths, default=0) > longest:
        raise ValueError(f"max_{which} is {longest}, but a sequence has {max(lengths)} tokens")


def _signature(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool,
    dropout_p: float,
    scale: float | None,
) -> tuple[Any, ...]:
    tensors = (q, k, v, cu_seqlens_q, cu_seqlens_k)
    described = ((type(t), t.shape, t.stride(), t.dtype, t.device, t.requires_grad) for t in tensors)
    return (*described, max_q, max_k, is_causal, dropout_p > 0.0)


def _describe(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool,
    dropout_p: float,
    scale: float | None,
    *,
    situation: Situation,
) -> VarlenCall:
    return VarlenCall(
        device=q.device,
        architecture=dispatch.architecture(q.device),
        dtype=q.dtype,
        tensor_type=dispatch.tensor_type((q, k, v, cu_seqlens_q, cu_seqlens_k)),
        needs_grad=wants_grad(q, k, v),
        situation=situation,
        sequences=len(cu_seqlens_q) - 1,
        queries=q.shape[0],
        keys=k.shape[0],
        max_q=max_q,
        max_k=max_k,
        heads=q.shape[1],
        head_dim=q.shape[2],
        value_dim=v.shape[2],
        is_causal=is_causal,
        dropout=dropout_p > 0.0,
    )


ATTENTION_VARLEN = Op(
    "attention_varlen", signature=_signature, describe=_describe, implementations=(PerSequence(), Padded())
)
