"""A transformer's feed-forward block: the contract, its eager reference, its Triton implementations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from detr_fast import dispatch
from detr_fast.dispatch import Implementation, Op, Situation
from detr_fast.kernels import linear as kernels
from detr_fast.kernels import linear_norm
from detr_fast.kernels.dropout import scale
from detr_fast.ops.boundary import below_autograd, define, wants_grad
from detr_fast.ops.dropout import keep_mask, next_seed
from detr_fast.ops.linear_add_layer_norm import norm_misfit, residual_norm_backward, result_dtype
from detr_fast.ops.products import (
    ProductCall,
    TritonProduct,
    autocast,
    autocast_dtype,
    dropout_of,
    eager_gradients,
    exact_fp32,
    flat,
    key,
    meta,
    shape_misfit,
)

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


def feed_forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str = "relu",
    dropout_p: float = 0.0,
) -> Tensor:
    """dropout(activation(x @ w1^T + b1)) @ w2^T + b2.

    Shapes: x (..., C), w1 (F, C), b1 (F,), w2 (D, F), b2 (D,); the result is (..., D) in x's dtype (autocast's under
    autocast). activation: relu, gelu (exact), gelu_tanh or silu. Raises ValueError for another activation, RuntimeError
    where shapes do not fit, with torch's own message; BackendError as `use_backend` says.
    Source: Vaswani et al., 2017, arXiv:1706.03762, section 3.3.
    """
    arguments = (x, w1, b1, w2, b2, None, None, 0.0, _known(activation), dropout_p, 0.0)
    return FEED_FORWARD(*arguments) if dispatch.intervening or x.is_cuda else _eager(*arguments)


def feed_forward_add_layer_norm(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "relu",
    dropout_p: float = 0.0,
    output_dropout_p: float = 0.0,
) -> Tensor:
    """LayerNorm(x + dropout(feed_forward(x))): the whole second block of a post-norm transformer layer.

    As `feed_forward`, with D = C; norm_weight and norm_bias (C,). dropout_p acts on the hidden activation,
    output_dropout_p on what is added to x. The result is in x's dtype (under autocast on a GPU: fp32).
    """
    arguments = (x, w1, b1, w2, b2, norm_weight, norm_bias, eps, _known(activation), dropout_p, output_dropout_p)
    return FEED_FORWARD(*arguments) if dispatch.intervening or x.is_cuda else _eager(*arguments)


def _known(activation: str) -> str:
    if activation not in ACTIVATIONS:
        raise ValueError(f"got activation {activation!r}; expected one of {', '.join(ACTIVATIONS)}")
    return activation


def _eager(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    activation: str,
    dropout_p: float,
    output_dropout_p: float,
) -> Tensor:
    h = ACTIVATIONS[activation](F.linear(x, w1, b1))
    y = F.linear(F.dropout(h, dropout_p) if dropout_p > 0.0 else h, w2, b2)
    if norm_weight is None:
        return y
    y = x + (F.dropout(y, output_dropout_p) if output_dropout_p > 0.0 else y)
    return F.layer_norm(y, norm_weight.shape, norm_weight, norm_bias, eps)


@dataclass(frozen=True)
class FeedForwardCall(ProductCall):
    hidden: int
    activation: str
    norm: bool

    def shapes(self) -> str:
        return super().shapes() + f" hidden {self.hidden} {self.activation}" + (" + norm" if self.norm else "")


def _signature(x: Tensor, *rest: Any) -> tuple[Any, ...]:
    *tensors, _eps, activation, dropout_p, output_dropout_p = rest
    return (key(x), *map(key, tensors), activation, dropout_p > 0.0, output_dropout_p > 0.0, exact_fp32())


def _describe(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    activation: str,
    dropout_p: float,
    output_dropout_p: float,
    *,
    situation: Situation,
) -> FeedForwardCall:
    tensors = (x, w1, b1, w2, b2, norm_weight, norm_bias)
    width, hidden, columns = x.shape[-1], w1.shape[0], w2.shape[0]
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "w1": (w1, (hidden, width)),
        "b1": (b1, (hidden,)),
        "w2": (w2, (columns, hidden)),
        "b2": (b2, (columns,)),
        "norm_weight": (norm_weight, (width,)),
        "norm_bias": (norm_bias, (width,)),
    }
    misfit = shape_misfit(expected, x.device)
    if misfit is None and norm_weight is not None:
        misfit = norm_misfit(x, (w1, b1, w2, b2), x, (norm_weight, norm_bias))
        misfit = misfit or (None if columns == width else f"{columns} outputs can't be added to {width} inputs")
    if misfit is None and autocast_dtype(x) is None:
        given = [t for t in (w1, b1, w2, b2) if t is not None]
        misfit = next((f"{t.dtype} beside {x.dtype} inputs" for t in given if t.dtype != x.dtype), None)
    return FeedForwardCall(
        device=x.device,
        architecture=dispatch.architecture(x.device),
        dtype=x.dtype,
        tensor_type=dispatch.tensor_type(tensors),
        needs_grad=wants_grad(*tensors),
        situation=situation,
        rows=x.shape[:-1].numel(),
        width=width,
        columns=columns,
        dtypes=tuple(None if t is None else t.dtype for t in tensors),
        dropout=dropout_p > 0.0 or output_dropout_p > 0.0,
        exact_fp32=exact_fp32(),
        misfit=misfit,
        hidden=hidden,
        activation=activation,
        norm=norm_weight is not None,
    )


class TritonFeedForward(TritonProduct):
    """Two products with everything between and behind them fused in; keeps the hidden activation for backward."""

    op = "feed_forward"
    keeps_hidden: ClassVar[bool] = True

    def rehearse(self, call: FeedForwardCall) -> None:
        _, _, b1, _, b2, norm_weight, norm_bias = call.dtypes
        dtype, grad = call.computed_dtype, call.needs_grad
        out = result_dtype(call.dtype, call.device_type)
        x, w1 = meta(dtype, call.rows, call.width), meta(dtype, call.hidden, call.width)
        w2, biases = (
            meta(dtype, call.columns, call.hidden),
            (meta(b1 and dtype, call.hidden), meta(b2 and dtype, call.columns)),
        )
        norm = [meta(d, call.columns) for d in (norm_weight, norm_bias)]
        residual = meta(call.dtype if call.norm and dtype != call.dtype else None, call.rows, call.columns)
        # Which of the two dropouts acts is not told apart: where one does, the other's form is compiled as well.
        for seed in (None, *[meta(torch.int64, 1)] * call.dropout):
            p = 0.0 if seed is None else 0.5
            settings = (seed, call.activation, 0, p, p, 1e-5, out, grad, self.keeps_hidden)
            y, saved, xhat, rstd = _run_forward(x, w1, biases[0], w2, biases[1], *norm, residual, *settings)  # type: ignore[call-arg]
            if not grad:
                continue
            if not self.keeps_hidden:
                saved = _run_hidden(x, w1, biases[0], seed, call.activation, 0, p)
            dz = y
            if call.norm:
                dz = residual_norm_backward(y, xhat, rstd, norm[0], seed, 0, p, call.dtype, dtype)[1]
            _run_hidden_backward(dz, w2, saved, seed, call.activation, 0, p, b1 is not None)

    def compiled_key(self, call: FeedForwardCall) -> Any:
        return super().compiled_key(call), call.hidden, call.activation, call.norm

    def run(
        self,
        x: Tensor,
        w1: Tensor,
        b1: Tensor | None,
        w2: Tensor,
        b2: Tensor | None,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        eps: float,
        activation: str,
        dropout_p: float,
        output_dropout_p: float,
    ) -> Tensor:
        keep = wants_grad(x, w1, b1, w2, b2, norm_weight, norm_bias)
        drops = dropout_p > 0.0 or (output_dropout_p > 0.0 and norm_weight is not None)
        seed, offset = next_seed(x.device) if drops else (None, 0)
        out = result_dtype(x.dtype, x.device.type)
        # Under autocast the residual keeps x's own dtype; otherwise x is the residual, and its gradients are added in a
        # product's epilogue.
        cast, *parameters = autocast(x, w1, b1, w2, b2)
        residual = x if norm_weight is not None and cast is not x else None
        norm = (norm_weight, norm_bias, residual)
        settings = (activation, offset, dropout_p, output_dropout_p, eps, out, keep, self.keeps_hidden)
        return _forward(cast, *parameters, *norm, seed, *settings)[0]


class TritonRecomputingFeedForward(TritonFeedForward):
    """Keeps nothing of the hidden activation, a block's largest: the backward computes it once more."""

    name = "triton_recompute"
    keeps_hidden = False

    def advice(self, call: FeedForwardCall) -> str | None:
        return "it trades a product's time for memory: ask for it by name"


