"""DETR's attention in Hugging Face transformers, taken apart as `nn.MultiheadAttention` is: for layers that run on kernels as a whole.

Its queries, keys and values have a weight each. Self-attention joins them, which costs a copy of the weights, and projects in
one product, in whose memory attention reads; the output projection has dropout, residual and norm in its launch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from detr_fast.adapters.hugging_face import split
from detr_fast.nn.blocks import norm_of_sum, sum_first
from detr_fast.nn.casts import cast_of
from detr_fast.ops.attention import ATTENTION
from detr_fast.ops.attention_packed import run_packed, unpacked
from detr_fast.ops.linear_add_layer_norm import LINEAR_ADD_LAYER_NORM
from detr_fast.ops.qkv_projection import TILE, project
from detr_fast.situation import in_layer

# What DETR's layers give their attentions; anything else is for the attentions themselves.
_KNOWN = {"attention_mask", "position_embeddings", "key_value_states", "encoder_position_embeddings"}


def attend_add_norm(attention: Any, norm: Any, p: float, x: Tensor, given: dict[str, Any]) -> Tensor:
    """norm(x + dropout(attention(x, ...))), of what the attention is given by name; in few launches where it may be taken apart."""
    found = _fused(attention, norm, p, x, **given) if in_layer() and given.keys() <= _KNOWN else None
    return norm_of_sum(attention(hidden_states=x, **given)[0], x, norm, p) if found is None else found


def _fused(
    attention: Any,
    norm: Any,
    p: float,
    x: Tensor,
    attention_mask: Tensor | None,
    position_embeddings: Tensor | None,
    key_value_states: Tensor | None = None,
    encoder_position_embeddings: Tensor | None = None,
) -> Any:
    """The same of an attention whose contents are known (see `detr_layer`); None where no kernel does it."""
    options = (*split(attention_mask), False, attention.attention_dropout if attention.training else 0.0)
    sources = (x, position_embeddings, key_value_states, encoder_position_embeddings)
    return fused(attention, attention.o_proj, norm, p, sources, options)


def fused(
    attention: Any,
    projection: Any,
    norm: Any,
    p: float,
    sources: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None],
    options: tuple[Any, ...],
    residual: Tensor | None = None,
) -> Any:
    """norm(x + dropout(projection(attention of x))); None where no kernel does it.

    sources: x, its position, the memory and its position, None in place of x itself. options: what `ops.attention` is given
    behind the heads, from the padding to the dropout. residual: in x's place, for (the sum, its norm).
    """
    x, position, memory, memory_position = sources
    weights = _parameters(projection)
    behind = (norm.weight, norm.bias, norm.eps, p, residual is not None)
    kernel = LINEAR_ADD_LAYER_NORM.kernel(x, *weights, x if residual is None else residual, *behind)
    if kernel is None:
        return None
    if memory is None:
        packs, x = _own(attention, x, position)
    else:
        packs, x = _cross(attention, x, position, memory, memory_position)
    width = projection.in_features
    heads = [pack.unflatten(-1, (-1, width // attention.head_dim, attention.head_dim)) for pack in packs]
    implementation = ATTENTION.choose(*unpacked(heads), *options, None, False, False, None)
    y = run_packed(implementation, heads, *options).flatten(2)
    return sum_first(kernel.run(y, *weights, x if residual is None else residual, *behind))


def _own(attention: Any, x: Tensor, position: Tensor | None) -> tuple[list[Tensor], Tensor]:
    """Self-attention's projections, and x to go on with (see `project`)."""
    weights, biases = zip(*map(_parameters, (attention.q_proj, attention.k_proj, attention.v_proj)))
    columns = 2 * weights[0].shape[0]
    found = None
    if position is None or columns % TILE == 0:
        found = project(x, _joined(weights), _joined(biases), position, columns)
    if found is not None:
        return [found[0]], found[1]
    assert position is not None  # two products: of x + position, and of x
    both = F.linear(x + position, _joined(weights[:2]), _joined(biases[:2]))
    found = project(x, weights[2], biases[2])
    assert found is not None
    return [both, found[0]], found[1]


def _cross(
    attention: Any, x: Tensor, position: Tensor | None, memory: Tensor, memory_position: Tensor | None
) -> tuple[list[Tensor], Tensor]:
    weight, bias = _parameters(attention.q_proj)
    keys = memory if memory_position is None else memory + memory_position
    key, value = (F.linear(t, *_parameters(one)) for t, one in ((keys, attention.k_proj), (memory, attention.v_proj)))
    found = project(x, weight, bias, position, weight.shape[0])
    assert found is not None  # its position is in all columns
    return [found[0], key, value], found[1]


def _joined(parameters: Any) -> Any:
    return None if parameters[0] is None else torch.cat(parameters)


def _parameters(linear: Any) -> tuple[Tensor, Tensor | None]:
    return cast_of(linear.weight), cast_of(linear.bias)
