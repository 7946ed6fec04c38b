"""Attention's kernels as ops, and their gradients: forward, backward and weights are ops of their own, each with an autograd kernel.

Their log-sum-exp is in base 2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from detr_fast.kernels import attention as kernels
from detr_fast.kernels import attention_backward as backward_kernels
from detr_fast.kernels import attention_backward_atomics as atomics_kernels
from detr_fast.kernels import attention_weights as weights_kernels
from detr_fast.kernels.attention_problem import Problem, whole_runs
from detr_fast.ops.attention_eager import attention_weights, dropped, weighted_sum
from detr_fast.ops.boundary import define, double_backward, isolated, wants_grad

# is_causal, dropout_p, scale, offset of the seed, tf32; atomics where there is a backward, whose choice is the forward's.
Options = tuple[Any, ...]


def attention_problem(
    q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, mask: Tensor | None, seed: Tensor | None, options: Options
) -> Problem:
    causal, dropout_p, scale, offset, tf32 = options[:5]
    return Problem(
        q, k, v, padding, mask, causal=causal, scale=scale, dropout_p=dropout_p, seed=seed, offset=offset, tf32=tf32
    )


def run_forward(
    q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, mask: Tensor | None, seed: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor]:
    return kernels.attention_forward(attention_problem(q, k, v, padding, mask, seed, options))  # type: ignore[arg-type]


def fake_forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    batch, length, heads, _ = q.shape
    return like_rows(q, v.shape[3]), q.new_empty((batch, heads, length), dtype=torch.float32)


def like_rows(q: Tensor, dim: int) -> Tensor:
    """What the kernels leave of (B, L, H, dim), without memory."""
    rows = kernels.empty_rows(q, whole_runs(dim, q.dtype), lambda shape, dtype, device: q.new_empty(shape))
    return kernels.cut_rows(rows, dim)


def _run_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    padding: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    with_mask: bool,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    problem = attention_problem(q, k, v, padding, mask, seed, options)  # type: ignore[arg-type]
    dq, dk, dv, dmask = run_backward(problem, out, lse, dout, dlse, with_mask=with_mask, atomics=options[-1])
    return dq, dk, dv, q.new_empty(0) if dmask is None else dmask


def run_backward(
    problem: Problem, *tensors: Tensor | None, with_mask: bool = False, atomics: bool, into: Any = None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The backward that was chosen with the forward, of out, lse, dout and dlse."""
    if atomics and not with_mask:
        return *atomics_kernels.attention_backward_atomics(problem, *tensors, into=into), None
    return backward_kernels.attention_backward(problem, *tensors, with_mask=with_mask, into=into)


def _fake_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, mask, _, _, _, with_mask, *_ = rest
    dmask = q.new_empty(0) if mask is None or not with_mask else mask.new_empty(mask.shape)
    return like_rows(q, q.shape[3]), like_rows(k, k.shape[3]), like_rows(v, v.shape[3]), dmask


