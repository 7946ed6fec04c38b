"""Peers side by side on a GPU: `compare` checks all of them, then times them in turn. A wrong result is never timed.

Three times for each peer, in ms, medians over rounds in which all take their turn, so that a drifting clock hits all alike:

    wall    launched eagerly: of calls one after the other, with one wait at the end; the host's time where it is longer.
            Backward runs on the calling thread, but in a whole training step: a model wakes autograd's thread for the GPU
            once a step, not once an op, and that takes longer than a norm's forward and backward together
    graph   in a CUDA graph, as in a captured training step: of calls that one graph replays, between two events
    gpu     between two events, with an empty L2 cache, behind a pause in which the host queues the whole call

Of what `auto` takes it is also told which way the host's part goes ("host", see `benchmarks.host`), where that is C++ what
a call launched eagerly takes without it ("wall from Python"), and what one takes whose backward wakes that thread ("wall, woken").

Each case is one line of `measurements.jsonl` in the folder $DETR_FAST_RESULTS, written as soon as it is measured; without the
variable it is printed. DETR_FAST_CHECK_ONLY=1 compares results and times nothing, which also fills Triton's and
torch.compile's caches. Cases that come after $DETR_FAST_DEADLINE (in time.time()'s seconds) are skipped.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import host
from benchmarks.hardware import DEVICE, check, sized
from benchmarks.report import CAPTURABLE, HOW, IS_GRAPH
from detr_fast.capture import beside_the_default_stream, capture, set_aside

CHECK_ONLY = os.environ.get("DETR_FAST_CHECK_ONLY") == "1"
SECONDS = 0.08  # a peer, for each of its times
ROUNDS = sized((5, 20), (1, 1))
FLUSHED = sized(256 << 20, 1 << 10)  # bytes, five times an H100's L2 cache
CAPTURED = sized((8, 5e-3), (1, 0.0))  # calls in a graph, of those that take the host at most so many seconds
REPLAYED = 1e-3  # seconds of replays in a round, about
COARSE = 0.05  # beyond twice eager's error another library's result may be off, and is timed all the same
OURS = ("auto", "triton", "chunked", "padded", "uncaptured", "eager")  # and what begins so
Step = Callable[[], Sequence[Tensor]]


class NotInstalled(Exception):
    """A peer's library is not here; the message names it."""


@dataclass(frozen=True)
class Claim:
    """What is to show: `ours` takes at most 1/`times` of the time of the fastest of `over`, of those that ran.

    how: the times by which it is judged, each for itself.
    """

    text: str
    over: tuple[str, ...]
    times: float
    ours: str = "auto"
    how: tuple[str, ...] = ("wall", "graph")

    def judged(self, peers: Mapping[str, Mapping[str, Any]], told: Mapping[str, str] = HOW) -> list[dict[str, Any]]:
        """One record for each way in which peers were to be timed; told: what those are called."""
        return [
            {"claim": self.text, "wanted": self.times, "how": told[kind], "measured": self._ratio(peers, kind)}
            for kind in self.how
            if kind in told
        ]

    def _ratio(self, peers: Mapping[str, Mapping[str, Any]], kind: str) -> float | None:
        others = [peers[name][kind] for name in self.over if kind in peers.get(name, {})]
        own = peers.get(self.ours, {}).get(kind)
        return min(others) / own if others and own else None


