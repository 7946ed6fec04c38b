"""Scaled dot-product attention: the contract, the eager reference and PyTorch's fused SDPA.

    out = dropout(softmax(scale * q @ k^T + mask)) @ v

Source: Vaswani et al., 2017, arXiv:1706.03762.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from detr_fast import dispatch
from detr_fast.dispatch import Call, Implementation, Op, Situation
from detr_fast.ops.boundary import wants_grad


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
) -> Tensor:
    """Attention over tensors as projections leave them.

    Shapes: q (B, L, H, E), k (B, S, H, E), v (B, S, H, Ev); the result is (B, L, H, Ev) in q's dtype (autocast's under
    autocast, as SDPA's). `key_padding_mask` is (B, S) bool, True = padding. `attn_mask` broadcasts to (B, H, L, S): bool
    with True = may attend, or float, added to the scores. `is_causal` hides keys after the query's own position (aligned
    top-left). `scale` defaults to 1 / sqrt(E). A query without any visible key gives zeros, and zero gradients.

    Raises ValueError for shapes or masks that do not fit, BackendError as `use_backend` says.
    """
    _check(q, k, v, key_padding_mask, attn_mask, dropout_p)
    return ATTENTION(q, k, v, key_padding_mask, attn_mask, is_causal, dropout_p, scale)


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
    """`torch.nn.functional.scaled_dot_product_attention`: the same signature, layout (B, H, L, E) and numerics."""
    if query.ndim != 4 or enable_gqa or not (dispatch.intervening or query.is_cuda):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    return ATTENTION(q, k, v, None, attn_mask, is_causal, dropout_p, scale).transpose(1, 2)


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
) -> tuple[Tensor, Tensor]:
    """`attention`, and its weights per head (B, H, L, S) after dropout, as nn.MultiheadAttention returns them.

    The weights are materialised: for inspection, and where a model asks for them.
    """
    _check(q, k, v, key_padding_mask, attn_mask, dropout_p)
    weights = _weights(q, k, key_padding_mask, attn_mask, is_causal, scale)
    if dropout_p > 0.0:
        weights = F.dropout(weights, dropout_p)
    return _weighted(weights, v), weights


@dataclass(frozen=True)
class AttentionCall(Call):
    batch: int
    heads: int
    queries: int
    keys: int
    head_dim: int
    value_dim: int
    key_padding: bool
    attn_mask: str | None  # its dtype's name
    mask_grad: bool
    is_causal: bool
    dropout: bool

    def shapes(self) -> str:
        extras = [
            name
            for name, present in (
                ("key_padding_mask", self.key_padding),
                (f"{self.attn_mask} attn_mask", self.attn_mask),
                ("causal", self.is_causal),
                ("dropout", self.dropout),
            )
            if present
        ]
        dims = self.head_dim if self.head_dim == self.value_dim else f"{self.head_dim}/{self.value_dim}"
        text = f"B {self.batch} H {self.heads} {self.queries}×{self.keys} hd {dims} {str(self.dtype).removeprefix('torch.')}"
        return " ".join([text, *extras])


def _check(q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, mask: Tensor | None, dropout_p: float) -> None:
    if not (q.ndim == k.ndim == v.ndim == 4):
        raise ValueError(
            f"attention takes q (B, L, H, E), k (B, S, H, E), v (B, S, H, Ev); got {_shape(q)}, {_shape(k)}, {_shape(v)}"
        )
    batch, length, heads, dim = q.shape
    keys = k.shape[1]
    if k.shape != (batch, keys, heads, dim) or v.shape[:3] != (batch, keys, heads):
        raise ValueError(
            f"k must be (B, S, H, E) and v (B, S, H, Ev) with q's B {batch}, H {heads}, E {dim} and one S; "
            f"got q {_shape(q)}, k {_shape(k)}, v {_shape(v)}"
        )
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p must lie in [0, 1]; got {dropout_p}")
    if padding is not None and (padding.dtype != torch.bool or padding.shape != (batch, keys)):
        raise ValueError(
            f"key_padding_mask must be bool of shape (B, S) = ({batch}, {keys}), True = padding; "
            f"got {padding.dtype} {_shape(padding)}"
        )
    if mask is not None:
        fits = mask.ndim <= 4 and all(m in (1, s) for m, s in zip(mask.shape[::-1], (keys, length, heads, batch)))
        if not fits or not (mask.dtype == torch.bool or mask.is_floating_point()):
            raise ValueError(
                f"attn_mask must be bool (True = may attend) or float and broadcast to (B, H, L, S) = "
                f"({batch}, {heads}, {length}, {keys}); got {mask.dtype} {_shape(mask)}"
            )


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def _signature(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    padding: Tensor | None,
    mask: Tensor | None,
    is_causal: bool,
    dropout_p: float,
    scale: float | None,
) -> tuple[Any, ...]:
    tensors = [t for t in (q, k, v, padding, mask) if t is not None]
    return (
        *((type(t), t.shape, t.stride(), t.dtype, t.device, t.requires_grad) for t in tensors),
        padding is None,
        mask is None,
        is_causal,
        dropout_p > 0.0,
    )


def _describe(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    padding: Tensor | None,
    mask: Tensor | None,
    is_causal: bool,
    dropout_p: float,
    scale: float | None,
    *,
    situation: Situation,
) -> AttentionCall:
    batch, queries, heads, dim = q.shape
    return AttentionCall(
        device=q.device,
        architecture=dispatch.architecture(q.device),
        dtype=q.dtype,
        tensor_type=dispatch.tensor_type((q, k, v, padding, mask)),
        needs_grad=wants_grad(q, k, v, mask),
        situation=situation,
        batch=batch,
        heads=heads,
        queries=queries,
        keys=k.shape[1],
        head_dim=dim,
        value_dim=v.shape[-1],
        key_padding=padding is not None,
        attn_mask=None if mask is None else str(mask.dtype).removeprefix("torch."),
        mask_grad=wants_grad(mask),
        is_causal=is_causal,
        dropout=dropout_p > 0.0,
    )


def merged_mask(padding: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """One mask in SDPA's convention, broadcastable to (B, H, L, S): bool (True = may attend) or float."""
    if padding is None:
        return mask
    visible = ~padding[:, None, None, :]
    if mask is None:
        return visible
    if mask.dtype == torch.bool:
        return mask & visible
    return mask.masked_fill(~visible, -math.inf)


