"""Chooses an implementation for each call of an op, and explains the choice.

An `Op` holds an ordered tuple of `Implementation`s. Each declares what it can do as data (devices, dtypes, …) and answers
`why_not(call)`: None means yes, a string is the reason against it. `auto` takes the first one with no reason against it.
Decisions are cached per signature, which lists everything that a decision reads.

`use_backend` and the environment variable DETR_FAST_BACKEND ask for implementations by name. Like
`torch.nn.attention.sdpa_kernel` they hold for the whole process, hence also in autograd's threads, where activation
checkpointing recomputes. What was asked for by name is never replaced silently: `BackendError` says why it can't run.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor

from detr_fast import native
from detr_fast.implementation import INTERPRETING as INTERPRETING
from detr_fast.implementation import NEVER, PARTS
from detr_fast.implementation import Call as Call
from detr_fast.implementation import Implementation as Implementation
from detr_fast.implementation import TritonImplementation as TritonImplementation
from detr_fast.kernels import repeat
from detr_fast.situation import PLAIN_TENSORS, _thread, capturing, in_layer, situation
from detr_fast.situation import Situation as Situation
from detr_fast.situation import architecture as architecture
from detr_fast.situation import tensor_type as tensor_type

MAX_DECISIONS = 4096
ISSUES = "https://github.com/detr-fast/detr-fast/issues"


class BackendError(RuntimeError):
    """An implementation was asked for by name and can't take the call; the message says why."""


class _Decision(NamedTuple):
    implementation: Implementation
    reasons: dict[str, str]
    note: str | None
    shapes: str
    lasting: bool = True  # False: for this call alone


# ---------------------------------------------------------------------------------------------------------------------
# What was asked for by name. `intervening` is read on every call of a CPU tensor: False means "leave at once".

_ops: dict[str, Op] = {}
_requests: list[dict[str, str]] = []  # entered and not yet left, oldest first; "*" stands for all ops
_requested: dict[str, str] = {}  # the same, merged: later ones win
_recorders: list[Callable[[str, _Decision], None]] = []
_lock = threading.RLock()
if hasattr(
    os, "register_at_fork"
):  # another thread may hold it, while it compiles, when a data loader's worker is forked
    os.register_at_fork(after_in_child=_lock._at_fork_reinit)  # type: ignore[attr-defined]
intervening = False
_numbers: dict[frozenset[tuple[str, str]], int] = {frozenset(): 0}


def _refresh() -> None:
    global _requested, intervening
    merged: dict[str, str] = {}
    for request in _requests:
        if "*" in request:
            merged.clear()  # an inner use_backend("…") for all ops outweighs outer ones for single ops
        merged.update(request)
    _requested = merged
    if (host := native.host) is not None:
        host.set_requests(_number_of(merged))
    intervening = bool(_recorders) or any(name != "auto" for name in merged.values())


def _number_of(requested: Mapping[str, str]) -> int:
    """One for each set of requests, which decisions in C++ are told apart by."""
    return _numbers.setdefault(frozenset(requested.items()), len(_numbers))


def _check_request(request: Mapping[str, str]) -> None:
    for op, name in request.items():
        if op != "*" and op not in _ops:
            raise ValueError(f"there is no op {op!r}; the ops are {', '.join(sorted(_ops))}")
        asked = _ops.values() if op == "*" else (_ops[op],)
        if name != "auto" and not any(name in one.names for one in asked):
            known = frozenset[str]().union(*(one.names for one in asked))
            what = f"no op has an implementation {name!r}" if op == "*" else f"{op} has no implementation {name!r}"
            raise ValueError(f"{what}; choose from {', '.join(sorted(known))} or auto")


@contextmanager
def use_backend(backend: str | None = None, /, **by_op: str) -> Iterator[None]:
    """Ask for implementations by name, for the whole process, until the block is left (also works as a decorator).

    `use_backend("triton")` binds every op that has such an implementation; `use_backend(attention="triton")` one op;
    "auto" gives the choice back to the dispatcher. A call that the named implementation can't take raises
    `BackendError` with the reason. Raises ValueError for an unknown op or implementation.
    """
    request = dict(by_op) if backend is None else {"*": backend, **by_op}
    _check_request(request)
    with _lock:
        _requests.append(request)
        _refresh()
    try:
        yield
    finally:
        with _lock:
            # by identity: blocks of two threads need not be left in the reverse order of entry
            _requests[:] = [r for r in _requests if r is not request]
            _refresh()


