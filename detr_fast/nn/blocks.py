"""A block's products with the dropout, residual sum and norm behind them, of parts that may be taken apart.

Whether they may, layers and adapters ask before (`fusion`, `adapters.blocks`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from detr_fast.kernels.linear_norm import MAX_COLUMNS
from detr_fast.nn.bare import is_bare
from detr_fast.nn.casts import cast_of
from detr_fast.ops.add_layer_norm import ADD_LAYER_NORM, add_layer_norm
from detr_fast.ops.add_rms_norm import ADD_RMS_NORM
from detr_fast.ops.feed_forward import FEED_FORWARD
from detr_fast.ops.layer_norm import LAYER_NORM
from detr_fast.ops.linear_add_layer_norm import LINEAR_ADD_LAYER_NORM
from detr_fast.ops.rms_norm import RMS_NORM


class FeedForwardParts(NamedTuple):
    """Two linear layers, what lies between them, and the dropout behind them."""

    first: Any
    activation: str
    dropout_p: float
    second: Any
    output_dropout_p: float


def norms_are_free() -> bool:
    """Whether a norm may be computed with the sum before it: who asks for a norm's implementation by name gets that."""
    return LAYER_NORM.requested is None or ADD_LAYER_NORM.requested is not None


def rms_norms_are_free() -> bool:
    """The same of RMSNorms."""
    return RMS_NORM.requested is None or ADD_RMS_NORM.requested is not None


def probability(dropout: Any, training: bool = False) -> float:
    """Of a dropout module, or of a number beside the mode that it holds in."""
    if isinstance(dropout, nn.Dropout):
        return float(dropout.p) if dropout.training else 0.0
    return float(dropout) if training else 0.0


def activation_name(activation: Callable[..., Any]) -> str | None:
    """Our name for torch's activation, a function or a module; None for one that we do not know."""
    if isinstance(activation, nn.Module) and not is_bare(activation):
        return None
    if type(activation) is nn.GELU:
        return "gelu" if activation.approximate == "none" else "gelu_tanh"
    known = type(activation) if isinstance(activation, nn.Module) else activation
    for one, name in _ACTIVATIONS:  # what is called need not be hashable
        if one is known:
            return name
    return None


_ACTIVATIONS: tuple[tuple[Any, str], ...] = (
    (F.relu, "relu"),
    (F.gelu, "gelu"),
    (F.silu, "silu"),
    (nn.ReLU, "relu"),
    (nn.SiLU, "silu"),
)


def norm_of_sum(x: Tensor, residual: Tensor, norm: Any, p: float = 0.0) -> Tensor:
    """norm(residual + dropout(x))."""
    y: Tensor = add_layer_norm(x, residual, norm.weight, norm.bias, norm.eps, p)
    return y


def sum_and_norm(x: Tensor, residual: Tensor, norm: Any, p: float = 0.0) -> tuple[Tensor, Tensor]:
    """residual + dropout(x), and its norm: what a pre-norm layer goes on with."""
    y, total = add_layer_norm(x, residual, norm.weight, norm.bias, norm.eps, p, return_sum=True)
    return total, y


def fused_linear(x: Tensor, linear: Any, residual: Tensor, norm: Any, p: float, pre_norm: bool = False) -> Any:
    """norm(residual + dropout(linear(x))) in one launch, pre_norm: (the sum, its norm); None where no kernel does it."""
    if norm.weight is None:
        return None
    arguments = (
        x,
        cast_of(linear.weight),
        cast_of(linear.bias),
        residual,
        norm.weight,
        norm.bias,
        norm.eps,
        p,
        pre_norm,
    )
    kernel = LINEAR_ADD_LAYER_NORM.kernel(*arguments)
    return None if kernel is None else sum_first(kernel.run(*arguments))


def fused_feed_forward(x: Tensor, parts: FeedForwardParts, norm: Any = None, residual: Tensor | None = None) -> Any:
    """The block in few launches, None where no kernel does it; without a norm or a residual, without the dropout behind it.

    With a norm: norm(x + dropout(block(x))). With a residual in x's place: the sum, with a norm (the sum, its norm).
    """
    first, second = parts.first, parts.second
    wide = second.weight.shape[0] > MAX_COLUMNS  # such rows fit no tile of a product
    if (wide and not (norm is None and residual is None)) or (norm is not None and norm.weight is None):
        return None
    weights = [*map(cast_of, (first.weight, first.bias, second.weight, second.bias))]
    behind = (None, None, 0.0) if norm is None else (norm.weight, norm.bias, norm.eps)
    both = norm is not None and residual is not None
    settings = (parts.activation, parts.dropout_p, parts.output_dropout_p, residual, both)
    kernel = FEED_FORWARD.kernel(x, *weights, *behind, *settings)
    return None if kernel is None else sum_first(kernel.run(x, *weights, *behind, *settings))


def sum_first(found: Any) -> Any:
    """What comes of (the norm, the sum) in the order in which a layer uses them, or the norm alone."""
    return found[::-1] if isinstance(found, tuple) else found
