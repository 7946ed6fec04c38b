"""Attention in plain PyTorch: the definition, step by step, and PyTorch's fused SDPA."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from detr_fast.dispatch import Implementation
from detr_fast.kernels import dropout
from detr_fast.ops.attention_call import AttentionCall, Weights, autocast_dtype, computed_dtype, weights_dtype
from detr_fast.ops.boundary import followed
from detr_fast.ops.dropout import keep_mask, next_seed
from detr_fast.situation import capturing


def whole_mask(mask: Tensor | None, batch: int) -> Tensor | None:
    """A mask for each batch element, of one whose batch elements come again, (1, n, H, L, S); another one as it is."""
    if mask is None or mask.ndim < 5:
        return mask
    return mask.expand(batch // mask.shape[1], *mask.shape[1:]).flatten(0, 1)


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
    """`F.scaled_dot_product_attention`: PyTorch's own choice among flash, cuDNN, memory-efficient and math.

    Its dropout is torch's own, as in torch.nn, and differs from the kernels' for one seed.
    """

    name = "sdpa"

    def why_not(self, call: AttentionCall) -> str | None:
        return "it does not return the log-sum-exp" if call.return_lse else None

    def why_not_instead(self, call: AttentionCall) -> str | None:
        # A checkpointed region may run on the kernel and fail to compile its backward only when it is recomputed.
        return "its dropout is torch's own, not the kernel's that it would stand in for" if call.dropout else None

    def note(self, call: AttentionCall) -> str | None:
        return "weights and output by matmul and softmax, as torch.nn computes them" if call.weights else None

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
        enable_gqa: bool = False,
        return_lse: bool = False,
        weights: Weights = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        if weights is not None:
            return _materialised(q, k, v, padding, mask, is_causal, dropout_p, scale, enable_gqa, weights)
        mask = whole_mask(mask, q.shape[0])
        if mask is None and padding is not None and not is_causal:
            merged: Tensor | None = _bias(padding, q)
        else:
            merged = merged_mask(padding, mask)
        if is_causal and merged is not None:  # SDPA takes one or the other
            merged, is_causal = _with_causal(merged, q.shape[1], k.shape[1]), False
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(
            q, k, v, merged, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        ).transpose(1, 2)


_EIGHT = 8  # elements: SDPA's memory-efficient kernel would copy, on each call, a bias whose rows are no multiple of it
_fills: dict[tuple[torch.dtype, torch.device], tuple[Tensor, ...]] = {}  # -inf and 0, on the device


def _bias(padding: Tensor, q: Tensor) -> Tensor:
    """What is added to the scores, (B, 1, 1, S): SDPA would make the same of a bool mask, in three launches in place of one."""
    if followed() or type(padding) is not Tensor:
        return ~padding[:, None, None]
    device = q.device
    key = computed_dtype(q.dtype, autocast_dtype(q)), device
    if (fills := _fills.get(key)) is None:
        if capturing(device.type):  # they would be the graph's
            return ~padding[:, None, None]
        with torch.inference_mode(False):
            fills = tuple(torch.full((), x, dtype=key[0], device=device) for x in (-math.inf, 0.0))
        _fills[key] = fills
    infinite, zero = fills
    batch, keys = padding.shape
    hidden = padding.view(batch, 1, 1, keys)  # in half the time that an index takes
    if keys % _EIGHT == 0:
        return torch.where(hidden, infinite, zero)
    rows = torch.empty((batch, 1, 1, keys + -keys % _EIGHT), dtype=key[0], device=device)[..., :keys]
    return torch.where(hidden, infinite, zero, out=rows)


def _materialised(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    padding: Tensor | None,
    mask: Tensor | None,
    is_causal: bool,
    dropout_p: float,
    scale: float | None,
    enable_gqa: bool,
    weights: Weights,
) -> tuple[Tensor, Tensor]:
    """The output and the weights as nn.MultiheadAttention computes both: SDPA returns none."""
    if enable_gqa:
        k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], 2) for t in (k, v))
    factors = attention_weights(q, k, padding, mask, is_causal, scale)
    factors = F.dropout(factors, dropout_p) if dropout_p > 0.0 else factors
    return weighted_sum(factors, v), shown(factors, weights, q.dtype)


class EagerAttention(Implementation):
    """The definition, step by step, for the reader and the tests; with dropout, the kernels' twin: it drops what they drop."""

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
        enable_gqa: bool = False,
        return_lse: bool = False,
        weights: Weights = None,
    ) -> Tensor | tuple[Tensor, ...]:
        if enable_gqa:
            k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], 2) for t in (k, v))
        factors = attention_weights(q, k, padding, mask, is_causal, scale)
        if dropout_p > 0.0:
            factors = dropped(factors, dropout_p, *next_seed(q.device))
        results = [weighted_sum(factors, v)]
        if return_lse:
            scores, hidden = _scores(q, k, padding, mask, is_causal, scale)
            results.append((scores if hidden is None else scores.masked_fill(hidden, -math.inf)).float().logsumexp(-1))
        if weights is not None:
            results.append(shown(factors, weights, q.dtype))
        return results[0] if len(results) == 1 else tuple(results)