class Sdpa(Implementation):
    """`F.scaled_dot_product_attention`: PyTorch's own choice among flash, cuDNN, memory-efficient and math."""

    name = "sdpa"

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        padding: Tensor | None,
        mask: Tensor | None,
        is_causal: bool,
        dropout_p: float,
        scale: float | None,
    ) -> Tensor:
        merged = merged_mask(padding, mask)
        if is_causal and merged is not None:  # SDPA takes one or the other
            merged, is_causal = _with_causal(merged, q.shape[1], k.shape[1]), False
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, merged, dropout_p, is_causal, scale=scale).transpose(1, 2)


class EagerAttention(Implementation):
    """The definition, step by step, for the reader and the tests."""

    name = "eager"

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        padding: Tensor | None,
        mask: Tensor | None,
        is_causal: bool,
        dropout_p: float,
        scale: float | None,
    ) -> Tensor:
        weights = _weights(q, k, padding, mask, is_causal, scale)
        return _weighted(F.dropout(weights, dropout_p) if dropout_p > 0.0 else weights, v)


def _weights(
    q: Tensor, k: Tensor, padding: Tensor | None, mask: Tensor | None, is_causal: bool, scale: float | None
) -> Tensor:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.matmul((q * scale).transpose(1, 2), k.permute(0, 2, 3, 1))
    merged = merged_mask(padding, mask)
    if is_causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        merged = allowed if merged is None else _with_causal(merged, *scores.shape[-2:])
    if merged is None:
        return scores.softmax(-1)
    if merged.dtype == torch.bool:
        hidden = ~merged
    else:
        scores, hidden = scores + merged, merged == -math.inf
    # A finite fill and a second masking give rows with no visible key zeros, with zero gradients, instead of NaN.
    lowest = torch.finfo(scores.dtype).min
    return scores.masked_fill(hidden, lowest).softmax(-1).masked_fill(hidden, 0.0)


def _with_causal(mask: Tensor, queries: int, keys: int) -> Tensor:
    allowed = torch.ones(queries, keys, dtype=torch.bool, device=mask.device).tril()
    return mask & allowed if mask.dtype == torch.bool else mask.masked_fill(~allowed, -math.inf)


def _weighted(weights: Tensor, v: Tensor) -> Tensor:
    # A float32 mask promotes the weights of 16-bit tensors.
    return torch.matmul(weights.to(v.dtype), v.transpose(1, 2)).transpose(1, 2)


ATTENTION = Op("attention", signature=_signature, describe=_describe, implementations=(Sdpa(), EagerAttention()))
