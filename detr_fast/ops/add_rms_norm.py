"""Dropout, residual sum and RMS normalisation: the contract, its eager reference, its Triton kernel, which is LayerNorm's."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from detr_fast import dispatch
from detr_fast.dispatch import Implementation, Op, Situation
from detr_fast.ops import regimes
from detr_fast.ops.add_layer_norm import AddLayerNormCall, TritonAddNorm, check, eager, sum_call
from detr_fast.ops.layouts import key
from detr_fast.ops.rms_norm import EPS, result_dtype


@overload
def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float | None = None,
    dropout_p: float = 0.0,
    return_sum: Literal[False] = False,
) -> Tensor: ...


@overload
def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float | None = None,
    dropout_p: float = 0.0,
    *,
    return_sum: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@overload
def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float | None = None,
    dropout_p: float = 0.0,
    return_sum: bool = False,
) -> Tensor | tuple[Tensor, Tensor]: ...


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float | None = None,
    dropout_p: float = 0.0,
    return_sum: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """RMSNorm of residual + dropout(x) over the last dimension; with `return_sum` also that sum, for pre-norm layers.

    Shapes: x and residual (..., C), weight (C,) or None; the results are (..., C).
    Dtypes: the sum has x's and the residual's, promoted; the normalised result too, or fp32 under autocast on a GPU, as
    torch's own. In the kernel a sum that is not returned stays in fp32: fp16's 65,504 is no limit for it. eps: as `rms_norm`.
    Raises ValueError for shapes that do not fit or a dropout_p outside [0, 1], BackendError as `use_backend` says.
    Source: Zhang and Sennrich, 2019, arXiv:1910.07467; Srivastava et al., 2014, "Dropout".
    """
    check("add_rms_norm", x, residual, weight, None, dropout_p)
    if not (dispatch.intervening or x.is_cuda):
        return eager(x, residual, weight, None, eps, dropout_p, return_sum, False)
    return ADD_RMS_NORM(x, residual, weight, eps, dropout_p, return_sum)


def _signature(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float | None, p: float, return_sum: bool
) -> tuple[Any, ...]:
    return key(x), key(residual), key(weight), p > 0.0, return_sum


def _describe(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float | None,
    p: float,
    return_sum: bool,
    *,
    situation: Situation,
) -> AddLayerNormCall:
    return sum_call(x, residual, weight, None, p, return_sum, _out_dtype(x, residual), situation)


def _out_dtype(x: Tensor, residual: Tensor) -> torch.dtype:
    return result_dtype(torch.promote_types(x.dtype, residual.dtype), x.device.type)


class TritonAddRMSNorm(TritonAddNorm):
    op = "add_rms_norm"
    centred = False

    def run(
        self, x: Tensor, residual: Tensor, weight: Tensor | None, eps: float | None, p: float, return_sum: bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        eps = EPS if eps is None else eps
        return self.added(x, residual, weight, None, eps, p, return_sum, _out_dtype(x, residual))


class EagerAddRMSNorm(Implementation):
    """PyTorch's dropout, sum and rms_norm."""

    name = "eager"

    def run(
        self, x: Tensor, residual: Tensor, weight: Tensor | None, eps: float | None, p: float, return_sum: bool
    ) -> Any:
        return eager(x, residual, weight, None, eps, p, return_sum, False)


ADD_RMS_NORM = Op(
    "add_rms_norm",
    signature=_signature,
    describe=_describe,
    implementations=(TritonAddRMSNorm(), EagerAddRMSNorm()),
    work=regimes.bytes_of,
)
