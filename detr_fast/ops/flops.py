"""What our ops' matrix products count in `torch.utils.flop_counter.FlopCounterMode`: what PyTorch's own operations count there.

Attention is dense: padding, masks and causality take nothing off, and its backward computes the scores again, as that of
`scaled_dot_product_attention` on GPUs. Only sequences one behind the other count by their own lengths. Products that a backward
leaves to torch are counted as torch's. Sources: `torch.utils.flop_counter`'s formulas.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

Shape = Sequence[int]


def _product(x: Shape, columns: int) -> int:
    """x (..., C), or images (B, C, H, W), times (C, columns)."""
    return 2 * prod(x) * columns


def _attention(q: Shape, k: Shape, v: Shape, *_: Any, **__: Any) -> int:
    """q @ k^T and weights @ v, of (B, L, H, E)."""
    return 2 * prod(q[:3]) * k[1] * (q[3] + v[3])


def _attention_backward(_: Any, __: Any, q: Shape, k: Shape, v: Shape, *___: Any, **____: Any) -> int:
    """The scores again, and the gradients of q and k; those of the weights and v."""
    return 2 * prod(q[:3]) * k[1] * (3 * q[3] + 2 * v[3])


def _unpacked(packs: Sequence[Shape]) -> list[Shape]:
    """q, k and v, (B, L, H, E), of packs (B, L, n, H, E)."""
    return [(*pack[:2], *pack[3:]) for pack in packs for _ in range(pack[2])]


def _attention_packed(packs: Sequence[Shape], *_: Any, **__: Any) -> int:
    q, k, v = _unpacked(packs)
    return _attention(q, k, v)


def _attention_packed_backward(dout: Shape, packs: Sequence[Shape], *_: Any, **__: Any) -> int:
    q, k, v = _unpacked(packs)
    return _attention_backward(dout, None, q, k, v)


def _pairs(ends_q: Tensor, ends_k: Tensor, max_q: int, max_k: int) -> int:
    """How many queries meet how many keys, over all sequences; where no lengths can be read, were all of them the longest."""
    if type(ends_q) not in (Tensor, torch.nn.Parameter) or ends_q.is_meta:
        return (len(ends_q) - 1) * max_q * max_k
    return int((ends_q.diff().long() * ends_k.diff().long()).sum())


def _attention_varlen(q: Tensor, k: Tensor, v: Tensor, *lengths: Any, out_val: Any = None) -> int:
    return 2 * q.shape[1] * _pairs(*lengths[:4]) * (q.shape[2] + v.shape[2])


def _attention_varlen_backward(dout: Tensor, dlse: Any, out: Any, lse: Any, _: Any, *packed: Any, **__: Any) -> int:
    q, _, v, *lengths = packed
    return 2 * q.shape[1] * _pairs(*lengths[:4]) * (3 * q.shape[2] + 2 * v.shape[2])


def _linear(x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return _product(x, weight[0])


def _feed_forward(x: Shape, w1: Shape, b1: Any, w2: Shape, *_: Any, **__: Any) -> int:
    return _product(x, w1[0]) + _product((*x[:-1], w1[0]), w2[0])


def _feed_forward_backward(
    dy: Shape,
    dsum: Any,
    xhat: Any,
    rstd: Any,
    norm_weight: Any,
    w2: Shape,
    saved: Any,
    active: Any,
    *rest: Any,
    **_: Any,
) -> int:
    """The hidden activation's gradient; and that activation again, where the forward kept none."""
    x, w1 = rest[:2]
    return _product(dy, w2[1]) + (0 if x is None else _product(x, w1[0]))


def _prediction_heads(x: Shape, *parameters: Any, **_: Any) -> int:
    """Of each layer as many as its weight has elements, for each row, twice."""
    return 2 * prod(x[:-1]) * sum(prod(w) for w in parameters[:8:2] if w is not None)


def _prediction_heads_backward(dy: Shape, dclasses: Any, x: Shape, *rest: Any, **_: Any) -> int:
    """Each layer's input's gradient, x's where that is wanted, and each weight's."""
    *parameters, wanted = rest[3:]
    layers = _prediction_heads(x, *parameters)
    first = _prediction_heads(x, parameters[0], *[None] * 5, parameters[6])
    return layers - first + wanted[0] * first + wanted[1] * layers


def _linear_cross_entropy(x: Shape, weight: Shape, *rest: Any, **_: Any) -> int:
    """The logits, and the gradients of x and weight, which the forward computes where they are wanted."""
    wants_x, wants_weight = rest[-1][:2]
    return _product(x, weight[0]) * (1 + wants_x + wants_weight)


def _affine_pool(x: Shape, *_: Any, **__: Any) -> int:
    """Behind a convolution of 4 x 4 x 16 that stands for one of 7 x 7 x 3: the weights between are zero, and eager has none."""
    return -2 * prod(x) * (4 * 4 * 16 - 7 * 7 * 3)


_BY_SHAPES: dict[str, Callable[..., int]] = {
    "attention": _attention,
    "attention_backward": _attention_backward,
    "attention_packed": _attention_packed,
    "attention_packed_backward": _attention_packed_backward,
    "pointwise_affine": _linear,
    "pointwise_gradient": lambda g, weight, *_, **__: _product(g, weight[1]),
    "qkv_projection": _linear,
    "linear_add_layer_norm": _linear,
    "feed_forward": _feed_forward,
    "feed_forward_backward": _feed_forward_backward,
    "linear_cross_entropy": _linear_cross_entropy,
    "prediction_heads": _prediction_heads,
    "prediction_heads_backward": _prediction_heads_backward,
    "affine_pool": _affine_pool,
}
_BY_VALUES: dict[str, Callable[..., int]] = {
    "attention_varlen": _attention_varlen,
    "attention_varlen_backward": _attention_varlen_backward,
}
# In place, as our backwards add a product to a gradient, torch counts none.
flop_registry.setdefault(torch.ops.aten.addmm_, flop_registry[torch.ops.aten.addmm])


def register(name: str, op: Any) -> None:
    """Tell FlopCounterMode of an op, an OpOverloadPacket. A counter knows what was registered when it was made."""
    if name in _BY_SHAPES:
        register_flop_formula(op)(_BY_SHAPES[name])
    elif name in _BY_VALUES:
        register_flop_formula(op, get_raw=True)(_BY_VALUES[name])
