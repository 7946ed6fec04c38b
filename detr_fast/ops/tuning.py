"""Measures the user's machine and turns the timings into `Regime`s, which `auto` then reads.

Every size is first checked for a right result, then timed, the kernel and what `auto` would take in its place in turn, both
launched eagerly and, where both can be, replayed from a CUDA graph (in which launches are free). Without a GPU, what there
is to measure is from which size on assignment problems are worth several threads.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch

from detr_fast import dispatch, native
from detr_fast.capture import beside_the_default_stream, capture, set_aside
from detr_fast.dispatch import use_backend
from detr_fast.kernels import launch, overlap
from detr_fast.ops import linear_assignment, regimes
from detr_fast.ops.regimes import NEVER, Regime
from detr_fast.ops.tuning_cases import GROUPS
from detr_fast.ops.tuning_groups import Case, Group, Step

Progress = Callable[[str], None]
TOLERATED = 1.05  # times what there is besides; among sizes at which a kernel wins that is noise
_ROUNDS = 7
_CALLS = 8  # in a graph: the host takes longer for a replay than the GPU for a small call


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call at one size, of PyTorch (or the host) and of the kernel, and whether the latter was right."""

    size: int
    eager: float
    kernel: float
    right: bool = True


def interval(timings: Iterable[Timing]) -> tuple[int, int]:
    """The sizes from and up to which to take the kernel, (NEVER, NEVER) for none: the run of sizes that gains most.

    The gain is the sum of the factors' logarithms, so a slower end is never part of the run, and a size in the middle may
    be up to `TOLERATED` slower: what is measured there is noise as likely as not. A wrong result ends a run. A run that
    begins at the smallest size, or reaches the largest, holds for all that are smaller, or larger.
    """
    ordered = sorted(timings, key=lambda t: t.size)
    best, found = (0.0, 0), (NEVER, NEVER)
    for first in range(len(ordered)):
        gain = 0.0
        for last in range(first, len(ordered)):
            timing = ordered[last]
            if not timing.right or timing.kernel > TOLERATED * timing.eager:
                break
            gain += math.log(timing.eager / timing.kernel)
            if (gain, last + 1 - first) > best:
                best = gain, last + 1 - first
                found = ordered[first].size if first else 0, NEVER if last + 1 == len(ordered) else timing.size
    return found


