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
from functools import cached_property, partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from detr_fast.kernels import launch
from detr_fast.ops import boundary
from detr_fast.ops.dropout import given_seed
from detr_fast.ops.host_passes import (
    Instruction,
    addressed,
    compiled,
    in_one_piece,
    needed,
    read,
    taken_again,
    without_views,
)
from detr_fast.ops.host_recorder import FIRST_INPUT, FIRST_OFFSET, SEED, STREAM, Recorder, size_of
from detr_fast.ops.products import goes_by_eager_ops

ALIGNED = 16  # bytes: what kernels move at once
LATER = 512  # calls, after which one is recorded that met too little memory


def signature_of(tensors: Sequence[Tensor | None], device: int) -> list[Any] | None:
    """What launches depend on, of tensors on that device; None where one is more than memory."""
    plain = boundary.is_memory
    found: list[Any] = []
    for t in tensors:
        if t is None:
            found.append(None)
        elif plain(t) and t.get_device() == device:
            found.append((t.shape, t.stride(), t.dtype, t.requires_grad, t.data_ptr() % ALIGNED))
        else:
            return None
    return found


class Backward(NamedTuple):
    """The instructions for the gradients that arrive, and the registers of those they give (None for no gradient)."""

    instructions: list[Instruction]
    arriving: tuple[int | None, ...]
    gradients: tuple[int | None, ...]


class Busy(Exception):
    """Another program is being recorded."""


class Arriving(NamedTuple):
    """How the gradient of an output is to lie in memory: as the output does, without gaps."""

    strides: tuple[int, ...]
    dtype: torch.dtype


class HostProgram:
    """Instructions over registers, the forward's and, by which outputs a gradient arrives for, the backward's."""

    def __init__(
        self,
        recorder: Recorder,
        arguments: Sequence[Tensor | None],
        inputs: int,
        outputs: Sequence[Tensor],
        ahead: int,
        backwards: dict[tuple[bool, ...], Backward],
        draws: int,
        keep: set[int] | None = None,
    ) -> None:
        """keep: registers that are kept for backward whether it reads them or not; arguments, for a double backward, where None."""
        self.native: Any = None  # this program in C++ (see `host_native`), or False where it can't be
        self.draws = draws  # seeds' offsets used
        self.inputs, self.outputs = inputs, list(map(recorder.find, outputs))
        self.device = outputs[0].device
        self.differentiable = [y.requires_grad for y in outputs]
        self.arriving = [Arriving(torch.empty_like(y, device="meta").stride(), y.dtype) for y in outputs]
        self.launches = any(STREAM in one.arguments for one in recorder.instructions)
        self.recorder = recorder.forgotten()
        gradients_of = next(iter(backwards.values())).gradients if backwards else (None,) * inputs
        self.wanted = [r is not None for r in gradients_of]  # of the inputs, whether a gradient is
        forward, *behind = [recorder.instructions[:ahead], *(b.instructions for b in backwards.values())]
        views = {r: one for one in forward if one.view for r in one.results}
        made = {r for one in forward for r in one.results}
        given = {SEED, *range(FIRST_INPUT, FIRST_INPUT + inputs)}
        saved = {FIRST_INPUT + i for i, t in enumerate(arguments) if t is not None} if keep is None else keep
        fixed = {*self.outputs, *(keep or ())}
        for backward, instructions in zip(backwards.values(), behind):
            gradients = {r for r in backward.gradients if r is not None}
            prelude = taken_again(views, read(instructions, gradients))
            instructions[:] = needed([*prelude, *instructions], gradients)
            written = {r for one in instructions for r in one.results}
            saved = saved | {r for r in read(instructions, gradients) - written if r in made or r in given}
            fixed |= gradients
        forward = needed(forward, {*self.outputs, *(saved if backwards else ())})
        sections = [forward, *behind]
        same = without_views(sections, recorder.constants, fixed)
        saved, fixed = ({same.get(r, r) for r in registers} for registers in (saved, fixed))
        self.outputs = [same.get(r, r) for r in self.outputs]
        saved = self._in_pieces(sections, saved, fixed, recorder)
        self.saved = sorted(saved) if backwards else []  # registers that are kept for backward
        self.forward_instructions = forward
        self.backwards: dict[tuple[bool, ...], Backward] = {}
        for (pattern, backward), instructions in zip(backwards.items(), behind):
            results = tuple(None if r is None else same.get(r, r) for r in backward.gradients)
            self.backwards[pattern] = Backward(instructions, backward.arriving, results)

    def _in_pieces(
        self, sections: list[list[Instruction]], saved: set[int], fixed: set[int], recorder: Recorder
    ) -> set[int]:
        """Allocate at once what only launches use; the registers that are kept for backward then."""
        read = {r for section in sections for one in section for r in one.arguments}
        alone = {one.results[0] for section in sections for one in section if one.allocation} - read - fixed
        kept = alone & saved
        for section, registers in ((sections[0], kept), *((section, alone - kept) for section in sections)):
            recorder.constants.append(None)
            new = len(recorder.constants) - 1
            if in_one_piece(section, sections, registers, new, recorder.addresses) and registers is kept:
                saved = saved - kept | {new}
        return saved

    @cached_property
    def _forward(self) -> Callable[..., tuple[Any, ...]]:
        given = [*self._given_ahead, SEED, *range(FIRST_INPUT, FIRST_INPUT + self.inputs)]
        return self._compiled(self.forward_instructions, given, [*self.saved, *self.outputs])

    @cached_property
    def _backwards(self) -> dict[tuple[bool, ...], Callable[..., tuple[Any, ...]]]:
        return {
            pattern: self._compiled(
                one.instructions,
                [*self._given_ahead, *self.saved, *(r for r in one.arriving if r is not None)],
                one.gradients,
            )
            for pattern, one in self.backwards.items()
        }

    @property
    def _given_ahead(self) -> list[int]:
        return [STREAM, *(register for register, _ in self.recorder.offsets)]

    def _compiled(
        self, instructions: list[Instruction], given: list[int], wanted: Sequence[int | None]
    ) -> Callable[..., tuple[Any, ...]]:
        return compiled(addressed(instructions, self.recorder.addresses), self.recorder.constants, given, wanted)

    def forward(
        self, seed: Tensor | None, offset: int, inputs: Sequence[Tensor | None]
    ) -> tuple[tuple[Any, ...], tuple[Tensor, ...]]:
        """What is kept for backward, in the order of `saved`, and the outputs."""
        with boundary.below_autograd():
            found = self._forward(*self._ahead(offset), seed, *inputs)
        return found[: -len(self.outputs)], found[-len(self.outputs) :]

    def backward(
        self, offset: int, saved: Sequence[Tensor], arriving: Sequence[Tensor | None]
    ) -> tuple[Tensor | None, ...]:
        """Gradients of the inputs, of what was kept and what arrives for each output."""
        backward = self._backwards[tuple(dy is not None for dy in arriving)]
        with boundary.below_autograd():
            found = []
            for dy, (strides, _) in zip(arriving, self.arriving):
                if dy is not None:
                    fits = dy.stride() == strides and dy.data_ptr() % ALIGNED == 0
                    found.append(dy if fits else dy.new_empty_strided(dy.shape, strides).copy_(dy))
            return backward(*self._ahead(offset), *saved, *found)

    def _ahead(self, offset: int) -> list[int | None]:
        """The stream, and the seed's offsets."""
        steps = [offset + further for _, further in self.recorder.offsets]
        return [launch.current_stream() if self.launches else None, *steps]


