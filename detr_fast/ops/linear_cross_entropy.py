"""The last linear layer of a classifier with its cross-entropy: the contract, by PyTorch's operations, by a Triton kernel.

    logits = x @ weight.T + bias,   loss = cross_entropy(logits, target)

Over large vocabularies the (N, V) logits are what fills the memory: here they exist a block of rows at a time. The kernel
turns each block into its gradient at once, and keeps the gradients of x and weight for backward; PyTorch's operations keep
one number a row, and compute each block again.
Sources: Hsu et al., 2024, arXiv:2410.10989, "Liger Kernel"; Wijmans et al., 2024, arXiv:2411.09009, "Cut Your Losses in
Large-Vocabulary Language Models".
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from detr_fast import dispatch
from detr_fast.dispatch import Call, Implementation, Op, Situation, TritonImplementation
from detr_fast.kernels import cross_entropy as kernels
from detr_fast.ops import regimes
from detr_fast.ops.boundary import SEVERAL_DEVICES, define, integers, on_one_device, wants_grad
from detr_fast.ops.linear_cross_entropy_chunked import Chunked, rows_at_once
from detr_fast.ops.linear_probabilities import check_linear, shape_of
from detr_fast.ops.products import autocast_dtype, eager_gradients, flat, goes_by_eager_ops

# With the kernel, as many rows at once as make 256 MiB of logits, but at least 2,048: each block reads and writes the gradient
# of weight in fp32. 4,096 bf16 rows of 1,024 by 128,000 classes, forward and backward on an H200: 6.0 ms in blocks of 1,024 rows,
# 5.6 of 2,048, 5.4 at once; eager takes 6.4, and three times the memory. 256 by 32,000, at once: 0.56 ms, eager 0.95.
BLOCK_BYTES, BLOCK_ROWS = 256 << 20, 2048
WHOLE_ELEMENTS = 1 << 26  # up to 256 MiB of fp32 logits are materialised: that saves backward a matmul


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """`F.cross_entropy(F.linear(x, weight, bias), target, …)` that need not materialise the logits.

    Shapes: x (..., E), weight (V, E), bias (V,) or None, target (...) int64 (other integers are converted) with values in
    [0, V) or `ignore_index`, class_weight (V,) or None. reduction: "mean" (over the class weights of what is not ignored),
    "sum", or "none", which gives (...). The loss is in x's dtype (fp32 under autocast); the softmax is computed in fp32 at
    least. On a GPU up to 256 MiB of fp32 logits are kept whole where that was measured to be faster; beyond, 256 MiB of them, or
    2,048 rows, exist at once, and what weight's gradient takes in fp32. Another target is an error of PyTorch's where it computes, and makes the kernel's loss NaN.
    Raises ValueError for shapes or a reduction that do not fit, TypeError for a target that holds no integers,
    BackendError as `use_backend` says. Sources: Hsu et al., 2024, arXiv:2410.10989; Wijmans et al., 2024, arXiv:2411.09009.
    """
    check_linear(x, weight, bias)
    if target.shape != x.shape[:-1]:
        raise ValueError(
            f"target must be x's shape without the last dimension, {shape_of(x)[:-1]}; got {shape_of(target)}"
        )
    (target,) = integers(target=target)
    if class_weight is not None and class_weight.shape != weight.shape[:1]:
        raise ValueError(f"class_weight must be (V,) = ({weight.shape[0]},); got {shape_of(class_weight)}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"got reduction {reduction!r}; expected 'mean', 'sum' or 'none'")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must lie in [0, 1]; got {label_smoothing}")
    arguments = (x, weight, bias, target, class_weight, ignore_index, reduction, label_smoothing)
    if not (dispatch.intervening or x.is_cuda or target.numel() * weight.shape[0] > WHOLE_ELEMENTS):
        return _eager(*arguments)
    return LINEAR_CROSS_ENTROPY(*arguments)


def _eager(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
) -> Tensor:
    logits = F.linear(x, weight, bias).reshape(-1, weight.shape[0])
    if class_weight is not None:
        class_weight = class_weight.to(logits.dtype)
    loss = F.cross_entropy(
        logits,
        target.flatten(),
        class_weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )
    return loss.view(target.shape) if reduction == "none" else loss


@dataclass(frozen=True)
class LinearCrossEntropyCall(Call):
    rows: int
    classes: int
    features: int
    one_dtype: bool  # x's, weight's and bias's, as autocast leaves them
    one_device: bool
    weighted: bool
    reduction: str
    smoothed: bool

    def shapes(self) -> str:
        return f"({self.rows}, {self.features}) × {self.classes} classes {str(self.dtype).removeprefix('torch.')}"


def _signature(x: Tensor, weight: Tensor, bias: Any, target: Tensor, class_weight: Any, *rest: Any) -> tuple[Any, ...]:
    tensors = (x, weight, bias, target, class_weight)
    described = (None if t is None else (type(t), t.shape, t.dtype, t.device, t.requires_grad) for t in tensors)
    return *described, *rest


def _describe(
    x: Tensor, weight: Tensor, bias: Any, target: Tensor, class_weight: Any, *rest: Any, situation: Situation
) -> LinearCrossEntropyCall:
    return LinearCrossEntropyCall(
        device=x.device,
        architecture=dispatch.architecture(x.device),
        dtype=x.dtype,
        tensor_type=dispatch.tensor_type((x, weight, bias, target, class_weight)),
        needs_grad=wants_grad(x, weight, bias),
        situation=situation,
        rows=target.numel(),
        classes=weight.shape[0],
        features=weight.shape[1],
        one_dtype=situation.autocast is not None or {t.dtype for t in (x, weight, bias) if t is not None} == {x.dtype},
        one_device=on_one_device(x, weight, bias, target, class_weight),
        weighted=class_weight is not None,
        reduction=rest[1],
        smoothed=rest[2] > 0.0,
    )


class TritonLinearCrossEntropy(TritonImplementation):
    """PyTorch's matmuls on a block of rows at a time, and a kernel that turns its logits into their gradient."""

    def why_not(self, call: LinearCrossEntropyCall) -> str | None:
        if not call.one_device:
            return SEVERAL_DEVICES
        if not call.one_dtype:
            return "x, weight and bias are of different dtypes: give them one, or use autocast"
        if call.reduction == "none" and call.needs_grad:
            return "reduction 'none': the gradient of each loss is known in backward only"
        return None

    def advice(self, call: LinearCrossEntropyCall) -> str | None:
        if call.rows * call.classes > WHOLE_ELEMENTS:
            return None  # whole logits are out of the question, and blocks by PyTorch's operations are computed twice
        return regimes.advice("linear_cross_entropy", call, call.rows * call.classes * call.dtype.itemsize)

    def note(self, call: LinearCrossEntropyCall) -> str | None:
        return regimes.note("linear_cross_entropy", call)

    def compiled_key(self, call: LinearCrossEntropyCall) -> Any:
        return (
            call.device,
            call.dtype,
            call.situation.autocast,
            call.classes,
            call.needs_grad,
            call.weighted,
            call.smoothed,
        )

    def prepare(self, call: LinearCrossEntropyCall) -> None:
        dtype = call.situation.autocast or call.dtype
        kernels.compile_cross_entropy(call.classes, dtype, call.weighted, call.needs_grad, call.smoothed, call.device)

    def run(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        class_weight: Tensor | None,
        ignore_index: int,
        reduction: str,
        label_smoothing: float,
    ) -> Tensor:
        x, weight, bias, out_dtype = _as_autocast(x, weight, bias)
        class_weight = None if class_weight is None else class_weight.float()
        wanted = [wants_grad(t) for t in (x, weight, bias)]
        arguments = (flat(x), weight, bias, target.flatten(), class_weight)
        loss, *_ = _forward(*arguments, ignore_index, reduction, label_smoothing, wanted)
        return (loss.view(target.shape) if reduction == "none" else loss).to(out_dtype)


