"""One encoder memory, read by every layer of a decoder: its keys and values for all of them in one product.

A decoder says so for the length of its forward (`shared_memory`); the first of its layers whose attention runs on our code
projects for all, and the others find their share. Parameters stay where they are. Where hooks may bring or change them
(pruning, offloading, FSDP2), each layer projects by itself.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from detr_fast.nn.bare import is_bare
from detr_fast.ops.boundary import wants_grad
from detr_fast.ops.dropout import recording
from detr_fast.ops.products import goes_by_eager_ops
from detr_fast.ops.qkv_projection import QKV_PROJECTION, TritonQkvProjection


class Projected(NamedTuple):
    """A memory as one layer's attention reads it.

    weight, bias: what remains to project queries with. packs: of k and v, (B, S, n, H, E) (see `run_packed`).
    """

    weight: Tensor
    bias: Tensor | None
    packs: list[Tensor]


class _Memory:
    def __init__(self, attentions: Sequence[Any], memory: Tensor, position: Tensor | None, key: Tensor | None) -> None:
        self.attentions = list(dict.fromkeys(attentions))
        self.memory, self.position, self.key = memory, position, key
        # A region that is checkpointed inside the block is recomputed outside, where nothing is shared.
        self.entered = recording()
        self.shares: dict[Any, Projected] | None = None


def readers(layers: Iterable[Any]) -> list[Any]:
    """The attentions of a decoder's layers to its memory; none where a hook of a layer's may change what they hold."""
    layers = [] if torch.compiler.is_compiling() else list(layers)
    # A wrapper (FSDP1's) has its layer's attention, but not as a child.
    if not all(is_bare(layer) and "multihead_attn" in layer._modules for layer in layers):
        return []
    return [layer.multihead_attn for layer in layers]


@contextmanager
def shared_memory(
    attentions: Sequence[Any], memory: Tensor, position: Tensor | None = None, key: Tensor | None = None
) -> Iterator[None]:
    """Inside the block, layers with these attentions all attend to `memory`, by keys from `key`, memory + position."""
    if torch.compiler.is_compiling():
        yield
        return
    outer = getattr(_local, "memory", None)
    _local.memory = _Memory(attentions, memory, position, key) if len(attentions) > 1 and memory.ndim == 3 else None
    try:
        yield
    finally:
        _local.memory = outer


@contextmanager
def given_share(share: tuple[Any, Projected] | None) -> Iterator[None]:
    """Inside the block, that attention's share of its memory is this one."""
    outer = getattr(_local, "given", None)
    _local.given = share
    try:
        yield
    finally:
        _local.given = outer


def share_of(attention: Any, memory: Tensor, key: Tensor | None) -> Projected | None:
    """That attention's share of the memory, whose keys are `key`'s, or None where it is to project by itself."""
    if torch.compiler.is_compiling():
        return None
    given = getattr(_local, "given", None)
    if given is not None and given[0] is attention:
        return given[1]  # type: ignore[no-any-return]
    shared = getattr(_local, "memory", None)
    key = None if key is memory else key
    if shared is None or shared.memory is not memory or shared.key is not key or shared.entered != recording():
        return None
    if shared.shares is None:
        shared.shares = _project(shared) if _alike(attention, shared.attentions) else {}
    return shared.shares.get(attention)


def _alike(attention: Any, others: list[Any]) -> bool:
    """Whether the attention is one of them, and one product can serve all."""

    def kind(one: Any) -> tuple[Any, ...]:
        biases = (one.in_proj_bias is None, one.bias_k is None, one.add_zero_attn)
        weight = one.in_proj_weight  # None where keys or values have another width
        return one.embed_dim, one.num_heads, one.batch_first, biases, None if weight is None else weight.dtype

    if attention not in others or any(type(one) is not type(attention) or not is_bare(one) for one in others):
        return False
    return len({kind(one) for one in others}) == 1


