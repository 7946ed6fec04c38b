"""Dropout, residual sum and layer normalisation: the contract, its eager reference, its Triton kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from detr_fast import dispatch
from detr_fast.dispatch import Call, Implementation, Op, Situation, TritonImplementation
from detr_fast.kernels.launch import compile_launches
from detr_fast.kernels.rows import MAX_COLUMNS
from detr_fast.ops import regimes
from detr_fast.ops.add_layer_norm_autograd import forward, run_backward, run_forward, written_dtypes
from detr_fast.ops.boundary import SEVERAL_DEVICES, on_one_device, wants_grad
from detr_fast.ops.dropout import check_probability, next_seed
from detr_fast.ops.layer_norm import result_dtype
from detr_fast.ops.layer_norm_autograd import eager as eager_norm
from detr_fast.ops.layouts import Layouts, aligned, key, layouts, rehearsed


@overload
def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    return_sum: Literal[False] = False,
) -> Tensor: ...


@overload
def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    *,
    return_sum: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@overload
def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    return_sum: bool = False,
) -> Tensor | tuple[Tensor, Tensor]: ...


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    return_sum: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """LayerNorm of residual + dropout(x) over the last dimension; with `return_sum` also that sum, for pre-norm layers.

    Shapes: x and residual (..., C), weight and bias (C,) or None; the results are (..., C).
    Dtypes: the sum has x's and the residual's, promoted; the normalised result too, or fp32 under autocast on a GPU, as
    torch's own. In the kernel a sum that is not returned stays in fp32: fp16's 65,504 is no limit for it.
    Raises ValueError for shapes that do not fit or a dropout_p outside [0, 1], BackendError as `use_backend` says.
    Source: Ba et al., 2016, arXiv:1607.06450; Srivastava et al., 2014, "Dropout".
    """
    check("add_layer_norm", x, residual, weight, bias, dropout_p)
    if not (dispatch.intervening or x.is_cuda):
        return eager(x, residual, weight, bias, eps, dropout_p, return_sum)
    return ADD_LAYER_NORM(x, residual, weight, bias, eps, dropout_p, return_sum)


def check(op: str, x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, p: float) -> None:
    """Raise ValueError where the shapes do not fit, or p is no probability."""
    if x.ndim == 0 or x.shape != residual.shape:
        raise ValueError(
            f"{op} takes x and residual of one shape (..., C); got {tuple(x.shape)} and {tuple(residual.shape)}"
        )
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.shape != x.shape[-1:]:
            raise ValueError(f"{name} must be (C,) = {tuple(x.shape[-1:])}; got {tuple(parameter.shape)}")
    check_probability(p)


def eager(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    p: float,
    return_sum: bool,
    centred: bool = True,
) -> Any:
    """By PyTorch's dropout, sum and norm."""
    total = residual + (F.dropout(x, p) if p > 0.0 else x)
    y = eager_norm(total, weight, bias, eps, centred)
    return (y, total) if return_sum else y


@dataclass(frozen=True)
class AddLayerNormCall(Call):
    rows: int
    columns: int
    residual_dtype: torch.dtype
    weight_dtype: torch.dtype | None
    bias_dtype: torch.dtype | None
    dropout: bool
    return_sum: bool
    one_device: bool
    wanted: tuple[bool, ...]  # which of x, residual, weight and bias need a gradient
    layouts: Layouts  # theirs
    out_dtype: torch.dtype

    def shapes(self) -> str:
        extras = (" dropout" if self.dropout else "") + (" with sum" if self.return_sum else "")
        return f"({self.rows}, {self.columns}) {str(self.dtype).removeprefix('torch.')}{extras}"


def _signature(
    x: Tensor, residual: Tensor, weight: Any, bias: Any, eps: float, p: float, return_sum: bool
) -> tuple[Any, ...]:
    return key(x), key(residual), key(weight), key(bias), p > 0.0, return_sum


def _describe(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    p: float,
    return_sum: bool,
    *,
    situation: Situation,
) -> AddLayerNormCall:
    out_dtype = result_dtype(torch.promote_types(x.dtype, residual.dtype), x.device.type)
    return sum_call(x, residual, weight, bias, p, return_sum, out_dtype, situation)


def sum_call(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    p: float,
    return_sum: bool,
    out_dtype: torch.dtype,
    situation: Situation,
) -> AddLayerNormCall:
    """What implementations of a sum and a norm are asked about; RMSNorm has no bias."""
    columns = x.shape[-1]
    return AddLayerNormCall(
        device=x.device,
        architecture=dispatch.architecture(x.device),
        dtype=x.dtype,
        tensor_type=dispatch.tensor_type((x, residual, weight, bias)),
        needs_grad=wants_grad(x, residual, weight, bias),
        situation=situation,
        rows=x.numel() // columns if columns else 0,
        columns=columns,
        residual_dtype=residual.dtype,
        weight_dtype=None if weight is None else weight.dtype,
        bias_dtype=None if bias is None else bias.dtype,
        dropout=p > 0.0,
        return_sum=return_sum,
        one_device=on_one_device(x, residual, weight, bias),
        wanted=tuple(map(wants_grad, (x, residual, weight, bias))),
        layouts=layouts(situation, x, residual, weight, bias),
        out_dtype=out_dtype,
    )


