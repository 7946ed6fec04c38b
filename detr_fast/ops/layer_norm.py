"""Layer normalisation over the last dimensions: the contract, its eager reference, its Triton kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from detr_fast import dispatch
from detr_fast.dispatch import Call, Implementation, Op, Situation, TritonImplementation
from detr_fast.kernels import layer_norm as kernels
from detr_fast.kernels.launch import compile_launches
from detr_fast.ops import regimes
from detr_fast.ops.boundary import define, double_backward, wants_grad
from detr_fast.ops.layouts import Layouts, aligned, key, layouts, rehearsed


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.layer_norm`: (x - mean) / sqrt(var + eps) * weight + bias over the last dimensions.

    Shapes: input (*, *normalized_shape), weight and bias normalized_shape or None; the result is shaped as the input.
    Dtypes: the result has the input's; under autocast on a GPU it is fp32, as torch's own. Statistics are fp32.
    Raises RuntimeError where the shapes do not fit, with torch's own message; BackendError as `use_backend` says.
    Source: Ba et al., 2016, arXiv:1607.06450.
    """
    if not (dispatch.intervening or input.is_cuda):
        return F.layer_norm(input, normalized_shape, weight, bias, eps)
    return LAYER_NORM(input, tuple(normalized_shape), weight, bias, eps)


@dataclass(frozen=True)
class LayerNormCall(Call):
    rows: int
    columns: int
    weight_dtype: torch.dtype | None
    bias_dtype: torch.dtype | None
    dims: int  # that are normalised over
    wanted: tuple[bool, bool, bool]  # which of input, weight and bias need a gradient
    layouts: Layouts  # theirs
    well_formed: bool  # the shapes and devices fit each other; otherwise torch's own op says what is wrong

    def shapes(self) -> str:
        return f"({self.rows}, {self.columns}) {str(self.dtype).removeprefix('torch.')}"


def _signature(input: Tensor, normalized_shape: tuple[int, ...], weight: Any, bias: Any, eps: float) -> tuple[Any, ...]:
    return key(input), normalized_shape, key(weight), key(bias)


def _describe(
    input: Tensor,
    normalized_shape: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    situation: Situation,
) -> LayerNormCall:
    columns = prod(normalized_shape)
    parameters = [p for p in (weight, bias) if p is not None]
    return LayerNormCall(
        device=input.device,
        architecture=dispatch.architecture(input.device),
        dtype=input.dtype,
        tensor_type=dispatch.tensor_type((input, weight, bias)),
        needs_grad=wants_grad(input, weight, bias),
        situation=situation,
        rows=input.numel() // columns if columns else 0,
        columns=columns,
        weight_dtype=None if weight is None else weight.dtype,
        bias_dtype=None if bias is None else bias.dtype,
        dims=len(normalized_shape),
        wanted=(wants_grad(input), wants_grad(weight), wants_grad(bias)),
        layouts=layouts(situation, input, weight, bias),
        well_formed=len(normalized_shape) > 0
        and tuple(input.shape[input.ndim - len(normalized_shape) :]) == normalized_shape
        and all(tuple(p.shape) == normalized_shape and p.device == input.device for p in parameters),
    )


class TritonLayerNorm(TritonImplementation):
    max_columns = kernels.MAX_COLUMNS

    def why_not(self, call: LayerNormCall) -> str | None:
        if not call.well_formed:
            return "the shapes or devices of input, normalized_shape, weight and bias do not fit each other"
        if not 1 <= call.columns <= self.max_columns:
            return f"{call.columns} normalised elements: it takes 1 to {self.max_columns}"
        for name, dtype in (("weight", call.weight_dtype), ("bias", call.bias_dtype)):
            if dtype not in (None, call.dtype, torch.float32):
                return (
                    f"a {str(dtype).removeprefix('torch.')} {name} with {call.dtype} input: use the input's or float32"
                )
        if None not in (call.weight_dtype, call.bias_dtype) and call.weight_dtype != call.bias_dtype:
            return f"weight is {call.weight_dtype} and bias {call.bias_dtype}: it takes one dtype for both"
        if call.situation.autocast is None and (call.weight_dtype or call.bias_dtype or call.dtype) != call.dtype:
            return "parameters of another dtype than the input's outside autocast: torch's own op says what to do"
        return None

    def advice(self, call: LayerNormCall) -> str | None:
        if call.situation.regime == "compiled":
            return "a lone norm under torch.compile: Inductor fuses it with its neighbours"
        if call.situation.regime == "layer":
            return None
        return regimes.advice("layer_norm", call, call.rows * call.columns * call.dtype.itemsize)

    def least(self, architecture: str | None, *kind: Any) -> int:
        return regimes.least("layer_norm", architecture)

    def note(self, call: LayerNormCall) -> str | None:
        return regimes.note("layer_norm", call)

    def compiled_key(self, call: LayerNormCall) -> Any:
        dtypes = (call.dtype, call.weight_dtype, call.bias_dtype, call.situation.autocast)
        return call.device, call.columns, dtypes, call.wanted, aligned(call.layouts)

    def prepare(self, call: LayerNormCall) -> None:
        compile_launches(lambda: self.rehearse(call), call.device)

    def rehearse(self, call: LayerNormCall) -> None:
        """Forward, and backward where a gradient is needed, of such a call on meta tensors."""
        x, weight, bias = _flat(call.dims, *rehearsed(call.layouts))
        y, mean, rstd = _run_forward(x, weight, bias, 0.0, _result_dtype(call.dtype, call.device_type))
        if call.needs_grad:
            _run_backward(y, x, weight, bias, mean, rstd, 0.0, list(call.wanted))

    def run(self, input: Tensor, normalized_shape: tuple[int, ...], weight: Any, bias: Any, eps: float) -> Tensor:
        autocast = input.is_cuda and torch.is_autocast_enabled("cuda")
        out_dtype = torch.float32 if autocast else input.dtype  # `_result_dtype`, in less time
        dims = len(normalized_shape)
        if dims == 1:
            return _forward(input, weight, bias, eps, out_dtype)[0]
        return _forward(*_flat(dims, input, weight, bias), eps, out_dtype)[0].view(input.shape)


