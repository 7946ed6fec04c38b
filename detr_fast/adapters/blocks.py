"""What layers of several libraries share: a residual sum and its norm in one op, where parts may be taken apart."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Module

import detr_fast.nn as ours
from detr_fast import dispatch
from detr_fast.nn import fusion
from detr_fast.nn.bare import is_bare
from detr_fast.ops.add_layer_norm import add_layer_norm
from detr_fast.ops.feed_forward import FEED_FORWARD, feed_forward
from detr_fast.ops.linear_add_layer_norm import LINEAR_ADD_LAYER_NORM

NORMS: set[type[Module]] = {nn.LayerNorm, ours.LayerNorm}  # adapters add their libraries'


class FeedForwardParts(NamedTuple):
    """Two linear layers, what lies between them, and the dropout behind them."""

    first: Any
    activation: str
    dropout_p: float
    second: Any
    output_dropout_p: float


def is_dispatched(x: Any) -> bool:
    """Whether the dispatcher is asked about this input: neither on a CPU without overrides nor traced by torch.fx."""
    return isinstance(x, Tensor) and (dispatch.intervening or x.is_cuda)


def comes_apart(x: Any, *parts: Any) -> bool:
    """Whether a layer's parts may be computed otherwise than by calling them, norms among them."""
    return is_dispatched(x) and fusion.norms_are_free() and all(map(is_plain, parts))


def is_plain(part: Any) -> bool:
    """Whether nothing is lost where such a part is computed rather than called."""
    known = type(part) in (nn.Linear, nn.Dropout, nn.Identity) or is_norm(part)
    return known and is_bare(part)


def is_norm(part: Any) -> bool:
    """Whether it is exactly a LayerNorm over the last dimension."""
    fast = getattr(part, "_fast_norm", False)  # timm's, which casts under autocast
    return type(part) in NORMS and len(part.normalized_shape) == 1 and not fast


def probability(dropout: Any, training: bool) -> float:
    """Of a dropout module, or of a number beside the mode that it holds in."""
    if isinstance(dropout, nn.Dropout):
        return float(dropout.p) if dropout.training else 0.0
    return float(dropout) if training else 0.0


def activation_name(activation: Any) -> str | None:
    """The op's name for an activation module or function; None for another one."""
    kind = type(activation).__name__
    if kind == "GELUActivation":  # transformers'
        return "gelu" if activation.act is F.gelu else None
    return {"SiLUActivation": "silu", "GELUTanh": "gelu_tanh"}.get(kind) or fusion.activation_name(activation)


def add_norm(x: Tensor, residual: Tensor, norm: Any, p: float = 0.0) -> Tensor:
    """norm(residual + dropout(x))."""
    y: Tensor = add_layer_norm(x, residual, norm.weight, norm.bias, norm.eps, p)
    return y


def sum_and_norm(x: Tensor, residual: Tensor, norm: Any, p: float = 0.0) -> tuple[Tensor, Tensor]:
    """residual + dropout(x), and its norm: what a pre-norm layer goes on with."""
    y, total = add_layer_norm(x, residual, norm.weight, norm.bias, norm.eps, p, return_sum=True)
    return total, y


def linear_add_norm(x: Tensor, linear: Any, residual: Tensor, norm: Any, p: float) -> Tensor:
    """norm(residual + dropout(linear(x)))."""
    if norm.weight is not None:
        arguments = (x, linear.weight, linear.bias, residual, norm.weight, norm.bias, norm.eps, p, False)
        if (kernel := LINEAR_ADD_LAYER_NORM.kernel(*arguments)) is not None:
            return kernel.run(*arguments)
    return add_norm(F.linear(x, linear.weight, linear.bias), residual, norm, p)


def feed_forward_of(x: Tensor, parts: FeedForwardParts) -> Tensor:
    """The block without the dropout behind it."""
    first, second = parts.first, parts.second
    return feed_forward(x, first.weight, first.bias, second.weight, second.bias, parts.activation, parts.dropout_p)


def feed_forward_add_norm(x: Tensor, parts: FeedForwardParts, norm: Any) -> Tensor:
    """norm(x + dropout(block(x)))."""
    if norm.weight is not None:
        weights = (parts.first.weight, parts.first.bias, parts.second.weight, parts.second.bias, norm.weight, norm.bias)
        arguments = (x, *weights, norm.eps, parts.activation, parts.dropout_p, parts.output_dropout_p, None, False)
        if (kernel := FEED_FORWARD.kernel(*arguments)) is not None:
            return kernel.run(*arguments)
    return add_norm(feed_forward_of(x, parts), x, norm, parts.output_dropout_p)
