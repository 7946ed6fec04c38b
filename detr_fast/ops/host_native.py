"""Host programs in C++: single ops', recorded here, and what `native/program.h` is told of those and of whole layers.

`record` of `host_program` writes down what reaches the device. For an op that is one node of autograd's, the program keeps what that
node keeps, and a backward that the program does not have (`create_graph=True`, a mode that looks, another layout of what
arrives) is the node's own, on a context with the same contents.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._device import DeviceContext
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from detr_fast import dispatch, native
from detr_fast.kernels import driver, launch
from detr_fast.kernels.rows import MAX_PLANS
from detr_fast.ops import boundary, host_check, host_program
from detr_fast.ops.host_passes import Instruction
from detr_fast.ops.host_program import LATER, Again, HostProgram
from detr_fast.ops.host_recorder import (
    AHEAD,
    FIRST_INPUT,
    FIRST_OFFSET,
    GRID,
    MAX_OFFSETS,
    SEED,
    STREAM,
    Unrepeatable,
)

# Of a call's tensors: with more, the GPU takes longer than Python. On an H200 a LayerNorm of 64 MiB and its backward take 127 µs launched
# eagerly in C++ and 430 to 520 from Python, of 128 MiB 181 and 510 to 570.
MAX_BYTES = 512 << 20
SMALL = 64 << 20  # bytes above which memory must be free, `ROOM` times as much: a recording keeps all that a call makes
ROOM = 8
unrepeatable: dict[str, str] = {}  # why an op's call last had no program, by the op's name

# Kinds of operands, as `Operand::Kind` of program.h has them.
CONSTANT, REGISTER, ADDRESS, OFFSET, STREAM_OF_CALL = range(5)
# Operations that it does by itself, by its names for them.
_NAMES: dict[Any, str] = {Tensor.view: "view", torch.t: "t", torch.mm: "mm", Tensor.addmm_: "addmm_"}


def program_of(program: HostProgram, several: bool, strict: bool, slow: Callable[..., Any] | None) -> Any:
    """The program in C++, whose inputs are the recorded ones and, where something is dropped, the seed; None where it can't be.

    several: outputs are returned as a tuple. strict: a backward that somebody looks at, or whose gradients lie otherwise, goes to
    `slow`, as one that is to be differentiated does: slow(offset, what the call gave it, kept, arriving).
    """
    given = [*range(FIRST_INPUT, FIRST_INPUT + program.inputs), *([SEED] if program.draws else [])]
    outputs, host = program.outputs, native.host
    distinct = len({*outputs, *given}) == len(outputs) + len(given)  # no output is an input, or another one
    if host is None or not distinct:
        return None
    forward = _section(program, program.forward_instructions, given, [*program.saved, *outputs])
    backwards = []
    places = [i for i, wanted in enumerate(program.differentiable) if wanted]
    for pattern, one in program.backwards.items():
        arriving = [r for r in one.arriving if r is not None]
        wanted = [*one.gradients, *([None] if program.draws else [])]
        section = _section(program, one.instructions, [*program.saved, *arriving], wanted)
        backwards.append((sum(pattern[i] << n for n, i in enumerate(places)), section))
    index, stream = -1, None
    if program.launches:
        index = program.device.index if program.device.type == "cuda" else -1
        stream = launch.triton.runtime.driver.active.get_current_stream
    return host.Program(
        forward,
        tuple(backwards),
        tuple(outputs.index(r) if r in outputs else -1 for r in program.saved),
        tuple(map(int, program.differentiable)),
        tuple(program.arriving[i] for i in places),
        several,
        strict,
        slow,
        stream,
        index,
    )


def layer_program(program: HostProgram, inputs: Sequence[Tensor | None], seed: Tensor | None) -> Any:
    """A layer's program in C++, or None where that is not in use, not for it, or not yet."""
    if native.host is None:
        return None
    if program.native is None:
        try:
            program.native = _checked_layer(program, inputs, seed) or False
        except host_program.Busy:
            return None
        except torch.OutOfMemoryError:
            program.native = False
    return program.native or None


def _checked_layer(program: HostProgram, inputs: Sequence[Tensor | None], seed: Tensor | None) -> Any:
    host_check.expect(program.device)
    made, count = program_of(program, True, False, _differentiable), len(inputs)
    given = [*inputs, *([seed] if program.draws else [])]

    def python(offset: int, given: Sequence[Tensor | None]) -> Sequence[Tensor]:
        seed = given[count] if program.draws else None
        return host_program.ProgramNode.apply(program, None, seed, offset, count, *given[:count])  # type: ignore[no-any-return]

    if made is None or not host_check.passes("layer", program, python, partial(_run, made), given):
        return None
    return made


def _run(made: Any, offset: int, given: Sequence[Tensor | None]) -> Sequence[Tensor]:
    found = made.run(offset, None, *given)
    return found if isinstance(found, tuple) else (found,)


