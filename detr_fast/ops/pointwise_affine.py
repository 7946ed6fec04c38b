"""A 1×1 convolution with what follows it in a ResNet of frozen batch norms: the contract, its eager reference, its Triton kernel.

The backward is the pass of `ops.channel_affine`, and products of torch's. Where a residual trains, too, that pass writes one gradient
instead of two: with m what arrives where the output is above zero, (m * scale) @ w = m @ (scale * w), and
(m * scale)^T @ x = scale * (m^T @ x).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from detr_fast import dispatch
from detr_fast.dispatch import Implementation, Op, Situation
from detr_fast.kernels import channel_affine as passes
from detr_fast.kernels.configs import POINTWISE_LONG
from detr_fast.kernels.pointwise import pointwise_forward
from detr_fast.kernels.product_tiles import plus_product
from detr_fast.kernels.rows import MAX_BLOCK
from detr_fast.ops.bottlenecks import LAUNCH
from detr_fast.ops.boundary import SEVERAL_DEVICES, define, on_one_device, wants_grad
from detr_fast.ops.channel_affine import channel_affine, channel_affine_backward
from detr_fast.ops.layouts import key, layouts, rehearsed
from detr_fast.ops.pixels import images_of, input_gradient, pixels_of, rows_of
from detr_fast.ops.products import ProductCall, TritonProduct, autocast, autocast_dtype, goes_by_eager_ops
from detr_fast.ops.regimes import bytes_of

MEASURED_CHANNELS = (
    512  # of the fewer ones of input and result, of what `tune` measures: those of ResNet-50's last stage
)


def pointwise_affine(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
) -> Tensor:
    """relu(conv2d(x, weight) * scale + shift + residual * residual_scale): of a ResNet of frozen batch norms, a 1×1 convolution and its end.

    Shapes: x (B, K, H, W), weight (N, K, 1, 1), scale, shift and residual_scale (N,), residual (B, N, H, W); without a
    residual_scale the residual is added as it is. Returns (B, N, H, W) in x's dtype (autocast's under autocast), channels last.
    Sums are in fp32; the kernel rounds once, eager after the convolution, too.
    Raises ValueError where the shapes do not fit; BackendError as `use_backend` says.
    Sources: He et al., 2015, arXiv:1512.03385; Carion et al., 2020, arXiv:2005.12872, section A.4 (frozen batch norms).
    """
    per_channel = [t for t in (scale, shift, residual_scale) if t is not None]
    if (
        x.ndim != 4
        or weight.shape[1:] != (x.shape[1], 1, 1)
        or any(t.shape != weight.shape[:1] for t in per_channel)
        or (residual is not None and residual.shape != (x.shape[0], weight.shape[0], *x.shape[2:]))
        or (residual is None and residual_scale is not None)
    ):
        raise ValueError(
            f"got x {tuple(x.shape)}, weight {tuple(weight.shape)}, {', '.join(str(tuple(t.shape)) for t in per_channel)} for "
            f"the result's channels and residual {None if residual is None else tuple(residual.shape)}; expected (B, K, H, W), "
            "(N, K, 1, 1), (N,) for each, and a residual (B, N, H, W), or neither residual nor its scale"
        )
    arguments = x, weight, scale, shift, residual, residual_scale
    return POINTWISE_AFFINE(*arguments) if dispatch.intervening or x.is_cuda else _eager(*arguments)


@dataclass(frozen=True)
class PointwiseAffineCall(ProductCall):
    residual: bool
    wanted: tuple[bool, bool]  # whether x or the weight, and whether the residual, need a gradient
    parameter_grad: bool

    def shapes(self) -> str:
        return super().shapes() + " residual" * self.residual


def _signature(*tensors: Any) -> tuple[Any, ...]:
    return tuple(map(key, tensors))


def _describe(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    residual_scale: Tensor | None,
    *,
    situation: Situation,
) -> PointwiseAffineCall:
    tensors = x, weight, scale, shift, residual, residual_scale
    computed = autocast_dtype(x) or x.dtype
    misfit = None if on_one_device(*tensors) else SEVERAL_DEVICES
    if misfit is None and autocast_dtype(x) is None and weight.dtype != x.dtype:
        misfit = f"a weight of {weight.dtype} beside {x.dtype} inputs"
    if misfit is None and residual is not None and residual.dtype != computed:
        misfit = f"a residual of {residual.dtype} beside a product in {computed}: it takes one dtype for both"
    batch, width, height, columns = x.shape
    return PointwiseAffineCall(
        device=x.device,
        architecture=dispatch.architecture(x.device),
        dtype=x.dtype,
        tensor_type=dispatch.tensor_type(tensors),
        needs_grad=wants_grad(x, weight, residual),
        situation=situation,
        rows=batch * height * columns,
        width=width,
        columns=weight.shape[0],
        dtypes=tuple(None if t is None else t.dtype for t in tensors),
        dropout=False,
        exact_fp32=False,
        misfit=misfit,
        layouts=layouts(situation, *tensors),
        residual=residual is not None,
        wanted=(wants_grad(x, weight), wants_grad(residual)),
        parameter_grad=wants_grad(scale, shift, residual_scale),
    )


def measured_as(residual: bool, width: int, columns: int) -> str:
    """The name of the measurements that a call goes by: with a residual it moves more, long products multiply more."""
    return "pointwise_affine" + "_residual" * residual + "_long" * (min(width, columns) >= POINTWISE_LONG)


def _kind(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, *_: Any) -> tuple[str]:
    return (measured_as(residual is not None, x.shape[1], weight.shape[0]),)


class TritonPointwiseAffine(TritonProduct):
    op = "pointwise_affine"

    def why_not(self, call: PointwiseAffineCall) -> str | None:
        if call.misfit is None and call.computed_dtype.itemsize != 2:
            return f"products in {call.computed_dtype}: it takes bfloat16 and float16, also those of autocast"
        if call.parameter_grad:
            return "a scale or shift needs a gradient: only eager gives one"
        if call.needs_grad and call.columns > MAX_BLOCK:
            return f"{call.columns} channels: its backward takes up to {MAX_BLOCK}"
        return super().why_not(call)

    def regime(self, call: PointwiseAffineCall) -> str:
        return measured_as(call.residual, call.width, call.columns)

    def least(self, architecture: str | None, *kind: Any) -> int:
        return self._least(kind[0], architecture)

    def beyond_measured(self, call: PointwiseAffineCall) -> str | None:
        if min(call.width, call.columns) > MEASURED_CHANNELS:
            return f"{call.width} to {call.columns} channels: measured, and chosen, up to {MEASURED_CHANNELS} of one; ask for it by name"
        return None

    def rehearse(self, call: PointwiseAffineCall) -> None:
        x, weight, *rest = rehearsed(call.layouts)
        scale, shift, residual, residual_scale = _with_fp32_scales(*rest)
        y = _run_forward(
            x.to(call.computed_dtype), weight.to(call.computed_dtype), scale, shift, residual, residual_scale
        )
        if call.needs_grad:
            written = _written(y, weight, residual_scale, *call.wanted)
            passes.channel_affine_backward(
                *map(rows_of, (y, y)), scale, residual_scale, with_dx=written[0], with_dresidual=written[1]
            )

    def run(self, *tensors: Any) -> Tensor:
        x, weight, *rest = tensors
        return _forward(*autocast(x, weight), *_with_fp32_scales(*rest))


def _with_fp32_scales(
    scale: Tensor, shift: Tensor, residual: Tensor | None, residual_scale: Tensor | None
) -> tuple[Any, ...]:
    return scale.float(), shift.float(), residual, None if residual_scale is None else residual_scale.float()


class EagerPointwiseAffine(Implementation):
    name = "eager"

    def run(self, *tensors: Any) -> Tensor:
        return _eager(*tensors)


POINTWISE_AFFINE = Op(
    "pointwise_affine",
    signature=_signature,
    describe=_describe,
    implementations=(TritonPointwiseAffine(), EagerPointwiseAffine()),
    work=bytes_of,
    kind=_kind,
)


def _eager(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    """The convolution, and one pass by what `channel_affine` chooses."""
    return channel_affine(F.conv2d(x, weight), *rest)


# ---------------------------------------------------------------------------------------------------------------------
# Registration, channels last inside. The backward's products are torch's own, in sight of dispatch modes and compilers.


def _run_forward(
    x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, residual_scale: Tensor | None
) -> Tensor:
    y = pointwise_forward(rows_of(x), weight.flatten(1), scale, shift, rows_of(residual), residual_scale)
    return images_of(y)


def _fake_forward(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return images_of(x.new_empty((*rows_of(x).shape[:3], weight.shape[0])))


class _Forward(torch.autograd.Function):
    """Its backward can be differentiated: all in it can."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        scale: Tensor,
        shift: Tensor,
        residual: Tensor | None,
        residual_scale: Tensor | None,
    ) -> Tensor:
        y = _forward.below(x, weight, scale, shift, residual, residual_scale)
        ctx.save_for_backward(x, weight, y, scale, residual_scale)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, y, scale, residual_scale = ctx.saved_tensors
        wants_x, wants_weight, _, _, wants_residual, _ = ctx.needs_input_grad
        inner, matrix = wants_x or wants_weight, weight.flatten(1)
        written = _written(y, weight, residual_scale, inner, wants_residual)
        g, dresidual = channel_affine_backward(dy, y, scale, residual_scale, written)
        dx = dweight = factor = None
        if inner and not written[0]:
            g, factor = dresidual, scale[:, None]
        if wants_x:
            scaled = matrix if factor is None else (matrix * factor).to(matrix.dtype)
            dx = input_gradient(g, scaled, x)
        if wants_weight:
            columns = pixels_of(g).t()
            if factor is None:
                dweight = columns @ pixels_of(x)
            else:  # in fp32 up to the scale, unless it is differentiated
                sums = columns @ pixels_of(x) if goes_by_eager_ops(dy) else plus_product(None, columns, pixels_of(x))
                dweight = (sums * factor).to(weight.dtype)
            dweight = dweight.view(weight.shape)
        return dx, dweight, None, None, dresidual if wants_residual else None, None


def _written(y: Tensor, weight: Tensor, residual_scale: Tensor | None, inner: bool, beside: bool) -> list[bool]:
    """Whether the backward writes what arrives for the product, and for the residual; where both are wanted the latter may do for both.

    Where weights times scales, and their gradients in fp32, move less than one of y, with two launches that take it. Not in
    fp16, whose range a weight times a scale can leave.
    """
    moved = 12 * weight.numel() + 2 * LAUNCH
    one_is_less = y.dtype == torch.bfloat16 and y.numel() * y.element_size() > moved
    return [inner and not (beside and residual_scale is None and one_is_less), beside]


def _autograd_forward(
    x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, residual_scale: Tensor | None
) -> Any:
    arguments = x, weight, scale, shift, residual, residual_scale
    return _Forward.apply(*arguments) if wants_grad(x, weight, residual) else _forward.below(*arguments)


_forward = define(
    "pointwise_affine(Tensor x, Tensor weight, Tensor scale, Tensor shift, Tensor? residual, Tensor? residual_scale) -> Tensor",
    run=_run_forward,
    fake=_fake_forward,
    autograd=_autograd_forward,
)
