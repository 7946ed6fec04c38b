"""LayerNorm and RMSNorm as ops: forward and backward, each with an autograd kernel.

RMSNorm is what is not centred: its mean is an empty tensor beside the forward's other results, and None in the backward.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from detr_fast.kernels import layer_norm as kernels
from detr_fast.ops.boundary import define, double_backward, wants_grad


def run_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out_dtype: torch.dtype, centred: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    y, mean, rstd = kernels.layer_norm_forward(x, weight, bias, eps, out_dtype, centred)
    return y, x.new_empty(0) if mean is None else mean, rstd


def _fake_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out_dtype: torch.dtype, centred: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    rstd = x.new_empty((prod(x.shape[:-1]),), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=out_dtype), torch.empty_like(rstd) if centred else x.new_empty(0), rstd


def run_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    eps: float,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    parameter = bias if weight is None else weight
    gradients = kernels.layer_norm_backward(
        dy,
        x,
        weight,
        mean,
        rstd,
        with_dx=wanted[0],
        with_dw=wanted[1] and weight is not None,
        with_db=wanted[2] and bias is not None,
        parameter_dtype=None if parameter is None else parameter.dtype,
    )
    dx, dw, db = (x.new_empty(0) if g is None else g for g in gradients)
    return dx, dw, db


def _fake_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    eps: float,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    def like(source: Tensor | None, want: bool) -> Tensor:
        return x.new_empty(0) if source is None or not want else source.new_empty(source.shape)

    return like(x, wanted[0]), like(weight, wanted[1]), like(bias, wanted[2])


def eager(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float | None, centred: bool) -> Tensor:
    """PyTorch's norm over the last dimension."""
    if centred:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)  # type: ignore[arg-type]
    return F.rms_norm(x, x.shape[-1:], weight, eps)


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        out_dtype: torch.dtype,
        centred: bool,
    ) -> Any:
        y, mean, rstd = forward.below(x, weight, bias, eps, out_dtype, centred)
        ctx.save_for_backward(x, weight, bias, mean if centred else None, rstd)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        return y, mean, rstd

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> Any:
        if dy is None:
            return (None,) * 6
        x, weight, bias, mean, rstd = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[:3])
        gradients = _backward(dy, x, weight, bias, mean, rstd, ctx.eps, wanted)
        return (*(g if want else None for g, want in zip(gradients, wanted)), None, None, None)


class _Backward(torch.autograd.Function):
    """The first backward; its own backward (double backward) recomputes eagerly."""

    @staticmethod
    def forward(
        ctx: Any,
        dy: Tensor,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor | None,
        rstd: Tensor,
        eps: float,
        wanted: list[bool],
    ) -> Any:
        gradients = _backward.below(dy, x, weight, bias, mean, rstd, eps, wanted)
        ctx.save_for_backward(dy, x, weight, bias)
        ctx.eps, ctx.wanted, ctx.centred = eps, wanted, mean is not None
        ctx.set_materialize_grads(False)
        return gradients

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> Any:
        dy, *inputs = ctx.saved_tensors

        def reference(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
            w, b = (None if p is None else p.to(dy.dtype) for p in (weight, bias))
            return eager(x.to(dy.dtype), w, b, ctx.eps, ctx.centred)

        d_dy, d_inputs = double_backward(reference, inputs, dy, ctx.wanted, upstream)
        return (d_dy, *d_inputs, None, None, None, None)


def _autograd_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out_dtype: torch.dtype, centred: bool = True
) -> Any:
    if wants_grad(x, weight, bias):
        return _Forward.apply(x, weight, bias, eps, out_dtype, centred)
    return forward.below(x, weight, bias, eps, out_dtype, centred)


def _autograd_backward(dy: Tensor, x: Tensor, weight: Any, bias: Any, *rest: Any) -> Any:
    if wants_grad(dy, x, weight):
        return _Backward.apply(dy, x, weight, bias, *rest)
    return _backward.below(dy, x, weight, bias, *rest)


forward = define(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps, ScalarType out_dtype, bool centred=True) -> "
    "(Tensor, Tensor, Tensor)",
    run=run_forward,
    fake=_fake_forward,
    autograd=_autograd_forward,
)
_backward = define(
    "layer_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor? mean, Tensor rstd, float eps, "
    "bool[3] wanted) -> (Tensor, Tensor, Tensor)",
    run=run_backward,
    fake=_fake_backward,
    autograd=_autograd_backward,
)
