"""Under autocast, tensors in 16 bits as products read them: cast once for all that read them, or written so by what computed them.

Inside a block of `shared_seed`, a layer's or a model's forward, who casts a tensor leaves that for the next, and a kernel that ends in a
norm leaves the norm's result in 16 bits beside it, from the same launch. Nothing outlives the block, or the tensor.
"""

from __future__ import annotations

from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from detr_fast.ops.dropout import held
from detr_fast.ops.products import autocast_dtype


def rounded(x: Tensor) -> Tensor:
    """x as autocast's products take it."""
    dtype = autocast_dtype(x)
    if dtype is None or x.dtype == dtype:
        return x
    known = _known(x)
    if known is None:
        return x.to(dtype)
    found = known.get(id(x))
    if found is not None and found[0]() is x and found[1] == _look(x) and found[2].dtype == dtype:
        return found[2]
    cast = x.to(dtype)
    _leave(known, x, cast)
    return cast


def rounds(autocast: torch.dtype | None, out: torch.dtype) -> bool:
    """Whether a kernel is to write its result, of dtype `out`, in autocast's 16 bits as well."""
    return autocast is not None and autocast.itemsize == 2 and out == torch.float32


def leave(y: Tensor, cast: Tensor) -> None:
    """y, in 16 bits, for `rounded` to find."""
    known = _known(y)
    if known is not None:
        _leave(known, y, _Rounded.apply(y, cast) if y.requires_grad else cast)


def _leave(known: dict[int, Any], x: Tensor, cast: Tensor) -> None:
    known[id(x)] = ref(x, partial(_forget, known, id(x))), _look(x), cast


def _look(x: Tensor) -> tuple[int, bool]:
    """What differs once x was written to, detached in place or marked to have a gradient."""
    return x._version, x.requires_grad


def _forget(known: dict[int, Any], key: int, gone: Any) -> None:
    if key in known and known[key][0] is gone:
        del known[key]


def _known(x: Tensor) -> dict[int, Any] | None:
    """What is known in this block, None outside of one, and where a tensor can't be told from itself later."""
    return None if torch.compiler.is_compiling() or x.is_inference() else held()


class _Rounded(torch.autograd.Function):
    """x's cast, which is there already."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cast: Tensor) -> Tensor:
        ctx.dtype = x.dtype
        ctx.set_materialize_grads(False)
        return cast.view_as(cast)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> Any:
        return None if dy is None else dy.to(ctx.dtype), None