def attention_weights(
    q: Tensor, k: Tensor, padding: Tensor | None, mask: Tensor | None, is_causal: bool, scale: float | None
) -> Tensor:
    """softmax(scale * q @ k^T + mask), (B, H, L, S), zeros for a query without any visible key."""
    scores, hidden = _scores(q, k, padding, mask, is_causal, scale)
    if hidden is None:
        return scores.softmax(-1)
    # A finite fill and a second masking give rows with no visible key zeros, with zero gradients, instead of NaN.
    lowest = torch.finfo(scores.dtype).min
    return scores.masked_fill(hidden, lowest).softmax(-1).masked_fill(hidden, 0.0)


def shown(factors: Tensor, weights: Weights, dtype: torch.dtype) -> Tensor:
    """Weights (B, H, L, S) as they are asked for, in the dtype that nn.MultiheadAttention returns them in."""
    wanted = weights_dtype(dtype, factors.device, autocast_dtype(factors))
    return (factors.mean(1) if weights == "mean" else factors).to(wanted)


def dropped(weights: Tensor, dropout_p: float, seed: Tensor, offset: int) -> Tensor:
    """weights (B, H, L, S) after the dropout that the kernels draw from this seed and offset."""
    batch, heads, rows, columns = weights.shape
    keep = keep_mask(seed, offset, dropout_p, batch * heads, rows, columns, tiles=True)
    return weights * keep.view(weights.shape) * dropout.scale(dropout_p)


def _scores(
    q: Tensor, k: Tensor, padding: Tensor | None, mask: Tensor | None, is_causal: bool, scale: float | None
) -> tuple[Tensor, Tensor | None]:
    """Scores (B, H, L, S) with a float mask added, and which of them are hidden (None: no mask at all)."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.matmul((q * scale).transpose(1, 2), k.permute(0, 2, 3, 1))
    merged = merged_mask(padding, whole_mask(mask, q.shape[0]))
    if is_causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        merged = allowed if merged is None else _with_causal(merged, *scores.shape[-2:])
    if merged is None:
        return scores, None
    if merged.dtype == torch.bool:
        return scores, ~merged
    return scores + merged, merged == -math.inf


def _with_causal(mask: Tensor, queries: int, keys: int) -> Tensor:
    allowed = torch.ones(queries, keys, dtype=torch.bool, device=mask.device).tril()
    return mask & allowed if mask.dtype == torch.bool else mask.masked_fill(~allowed, -math.inf)


def weighted_sum(weights: Tensor, v: Tensor) -> Tensor:
    """weights (B, H, L, S) @ v, (B, L, H, Ev)."""
    # A float32 mask promotes the weights of 16-bit tensors.
    return torch.matmul(weights.to(v.dtype), v.transpose(1, 2)).transpose(1, 2)
