"""Blocks of a layer in few launches: attention's output projection and the feed-forward block, each with its dropout,
residual and LayerNorm (post-norm), or with the sum and the norm of the block behind it (pre-norm).

Fusing is legal only while each part is exactly the class that is expected and bare (see `is_bare`); otherwise, and where the dispatcher does not choose a fused kernel, the parts run one by one.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from detr_fast import dispatch
from detr_fast.kernels.linear_norm import MAX_COLUMNS
from detr_fast.nn.bare import is_bare
from detr_fast.nn.blocks import (
    FeedForwardParts,
    activation_name,
    fused_feed_forward,
    fused_linear,
    norm_of_sum,
    norms_are_free,
    probability,
    rms_norms_are_free,
    sum_and_norm,
    sum_first,
)
from detr_fast.nn.casts import cast_of, linear
from detr_fast.nn.multihead_attention import MultiheadAttention, attention_inputs
from detr_fast.nn.normalization import LayerNorm, RMSNorm
from detr_fast.ops.add_rms_norm import add_rms_norm
from detr_fast.ops.dropout import recording
from detr_fast.ops.layer_norm import LAYER_NORM
from detr_fast.ops.linear_add_layer_norm import LINEAR_ADD_LAYER_NORM

_CLASSES = {nn.Linear, NonDynamicallyQuantizableLinear, nn.Dropout, LayerNorm, nn.LayerNorm, MultiheadAttention}
_RMS_NORMS = {RMSNorm, nn.RMSNorm}


def attend_add_norm(
    attention: Any,
    dropout: Any,
    norm: Any,
    x: Tensor,
    memory: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    position: Tensor | None = None,
    memory_key: Tensor | None = None,
    **masks: Any,
) -> Any:
    """norm(x + dropout(attention(x + position, key, value))), batch first or not as the attention is.

    Key and value: see `MultiheadAttention.heads`. With a residual, which is added in x's place, as a pre-norm layer goes
    on: (the sum, its norm).
    """
    pre_norm = residual is not None
    if _may_fuse(x, attention, dropout, norm) and _plain(attention.out_proj):
        projection, parameters = attention.out_proj, (norm.weight, norm.bias, norm.eps, probability(dropout), pre_norm)
        weights = (cast_of(projection.weight), cast_of(projection.bias))
        # What attention gives looks like x; the choice is made before anything is computed.
        fused = LINEAR_ADD_LAYER_NORM.kernel(x, *weights, x if residual is None else residual, *parameters)
        if fused is not None:
            sources: Any = {"position": position, "memory_key": memory_key}
            found = attention.heads(x, memory, **sources, **masks)
            if found is not None:
                heads, x = found
                return sum_first(fused.run(heads, *weights, x if residual is None else residual, *parameters))
    query, key, value = attention_inputs(x, memory, position, memory_key)
    y = attention(query, key, value, need_weights=False, **masks)[0]
    return add_norm(y, x if residual is None else residual, dropout, norm, pre_norm)


def project_add_norm(
    attention: Any, dropout: Any, norm: Any, heads: Tensor, residual: Tensor, pre_norm: bool = False
) -> Any:
    """norm(residual + dropout(attention.out_proj(heads))), where what attention gives was computed elsewhere.

    pre_norm: (the sum, its norm).
    """
    projection = attention.out_proj
    if _may_fuse(heads, attention, dropout, norm) and _plain(projection):
        fused = fused_linear(heads, projection, residual, norm, probability(dropout), pre_norm)
        if fused is not None:
            return fused
    return add_norm(linear(projection, heads), residual, dropout, norm, pre_norm)


def feed_forward_add_norm(
    x: Tensor, linear1: Any, activation: Any, dropout: Any, linear2: Any, output_dropout: Any, norm: Any
) -> Tensor:
    """norm(x + output_dropout(linear2(dropout(activation(linear1(x))))))."""
    parts = (linear1, activation, dropout, linear2)
    fused = _fused_feed_forward(x, *parts, output_dropout, norm)
    if fused is not None:
        return fused
    return add_norm(_without_sum(x, *parts), x, output_dropout, norm)


def feed_forward_sum(
    layer: Any,
    n: Tensor,
    residual: Tensor,
    linear1: Any,
    activation: Any,
    dropout: Any,
    linear2: Any,
    output_dropout: Any,
) -> Tensor:
    """residual + output_dropout(linear2(dropout(activation(linear1(n))))), which a pre-norm layer returns.

    Where a norm follows on the layer (`norms_ahead`), it is taken here, and `normed` finds it.
    """
    parts = (linear1, activation, dropout, linear2)
    norm = following_norm(layer)
    found = _fused_feed_forward(n, *parts, output_dropout, norm, residual)
    if found is None:
        y = _without_sum(n, *parts)
        if norm is None:
            return residual + output_dropout(y)
        found = add_norm(y, residual, output_dropout, norm, pre_norm=True)
    if norm is None:
        return found
    total, following = found
    leave_ahead(total, norm, following)
    return total


def _fused_feed_forward(
    x: Tensor,
    linear1: Any,
    activation: Any,
    dropout: Any,
    linear2: Any,
    output_dropout: Any,
    norm: Any,
    residual: Tensor | None = None,
) -> Any:
    """The block up to its norm, or its sum, in few launches; None where its parts are to run."""
    name = activation_name(activation)
    ends = (linear2,) if norm is None else (linear2, norm)
    if name is None or not _may_fuse(x, linear1, dropout, output_dropout, *ends):
        return None
    parts = FeedForwardParts(linear1, name, probability(dropout), linear2, probability(output_dropout))
    return fused_feed_forward(x, parts, norm, residual)


def _without_sum(x: Tensor, linear1: Any, activation: Any, dropout: Any, linear2: Any) -> Tensor:
    """linear2(dropout(activation(linear1(x)))), where no kernel takes what is behind it as well: rows too wide for a tile."""
    name = activation_name(activation)
    if name is not None and x.shape[-1] > MAX_COLUMNS and _may_fuse(x, linear1, dropout, linear2):
        fused = fused_feed_forward(x, FeedForwardParts(linear1, name, probability(dropout), linear2, 0.0))
        if fused is not None:
            return fused
    return linear(linear2, dropout(activation(linear(linear1, x))))


def add_norm(y: Tensor, x: Tensor, dropout: Any, norm: Any, pre_norm: bool = False) -> Any:
    """norm(x + dropout(y)), which is one op while both are plain; pre_norm: (the sum, its norm)."""
    one_shape = y.shape == x.shape  # the sum may broadcast one of them
    if one_shape and _may_fuse(x, dropout, norm) and norm.weight.ndim == 1 and norms_are_free():
        return (sum_and_norm if pre_norm else norm_of_sum)(y, x, norm, probability(dropout))
    if one_shape and _takes_sum(x, dropout, norm):
        return sum_first(add_rms_norm(y, x, norm.weight, norm.eps, probability(dropout), pre_norm))
    total = x + dropout(y)
    return (total, norm(total)) if pre_norm else norm(total)


class _Ahead(threading.local):
    """What a pre-norm layer need not do itself: the norms that follow on layers, and the last one that was taken early."""

    norms: dict[Any, Any] | None = None
    found: tuple[Tensor, Any, Tensor] | None = None
    entered: Any = None


_ahead = _Ahead()


def followed(layers: Iterable[Any], last: Any) -> list[tuple[Any, Any]]:
    """Each pre-norm layer and the norm its output meets next, where no hook of either layer may come between.

    Not a layer that occurs twice: what follows on it differs.
    """
    layers = list(layers)
    if torch.compiler.is_compiling():
        return []  # nothing is taken ahead in a graph
    free = [*map(is_bare, layers), True]
    norms = [*(layer._modules.get("norm1") for layer in layers[1:]), last]
    before = [getattr(layer, "norm_first", False) or getattr(layer, "pre_norm", False) for layer in layers] + [True]
    pairs = []
    for i, (layer, norm) in enumerate(zip(layers, norms)):
        taken = before[i] and before[i + 1] and free[i] and free[i + 1] and layers.count(layer) == 1
        if taken and norm is not None and is_bare(norm):
            pairs.append((layer, norm))
    return pairs


@contextmanager
def norms_ahead(followed: Iterable[tuple[Any, Any]]) -> Iterator[None]:
    """Inside the block, the norm that follows on a layer (layer, norm) is taken together with the layer's last sum."""
    before = _ahead.norms, _ahead.found, _ahead.entered
    if not torch.compiler.is_compiling():
        _ahead.norms, _ahead.found, _ahead.entered = dict(followed), None, recording()
    try:
        yield
    finally:
        if not torch.compiler.is_compiling():
            _ahead.norms, _ahead.found, _ahead.entered = before


