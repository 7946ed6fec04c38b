"""Layer normalisation over the last dimensions: the contract, its eager reference, its Triton kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from detr_fast import dispatch
from detr_fast.dispatch import Call, Implementation, Op, Situation, TritonImplementation
from detr_fast.kernels import layer_norm as kernels
from detr_fast.kernels.launch import compile_launches
from detr_fast.ops import regimes
from detr_fast.ops.boundary import wants_grad
from detr_fast.ops.layer_norm_autograd import forward, run_backward, run_forward
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
    out_dtype: torch.dtype
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
    out_dtype = result_dtype(input.dtype, input.device.type)
    return norm_call(input, normalized_shape, weight, bias, out_dtype, situation)


def norm_call(
    input: Tensor,
    normalized_shape: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    situation: Situation,
) -> LayerNormCall:
    """What implementations of a norm are asked about; RMSNorm has no bias."""
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
        out_dtype=out_dtype,
        well_formed=len(normalized_shape) > 0
        and tuple(input.shape[input.ndim - len(normalized_shape) :]) == normalized_shape
        and all(tuple(p.shape) == normalized_shape and p.device == input.device for p in parameters),
    )


class TritonNorm(TritonImplementation):
    """What LayerNorm's and RMSNorm's kernels have in common."""

    op: ClassVar[str]
    centred: ClassVar[bool]
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
        return None

    def advice(self, call: LayerNormCall) -> str | None:
        if call.situation.regime == "compiled":
            return "a lone norm under torch.compile: Inductor fuses it with its neighbours"
        if call.situation.regime == "layer":
            return None
        return regimes.advice(self.op, call, call.rows * call.columns * call.dtype.itemsize)

    def least(self, architecture: str | None, *kind: Any) -> int:
        return regimes.least(self.op, architecture)

    def note(self, call: LayerNormCall) -> str | None:
        return regimes.note(self.op, call)

    def compiled_key(self, call: LayerNormCall) -> Any:
        dtypes = (call.dtype, call.weight_dtype, call.bias_dtype, call.out_dtype)
        return call.device, call.columns, dtypes, call.wanted, aligned(call.layouts)

    def prepare(self, call: LayerNormCall) -> None:
        compile_launches(lambda: self.rehearse(call), call.device)

    def rehearse(self, call: LayerNormCall) -> None:
        """Forward, and backward where a gradient is needed, of such a call on meta tensors."""
        x, weight, bias = flat(call.dims, *rehearsed(call.layouts))
        y, mean, rstd = run_forward(x, weight, bias, 0.0, call.out_dtype, self.centred)
        if call.needs_grad:
            run_backward(y, x, weight, bias, mean if self.centred else None, rstd, 0.0, list(call.wanted))


class TritonLayerNorm(TritonNorm):
    op = "layer_norm"
    centred = True

    def why_not(self, call: LayerNormCall) -> str | None:
        reason = super().why_not(call)
        if reason is not None:
            return reason
        if None not in (call.weight_dtype, call.bias_dtype) and call.weight_dtype != call.bias_dtype:
            return f"weight is {call.weight_dtype} and bias {call.bias_dtype}: it takes one dtype for both"
        if call.situation.autocast is None and (call.weight_dtype or call.bias_dtype or call.dtype) != call.dtype:
            return "parameters of another dtype than the input's outside autocast: torch's own op says what to do"
        return None

    def run(self, input: Tensor, normalized_shape: tuple[int, ...], weight: Any, bias: Any, eps: float) -> Tensor:
        autocast = input.is_cuda and torch.is_autocast_enabled("cuda")
        out_dtype = torch.float32 if autocast else input.dtype  # `result_dtype`, in less time
        dims = len(normalized_shape)
        if dims == 1:
            return forward(input, weight, bias, eps, out_dtype)[0]
        return forward(*flat(dims, input, weight, bias), eps, out_dtype)[0].view(input.shape)


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


def flat(dims: int, input: Tensor, weight: Any, bias: Any) -> tuple[Any, ...]:
    """The tensors with one dimension in place of those that are normalised over."""
    if dims == 1:
        return input, weight, bias
    return input.flatten(-dims), *(None if p is None else p.flatten() for p in (weight, bias))


def result_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """fp32 under autocast on a GPU (torch's list of fp32 ops), else the input's."""
    return torch.float32 if device_type == "cuda" and torch.is_autocast_enabled("cuda") else dtype
