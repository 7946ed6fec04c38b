"""Attention over packed sequences by the Triton kernels: when they take a call, and their registration with autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from detr_fast.dispatch import TritonImplementation
from detr_fast.kernels import attention as kernels
from detr_fast.kernels import attention_backward as backward_kernels
from detr_fast.kernels import attention_backward_atomics as atomics_kernels
from detr_fast.kernels.attention_problem import LOG2_E, MAX_HEAD_DIM, Problem, Sequences
from detr_fast.kernels.launch import compile_variant, generation
from detr_fast.ops import regimes
from detr_fast.ops.attention_autograd import OPTIONS, like_rows, reference, run_backward
from detr_fast.ops.attention_call import tf32
from detr_fast.ops.attention_triton import autocast, autocast_dtype, drawn, noted, rehearsed_mask
from detr_fast.ops.attention_varlen_call import VarlenCall
from detr_fast.ops.attention_varlen_eager import padded
from detr_fast.ops.boundary import SEVERAL_DEVICES, define, double_backward, wants_grad
from detr_fast.ops.layouts import aligned, rehearsed


class TritonVarlen(TritonImplementation):
    """One launch, on the tokens that are there; the alternative on a GPU pads them first, in a dozen launches."""

    max_head_dim = MAX_HEAD_DIM
    atomics = False  # whether the backward adds dq up by atomics

    def why_not(self, call: VarlenCall) -> str | None:
        if not call.one_device:
            return SEVERAL_DEVICES
        if not (1 <= call.head_dim <= self.max_head_dim and 1 <= call.value_dim <= self.max_head_dim):
            return f"head dimensions {call.head_dim} and {call.value_dim}: it takes 1 to {self.max_head_dim}"
        if not call.one_dtype:
            return "q, k, v and a float attn_mask of different dtypes: it takes one (the mask may also be float32)"
        return None

    def note(self, call: VarlenCall) -> str | None:
        return noted(regimes.note("attention_varlen", call), call)

    def compiled_key(self, call: VarlenCall) -> Any:
        options = (call.attn_mask, call.is_causal, call.dropout, call.needs_grad, call.return_lse)
        return call.device, call.dtype, call.head_dim, call.value_dim, options, aligned(call.layouts)

    def prepare(self, call: VarlenCall) -> None:
        problem = _meta_problem(call)
        variants = kernels.forward_variants(problem, call.device)
        if call.needs_grad and self.atomics:
            variants += atomics_kernels.atomics_variants(problem, with_dlse=call.return_lse)
        elif call.needs_grad:
            wanted = {"with_dlse": call.return_lse, "with_mask": call.mask_grad}
            variants += backward_kernels.backward_variants(problem, call.device, **wanted)
        if call.mask_grad and problem.mask is not None:
            variants += backward_kernels.mask_variants(problem, call.mask_shape, call.device)
        for variant in variants:
            compile_variant(variant, call.device)

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_q: int,
        max_k: int,
        mask: Tensor | None,
        is_causal: bool,
        dropout_p: float,
        scale: float | None,
        enable_gqa: bool = False,
        return_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        q, k, v, mask = autocast(autocast_dtype(q), q, k, v, mask)
        ends = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
        out, lse = _forward(q, k, v, *ends, max_q, max_k, mask, *drawn(q, is_causal, dropout_p, scale), self.atomics)
        return (out, lse[..., :max_q] / LOG2_E) if return_lse else out


def _meta_problem(call: VarlenCall) -> Problem:
    """A problem like the call's, without memory."""
    q, k, v = rehearsed(call.layouts[:3], call.dtype)
    mask = rehearsed_mask(call)
    ends = torch.empty(call.sequences + 1, dtype=torch.int32, device="meta")
    seed = torch.empty(1, dtype=torch.int64, device="meta")
    options = (call.is_causal, 0.5 if call.dropout else 0.0, 1.0, 0, tf32())
    return _problem(
        q, k, v, ends, ends, call.max_q, call.max_k, mask, seed, *options, generation=generation(call.device)
    )


# ---------------------------------------------------------------------------------------------------------------------
# Registration: forward and backward are ops of their own; each has an autograd kernel.


def _problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ends_q: Tensor,
    ends_k: Tensor,
    max_q: int,
    max_k: int,
    mask: Tensor | None,
    seed: Tensor | None,
    *options: Any,
    generation: str | None = None,
) -> Problem:
    causal, dropout_p, scale, offset, tf32 = options[:5]
    return Problem(
        q[None],
        k[None],
        v[None],
        mask=mask if max_q and max_k else None,
        causal=causal,
        scale=scale,
        dropout_p=dropout_p,
        seed=seed,
        offset=offset,
        tf32=tf32,
        sequences=Sequences(ends_q, ends_k, max_q, max_k),
        generation=generation,
    )