def read_environment(text: str | None = None) -> None:
    """Apply DETR_FAST_BACKEND: `triton`, or `attention=triton,layer_norm=eager`. Called once all ops are known."""
    text = os.environ.get("DETR_FAST_BACKEND", "") if text is None else text
    request: dict[str, str] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        op, _, name = part.rpartition("=")
        request[op.strip() or "*"] = name.strip()
    if not request:
        return
    try:
        _check_request(request)
    except ValueError as error:
        raise ValueError(f"DETR_FAST_BACKEND={text!r}: {error}") from None
    with _lock:
        _requests.insert(0, request)
        _refresh()


@contextmanager
def recording(recorder: Callable[[str, _Decision], None]) -> Iterator[None]:
    """Tell `recorder` of every decision (op name, decision) while the block runs."""
    with _lock:
        _recorders.append(recorder)
        _refresh()
    try:
        yield
    finally:
        with _lock:
            _recorders.remove(recorder)
            _refresh()


# ---------------------------------------------------------------------------------------------------------------------


class Op:
    """A named operation with an ordered tuple of implementations; the last one takes every call.

    `signature(*args)` gives a hashable tuple of all that the call's decision reads from its arguments, and
    `describe(*args, situation=…)` the `Call` that implementations are asked about. `work(*args)`, where given, is at least
    the size that kernels' advice goes by: a call below their `least` takes `small` before a key is built. `kind(*args)`,
    where given, tells apart calls whose `least` differs.
    """

    def __init__(
        self,
        name: str,
        *,
        signature: Callable[..., tuple[Any, ...]],
        describe: Callable[..., Call],
        implementations: Sequence[Implementation],
        work: Callable[..., int] | None = None,
        kind: Callable[..., tuple[Any, ...]] | None = None,
        small: Implementation | None = None,
    ) -> None:
        self.name = name
        self.implementations = tuple(implementations)
        self.names = frozenset(i.name for i in self.implementations)
        self._work, self._kind, self._small = work, kind, small or self.implementations[-1]
        self._signature = signature
        self._describe = describe
        self._decisions: dict[tuple[Any, ...], _Decision] = {}
        self._broken: dict[tuple[str, Any], str] = {}
        self._least: dict[tuple[torch.device, tuple[Any, ...]], int] = {}
        # What was chosen for calls that are made again, found in C++, where that is in use (see `native`).
        self._known, self._known_kernels = _tables(native.host)
        _ops[name] = self

    def __call__(self, *args: Any) -> Any:
        # A compiler is not to read the table: it would be bound to what there is, and that comes from another thread.
        known = None if torch.compiler.is_dynamo_compiling() else self._known
        if known is not None:
            found = known.get(_thread.in_layer, *args)
            if found is not None:
                return found.run(*args)
        return self.choose(*args).run(*args)

    def choose(self, *args: Any) -> Implementation:
        """The implementation for a call with these arguments. Raises BackendError (see `use_backend`)."""
        known = None if torch.compiler.is_dynamo_compiling() else self._known
        if known is None:
            return self._choose(args)
        return _found(known, self._choose, args)

    def _choose(self, args: tuple[Any, ...]) -> Implementation:
        if self._leaves(args):
            return self._small
        decision = self._decision(*args)
        if _recorders:
            self._record(decision)
        return decision.implementation

    def kernel(self, *args: Any) -> Implementation | None:
        """The Triton kernel chosen for what could also run in parts, or None where the parts are to run one by one.

        Asking for all ops by name asks for the parts' kernels where this op has none; asking for this op insists on it.
        """
        known = None if torch.compiler.is_dynamo_compiling() else self._known_kernels
        if known is None:
            return self._kernel(args)
        found = _found(known, lambda args: self._kernel(args) or PARTS, args)
        return None if found is PARTS else found

    def _kernel(self, args: tuple[Any, ...]) -> Implementation | None:
        if self._leaves(args):
            return None
        try:
            decision = self._decision(*args)
        except BackendError:
            if self.name in _requested:
                raise
            return None
        if isinstance(decision.implementation, TritonImplementation):
            self._record(decision)
            return decision.implementation
        self._record(decision._replace(implementation=PARTS))
        return None

    def _leaves(self, args: tuple[Any, ...]) -> bool:
        if intervening or self._work is None or torch.compiler.is_compiling():  # where sizes may be symbols
            return False
        return self.is_small(self._work(*args), args[0].device, self._kind(*args) if self._kind else ())

    def is_small(self, size: int, device: torch.device, kind: tuple[Any, ...] = ()) -> bool:
        """Whether every kernel's advice is surely against a call of this size: such calls must cost next to nothing.

        Not to be asked under a compiler, where sizes may be symbols.
        """
        if intervening or in_layer():
            return False
        least = self._least.get((device, kind))
        if least is None:
            if device.type == "cuda":
                native.wanted()
            kernels = [i for i in self.implementations if isinstance(i, TritonImplementation)]
            answers = (i.least(architecture(device), *kind) if device.type == "cuda" else NEVER for i in kernels)
            least = self._least[device, kind] = min(answers, default=NEVER)
        return size < least and not capturing(device.type)

    def _record(self, decision: _Decision) -> None:
        if not torch.compiler.is_compiling():
            for recorder in tuple(_recorders):  # another thread's may leave meanwhile
                recorder(self.name, decision)

    def _decision(self, *args: Any) -> _Decision:
        device_type = args[0].device.type
        now = situation(device_type)
        requested = self.requested if _requested else None
        if now.regime == "compiled":  # traced by Dynamo: no cache, no compilation, only the reasons
            return self._decide(self._describe(*args, situation=now), requested, prepare=False)
        key = (self._signature(*args), now, requested)
        decision = self._decisions.get(key)
        if decision is None:
            with _lock:
                call = self._describe(*args, situation=now)
                decision = self._decide(call, requested, prepare=call.tensor_type is not FakeTensor)
                if len(self._decisions) >= MAX_DECISIONS:  # shapes that vary for ever must not fill the memory
                    self._decisions.clear()
                if decision.lasting:
                    self._decisions[key] = decision
        return decision

    def forget(self) -> None:
        """Drop all cached decisions, also the memory of kernels that failed to compile."""
        self._decisions.clear()
        self._broken.clear()
        self._least.clear()
        if self._known is not None:
            self._known.clear()
            self._known_kernels.clear()

    def _switch(self, host: Any) -> None:
        self.forget()  # what was measured holds with or without it
        self._known, self._known_kernels = _tables(host)

    @property
    def requested(self) -> str | None:
        """The implementation that `use_backend` asks for. Asking for all ops binds only those that have it."""
        requested = _requested  # once: another thread may enter use_backend at any time
        if self.name in requested:
            name = requested[self.name]
            return None if name == "auto" else name
        name = requested.get("*", "auto")
        return name if name in self.names else None

    def _decide(self, call: Call, requested: str | None, *, prepare: bool) -> _Decision:
        reasons: dict[str, str] = {}
        failed = False  # a kernel that would have been chosen does not compile
        lasting = True
        for implementation in self.implementations:
            name = implementation.name
            if requested is not None and name != requested:
                reasons[name] = f"{requested} was asked for by name"
                continue
            reason = _why_not(implementation, call, requested is not None)
            if reason is None and failed:
                reason = implementation.why_not_instead(call)
            if reason is None and self._broken:
                reason = self._broken.get((name, implementation.compiled_key(call)))
                failed = failed or reason is not None
            if reason is None and requested is None:
                reason = implementation.advice(call)
            if reason is None and prepare:
                reason, known = self._prepare(implementation, call, by_name=requested is not None)
                failed = failed or reason is not None
                lasting = lasting and known
            if reason is None:
                # Under a compiler nothing is recorded, and a size that is written down is no symbol any more.
                if call.situation.regime == "compiled":
                    return _Decision(implementation, reasons, None, "")
                return _Decision(implementation, reasons, implementation.note(call), call.shapes(), lasting)
            reasons[name] = reason
        if requested is not None:
            raise BackendError(
                f"{self.name} was asked to run on {requested!r} but can't: {reasons[requested]}. "
                f"Leave the choice to the dispatcher with use_backend({self.name}='auto')."
            )
        raise BackendError(f"no implementation of {self.name} takes this call: {_listed(reasons)}")

    def _prepare(self, implementation: Implementation, call: Call, *, by_name: bool) -> tuple[str | None, bool]:
        """Why the call can't be prepared for, and whether that is known of later calls, too."""
        try:
            implementation.prepare(call)
        except Exception as error:  # whatever the compiler throws: the user's step must go on
            lasting = not _is_out_of_memory(error)
            if not lasting and by_name:
                raise  # whoever takes a smaller batch then waits for this very error
            what = f"({type(error).__name__}: {_first_line(error)})"
            whole = ""
            if not lasting:
                whole, reason = " for this call", f"its kernel found no memory {what}"
                advice = "It is tried again at the next call."
                if (host := native.host) is not None:
                    host.forget()  # `_found` is not to keep this
            elif isinstance(error, OSError):
                reason = f"its kernel could not be compiled on this machine {what}"
                advice = "Triton writes to TRITON_CACHE_DIR, by default ~/.triton/cache, and to the folder for temporary files."
            else:
                reason = f"its kernel failed to compile {what}"
                advice = f"Please report it with this message at {ISSUES}."
            if lasting:
                self._broken[(implementation.name, implementation.compiled_key(call))] = reason
            if not by_name:
                warnings.warn(
                    f"detr-fast: {self.name} {call.shapes()} on {call.architecture or call.device_type} falls back from "
                    f"{implementation.name!r}{whole}: {reason}. Results stay right, only slower. {advice}",
                    RuntimeWarning,
                    stacklevel=4,
                )
            return reason, lasting
        return None, True