class EagerFeedForward(Implementation):
    name = "eager"

    def run(self, *arguments: Any) -> Tensor:
        return _eager(*arguments)


FEED_FORWARD = Op(
    "feed_forward",
    signature=_signature,
    describe=_describe,
    implementations=(TritonFeedForward(), TritonRecomputingFeedForward(), EagerFeedForward()),
)


# ---------------------------------------------------------------------------------------------------------------------
# Registration. The backward's other products are torch's own, in sight of dispatch modes and compilers.


def _run_forward(
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
    keep: bool,
    keep_hidden: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dropout = dropout_of(p, seed, offset) if p > 0.0 else None
    keep_hidden &= keep
    keep_pre = keep_hidden and activation != "relu"
    h, pre = kernels.linear_forward(x, w1, b1, activation=activation, dropout=dropout, keep_pre=keep_pre)
    saved = pre if pre is not None else h if keep_hidden else h.new_empty(0)
    if norm_weight is None:
        y, _ = kernels.linear_forward(h, w2, b2)
        return y, saved, y.new_empty(0), y.new_empty(0)
    dropout = dropout_of(output_p, seed, offset) if output_p > 0.0 else None
    residual = x if residual is None else residual
    y, xhat, rstd = linear_norm.linear_norm_forward(
        h, w2, b2, residual, norm_weight, norm_bias, eps, dropout=dropout, out_dtype=out_dtype, keep=keep
    )
    return y, saved, *(y.new_empty(0) if t is None else t for t in (xhat, rstd))  # type: ignore[return-value]


def _fake_forward(
    x: Tensor, w1: Tensor, b1: Any, w2: Tensor, b2: Any, norm_weight: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *_, out_dtype, keep, keep_hidden = rest
    dtype = x.dtype if norm_weight is None else out_dtype
    y = x.new_empty((*x.shape[:-1], w2.shape[0]), dtype=dtype)
    saved = x.new_empty((*x.shape[:-1], w1.shape[0]) if keep and keep_hidden else 0)
    if norm_weight is None or not keep:
        return y, saved, y.new_empty(0), y.new_empty(0)
    return y, saved, torch.empty_like(y), y.new_empty(x.shape[:-1].numel(), dtype=torch.float32)


def _run_hidden(
    x: Tensor, w1: Tensor, b1: Tensor | None, seed: Tensor | None, activation: str, offset: int, p: float
) -> Tensor:
    """What the forward would have kept: the hidden activation for ReLU, what it was applied to for the others."""
    if activation != "relu":
        return kernels.linear_forward(x, w1, b1)[0]
    dropout = dropout_of(p, seed, offset) if p > 0.0 else None
    return kernels.linear_forward(x, w1, b1, activation=activation, dropout=dropout)[0]


def _fake_hidden(x: Tensor, w1: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], w1.shape[0]))