def _differentiable(offset: int, again: Again, kept: Any, arriving: Any) -> list[Tensor | None]:
    found = again.backward(offset, kept, arriving)
    return [*found, None] if again.program.draws else found


def _section(
    program: HostProgram, instructions: Sequence[Instruction], given: Sequence[int], wanted: Sequence[int | None]
) -> tuple[Any, ...]:
    """What program.h's `section_of` reads."""
    recorded = program.recorder
    addresses = {address: place for place, address in recorded.addresses.items()}
    offsets = dict(recorded.offsets)
    numbers = {r: n for n, r in enumerate(given)}
    for one in instructions:
        for r in one.results:
            numbers.setdefault(r, len(numbers))
    last = {r: index for index, one in enumerate(instructions) for r in (*one.reads, *one.results) if r in numbers}

    def operand(register: int) -> tuple[int, Any, int]:
        if register in numbers:
            return REGISTER, numbers[register], 0
        if register in addresses:
            memory, distance = addresses[register]
            return ADDRESS, numbers[memory], distance
        if register in offsets:
            return OFFSET, offsets[register], 0
        return (STREAM_OF_CALL, 0, 0) if register == STREAM else (CONSTANT, recorded.constants[register], 0)

    found: list[tuple[Any, ...]] = []
    for index, one in enumerate(instructions):
        dead = tuple(numbers[r] for r in {*one.reads, *one.results} if last.get(r) == index and r not in wanted)
        results = tuple(numbers[r] for r in one.results)
        if one.allocation is not None:
            keywords = one.call.keywords  # type: ignore[attr-defined]
            found.append(("empty", (*one.allocation, keywords["device"]), results, False, dead))
            continue
        if one.program is not None and (launched := _launch(one, operand)) is not None:
            found.append(("launch", launched, results, False, dead))
            continue
        call, operands = _NAMES.get(one.call, one.call), tuple(map(operand, one.arguments))
        if call == "view":
            operands = operands[0], recorded.constants[one.arguments[1]]
        found.append((call, operands, results, one.several, dead))
    registers = tuple(-1 if r is None else numbers[r] for r in wanted)
    return tuple(found), tuple(numbers[r] for r in given), registers, len(numbers)


def _launch(one: Instruction, operand: Callable[[int], tuple[int, Any, int]]) -> tuple[Any, ...] | None:
    """A launch by CUDA's driver, as program.h reads it; None where it is left to Triton's launcher."""
    entry = None if one.program is None else one.program.entry
    functions = None if entry is None else driver.functions()
    if entry is None or functions is None:
        return None
    grid = [operand(r)[1] for r in one.arguments[:GRID]]
    given = list(map(operand, one.arguments[AHEAD:]))[: len(entry.formats)]
    passed = [(*o, f) for o, f in zip(given, entry.formats) if f is not None]
    changing = {place: one for place, one in enumerate(passed) if one[0] != CONSTANT}
    fitting = {ADDRESS: (driver.POINTER,), OFFSET: (driver.INT32,), CONSTANT: driver.NUMBERS}
    if any(f not in fitting[kind] or (kind == CONSTANT and type(v) not in (int, float)) for kind, v, _, f in passed):
        return None
    try:
        parameters = entry.parameters([value if kind == CONSTANT else 0 for kind, value, _ in given])
    except (struct.error, OverflowError):  # Triton's launcher says what is wrong
        return None
    numbers = (entry.function, *grid, entry.threads, entry.shared, entry.overlaps)
    return *(one[:3] for one in changing.values()), (functions, numbers, parameters, tuple(changing), one.program)


# ---------------------------------------------------------------------------------------------------------------------
# Single ops.


class _Short(Unrepeatable):
    """There is too little memory now."""


def _record(op: boundary.Boundary, *arguments: Any) -> Any:
    """The program of an op's call, in C++, None where there can be none, False where there may be one the next time, or minus the calls to wait for that."""
    try:
        return _recorded(op, arguments)
    except host_program.Busy:
        return False
    except (_Short, torch.OutOfMemoryError) as error:
        unrepeatable[op.name] = f"{type(error).__name__}: {error}"
        return -LATER
    except Exception as error:  # the op runs as it is, and says itself what is wrong
        unrepeatable[op.name] = f"{type(error).__name__}: {error}"
        return None


