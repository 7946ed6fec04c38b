"""Launchers that are called again: what they did the last time is done once more, without working it out.

A launcher's checks, plans and strides follow from its arguments' shapes, layouts, dtypes and alignment, and cost the host
several times what its launches do. `repeated` writes down, when it meets such arguments for the second time, what reaches the
device: allocations and launches, whose pointers are places in arguments, results or scratch memory. From then on it does that
alone, on addresses, with all scratch memory in one piece. A launcher that calls operations of PyTorch's runs as it is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import launch
from .rows import MAX_PLANS

ALIGNMENT = 256  # bytes, of each scratch tensor: at least what kernels are compiled for
_aten = torch.ops.aten
_ALLOCATIONS = frozenset({_aten.empty.memory_format, _aten.new_empty.default, _aten.empty_strided.default})
_VIEWS = frozenset(
    {
        _aten.view.default,
        _aten.transpose.int,
        _aten.t.default,
        _aten.select.int,
        _aten.slice.Tensor,
        _aten.unsqueeze.default,
        _aten.squeeze.dim,
        _aten.expand.default,
        _aten.permute.default,
        _aten.detach.default,
        _aten.alias.default,
        _aten.as_strided.default,
        _aten.unbind.int,
        _aten.split.Tensor,
    }
)
_NEVER = launch.triton is None or bool(launch.triton.knobs.runtime.interpret)  # there are no programs
_known: list[dict[Any, Any]] = []
_dispatch_modes = torch._C._len_torch_dispatch_stack


class _Step(NamedTuple):
    """A launch: `run` and what it takes before and behind the stream; places: (index, base, distance) of each pointer.

    offsets: indices of arguments that are the offset of dropout's seed.
    """

    run: Callable[..., None]
    grid: tuple[int, int, int]
    handles: tuple[Any, ...]
    arguments: list[Any]
    places: list[tuple[int, int, int]]
    offsets: list[int]


class _Program(NamedTuple):
    """Bases are the addresses of the argument tensors, of the results, and of the scratch memory."""

    results: list[Callable[[], Tensor]]
    several: bool  # the launcher returns a tuple
    scratch: Callable[[], Tensor] | None  # one piece of memory
    steps: list[_Step]


class _Recorder(TorchDispatchMode):
    """Sees allocations, and operations that a program would leave out."""

    def __init__(self) -> None:
        super().__init__()
        self.allocations: list[Tensor] = []
        self.launches: list[launch.Launch] = []
        self.others = False
        self._thread = threading.get_ident()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func in _ALLOCATIONS:
            self.allocations.append(found)
        elif func not in _VIEWS:
            self.others = True
        return found

    def observe(self, one: launch.Launch) -> None:
        if threading.get_ident() == self._thread:
            self.launches.append(one)


def repeated(launcher: Callable[..., Any], offset: int = -1) -> Callable[..., Any]:
    """`launcher`, which takes tensors, None and hashable settings and returns new tensors, at less cost when called again.

    offset: the index of the argument that kernels take as `offset`, that of dropout's seed: layers of a stack differ in nothing else.
    """
    programs: dict[Any, _Program | bool | None] = {}  # False: met once, None: not to be repeated
    _known.append(programs)

    def call(*arguments: Any) -> Any:
        driver = _driver()
        if driver is None or _dispatch_modes():
            return launcher(*arguments)
        key: list[Any] = [driver]
        bases: list[int] = []
        device = -2
        for argument in arguments if offset < 0 else (*arguments[:offset], *arguments[offset + 1 :]):
            if isinstance(argument, Tensor):
                address, place = argument.data_ptr(), argument.get_device()
                # each one's device: what a program gets are addresses, which Triton could no longer refuse
                key += (argument.shape, argument.stride(), argument.dtype, address % 16, place)
                bases.append(address)
                if device == -2:
                    device = place
                    if argument.dtype is torch.float32:
                        key.append(torch._C._get_fp32_precision_getter("cuda", "matmul"))
            elif type(argument) is list:
                if argument and isinstance(argument[0], Tensor):
                    return launcher(*arguments)
                key.append(tuple(argument))
            else:
                key.append(argument)
        if len(set(bases)) < len(bases):
            key += map(bases.index, bases)  # which arguments are one
        whole = tuple(key)
        program = programs.get(whole, True)
        if type(program) is _Program and (device < 0 or device == torch.cuda.current_device()):
            drawn = arguments[offset] if offset >= 0 else 0
            return _repeat(program, bases, driver.get_current_stream(max(device, 0)), drawn)
        if program is True:  # met for the first time; shapes that vary for ever are not worth a recording
            if len(programs) >= MAX_PLANS:
                programs.clear()
            programs[whole] = False
        elif program is False:
            found, programs[whole] = _record(launcher, arguments)
            return found
        return launcher(*arguments)

    return call


def forget() -> None:
    """Drop all programs, as what launchers read besides their arguments has changed."""
    for programs in _known:
        programs.clear()


def _driver() -> Any:
    """Triton's driver, or None where launches are not to be repeated: interpreted, watched, or with a test's allocations."""
    if _NEVER or launch.observers or launch._allocate is not torch.empty:
        return None
    runtime = launch.triton.knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):
        return None
    return launch.triton.runtime.driver.active


def _repeat(program: _Program, bases: list[int], stream: int, drawn: int) -> Any:
    results = [make() for make in program.results]
    bases += [t.data_ptr() for t in results]
    if program.scratch is not None:
        memory = program.scratch()  # until the launches are queued: the next to get it is queued behind them
        bases.append(memory.data_ptr())
    for run, grid, handles, arguments, places, offsets in program.steps:
        arguments = arguments.copy()
        for index, base, distance in places:
            arguments[index] = bases[base] + distance
        for index in offsets:
            arguments[index] = drawn
        run(*grid, stream, *handles, *arguments)
    return tuple(results) if program.several else results[0]


def _record(launcher: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Any, _Program | None]:
    """What the launcher returns, and its program, or None where it can't be repeated."""
    recorder = _Recorder()
    launch.observers.append(recorder.observe)
    try:
        with recorder:
            found = launcher(*arguments)
    finally:
        launch.observers.remove(recorder.observe)
    tensors = [t for t in arguments if isinstance(t, Tensor)]
    return found, None if recorder.others else _program(recorder, tensors, found)