_lock = threading.Lock()


def record(
    function: Callable[..., list[Tensor]],
    arguments: Sequence[Tensor | None],
    parameters: Sequence[Tensor | None],
    seed: Tensor | None,
) -> HostProgram | None:
    """The program of `function(*arguments)`, which reads `parameters` besides, and of its backward.

    None while another is made, and where two of the tensors overlap, so that nothing tells apart what is in them.

    arguments: any tensors; parameters: also of a graph, which is not walked. Runs forward and backward once, on these tensors. Raises Unrepeatable.
    """
    starts = sorted((t.data_ptr(), size_of(t)) for t in (*arguments, *parameters) if t is not None)
    if any(start < before + max(size, 1) for (before, size), (start, _) in pairwise(starts)):
        return None

    def made(recorder: Recorder, outputs: Sequence[Tensor], *rest: Any) -> HostProgram:
        return HostProgram(recorder, arguments, len(arguments) + len(parameters), outputs, *rest)

    return _recorded(function, arguments, parameters, seed, _patterns, made)


def record_op(
    function: Callable[..., list[Tensor]],
    arguments: Sequence[Tensor],
    patterns: Callable[[Sequence[Tensor]], list[tuple[bool, ...]]],
    kept: Callable[[Sequence[Tensor]], Sequence[Tensor | None]],
) -> tuple[HostProgram, list[int | None]]:
    """The program of an op, which takes its seed as an argument and its offset from FIRST_OFFSET, as `record`.

    The tensors may overlap, in a way that is part of what tells calls apart. patterns(outputs): which gradients arrive for them.
    kept(outputs): tensors to be kept for backward in any case, whose registers are returned, too. Raises Unrepeatable, and Busy
    while another is made.
    """
    registers: list[int | None] = []

    def made(recorder: Recorder, outputs: Sequence[Tensor], *recorded: Any) -> HostProgram:
        registers.extend(None if t is None else recorder.find(t) for t in kept(outputs))
        keep = {r for r in registers if r is not None}
        ahead, backwards, draws = recorded
        return HostProgram(recorder, arguments, len(arguments), outputs, ahead, backwards, draws, keep)

    program = _recorded(function, arguments, (), None, patterns, made)
    if program is None:
        raise Busy
    return program, registers