def reference(
    q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, mask: Tensor | None, seed: Tensor | None, options: Options
) -> Tensor:
    """The same computation, eagerly, with the same dropout."""
    v = v.repeat_interleave(q.shape[2] // v.shape[2], 2)
    return weighted_sum(_reference_weights(q, k, padding, mask, seed, options), v)


def _reference_weights(
    q: Tensor, k: Tensor, padding: Tensor | None, mask: Tensor | None, seed: Tensor | None, options: Options
) -> Tensor:
    causal, dropout_p, scale, offset = options[:4]
    weights = attention_weights(q, k.repeat_interleave(q.shape[2] // k.shape[2], 2), padding, mask, causal, scale)
    return weights if seed is None else dropped(weights, dropout_p, seed, offset)


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, padding: Any, mask: Any, seed: Any, *options: Any
    ) -> tuple[Tensor, Tensor]:
        out, lse = forward.below(q, k, v, padding, mask, seed, *options)
        ctx.save_for_backward(q, k, v, padding, mask, seed, out, lse)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Any:
        q, k, v, padding, mask, seed, out, lse = ctx.saved_tensors
        if dout is None:
            if dlse is None:
                return (None,) * 12
            dout = torch.zeros_like(out)
        needs_q, needs_k, needs_v, _, needs_mask = ctx.needs_input_grad[:5]
        dq, dk, dv, dmask = _backward(dout, dlse, q, k, v, padding, mask, seed, out, lse, needs_mask, *ctx.options)
        return (
            dq if needs_q else None,
            dk if needs_k else None,
            dv if needs_v else None,
            None,
            dmask if needs_mask else None,
            *(None,) * 7,
        )


class _Backward(torch.autograd.Function):
    """The first backward; its own backward (double backward) recomputes eagerly."""

    @staticmethod
    def forward(ctx: Any, dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
        gradients = _backward.below(dout, dlse, q, k, v, *rest)
        padding, mask, seed, _, _, with_mask, *options = rest
        ctx.save_for_backward(dout, q, k, v, padding, mask, seed)
        ctx.options, ctx.with_dlse, ctx.with_mask = options, dlse is not None, with_mask
        ctx.set_materialize_grads(False)
        return gradients

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> Any:
        if ctx.with_dlse:
            raise NotImplementedError(
                "the double backward through attention's log-sum-exp has no kernel: use attention='eager' for this call"
            )
        dout, q, k, v, padding, mask, seed = ctx.saved_tensors

        def recomputed(q: Tensor, k: Tensor, v: Tensor, differentiable: Tensor | None) -> Tensor:
            return reference(q, k, v, padding, mask if differentiable is None else differentiable, seed, ctx.options)

        wanted = [True, True, True, ctx.with_mask]
        inputs = (q, k, v, mask if ctx.with_mask else None)
        d_dout, (*d_qkv, d_mask) = double_backward(recomputed, inputs, dout, wanted, upstream)
        return (d_dout, None, *d_qkv, None, d_mask, *(None,) * 10)


def _run_weights(
    q: Tensor,
    k: Tensor,
    padding: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    lse: Tensor,
    averaged: bool,
    dtype: torch.dtype,
    *options: Any,
) -> Tensor:
    problem = attention_problem(q, k, k, padding, mask, seed, options)  # type: ignore[arg-type]
    return weights_kernels.attention_weights(problem, lse, averaged, dtype)


def _fake_weights(q: Tensor, k: Tensor, *rest: Any) -> Tensor:
    _, _, _, _, averaged, dtype, *_ = rest
    heads = () if averaged else (q.shape[2],)
    return q.new_empty((q.shape[0], *heads, q.shape[1], k.shape[1]), dtype=dtype)


class _Weights(torch.autograd.Function):
    """The weights' own node: their gradient is rarely asked for, and recomputes them eagerly, dropout included."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, padding: Any, mask: Any, seed: Any, lse: Tensor, averaged: bool, *rest: Any
    ) -> Tensor:
        made: Tensor = weights.below(q, k, padding, mask, seed, lse, averaged, *rest)
        ctx.save_for_backward(q, k, padding, mask, seed)
        ctx.averaged, ctx.options = averaged, rest[1:]
        return made

    @staticmethod
    def backward(ctx: Any, dweights: Tensor) -> Any:
        again = torch.is_grad_enabled()
        q, k, padding, mask, seed = ctx.saved_tensors
        wanted = [ctx.needs_input_grad[index] for index in (0, 1, 3)]
        with torch.enable_grad():
            q, k = isolated(q), isolated(k)
            mask = isolated(mask) if wanted[2] else mask
            recomputed = _reference_weights(q, k, padding, mask, seed, ctx.options)
            recomputed = (recomputed.mean(1) if ctx.averaged else recomputed).to(dweights.dtype)
            sources = [t for t, want in zip((q, k, mask), wanted) if want]
            found = iter(torch.autograd.grad(recomputed, sources, dweights, create_graph=again))
        dq, dk, dmask = (next(found) if want else None for want in wanted)
        return (dq, dk, None, dmask, *(None,) * 9)


def _autograd_weights(q: Tensor, k: Tensor, padding: Tensor | None, mask: Tensor | None, *rest: Any) -> Any:
    if wants_grad(q, k, mask):
        return _Weights.apply(q, k, padding, mask, *rest)
    return weights.below(q, k, padding, mask, *rest)


def _autograd_forward(q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, mask: Tensor | None, *rest: Any) -> Any:
    if wants_grad(q, k, v, mask):
        return _Forward.apply(q, k, v, padding, mask, *rest)
    return forward.below(q, k, v, padding, mask, *rest)


def _autograd_backward(dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
    if wants_grad(dout, dlse, q, k, v, rest[1]):
        return _Backward.apply(dout, dlse, q, k, v, *rest)
    return _backward.below(dout, dlse, q, k, v, *rest)


OPTIONS = "bool is_causal, float dropout_p, float scale, int offset, bool tf32"
forward = define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? padding, Tensor? mask, Tensor? seed, "
    f"{OPTIONS}, bool atomics) -> (Tensor, Tensor)",
    run=run_forward,
    fake=fake_forward,
    autograd=_autograd_forward,
)
_backward = define(
    "attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor? padding, Tensor? mask, "
    f"Tensor? seed, Tensor out, Tensor lse, bool with_mask, {OPTIONS}, bool atomics) -> (Tensor, Tensor, Tensor, Tensor)",
    run=_run_backward,
    fake=_fake_backward,
    autograd=_autograd_backward,
)
weights = define(
    "attention_weights(Tensor q, Tensor k, Tensor? padding, Tensor? mask, Tensor? seed, Tensor lse, bool averaged, "
    f"ScalarType dtype, {OPTIONS}) -> Tensor",
    run=_run_weights,
    fake=_fake_weights,
    autograd=_autograd_weights,
)
