"""RMS normalisation over the last dimensions: the contract, its eager reference, its Triton kernel, which is LayerNorm's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from detr_fast import dispatch
from detr_fast.dispatch import Implementation, Op, Situation
from detr_fast.ops import regimes
from detr_fast.ops.layer_norm import LayerNormCall, TritonNorm, flat, norm_call
from detr_fast.ops.layer_norm import result_dtype as layer_norms_dtype
from detr_fast.ops.layer_norm_autograd import forward
from detr_fast.ops.layouts import key

# Where no eps is given torch takes that of the dtype it computes in: fp32 for inputs of 16 bits, too.
EPS = torch.finfo(torch.float32).eps
# Whether autocast casts torch's own op to fp32, as it does LayerNorm.
_IN_FP32 = torch._C._dispatch_has_kernel_for_dispatch_key("aten::rms_norm", "AutocastCUDA")


def rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """`torch.nn.functional.rms_norm`: x / sqrt(mean(x * x) + eps) * weight over the last dimensions.

    Shapes: input (*, *normalized_shape), weight normalized_shape or None; the result is shaped as the input.
    Dtypes: the result has the input's, also with a weight in fp32; under autocast on a GPU it is fp32, where torch's own is.
    It is rounded once, behind the weight. eps: None is torch's, fp32's machine epsilon for all inputs but fp64.
    Raises RuntimeError where the shapes do not fit, with torch's own message; BackendError as `use_backend` says.
    Source: Zhang and Sennrich, 2019, arXiv:1910.07467.
    """
    if not (dispatch.intervening or input.is_cuda):
        return F.rms_norm(input, normalized_shape, weight, eps)
    return RMS_NORM(input, tuple(normalized_shape), weight, eps)


def result_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """fp32 under autocast on a GPU, where torch's own op is on the list of fp32 ops, else the input's."""
    return layer_norms_dtype(dtype, device_type) if _IN_FP32 else dtype


def _signature(
    input: Tensor,
    normalized_shape: tuple[int, ...],
    weight: Tensor | None,
    eps: float | None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Any, ...]:
    return key(input), normalized_shape, key(weight), out_dtype


def _describe(
    input: Tensor,
    normalized_shape: tuple[int, ...],
    weight: Tensor | None,
    eps: float | None,
    out_dtype: torch.dtype | None = None,
    *,
    situation: Situation,
) -> LayerNormCall:
    out_dtype = out_dtype or result_dtype(input.dtype, input.device.type)
    return norm_call(input, normalized_shape, weight, None, out_dtype, situation)


class TritonRMSNorm(TritonNorm):
    op = "rms_norm"
    centred = False

    def run(
        self,
        input: Tensor,
        normalized_shape: tuple[int, ...],
        weight: Tensor | None,
        eps: float | None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        out_dtype = out_dtype or result_dtype(input.dtype, input.device.type)
        x, weight, _ = flat(len(normalized_shape), input, weight, None)
        y: Tensor = forward(x, weight, None, EPS if eps is None else eps, out_dtype, False)[0]
        return y if x is input else y.view(input.shape)


class EagerRMSNorm(Implementation):
    name = "eager"

    def run(
        self,
        input: Tensor,
        normalized_shape: tuple[int, ...],
        weight: Tensor | None,
        eps: float | None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        x = input if out_dtype is None else input.to(out_dtype)
        return F.rms_norm(x, normalized_shape, weight, eps)


# A last argument, which adapters give, is the result's dtype where a library's own norm has another than torch's.
RMS_NORM = Op(
    "rms_norm",
    signature=_signature,
    describe=_describe,
    implementations=(TritonRMSNorm(), EagerRMSNorm()),
    work=regimes.bytes_of,
)