class ChunkedLinearCrossEntropy(Implementation):
    """PyTorch's matmuls on a block of rows at a time."""

    name = "chunked"
    plain = True

    def why_not(self, call: LinearCrossEntropyCall) -> str | None:
        if not call.dtype.is_floating_point:
            return f"{call.dtype} inputs: it takes floating-point ones"
        return None

    def advice(self, call: LinearCrossEntropyCall) -> str | None:
        if call.rows * call.classes <= WHOLE_ELEMENTS:
            return f"{call.rows * call.classes * 4 >> 20} MiB of fp32 logits fit: keeping them saves backward a matmul"
        return None

    def run(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        class_weight: Tensor | None,
        ignore_index: int,
        reduction: str,
        label_smoothing: float,
    ) -> Tensor:
        x, weight, bias, out_dtype = _as_autocast(x, weight, bias)
        labels = target.flatten()
        ignored = labels == ignore_index
        labels = labels.masked_fill(ignored, 0)
        # What an example counts: its class's weight, or nothing where it is ignored.
        counts = torch.ones_like(labels, dtype=torch.promote_types(x.dtype, torch.float32))
        if class_weight is not None:
            class_weight = class_weight.to(counts.dtype)
            counts = class_weight[labels]
        counts = counts.masked_fill(ignored, 0.0)
        counted = label_smoothing == 0.0 and class_weight is None
        present = None if counted else (~ignored).to(counts.dtype)
        loss = Chunked.apply(flat(x), weight, bias, labels, counts, class_weight, present, label_smoothing)
        if reduction == "none":
            return loss.view(target.shape).to(out_dtype)
        return (loss.sum() / _mean_over(counts) if reduction == "mean" else loss.sum()).to(out_dtype)


class EagerLinearCrossEntropy(Implementation):
    """PyTorch's linear and cross_entropy."""

    name = "eager"

    def run(self, *args: Any) -> Tensor:
        return _eager(*args)


LINEAR_CROSS_ENTROPY = Op(
    "linear_cross_entropy",
    signature=_signature,
    describe=_describe,
    implementations=(TritonLinearCrossEntropy(), ChunkedLinearCrossEntropy(), EagerLinearCrossEntropy()),
)


