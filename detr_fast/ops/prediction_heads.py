"""Small fp32 heads over the same rows, a perceptron and a linear map beside it: the contract, its eager reference, its Triton kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from detr_fast import dispatch
from detr_fast.dispatch import Implementation, Op, Situation
from detr_fast.kernels import mlp as kernels
from detr_fast.kernels.mlp import Kept, Layers
from detr_fast.ops import regimes
from detr_fast.ops.boundary import define, wants_grad
from detr_fast.ops.layouts import key, layouts, rehearsed
from detr_fast.ops.products import (
    MEASURED_WIDTH,
    ProductCall,
    TritonProduct,
    eager_gradients,
    exact_fp32,
    goes_by_eager_ops,
    shape_misfit,
)

MAX_COLUMNS = 512  # of a row that a program takes through all layers


def prediction_heads(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    class_weight: Tensor | None = None,
    class_bias: Tensor | None = None,
    *,
    sigmoid: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """A perceptron over x, ReLU between its layers and, if asked for, a sigmoid behind them; and beside it a linear map of x.

    DETR's heads, boxes and classes, in fp32, which a box needs: in bf16 it is up to 3 pixels off in an image of 1,333. The kernels multiply by tensor
    cores, as exactly as fp32 does: each product is three of tf32, of factors split in two. Where PyTorch's setting of matmul precision
    allows tf32, it is one, as PyTorch's.

    Shapes: x (..., C); weights, two or three, (H, C), (H, H) and (D, H), and their biases (H,), (H,) and (D,), or None;
    class_weight (N, C) or None, class_bias (N,). Returns (..., D) and (..., N), or None, in x's dtype (autocast's under autocast).
    Raises ValueError for another number of layers, or of biases than of weights; RuntimeError where shapes do not fit, with
    torch's own message; BackendError as `use_backend` says.
    Source: Carion et al., 2020, arXiv:2005.12872, section 3.2.
    """
    if len(weights) not in (2, 3) or len(biases) != len(weights):
        raise ValueError(
            f"got {len(weights)} weights and {len(biases)} biases; expected two or three of both, a linear layer's each"
        )
    middle = (weights[1], biases[1]) if len(weights) == 3 else (None, None)
    parameters = (weights[0], biases[0], *middle, weights[-1], biases[-1], class_weight, class_bias)
    arguments: tuple[Any, ...] = (x, *parameters, sigmoid)
    run = PREDICTION_HEADS if dispatch.intervening or x.is_cuda else _eager
    found: tuple[Tensor, Tensor | None] = run(*arguments)
    return found


def _eager(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor | None,
    b2: Tensor | None,
    w3: Tensor,
    b3: Tensor | None,
    class_weight: Tensor | None,
    class_bias: Tensor | None,
    sigmoid: bool,
) -> tuple[Tensor, Tensor | None]:
    h = F.linear(x, w1, b1).relu()
    if w2 is not None:
        h = F.linear(h, w2, b2).relu()
    y = F.linear(h, w3, b3)
    classes = None if class_weight is None else F.linear(x, class_weight, class_bias)
    return (y.sigmoid() if sigmoid else y), classes


@dataclass(frozen=True)
class PredictionHeadsCall(ProductCall):
    widths: tuple[int, ...]  # from x's to y's
    classes: int
    sigmoid: bool
    wanted: tuple[bool, bool]  # gradients of x, and of any parameter

    @property
    def widest(self) -> int:
        return max(*self.widths, self.classes)

    def shapes(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        beside = f" and {self.classes}" if self.classes else ""
        return f"({self.rows}, {' -> '.join(map(str, self.widths))}{' sigmoid' * self.sigmoid}{beside}) {name}"


def _signature(x: Tensor, *rest: Any) -> tuple[Any, ...]:
    *parameters, sigmoid = rest
    return (key(x), *map(key, parameters), sigmoid, exact_fp32())


def _describe(x: Tensor, *rest: Any, situation: Situation) -> PredictionHeadsCall:
    *parameters, sigmoid = rest
    named = Layers(*parameters)
    weights = [w for w in (named.w1, named.w2, named.w3) if w is not None]
    classes = 0 if named.wc is None else named.wc.shape[0]
    widths = (x.shape[-1], *(w.shape[0] for w in weights))
    return PredictionHeadsCall(
        device=x.device,
        architecture=dispatch.architecture(x.device),
        dtype=x.dtype,
        tensor_type=dispatch.tensor_type((x, *parameters)),
        needs_grad=wants_grad(x, *parameters),
        situation=situation,
        rows=prod(x.shape[:-1]),
        width=x.shape[-1],
        columns=widths[-1],
        dtypes=tuple(None if t is None else t.dtype for t in (x, *parameters)),
        dropout=False,
        exact_fp32=exact_fp32(),
        misfit=_misfit(x, named, weights, widths),
        layouts=layouts(situation, x, *parameters),
        widths=widths,
        classes=classes,
        sigmoid=sigmoid,
        wanted=(wants_grad(x), wants_grad(*parameters)),
    )


def _misfit(x: Tensor, layers: Layers, weights: Sequence[Tensor], widths: Sequence[int]) -> str | None:
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        f"the weight of layer {i}": (w, (after, before))
        for i, (w, (before, after)) in enumerate(zip(weights, pairwise(widths)))
    }
    biases = [b for w, b in zip(layers[::2], layers[1::2]) if w is not None]
    outputs = [*widths[1:], *([] if layers.wc is None else [layers.wc.shape[0]])]
    expected |= {f"the bias of layer {i}": (b, (n,)) for i, (b, n) in enumerate(zip(biases, outputs))}
    if layers.wc is not None:
        expected["class_weight"] = (layers.wc, (outputs[-1], x.shape[-1]))
    misfit = shape_misfit(expected, x.device)
    if misfit is None and None in biases:
        misfit = "a layer has no bias"
    if misfit is None and len(weights) == 3 and widths[1] != widths[2]:
        misfit = f"{widths[1]} and {widths[2]} hidden units: it takes layers of one width"
    return misfit or next(
        (f"{t.dtype} beside {x.dtype} inputs" for t in layers if t is not None and t.dtype != x.dtype), None
    )


class TritonPredictionHeads(TritonProduct):
    """All layers in one launch; backward one through them, one for all weights and biases, and one that adds up their sums."""

    op = "prediction_heads"
    dtypes = frozenset({torch.float32})

    def refusal(self, call: PredictionHeadsCall, by_name: bool) -> str | None:  # type: ignore[override]
        if (call.architecture or "").startswith("gfx"):
            return "AMD's GPUs: its products of split factors are for NVIDIA's tensor cores"
        return super().refusal(call, by_name)

    def why_not(self, call: PredictionHeadsCall) -> str | None:
        if call.situation.autocast not in (None, torch.float32):
            return f"autocast to {call.situation.autocast}: it is for heads that are kept in fp32"
        if not 1 <= min(call.widths) <= call.widest <= MAX_COLUMNS:
            return f"layers of {min(call.widths)} to {call.widest} columns: it takes 1 to {MAX_COLUMNS}"
        return super().why_not(call)

    def advice(self, call: PredictionHeadsCall) -> str | None:
        if call.situation.regime == "compiled":
            return "under torch.compile cuBLAS and Inductor's own fusion do this"
        if not self._measured(self.op, call.architecture):
            return "matrix products against cuBLAS stay eager until measured: run detr-fast tune"
        if not call.exact_fp32:
            return "tf32 products, which were never measured: cuBLAS does them"
        return self.beyond_measured(call) or regimes.advice(self.op, call, call.rows * call.width * 4)

    def beyond_measured(self, call: PredictionHeadsCall) -> str | None:
        if call.widest > MEASURED_WIDTH:
            return f"{call.widest} columns: measured, and chosen, up to {MEASURED_WIDTH}; ask for it by name"
        return None

    def compiled_key(self, call: PredictionHeadsCall) -> Any:
        return super().compiled_key(call), call.widths, call.classes, call.sigmoid, call.wanted

    def rehearse(self, call: PredictionHeadsCall) -> None:
        x, *parameters = rehearsed(call.layouts)
        y, classes, h1, h2 = _run_forward(x, *parameters, call.sigmoid)
        if call.needs_grad:
            own = y if call.sigmoid else None
            dclasses = classes if call.classes else None
            _run_backward(y, dclasses, x, h1, h2 if len(call.widths) == 4 else None, own, *parameters, call.wanted)

    def run(self, *arguments: Any) -> tuple[Tensor, Tensor | None]:
        y, classes, *_ = _forward(*arguments)
        return y, None if arguments[7] is None else classes


class EagerPredictionHeads(Implementation):
    """PyTorch's products, layer by layer."""

    name = "eager"

    def run(self, *arguments: Any) -> tuple[Tensor, Tensor | None]:
        return _eager(*arguments)


