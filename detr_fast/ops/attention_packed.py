"""Attention over what projections give, before it is taken apart into q, k and v: gradients come packed as well.

A pack is (B, L, n, H, E): n of q, k and v, in this order, from one product. The packs of a call hold all three: (qkv,),
(q, kv), (qk, v) or (q, k, v). The kernels read and write them through their strides, so that no gradients are put together
afterwards. The contract is otherwise that of `ops.attention`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from detr_fast.dispatch import Implementation
from detr_fast.kernels.attention import empty_rows
from detr_fast.kernels.attention_problem import whole_runs
from detr_fast.kernels.launch import empty
from detr_fast.ops.attention_autograd import (
    OPTIONS,
    attention_problem,
    fake_forward,
    reference,
    run_backward,
    run_forward,
)
from detr_fast.ops.attention_triton import TritonAttention, autocast, autocast_dtype, drawn
from detr_fast.ops.boundary import define, wants_grad
from detr_fast.ops.products import eager_gradients, goes_by_eager_ops


def run_packed(
    implementation: Implementation,
    packs: list[Tensor],
    padding: Tensor | None,
    mask: Tensor | None,
    is_causal: bool,
    dropout_p: float,
    scale: float | None = None,
) -> Tensor:
    """Attention by that implementation, (B, L, H, E)."""
    if not isinstance(implementation, TritonAttention):
        return implementation.run(*unpacked(packs), padding, mask, is_causal, dropout_p, scale)
    *packs, mask = autocast(autocast_dtype(packs[0]), *packs, mask)
    return _forward(packs, padding, mask, *drawn(packs[0], is_causal, dropout_p, scale), implementation.atomics)[0]


def unpacked(packs: list[Tensor]) -> list[Tensor]:
    """q, k and v, each (B, L, H, E), as views."""
    return [part for pack in packs for part in (pack.unbind(2) if pack.shape[2] > 1 else (pack.squeeze(2),))]


def _run_forward(packs: list[Tensor], *rest: Any) -> tuple[Tensor, Tensor]:
    return run_forward(*unpacked(packs), *rest)  # type: ignore[call-arg]


def _fake_forward(packs: list[Tensor], *rest: Any) -> tuple[Tensor, Tensor]:
    return fake_forward(*unpacked(packs), *rest)


def _like(pack: Tensor, allocate: Any = empty) -> Tensor:
    """An empty tensor laid out as the pack is, or contiguous where that has gaps; rows are whole runs of 16 bytes."""
    packed, heads, dim = pack.shape[2:]
    dim = whole_runs(dim, pack.dtype)
    rows = empty_rows(pack.select(2, 0), packed * dim, allocate)
    return rows.view(*pack.shape[:2], packed, heads, dim)


def _cut(gradient: Tensor, pack: Tensor) -> Tensor:
    return gradient if gradient.shape == pack.shape else gradient[..., : pack.shape[4]]


def _run_backward(
    dout: Tensor,
    packs: list[Tensor],
    padding: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    with_mask: bool,
    *options: Any,
) -> list[Tensor]:
    """The packs' gradients, and the mask's behind them."""
    gradients = [_like(pack) for pack in packs]
    problem = attention_problem(*unpacked(packs), padding, mask, seed, options)  # type: ignore[call-arg,arg-type]
    given = {"with_mask": with_mask, "atomics": options[-1], "into": unpacked(gradients)}
    *_, dmask = run_backward(problem, out, lse, dout, None, **given)
    return [*map(_cut, gradients, packs), *([] if dmask is None else [dmask])]


def _fake_backward(
    dout: Tensor, packs: list[Tensor], padding: Any, mask: Any, seed: Any, out: Tensor, lse: Tensor, *rest: Any
) -> list[Tensor]:
    made = [_cut(_like(pack, lambda shape, dtype, device, pack=pack: pack.new_empty(shape)), pack) for pack in packs]
    return [*made, mask.new_empty(mask.shape)] if rest[0] else made


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, padding: Any, mask: Any, seed: Any, options: Any, *packs: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = _forward.below(list(packs), padding, mask, seed, *options)
        ctx.save_for_backward(padding, mask, seed, out, lse, *packs)
        ctx.options = options
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, _: Any) -> Any:
        padding, mask, seed, out, lse, *packs = ctx.saved_tensors
        if dout is None:
            return (None,) * (4 + len(packs))
        with_mask, wanted = ctx.needs_input_grad[1], ctx.needs_input_grad[4:]
        if goes_by_eager_ops(dout):

            def again(mask: Tensor | None, *packs: Tensor) -> Tensor:
                q, k, v = unpacked(list(packs))
                return reference(q, k, v, padding, mask, seed, ctx.options)

            dmask, *gradients = eager_gradients(again, (mask, *packs), dout, (with_mask, *wanted))
        else:
            gradients = _backward(dout, packs, padding, mask, seed, out, lse, with_mask, *ctx.options)
            dmask = gradients.pop() if with_mask else None
        return None, dmask, None, None, *(g if want else None for g, want in zip(gradients, wanted))


def _autograd_forward(packs: list[Tensor], padding: Any, mask: Any, seed: Any, *options: Any) -> Any:
    if wants_grad(mask, *packs):
        return _Forward.apply(padding, mask, seed, options, *packs)
    return _forward.below(packs, padding, mask, seed, *options)


def _autograd_backward(*arguments: Any) -> Any:
    return _backward.below(*arguments)


_OPTIONS = f"{OPTIONS}, bool atomics"
_forward = define(
    f"attention_packed(Tensor[] packs, Tensor? padding, Tensor? mask, Tensor? seed, {_OPTIONS}) -> (Tensor, Tensor)",
    run=_run_forward,
    fake=_fake_forward,
    autograd=_autograd_forward,
)
_backward = define(
    "attention_packed_backward(Tensor dout, Tensor[] packs, Tensor? padding, Tensor? mask, Tensor? seed, Tensor out, "
    f"Tensor lse, bool with_mask, {_OPTIONS}) -> Tensor[]",
    run=_run_backward,
    fake=_fake_backward,
    autograd=_autograd_backward,
)