def _project(shared: _Memory) -> dict[Any, Projected]:
    attentions, memory = shared.attentions, shared.memory
    weights, biases = zip(*(attention.in_parameters([3]) for attention in attentions))
    (weights,), (biases,) = zip(*weights), zip(*biases)  # one for each layer
    biased = biases[0] is not None
    found = _Joined.apply(len(weights), *weights, *(biases if biased else ()))
    (weight, *queries), others = found[: len(weights) + 1], found[len(weights) + 1 :]
    bias, *query_biases = others if biased else (None, *biases)
    arguments = (memory, weight, bias, shared.position, weight.shape[0] // 2)
    if shared.key is None:
        packs = [_by_layer(attentions, F.linear(memory, weight, bias))]
    elif isinstance(kernel := QKV_PROJECTION.choose(*arguments), TritonQkvProjection):
        packs = [_by_layer(attentions, kernel.run(*arguments))]
    else:
        halves = (None, None) if bias is None else bias.chunk(2)
        products = map(F.linear, (shared.key, memory), weight.chunk(2), halves)
        packs = [_by_layer(attentions, y) for y in products]
    sources = (memory, shared.key, shared.position)
    shares = {}
    for attention, w, b, *pack in zip(attentions, queries, query_biases, *packs):
        # What was projected beside trained layers' weights must not look trained where it is not: attention is chosen by
        # the layer's own parameters, and would have a backward without need.
        own = (attention.in_proj_weight, attention.in_proj_bias)
        w, b = (t if t is None or wants_grad(p) else t.detach() for t, p in zip((w, b), own))
        shares[attention] = Projected(w, b, pack if wants_grad(*sources, *own) else [t.detach() for t in pack])
    return shares


class _Joined(torch.autograd.Function):
    """Layers' weights (3 * C, C), and their biases (3 * C,) behind them if any: of each kind the keys' rows of all layers, behind them
    the values', joined; and each layer's queries' rows.

    By `split` and `cat` the backward would take a launch for each of them; this one copies all gradients in one.
    """

    @staticmethod
    def forward(ctx: Any, layers: int, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.looks = [(p.shape, p.dtype, p.device) for p in parameters]
        found: list[Tensor] = []
        for start in range(0, len(parameters), layers):
            queries, keys, values = zip(*(parameter.chunk(3) for parameter in parameters[start : start + layers]))
            found += [torch.cat([*keys, *values]), *queries]
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *arriving: Tensor | None) -> Any:
        layers = len(ctx.looks) // (1 + (len(arriving) > len(ctx.looks) + 1))
        parts: list[tuple[Tensor | None, ...]] = []
        for start in range(0, len(arriving), layers + 1):
            joined, *queries = arriving[start : start + layers + 1]
            shares = [None] * 2 * layers if joined is None else joined.chunk(2 * layers)
            parts += zip(queries, shares[:layers], shares[layers:])
        wanted = ctx.needs_input_grad[1:]
        eagerly = goes_by_eager_ops(*arriving)
        made = [torch.empty(s, dtype=t, device=d) if want else None for (s, t, d), want in zip(ctx.looks, wanted)]
        found = list(made)
        targets: list[Tensor] = []
        sources: list[Tensor] = []
        for i, (gradient, three) in enumerate(zip(made, parts)):
            if gradient is None:
                continue
            places = gradient.chunk(3)
            given = [torch.zeros_like(place) if one is None else one for one, place in zip(three, places)]
            if eagerly:
                found[i] = torch.cat(given)
            else:
                targets += places
                sources += given
        if targets:
            torch._foreach_copy_(targets, sources)
        return None, *found


def _by_layer(attentions: list[Any], y: Tensor) -> tuple[Tensor, ...]:
    """(B, S, n * layers * C), or sequence first -> for each layer (B, S, n, H, E)."""
    first = attentions[0]
    packs = y.shape[-1] // (len(attentions) * first.embed_dim)
    shape = (*y.shape[:-1], packs, first.num_heads, first.head_dim)  # no -1: a batch may be empty
    rows = y.numel() // (len(attentions) * first.embed_dim)
    # Of three dimensions: PyTorch stacks gradients of up to four in one launch, else one by one.
    shares = [share.view(shape) for share in y.reshape(rows, len(attentions), first.embed_dim).unbind(1)]
    return tuple(shares if first.batch_first else [share.transpose(0, 1) for share in shares])


_local = threading.local()
