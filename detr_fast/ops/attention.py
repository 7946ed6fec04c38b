"""Scaled dot-product attention: the contract, and the choice among PyTorch's own and the Triton kernels.

    out = dropout(softmax(scale * q @ k^T + mask)) @ v

Source: Vaswani et al., 2017, arXiv:1706.03762.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch.nn.functional as F
from torch import Tensor

from detr_fast import dispatch
from detr_fast.dispatch import NEVER, Op
from detr_fast.ops.attention_atomics import TritonAtomicsAttention
from detr_fast.ops.attention_call import describe, misfit, signature
from detr_fast.ops.attention_eager import EagerAttention as EagerAttention
from detr_fast.ops.attention_eager import Sdpa as Sdpa
from detr_fast.ops.attention_triton import TritonAttention, kind_of


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over tensors as projections leave them.

    Shapes: q (B, L, H, E), k (B, S, H, E), v (B, S, H, Ev); the result is (B, L, H, Ev) in q's dtype (autocast's under
    autocast, as SDPA's). `key_padding_mask` is (B, S) bool, True = padding. `attn_mask` broadcasts to (B, H, L, S): bool
    with True = may attend, or float, added to the scores. Masks that come again after n batch elements, as those of an image's
    windows do in each image, are (1, n, H, L, S), or what broadcasts to that, with n that divides B. `is_causal` hides keys after the query's own position (aligned
    top-left). `scale` defaults to 1 / sqrt(E). A query without any visible key gives zeros, and zero gradients.
    `enable_gqa`: k and v may have fewer heads, which divide q's. `return_lse`: also return the log-sum-exp of the scores,
    fp32 (B, H, L), natural logarithm, -inf without any visible key. Written to in place, a result that has a gradient raises RuntimeError
    in its backward, as SDPA's does, or, sequence first in memory, at once.

    Raises ValueError for shapes or masks that do not fit, BackendError as `use_backend` says.
    Sources: Vaswani et al., 2017, arXiv:1706.03762; Dao, 2023, arXiv:2307.08691. How it works: docs/attention.md.
    """
    _check(q, k, v, key_padding_mask, attn_mask, dropout_p, enable_gqa)
    return ATTENTION(q, k, v, key_padding_mask, attn_mask, is_causal, dropout_p, scale, enable_gqa, return_lse)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`: the same signature, layout (B, H, L, E), errors and numerics."""
    four = query.ndim == key.ndim == value.ndim == 4 and (attn_mask is None or attn_mask.ndim <= 4)
    if four and (dispatch.intervening or query.is_cuda):
        q, k, v = (t.transpose(1, 2) for t in (query, key, value))
        arguments = (q, k, v, None, attn_mask, is_causal, dropout_p, scale, enable_gqa)
        if (choice := ATTENTION.choose(*arguments)) is not _sdpa:
            y: Tensor = choice.run(*arguments)
            return y.transpose(1, 2)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def attention_with_weights(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    scale: float | None = None,
    average: bool = False,
) -> tuple[Tensor, Tensor]:
    """`attention`, and its weights after dropout, as nn.MultiheadAttention returns them: for inspection.

    The weights are (B, H, L, S), or with `average` their mean over the heads, (B, L, S), in q's dtype (under autocast its
    dtype on a CPU, fp32 on a GPU). They are zero for a query without any visible key, and differentiable: their own
    backward computes them again in plain PyTorch, and only where someone asks for that gradient. Raises as `attention`, and
    has its sources.
    """
    _check(q, k, v, key_padding_mask, attn_mask, dropout_p)
    weights = "mean" if average else "heads"
    return ATTENTION(q, k, v, key_padding_mask, attn_mask, is_causal, dropout_p, scale, False, False, weights)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    padding: Tensor | None,
    mask: Tensor | None,
    dropout_p: float,
    enable_gqa: bool = False,
) -> None:
    if wrong := misfit(q, k, v, padding, mask, dropout_p, enable_gqa):
        raise ValueError(wrong)


def _bytes(q: Tensor, k: Tensor, *rest: Any) -> int:
    """At least `input_bytes` of the call; where more than an output is asked for, more than any kernel wants."""
    return q.nbytes + 2 * k.nbytes if not any(rest[7:]) else NEVER


_sdpa = Sdpa()
ATTENTION = Op(
    "attention",
    signature=signature,
    describe=describe,
    implementations=(TritonAtomicsAttention(), TritonAttention(), _sdpa, EagerAttention()),
    work=_bytes,
    kind=kind_of,
    small=_sdpa,
)