class EagerLayerNorm(Implementation):
    name = "eager"

    def run(self, input: Tensor, normalized_shape: tuple[int, ...], weight: Any, bias: Any, eps: float) -> Tensor:
        return F.layer_norm(input, normalized_shape, weight, bias, eps)


LAYER_NORM = Op(
    "layer_norm",
    signature=_signature,
    describe=_describe,
    implementations=(TritonLayerNorm(), EagerLayerNorm()),
    work=regimes.bytes_of,
)


def _flat(dims: int, input: Tensor, weight: Any, bias: Any) -> tuple[Any, ...]:
    """The tensors with one dimension in place of those that are normalised over."""
    if dims == 1:
        return input, weight, bias
    return input.flatten(-dims), *(None if p is None else p.flatten() for p in (weight, bias))


def _result_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """fp32 under autocast on a GPU (torch's list of fp32 ops), else the input's."""
    return torch.float32 if device_type == "cuda" and torch.is_autocast_enabled("cuda") else dtype


# ---------------------------------------------------------------------------------------------------------------------
# Registration: forward and backward are ops of their own; each has an autograd kernel.


def _run_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    return kernels.layer_norm_forward(x, weight, bias, eps, out_dtype=out_dtype)


def _fake_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    rows = prod(x.shape[:-1])
    statistics = x.new_empty((rows,), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=out_dtype), statistics, torch.empty_like(statistics)


def _run_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
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
    mean: Tensor,
    rstd: Tensor,
    eps: float,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    def like(source: Tensor | None, want: bool) -> Tensor:
        return x.new_empty(0) if source is None or not want else source.new_empty(source.shape)

    return like(x, wanted[0]), like(weight, wanted[1]), like(bias, wanted[2])


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out_dtype: torch.dtype
    ) -> Any:
        y, mean, rstd = _forward.below(x, weight, bias, eps, out_dtype)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        return y, mean, rstd

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> Any:
        if dy is None:
            return (None,) * 5
        x, weight, bias, mean, rstd = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[:3])
        gradients = _backward(dy, x, weight, bias, mean, rstd, ctx.eps, wanted)
        return (*(g if want else None for g, want in zip(gradients, wanted)), None, None)


class _Backward(torch.autograd.Function):
    """The first backward; its own backward (double backward) recomputes eagerly."""

    @staticmethod
    def forward(
        ctx: Any,
        dy: Tensor,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        rstd: Tensor,
        eps: float,
        wanted: list[bool],
    ) -> Any:
        gradients = _backward.below(dy, x, weight, bias, mean, rstd, eps, wanted)
        ctx.save_for_backward(dy, x, weight, bias)
        ctx.eps, ctx.wanted = eps, wanted
        ctx.set_materialize_grads(False)
        return gradients

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> Any:
        dy, *inputs = ctx.saved_tensors

        def reference(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
            w, b = (None if p is None else p.to(dy.dtype) for p in (weight, bias))
            return F.layer_norm(x.to(dy.dtype), x.shape[-1:], w, b, ctx.eps)

        d_dy, d_inputs = double_backward(reference, inputs, dy, ctx.wanted, upstream)
        return (d_dy, *d_inputs, None, None, None, None)


def _autograd_forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out_dtype: torch.dtype) -> Any:
    if wants_grad(x, weight, bias):
        return _Forward.apply(x, weight, bias, eps, out_dtype)
    return _forward.below(x, weight, bias, eps, out_dtype)


def _autograd_backward(dy: Tensor, x: Tensor, weight: Any, bias: Any, *rest: Any) -> Any:
    if wants_grad(dy, x, weight):
        return _Backward.apply(dy, x, weight, bias, *rest)
    return _backward.below(dy, x, weight, bias, *rest)


_forward = define(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps, ScalarType out_dtype) -> (Tensor, Tensor, Tensor)",
    run=_run_forward,
    fake=_fake_forward,
    autograd=_autograd_forward,
)
_backward = define(
    "layer_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, float eps, "
    "bool[3] wanted) -> (Tensor, Tensor, Tensor)",
    run=_run_backward,
    fake=_fake_backward,
    autograd=_autograd_backward,
)