def _run_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    problem = _problem(*arguments)
    out, lse = kernels.attention_forward(problem)
    return out[0] if problem.batch else out[0].zero_(), lse


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, ends_q: Tensor, ends_k: Tensor, max_q: int, *rest: Any) -> Any:
    lse = q.new_empty((ends_q.shape[0] - 1, q.shape[1], max(1, max_q)), dtype=torch.float32)
    return like_rows(q[None], v.shape[2])[0], lse


def _run_backward(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, with_mask: bool, *arguments: Any
) -> tuple[Tensor, ...]:
    problem, mask = _problem(*arguments), arguments[7]
    tensors = (out[None], lse, dout[None], dlse)
    own_mask = with_mask and problem.mask is not None
    *gradients, dmask = run_backward(problem, *tensors, with_mask=own_mask, atomics=arguments[-1])
    if dmask is None:
        dmask = torch.zeros_like(mask) if with_mask else dout.new_empty(0)
    return *(g[0] if problem.batch else g[0].zero_() for g in gradients), dmask


def _fake_backward(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, with_mask: bool, *arguments: Any
) -> tuple[Tensor, ...]:
    dmask = arguments[7].new_empty(arguments[7].shape) if with_mask else dout.new_empty(0)
    return *(like_rows(t[None], t.shape[2])[0] for t in arguments[:3]), dmask


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        out, lse = _forward.below(q, k, v, *rest)
        ends_q, ends_k, ctx.max_q, ctx.max_k, mask, seed, *ctx.options = rest
        ctx.save_for_backward(q, k, v, ends_q, ends_k, mask, seed, out, lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Any:
        q, k, v, ends_q, ends_k, mask, seed, out, lse = ctx.saved_tensors
        if dout is None:
            if dlse is None:
                return (None,) * 15
            dout = torch.zeros_like(out)
        packed = (q, k, v, ends_q, ends_k, ctx.max_q, ctx.max_k, mask, seed)
        *gradients, dmask = _backward(dout, dlse, out, lse, ctx.needs_input_grad[7], *packed, *ctx.options)
        wanted = (g if want else None for g, want in zip(gradients, ctx.needs_input_grad))
        return (*wanted, *(None,) * 4, dmask if ctx.needs_input_grad[7] else None, *(None,) * 7)


class _Backward(torch.autograd.Function):
    """The first backward; its own backward (double backward) recomputes eagerly, padded."""

    @staticmethod
    def forward(ctx: Any, dout: Tensor, dlse: Any, out: Tensor, lse: Tensor, with_mask: bool, *packed: Any) -> Any:
        gradients = _backward.below(dout, dlse, out, lse, with_mask, *packed)
        ctx.with_dlse, ctx.with_mask = dlse is not None, with_mask
        q, k, v, ends_q, ends_k, ctx.max_q, ctx.max_k, mask, seed, *ctx.options = packed
        ctx.save_for_backward(dout, q, k, v, ends_q, ends_k, mask, seed)
        ctx.set_materialize_grads(False)
        return tuple(gradients)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> Any:
        if ctx.with_dlse:
            raise NotImplementedError(
                "the double backward through the log-sum-exp has no kernel: use attention_varlen='eager' for this call"
            )
        dout, q, k, v, ends_q, ends_k, mask, seed = ctx.saved_tensors

        def attend(q: Tensor, k: Tensor, v: Tensor, padding: Tensor, mask: Tensor | None) -> Tensor:
            return reference(q, k, v, padding, mask, seed, tuple(ctx.options))

        def again(q: Tensor, k: Tensor, v: Tensor, differentiable: Tensor | None) -> Tensor:
            own_mask = mask if differentiable is None else differentiable
            return padded(q, k, v, ends_q, ends_k, ctx.max_q, ctx.max_k, own_mask, attend)

        inputs, wanted = (q, k, v, mask if ctx.with_mask else None), [True, True, True, ctx.with_mask]
        d_dout, (*d_qkv, d_mask) = double_backward(again, inputs, dout, wanted, upstream)
        return (d_dout, *(None,) * 4, *d_qkv, *(None,) * 4, d_mask, *(None,) * 7)


def _autograd_forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
    if wants_grad(q, k, v, rest[4]):
        return _Forward.apply(q, k, v, *rest)
    return _forward.below(q, k, v, *rest)


def _autograd_backward(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, with_mask: bool, *packed: Any
) -> Any:
    if wants_grad(dout, dlse, *packed[:3], packed[7]):
        return _Backward.apply(dout, dlse, out, lse, with_mask, *packed)
    return _backward.below(dout, dlse, out, lse, with_mask, *packed)


_PACKED = (
    "Tensor q, Tensor k, Tensor v, Tensor ends_q, Tensor ends_k, int max_q, int max_k, Tensor? mask, Tensor? seed, "
    f"{OPTIONS}, bool atomics"
)
_forward = define(
    f"attention_varlen({_PACKED}) -> (Tensor, Tensor)",
    run=_run_forward,
    fake=_fake_forward,
    autograd=_autograd_forward,
)
_backward = define(
    f"attention_varlen_backward(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, bool with_mask, {_PACKED}) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
    run=_run_backward,
    fake=_fake_backward,
    autograd=_autograd_backward,
)