def _recorded(op: boundary.Boundary, arguments: tuple[Any, ...]) -> Any:
    leaves, spec = tree_flatten(list(arguments))  # with what lists of tensors hold
    places = [i for i, a in enumerate(leaves) if isinstance(a, Tensor)]
    tensors = [leaves[i] for i in places]
    size = sum(t.nbytes for t in tensors)
    if size > MAX_BYTES:
        raise Unrepeatable(f"over {MAX_BYTES} bytes of tensors")
    if size > SMALL and ROOM * size > _free(tensors[0].device):
        raise _Short(f"{ROOM} times the {size} bytes of its tensors are not free")
    host_check.expect(tensors[0].device)
    several = False
    slow: _Slow | None = None
    inputs: tuple[Tensor, ...] = ()

    def at(offset: int, given: Sequence[Tensor | None]) -> list[Tensor]:
        nonlocal several
        others = dict(zip(places, given))
        merged = tree_unflatten([others.get(i, a) for i, a in enumerate(leaves)], spec)
        if op.offset >= 0:
            merged[op.offset] = offset
        found = op.python(*merged)
        if isinstance(found, list):
            raise Unrepeatable("it returns a list")
        several = isinstance(found, tuple)
        return list(found) if several else [found]

    def call(*given: Tensor) -> list[Tensor]:
        nonlocal inputs
        inputs = given
        return at(FIRST_OFFSET, given)

    def patterns(outputs: Sequence[Tensor]) -> list[tuple[bool, ...]]:
        wanted = [y.requires_grad for y in outputs]
        return [tuple(w and i < op.together for i, w in enumerate(wanted))] if any(wanted) else []

    def kept(outputs: Sequence[Tensor]) -> Sequence[Tensor | None]:
        nonlocal slow
        node = next((y.grad_fn for y in outputs if y.requires_grad), None)
        if node is None:
            return ()
        slow = _Slow(node, inputs)
        return slow.saved

    program, registers = host_program.record_op(call, tensors, patterns, kept)
    if slow is not None:
        slow.saved, slow.registers, slow.order = (), registers, program.saved
    made = program_of(program, several, True, slow)
    if made is None or not host_check.passes(op.name, program, at, partial(_run, made), tensors):
        return None
    return made


def _free(device: torch.device) -> int:
    """Bytes of its memory that nobody holds, PyTorch's pool included; of a CPU's, enough."""
    if device.type != "cuda":
        return ROOM * MAX_BYTES
    pooled = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + pooled


class _Slow:
    """A node's own backward, on what a program kept for it."""

    def __init__(self, node: Any, inputs: Sequence[Tensor]) -> None:
        self.function = getattr(type(node), "_forward_cls", None)
        leaves = [getattr(one, "variable", None) for one, _ in node.next_functions if one is not None]
        if self.function is None or any(not any(leaf is t for t in inputs) for leaf in leaves):
            raise Unrepeatable("it is not one node of autograd's")
        self.saved: tuple[Tensor | None, ...] = node.saved_tensors
        self.attributes = dict(vars(node))
        if any(isinstance(one, Tensor) for one in tree_leaves(self.attributes)):
            raise Unrepeatable("its node keeps tensors of its own")
        self.needs = node.needs_input_grad
        # Which of the gradients that the node gives is each input's.
        wanted = {id(leaf): place for leaf, place in zip(leaves, (i for i, need in enumerate(self.needs) if need))}
        self.places = [wanted.get(id(t)) for t in inputs]
        self.registers: list[int | None] = []  # of `saved`
        self.order: list[int] = []  # registers, as the program keeps them

    def __call__(
        self, offset: int, _: None, kept: tuple[Tensor | None, ...], arriving: tuple[Tensor | None, ...]
    ) -> list[Tensor | None]:
        values = dict(zip(self.order, kept))
        context = SimpleNamespace(**{name: _at(offset, value) for name, value in self.attributes.items()})
        context.saved_tensors = tuple(None if r is None else values[r] for r in self.registers)
        context.needs_input_grad = self.needs
        found = self.function.backward(context, *arriving)  # type: ignore[union-attr]
        return [None if place is None else found[place] for place in self.places]


def _at(offset: int, value: Any) -> Any:
    """With the seed's offset in place of the recorded one."""
    if type(value) is int and FIRST_OFFSET <= value < FIRST_OFFSET + MAX_OFFSETS:
        return value - FIRST_OFFSET + offset
    if type(value) in (tuple, list):
        return type(value)(_at(offset, one) for one in value)
    return value


def _never() -> int:
    return 0


def _switch(host: ModuleType | None) -> None:
    if host is None:
        boundary.attach = None
        for op in boundary.ops:
            op.native = None
        return
    if host.forget not in launch.forgetting:
        launch.forgetting.append(host.forget)
    hooks = None if launch.triton is None else launch.triton.knobs.runtime
    capturing: Callable[[], Any] = getattr(torch._C, "_cuda_isCurrentStreamCapturing", _never)
    host.configure(launch.observers, dispatch._recorders, vars(launch), torch.empty, hooks, capturing, DeviceContext)
    boundary.attach = _attach
    for op in boundary.ops:
        _attach(op)


def _attach(op: boundary.Boundary) -> None:
    assert native.host is not None
    op.native = native.host.Repeated(op.python, partial(_record, op), op.offset, MAX_PLANS)


def register() -> None:
    """Let ops use the compiled module whenever it is in use."""
    native.on_switch(_switch)
