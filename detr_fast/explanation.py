"""`explain(model, *inputs)`: which implementation each module's ops run on, why, and what that costs."""

from __future__ import annotations

import statistics
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from detr_fast import dispatch, native
from detr_fast.testing.counters import Counts, counting

TIMED_RUNS = 5


def reasons_in_words(reasons: Mapping[str, str]) -> str:
    """Each reason once, behind all the implementations that it is against."""
    against: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        against.setdefault(reason, []).append(name)
    return "; ".join(f"not {', '.join(names)}: {reason}" for reason, names in against.items())


@dataclass(frozen=True)
class Record:
    """One dispatched call, explained."""

    module: str
    op: str
    shapes: str
    chosen: str
    reasons: Mapping[str, str]
    note: str | None = None
    calls: int = 1

    def __str__(self) -> str:
        against = reasons_in_words(self.reasons)
        text = f"{self.module or '(call)'}: {self.op} {self.shapes} -> {self.chosen}"
        text += f" ×{self.calls}" if self.calls > 1 else ""
        return text + (f" ({self.note})" if self.note else "") + (f"  [{against}]" if against else "")


@dataclass(frozen=True)
class MeasuredRecord(Record):
    """A record with what the op's module did from this choice on until its next one, over all its calls.

    launches: kernels and PyTorch operations. bytes_moved: of the tensors that they read and wrote. milliseconds: of the
    module's call, children included, on the GPU; None where it was not measured.
    """

    launches: int = 0
    bytes_moved: int = 0
    milliseconds: float | None = None

    def __str__(self) -> str:
        text, reasons, rest = super().__str__().partition("  [")
        if self.launches or self.bytes_moved:  # a block that left the work to its parts has none
            text += f", {self.launches} launch{'' if self.launches == 1 else 'es'}, {_readable(self.bytes_moved)}"
        text += "" if self.milliseconds is None else f", {self.milliseconds:.3f} ms"
        return text + reasons + rest


class Explanation(list[Record]):
    """The records of a run, one per module and op; prints as one line each.

    counts: launches and bytes of the whole run, where they were counted.
    """

    counts: Counts | None = None

    def __str__(self) -> str:
        if not self:
            return "no op of detr-fast was called (accelerate the model, or build it from detr_fast.nn)"
        lines = [str(record) for record in self]
        if self.counts is not None:
            total, moved = self.counts.total_launches, self.counts.bytes_moved
            here = [record for record in self if isinstance(record, MeasuredRecord)]
            rest = total - sum(record.launches for record in here)
            rest_moved = moved - sum(record.bytes_moved for record in here)
            lines.append(f"everything else: {rest} launches, {_readable(rest_moved)}")
            lines.append(f"in all: {total} launches, {_readable(moved)}")
        if torch.cuda.is_available() and any(record.chosen.startswith("triton") for record in self):
            lines.append(f"launched eagerly, the host's part in C++ is {native.status}")
        return "\n".join(lines)

    def __repr__(self) -> str:  # short: `explain` has printed the lines when a notebook shows this
        return f"<Explanation of {len(self)} records; print() shows them, as_dicts() gives plain data>"

    def as_dicts(self) -> list[dict[str, Any]]:
        """Plain data, ready for JSON."""
        return [{**vars(record), "reasons": dict(record.reasons)} for record in self]


class _Stack(threading.local):
    """The modules that a thread is in, and for each the record that what runs now belongs to."""

    def __init__(self) -> None:
        self.path: list[str] = []
        self.rows: list[int | None] = [None]


