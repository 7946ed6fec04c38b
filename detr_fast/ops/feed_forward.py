"""A transformer's feed-forward block: the contract, its eager reference, its Triton implementations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from detr_fast import dispatch
from detr_fast.dispatch import Implementation, Op, Situation
from detr_fast.kernels.feed_forward import MAX_COLUMNS
from detr_fast.ops.boundary import wants_grad
from detr_fast.ops.dropout import next_seed
from detr_fast.ops.feed_forward_autograd import ACTIVATIONS, forward, run_backward, run_forward
from detr_fast.ops.linear_add_layer_norm import norm_misfit, result_dtype
from detr_fast.ops.products import (
    ProductCall,
    TritonProduct,
    autocast,
    autocast_dtype,
    exact_fp32,
    key,
    meta,
    shape_misfit,
)


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
    one_kernel: ClassVar[bool] = False

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
            settings = (seed, call.activation, 0, p, p, 1e-5, out, grad, self.keeps_hidden, self.one_kernel)
            y, saved, xhat, rstd = run_forward(x, w1, biases[0], w2, biases[1], *norm, residual, *settings)  # type: ignore[call-arg]
            if not grad:
                continue
            kept: Any = (xhat, rstd, norm[0]) if call.norm else (None, None, None)
            hidden: Any = (saved, None, None, None) if self.keeps_hidden else (None, x, w1, biases[0])
            settled = (seed, call.activation, 0, p, p, call.dtype, b1 is not None)
            run_backward(y, *kept, w2, *hidden, *settled)  # type: ignore[call-arg]

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
        settings = (activation, offset, dropout_p, output_dropout_p, eps, out, keep, self.keeps_hidden, self.one_kernel)
        return forward(cast, *parameters, *norm, seed, *settings)[0]


class TritonRecomputingFeedForward(TritonFeedForward):
    """Keeps nothing of the hidden activation, a block's largest: the backward computes it once more, in the same launch."""

    name = "triton_recompute"
    keeps_hidden = False

    def advice(self, call: FeedForwardCall) -> str | None:
        return "it trades a product's time for memory: ask for it by name"


class TritonOneKernelFeedForward(TritonRecomputingFeedForward):
    """The whole block in one launch, whose hidden activation is in no memory; the backward is the recomputing one's."""

    name = "triton_one_kernel"
    one_kernel = True

    def why_not(self, call: FeedForwardCall) -> str | None:
        if max(call.width, call.columns) > MAX_COLUMNS:
            return f"{call.width} columns in and {call.columns} out: rows of up to {MAX_COLUMNS} fit a tile"
        return super().why_not(call)

    def advice(self, call: FeedForwardCall) -> str | None:
        return "each program reads all weights, which no GPU was measured to be fast at: ask for it by name"


class EagerFeedForward(Implementation):
    name = "eager"

    def run(self, *arguments: Any) -> Tensor:
        return _eager(*arguments)


FEED_FORWARD = Op(
    "feed_forward",
    signature=_signature,
    describe=_describe,
    implementations=(
        TritonFeedForward(),
        TritonRecomputingFeedForward(),
        TritonOneKernelFeedForward(),
        EagerFeedForward(),
    ),
)
