"""Writes down what reaches the device while a computation runs: see `host_program`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, _get_current_dispatch_mode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from detr_fast.kernels import launch
from detr_fast.ops import boundary
from detr_fast.ops.host_passes import Addresses, Instruction

# Offsets of seeds while recording start here, a number that no size or stride comes near: where one is passed on, the program
# adds its own first offset instead.
FIRST_OFFSET = 0x5EED0000
MAX_OFFSETS = 64
STREAM, SEED, FIRST_INPUT = 0, 1, 2  # registers of every program
# Of a launch's operands, those of the grid, and those ahead of the kernel's arguments: stream and handles, too.
GRID, AHEAD = 3, 9
_UNREPEATABLE = {
    torch.Tag.nondeterministic_seeded,
    torch.Tag.data_dependent_output,
    torch.Tag.dynamic_output_shape,
}


class Unrepeatable(Exception):
    """What was recorded can't be done again blindly; the message says why."""


class Recorded(NamedTuple):
    """constants: by register, None in those that are given or written. offsets: registers, and how far each is from the first."""

    constants: list[Any]
    addresses: Addresses
    offsets: list[tuple[int, int]]


class Recorder(TorchDispatchMode):
    """Writes down what runs under it, in this thread and in autograd's."""

    def __init__(self, inputs: Sequence[Tensor | None], seed: Tensor | None) -> None:
        super().__init__()
        self.constants: list[Any] = [None, None]
        self.instructions: list[Instruction] = []
        self._alive: list[Tensor] = []  # so that places and ids stay theirs
        self._registers: dict[int, int] = {}
        self._places: dict[Any, int] = {}
        # By storage: the first register of each piece of it, and where that starts and ends. Inputs may lie in one storage
        # (flattened parameters): how far they are from each other is no part of what is repeated.
        self._memory: dict[int, list[tuple[int, int, int]]] = {}
        self.addresses: Addresses = {}
        self._offsets: dict[int, int] = {}
        if seed is not None:
            self._keep(seed, SEED)
        for tensor in inputs:
            self.register(tensor)

    def register(self, tensor: Tensor | None) -> int:
        """A new register, for what is given from outside."""
        self.constants.append(None)
        if tensor is not None:
            self._keep(tensor, len(self.constants) - 1)
        return len(self.constants) - 1

    def _keep(self, tensor: Tensor, register: int) -> None:
        self._alive.append(tensor)
        self._registers[id(tensor)] = register
        self._places.setdefault(_place(tensor), register)
        if self._piece(tensor) is None:
            pieces = self._memory.setdefault(tensor.untyped_storage()._cdata, [])
            pieces.append((register, *_span(tensor)))

    def _piece(self, tensor: Tensor) -> tuple[int, int] | None:
        """The register whose memory holds the tensor's, and how many bytes behind its start that begins."""
        start, end = _span(tensor)
        for register, first, last in self._memory.get(tensor.untyped_storage()._cdata, ()):
            if first <= start and end <= last:
                return register, start - first
        return None

    def find(self, tensor: Tensor) -> int:
        """The register that holds such a tensor: itself, or its memory seen in the same way."""
        found = self._registers.get(id(tensor))
        found = self._places.get(_place(tensor)) if found is None else found
        if found is None:
            raise Unrepeatable(f"a tensor of shape {tuple(tensor.shape)} comes from outside")
        return found

    def _operand(self, value: Any) -> int:
        if isinstance(value, Tensor):
            return self.find(value)
        if type(value) is int and FIRST_OFFSET <= value < FIRST_OFFSET + MAX_OFFSETS:
            if value not in self._offsets:
                self.constants.append(None)
                self._offsets[value] = len(self.constants) - 1
            return self._offsets[value]
        self.constants.append(value)
        return len(self.constants) - 1

    @property
    def offsets(self) -> list[tuple[int, int]]:
        """Registers of offsets, and how far each is from the first."""
        return [(register, value - FIRST_OFFSET) for value, register in self._offsets.items()]

    def _write(self, call: Callable[..., Any], arguments: Sequence[Any], found: Any = None, **kind: Any) -> None:
        operands = tuple(map(self._operand, arguments))
        results = []
        for tensor in found if isinstance(found, (tuple, list)) else [] if found is None else [found]:
            if not isinstance(tensor, Tensor):
                raise Unrepeatable(f"{call} returns {type(tensor).__name__}")
            known = self._registers.get(id(tensor))
            results.append(self.register(tensor) if known is None else known)
        several = isinstance(found, (tuple, list))
        self.instructions.append(Instruction(call, operands, tuple(results), several, **kind))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "detr_fast":
            with self:  # what its launcher does
                return boundary.launchers[func._schema.name.split("::")[1]](*args, **kwargs)
        if func.namespace != "aten" or not _UNREPEATABLE.isdisjoint(func.tags):
            raise Unrepeatable(f"{func} gives something else each time")
        found = func(*args, **kwargs)
        if not any(isinstance(t, Tensor) for t in tree_leaves((args, kwargs, found))):
            return found  # of dtypes or sizes alone
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            self._keep(found, self.find(args[0]))
            return found
        if func in (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default):
            self._write(Tensor.view, (args[0], tuple(found.shape)), found, view=True)
            return found
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        empty = func._schema.name in ("aten::empty", "aten::new_empty", "aten::empty_strided")
        self._write(*_positional(func, args, kwargs), found, view=view, empty=empty)
        return found

    def forgotten(self) -> Recorded:
        """What instructions refer to, without the tensors that were met."""
        return Recorded(self.constants, self.addresses, self.offsets)

    def launched(self, one: launch.Launch) -> None:
        """An observer of launches."""
        if _get_current_dispatch_mode() is not self:
            return  # another thread's
        if not one.variant.compiled:
            self._write(partial(launch.launch, one.variant, one.grid), one.arguments)
            return
        program = one.variant.program(one.arguments[0].device)
        handles = (None, program.function, program.metadata, None, None, None)  # nobody is told of the launch
        operands = list(map(self._operand, (*(*one.grid, 1, 1)[:3], *handles)))
        operands[GRID] = STREAM
        holds = []
        for argument in one.arguments:
            if isinstance(argument, Tensor):
                register, address = self._address(argument)
                operands.append(address)
                holds.append(register)
            else:
                operands.append(self._operand(argument))
        operands += map(self._operand, program.constants)
        self.instructions.append(Instruction(program.run, tuple(operands), holds=tuple(holds), program=program))

    def _address(self, tensor: Tensor) -> tuple[int, int]:
        """A register with the tensor's memory, and the one of its address: a kernel takes no more, and asks no driver about it."""
        place = self._piece(tensor)
        if place is None:
            raise Unrepeatable(f"a tensor of shape {tuple(tensor.shape)} comes from outside")
        if place not in self.addresses:
            self.constants.append(None)
            self.addresses[place] = len(self.constants) - 1
        return place[0], self.addresses[place]

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Inside the block all that runs in this thread, and in autograd's for it, is recorded."""
        allocate = launch._allocate

        def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
            with _disable_current_modes():
                found = allocate(shape, dtype=dtype, device=device)
            if _get_current_dispatch_mode() is self:
                self._write(partial(allocate, shape, dtype=dtype, device=device), (), found, allocation=(shape, dtype))
            return found

        launch.observers.append(self.launched)
        try:
            with launch.allocating_with(empty), self:
                yield
        finally:
            launch.observers.remove(self.launched)


