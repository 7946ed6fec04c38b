"""A linear layer, dropout, the residual and LayerNorm in one launch: the contract, its reference, its Triton kernel."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from detr_fast import dispatch
from detr_fast.dispatch import Implementation, Op, Situation
from detr_fast.kernels import linear_norm as kernels
from detr_fast.kernels.add_layer_norm_backward import residual_norm_backward
from detr_fast.kernels.launch import empty
from detr_fast.kernels.rows import sum_partials
from detr_fast.ops.boundary import define, wants_grad
from detr_fast.ops.dropout import check_probability, next_seed
from detr_fast.ops.layouts import key, layouts, rehearsed
from detr_fast.ops.products import (
    ProductCall,
    TritonProduct,
    autocast,
    autocast_dtype,
    dropout_of,
    dropped,
    eager_norm_gradients,
    exact_fp32,
    flat,
    meta,
    shape_misfit,
)
from detr_fast.ops.regimes import bytes_of
from detr_fast.ops.rounded import leave, rounded, rounds


@overload
def linear_add_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    return_sum: Literal[False] = False,
) -> Tensor: ...


@overload
def linear_add_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    *,
    return_sum: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@overload
def linear_add_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    return_sum: bool = False,
) -> Tensor | tuple[Tensor, Tensor]: ...


def linear_add_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    return_sum: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """LayerNorm(residual + dropout(x @ weight^T + bias)): a block's last product and the norm behind it.

    With `return_sum` also what is normalised, for pre-norm transformers, whose next residual it is.

    Shapes: x (..., K), weight (C, K), residual (..., C), bias, norm_weight and norm_bias (C,); the result is (..., C) in
    the residual's dtype (under autocast on a GPU: fp32, as torch's LayerNorm gives), the sum in that of x @ weight^T and
    the residual, promoted. Where the kernel runs, what is normalised stays in fp32 and is finite where fp16 would overflow
    (and where a sum that is returned does). Raises RuntimeError where shapes do not fit, with torch's own message;
    ValueError for a dropout_p outside [0, 1], BackendError as `use_backend` says. Source: Vaswani et al., 2017,
    arXiv:1706.03762, section 3.1.
    """
    check_probability(dropout_p)
    arguments = (x, weight, bias, residual, norm_weight, norm_bias, eps, dropout_p, return_sum)
    if not (dispatch.intervening or x.is_cuda):
        return _eager(*arguments)
    return LINEAR_ADD_LAYER_NORM(*arguments)


def _eager(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    eps: float,
    dropout_p: float,
    return_sum: bool,
) -> Any:
    y = F.linear(x, weight, bias)
    total = residual + (F.dropout(y, dropout_p) if dropout_p > 0.0 else y)
    y = F.layer_norm(total, norm_weight.shape, norm_weight, norm_bias, eps)
    return (y, total) if return_sum else y


@dataclass(frozen=True)
class LinearNormCall(ProductCall):
    return_sum: bool

    def shapes(self) -> str:
        return super().shapes() + " with sum" * self.return_sum


def _signature(x: Tensor, *rest: Any) -> tuple[Any, ...]:
    *tensors, _eps, dropout_p, return_sum = rest
    return (key(x), *map(key, tensors), dropout_p > 0.0, return_sum, exact_fp32())


def _describe(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    eps: float,
    dropout_p: float,
    return_sum: bool,
    *,
    situation: Situation,
) -> LinearNormCall:
    tensors = (x, weight, bias, residual, norm_weight, norm_bias)
    width, columns = x.shape[-1], norm_weight.shape[-1]
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "weight": (weight, (columns, width)),
        "residual": (residual, (*x.shape[:-1], columns)),
    }
    for name, parameter in (("bias", bias), ("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        expected[name] = (parameter, (columns,))
    return LinearNormCall(
        device=x.device,
        architecture=dispatch.architecture(x.device),
        dtype=x.dtype,
        tensor_type=dispatch.tensor_type(tensors),
        needs_grad=wants_grad(*tensors),
        situation=situation,
        rows=prod(x.shape[:-1]),
        width=width,
        columns=columns,
        dtypes=tuple(None if t is None else t.dtype for t in tensors),
        dropout=dropout_p > 0.0,
        exact_fp32=exact_fp32(),
        misfit=shape_misfit(expected, x.device) or norm_misfit(x, (weight, bias), residual, (norm_weight, norm_bias)),
        layouts=layouts(situation, *tensors),
        return_sum=return_sum,
    )


def norm_misfit(x: Tensor, products: Any, residual: Tensor, norms: Any) -> str | None:
    """What dtypes the fused rows do not take: products in x's, residual and norms in theirs or, under autocast, fp32."""
    if not 1 <= residual.shape[-1] <= kernels.MAX_COLUMNS:
        return f"{residual.shape[-1]} columns: whole rows of 1 to {kernels.MAX_COLUMNS} fit a tile"
    if autocast_dtype(x) is not None:
        given = [residual, *norms]
        return next((f"{t.dtype} beside autocast" for t in given if t is not None and t.dtype not in _AUTOCAST), None)
    given = [*products, residual, *norms]
    return next((f"{t.dtype} beside {x.dtype} inputs" for t in given if t is not None and t.dtype != x.dtype), None)


