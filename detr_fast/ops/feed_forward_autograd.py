"""The feed-forward block's kernels as ops, and its gradients. Products that no kernel fuses are torch's own.

Forward: the contract of `feed_forward`. Backward: one op takes the gradients from y to the hidden activation, through
LayerNorm where there is one, in three launches; four products of torch's follow.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from detr_fast.kernels import linear as kernels
from detr_fast.kernels.add_layer_norm_backward import dropped_backward, residual_norm_backward
from detr_fast.kernels.feed_forward import Norm, feed_forward
from detr_fast.kernels.launch import empty
from detr_fast.kernels.linear_norm import Rows, linear_norm_forward
from detr_fast.kernels.product_tiles import active_words, plus_product
from detr_fast.kernels.rows import sum_partials
from detr_fast.ops.boundary import define, wants_grad
from detr_fast.ops.linear_add_layer_norm import fake_sums, split_sums
from detr_fast.ops.products import dropout_of, dropped, eager_gradients, eager_norm_gradients, flat, is_batch, sum_rows

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


def run_forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    activation: str,
    offset: int,
    p: float,
    output_p: float,
    eps: float,
    out_dtype: torch.dtype,
    with_sum: bool,
    keep: bool,
    keep_hidden: bool,
    one_kernel: bool,
    own: bool,
    also: bool,
) -> tuple[Tensor, ...]:
    """y (the sum, where there is a residual and no norm), the sum, what is kept of the hidden activation (it, or what was before
    it, and which of its elements are active), xhat and rstd.

    Each empty where it is not wanted; behind them, with `also`, y in x's dtype. own: the residual is x before it was rounded, and gets all of its gradient.
    """
    dropout = dropout_of(p, seed, offset) if p > 0.0 else None
    output_dropout = dropout_of(output_p, seed, offset) if output_p > 0.0 else None
    adds = norm_weight is not None or residual is not None
    residual = x if residual is None else residual
    saved = active = low = None
    if one_kernel:
        norm = Norm(residual, norm_weight, norm_bias, eps, out_dtype, with_sum, keep) if adds else None
        drops = {"dropout": dropout, "output_dropout": output_dropout if adds else None}
        found = feed_forward(x, w1, b1, w2, b2, norm, activation=activation, **drops)
    else:
        one_launch = not keep_hidden  # what saves memory is also what takes the fewest launches
        keep_hidden &= keep
        h, saved = kernels.linear_forward(x, w1, b1, activation=activation, dropout=dropout, keep=keep_hidden)
        if activation == "relu":
            saved, active = h if keep_hidden else None, saved
        if adds:
            options: Any = {"dropout": output_dropout, "out_dtype": out_dtype, "with_sum": with_sum, "keep": keep}
            low = empty(residual.shape, x.dtype, x.device) if also else None
            options |= {"one_launch": one_launch, "rounded": low}
            found = linear_norm_forward(h, w2, b2, residual, norm_weight, norm_bias, eps, **options)
        else:
            found = Rows(kernels.linear_forward(h, w2, b2)[0], None, None, None)
    y, total, *kept = found
    y, total = (total, None) if y is None else (y, total)
    return tuple(x.new_empty(0) if t is None else t for t in (y, total, saved, active, *kept, low))


def _fake_forward(
    x: Tensor,
    w1: Tensor,
    b1: Any,
    w2: Tensor,
    b2: Any,
    norm_weight: Tensor | None,
    norm_bias: Any,
    residual: Tensor | None,
    seed: Any,
    activation: str,
    offset: int,
    p: float,
    *rest: Any,
) -> tuple[Tensor, ...]:
    *_, out_dtype, with_sum, keep, keep_hidden, _, _, also = rest
    shape = (*x.shape[:-1], w2.shape[0])
    sum_dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    dtypes = (sum_dtype, None, None) if norm_weight is None else (out_dtype, sum_dtype, out_dtype)
    wanted = (True, with_sum, keep)
    y, total, xhat = (x.new_empty(0) if not (d and w) else x.new_empty(shape, dtype=d) for d, w in zip(dtypes, wanted))
    saved = x.new_empty((*x.shape[:-1], w1.shape[0]) if keep and keep_hidden else 0)
    small = keep and keep_hidden and activation == "relu" and p > 0.0 and x.dtype.itemsize == 2
    words = active_words(prod(x.shape[:-1]), w1.shape[0]) if small else 0
    normed = norm_weight is not None and keep
    rstd = x.new_empty(prod(x.shape[:-1]), dtype=torch.float32) if normed else x.new_empty(0)
    active = x.new_empty(words, dtype=torch.int16 if small else x.dtype)
    return y, total, saved, active, xhat, rstd, x.new_empty(shape if also else 0)


def run_backward(
    dy: Tensor,
    dsum: Tensor | None,
    xhat: Tensor | None,
    rstd: Tensor | None,
    norm_weight: Tensor | None,
    w2: Tensor,
    saved: Tensor | None,
    active: Tensor | None,
    x: Tensor | None,
    w1: Tensor | None,
    b1: Tensor | None,
    seed: Tensor | None,
    activation: str,
    offset: int,
    p: float,
    output_p: float,
    residual_dtype: torch.dtype,
    with_db1: bool,
) -> tuple[Tensor, ...]:
    """From y's gradient, and the sum's, to the residual's, those behind and before the hidden activation, and to that.

    saved, active: what the forward kept of the hidden activation; without it, x, w1 and b1 compute it again. Returns ds, dz, dpre,
    h, the sums for norm_weight, norm_bias and b2, (3 * D,) (without a norm for b2 alone, (D,), where dropout is behind it; b2's apart
    where its dtype is another), and for b1; each empty where it is another one (dz is ds or dy, h is saved) or there is none.
    """
    ds = separate = partial = None
    dz = dy
    drop = dropout_of(output_p, seed, offset) if output_p > 0.0 else None
    if xhat is not None and rstd is not None and norm_weight is not None:
        options: Any = {"dsum": dsum, "dresidual_dtype": residual_dtype, "dx_dtype": w2.dtype}
        ds, separate, partial = residual_norm_backward(dy, xhat, rstd, norm_weight, drop, **options)
        dz = ds if separate is None else separate
    elif drop is not None:
        separate, partial = dropped_backward(dy, drop, w2.dtype)
        dz = separate
    elif dy.dtype != w2.dtype:
        dz = separate = dy.to(w2.dtype)
    kept: Any = saved if saved is not None else kernels.Recomputed(x, w1, b1)  # type: ignore[arg-type]
    drop = dropout_of(p, seed, offset) if p > 0.0 else None
    dpre, h, hidden_partial = kernels.linear_backward(
        dz, w2, kept, activation=activation, active=active, dropout=drop, with_dbias=with_db1
    )
    of_norm = of_b2 = None
    if norm_weight is not None and partial is not None:
        of_norm, of_b2 = split_sums(partial, norm_weight.dtype, w2.dtype)
    elif partial is not None:
        of_norm = partial, w2.dtype
    given = of_norm, of_b2, None if hidden_partial is None else (hidden_partial, w2.dtype)
    totals = iter(sum_partials(*given) if any(given) else ())
    sums, db2, db1 = (None if one is None else next(totals) for one in given)
    found = (ds, separate, dpre, None if h is saved else h, sums, db2, db1)
    return tuple(dy.new_empty(0) if t is None else t for t in found)


def _fake_backward(
    dy: Tensor,
    dsum: Tensor | None,
    xhat: Tensor | None,
    rstd: Tensor | None,
    norm_weight: Tensor | None,
    w2: Tensor,
    saved: Tensor | None,
    active: Tensor | None,
    x: Tensor | None,
    w1: Tensor | None,
    b1: Tensor | None,
    seed: Tensor | None,
    activation: str,
    offset: int,
    p: float,
    output_p: float,
    residual_dtype: torch.dtype,
    with_db1: bool,
) -> tuple[Tensor, ...]:
    hidden, columns = (*dy.shape[:-1], w2.shape[1]), dy.shape[-1]
    none, norm, drops = dy.new_empty(0), norm_weight is not None, seed is not None and output_p > 0.0
    separate = drops or (residual_dtype if norm else dy.dtype) != w2.dtype
    sums, db2 = w2.new_empty(columns) if drops else torch.empty_like(none), torch.empty_like(none)
    if norm_weight is not None:
        sums, db2 = fake_sums(dy, norm_weight, w2.dtype)
    return (
        dy.new_empty(dy.shape, dtype=residual_dtype) if norm else none,
        dy.new_empty(dy.shape, dtype=w2.dtype) if separate else torch.empty_like(none),
        w2.new_empty(hidden),
        torch.empty_like(none) if saved is not None and activation == "relu" else w2.new_empty(hidden),
        sums,
        db2,
        w2.new_empty(w2.shape[1]) if with_db1 else torch.empty_like(none),
    )


class _Forward(torch.autograd.Function):
    """Keeps xhat and rstd, not the residual or the sum; a double backward reaches those through them, its own outputs."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        y, total, saved, active, xhat, rstd, low = forward.below(*arguments)
        x, w1, b1, w2, b2, norm_weight, norm_bias, residual, seed = arguments[:9]
        ctx.save_for_backward(x, w1, b1, w2, b2, norm_weight, seed, saved, active, xhat, rstd)
        ctx.dtypes = tuple(None if t is None else t.dtype for t in (norm_bias, residual))
        ctx.settings, with_sum, (ctx.kept, _, ctx.own, _) = arguments[9:13], arguments[15], arguments[17:]
        normed = norm_weight is not None
        # The sum of what needs no gradient needs none, whatever the norm's parameters do.
        summed = with_sum and any((*ctx.needs_input_grad[:5], ctx.needs_input_grad[7]))
        ctx.mark_non_differentiable(
            saved, active, low, *(() if normed else (xhat, rstd)), *(() if summed else (total,))
        )
        ctx.set_materialize_grads(False)
        return y, total, saved, active, xhat, rstd, low

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dsum: Tensor | None, _: None, __: None, *upstream: Tensor | None) -> Any:
        twice = upstream[:2]
        if all(t is None for t in (dy, dsum, *twice)):
            return (None,) * 21
        eagerly = torch.is_grad_enabled() or any(t is not None for t in twice)
        gradients = _eager_gradients if eagerly else _gradients
        return (*gradients(ctx, dy, dsum, *twice), *(None,) * 13)


