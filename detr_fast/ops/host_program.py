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
from detr_fast.ops.host_recorder import FIRST_INPUT, FIRST_OFFSET, SEED, STREAM, Recorder, Unrepeatable, size_of

ALIGNED = 16  # bytes: what kernels move at once


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

    instructions: list[Any]
    arriving: tuple[int | None, ...]
    gradients: tuple[int | None, ...]


class HostProgram:
    """Instructions over registers, the forward's and, by which outputs a gradient arrives for, the backward's."""

    def __init__(
        self,
        recorder: Recorder,
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
        self._launches = any(STREAM in one.arguments for one in recorder.instructions)
        forward, *behind = [recorder.instructions[:ahead], *(b.instructions for b in backwards.values())]
        views = {r: one for one in forward if one.view for r in one.results}
        made = {r for one in forward for r in one.results}
        given = {SEED, *range(FIRST_INPUT, FIRST_INPUT + inputs)}
        # Arguments in any case, for a double backward.
        saved = {FIRST_INPUT + i for i, t in enumerate(arguments) if t is not None}
        fixed = set(self.outputs)
        for backward, instructions in zip(backwards.values(), behind):
            gradients = {r for r in backward.gradients if r is not None}
            prelude = taken_again(views, read(instructions, gradients))
            instructions[:] = needed([*prelude, *instructions], gradients)
            written = {r for one in instructions for r in one.results}
            saved |= {r for r in read(instructions, gradients) - written if r in made or r in given}
            fixed |= gradients
        self.differentiable = bool(backwards)
        forward = needed(forward, {*self.outputs, *(saved if backwards else ())})
        sections = [forward, *behind]
        same = without_views(sections, recorder.constants, fixed)
        saved, fixed = ({same.get(r, r) for r in registers} for registers in (saved, fixed))
        self.outputs = [same.get(r, r) for r in self.outputs]
        self.saved = sorted(self._in_pieces(sections, saved, fixed, recorder))  # registers that are kept for backward
        self._steps = [steps for _, steps in recorder.offsets]
        ahead_of_inputs = [STREAM, *(register for register, _ in recorder.offsets)]
        given_to = [*ahead_of_inputs, SEED, *range(FIRST_INPUT, FIRST_INPUT + inputs)]
        kept = self.saved if backwards else []
        self._forward = self._compiled(forward, recorder, given_to, [*kept, *self.outputs])
        self._backwards: dict[Any, Callable[..., tuple[Any, ...]]] = {}
        for (pattern, backward), instructions in zip(backwards.items(), behind):
            results = tuple(None if r is None else same.get(r, r) for r in backward.gradients)
            given_to = [*ahead_of_inputs, *self.saved, *(r for r in backward.arriving if r is not None)]
            self._backwards[pattern] = self._compiled(instructions, recorder, given_to, results)

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

    def _compiled(
        self, instructions: list[Instruction], recorder: Recorder, given: list[int], wanted: Sequence[int | None]
    ) -> Callable[..., tuple[Any, ...]]:
        return compiled(addressed(instructions, recorder.addresses), recorder.constants, given, wanted)

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
            for dy, strides in zip(arriving, self.strides):
                if dy is not None:
                    fits = dy.stride() == strides and dy.data_ptr() % ALIGNED == 0
                    found.append(dy if fits else dy.new_empty_strided(dy.shape, strides).copy_(dy))
            return backward(*self._ahead(offset), *saved, *found)

    def _ahead(self, offset: int) -> list[int | None]:
        """The stream, and the seed's offsets."""
        return [launch.current_stream() if self._launches else None, *[offset + steps for steps in self._steps]]


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
    if not _lock.acquire(blocking=False):  # to wait could be for ever: the other may need this thread for its backward
        return None
    try:
        grad = torch.is_grad_enabled()
        given = [t if t is None or not grad else t.detach().requires_grad_(t.requires_grad) for t in arguments]
        recorder = Recorder([*given, *parameters], seed)
        with _casts_again(), given_seed(seed, FIRST_OFFSET) as scope, recorder.recording():
            outputs = list(function(*given))
            ahead = len(recorder.instructions)
            leaves = [*given, *parameters]
            backwards: dict[Any, Backward] = {}
            for pattern in _patterns([t.requires_grad for t in outputs]):
                backwards[pattern] = _record_backward(recorder, outputs, leaves, pattern)
        return HostProgram(recorder, given, len(leaves), outputs, ahead, backwards, scope.offset + 1 - FIRST_OFFSET)
    finally:
        _lock.release()


@contextmanager
def _casts_again() -> Iterator[None]:
    """Inside the block autocast casts each time, so that it is seen to."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def _patterns(wanted: list[bool]) -> list[tuple[bool, ...]]:
    """For which outputs gradients may arrive: all, and where there are two, either alone."""
    if any(wanted) != all(wanted):
        raise Unrepeatable("a gradient can arrive for some of the outputs only")
    if not all(wanted):
        return []
    return [(True,)] if len(wanted) == 1 else [(True, True), (True, False), (False, True)]


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
        ctx.program, ctx.again, ctx.offset, ctx.parameters = program, again, offset, inputs[count:]
        ctx.versions = _versions(ctx.parameters)  # not all are saved
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: Any, *arriving: Tensor | None) -> Any:
        if all(dy is None for dy in arriving):
            return (None,) * len(ctx.needs_input_grad)
        program, saved = ctx.program, ctx.saved_tensors
        if not torch.is_grad_enabled():
            return (None, None, None, None, None, *program.backward(ctx.offset, saved, arriving))
        values = dict(zip(program.saved, saved))
        arguments = [values.get(FIRST_INPUT + i) for i in range(program.inputs - len(ctx.parameters))]
        if _versions(ctx.parameters) != ctx.versions:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: a parameter of "
                "a layer, which a backward with create_graph=True computes again; change parameters behind that backward"
            )
        inputs, wanted = (*arguments, *ctx.parameters), ctx.needs_input_grad[5:]
        again = partial(ctx.again, values.get(SEED), ctx.offset)
        return (None, None, None, None, None, *_differentiable(again, inputs, arriving, wanted))


def _versions(tensors: Sequence[Tensor | None]) -> list[int | None]:
    return [None if t is None or t.is_inference() else t._version for t in tensors]


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
        sources = [t for t, want in zip(fresh, wanted) if want and t is not None]
        ys, dys = zip(*pairs)
        found = iter(torch.autograd.grad(ys, sources, dys, create_graph=True, allow_unused=True))
    return [next(found) if want else None for want in wanted]