PREDICTION_HEADS = Op(
    "prediction_heads",
    signature=_signature,
    describe=_describe,
    implementations=(TritonPredictionHeads(), EagerPredictionHeads()),
    work=regimes.bytes_of,
)


# ---------------------------------------------------------------------------------------------------------------------
# Registration: forward and backward are ops of their own.


def _run_forward(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *parameters, sigmoid = rest
    found = kernels.mlp_forward(x, Layers(*parameters), ends_in_sigmoid=sigmoid)
    return tuple(x.new_empty(0) if t is None else t for t in found)


def _fake_forward(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    w1, _, w2, _, w3, _, class_weight, *_ = rest
    outputs = (w3, class_weight, w1, w2)
    return tuple(x.new_empty(0 if w is None else (*x.shape[:-1], w.shape[0])) for w in outputs)


def _run_backward(
    dy: Tensor, dclasses: Tensor | None, x: Tensor, h1: Tensor, h2: Tensor | None, y: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    *parameters, wanted = rest
    kinds = {"with_dx": wanted[0], "with_dw": wanted[1]}
    found = kernels.mlp_backward(dy, dclasses, x, Kept(h1, h2, y), Layers(*parameters), **kinds)
    dx, gradients = (x.new_empty(0) if t is None else t for t in found)
    return dx, gradients


def _fake_backward(dy: Tensor, dclasses: Tensor | None, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *parameters, wanted = rest[3:]
    total = sum(t.numel() for t in parameters if t is not None)
    return x.new_empty(x.shape if wanted[0] else 0), x.new_empty(total if wanted[1] else 0)


class _Forward(torch.autograd.Function):
    """Keeps the hidden activations, and y behind a sigmoid."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> Any:
        *parameters, sigmoid = rest
        y, classes, h1, h2 = _forward.below(x, *rest)
        middle, beside = parameters[2] is not None, parameters[6] is not None
        ctx.save_for_backward(x, *parameters, h1, h2 if middle else None, y if sigmoid else None)
        ctx.sigmoid = sigmoid
        ctx.mark_non_differentiable(h1, h2, *(() if beside else (classes,)))
        ctx.set_materialize_grads(False)
        return y, classes, h1, h2

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dclasses: Tensor | None, *_: None) -> Any:
        if dy is None and dclasses is None:
            return (None,) * 10
        x, *parameters, h1, h2, y = ctx.saved_tensors
        w3, class_weight = parameters[4], parameters[6]
        dy = x.new_zeros((*x.shape[:-1], w3.shape[0])) if dy is None else dy
        if class_weight is not None and dclasses is None:
            dclasses = x.new_zeros((*x.shape[:-1], class_weight.shape[0]))
        wanted = ctx.needs_input_grad[:9]
        if goes_by_eager_ops(dy, dclasses):
            return (*_eager_gradients(ctx.sigmoid, (x, *parameters), dy, dclasses, wanted), None)
        arguments = (dy, dclasses, x, h1, h2, y, *parameters, [wanted[0], any(wanted[1:])])
        dx, gradients = _backward(*arguments)
        return (dx if wanted[0] else None, *_in_turn(gradients, parameters, wanted[1:]), None)


def _in_turn(gradients: Tensor, parameters: Sequence[Tensor | None], wanted: Sequence[bool]) -> list[Tensor | None]:
    """Each parameter's gradient, of all in one piece."""
    given = [t for t in parameters if t is not None]
    parts = iter(gradients.split([t.numel() for t in given]) if any(wanted) else ())
    found = (next(parts, None) if t is not None else None for t in parameters)
    return [
        g.view(t.shape) if want and g is not None and t is not None else None
        for g, t, want in zip(found, parameters, wanted)
    ]


def _eager_gradients(
    sigmoid: bool, inputs: Sequence[Tensor | None], dy: Tensor, dclasses: Tensor | None, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """To be differentiated again, or of a batch of gradients."""

    def reference(x: Tensor, *parameters: Any) -> Tensor:
        y, classes = _eager(*(x, *parameters, sigmoid))
        return y if classes is None else torch.cat([y, classes], -1)

    upstream = dy if dclasses is None else torch.cat([dy, dclasses], -1)
    return eager_gradients(reference, inputs, upstream, wanted)


def _autograd_forward(x: Tensor, *rest: Any) -> Any:
    return _Forward.apply(x, *rest) if wants_grad(x, *rest[:8]) else _forward.below(x, *rest)


def _autograd_backward(*arguments: Any) -> Any:
    return _backward.below(*arguments)


_PARAMETERS = (
    "Tensor w1, Tensor b1, Tensor? w2, Tensor? b2, Tensor w3, Tensor b3, Tensor? class_weight, Tensor? class_bias"
)
_forward = define(
    f"prediction_heads(Tensor x, {_PARAMETERS}, bool sigmoid) -> (Tensor, Tensor, Tensor, Tensor)",
    run=_run_forward,
    fake=_fake_forward,
    autograd=_autograd_forward,
    together=2,
)
_backward = define(
    f"prediction_heads_backward(Tensor dy, Tensor? dclasses, Tensor x, Tensor h1, Tensor? h2, Tensor? y, {_PARAMETERS}, "
    "bool[2] wanted) -> (Tensor, Tensor)",
    run=_run_backward,
    fake=_fake_backward,
    autograd=_autograd_backward,
)
