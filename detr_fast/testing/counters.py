"""Numbers that hold on any machine, GPU or not: launches, bytes moved, bytes kept for backward, host synchronisations.

Timings drift; these do not, so tests can pin them. Everything is counted while a callable runs: on real tensors (those of
a CPU in Triton's interpreter), on fake "cuda" tensors (FakeTensorMode; forward only), where copies to the host and other
synchronisations show, or on meta tensors (forward and backward of any size, at no cost). On fake and meta tensors nothing
runs, and kernels are counted all the same; `use_backend("triton")` takes meta tensors, and attention is counted as CUDA's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from detr_fast.kernels import launch
from detr_fast.ops import boundary

# Operations that make the host wait for a GPU, whatever their arguments.
_SYNCHRONISING = {
    torch.ops.aten._local_scalar_dense.default,  # .item(), float(), bool(), if tensor: …
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.is_nonzero.default,
}
_DEVICES = ("cuda", "meta")
# What a tensor is asked rather than what is computed of it: subclasses without plain sizes (jagged nested tensors) answer.
_QUESTIONS = {
    f"aten::{name}"
    for name in [
        "dim",
        "is_contiguous",
        "is_non_overlapping_and_dense",
        "is_strides_like_format",
        "numel",
        "size",
        "storage_offset",
        "stride",
        "sym_is_contiguous",
        "sym_numel",
        "sym_size",
        "sym_storage_offset",
        "sym_stride",
    ]
} | {"prim::layout"}
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
# One kernel on CPUs and GPUs, though PyTorch also has them in parts.
_WHOLE = {torch.ops.aten.silu_backward.default, torch.ops.aten.mish_backward.default}


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
        self.observing = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.name in _QUESTIONS:
            return NotImplemented
        if func in _SYNCHRONISING or _copies_to_host(func, args, kwargs) or _indexes_by_mask(func, args):
            self.counts.synchronisations[str(func)] += 1
        if func.namespace == "detr_fast":
            return self._launch(func, args, kwargs)
        # Composites arrive whole in inference mode and inside launchers: count their parts.
        if func.namespace == "aten" and func not in _WHOLE:
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        if func.namespace != "prim" and func not in _FREE and not _is_view(func):
            more = _gradients_of_a_convolution(out) - 1 if func is torch.ops.aten.convolution_backward.default else 0
            self.counts.launches[str(func)] += 1 + more
            self.counts.bytes_moved += _bytes((args, kwargs)) + _bytes(out) + more * _bytes(args[0])
        return out

    def _launch(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Count an op of ours by what its launcher does on meta tensors: kernels, and operations of PyTorch's around them.

        So the interpreter, fake and meta tensors give the same numbers.
        """
        launcher = boundary.launchers[func._schema.name.split("::")[1]]
        with _disable_current_modes():
            hollow_args, hollow_kwargs = tree_map_only(Tensor, _hollow, (args, kwargs))
            waits = self.counts.total_synchronisations
            try:
                with self:
                    launcher(*hollow_args, **hollow_kwargs)
            except NotImplementedError:  # it copied to the host, which is counted, and found no values there
                if self.counts.total_synchronisations == waits:
                    raise
        before, self.observing = self.observing, False
        try:
            return func(*args, **kwargs)
        finally:
            self.observing = before

    def observe(self, launched: launch.Launch) -> None:
        if self.observing:
            self.counts.launches[launched.variant.name] += 1
            self.counts.bytes_moved += _bytes(_apart(launched.arguments))


@contextmanager
def _composites_as_on_cuda() -> Iterator[None]:
    """Attention on fake and meta tensors, and dropout on meta ones, would decompose: let them be CUDA's fused operations."""
    attention, dropout = F.scaled_dot_product_attention, F.dropout

    def attend(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        hollow = query.is_meta or isinstance(query, FakeTensor)
        return (_fused_attention if hollow else attention)(query, *args, **kwargs)

    def drop(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if input.is_meta and training and 0.0 < p < 1.0 and not inplace:
            return torch.native_dropout(input, p, True)[0]
        return dropout(input, p, training, inplace)

    with mock.patch.object(F, "scaled_dot_product_attention", attend), mock.patch.object(F, "dropout", drop):
        yield


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if attn_mask is None and query.dtype != torch.float32:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(query, key, value, dropout_p, is_causal, scale=scale)[0]
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.where(attn_mask, 0.0, query.new_full((), -torch.inf))
        attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(query, key, value, attn_mask, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale)[0]


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

    operations = _Operations(counts)
    launch.observers.append(operations.observe)
    try:
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with hooks, _composites_as_on_cuda(), operations:
            yield counts
    finally:
        launch.observers.remove(operations.observe)


def count(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Counts:
    """Call `function` once and say what it did. For a module, its parameters and the arguments do not count as kept."""
    known = [tensor for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)]
    if isinstance(function, torch.nn.Module):
        known += [*function.parameters(), *function.buffers()]
    with counting(tuple(known)) as counts:
        function(*args, **kwargs)
    return counts


def _gradients_of_a_convolution(out: Any) -> int:
    """Of input, weight and bias those that were asked for: on a GPU each is a launch, which reads what arrives by itself."""
    return sum(one is not None for one in out)


def _is_view(func: Any) -> bool:
    return any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)


def _copies_to_host(func: Any, args: Any, kwargs: Any) -> bool:
    if func is torch.ops.aten._to_copy.default:
        target = kwargs.get("device")
        return args[0].device.type in _DEVICES and target is not None and torch.device(target).type == "cpu"
    if func is torch.ops.aten.copy_.default:
        return args[1].device.type in _DEVICES and args[0].device.type == "cpu"
    return False


def _indexes_by_mask(func: Any, args: Any) -> bool:
    """x[mask] and x[mask] = y count the mask's True elements on the host."""
    if func not in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten.index_put.default):
        return False
    return any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1])


def _hollow(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _bytes(values: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tree_leaves(values) if isinstance(t, Tensor))


def _apart(arguments: tuple[Any, ...]) -> list[Tensor]:
    """The tensors without those that only say where parts of another one start."""
    tensors = [t for t in arguments if isinstance(t, Tensor) and t.numel()]
    whole = [t for t in tensors if t.is_contiguous()]

    def inside(part: Tensor, one: Tensor) -> bool:
        start, end = _span(part)
        first, last = _span(one)
        return first <= start and end <= last and end - start < last - first

    return [t for t in tensors if not any(_storage(t) == _storage(one) and inside(t, one) for one in whole)]


def _span(tensor: Tensor) -> tuple[int, int]:
    """Where its first byte and its last lie in its storage."""
    first = int(tensor.storage_offset())
    last = first + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return first * tensor.element_size(), (last + 1) * tensor.element_size()


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