def _program(recorder: _Recorder, tensors: list[Tensor], found: Any) -> _Program | None:
    results = list(found) if isinstance(found, tuple) else [found]
    if not all(isinstance(t, Tensor) for t in results) or not recorder.launches:
        return None
    results_start = [t.data_ptr() for t in results if t.numel()]
    if 0 in (t.data_ptr() for t in tensors) or len(set(results_start)) < len(results_start):
        return None  # nothing tells arguments without elements apart, nor results in one place
    made = {t.untyped_storage().data_ptr(): t for t in recorder.allocations if t.numel()}
    places: dict[int, tuple[int, int]] = {}  # address of memory: number of its base, and distance from that
    for number, t in enumerate(tensors):
        places.setdefault(t.data_ptr(), (number, 0))
    makers: list[Callable[[], Tensor]] = []
    for number, t in enumerate(results, len(tensors)):
        if t.numel():
            memory = made.pop(t.untyped_storage().data_ptr(), None)
            if memory is None or memory.numel() != t.numel() or memory.dtype is not t.dtype or t.storage_offset():
                return None
            places[t.data_ptr()] = number, 0
        makers.append(_maker(t.shape, t.stride(), t.dtype, t.device))
    total, scratch = 0, {}
    for start, t in made.items():
        scratch[start] = total, t.nbytes
        total += -(-t.nbytes // ALIGNMENT) * ALIGNMENT

    def place(address: int) -> tuple[int, int] | None:
        if address in places:
            return places[address]
        for start, (distance, size) in scratch.items():
            if start <= address < start + max(size, 1):
                return len(tensors) + len(results), distance + address - start
        for number, t in enumerate(results, len(tensors)):
            if t.data_ptr() <= address < t.data_ptr() + t.nbytes:
                return number, address - t.data_ptr()
        return None

    steps = []
    for variant, grid, arguments in ((one.variant, one.grid, one.arguments) for one in recorder.launches):
        if not variant.compiled:
            return None
        program = variant.program(tensors[0].device)
        found_places = []
        for index, argument in enumerate(arguments):
            if isinstance(argument, Tensor):
                where = place(argument.data_ptr())
                if where is None:
                    return None
                found_places.append((index, *where))
        handles = (program.function, program.metadata, None, None, None)
        values = [None if isinstance(a, Tensor) else a for a in arguments]
        x, y, z = (*grid, 1, 1)[:3]
        offsets = [index for index, name in enumerate(variant.kernel.arg_names[: len(values)]) if name == "offset"]
        steps.append(_Step(program.run, (x, y, z), handles, [*values, *program.constants], found_places, offsets))
    scratch_maker = _maker((total,), (1,), torch.uint8, tensors[0].device) if total else None
    return _Program(makers, isinstance(found, tuple), scratch_maker, steps)


def _maker(
    shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Callable[[], Tensor]:
    """What allocates such a tensor."""
    like = torch.empty(1, dtype=dtype, device=device).expand(shape)  # a tensor to read all that from takes half as long
    like.untyped_storage().resize_(0)  # it holds nothing, least of all of a graph's memory
    if torch.empty_like(like, device="meta").stride() == strides:
        return partial(torch.empty_like, like)
    return partial(torch.empty_strided, shape, strides, dtype=dtype, device=device)
