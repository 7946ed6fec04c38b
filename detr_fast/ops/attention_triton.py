"""Attention by the Triton kernels: when they take a call, what they compile for it, and how they run it."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from detr_fast.dispatch import NEVER, TritonImplementation
from detr_fast.kernels import attention as kernels
from detr_fast.kernels import attention_backward as backward_kernels
from detr_fast.kernels import attention_backward_atomics as atomics_kernels
from detr_fast.kernels import attention_weights as weights_kernels
from detr_fast.kernels.attention_copies import copy_variants
from detr_fast.kernels.attention_problem import LOG2_E, MAX_HEAD_DIM, Problem
from detr_fast.kernels.launch import compile_variant, generation
from detr_fast.ops import regimes
from detr_fast.ops.attention_autograd import forward
from detr_fast.ops.attention_autograd import weights as weights_of
from detr_fast.ops.attention_call import AttentionCall, Weights, computed_dtype, tf32, weights_dtype
from detr_fast.ops.attention_call import autocast_dtype as autocast_dtype
from detr_fast.ops.dropout import next_seed
from detr_fast.ops.layouts import ALIGNMENT, aligned, rehearsed

NARROW = 32  # the largest head dimension of calls that are measured as narrow


def measured_as(call: AttentionCall) -> str:
    """The name of the measurements that decide: PyTorch has other kernels for calls in 16 bits without masks than with one,
    without dropout than with it, and for larger heads, and few programs for few queries.
    """
    masked = call.key_padding or call.attn_mask or call.return_lse or call.weights or call.dtype == torch.float32
    wide = _is_wide(call.head_dim, call.value_dim)
    return _name(bool(masked), call.dropout, wide, not wide and few_queries(call))


def _is_wide(*channels: int) -> bool:
    """Whether PyTorch's kernels for larger heads come in question: they take channels in eights, and copy what has others.

    So on an H200, forward and backward of 4 × 1,000 tokens with 8 heads of 33 took ours 145 µs, its fastest 191; of 36 with dropout 188 and 214.
    """
    return max(channels) > NARROW and not any(one % 8 for one in channels)


def _name(*present: bool) -> str:
    return "_".join(["attention", *itertools.compress(("masked", "dropout", "wide", "few_queries"), present)])


def kind_of(q: Tensor, k: Tensor, v: Tensor, padding: Any, mask: Any, _: bool, dropout_p: float, *rest: Any) -> Any:
    """Which measurements decide, and whether those with gradients do, as far as that is soon seen."""
    if q.dtype == torch.float32:  # autocast may change it
        return ()
    gradients = q.requires_grad or None if torch.is_grad_enabled() else False
    wide = _is_wide(q.shape[3], v.shape[3])
    masked = padding is not None or mask is not None
    return gradients, masked, dropout_p > 0.0, wide, not wide and 4 * q.shape[1] <= k.shape[1]


# All of them; of larger heads there are no others for few queries.
NAMES = tuple(_name(*p) for p in itertools.product((False, True), repeat=4) if not (p[2] and p[3]))


def names_of(kind: tuple[bool, ...]) -> tuple[str, ...]:
    return (_name(*kind),) if kind else NAMES


def few_queries(call: AttentionCall) -> bool:
    """Whether they look at many keys, as the decoder's at the image."""
    return 4 * call.queries <= call.keys


def input_bytes(call: AttentionCall) -> int:
    """Bytes of q, k and v."""
    rows = call.batch * (call.queries * call.heads + 2 * call.keys * call.key_heads)
    return rows * call.head_dim * call.dtype.itemsize