def _eager_gradients(ctx: Any, dy: Tensor | None, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    """`_gradients` to be differentiated again, with the very elements dropped that the kernels drop."""
    x, w1, b1, w2, b2, norm_weight, seed, _, _, xhat, rstd = ctx.saved_tensors
    norm_bias_dtype, residual_dtype = ctx.dtypes
    activation, offset, p, output_p = ctx.settings
    wanted = ctx.needs_input_grad[:8]

    def block(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> Tensor:
        h = ACTIVATIONS[activation](F.linear(x, w1, b1))
        return F.linear(dropped(h, seed, offset, p, hidden=True), w2, b2)

    ds: Any = dy
    d_norm_weight: Any = None
    d_norm_bias: Any = None
    if norm_weight is not None:
        ds, d_norm_weight, d_norm_bias = eager_norm_gradients((dy, *upstream), xhat, rstd, norm_weight)
    dz = dropped(ds, seed, offset, output_p)
    dx, *others = eager_gradients(block, (x, w1, b1, w2, b2), dz, wanted[:5])
    if norm_weight is not None and residual_dtype is None and dx is not None:
        dx = dx + ds.to(x.dtype)
    return (
        dx,
        *others,
        d_norm_weight.to(norm_weight.dtype) if wanted[5] else None,
        d_norm_bias.to(norm_bias_dtype) if wanted[6] else None,
        ds.to(residual_dtype) if wanted[7] else None,
    )


def _gradients(ctx: Any, dy: Tensor | None, dsum: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    x, w1, b1, w2, b2, norm_weight, seed, saved, active, xhat, rstd = ctx.saved_tensors
    norm_bias_dtype, residual_dtype = ctx.dtypes
    wanted = ctx.needs_input_grad[:8]
    activation = ctx.settings[0]
    dy = torch.zeros_like(xhat) if dy is None else dy
    norm = (None, None, None) if norm_weight is None else (xhat, rstd, norm_weight)
    active = active if active.numel() else None
    hidden = (saved, active, None, None, None) if ctx.kept else (None, None, x, w1, b1)
    dtype = residual_dtype or x.dtype
    ds, dz, dpre, h, sums, of_b2, db1 = _backward(dy, dsum, *norm, w2, *hidden, seed, *ctx.settings, dtype, wanted[2])
    ds = ds if norm_weight is not None else dy.to(dtype)
    dz = flat(dz if dz.shape[-1] else ds)  # without rows, either holds no element
    h, dpre = flat(saved if ctx.kept and activation == "relu" else h), flat(dpre)
    dx = db2 = None
    parts = sums.split(w2.shape[0])
    d_norm: Any = parts[:2] if norm_weight is not None else (None, None)
    of_b2 = of_b2 if of_b2.numel() else parts[-1]
    if wanted[4]:
        db2 = of_b2.to(b2.dtype) if of_b2.numel() else sum_rows(dz)
    dw2 = torch.mm(dz.t(), h) if wanted[3] else None
    if ctx.own and wanted[7] and not is_batch(ds):
        ds = plus_product(flat(ds), dpre, w1).view(x.shape)  # in fp32: neither rounded nor added up once more
    elif wanted[0]:  # in place, last of all: out of place, cuBLAS would copy ds first
        adds = norm_weight is not None and residual_dtype is None
        dx = (flat(ds).addmm_(dpre, w1) if adds else torch.mm(dpre, w1)).view(x.shape)
    return (
        dx,
        torch.mm(dpre.t(), flat(x)) if wanted[1] else None,
        db1 if wanted[2] else None,
        dw2,
        db2,
        d_norm[0] if wanted[5] else None,
        d_norm[1].to(norm_bias_dtype) if wanted[6] else None,
        ds if wanted[7] else None,
    )


def _autograd_forward(*arguments: Any) -> Any:
    if wants_grad(*arguments[:8]):
        return _Forward.apply(*arguments)
    return forward.below(*arguments)


def _autograd_backward(*arguments: Any) -> Any:
    return _backward.below(*arguments)


forward = define(
    "feed_forward(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? norm_weight, Tensor? norm_bias, "
    "Tensor? residual, Tensor? seed, str activation, int offset, float p, float output_p, float eps, ScalarType out_dtype, "
    "bool with_sum, bool keep, bool keep_hidden, bool one_kernel, bool own, bool also) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    run=run_forward,
    fake=_fake_forward,
    autograd=_autograd_forward,
    together=2,
)
_backward = define(
    "feed_forward_backward(Tensor dy, Tensor? dsum, Tensor? xhat, Tensor? rstd, Tensor? norm_weight, Tensor w2, "
    "Tensor? saved, Tensor? active, Tensor? x, Tensor? w1, Tensor? b1, Tensor? seed, str activation, int offset, float p, float output_p, "
    "ScalarType residual_dtype, bool with_db1) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    run=run_backward,
    fake=_fake_backward,
    autograd=_autograd_backward,
)
