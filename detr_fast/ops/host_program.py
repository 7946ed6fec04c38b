"""What the host does for many ops, forward and backward, recorded once and from then on done without thinking: one autograd node.

Launched eagerly, a layer at DETR's sizes costs its GPU less time than the host: decisions, plans, op boundaries and a node of
autograd's for each op. All of that depends on shapes, layouts and settings alone. `record` lets it happen once, on the real
tensors, and writes down what reached the device: allocations, views, PyTorch's operations and launches, of the forward and of
the backward that autograd makes of it. A `HostProgram` does the same again, to the bit, on other tensors of the same signature.

Nothing is computed here that the ops do not compute: the program is theirs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, _get_current_dispatch_mode
from torch.utils._pytree import tree_flatten, tree_unflatten

from detr_fast.kernels import launch
from detr_fast.ops import boundary
from detr_fast.ops.dropout import given_seed

# Offsets of seeds while recording start here, a number that no size or stride comes near: where one is passed on, the program
# adds its own first offset instead.
FIRST_OFFSET = 0x5EED0000
MAX_OFFSETS = 64
MAX_NUMEL = 1 << 30
_STREAM, _SEED, _OFFSET = 0, 1, 2  # registers of every program, in front of its inputs
_UNREPEATABLE = {
    torch.Tag.nondeterministic_seeded,
    torch.Tag.data_dependent_output,
    torch.Tag.dynamic_output_shape,
}


class Unrepeatable(Exception):
    """What was recorded can't be done again blindly; the message says why."""


class Instruction(NamedTuple):
    """results: registers that what `call` returns goes to. dead: registers that nothing reads afterwards."""

    call: Callable[..., Any]
    arguments: tuple[int, ...]
    results: tuple[int, ...] = ()
    several: bool = False  # it returns a tuple
    pure: bool = False  # an allocation or a view: not needed where its results are not
    view: bool = False
    dead: tuple[int, ...] = ()


class _Recorder(TorchDispatchMode):
    """Writes down what runs under it, in this thread and in autograd's."""

    def __init__(self, inputs: Sequence[Tensor | None], seed: Tensor | None) -> None:
        super().__init__()
        self.constants: list[Any] = [None, seed, None]
        self.instructions: list[Instruction] = []
        self._alive: list[Tensor] = []  # so that places and ids stay theirs
        self._registers: dict[int, int] = {}
        self._places: dict[Any, int] = {}
        self._starts: dict[Any, Tensor] = {}
        self._offsets: dict[int, int] = {}
        if seed is not None:
            self._keep(seed, _SEED)
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
        self._starts.setdefault(_start(tensor), tensor)

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

    def _write(self, call: Callable[..., Any], arguments: Sequence[Any], found: Any = None, **kind: bool) -> None:
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
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            self._keep(found, self.find(args[0]))
            return found
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        pure = view or func._schema.name in ("aten::empty", "aten::new_empty", "aten::empty_strided")
        self._write(*_positional(func, args, kwargs), found, pure=pure, view=view)
        return found

    def launched(self, one: launch.Launch) -> None:
        """An observer of launches."""
        if _get_current_dispatch_mode() is not self:
            return  # another thread's
        if not one.variant.compiled:
            self._write(partial(launch.launch, one.variant, one.grid), one.arguments)
            return
        program = one.variant.program(one.arguments[0].device)
        arguments = tuple(self._same_start(a) if isinstance(a, Tensor) else a for a in one.arguments)
        grid = (*one.grid, 1, 1)[:3]
        operands = [*map(self._operand, (*grid, None, program.function, program.metadata, None, None, None))]
        operands[3] = _STREAM
        operands += map(self._operand, (*arguments, *program.constants))
        self.instructions.append(Instruction(program.run, tuple(operands)))

    def _same_start(self, tensor: Tensor) -> Tensor:
        """Of a view that starts where what it is a view of does, that: a kernel reads no more than the address."""
        return self._starts.get(_start(tensor), tensor)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Inside the block all that runs in this thread, and in autograd's for it, is recorded."""
        allocate = launch._allocate

        def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
            with _disable_current_modes():
                found = allocate(shape, dtype=dtype, device=device)
            if _get_current_dispatch_mode() is self:
                self._write(partial(allocate, shape, dtype=dtype, device=device), (), found, pure=True)
            return found

        launch.observers.append(self.launched)
        try:
            with launch.allocating_with(empty), self:
                yield
        finally:
            launch.observers.remove(self.launched)