class TritonAddNorm(TritonImplementation):
    """What the kernels of a sum and LayerNorm, and of a sum and RMSNorm, have in common."""

    op: ClassVar[str]
    centred: ClassVar[bool]

    def why_not(self, call: AddLayerNormCall) -> str | None:
        if not call.one_device:
            return SEVERAL_DEVICES
        if not 1 <= call.columns <= MAX_COLUMNS:
            return f"{call.columns} columns: it takes 1 to {MAX_COLUMNS}"
        if call.residual_dtype not in self.dtypes:
            return f"a {_plain(call.residual_dtype)} residual: it takes float16, bfloat16, float32"
        total = torch.promote_types(call.dtype, call.residual_dtype)
        if {torch.float16, torch.bfloat16} == {call.dtype, call.residual_dtype}:
            return "x and residual are float16 and bfloat16: use one dtype for both"
        for name, dtype in (("weight", call.weight_dtype), ("bias", call.bias_dtype)):
            if dtype not in (None, total, torch.float32):
                return f"a {_plain(dtype)} {name} with a {_plain(total)} sum: use the sum's dtype or float32"
        return None

    def advice(self, call: AddLayerNormCall) -> str | None:
        if call.situation.regime == "compiled":
            return "a sum and a norm under torch.compile: Inductor fuses them"
        if call.situation.regime == "layer":
            return None
        return regimes.advice(self.op, call, call.rows * call.columns * call.dtype.itemsize)

    def least(self, architecture: str | None, *kind: Any) -> int:
        return regimes.least(self.op, architecture)

    def note(self, call: AddLayerNormCall) -> str | None:
        return regimes.note(self.op, call)

    def compiled_key(self, call: AddLayerNormCall) -> Any:
        dtypes = (call.dtype, call.residual_dtype, call.weight_dtype, call.bias_dtype, call.out_dtype)
        return call.device, call.columns, dtypes, call.dropout, call.return_sum, call.wanted, aligned(call.layouts)

    def prepare(self, call: AddLayerNormCall) -> None:
        compile_launches(lambda: self.rehearse(call), call.device)

    def rehearse(self, call: AddLayerNormCall) -> None:
        """Forward, and backward where a gradient is needed, of such a call on meta tensors."""
        x, residual, weight, bias = rehearsed(call.layouts)
        seed = torch.empty(1, dtype=torch.int64, device="meta") if call.dropout else None
        numbers = (seed, 0, 0.5 if call.dropout else 0.0, 0.0)
        y, total, mean, rstd = run_forward(
            x, residual, weight, bias, *numbers, call.return_sum, call.out_dtype, self.centred
        )
        if call.needs_grad:
            kept = (total, None) if call.return_sum else (x, residual)
            dtypes = written_dtypes(call.dropout, (x.dtype, residual.dtype), call.wanted)
            parameters = (weight, bias, mean if self.centred else None)
            for dsum in (None, total) if call.return_sum else (None,):  # which may arrive, or not
                run_backward(y, dsum, *kept, *parameters, rstd, *numbers, *dtypes, *call.wanted[2:])  # type: ignore[call-arg]

    def added(
        self,
        x: Tensor,
        residual: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        p: float,
        return_sum: bool,
        out_dtype: torch.dtype,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """What `run` comes to."""
        seed, offset = next_seed(x.device) if p > 0.0 else (None, 0)
        settings = (seed, offset, p, eps, return_sum, out_dtype, self.centred)
        y, total, _, _ = forward(x, residual, weight, bias, *settings)
        return (y, total) if return_sum else y


class TritonAddLayerNorm(TritonAddNorm):
    op = "add_layer_norm"
    centred = True

    def why_not(self, call: AddLayerNormCall) -> str | None:
        reason = super().why_not(call)
        if reason is not None:
            return reason
        total = torch.promote_types(call.dtype, call.residual_dtype)
        for name, dtype in (("weight", call.weight_dtype), ("bias", call.bias_dtype)):
            if dtype not in (None, total) and call.situation.autocast is None:
                return f"a {_plain(dtype)} {name} with a {_plain(total)} sum outside autocast: torch refuses it, too"
        if None not in (call.weight_dtype, call.bias_dtype) and call.weight_dtype != call.bias_dtype:
            return f"weight is {call.weight_dtype} and bias {call.bias_dtype}: it takes one dtype for both"
        return None

    def run(
        self, x: Tensor, residual: Tensor, weight: Any, bias: Any, eps: float, p: float, return_sum: bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        out_dtype = result_dtype(torch.promote_types(x.dtype, residual.dtype), x.device.type)
        return self.added(x, residual, weight, bias, eps, p, return_sum, out_dtype)


class EagerAddLayerNorm(Implementation):
    """PyTorch's dropout, sum and layer_norm."""

    name = "eager"

    def run(self, *args: Any) -> Any:
        return eager(*args)


ADD_LAYER_NORM = Op(
    "add_layer_norm",
    signature=_signature,
    describe=_describe,
    implementations=(TritonAddLayerNorm(), EagerAddLayerNorm()),
    work=regimes.bytes_of,
)


def _plain(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")