def _run_hidden_backward(
    dz: Tensor, w2: Tensor, saved: Tensor, seed: Tensor | None, activation: str, offset: int, p: float, with_db: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dropout = dropout_of(p, seed, offset) if p > 0.0 else None
    dpre, h, db = kernels.linear_backward(dz, w2, saved, activation=activation, dropout=dropout, with_dbias=with_db)
    return dpre, dz.new_empty(0) if activation == "relu" else h, dz.new_empty(0) if db is None else db


def _fake_hidden_backward(
    dz: Tensor, w2: Tensor, saved: Tensor, seed: Tensor | None, activation: str, offset: int, p: float, with_db: bool
) -> tuple[Tensor, Tensor, Tensor]:
    h = dz.new_empty(0) if activation == "relu" else torch.empty_like(saved)
    return torch.empty_like(saved), h, w2.new_empty(w2.shape[1] if with_db else 0)


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        with below_autograd():
            y, saved, xhat, rstd = _forward(*arguments)
        ctx.save_for_backward(*arguments[:8], arguments[8], saved, xhat, rstd)
        ctx.settings = arguments[9:14]
        ctx.mark_non_differentiable(saved, xhat, rstd)
        ctx.set_materialize_grads(False)
        return y, saved, xhat, rstd

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> Any:
        if dy is None:
            return (None,) * 17
        *inputs, seed, saved, xhat, rstd = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:8]
        if torch.is_grad_enabled():
            return (*eager_gradients(with_masks(seed, *ctx.settings), inputs, dy, wanted), *(None,) * 9)
        return (*_gradients(inputs, seed, saved, xhat, rstd, ctx.settings, dy, wanted), *(None,) * 9)


