"""A residual sum and the RMSNorm behind it in one op, where the norm is one that `rms_norms` has switched."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from detr_fast.adapters.rms_norms import GemmaRMSNorm, LlamaRMSNorm, T5LayerNorm
from detr_fast.nn.bare import is_bare
from detr_fast.nn.blocks import rms_norms_are_free
from detr_fast.ops.add_rms_norm import ADD_RMS_NORM
from detr_fast.ops.rms_norm import result_dtype


def takes_sums(norm: Any) -> bool:
    """Whether a norm is one that may be computed with the sum before it."""
    return isinstance(norm, LlamaRMSNorm | GemmaRMSNorm | T5LayerNorm) and is_bare(norm)


def sum_and_rms_norm(x: Tensor, residual: Tensor, norm: Any, p: float = 0.0) -> tuple[Tensor, Tensor]:
    """residual + dropout(x), and its norm: by one kernel, where that gives the dtype that the norm's own code does."""
    found = _by_kernel(x, residual, norm, p) if rms_norms_are_free() else None
    if found is not None:
        return found[1], found[0]
    total = residual + (F.dropout(x, p) if p > 0.0 else x)
    return total, norm(total)


def _by_kernel(x: Tensor, residual: Tensor, norm: Any, p: float) -> Any:
    dtype = torch.promote_types(x.dtype, residual.dtype)
    gemma, t5 = isinstance(norm, GemmaRMSNorm), isinstance(norm, T5LayerNorm)
    if gemma:
        # Asked first: a call that no kernel takes would make the launches of 1 + weight for nothing.
        small = not torch.compiler.is_compiling() and ADD_RMS_NORM.is_small(x.nbytes, x.device)
        if small or result_dtype(dtype, x.device.type) != dtype:
            return None
        weight, eps = 1.0 + norm.weight.float(), norm.eps
    else:
        weight, eps = norm.weight, norm.variance_epsilon
        theirs = weight.dtype if t5 else torch.promote_types(dtype, weight.dtype)
        if result_dtype(dtype, x.device.type) != theirs:
            return None
    arguments = (x, residual, weight, eps, p, True)
    kernel = ADD_RMS_NORM.kernel(*arguments)
    return None if kernel is None else kernel.run(*arguments)
