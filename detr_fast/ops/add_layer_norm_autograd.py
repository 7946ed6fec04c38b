"""Dropout, residual sum and LayerNorm or RMSNorm as ops: forward and backward, each with an autograd kernel.

The backward reads x and the residual, or the sum (as x, without a residual) where the forward wrote it. RMSNorm is what is
not centred: its mean is an empty tensor beside the forward's other results, and None in the backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from detr_fast.kernels import add_layer_norm as kernels
from detr_fast.kernels.dropout import Dropout, scale
from detr_fast.ops.boundary import define, double_backward, wants_grad
from detr_fast.ops.dropout import keep_mask
from detr_fast.ops.layer_norm_autograd import eager


def _dropout(seed: Tensor | None, offset: int, p: float) -> Dropout | None:
    return None if seed is None else Dropout(seed, offset, p)


def run_forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    offset: int,
    p: float,
    eps: float,
    with_sum: bool,
    out_dtype: torch.dtype,
    centred: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dropout = _dropout(seed, offset, p)
    y, total, mean, rstd = kernels.add_layer_norm_forward(
        x, residual, weight, bias, eps, dropout, with_sum=with_sum, out_dtype=out_dtype, centred=centred
    )
    total, mean = (x.new_empty(0) if t is None else t for t in (total, mean))
    return y, total, mean, rstd


def _fake_forward(
    x: Tensor, residual: Tensor, weight: Any, bias: Any, seed: Any, offset: int, p: float, eps: float, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with_sum, out_dtype, *centred = rest
    rstd = x.new_empty((prod(x.shape[:-1]),), dtype=torch.float32)
    sum_dtype = torch.promote_types(x.dtype, residual.dtype)
    total = x.new_empty(x.shape, dtype=sum_dtype) if with_sum else x.new_empty(0)
    mean = torch.empty_like(rstd) if all(centred) else x.new_empty(0)
    return x.new_empty(x.shape, dtype=out_dtype), total, mean, rstd


def run_backward(
    dy: Tensor,
    dsum: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    seed: Tensor | None,
    offset: int,
    p: float,
    eps: float,
    dx_dtype: torch.dtype | None,
    dresidual_dtype: torch.dtype | None,
    with_dw: bool,
    with_db: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    parameter = bias if weight is None else weight
    gradients = kernels.add_layer_norm_backward(
        dy,
        dsum,
        x,
        residual,
        weight,
        mean,
        rstd,
        _dropout(seed, offset, p),
        dx_dtype=dx_dtype,
        dresidual_dtype=dresidual_dtype,
        with_dw=with_dw,
        with_db=with_db,
        parameter_dtype=None if parameter is None else parameter.dtype,
    )
    dx, dresidual, dw, db = (x.new_empty(0) if g is None else g for g in gradients)
    return dx, dresidual, dw, db


def _fake_backward(
    dy: Tensor,
    dsum: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    seed: Tensor | None,
    offset: int,
    p: float,
    eps: float,
    dx_dtype: torch.dtype | None,
    dresidual_dtype: torch.dtype | None,
    with_dw: bool,
    with_db: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    parameter = bias if weight is None else weight
    dx, dresidual = (
        x.new_empty(0) if dtype is None else x.new_empty(x.shape, dtype=dtype) for dtype in (dx_dtype, dresidual_dtype)
    )
    dw, db = (
        x.new_empty(0) if parameter is None or not want else parameter.new_empty(parameter.shape)
        for want in (with_dw, with_db)
    )
    return dx, dresidual, dw, db


def written_dtypes(
    dropout: bool, dtypes: tuple[torch.dtype, torch.dtype], wanted: Sequence[bool]
) -> tuple[torch.dtype | None, torch.dtype | None]:
    """Of the gradients of x and the residual that are written: None for x's where the residual's serves both."""
    shared = not dropout and dtypes[0] == dtypes[1] and wanted[1]
    return dtypes[0] if wanted[0] and not shared else None, dtypes[1] if wanted[1] else None


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        seed: Tensor | None,
        offset: int,
        p: float,
        eps: float,
        with_sum: bool,
        out_dtype: torch.dtype,
        centred: bool,
    ) -> Any:
        settings = (offset, p, eps, with_sum, out_dtype, centred)
        y, total, mean, rstd = forward.below(x, residual, weight, bias, seed, *settings)
        kept = (total, None) if with_sum else (x, residual)
        ctx.save_for_backward(*kept, weight, bias, mean if centred else None, rstd, seed)
        ctx.numbers, ctx.with_sum, ctx.dtypes = (offset, p, eps), with_sum, (x.dtype, residual.dtype)
        ctx.out_dtype = out_dtype
        # The sum of what needs no gradient needs none, whatever weight and bias do.
        summed = with_sum and any(ctx.needs_input_grad[:2])
        ctx.mark_non_differentiable(mean, rstd, *(() if summed else (total,)))
        ctx.set_materialize_grads(False)
        return y, total, mean, rstd

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dsum: Tensor | None, *_: Any) -> Any:
        if dy is None and dsum is None:
            return (None,) * 11
        x, residual, weight, bias, mean, rstd, seed = ctx.saved_tensors
        dy = torch.zeros_like(x, dtype=ctx.out_dtype) if dy is None else dy
        wanted = ctx.needs_input_grad[:4]
        dtypes = written_dtypes(seed is not None, ctx.dtypes, wanted)
        saved = (x, residual, weight, bias, mean, rstd, seed)
        gradients = (dy, dsum if ctx.with_sum else None)
        dx, dresidual, dw, db = _backward(*gradients, *saved, *ctx.numbers, *dtypes, *wanted[2:])
        found = (dresidual if dtypes[0] is None else dx, dresidual, dw, db)
        return (*(g if want else None for g, want in zip(found, wanted)), *(None,) * 7)


class _Backward(torch.autograd.Function):
    """The first backward; its own backward (double backward) recomputes eagerly."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        gradients = _backward.below(*args)
        dy, dsum, x, residual, weight, bias, mean, _, seed, offset, p, eps, *wanted = args
        ctx.save_for_backward(dy, x, residual, weight, bias, seed)
        ctx.numbers, ctx.wanted, ctx.has_dsum = (offset, p, eps), wanted, dsum is not None
        ctx.centred = mean is not None
        ctx.set_materialize_grads(False)
        return gradients

    @staticmethod
    def backward(ctx: Any, u_dx: Any, u_dresidual: Any, u_dw: Any, u_db: Any) -> Any:
        dy, x, residual, weight, bias, seed = ctx.saved_tensors
        offset, p, eps = ctx.numbers
        factor = None
        if seed is not None:
            factor = keep_mask(seed, offset, p, 1, prod(x.shape[:-1]), x.shape[-1]).view(x.shape) * scale(p)

        def dropped(t: Tensor) -> Tensor:
            return t if factor is None else t * factor.to(t.dtype)

        # The gradient of the sum goes to the residual, and through the mask to x: what arrives for both, for the sum.
        arriving = [u for u in (u_dresidual, None if u_dx is None else dropped(u_dx)) if u is not None]
        u_sum = torch.stack([u.float() for u in arriving]).sum(0) if arriving else None

        def reference(total: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
            w, b = (None if t is None else t.to(dy.dtype) for t in (weight, bias))
            return eager(total.to(dy.dtype), w, b, eps, ctx.centred)

        total = x.float() if residual is None else residual.float() + dropped(x.float())
        wanted = [u_sum is not None, *ctx.wanted[2:]]
        d_dy, (d_total, d_weight, d_bias) = double_backward(
            reference, [total, weight, bias], dy, wanted, (u_sum, u_dw, u_db)
        )
        d_dsum = u_sum if ctx.has_dsum else None
        d_x = d_residual = None
        if d_total is not None:
            d_x = (d_total if residual is None else dropped(d_total)).to(x.dtype)
            d_residual = None if residual is None else d_total.to(residual.dtype)
        return (d_dy, d_dsum, d_x, d_residual, d_weight, d_bias, *(None,) * 10)


def _autograd_forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    offset: int,
    p: float,
    eps: float,
    with_sum: bool,
    out_dtype: torch.dtype,
    centred: bool = True,
) -> Any:
    arguments = (x, residual, weight, bias, seed, offset, p, eps, with_sum, out_dtype, centred)
    return _Forward.apply(*arguments) if wants_grad(x, residual, weight, bias) else forward.below(*arguments)


def _autograd_backward(dy: Tensor, dsum: Any, x: Tensor, residual: Any, weight: Any, *rest: Any) -> Any:
    if wants_grad(dy, dsum, x, residual, weight):
        return _Backward.apply(dy, dsum, x, residual, weight, *rest)
    return _backward.below(dy, dsum, x, residual, weight, *rest)


forward = define(
    "add_layer_norm(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, Tensor? seed, int offset, float p, float eps, "
    "bool with_sum, ScalarType out_dtype, bool centred=True) -> (Tensor, Tensor, Tensor, Tensor)",
    run=run_forward,
    fake=_fake_forward,
    autograd=_autograd_forward,
    together=2,
)
_backward = define(
    "add_layer_norm_backward(Tensor dy, Tensor? dsum, Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? mean, "
    "Tensor rstd, Tensor? seed, int offset, float p, float eps, ScalarType? dx_dtype, ScalarType? dresidual_dtype, "
    "bool with_dw, bool with_db) -> (Tensor, Tensor, Tensor, Tensor)",
    run=run_backward,
    fake=_fake_backward,
    autograd=_autograd_backward,
)
