"""What a program in C++ has to show before it is used on a GPU: that it gives what Python gives, to the bit.

C++ launches with arguments that it lays out itself, on a stream and in a context that it finds itself, on memory that it
knows by address. Should Triton, CUDA's driver or PyTorch differ somewhere from what it takes for granted, results would be wrong and nothing
would say so. So each new program runs beside Python's path first, on copies of the call's tensors, which lie elsewhere and hold other values, at
other offsets of the seed; once a device also on a stream of its own. Kernels are the call's own, so nothing is compiled for this.

That happens in the thread whose call is recorded, at a moment when recording works, too: not while its stream is captured, not where
somebody looks, and not in a backward. A thread in the background would allocate and wait while others may capture a CUDA graph, which by default
(`cudaStreamCaptureModeGlobal`) spoils their capture; so do autograd's own, which have no part in it. It waits for the GPU, and ends when it has cost a device SECONDS: from then on
only programs of a new kind are checked.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from detr_fast import native
from detr_fast.dispatch import ISSUES
from detr_fast.kernels import driver
from detr_fast.ops.host_program import ALIGNED, Busy, HostProgram, casts_again
from detr_fast.ops.host_recorder import size_of

# (offset, inputs) -> outputs, with their graph.
Way = Callable[[int, Sequence[Tensor | None]], Sequence[Tensor]]

CHECKED = frozenset({"cuda"})  # kinds of devices
SECONDS = 1.0
ROUNDS = ((15 / 16, 3), (7 / 8, 17))  # by what floating-point values are multiplied, and an offset
REPEATS = 4  # of Python's way, where results differ: its own may, as those of atomics
VARYING = 2.0**-6  # how much those may differ, of the largest
PAUSE = 20_000_000  # cycles of the GPU's, some ten milliseconds: a slow host queues a layer in less


@dataclass
class _Trust:
    """What was found to be right on a device, and what it has cost."""

    kinds: set[tuple[str, bool]] = field(default_factory=set)
    seconds: float = 0.0


_trusted: dict[torch.device, _Trust] = {}
_checking = threading.Lock()  # one at a time: what a wait is taken for holds for all threads


def _possible() -> bool:
    """Whether something can be checked here: not in a backward, nor where `_same` can't be put on what is saved."""
    hooks: bool = torch._C._autograd._saved_tensors_hooks_is_enabled()  # type: ignore[attr-defined]
    return hooks and torch._C._current_graph_task_id() == -1


def expect(device: torch.device) -> None:
    """Raise Busy where no program on the device could be used if it was recorded now."""
    if device.type in CHECKED and device not in _trusted and not _possible():
        raise Busy


def passes(name: str, program: HostProgram, python: Way, compiled: Way, inputs: Sequence[Tensor | None]) -> bool:
    """Whether the program of an op or a layer, made of a call on these inputs, may be used in C++; else that is left out, with a
    warning. Raises Busy where it can't be told now, and torch.OutOfMemoryError."""
    device = program.device
    if device.type not in CHECKED:
        return True
    expect(device)
    known, kind = _trusted.get(device), (name, bool(program.backwards))
    if known is not None and (not _possible() or (kind in known.kinds and known.seconds > SECONDS)):
        return True
    if not _checking.acquire(blocking=False):
        raise Busy
    start = time.perf_counter()
    try:
        here = torch.autograd.set_multithreading_enabled(False)  # a thread of autograd's is not relaxed
        with here, driver.relaxed_captures(), _waiting_allowed(device), casts_again():
            wrong = _difference(program, python, compiled, inputs, elsewhere=known is None)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of a call that Python has just recorded
        wrong = f"fails ({type(error).__name__}: {error})"
    finally:
        _checking.release()
    if wrong is not None:
        _leave_out(device, f"{name} {wrong}")
        return False
    known = _trusted.setdefault(device, _Trust())
    known.kinds.add(kind)
    known.seconds += time.perf_counter() - start
    return True


def _leave_out(device: torch.device, wrong: str) -> None:
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"a {device.type}"
    native.leave_out(f"on {where}, {wrong}")
    warnings.warn(
        f"detr-fast: the host's part in C++ is not used, as on {where} its {wrong}. Everything runs from Python instead: results are right, "
        f"and the host takes two to three times as long. Please report this message at {ISSUES}, with what "
        "`python -m torch.utils.collect_env` prints. DETR_FAST_NATIVE=0 leaves that part out from the start, should CUDA fail from now on.",
        RuntimeWarning,
        stacklevel=2,
    )


def _difference(
    program: HostProgram, python: Way, compiled: Way, inputs: Sequence[Tensor | None], elsewhere: bool
) -> str | None:
    """What is wrong with the program, in words. elsewhere: the last round is on another stream."""
    pattern = next(iter(program.backwards), None)
    draws = bool(program.recorder.offsets)

    def ahead() -> None:
        _results(compiled, 0, _copies(inputs, 1.0, draws), pattern)

    for scale, offset in ROUNDS:
        moving = elsewhere and (scale, offset) == ROUNDS[-1]
        with _behind_a_pause(program.device, ahead) if moving else nullcontext():
            given = _copies(inputs, scale, draws)
            found = _results(compiled, offset, given, pattern)

            def expected(given: Sequence[Tensor | None] = given, offset: int = offset) -> list[Tensor | None]:
                with torch.autograd.graph.saved_tensors_hooks(_same, _same):  # which C++ leaves to Python
                    return _results(python, offset, given, pattern)

            wrong = _differing(found, expected)
            if wrong is not None:
                return wrong + (" on a stream that is not the default one" if moving else "")
    return None