def compare(
    case: str,
    peers: Mapping[str, Step],
    *,
    eager: Step | None = None,
    truth: Step | None = None,
    checks: Mapping[str, Step] | None = None,
    claims: Sequence[Claim] = (),
    moves: int = 0,
    images: int = 0,
    in_graphs: bool = True,
    is_graph: bool = False,
) -> None:
    """Check what each of `peers` computes against `eager`'s error from `truth`, time those that are right, and record it.

    A peer that is wrong or fails, be it in its hundredth call, does not stop the others. One of `OURS` is an error, raised at
    the end; another's is only recorded, since it may not take such a call. So it is with capturing, of which a peer that
    can't be captured keeps its other times. Another library's result may be less accurate than ours, which is then told beside its times.

    Args:
        eager, truth: PyTorch's own result, and the same in fp64; without them nothing is checked.
        checks: what is checked in place of a peer's timed call, say without dropout.
        claims: judged of the times, and recorded with them.
        moves: bytes that must be read and written, for the record.
        images: how many a call computes, for the record.
        in_graphs: whether peers are timed in CUDA graphs, too.
        is_graph: whether ours, as it is run, is one, and calls are in no other: a whole training step.
    """
    if time.time() > float(os.environ.get("DETR_FAST_DEADLINE", "inf")):
        pytest.skip("out of time")
    outcome = Outcome(case, moves=moves, in_graphs=in_graphs and not is_graph, is_graph=is_graph, images=images)
    expected, exact = (None if call is None else [t.detach() for t in call()] for call in (eager, truth))

    def checked(name: str, call: Step) -> None:
        found = (checks or {}).get(name, call)()
        if expected is not None and exact is not None:
            try:
                check(name, found, expected, exact)
            except AssertionError as error:
                if name.startswith(OURS):
                    raise
                check(name, found, expected, exact, COARSE)
                outcome.coarse[name] = first_line(error)
        del found
        if checks:
            call()
        synchronize()

    with beside_the_default_stream():
        ready = {name: call for name, call in peers.items() if outcome.attempt(name, partial(checked, name, call))}
        expected = exact = None  # their memory
        if not CHECK_ONLY:
            outcome.peers |= timed(ready, outcome)
    if not CHECK_ONLY:
        outcome.record(claims)
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    if outcome.failures:
        name, first = next(iter(outcome.failures.items()))
        raise AssertionError(f"{', '.join(outcome.failures)} failed; {name}: {first_line(first)}") from first


class Outcome:
    """What is known of a case's peers: times, or why there are none."""

    def __init__(self, case: str, *, in_graphs: bool, **told: Any) -> None:
        self.case, self.in_graphs = case, in_graphs
        self.told = {"case": case, "in_graphs": in_graphs} | told
        self.peers: dict[str, dict[str, Any]] = {}
        self.coarse: dict[str, str] = {}  # peers that are timed although they are less accurate than ours may be
        self.failures: dict[str, BaseException] = {}  # of `OURS`

    def attempt(self, name: str, run: Callable[[], object]) -> bool:
        """Whether `run` goes through; if not, the reason is told of the peer."""
        try:
            run()
            return True
        except NotInstalled as absent:
            self.peers[name] = {"absent": str(absent)}
        except torch.OutOfMemoryError as error:
            if CHECK_ONLY:  # beside other processes
                pytest.skip(f"out of memory: {first_line(error)}")
            self.peers[name] = {"refused": first_line(error)}
        except Exception as error:  # whatever a peer throws, the others go on
            wrong = name.startswith(OURS)
            self.peers[name] = {"failed" if wrong else "refused": in_short(error)}
            if wrong:
                self.failures[name] = error
            self._go_on(name, error)
        return False

    def capture(self, name: str, timer: Timer) -> None:
        """Let it capture its call; where that fails the reason is told of the peer, which goes on without."""
        try:
            timer.capture()
        except Exception as error:  # as above
            timer.uncaptured = first_line(error)
            if name.startswith(CAPTURABLE) and not isinstance(error, torch.OutOfMemoryError):
                self.failures[name] = error
            self._go_on(name, error)

    def _go_on(self, name: str, error: BaseException) -> None:
        try:
            synchronize()
        except RuntimeError as broken:  # CUDA, for this whole process
            if not CHECK_ONLY:
                self.record(())
            raise AssertionError(f"{name} broke CUDA: {first_line(error)}") from broken

    def record(self, claims: Iterable[Claim]) -> None:
        for name, why in self.coarse.items():
            if name in self.peers:
                self.peers[name]["coarse"] = why
        told = {"wall": IS_GRAPH if self.told["is_graph"] else HOW["wall"]} if not self.in_graphs else HOW
        judged = [one for claim in claims for one in claim.judged(self.peers, told)]
        record(self.told | {"peers": self.peers, "claims": judged})