def following_norm(layer: Any) -> Any:
    """The norm that follows on the layer, or None where that is not to be taken with the layer's last sum."""
    if torch.compiler.is_compiling() or _ahead.norms is None or _ahead.entered != recording():
        return None
    return _ahead.norms.get(layer)


def taken_ahead(norm: Any, x: Tensor) -> Tensor | None:
    """norm(x), where that was taken together with x itself."""
    found = _ahead.found
    return found[2] if found is not None and found[0] is x and found[1] is norm else None


def leave_ahead(total: Tensor, norm: Any, following: Tensor) -> None:
    """Leave norm(total) for `normed` to find."""
    _ahead.found = (total, norm, following)


def take_ahead() -> Tensor:
    """The norm that was left."""
    assert _ahead.found is not None
    (_, _, following), _ahead.found = _ahead.found, None
    return following


def normed(norm: Any, x: Tensor) -> Tensor:
    """norm(x), which `feed_forward_sum` may have taken already."""
    if not torch.compiler.is_compiling() and _ahead.found is not None:
        (total, of, n), _ahead.found = _ahead.found, None
        if total is x and of is norm:
            return n
    return norm(x)


def _may_fuse(x: Tensor, *parts: Any) -> bool:
    """Whether the parts may be taken apart for a kernel, which a tensor on a CPU leaves at once."""
    if not (dispatch.intervening or x.is_cuda) or x.is_nested:
        return False
    # Who asks for another norm by name gets that one.
    return LAYER_NORM.requested in (None, "triton") and all(map(_plain, parts)) and parts[-1].weight is not None


def _takes_sum(x: Tensor, dropout: Any, norm: Any) -> bool:
    """Whether it is an RMSNorm that a user has put in place of a LayerNorm, and the sum before it may be taken with it."""
    if type(norm) not in _RMS_NORMS or not (dispatch.intervening or x.is_cuda) or x.is_nested:
        return False
    return rms_norms_are_free() and len(norm.normalized_shape) == 1 and is_bare(norm) and _plain(dropout)


def _plain(part: Any) -> bool:
    return type(part) in _CLASSES and is_bare(part)