def _place(tensor: Tensor) -> Any:
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.dtype, tensor.shape, tensor.stride()


def _span(tensor: Tensor) -> tuple[int, int]:
    """Where in its storage a tensor starts and ends, in bytes."""
    start = int(tensor.storage_offset()) * tensor.itemsize
    return start, start + size_of(tensor)


def size_of(tensor: Tensor) -> int:
    """Bytes from a tensor's first element to behind its last, with what lies between them."""
    if not tensor.numel():
        return 0
    return (1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride()))) * tensor.itemsize


_aten = torch.ops.aten
_BINDINGS: dict[
    Any, Callable[..., Any]
] = {  # of operations that take all arguments by place, or `dtype` and the like by name
    _aten.mm.default: torch.mm,
    _aten.addmm.default: torch.addmm,
    _aten.addmm_.default: Tensor.addmm_,
    _aten.t.default: torch.t,
    _aten.transpose.int: torch.transpose,
    _aten.select.int: torch.select,
    _aten.unbind.int: torch.unbind,
    _aten.split.Tensor: getattr(torch._C._VariableFunctions, "split"),  # noqa: B009 (torch.split is Python, and mypy knows no other)
    _aten.split_with_sizes.default: torch.split_with_sizes,
    _aten.sum.dim_IntList: torch.sum,
    _aten.add.Tensor: torch.add,
    _aten.empty.memory_format: torch.empty,
}


def _positional(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Callable[..., Any], Sequence[Any]]:
    """The operation, by a binding that Python calls faster, and its arguments, those by name and in lists among them."""
    leaves, spec = tree_flatten((args, kwargs))
    binding = _BINDINGS.get(func, func)
    nested = [a for a in (*kwargs.values(), *args) if isinstance(a, (list, tuple))]
    if any(isinstance(t, Tensor) for t in (*kwargs.values(), *tree_flatten(nested)[0])):

        def call(*leaves: Any) -> Any:
            args, kwargs = tree_unflatten(leaves, spec)
            return func(*args, **kwargs)

        return call, leaves
    return (partial(binding, **kwargs) if kwargs else binding), args
