"""Tables in the GPU's memory that say where many tensors lie, for one launch over all of them.

Tensors are cut into chunks of equal size, however many and however large they are, and a program takes one: no launch ends with
a few programs that are still at work. Places are distances in elements from one tensor of each kind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .launch import empty


class TensorTable:
    """int64 numbers, made on the host, and memory for them on a device, into which nothing is copied before `fill`.

    A launch must come behind that; a CUDA graph's replays read the memory, too. allocate: gives so many int64 on the device.
    """

    def __init__(self, host: Tensor, device: torch.device, allocate: Callable[[int], Tensor] | None) -> None:
        self._host = host
        size = host.numel()
        self.memory = empty((size,), torch.int64, device) if allocate is None else allocate(size)

    def fill(self) -> None:
        """Copy the table to the GPU, on the current stream: before a launch, or behind a capture that launches were recorded in."""
        if self.memory.is_meta:
            return
        with _disable_current_modes():
            host = self._host.pin_memory() if self.memory.is_cuda else self._host
            self.memory.copy_(host, non_blocking=True)


def addresses(tensors: Sequence[Tensor]) -> Tensor:
    """(tensors,): in bytes; 0 of a tensor that lies nowhere."""
    return torch.tensor([0 if t.is_meta else t.data_ptr() for t in tensors], dtype=torch.int64)


def distances(tensors: Sequence[Tensor], base: Tensor) -> Tensor:
    """(tensors,): from where `base` begins, in elements."""
    return (addresses(tensors) - addresses([base])) // base.element_size()


def pieces(counts: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Of chunks of up to `size` of each tensor's `counts` elements, in order: the tensor's number, and where it begins there."""
    number = (counts + size - 1) // size
    tensor = torch.arange(len(counts)).repeat_interleave(number)
    return tensor, (torch.arange(len(tensor)) - (number.cumsum(0) - number)[tensor]) * size
