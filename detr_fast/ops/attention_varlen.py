"""Attention over sequences of different lengths, packed one behind the other without padding.

    out[i] = softmax(scale * q_i @ k_i^T) @ v_i    for each sequence i, whose tokens are cu_seqlens[i] to cu_seqlens[i + 1]

The layout is that of FlashAttention's variable-length form: Dao et al., 2022, arXiv:2205.14135.
"""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from detr_fast.dispatch import Op
from detr_fast.ops.attention_varlen_atomics import TritonAtomicsVarlen
from detr_fast.ops.attention_varlen_call import check, describe, signature
from detr_fast.ops.attention_varlen_eager import Padded, PerSequence
from detr_fast.ops.attention_varlen_triton import TritonVarlen


@overload
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of each sequence to the keys of the same number.

    Args:
        q: (Tq, H, E); all sequences' queries, one sequence behind the other.
        k: (Tk, H, E), or with fewer heads, which divide q's, where `enable_gqa`.
        v: (Tk, H, Ev), with k's heads.
        cu_seqlens_q, cu_seqlens_k: (B + 1,) int32 on q's device: 0, then the end of each sequence. Tokens behind the
            last end are surplus (a fixed capacity): they are not read, and their output and gradients are zero.
        max_q, max_k: no sequence is longer; known on the host, so that nothing waits for the device.
        attn_mask: broadcasts to (B, H, max_q, max_k), by position within a sequence: bool with True = may attend, or float,
            added to the scores, as a relative position bias that all sequences share. A float mask gets its gradient.
        is_causal: a query sees keys up to its own position within its sequence (aligned top-left).
        dropout_p: of the attention weights.
        scale: 1 / sqrt(E) by default.
        return_lse: also return the log-sum-exp of the scores, as of a padded batch: fp32 (B, H, max_q), natural
            logarithm, -inf behind a sequence's end and for a query without keys.

    Returns:
        (Tq, H, Ev) in q's dtype (autocast's under autocast). A query of a sequence without keys gives zeros.

    Raises:
        ValueError: shapes, lengths or a mask that do not fit (lengths are checked on the CPU only).

    Sources: as `attention`'s; the layout is Dao's, 2023, arXiv:2307.08691.
    """
    check(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, attn_mask, dropout_p, enable_gqa)
    options = (attn_mask, is_causal, dropout_p, scale, enable_gqa, return_lse)
    return ATTENTION_VARLEN(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, *options)


ATTENTION_VARLEN = Op(
    "attention_varlen",
    signature=signature,
    describe=describe,
    implementations=(TritonAtomicsVarlen(), TritonVarlen(), PerSequence(), Padded()),
)