def _place(tensor: Tensor) -> Any:
    return (*_start(tensor), tensor.shape, tensor.stride())


def _start(tensor: Tensor) -> Any:
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.dtype


def _positional(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Callable[..., Any], Sequence[Any]]:
    """The operation as Python's fastest binding of it, and its arguments, those by name and in lists among them."""
    leaves, spec = tree_flatten((args, kwargs))
    name = func._schema.name.split("::")[1]
    binding = getattr(torch._C._VariableFunctions, name, None) or getattr(Tensor, name, None) or func
    nested = [a for a in (*kwargs.values(), *args) if isinstance(a, (list, tuple))]
    if any(isinstance(t, Tensor) for t in (*kwargs.values(), *tree_flatten(nested)[0])):

        def call(*leaves: Any) -> Any:
            args, kwargs = tree_unflatten(leaves, spec)
            return func(*args, **kwargs)

        return call, leaves
    return (partial(binding, **kwargs) if kwargs else binding), args


class Backward(NamedTuple):
    """The instructions for the gradients that arrive, and the registers of those they give (None for no gradient)."""

    instructions: list[Any]
    arriving: tuple[int | None, ...]
    gradients: tuple[int | None, ...]


class HostProgram:
    """Instructions over registers, the forward's and, by which outputs a gradient arrives for, the backward's."""

    def __init__(
        self,
        recorder: _Recorder,
        arguments: Sequence[Tensor | None],
        inputs: int,
        outputs: Sequence[Tensor],
        ahead: int,
        backwards: dict[Any, Backward],
        draws: int,
    ) -> None:
        self.draws = draws  # seeds' offsets used
        self.inputs, self.outputs = inputs, list(map(recorder.find, outputs))
        self.strides = [torch.empty_like(y, device="meta").stride() for y in outputs]  # of the gradients that it takes
        self.compiled = any(_STREAM in one.arguments for one in recorder.instructions)
        self._constants, self._offsets = recorder.constants, recorder.offsets
        forward, *behind = [recorder.instructions[:ahead], *(b.instructions for b in backwards.values())]
        views = {r: one for one in forward if one.view for r in one.results}
        made = {r for one in forward for r in one.results}
        given = {*range(3 + inputs)} - {_STREAM, _OFFSET}
        # Arguments in any case, for a double backward.
        saved = {3 + i for i, t in enumerate(arguments) if t is not None}
        self._backwards: dict[Any, Backward] = {}
        for (pattern, backward), instructions in zip(backwards.items(), behind):
            prelude = _again(views, _read(instructions, backward.gradients))
            live = _needed([*prelude, *instructions], {r for r in backward.gradients if r is not None})
            written = {r for one in live for r in one.results}
            saved |= {r for r in _read(live, backward.gradients) - written if r in made or r in given}
            self._backwards[pattern] = backward._replace(instructions=live)
        self.saved = sorted(saved) if backwards else None  # registers kept for backward, if there can be one
        lasting = {*self.outputs, *(self.saved or ())}
        self._forward = _compiled(_needed(forward, lasting), lasting)
        for pattern, backward in self._backwards.items():
            lasting = {r for r in backward.gradients if r is not None}
            self._backwards[pattern] = backward._replace(instructions=_compiled(backward.instructions, lasting))

    def _registers(self, offset: int) -> list[Any]:
        values = self._constants.copy()
        values[_STREAM] = launch.current_stream() if self.compiled else None
        for register, steps in self._offsets:
            values[register] = offset + steps
        return values

    def forward(self, seed: Tensor | None, offset: int, inputs: Sequence[Any]) -> list[Any]:
        """The registers afterwards."""
        values = self._registers(offset)
        values[_SEED] = seed
        values[3 : 3 + self.inputs] = inputs
        with boundary.below_autograd():
            _run(self._forward, values)
        return values

    def outputs_of(self, seed: Tensor | None, offset: int, inputs: Sequence[Any]) -> list[Tensor]:
        """The forward alone."""
        values = self.forward(seed, offset, inputs)
        return [values[r] for r in self.outputs]

    def backward(self, offset: int, saved: Sequence[Tensor], arriving: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradients of the inputs, of the registers that were `saved` and what arrives for each output."""
        backward = self._backwards[tuple(dy is not None for dy in arriving)]
        values = self._registers(offset)
        for register, tensor in zip(self.saved, saved):
            values[register] = tensor
        with boundary.below_autograd():
            for place, dy, strides in zip(backward.arriving, arriving, self.strides):
                if place is not None and dy is not None:
                    fits = dy.stride() == strides and dy.data_ptr() % 16 == 0
                    values[place] = dy if fits else dy.new_empty_strided(dy.shape, strides).copy_(dy)
            _run(backward.instructions, values)
        return [None if r is None else values[r] for r in backward.gradients]


def _read(instructions: Sequence[Instruction], more: Sequence[int | None] = ()) -> set[int]:
    return {r for one in instructions for r in one.arguments} | {r for r in more if r is not None}


def _again(views: dict[int, Instruction], wanted: set[int]) -> list[Instruction]:
    """Views of the forward's, taken once more for the backward: what is kept is what they are views of."""
    needed: list[Instruction] = []
    for one in reversed(list(dict.fromkeys(views.values()))):
        if not wanted.isdisjoint(one.results):
            needed.append(one)
            wanted |= set(one.arguments)
    return needed[::-1]


def _needed(instructions: Sequence[Instruction], wanted: set[int]) -> list[Instruction]:
    """Without allocations and views that nothing reads."""
    live, kept = set(wanted), []
    for one in reversed(instructions):
        if one.pure and live.isdisjoint(one.results):
            continue
        kept.append(one)
        live |= set(one.arguments)
    return kept[::-1]


def _compiled(instructions: Sequence[Instruction], lasting: set[int]) -> list[Any]:
    """As `_run` reads them."""
    last: dict[int, int] = {}
    for index, one in enumerate(instructions):
        last |= dict.fromkeys((*one.arguments, *one.results), index)
    results = {r for one in instructions for r in one.results}
    dead: dict[int, list[int]] = {}
    for register, index in last.items():
        if register in results and register not in lasting:
            dead.setdefault(index, []).append(register)
    compiled = []
    for index, one in enumerate(instructions):
        result = one.results if one.several else one.results[0] if one.results else None
        compiled.append((one.call, _picker(one.arguments), result, dead.get(index, ())))
    return compiled


def _picker(registers: tuple[int, ...]) -> Callable[[list[Any]], tuple[Any, ...]]:
    if len(registers) > 1:
        return itemgetter(*registers)
    return (lambda values, only=registers[0]: (values[only],)) if registers else (lambda values: ())


def _run(instructions: list[Any], values: list[Any]) -> None:
    for call, arguments, result, dead in instructions:
        if result is None:
            call(*arguments(values))
        elif type(result) is int:
            values[result] = call(*arguments(values))
        else:
            for register, found in zip(result, call(*arguments(values))):
                values[register] = found
        for register in dead:
            values[register] = None


_lock = threading.Lock()


def record(
    function: Callable[..., Sequence[Tensor]],
    arguments: Sequence[Tensor | None],
    parameters: Sequence[Tensor | None],
    seed: Tensor | None,
) -> HostProgram | None:
    """The program of `function(*arguments)`, which reads `parameters` besides, and of its backward; None while another is made.

    arguments: any tensors; parameters: leaves. Runs forward and backward once, on these tensors. Raises Unrepeatable.
    """
    if not _lock.acquire(blocking=False):  # to wait could be for ever: the other may need this thread for its backward
        return None
    try:
        grad = torch.is_grad_enabled()
        given = [t if t is None or not grad else t.detach().requires_grad_(t.requires_grad) for t in arguments]
        recorder = _Recorder([*given, *parameters], seed)
        identity = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
        with identity, given_seed(seed, FIRST_OFFSET) as scope, recorder.recording():
            outputs = list(function(*given))
            ahead = len(recorder.instructions)
            leaves = [*given, *parameters]
            backwards: dict[Any, Backward] = {}
            for pattern in _patterns([t.requires_grad for t in outputs]):
                backwards[pattern] = _record_backward(recorder, outputs, leaves, pattern)
        return HostProgram(recorder, given, len(leaves), outputs, ahead, backwards, scope.offset + 1 - FIRST_OFFSET)
    finally:
        _lock.release()


def _patterns(wanted: list[bool]) -> list[tuple[bool, ...]]:
    """For which outputs gradients may arrive: all, and where there are two, either alone."""
    if not all(wanted):
        return []
    return [(True,)] if len(wanted) == 1 else [(True, True), (True, False), (False, True)]


def _record_backward(
    recorder: _Recorder, outputs: list[Tensor], leaves: list[Tensor | None], pattern: tuple[bool, ...]
) -> Backward:
    start = len(recorder.instructions)
    arriving: list[int | None] = []
    upstream = []
    for y, arrives in zip(outputs, pattern):
        if arrives:
            with _disable_current_modes():
                upstream.append(torch.zeros_like(y))
        arriving.append(recorder.register(upstream[-1]) if arrives else None)
    sources = [t for t in leaves if t is not None and t.requires_grad]
    roots = [y for y, arrives in zip(outputs, pattern) if arrives]
    found = iter(torch.autograd.grad(roots, sources, upstream, retain_graph=True, allow_unused=True))
    gradients = [next(found) if t is not None and t.requires_grad else None for t in leaves]
    places = tuple(None if g is None else recorder.find(g) for g in gradients)
    return Backward(recorder.instructions[start:], tuple(arriving), places)


class ProgramNode(torch.autograd.Function):
    """A program as one node, on its arguments and, behind them, its parameters.

    `again(*arguments, *parameters)` computes the outputs by ops that can be differentiated twice.
    """

    @staticmethod
    def forward(
        ctx: Any, program: HostProgram, again: Any, seed: Tensor | None, offset: int, count: int, *inputs: Tensor | None
    ) -> Any:
        values = program.forward(seed, offset, inputs)
        ctx.save_for_backward(*[values[r] for r in program.saved])
        ctx.program, ctx.again, ctx.offset, ctx.parameters = program, again, offset, inputs[count:]
        ctx.set_materialize_grads(False)
        return tuple(values[r] for r in program.outputs)

    @staticmethod
    def backward(ctx: Any, *arriving: Tensor | None) -> Any:
        if all(dy is None for dy in arriving):
            return (None,) * len(ctx.needs_input_grad)
        program, saved = ctx.program, ctx.saved_tensors
        if not torch.is_grad_enabled():
            return (None, None, None, None, None, *program.backward(ctx.offset, saved, arriving))
        values = dict(zip(program.saved, saved))
        arguments = [values.get(3 + i) for i in range(program.inputs - len(ctx.parameters))]
        inputs, wanted = (*arguments, *ctx.parameters), ctx.needs_input_grad[5:]
        again = partial(ctx.again, values.get(_SEED), ctx.offset)
        return (None, None, None, None, None, *_differentiable(again, inputs, arriving, wanted))


def _differentiable(
    function: Callable[..., Any],
    inputs: Sequence[Tensor | None],
    arriving: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of `function(*inputs)` that can be differentiated again."""
    with torch.enable_grad():
        # A node of its own for each: the surrounding graph must not be walked here, and can be entered later.
        fresh = [t if t is None else t.view_as(t) if t.requires_grad else t.detach() for t in inputs]
        pairs = [(y, dy) for y, dy in zip(function(*fresh), arriving) if dy is not None]
        sources = [t for t, want in zip(fresh, wanted) if want]
        ys, dys = zip(*pairs)
        found = iter(torch.autograd.grad(ys, sources, dys, create_graph=True, allow_unused=True))
    return [next(found) if want else None for want in wanted]