@contextmanager
def explaining(model: nn.Module | None = None, *, counted: bool = False) -> Iterator[Explanation]:
    """Collect one record per module and op while the block runs; module names are those inside `model`.

    counted: also count launches and bytes, which makes the run slower. What torch.compile has compiled runs eagerly.
    """
    names = {module: name for name, module in model.named_modules()} if model is not None else {}
    stack = _Stack()
    explanation = Explanation()
    index: dict[tuple[str, ...], int] = {}
    known = () if model is None else (*model.parameters(), *model.buffers())
    seen = [0, 0]
    own = threading.get_ident()

    def settle() -> None:
        """Give what was counted since the last time to the record that it belongs to."""
        counts = explanation.counts
        if counts is None:
            return
        new = [counts.total_launches, counts.bytes_moved]
        launches, moved = new[0] - seen[0], new[1] - seen[1]
        seen[:] = new
        row = stack.rows[-1]
        if row is not None and (launches or moved):
            old = explanation[row]
            assert isinstance(old, MeasuredRecord)
            explanation[row] = replace(old, launches=old.launches + launches, bytes_moved=old.bytes_moved + moved)

    def record(op: str, decision: Any) -> None:
        if not stack.path and threading.get_ident() != own:
            return  # in the middle of a module that another thread entered before: none of ours
        settle()
        module = stack.path[-1] if stack.path else ""
        kind = MeasuredRecord if counted else Record
        new = kind(module, op, decision.shapes, decision.implementation.name, decision.reasons, decision.note)
        key = (module, op, new.shapes, new.chosen)
        if key in index:
            old = explanation[index[key]]
            explanation[index[key]] = replace(old, calls=old.calls + 1)
        else:
            index[key] = len(explanation)
            explanation.append(new)
        stack.rows[-1] = index[key]

    def enter(module: nn.Module, args: Any) -> None:
        settle()
        stack.path.append(names.get(module, stack.path[-1] if stack.path else type(module).__name__))
        stack.rows.append(None)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        settle()
        if stack.path:  # a module that was entered before, in another thread, is none of ours
            stack.path.pop()
            stack.rows.pop()

    # Global hooks: a hook on a module itself would change what some layers do (torch's fast path, our fused layers).
    handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
    try:
        compiled = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
        with dispatch.recording(record), compiled, counting(known) if counted else nullcontext() as explanation.counts:
            yield explanation
            settle()
    finally:
        for handle in handles:
            handle.remove()


def explain(model: nn.Module | Callable[..., Any], /, *inputs: Any, quiet: bool = False, **kwargs: Any) -> Explanation:
    """Run `model(*inputs)` without gradients and print one line per module: op, shapes, choice, cost, reasons.

    The cost is launches and bytes, and on a GPU the module's time (the median of some more runs). The runs use the
    model's present mode (train or eval); random state and buffers are as before afterwards. Layers run part by part: in eval mode
    PyTorch's fused inference may take a torch.nn encoder layer in one operation where nobody looks. Where training matters, wrap
    a whole step in `explaining(model)` instead.

    Returns the records (a list). Raises what the model raises.
    """
    model = getattr(model, "_orig_mod", model)  # of torch.compile: the model itself
    module = model if isinstance(model, nn.Module) else None
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices), torch.no_grad(), _same_buffers(module):
        with explaining(module, counted=True) as explanation:
            model(*inputs, **kwargs)
        if module is not None and devices and any(p.is_cuda for p in module.parameters()):
            _add_times(explanation, measured_times(module, lambda: model(*inputs, **kwargs), TIMED_RUNS))
    if not quiet:
        print(explanation)
    return explanation


@contextmanager
def _same_buffers(model: nn.Module | None) -> Iterator[None]:
    """Undo what a run does to buffers, as to running statistics: to their values, and to which tensors they are."""
    modules = [] if model is None else list(model.modules())
    before = [(m._buffers, name, b, b.clone()) for m in modules for name, b in m._buffers.items() if b is not None]
    try:
        yield
    finally:
        for buffers, name, buffer, value in before:
            buffers[name] = buffer
            if not _is_fixed(buffer):
                buffer.copy_(value)


def _is_fixed(tensor: Tensor) -> bool:
    """Whether nothing can change the tensor in place here."""
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        return True
    if tensor.layout != torch.strided:
        return False
    return any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride()))


def measured_times(
    model: nn.Module, call: Callable[[], Any], runs: int, new_event: Callable[[], Any] | None = None
) -> dict[str, float]:
    """Milliseconds that each module takes in one run of `call`, children included, by name: the median over some runs.

    new_event: makes what torch.cuda.Event(enable_timing=True) makes, which is the default.
    """
    event = new_event or (lambda: torch.cuda.Event(enable_timing=True))
    names = {module: name for name, module in model.named_modules()}
    own = threading.get_ident()
    starts: list[Any] = []
    spans: list[tuple[str, Any, Any]] = []

    def now() -> Any:
        recorded = event()
        recorded.record()
        return recorded

    def enter(module: nn.Module, args: Any) -> None:
        if threading.get_ident() == own:
            starts.append(now())

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() == own:
            spans.append((names.get(module, ""), starts.pop(), now()))

    totals: dict[str, list[float]] = {}
    handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
    try:
        for _ in range(runs):
            spans.clear()
            call()
            spent: Counter[str] = Counter()
            for name, start, end in spans:
                end.synchronize()
                spent[name] += start.elapsed_time(end)
            for name, milliseconds in spent.items():
                totals.setdefault(name, []).append(milliseconds)
    finally:
        for handle in handles:
            handle.remove()
    return {name: statistics.median(values) for name, values in totals.items()}


def _add_times(explanation: Explanation, times: dict[str, float]) -> None:
    for row, record in enumerate(explanation):
        if isinstance(record, MeasuredRecord) and record.module in times:
            explanation[row] = replace(record, milliseconds=times[record.module])


def _readable(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"