def common(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    """The sizes in both intervals."""
    minimum, maximum = max(one[0], other[0]), min(one[1], other[1])
    return (minimum, maximum) if minimum <= maximum else (NEVER, NEVER)


def measures(
    device: torch.device, progress: Progress = print, more: Iterable[Group] = ()
) -> dict[str, Callable[[], Iterable[Regime]]]:
    """All that is decided by measurement on such a device, by name. more: groups of rooms above."""
    measures: dict[str, Callable[[], Iterable[Regime]]] = {}
    if device.type != "cpu":
        groups = (*GROUPS, *more)
        measures |= {group.regime: partial(tune_group, group, device, progress) for group in groups}
        measures["linear_assignment"] = partial(tune_linear_assignment, device, progress)
        measures[regimes.OVERLAP] = partial(tune_overlap, groups, device, progress)
    measures["linear_assignment on the CPU"] = partial(tune_threads, progress)
    return measures


def tune(
    device: torch.device, progress: Progress = print, only: Collection[str] | None = None, more: Iterable[Group] = ()
) -> Iterator[Regime]:
    """Take these `measures`, all where None, one after the other; a minute or two.

    What can't be measured is told, and stays as it was.
    """
    for name, measure in measures(device, progress, more).items():
        if only is not None and name not in only:
            continue
        try:
            with nullcontext() if device.type == "cpu" else beside_the_default_stream():
                found = list(measure())
            yield from found
        except Exception as error:  # a kernel that fails here must not keep the others from being measured
            reason = (str(error).strip().splitlines() or ["no message"])[0]
            progress(f"FAILED {name}, which stays as it was: {type(error).__name__}: {reason}")


def tune_group(group: Group, device: torch.device, progress: Progress = print) -> list[Regime]:
    """One of `tuning_cases.GROUPS`: where its kernels are faster than what `auto` would take otherwise."""
    timings: dict[str, dict[bool, list[Timing]]] = {name: {False: [], True: []} for name in group.ours}
    for case in group.cases:
        step, backends = case.make(device, gradients=group.gradients), (case.other, *group.ours)
        checked = step if case.checked is None else case.checked(device, gradients=group.gradients)
        right = [agree(checked, group.op, case.other, name, group.tolerance) for name in group.ours]
        for captured in (True,) if group.graphs_only else (False, True):
            other, *measured = _interleaved(step, group.op, backends, captured=captured, repeats=_CALLS)
            for name, milliseconds, agrees in zip(group.ours, measured, right):
                timing = Timing(case.size, other, milliseconds, agrees)
                timings[name][captured].append(timing)
                where = " in a graph" * captured
                beside = case.other if name == backends[1] else "the best other"
                progress(_line(f"{group.ours[name]} {case.text}{where}", beside, timing))
                other = min(other, milliseconds)
    return [_regime(group.ours[name], device, times, rival=name != "triton") for name, times in timings.items()]


def _regime(name: str, device: torch.device, times: Mapping[bool, list[Timing]], rival: bool) -> Regime:
    """times: launched eagerly (False) and in a graph. rival: of another kernel of ours, which takes the host as long: launched
    eagerly, they differ by noise."""
    graph = minimum, maximum = interval(times[True])
    eager_minimum, eager_maximum = common(interval(times[False]), graph) if rival else interval(times[False])
    host = "python" if native.host is None else "c++"
    return Regime(
        name, _architecture(device), eager_minimum, minimum, source(device), eager_maximum, maximum, host=host
    )


def tune_overlap(groups: Iterable[Group], device: torch.device, progress: Progress = print) -> list[Regime]:
    """Whether launches are to overlap (`kernels.overlap`): in CUDA graphs, of every op the first group, at its smallest size, in training.

    They are where that gains over all, takes no op longer by what is no noise (`TOLERATED`), and changes no result by a bit, or, where
    replays of one graph differ, as sums by atomics do, by more than the group tolerates.
    """
    if not overlap.is_able(_architecture(device)):
        return []
    chosen: dict[str, Group] = {}
    for group in groups:
        if group.gradients and group.repeats and group.kernel == "triton":
            chosen.setdefault(group.op, group)
    timings = []
    for group in chosen.values():
        case = group.cases[0]
        replays, results, steady = zip(*(_replayed(group, case, device, overlapping) for overlapping in (False, True)))
        right = all(_alike(b, a, 0.0 if steady[0] else group.tolerance) for a, b in zip(*results))
        if steady[0] and not steady[1]:  # what overlaps reads what is still being written
            right = False
        rounds = [[_milliseconds(replay, 2) / _CALLS for replay in replays] for _ in range(_ROUNDS)]
        apart, together = map(statistics.median, zip(*rounds))
        timings.append(Timing(case.size, apart, together, right))
        text = f"launches that overlap, {group.op} {case.text} in a graph"
        progress(_line(text, "one by one", timings[-1], "overlapping"))
    gain = sum(math.log(timing.eager / timing.kernel) for timing in timings)
    wins = gain > 0 and all(timing.right and timing.kernel <= TOLERATED * timing.eager for timing in timings)
    minimum = 0 if wins else NEVER
    return [Regime(regimes.OVERLAP, _architecture(device), minimum, minimum, source(device))]


def _replayed(
    group: Group, case: Case, device: torch.device, overlapping: bool
) -> tuple[Callable[[], None], list[torch.Tensor], bool]:
    """A graph of some calls, what a replay gave, and whether another one gave the same bits; leaves and dropout are the same for either
    kind of launch."""
    found: list[torch.Tensor] = []
    with torch.random.fork_rng([device]), overlapping_launches(overlapping), use_backend(**{group.op: group.kernel}):
        torch.manual_seed(0)
        step = case.make(device, gradients=True)
        first = step()

        def kept() -> tuple[torch.Tensor, ...]:
            results = tuple(t.detach() for t in step())
            found.extend(results)
            return results

        replay = _captured(kept, _CALLS, first)
        results = []
        for _ in range(2):
            torch.manual_seed(0)
            replay()
            results.append([t.clone() for t in found])
    return replay, results[0], all(_alike(a, b, 0.0) for a, b in zip(*results))


@contextmanager
def overlapping_launches(yes: bool) -> Iterator[None]:
    """Inside the block all launches overlap, or none."""
    before = launch.overlapped
    launch.overlapped = lambda device: yes
    _forget_launches()
    try:
        yield
    finally:
        launch.overlapped = before
        _forget_launches()


def _forget_launches() -> None:
    launch.forget_programs()
    dispatch.forget_decisions()


def tune_linear_assignment(device: torch.device, progress: Progress = print) -> list[Regime]:
    """24 problems on the device, beside one transfer to the host's threads and back: the kernel loses large ones first."""
    timings = []
    for targets, queries in ((5, 100), (20, 100), (64, 300), (128, 300), (256, 900), (512, 1000)):
        step = assignment_step(device, 24, targets, queries)
        right = agree(step, "linear_assignment", "threads", "triton")
        threads, kernel = _interleaved(step, "linear_assignment", ("threads", "triton"), repeats=2)
        timings.append(Timing(targets**2 * queries, threads, kernel, right))
        progress(_line(f"linear_assignment 24 × ({targets}, {queries})", "threads", timings[-1]))
    minimum, maximum = interval(timings)
    architecture, unit = _architecture(device), regimes.SCANS
    return [Regime("linear_assignment", architecture, minimum, 0, source(device), eager_maximum=maximum, unit=unit)]


def tune_threads(progress: Progress = print) -> list[Regime]:
    """Assignment on the CPU: SciPy in one thread beside several, by the row scans of all problems (N² Q each)."""
    device, timings = torch.device("cpu"), []
    for problems, targets, queries in ((24, 20, 100), (48, 20, 100), (24, 50, 300), (24, 100, 300), (24, 300, 300)):
        step = assignment_step(device, problems, targets, queries)
        step()
        scipy, threads = _interleaved(step, "linear_assignment", ("scipy", "threads"), repeats=3)
        timings.append(Timing(problems * targets**2 * queries, scipy, threads))
        progress(
            _line(f"linear_assignment {problems} × ({targets}, {queries}) on the CPU", "scipy", timings[-1], "threads")
        )
    minimum = max(interval(timings)[0], timings[0].size)  # threads gain nothing where there is little to do
    return [Regime("linear_assignment", "cpu", minimum, minimum, source(device), unit=regimes.SCANS)]


def source(device: torch.device) -> str:
    """What the measurements of a device are of, and when."""
    date = time.strftime("%B %Y")
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, {date}"
    import scipy

    return f"{torch.get_num_threads()} threads of this CPU, scipy {scipy.__version__}, {date}"


def assignment_step(device: torch.device, problems: int, targets: int, queries: int) -> Step:
    cost = torch.rand(problems, targets, queries, device=device)
    counts = torch.full((problems,), targets, device=device)
    return lambda: (linear_assignment(cost, counts),)


def agree(step: Step, op: str, expected: str, found: str, tolerance: float = 2e-2) -> bool:
    """Whether two implementations of `op` give the same, integers exactly, else up to that share of their norm."""
    with use_backend(**{op: expected}):
        right = step()
    with use_backend(**{op: found}):
        ours = step()
    return all(_alike(a, b, tolerance) for a, b in zip(ours, right))


def _alike(found: torch.Tensor, right: torch.Tensor, tolerance: float) -> bool:
    """Whether they differ by no more than that share of their norm, and not at all where they are integers or nothing is tolerated."""
    if not found.is_floating_point():
        return torch.equal(found, right)
    if not tolerance:
        return torch.equal(found.nan_to_num(), right.nan_to_num())
    near = (found - right).float().norm() <= tolerance * right.float().norm()
    return bool(near.item() and found.isfinite().all().item())


def _architecture(device: torch.device) -> str:
    name = dispatch.architecture(device)
    assert name is not None
    return name


def _line(text: str, other: str, timing: Timing, ours: str = "kernel") -> str:
    wrong = "" if timing.right else "; the kernel's result is WRONG, it stays off here"
    ratio = timing.eager / timing.kernel
    return f"{text}: {other} {timing.eager:.4f} ms, {ours} {timing.kernel:.4f} ms ({ratio:.2f}×){wrong}"


def _interleaved(
    step: Step, op: str, backends: tuple[str, ...], *, captured: bool = False, repeats: int = 20
) -> tuple[float, ...]:
    """Median milliseconds with each backend, measured in turns so that a drifting clock hits all.

    captured: a graph holds so many calls as `repeats` says: the host takes longer for a replay than the GPU for a small one.
    Launched eagerly, backward runs on this thread, as waking autograd's, which a model does once a step, takes longer than small ops.
    """
    runs: list[Callable[[], object]] = []
    if captured:
        dispatch.forget_decisions()  # and with them programs of layers, which a graph is not made of
    for backend in backends:
        with use_backend(**{op: backend}):
            for _ in range(1 if captured else 3):
                results = step()
            runs.append(_captured(step, repeats, results) if captured else step)
    times: list[list[float]] = [[] for _ in backends]
    for _ in range(_ROUNDS):
        for backend, run, measured in zip(backends, runs, times):
            with use_backend(**{op: backend}), torch.autograd.set_multithreading_enabled(captured):
                measured.append(_milliseconds(run, 2) / repeats if captured else _milliseconds(run, repeats))
    return tuple(map(statistics.median, times))


def _captured(step: Step, calls: int, results: Sequence[torch.Tensor]) -> Callable[[], None]:
    """results: of a call before, for where they lie."""
    graph = torch.cuda.CUDAGraph()
    device = results[0].device if results else torch.get_default_device()
    # As a training step is captured: `auto` may compile in here what it takes in graphs only.
    with set_aside(device, optimizer_step=1 << 20, cast_together=1 << 22), capture(graph):
        for _ in range(calls):
            step()
    return graph.replay


def _milliseconds(run: Callable[[], object], repeats: int) -> float:
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(repeats):
        run()
    if on_gpu:
        torch.cuda.synchronize()
    return (time.perf_counter() - begun) / repeats * 1e3