_AUTOCAST = (torch.float32, torch.float16, torch.bfloat16)


class TritonLinearAddLayerNorm(TritonProduct):
    op = "linear_add_layer_norm"

    def rehearse(self, call: LinearNormCall) -> None:
        x, weight, bias = rehearsed(call.layouts[:3], call.computed_dtype)
        residual, norm_weight, norm_bias = rehearsed(call.layouts[3:])
        out = result_dtype(residual.dtype, call.device_type)
        seed = meta(torch.int64 if call.dropout else None, 1)
        settings = (seed, 0, 0.5, 1e-5, out, call.return_sum, call.needs_grad, rounds(call.situation.autocast, out))
        y, total, xhat, rstd, _ = _run_forward(x, weight, bias, residual, norm_weight, norm_bias, *settings)  # type: ignore[call-arg]
        if not call.needs_grad:
            return
        for dsum in (None, total) if call.return_sum else (None,):  # which may arrive, or not
            _run_backward(y, dsum, xhat, rstd, norm_weight, seed, 0, 0.5, residual.dtype, x.dtype)

    def compiled_key(self, call: LinearNormCall) -> Any:
        return super().compiled_key(call), call.return_sum

    def run(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor | None,
        eps: float,
        dropout_p: float,
        return_sum: bool,
    ) -> Any:
        out = result_dtype(residual.dtype, x.device.type)
        also = rounds(autocast_dtype(x), out)
        x, weight, bias = autocast(rounded(x), weight, bias)  # type: ignore[assignment]
        seed, offset = next_seed(x.device) if dropout_p > 0.0 else (None, 0)
        keep = wants_grad(x, weight, bias, residual, norm_weight, norm_bias)
        norm = (norm_weight, norm_bias)
        settings = (seed, offset, dropout_p, eps, out, return_sum, keep, also)
        y, total, *_, low = _forward(x, weight, bias, residual, *norm, *settings)
        if also:
            leave(y, low)
        return (y, total) if return_sum else y


class EagerLinearAddLayerNorm(Implementation):
    name = "eager"

    def run(self, *arguments: Any) -> Any:
        return _eager(*arguments)


LINEAR_ADD_LAYER_NORM = Op(
    "linear_add_layer_norm",
    signature=_signature,
    describe=_describe,
    implementations=(TritonLinearAddLayerNorm(), EagerLinearAddLayerNorm()),
    work=bytes_of,
)


def result_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """fp32 under autocast on a GPU, where LayerNorm is on torch's list of fp32 ops, else the residual's."""
    return torch.float32 if device_type == "cuda" and torch.is_autocast_enabled("cuda") else dtype


# ---------------------------------------------------------------------------------------------------------------------
# Registration. The backward's two products are torch's own, in sight of dispatch modes and compilers.


def _run_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    seed: Tensor | None,
    offset: int,
    p: float,
    eps: float,
    out_dtype: torch.dtype,
    with_sum: bool,
    keep: bool,
    also: bool,
) -> tuple[Tensor, ...]:
    """also: y in x's dtype as well, the last of the outputs."""
    norm = (residual, norm_weight, norm_bias, eps)
    options: Any = {"dropout": dropout_of(p, seed, offset), "out_dtype": out_dtype, "with_sum": with_sum, "keep": keep}
    low = empty(residual.shape, x.dtype, x.device) if also else None
    found = kernels.linear_norm_forward(x, weight, bias, *norm, **options, one_launch=False, rounded=low)
    return tuple(residual.new_empty(0) if t is None else t for t in (*found, low))