def timed(calls: Mapping[str, Step], outcome: Outcome) -> dict[str, dict[str, Any]]:
    """Of each call: "wall", "graph" and "gpu" ms, their quartiles' distance as a share, and the peak of memory in MiB.

    A call that fails in between is out, by `outcome`.
    """
    timers = {name: Timer(call, whole_step=bool(outcome.told["is_graph"])) for name, call in calls.items()}

    def in_turn(part: Callable[[Timer], None], first: int = 0) -> None:
        order = list(timers.items())
        first %= max(1, len(order))
        for name, timer in order[first:] + order[:first]:
            if not outcome.attempt(name, partial(part, timer)):
                del timers[name]

    in_turn(Timer.warm_up)
    if outcome.in_graphs:
        for name, timer in timers.items():
            outcome.capture(name, timer)
    once = sum(timer.once for timer in timers.values())
    rounds = int(min(max(SECONDS * len(timers) / max(once, 1e-9), ROUNDS[0]), ROUNDS[1]))
    flushed = torch.empty(FLUSHED, dtype=torch.int8, device=DEVICE)
    for first in range(rounds):  # another one each time: what comes first, with cold caches, takes longer
        in_turn(Timer.time_wall, first)
        in_turn(Timer.time_graph, first)
        in_turn(lambda timer: timer.time_gpu(flushed), first)
    for name, timer in list(timers.items()):
        if name == "auto" and outcome.attempt(name, timer.look_at_the_host):
            if timer.host == "C++":
                outcome.attempt(name, timer.time_wall_from_python)
            if not timer.whole_step:
                outcome.attempt(name, timer.time_wall_woken)
    return {name: timer.told() | {"rounds": rounds} for name, timer in timers.items()}


class Timer:
    """One call's times: `walls`, `graphs` and `gpus` in ms; `issue`, the host's for one call, and `once`, all of one, in s.

    whole_step: whether a call is one of a training, whose backward wakes autograd's thread.
    """

    def __init__(self, call: Step, *, whole_step: bool = False) -> None:
        self.call, self.whole_step = call, whole_step
        self.issue = self.once = 0.0
        self.memory = 0
        self.graph: Graph | None = None
        self.uncaptured: str | None = None  # why
        self.host: str | None = None
        self.walls_from_python: list[float] = []
        self.walls_woken: list[float] = []
        self.walls: list[float] = []
        self.graphs: list[float] = []
        self.gpus: list[float] = []

    def warm_up(self) -> None:
        for _ in range(sized(3, 0)):
            self.call()
        synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        begun = time.perf_counter()
        with torch.autograd.set_multithreading_enabled(self.whole_step):
            self.call()
        self.issue = time.perf_counter() - begun
        synchronize()
        self.once = max(time.perf_counter() - begun, 1e-6)
        self.memory = torch.cuda.max_memory_allocated() - before

    def capture(self) -> None:
        calls, longest = CAPTURED
        self.graph = Graph(self.call, calls if self.once <= longest else 1)

    def time_wall(self) -> None:
        self.walls.append(self._wall())

    def _wall(self, *, wakes: bool | None = None) -> float:
        with torch.autograd.set_multithreading_enabled(self.whole_step if wakes is None else wakes):
            return _wall(self.call, sized(max(1, min(20, round(2e-3 / self.once))), 1))

    def look_at_the_host(self) -> None:
        self.host = host.way(self.call)

    def time_wall_from_python(self) -> None:
        with host.from_python():
            for _ in range(sized(3, 1)):
                self.call()
            self.walls_from_python = [self._wall() for _ in range(ROUNDS[0])]

    def time_wall_woken(self) -> None:
        self.walls_woken = [self._wall(wakes=True) for _ in range(ROUNDS[0])]

    def time_graph(self) -> None:
        if self.graph is not None:
            self.graphs.append(self.graph.time())

    def time_gpu(self, flushed: Tensor) -> None:
        with torch.autograd.set_multithreading_enabled(self.whole_step):
            self.gpus.append(_gpu(self.call, self.issue, flushed))

    def told(self) -> dict[str, Any]:
        times = {"wall": self.walls, "graph": self.graphs, "gpu": self.gpus}
        shown = times | {"wall from Python": self.walls_from_python, "wall, woken": self.walls_woken}
        found: dict[str, Any] = {kind: statistics.median(values) for kind, values in shown.items() if values}
        if self.host is not None:
            found["host"] = self.host
        if self.uncaptured is not None:
            found["uncaptured"] = self.uncaptured
        return found | {"spread": max(map(_spread, times.values())), "MiB": self.memory / 2**20}