def _gradients(
    inputs: list[Any],
    seed: Tensor | None,
    saved: Tensor,
    xhat: Tensor,
    rstd: Tensor,
    settings: tuple[Any, ...],
    dy: Tensor,
    wanted: Any,
) -> tuple[Tensor | None, ...]:
    x, w1, b1, w2, b2, norm_weight, norm_bias, residual = inputs
    activation, offset, p, output_p, _ = settings
    ds, sums = None, None
    if norm_weight is None:
        dz = flat(dy)
        db2 = dz.sum(0) if wanted[4] else None
    else:
        dtype = x.dtype if residual is None else residual.dtype
        dropped = seed if output_p > 0.0 else None
        ds, dz, sums = residual_norm_backward(dy, xhat, rstd, norm_weight, dropped, offset, output_p, dtype, x.dtype)
        dz, db2 = flat(dz), sums[2].to(b2.dtype) if wanted[4] else None
    if saved.numel() == 0:
        saved = _hidden(x, w1, b1, seed, activation, offset, p)
    dpre, h, db1 = _hidden_backward(dz, w2, flat(saved), seed, activation, offset, p, wanted[2])
    h = flat(saved) if activation == "relu" else h
    dx = None
    if wanted[0]:
        adds = ds is not None and residual is None
        dx = (torch.addmm(flat(ds), dpre, w1) if adds else torch.mm(dpre, w1)).view(x.shape)  # type: ignore[arg-type]
    return (
        dx,
        torch.mm(dpre.t(), flat(x)) if wanted[1] else None,
        db1 if wanted[2] else None,
        torch.mm(dz.t(), h) if wanted[3] else None,
        db2,
        sums[0] if sums is not None and wanted[5] else None,
        sums[1].to(norm_bias.dtype) if sums is not None and wanted[6] else None,
        ds if wanted[7] else None,
    )


def with_masks(seed: Tensor | None, activation: str, offset: int, p: float, output_p: float, eps: float) -> Any:
    """The reference with the very elements dropped that the kernels drop."""

    def dropped(y: Tensor, p: float, hidden: bool) -> Tensor:
        if seed is None or p == 0.0:
            return y
        heads = 2 if hidden else 1
        kept = keep_mask(seed, offset, p, heads, y.shape[:-1].numel(), y.shape[-1], tiles=hidden)[-1]
        return torch.where(kept.view(y.shape), y * scale(p), 0.0)

    def reference(
        x: Tensor,
        w1: Tensor,
        b1: Tensor | None,
        w2: Tensor,
        b2: Tensor | None,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        residual: Tensor | None,
    ) -> Tensor:
        y = F.linear(dropped(ACTIVATIONS[activation](F.linear(x, w1, b1)), p, True), w2, b2)
        if norm_weight is None:
            return y
        y = (x if residual is None else residual) + dropped(y, output_p, False)
        bias_of_norm = None if norm_bias is None else norm_bias.to(y.dtype)
        return F.layer_norm(y, norm_weight.shape, norm_weight.to(y.dtype), bias_of_norm, eps)

    return reference


def _autograd_forward(*arguments: Any) -> Any:
    if wants_grad(*arguments[:8]):
        return _Forward.apply(*arguments)
    with below_autograd():
        return _forward(*arguments)


def _autograd_hidden(*arguments: Any) -> Any:
    with below_autograd():
        return _hidden(*arguments)


def _autograd_hidden_backward(*arguments: Any) -> Any:
    with below_autograd():
        return _hidden_backward(*arguments)


_forward = define(
    "feed_forward(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? norm_weight, Tensor? norm_bias, "
    "Tensor? residual, Tensor? seed, str activation, int offset, float p, float output_p, float eps, ScalarType out_dtype, "
    "bool keep, bool keep_hidden) -> (Tensor, Tensor, Tensor, Tensor)",
    run=_run_forward,
    fake=_fake_forward,
    autograd=_autograd_forward,
)
_hidden = define(
    "feed_forward_hidden(Tensor x, Tensor w1, Tensor? b1, Tensor? seed, str activation, int offset, float p) -> Tensor",
    run=_run_hidden,
    fake=_fake_hidden,
    autograd=_autograd_hidden,
)
_hidden_backward = define(
    "feed_forward_hidden_backward(Tensor dz, Tensor w2, Tensor saved, Tensor? seed, str activation, int offset, float p, "
    "bool with_db) -> (Tensor, Tensor, Tensor)",
    run=_run_hidden_backward,
    fake=_fake_hidden_backward,
    autograd=_autograd_hidden_backward,
)