class TritonAttention(TritonImplementation):
    max_head_dim = MAX_HEAD_DIM
    atomics = False  # whether the backward adds dq up by atomics

    def why_not(self, call: AttentionCall) -> str | None:
        if call.misfit is not None:
            return call.misfit
        if not (1 <= call.head_dim <= self.max_head_dim and 1 <= call.value_dim <= self.max_head_dim):
            return f"head dimensions {call.head_dim} and {call.value_dim}: it takes 1 to {self.max_head_dim}"
        if not call.one_dtype:
            return "q, k, v and a float attn_mask of different dtypes: it takes one (the mask may also be float32)"
        return None

    def advice(self, call: AttentionCall) -> str | None:
        if call.situation.regime == "layer":
            return None
        name = measured_as(call)
        if "masked" not in name and regimes.find(name, call.architecture) is None:
            return (
                "without masks PyTorch's own flash kernels take the call: unmeasured against them, run detr-fast tune"
            )
        size = input_bytes(call)
        if call.weights is not None:  # which PyTorch writes and reads several times
            size += call.batch * call.heads * call.queries * call.keys * call.dtype.itemsize
        return regimes.advice(name, call, size)

    def least(self, architecture: str | None, gradients: bool | None = None, *kind: Any) -> int:
        known = [n for n in names_of(kind) if "masked" in n or regimes.find(n, architecture) is not None]
        return min((regimes.least(name, architecture, gradients) for name in known), default=NEVER)

    def note(self, call: AttentionCall) -> str | None:
        return noted(regimes.note(measured_as(call), call), call)

    def compiled_key(self, call: AttentionCall) -> Any:
        masks = (call.key_padding, call.attn_mask, call.is_causal, call.dropout)
        wanted = (call.needs_grad, call.return_lse, call.weights)
        return call.device, call.dtype, call.head_dim, call.value_dim, masks, wanted, aligned(call.layouts)

    def prepare(self, call: AttentionCall) -> None:
        problem = _meta_problem(call)
        variants = kernels.forward_variants(problem, call.device)
        if call.needs_grad and self.atomics:
            variants += atomics_kernels.atomics_variants(problem, with_dlse=call.return_lse)
        elif call.needs_grad:
            wanted = {"with_dlse": call.return_lse, "with_mask": call.mask_grad}
            variants += backward_kernels.backward_variants(problem, call.device, **wanted)
        if call.mask_grad:
            variants += backward_kernels.mask_variants(problem, call.mask_shape, call.device)
        for variant in variants:
            compile_variant(variant, call.device)
        if call.weights is not None:
            problem = _meta_problem(call, of_weights=True)
            dtype = weights_dtype(call.dtype, call.device, call.situation.autocast)
            run = weights_kernels.weights_run(call.keys, dtype)
            weights = weights_kernels.weights_variant(problem.form(), call.weights == "mean", dtype, run)
            for variant in (*copy_variants(problem), weights):
                compile_variant(variant, call.device)

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        padding: Tensor | None,
        mask: Tensor | None,
        is_causal: bool,
        dropout_p: float,
        scale: float | None,
        enable_gqa: bool = False,
        return_lse: bool = False,
        weights: Weights = None,
    ) -> Tensor | tuple[Tensor, ...]:
        dtype = autocast_dtype(q)
        q, k, v, mask = autocast(dtype, q, k, v, mask)
        seed, *options = drawn(q, is_causal, dropout_p, scale)
        out, lse = forward(q, k, v, padding, mask, seed, *options, self.atomics)
        results = [out, lse / LOG2_E] if return_lse else [out]
        if weights is not None:
            dtype = weights_dtype(q.dtype, q.device, dtype)
            results.append(weights_of(q, k, padding, mask, seed, lse, weights == "mean", dtype, *options))
        return out if len(results) == 1 else tuple(results)


def autocast(dtype: torch.dtype | None, *tensors: Any) -> tuple[Any, ...]:
    """The tensors as torch's SDPA would take them under autocast to `dtype`."""
    if dtype is None:
        return tensors
    return tuple(None if t is None else t.to(computed_dtype(t.dtype, dtype)) for t in tensors)


def drawn(q: Tensor, is_causal: bool, dropout_p: float, scale: float | None) -> tuple[Any, ...]:
    """What the registered forwards take after the masks: a seed, where something is dropped, and the options."""
    seed, offset = next_seed(q.device) if dropout_p > 0.0 else (None, 0)
    rounded = q.dtype == torch.float32 and tf32()  # a setting that takes long to read
    return seed, is_causal, dropout_p, q.shape[-1] ** -0.5 if scale is None else scale, offset, rounded


def _meta_problem(call: AttentionCall, of_weights: bool = False) -> Problem:
    """A problem like the call's, without memory; of_weights: with k in place of v, which does not count for weights."""
    q, k, v = rehearsed(call.layouts[:3], call.dtype)
    mask = rehearsed_mask(call)
    padding = torch.empty(call.batch, call.keys, dtype=torch.bool, device="meta") if call.key_padding else None
    seed = torch.empty(1, dtype=torch.int64, device="meta")
    return Problem(
        q,
        k,
        k if of_weights else v,
        padding,
        mask,
        causal=call.is_causal,
        dropout_p=0.5 if call.dropout else 0.0,
        seed=seed,
        tf32=tf32(),
        generation=generation(call.device),
    )


def noted(note: str, call: Any) -> str:
    """The note, and which of q, k and v, with which the call's layouts begin, are copied first."""
    run = ALIGNMENT // call.dtype.itemsize
    copied = [
        name
        for name, one in zip("qkv", call.layouts)
        if one.shape[-1] % run or (one.dtype == call.dtype and not (one.aligned and one.strides[-1] == 1))
    ]
    return f"{note}; copied to rows of whole 16 bytes: {', '.join(copied)}" if copied else note


def rehearsed_mask(call: Any) -> Tensor | None:
    """The attn_mask of a call, whose layouts begin with those of q, k and v, as autocast leaves it, without memory."""
    if call.attn_mask is None:
        return None
    return rehearsed(call.layouts[3:], computed_dtype(getattr(torch, call.attn_mask), call.situation.autocast))[0]
