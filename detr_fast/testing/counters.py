"""Numbers that hold on any machine, GPU or not: launches, bytes moved, bytes kept for backward, host synchronisations.

Timings drift; these do not, so tests can pin them. Everything is counted while a callable runs, on real CPU tensors, in
Triton's interpreter, or on fake "cuda" tensors (FakeTensorMode), where copies to the host and other synchronisations show.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from detr_fast.kernels import launch

# Operations that make the host wait for a GPU, whatever their arguments.
_SYNCHRONISING = {
    torch.ops.aten._local_scalar_dense.default,  # .item(), float(), bool(), if tensor: …
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.is_nonzero.default,
}
# Operations that allocate or rename, and launch nothing.
_FREE = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
    torch.ops.aten._reshape_alias.default,
    torch.ops.aten._unsafe_view.default,
    torch.ops.aten.detach.default,
    torch.ops.aten.alias.default,
    torch.ops.aten.lift_fresh.default,
    torch.ops.aten._local_scalar_dense.default,
}


@dataclass
class Counts:
    """What a callable did.

    launches: Triton launches by kernel and aten operations by name; views and allocations are left out.
    bytes_moved: bytes of all tensors that those operations read and wrote, each once per operation.
    saved_bytes: bytes kept for backward besides parameters and inputs, each storage once.
    synchronisations: operations that would make the host wait for a GPU.
    """

    launches: Counter[str] = field(default_factory=Counter)
    bytes_moved: int = 0
    saved_bytes: int = 0
    synchronisations: Counter[str] = field(default_factory=Counter)

    @property
    def total_launches(self) -> int:
        return sum(self.launches.values())

    @property
    def total_synchronisations(self) -> int:
        return sum(self.synchronisations.values())


class _Operations(TorchDispatchMode):
    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _SYNCHRONISING or _copies_to_host(func, args, kwargs) or _indexes_by_mask(func, args):
            self.counts.synchronisations[str(func)] += 1
        out = func(*args, **kwargs)
        if func.namespace == "detr_fast":
            return out  # its kernels are counted where they are launched
        if func not in _FREE and not _is_view(func):
            self.counts.launches[str(func)] += 1
            self.counts.bytes_moved += _bytes((args, kwargs)) + _bytes(out)
        return out


@contextmanager
def counting(known: tuple[Tensor, ...] = ()) -> Iterator[Counts]:
    """Count what runs inside the block. Tensors in `known` (parameters, inputs) do not count as kept for backward."""
    counts = Counts()
    seen = {_storage(tensor) for tensor in known}

    def pack(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in seen and not isinstance(tensor, torch.nn.Parameter):
            seen.add(_storage(tensor))
            counts.saved_bytes += tensor.untyped_storage().nbytes()
            kept.append(tensor)  # alive until the end: a freed storage's address may be used again
        return tensor

    kept: list[Tensor] = []

    def observe(launched: launch.Launch) -> None:
        counts.launches[launched.variant.name] += 1
        counts.bytes_moved += _bytes(launched.arguments)

    launch.observers.append(observe)
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), _Operations(counts):
            yield counts
    finally:
        launch.observers.remove(observe)


def count(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Counts:
    """Call `function` once and say what it did. For a module, its parameters and the arguments do not count as kept."""
    known = [tensor for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)]
    if isinstance(function, torch.nn.Module):
        known += [*function.parameters(), *function.buffers()]
    with counting(tuple(known)) as counts:
        function(*args, **kwargs)
    return counts


def _is_view(func: Any) -> bool:
    return any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)


def _copies_to_host(func: Any, args: Any, kwargs: Any) -> bool:
    if func is torch.ops.aten._to_copy.default:
        target = kwargs.get("device")
        return args[0].is_cuda and target is not None and torch.device(target).type == "cpu"
    if func is torch.ops.aten.copy_.default:
        return args[1].is_cuda and args[0].device.type == "cpu"
    return False


def _indexes_by_mask(func: Any, args: Any) -> bool:
    """x[mask] and x[mask] = y count the mask's True elements on the host."""
    if func not in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten.index_put.default):
        return False
    return any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1])


def _bytes(values: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tree_leaves(values) if isinstance(t, Tensor))


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