def _fake_forward(x: Tensor, weight: Tensor, bias: Any, residual: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *_, out_dtype, with_sum, keep, also = rest
    dtypes = (out_dtype, torch.promote_types(x.dtype, residual.dtype), out_dtype)
    y, total, xhat = (
        residual.new_empty(residual.shape, dtype=dtype) if wanted else residual.new_empty(0)
        for dtype, wanted in zip(dtypes, (True, with_sum, keep))
    )
    rstd = residual.new_empty(prod(residual.shape[:-1]), dtype=torch.float32) if keep else residual.new_empty(0)
    low = residual.new_empty(residual.shape, dtype=x.dtype) if also else residual.new_empty(0)
    return y, total, xhat, rstd, low


def _run_backward(
    dy: Tensor,
    dsum: Tensor | None,
    xhat: Tensor,
    rstd: Tensor,
    norm_weight: Tensor,
    seed: Tensor | None,
    offset: int,
    p: float,
    residual_dtype: torch.dtype,
    product_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    options: Any = {"dsum": dsum, "dresidual_dtype": residual_dtype, "dx_dtype": product_dtype}
    ds, dproduct, partial = residual_norm_backward(dy, xhat, rstd, norm_weight, dropout_of(p, seed, offset), **options)
    of_norm, of_bias = split_sums(partial, norm_weight.dtype, product_dtype)
    sums, *rest = sum_partials(of_norm, of_bias)
    db = rest[0] if rest else dy.new_empty(0)
    return ds, dy.new_empty(0) if dproduct is None else dproduct, sums, db


def split_sums(partial: Tensor, norm: torch.dtype, product: torch.dtype) -> tuple[Any, Any]:
    """For `sum_partials`: a norm's partial sums, for its weight and bias, and those for the product's bias, in one where dtypes allow."""
    if norm == product:
        return (partial, norm), None
    columns = partial.shape[1] // 3
    return (partial[:, : 2 * columns], norm), (partial[:, 2 * columns :], product)


def _fake_backward(
    dy: Tensor,
    dsum: Tensor | None,
    xhat: Tensor,
    rstd: Tensor,
    norm_weight: Tensor,
    seed: Tensor | None,
    offset: int,
    p: float,
    residual_dtype: torch.dtype,
    product_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    separate = seed is not None or residual_dtype != product_dtype
    dproduct = dy.new_empty(dy.shape, dtype=product_dtype) if separate else dy.new_empty(0)
    sums, db = fake_sums(dy, norm_weight, product_dtype)
    return dy.new_empty(dy.shape, dtype=residual_dtype), dproduct, sums, db


def fake_sums(dy: Tensor, norm_weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What comes of `split_sums`; the second is empty where the first has all."""
    columns = dy.shape[-1]
    if norm_weight.dtype == dtype:
        return norm_weight.new_empty(3 * columns), dy.new_empty(0)
    return norm_weight.new_empty(2 * columns), norm_weight.new_empty(columns, dtype=dtype)


class _Forward(torch.autograd.Function):
    """Keeps xhat and rstd, not the residual or the sum; a double backward reaches those through them, its own outputs."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        y, total, xhat, rstd, low = _forward.below(*arguments)
        x, weight, bias, residual, norm_weight, norm_bias, seed = arguments[:7]
        ctx.save_for_backward(x, weight, norm_weight, seed, xhat, rstd)
        ctx.dtypes = tuple(None if t is None else t.dtype for t in (bias, residual, norm_bias))
        ctx.offset, ctx.p = arguments[7:9]
        # The sum of what needs no gradient needs none, whatever the norm's parameters do.
        summed = arguments[11] and any(ctx.needs_input_grad[:4])
        ctx.mark_non_differentiable(low, *(() if summed else (total,)))
        ctx.set_materialize_grads(False)
        return y, total, xhat, rstd, low

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> Any:
        if all(t is None for t in upstream):
            return (None,) * 14
        x, weight, norm_weight, seed, xhat, rstd = ctx.saved_tensors
        bias_dtype, residual_dtype, norm_bias_dtype = ctx.dtypes
        wanted = ctx.needs_input_grad[:6]
        dy, dsum, *twice = upstream[:4]
        if torch.is_grad_enabled() or any(t is not None for t in twice):
            ds, d_norm_weight, d_norm_bias = eager_norm_gradients(upstream[:4], xhat, rstd, norm_weight)
            rows = flat(dropped(ds, seed, ctx.offset, ctx.p)).to(x.dtype)
            db = rows.sum(0)
        else:
            dy = torch.zeros_like(xhat) if dy is None else dy
            settings = (seed, ctx.offset, ctx.p, residual_dtype, x.dtype)
            ds, dproduct, sums, db = _backward(dy, dsum, xhat, rstd, norm_weight, *settings)
            rows = flat(dproduct if dproduct.shape[-1] else ds)  # without rows, either holds no element
            d_norm_weight, d_norm_bias, *joined = sums.split(weight.shape[0])
            db = joined[0] if joined else db
        return (
            torch.mm(rows, weight).view(x.shape) if wanted[0] else None,
            torch.mm(rows.t(), flat(x)) if wanted[1] else None,
            db.to(bias_dtype) if wanted[2] else None,
            ds.to(residual_dtype) if wanted[3] else None,
            d_norm_weight.to(norm_weight.dtype) if wanted[4] else None,
            d_norm_bias.to(norm_bias_dtype) if wanted[5] else None,
            *(None,) * 8,
        )


def _autograd_forward(*arguments: Any) -> Any:
    if wants_grad(*arguments[:6]):
        return _Forward.apply(*arguments)
    return _forward.below(*arguments)


def _autograd_backward(*arguments: Any) -> Any:
    return _backward.below(*arguments)


_forward = define(
    "linear_add_layer_norm(Tensor x, Tensor weight, Tensor? bias, Tensor residual, Tensor norm_weight, Tensor? norm_bias, "
    "Tensor? seed, int offset, float p, float eps, ScalarType out_dtype, bool with_sum, bool keep, bool also) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    run=_run_forward,
    fake=_fake_forward,
    autograd=_autograd_forward,
    together=2,
)
_backward = define(
    "residual_norm_backward(Tensor dy, Tensor? dsum, Tensor xhat, Tensor rstd, Tensor norm_weight, Tensor? seed, int offset, "
    "float p, ScalarType residual_dtype, ScalarType product_dtype) -> (Tensor, Tensor, Tensor, Tensor)",
    run=_run_backward,
    fake=_fake_backward,
    autograd=_autograd_backward,
)
