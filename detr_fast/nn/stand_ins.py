"""Tensors without memory in place of some to come: the dispatcher is asked before anything is computed.

What no kernel takes then costs no products that are thrown away.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn


def stand_in(x: Tensor, shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, grad: bool) -> Tensor:
    """What decisions read of a tensor that is to be computed from x; grad: whether it will need a gradient."""
    if not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None:
        return x.new_empty(shape, dtype=dtype)  # transforms take eager code whatever strides say
    if type(x) in (Tensor, nn.Parameter) and not torch.compiler.is_compiling():
        return _known(shape, stride, dtype, x.device, grad)
    return x.new_empty_strided(shape, stride, dtype=dtype, requires_grad=grad)


@lru_cache(maxsize=256)
def _known(
    shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, device: torch.device, grad: bool
) -> Tensor:
    tensor = torch.empty_strided(shape, stride, dtype=dtype, device=device)
    tensor.untyped_storage().resize_(0)
    return tensor.requires_grad_(grad)