def _recorded(
    function: Callable[..., list[Tensor]],
    arguments: Sequence[Tensor | None],
    parameters: Sequence[Tensor | None],
    seed: Tensor | None,
    patterns: Callable[[Sequence[Tensor]], list[tuple[bool, ...]]],
    made: Callable[..., HostProgram],
) -> HostProgram | None:
    if not _lock.acquire(blocking=False):  # to wait could be for ever: the other may need this thread for its backward
        return None
    try:
        grad = torch.is_grad_enabled()
        given = [t if t is None or not grad else t.detach().requires_grad_(t.requires_grad) for t in arguments]
        recorder = Recorder([*given, *parameters], seed)
        with casts_again(), given_seed(seed, FIRST_OFFSET) as scope, recorder.recording():
            outputs = list(function(*given))
            ahead = len(recorder.instructions)
            leaves = [*given, *parameters]
            backwards: dict[tuple[bool, ...], Backward] = {}
            for pattern in patterns(outputs):
                backwards[pattern] = _record_backward(recorder, outputs, leaves, pattern)
        return made(recorder, outputs, ahead, backwards, scope.offset + 1 - FIRST_OFFSET)
    finally:
        _lock.release()


@contextmanager
def casts_again() -> Iterator[None]:
    """Inside the block autocast casts each time, so that it is seen to."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def _patterns(outputs: Sequence[Tensor]) -> list[tuple[bool, ...]]:
    """For which outputs gradients may arrive: all that can have one, and where there are two, either alone."""
    wanted = tuple(t.requires_grad for t in outputs)
    if not any(wanted):
        return []
    return [wanted] if sum(wanted) == 1 else [(True, True), (True, False), (False, True)]


def _record_backward(
    recorder: Recorder, outputs: list[Tensor], leaves: list[Tensor | None], pattern: tuple[bool, ...]
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
    with torch.autocast(outputs[0].device.type, enabled=False):  # a backward is outside, whatever its forward was
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
        kept, outputs = program.forward(seed, offset, inputs)
        ctx.save_for_backward(*kept)
        ctx.mark_non_differentiable(*(y for y, wanted in zip(outputs, program.differentiable) if not wanted))
        ctx.program, ctx.offset, ctx.again = program, offset, Again(program, again, inputs[count:])
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: Any, *arriving: Tensor | None) -> Any:
        if all(dy is None for dy in arriving):
            return (None,) * len(ctx.needs_input_grad)
        program, saved = ctx.program, ctx.saved_tensors
        if not goes_by_eager_ops(*arriving):
            found = program.backward(ctx.offset, saved, arriving)
        else:
            found = ctx.again.backward(ctx.offset, saved, arriving)
        return (None, None, None, None, None, *found)


class Again:
    """What computes a program's outputs once more, and the parameters that it takes: not all of them are saved."""

    def __init__(self, program: HostProgram, function: Callable[..., Any], parameters: Sequence[Tensor | None]) -> None:
        self.program, self.function, self.parameters = program, function, parameters
        self.versions = _versions(parameters)

    def backward(
        self, offset: int, saved: Sequence[Tensor | None], arriving: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """The program's backward, to be differentiated again. Raises RuntimeError where a parameter has changed."""
        program, parameters = self.program, self.parameters
        if _versions(parameters) != self.versions:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: a parameter of "
                "a layer, which a backward with create_graph=True computes again; change parameters behind that backward"
            )
        values = dict(zip(program.saved, saved))
        arguments = [values.get(FIRST_INPUT + i) for i in range(program.inputs - len(parameters))]
        function = partial(self.function, values.get(SEED), offset)
        return _differentiable(function, (*arguments, *parameters), arriving, program.wanted)


def _versions(tensors: Sequence[Tensor | None]) -> list[int | None]:
    return [None if t is None or t.is_inference() else t._version for t in tensors]


def _differentiable(
    function: Callable[..., Any],
    inputs: Sequence[Tensor | None],
    arriving: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of `function(*inputs)`, with create_graph ones that can be differentiated again."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # A node of its own for each: the surrounding graph must not be walked here, and can be entered later.
        fresh = [t if t is None else t.view_as(t) if t.requires_grad else t.detach() for t in inputs]
        pairs = [(y, dy) for y, dy in zip(function(*fresh), arriving) if dy is not None]
        sources = [t for t, want in zip(fresh, wanted) if want and t is not None]
        ys, dys = zip(*pairs)
        found = iter(torch.autograd.grad(ys, sources, dys, create_graph=again, allow_unused=True))
    return [next(found) if want else None for want in wanted]