class Graph:
    """`calls` calls in one CUDA graph, captured as a training step is: `auto` chooses as it does there.

    Raises what the call raises, and RuntimeError where it waits for the host.
    """

    def __init__(self, call: Step, calls: int) -> None:
        self.calls, self.replays = calls, 1
        self.graph = torch.cuda.CUDAGraph()
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        torch.cuda.set_sync_debug_mode("error")  # told before, as a capture that fails leaves much behind
        try:
            with torch.cuda.stream(stream):
                for _ in range(sized(2, 0)):
                    call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        current.wait_stream(stream)
        synchronize()
        # Of eight updates, and casts back and forth, of all of DETR.
        with set_aside(DEVICE, optimizer_step=1 << 20, cast_together=1 << 21), capture(self.graph):
            for _ in range(calls):
                call()

    def time(self) -> float:
        """ms of a call, of as many replays as take about `REPLAYED`; the first time of one."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(100_000)  # cycles, some 50 µs, in which the host queues the first replay
        start.record()
        for _ in range(self.replays):
            self.graph.replay()
        end.record()
        synchronize()
        each = float(start.elapsed_time(end)) / self.replays
        self.replays = sized(max(1, min(50, round(REPLAYED * 1e3 / max(each, 1e-3)))), 1)
        return each / self.calls


def _wall(call: Step, repeats: int) -> float:
    synchronize()
    begun = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronize()
    return (time.perf_counter() - begun) / repeats * 1e3


def _gpu(call: Step, issue: float, flushed: Tensor) -> float:
    """issue: the host's seconds for one call, in which the GPU is kept busy before the first event."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flushed.zero_()
    torch.cuda._sleep(int(min(1.5 * issue + 5e-5, 0.3) * 2e9))  # in cycles, of at most 2 GHz
    start.record()
    call()
    end.record()
    synchronize()
    return float(start.elapsed_time(end))


def _spread(times: list[float]) -> float:
    if len(times) < 4:
        return 0.0
    lower, middle, upper = statistics.quantiles(times, n=4)
    return (upper - lower) / middle


def record(entry: Mapping[str, Any]) -> None:
    """Append a line to the results, or print it."""
    line = json.dumps(entry)
    folder = os.environ.get("DETR_FAST_RESULTS")
    if folder is None:
        print(f"\n{line}")
        return
    with (Path(folder) / "measurements.jsonl").open("a") as file:
        file.write(line + "\n")


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compile` for the shapes of one case, which `compare` forgets afterwards: else a function that was compiled too
    often runs eagerly from then on, without a word."""
    return torch.compile(function, dynamic=False)


def synchronize() -> None:
    torch.cuda.synchronize()


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else 'no message'}"


def in_short(error: BaseException) -> str:
    """The message in one line, for the reasons of some libraries come last."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:800] or 'no message'}"
