"""How a call's tensors lie in memory, which programs depend on besides dtypes and widths: what decisions read, and rehearse.

A program moves 16 bytes at a time where every row starts at such a multiple, and element by element elsewhere: two programs.
What a call will launch is found, before it runs, by its launchers on tensors without memory that lie as its own do.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from detr_fast.dispatch import FakeTensor, Situation
from detr_fast.situation import PLAIN_TENSORS

ALIGNMENT = 16  # bytes
_IN_MEMORY = PLAIN_TENSORS - {FakeTensor}


class Layout(NamedTuple):
    """start: bytes from a multiple of 16 to the first element."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    start: int

    @property
    def aligned(self) -> bool:
        """Whether all rows start at a multiple of 16 bytes."""
        size = self.dtype.itemsize
        steps = (stride * size for length, stride in zip(self.shape[:-1], self.strides[:-1]) if length > 1)
        return self.start == 0 and not any(step % ALIGNMENT for step in steps)

    def rehearsed(self, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor without memory that lies so, cast to `dtype` as autocast would."""
        first = self.start // self.dtype.itemsize
        size = 1 + first + sum((length - 1) * stride for length, stride in zip(self.shape, self.strides) if length)
        like = torch.empty(size, dtype=self.dtype, device="meta").as_strided(self.shape, self.strides, first)
        return like if dtype is None else like.to(dtype)


Layouts = tuple[Layout | None, ...]


def layouts(situation: Situation, *tensors: Tensor | None) -> Layouts:
    """Of a call's tensors; none while a compiler traces, as nothing is compiled beforehand then."""
    if situation.regime == "compiled":
        return ()
    return tuple(None if t is None else Layout(tuple(t.shape), t.stride(), t.dtype, _start(t)) for t in tensors)


def rehearsed(found: Layouts, dtype: torch.dtype | None = None) -> list[Any]:
    """See `Layout.rehearsed`; None for a tensor left out."""
    return [None if one is None else one.rehearsed(dtype) for one in found]


def aligned(found: Layouts) -> bool:
    return all(one is None or one.aligned for one in found)


def key(tensor: Tensor | None) -> Any:
    """What decisions read of a tensor."""
    if tensor is None:
        return None
    return (
        type(tensor),
        tensor.shape,
        tensor.stride(),
        tensor.dtype,
        tensor.device,
        tensor.requires_grad,
        _start(tensor),
    )


def _start(tensor: Tensor) -> int:
    if type(tensor) not in _IN_MEMORY:
        return 0
    try:
        return tensor.data_ptr() % ALIGNMENT
    except RuntimeError:  # a transform's: what it stands for is elsewhere
        return 0
