"""A transformer's feed-forward block: the contract, its eager reference, its Triton implementations."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from detr_fast import dispatch
from detr_fast.dispatch import Implementation, Op, Situation
from detr_fast.kernels.feed_forward import MAX_COLUMNS
from detr_fast.kernels.rows import sum_rows
from detr_fast.ops.boundary import wants_grad
from detr_fast.ops.dropout import check_probability, next_seed
from detr_fast.ops.feed_forward_autograd import ACTIVATIONS, forward, run_backward, run_forward
from detr_fast.ops.layouts import key, layouts, rehearsed
from detr_fast.ops.linear_add_layer_norm import norm_misfit, result_dtype
from detr_fast.ops.products import (
    MEASURED_HIDDEN,
    ProductCall,
    TritonProduct,
    adds_in_fp32,
    autocast,
    autocast_dtype,
    exact_fp32,
    meta,
    shape_misfit,
)
from detr_fast.ops.regimes import bytes_of
from detr_fast.ops.rounded import leave, rounded, rounds


def feed_forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str = "relu",
    dropout_p: float = 0.0,
    residual: Tensor | None = None,
    output_dropout_p: float = 0.0,
) -> Tensor:
    """dropout(activation(x @ w1^T + b1)) @ w2^T + b2; with a residual its sum with dropout of that, by output_dropout_p.

    Shapes: x (..., C), w1 (F, C), b1 (F,), w2 (D, F), b2 (D,), residual (..., D); the result is (..., D) in x's dtype
    (autocast's under autocast), promoted with the residual's. activation: relu, gelu (exact), gelu_tanh, silu or quick_gelu
    (x sigmoid(1.702 x), CLIP's).
    Raises ValueError for another activation or a probability outside [0, 1], RuntimeError where shapes do not fit, with
    torch's own message; BackendError as `use_backend` says.
    Source: Vaswani et al., 2017, arXiv:1706.03762, section 3.3.
    """
    check_probability(dropout_p)
    check_probability(output_dropout_p, "output_dropout_p")
    arguments = (x, w1, b1, w2, b2, None, None, 0.0, _known(activation), dropout_p, output_dropout_p, residual, False)
    return FEED_FORWARD(*arguments) if dispatch.intervening or x.is_cuda else _eager(*arguments)


@overload
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
    residual: Tensor | None = None,
    return_sum: Literal[False] = False,
) -> Tensor: ...


@overload
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
    residual: Tensor | None = None,
    *,
    return_sum: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@overload
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
    residual: Tensor | None = None,
    return_sum: bool = False,
) -> Tensor | tuple[Tensor, Tensor]: ...


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
    residual: Tensor | None = None,
    return_sum: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """LayerNorm(x + dropout(feed_forward(x))): the whole second block of a post-norm transformer layer.

    As `feed_forward`; norm_weight and norm_bias (D,). dropout_p acts on the hidden activation, output_dropout_p on what is
    added to x, or to the residual (..., D) in its place. The result is in the residual's dtype (under autocast on a GPU:
    fp32). With `return_sum` also what is normalised, for pre-norm transformers, whose next residual it is: in the dtype of
    both terms, promoted. Raises as `feed_forward`.
    """
    check_probability(dropout_p)
    check_probability(output_dropout_p, "output_dropout_p")
    weights = (x, w1, b1, w2, b2, norm_weight, norm_bias)
    arguments = (*weights, eps, _known(activation), dropout_p, output_dropout_p, residual, return_sum)
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
    residual: Tensor | None,
    return_sum: bool,
) -> Any:
    h = ACTIVATIONS[activation](F.linear(x, w1, b1))
    y = F.linear(F.dropout(h, dropout_p) if dropout_p > 0.0 else h, w2, b2)
    if norm_weight is None and residual is None:
        return y
    y = F.dropout(y, output_dropout_p) if output_dropout_p > 0.0 else y
    total = (x if residual is None else residual) + y
    if norm_weight is None:
        return total
    y = F.layer_norm(total, norm_weight.shape, norm_weight, norm_bias, eps)
    return (y, total) if return_sum else y


@dataclass(frozen=True)
class FeedForwardCall(ProductCall):
    hidden: int
    activation: str
    norm: bool
    residual: bool  # beside x
    return_sum: bool
    drops: tuple[bool, bool]  # of the hidden activation, and of what is added to the residual
    bias_grads: tuple[bool, bool]

    @property
    def widest(self) -> int:
        return max(self.width, self.columns, self.hidden)  # no super(): Dynamo does not follow it here

    def shapes(self) -> str:
        behind = " + residual" * self.residual + " + norm" * self.norm + " with sum" * self.return_sum
        return super().shapes() + f" hidden {self.hidden} {self.activation}{behind}"


def _signature(x: Tensor, *rest: Any) -> tuple[Any, ...]:
    *tensors, _eps, activation, dropout_p, output_dropout_p, residual, return_sum = rest
    settings = (activation, dropout_p > 0.0, output_dropout_p > 0.0, return_sum, exact_fp32())
    return (key(x), *map(key, tensors), key(residual), *settings)


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
    residual: Tensor | None,
    return_sum: bool,
    *,
    situation: Situation,
) -> FeedForwardCall:
    tensors = (x, w1, b1, w2, b2, norm_weight, norm_bias, residual)
    width, hidden, columns = x.shape[-1], w1.shape[0], w2.shape[0]
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "w1": (w1, (hidden, width)),
        "b1": (b1, (hidden,)),
        "w2": (w2, (columns, hidden)),
        "b2": (b2, (columns,)),
        "norm_weight": (norm_weight, (columns,)),
        "norm_bias": (norm_bias, (columns,)),
        "residual": (residual, (*x.shape[:-1], columns)),
    }
    misfit = shape_misfit(expected, x.device)
    if misfit is None and (norm_weight is not None or residual is not None):
        if residual is None and columns != width:
            misfit = f"{columns} outputs can't be added to {width} inputs"
        added = x if residual is None else residual
        misfit = misfit or norm_misfit(x, (w1, b1, w2, b2), added, (norm_weight, norm_bias))
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
        rows=prod(x.shape[:-1]),
        width=width,
        columns=columns,
        dtypes=tuple(None if t is None else t.dtype for t in tensors),
        dropout=dropout_p > 0.0 or output_dropout_p > 0.0,
        exact_fp32=exact_fp32(),
        misfit=misfit,
        layouts=layouts(situation, *tensors),
        hidden=hidden,
        activation=activation,
        norm=norm_weight is not None,
        residual=residual is not None,
        return_sum=return_sum,
        drops=(dropout_p > 0.0, output_dropout_p > 0.0 and (norm_weight is not None or residual is not None)),
        bias_grads=(wants_grad(b1), wants_grad(b2)),
    )


class TritonFeedForward(TritonProduct):
    """Two products with everything between and behind them fused in; keeps the hidden activation for backward."""

    op = "feed_forward"
    keeps_hidden: ClassVar[bool] = True
    one_kernel: ClassVar[bool] = False

    def rehearse(self, call: FeedForwardCall) -> None:
        x, w1, b1, w2, b2 = rehearsed(call.layouts[:5], call.computed_dtype)
        norm_weight, norm_bias, residual = rehearsed(call.layouts[5:])
        if call.norm and residual is None and x.dtype != call.dtype:  # what `run` takes for it under autocast
            residual = call.layouts[0].rehearsed()  # type: ignore[union-attr]
        out = result_dtype(call.dtype if residual is None else residual.dtype, call.device_type)
        seed = meta(torch.int64 if any(call.drops) else None, 1)
        p, output_p = (0.5 * drops for drops in call.drops)
        tensors = (x, w1, b1, w2, b2, norm_weight, norm_bias, residual, seed)
        settings = (call.activation, 0, p, output_p, 1e-5, out, call.return_sum, call.needs_grad)
        ways = (self.keeps_hidden, self.one_kernel, False, self._rounds(call.norm, call.situation.autocast, out))
        y, total, saved, active, xhat, rstd, _ = run_forward(*tensors, *settings, *ways)
        if not call.needs_grad:
            return
        kept: Any = (xhat, rstd, norm_weight) if call.norm else (None, None, None)
        kept_bits = active if active.numel() else None
        hidden: Any = (saved, kept_bits, None, None, None) if self.keeps_hidden else (None, None, x, w1, b1)
        dtype = x.dtype if residual is None else residual.dtype
        settled = (seed, call.activation, 0, p, output_p, dtype, call.bias_grads[0])
        for dsum in (None, total) if call.return_sum else (None,):  # which may arrive, or not
            run_backward(y, dsum, *kept, w2, *hidden, *settled)  # type: ignore[call-arg]
        if call.bias_grads[1] and not (call.norm or call.drops[1]):
            sum_rows(y.to(x.dtype))

    def beyond_measured(self, call: FeedForwardCall) -> str | None:
        if call.hidden > MEASURED_HIDDEN:
            return f"{call.hidden} hidden units: measured, and chosen, up to {MEASURED_HIDDEN}; ask for it by name"
        return super().beyond_measured(call)

    def compiled_key(self, call: FeedForwardCall) -> Any:
        return super().compiled_key(call), call.hidden, call.activation, call.return_sum, call.drops

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
        residual: Tensor | None,
        return_sum: bool,
    ) -> Any:
        keep = wants_grad(x, w1, b1, w2, b2, norm_weight, norm_bias, residual)
        if norm_weight is None and residual is None:
            output_dropout_p = 0.0
        drops = dropout_p > 0.0 or output_dropout_p > 0.0
        seed, offset = next_seed(x.device) if drops else (None, 0)
        out = result_dtype(x.dtype if residual is None else residual.dtype, x.device.type)
        # Under autocast the residual keeps x's own dtype; otherwise x is the residual, and its gradients are added in a
        # product's epilogue.
        cast, *parameters = autocast(rounded(x), w1, b1, w2, b2)
        own = norm_weight is not None and residual is None and cast is not x
        residual = x if own else residual
        own = own and adds_in_fp32(x, cast)
        norm = (norm_weight, norm_bias, residual)
        settings = (activation, offset, dropout_p, output_dropout_p, eps, out, return_sum, keep)
        ways = (self.keeps_hidden, self.one_kernel, own, self._rounds(norm_weight is not None, autocast_dtype(x), out))
        y, total, *_, low = forward(cast, *parameters, *norm, seed, *settings, *ways)
        if ways[-1]:
            leave(y, low)
        return (y, total) if return_sum else y

    def _rounds(self, norm: bool, autocast: torch.dtype | None, out: torch.dtype) -> bool:
        return norm and not self.one_kernel and rounds(autocast, out)


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
        if not all(1 <= width <= MAX_COLUMNS for width in (call.width, call.columns)):
            return f"{call.width} columns in and {call.columns} out: rows of 1 to {MAX_COLUMNS} fit a tile"
        if call.computed_dtype.itemsize == 2:
            # Element by element, up to 56 bytes a thread spill, and a hidden unit takes 50 to 290 instructions.
            for width in (call.width, call.hidden, call.columns):
                if width % 8:
                    return f"rows of {width} elements: in 16 bits it takes multiples of 8, whole runs of 16 bytes"
        return super().why_not(call)

    def advice(self, call: FeedForwardCall) -> str | None:
        return "each program reads all weights, which no GPU was measured to be fast at: ask for it by name"


class EagerFeedForward(Implementation):
    name = "eager"

    def run(self, *arguments: Any) -> Any:
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
    work=bytes_of,
)