def _found(known: Any, decide: Callable[[tuple[Any, ...]], Implementation], args: tuple[Any, ...]) -> Implementation:
    """What is known for a call, or is decided now and known from then on, unless requests changed meanwhile."""
    found: Implementation | None = known.get(_thread.in_layer, *args)
    if found is None:
        host = native.host  # once: another thread may have it left out
        stamp = -1 if host is None else host.stamp()
        found = decide(args)
        known.put(found, stamp, _thread.in_layer, *args)
    return found


def _tables(host: Any) -> tuple[Any, Any]:
    return (None, None) if host is None else (host.Decisions(MAX_DECISIONS), host.Decisions(MAX_DECISIONS))


def _switch(host: Any) -> None:
    with _lock:
        if host is not None:
            host.set_requests(_number_of(_requested))
        for op in _ops.values():
            op._switch(host)


native.on_switch(_switch)


def forget_decisions() -> None:
    """Drop the cached decisions of all ops, as what they were based on has changed."""
    repeat.forget()
    if (host := native.host) is not None:
        host.forget()
    for op in _ops.values():
        op.forget()


def _why_not(implementation: Implementation, call: Call, by_name: bool) -> str | None:
    if implementation.plain:
        if call.situation.transform is not None:
            return call.situation.transform
        if call.tensor_type not in PLAIN_TENSORS:
            return f"tensor subclass {call.tensor_type.__name__} runs on PyTorch's own ops"
    if implementation.devices is not None and call.device_type not in implementation.devices:
        return f"tensors on {call.device_type}: it runs on {_listed(implementation.devices)}"
    if (
        isinstance(implementation, TritonImplementation)
        and (reason := implementation.refusal(call, by_name)) is not None
    ):
        return reason
    if implementation.dtypes is not None and call.dtype not in implementation.dtypes:
        return f"{str(call.dtype).removeprefix('torch.')} inputs: it takes {_listed(implementation.dtypes)}"
    return implementation.why_not(call)


def _listed(values: Iterable[Any]) -> str:
    if isinstance(values, Mapping):
        return "; ".join(f"{name}: {reason}" for name, reason in values.items())
    return ", ".join(sorted(str(value).removeprefix("torch.") for value in values))


def _is_out_of_memory(error: Exception) -> bool:
    """By its words, too: Triton's driver raises RuntimeError."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "out of memory" in str(error)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0][:300]