def _results(
    way: Way, offset: int, given: Sequence[Tensor | None], pattern: Sequence[bool] | None
) -> list[Tensor | None]:
    """Outputs and, with a pattern, gradients of the inputs: of which outputs it tells."""
    outputs = list(way(offset, given))
    if pattern is None:
        return [*outputs]
    roots = [y for y, arrives in zip(outputs, pattern) if arrives]
    leaves = [t for t in given if t is not None and t.requires_grad]
    with torch.autocast(roots[0].device.type, enabled=False):  # a backward is outside, whatever its forward was
        gradients = torch.autograd.grad(roots, leaves, [y.detach().cos() for y in roots], allow_unused=True)
    return [*(y.detach() for y in outputs), *gradients]


def _differing(found: Sequence[Tensor | None], expected: Callable[[], Sequence[Tensor | None]]) -> str | None:
    """The first result that is not as expected. One that Python's own way varies, too, may be off by VARYING."""
    right = expected()
    alike = _alike(found, right)
    if all(alike):
        return None
    again = [_alike(expected(), right) for _ in range(REPEATS)]
    for index, (one, other, same) in enumerate(zip(found, right, alike, strict=True)):
        varies = not all(repeat[index] for repeat in again)
        if not same and not (varies and one is not None and other is not None and _close(one, other)):
            return f"gives another result {index + 1} of {len(found)} (outputs, then gradients) than Python's path"
    return None


def _alike(found: Sequence[Tensor | None], right: Sequence[Tensor | None]) -> list[bool]:
    """Of each result, whether it is the same, NaN included. Waits for the device once."""
    same: list[bool | Tensor] = []
    for one, other in zip(found, right, strict=True):
        if one is None or other is None:
            same.append(one is other)
        elif (one.shape, one.dtype) != (other.shape, other.dtype):
            same.append(False)
        else:
            same.append(((one == other) | (one.isnan() & other.isnan())).all())
    told = [t for t in same if isinstance(t, Tensor)]
    values = iter(torch.stack(told).tolist() if told else [])
    return [bool(next(values)) if isinstance(t, Tensor) else t for t in same]


def _close(one: Tensor, other: Tensor) -> bool:
    far = (one.double() - other.double()).abs().max()
    return bool(far <= VARYING * other.double().abs().max())


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _copies(tensors: Sequence[Tensor | None], scale: float, draws: bool) -> list[Tensor | None]:
    """Leaves that lie and overlap as the tensors do, in other memory, with other floating-point values and, where something draws,
    another seed."""
    present = [(i, t) for i, t in enumerate(tensors) if t is not None]
    order = sorted(present, key=lambda one: one[1].data_ptr())
    copies: list[Tensor | None] = [None] * len(tensors)
    with torch.inference_mode(False), torch.no_grad():
        while order:
            together, end = [], order[0][1].data_ptr() + 1
            while order and order[0][1].data_ptr() < end:
                index, one = order.pop(0)
                together.append((index, one))
                end = max(end, one.data_ptr() + size_of(one))
            for (index, _), copy in zip(together, _copied([t for _, t in together], scale, draws)):
                copies[index] = copy
    return copies


def _copied(tensors: Sequence[Tensor], scale: float, draws: bool) -> list[Tensor]:
    """Copies of tensors that overlap one another, of which none starts ahead of the first."""
    one = tensors[0]
    first, shift = one.data_ptr(), one.data_ptr() % ALIGNED
    size = max(t.data_ptr() + size_of(t) for t in tensors) - first
    memory = torch.empty(shift + size, dtype=torch.uint8, device=one.device)
    bytes_of_all = torch.empty(0, dtype=torch.uint8, device=one.device)
    bytes_of_all.set_(one.untyped_storage(), one.storage_offset() * one.itemsize, (size,), (1,))
    memory[shift:].copy_(bytes_of_all)
    if size and all(t.dtype == one.dtype for t in tensors):
        values = memory[shift:].view(one.dtype)
        if one.is_floating_point():
            values.mul_(scale)
        elif draws and one.dtype == torch.int64 and values.numel() == 1:
            values.add_(1)
    copies = []
    for t in tensors:
        start = (shift + t.data_ptr() - first) // t.itemsize
        copy = torch.empty(0, dtype=t.dtype, device=t.device).set_(memory.untyped_storage(), start, t.shape, t.stride())
        copies.append(copy.requires_grad_(t.requires_grad))
    return copies


@contextmanager
def _behind_a_pause(device: torch.device, ahead: Callable[[], None]) -> Iterator[None]:
    """Inside the block another stream is the current one, which does nothing for a while: who works on the wrong stream is too early.

    ahead: does what the block will do. Then PyTorch has the memory for it, and need not ask CUDA, which may wait for the stream.
    """
    if device.type != "cuda":
        yield
        return
    outer = torch.cuda.current_stream(device)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(outer)
    try:
        with torch.cuda.stream(stream):
            ahead()
            torch.cuda._sleep(PAUSE)
            yield
    finally:
        outer.wait_stream(stream)  # what both have used is free again


@contextmanager
def _waiting_allowed(device: torch.device) -> Iterator[None]:
    """Inside the block `torch.cuda.set_sync_debug_mode` objects to no wait."""
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(0)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
