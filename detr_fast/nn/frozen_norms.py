"""Batch norms whose statistics and parameters are fixed: a scale and a shift for each channel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def scales_and_shifts(norms: Sequence[Any], eps: Sequence[float]) -> tuple[list[Tensor], list[Tensor]]:
    """Of all these norms, with weight, bias, running_mean and running_var (C,): both (C,), fp32 at least, in few launches."""
    weights, biases, means, variances = (
        _in_fp32([getattr(norm, name) for norm in norms]) for name in ("weight", "bias", "running_mean", "running_var")
    )
    scales = torch._foreach_add(variances, list(eps))
    torch._foreach_rsqrt_(scales)
    torch._foreach_mul_(scales, weights)
    shifts = torch._foreach_sub(biases, torch._foreach_mul(means, scales))
    return list(scales), list(shifts)


def _in_fp32(tensors: list[Tensor]) -> list[Tensor]:
    if all(t.dtype.itemsize > 2 for t in tensors):
        return tensors
    wide = [torch.empty_like(t, dtype=torch.float32) for t in tensors]
    torch._foreach_copy_(wide, tensors)
    return wide
