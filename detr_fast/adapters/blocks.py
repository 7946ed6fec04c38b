"""What layers of several libraries share: a residual sum and its norm in one op, where parts may be taken apart."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Module

import detr_fast.nn as ours
from detr_fast import dispatch
from detr_fast.nn import blocks
from detr_fast.nn.bare import is_bare
from detr_fast.nn.blocks import FeedForwardParts, fused_feed_forward, fused_linear, norm_of_sum, norms_are_free
from detr_fast.ops.feed_forward import feed_forward

NORMS: set[type[Module]] = {nn.LayerNorm, ours.LayerNorm}  # adapters add their libraries'


def is_dispatched(x: Any) -> bool:
    """Whether the dispatcher is asked about this input: neither on a CPU without overrides nor traced by torch.fx."""
    return isinstance(x, Tensor) and (dispatch.intervening or x.is_cuda)


def comes_apart(x: Any, *parts: Any) -> bool:
    """Whether a layer's parts may be computed otherwise than by calling them, norms among them."""
    return is_dispatched(x) and norms_are_free() and all(map(is_plain, parts))


def is_plain(part: Any) -> bool:
    """Whether nothing is lost where such a part is computed rather than called."""
    known = type(part) in (nn.Linear, nn.Dropout, nn.Identity) or is_norm(part)
    return known and is_bare(part)


def is_norm(part: Any) -> bool:
    """Whether it is exactly a LayerNorm over the last dimension."""
    fast = getattr(part, "_fast_norm", False)  # timm's, which casts under autocast
    return type(part) in NORMS and len(part.normalized_shape) == 1 and not fast


# Others' activation modules, by the class itself: a user's own may have the same name.
_ACTIVATIONS = {
    "transformers.activations.GELUTanh": "gelu_tanh",
    "transformers.activations.NewGELUActivation": "gelu_tanh",  # the same, written out
    "transformers.activations.QuickGELUActivation": "quick_gelu",
    "transformers.activations.SiLUActivation": "silu",
    "timm.layers.activations.GELU": "gelu",
    "timm.layers.activations.GELUTanh": "gelu_tanh",
}


def activation_name(activation: Any) -> str | None:
    """The op's name for an activation module or function; None for another one."""
    if isinstance(activation, nn.Module) and not is_bare(activation):
        return None
    path = f"{type(activation).__module__}.{type(activation).__qualname__}"
    if path == "transformers.activations.GELUActivation":
        return "gelu" if activation.act is F.gelu else None
    return _ACTIVATIONS.get(path) or blocks.activation_name(activation)


def linear_add_norm(x: Tensor, linear: Any, residual: Tensor, norm: Any, p: float) -> Tensor:
    """norm(residual + dropout(linear(x)))."""
    fused = fused_linear(x, linear, residual, norm, p)
    return norm_of_sum(F.linear(x, linear.weight, linear.bias), residual, norm, p) if fused is None else fused


def feed_forward_of(x: Tensor, parts: FeedForwardParts) -> Tensor:
    """The block without the dropout behind it."""
    first, second = parts.first, parts.second
    return feed_forward(x, first.weight, first.bias, second.weight, second.bias, parts.activation, parts.dropout_p)


def feed_forward_add_norm(x: Tensor, parts: FeedForwardParts, norm: Any) -> Tensor:
    """norm(x + dropout(block(x)))."""
    fused = fused_feed_forward(x, parts, norm)
    return norm_of_sum(feed_forward_of(x, parts), x, norm, parts.output_dropout_p) if fused is None else fused


def feed_forward_sum(x: Tensor, parts: FeedForwardParts, residual: Tensor) -> Tensor:
    """residual + dropout(block(x)), the end of a pre-norm layer."""
    fused = fused_feed_forward(x, parts, residual=residual)
    return residual + F.dropout(feed_forward_of(x, parts), parts.output_dropout_p) if fused is None else fused