def _as_autocast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None, torch.dtype]:
    """The operands as autocast has them, once and not in every block; and the loss's dtype, as torch's own."""
    low = autocast_dtype(x)
    if low is None:
        return x, weight, bias, x.dtype
    return x.to(low), weight.to(low), None if bias is None else bias.to(low), torch.float32


# ---------------------------------------------------------------------------------------------------------------------
# Registration.


def _run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    smoothing: float,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    at_once = rows_at_once(BLOCK_BYTES // x.element_size(), weight.shape[0], BLOCK_ROWS)
    unit = None
    if class_weight is not None and x.dtype is torch.float16:  # which holds gradients about 1, and not of 1e-6
        unit = _largest_factor(target, class_weight, ignore_index, smoothing)
        class_weight = class_weight / unit
    inputs = (x, weight, bias, target, class_weight, ignore_index, smoothing)
    losses, counts, *gradients = kernels.linear_cross_entropy_forward(*inputs, (*wanted,), at_once)
    if reduction == "mean":
        # As PyTorch's: the mean of rows that are all ignored is NaN, and has gradients of zero.
        if class_weight is None:
            counted = counts.sum()
            scale = counted.reciprocal().nan_to_num_(nan=math.nan, posinf=0.0)
        else:
            counted = _mean_over(counts)
            scale = counted.reciprocal().masked_fill_((target == ignore_index).all(), 0.0)
        loss = losses.sum() / counted
    else:
        loss, scale = losses if reduction == "none" else losses.sum(), losses.new_ones(())
        if unit is not None:
            loss, scale = loss * unit, scale * unit
    dx, dw, db = (x.new_empty(0) if d is None else d for d in gradients)
    return loss, scale, dx, dw, db


def _mean_over(counts: Tensor) -> Tensor:
    """What a mean divides by: NaN where rows count nothing, whatever their losses."""
    counted = counts.sum()
    return counted.masked_fill(counted == 0.0, math.nan)


def _largest_factor(target: Tensor, class_weight: Tensor, ignore_index: int, smoothing: float) -> Tensor:
    """What no element of a row's logits' gradient exceeds, whatever the row; 1 where all of them are zero."""
    chosen = class_weight[target.clamp(0, class_weight.numel() - 1)].masked_fill(target == ignore_index, 0.0)
    at_label = F.pad(chosen, (0, 1)).amax() * (1.0 - smoothing)  # 0 where there are no rows
    largest = at_label + class_weight.mean() * smoothing
    return torch.where(largest > 0.0, largest, 1.0)


def _fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, class_weight: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _, reduction, _, wanted = rest

    def new(shape: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        return x.new_empty(shape, dtype=dtype)

    dx = new(x.shape if wanted[0] else 0, x.dtype)
    dw, db = (new(s) if want else new(0, x.dtype) for s, want in zip((weight.shape, weight.shape[:1]), wanted[1:]))
    return new(target.shape if reduction == "none" else ()), new(()), dx, dw, db


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        loss, scale, dx, dw, db = _forward.below(*arguments)
        ctx.save_for_backward(*arguments[:5], scale, dx, dw, db)
        ctx.settings = arguments[5:8]
        ctx.mark_non_differentiable(scale, dx, dw, db)
        ctx.set_materialize_grads(False)
        return loss, scale, dx, dw, db

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, *_: Any) -> Any:
        if g is None:
            return (None,) * 9
        *inputs, scale, dx, dw, db = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        if goes_by_eager_ops(g):

            def again(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
                return _eager(x, weight, bias, *inputs[3:], *ctx.settings)

            return (*eager_gradients(again, inputs[:3], g, wanted), *[None] * 6)
        scale = of_rows = g * scale
        if inputs[4] is not None and ctx.settings[1] == "mean":  # NaN where no label's class has a weight
            ignored = inputs[3] == ctx.settings[0]
            of_rows = scale.masked_fill(ignored, 0.0)[:, None]
        scales = of_rows, scale, scale
        gradients = (_times(d, s, of) if want else None for d, s, of, want in zip((dx, dw, db), scales, inputs, wanted))
        return (*gradients, *[None] * 6)


def _times(gradient: Tensor, scale: Tensor, of: Tensor) -> Tensor:
    """gradient * scale in `of`'s dtype, rounded once and without an fp32 copy of as many bytes as the weight's gradient."""
    return torch.mul(gradient, scale, out=torch.empty_like(gradient, dtype=of.dtype))


def _autograd(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Any:
    if wants_grad(x, weight, bias):
        return _Forward.apply(x, weight, bias, *rest)
    return _forward.below(x, weight, bias, *rest)


_forward = define(
    "linear_cross_entropy(Tensor x, Tensor weight, Tensor? bias, Tensor target, Tensor? class_weight, int ignore_index, "
    "str reduction, float smoothing, bool[3] wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    run=_run,
    fake=_fake,
    autograd=_autograd,
)
