"""Measures the user's machine and turns the timings into `Regime`s, which `auto` then reads.

Every size is first checked for a right result, then timed, kernel and alternative in turn, both launched eagerly and,
where both can be, replayed from a CUDA graph (in which launches are free). Without a GPU, what there is to measure is from
which size on assignment problems are worth several threads.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from detr_fast import dispatch
from detr_fast.dispatch import use_backend
from detr_fast.ops import layer_norm, linear_assignment, matching_cost, regimes
from detr_fast.ops.regimes import NEVER, Regime
from detr_fast.ops.tuning_cases import GROUPS, Group, Step

Progress = Callable[[str], None]
_ROUNDS = 7


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call at one size, of PyTorch (or the host) and of the kernel, and whether the latter was right."""

    size: int
    eager: float
    kernel: float
    right: bool = True


def threshold(timings: Iterable[Timing]) -> int:
    """The smallest size from which on the kernel was right and at least as fast at every larger size too."""
    minimum = NEVER
    for timing in sorted(timings, key=lambda t: t.size, reverse=True):
        if not timing.right or timing.kernel > timing.eager:
            break
        minimum = timing.size
    return minimum


def ceiling(timings: Iterable[Timing]) -> int:
    """The largest size up to which the kernel was right and at least as fast at every smaller size too; 0 for none."""
    maximum = 0
    for timing in sorted(timings, key=lambda t: t.size):
        if not timing.right or timing.kernel > timing.eager:
            return maximum
        maximum = timing.size
    return NEVER if maximum else 0


def measures(device: torch.device, progress: Progress = print) -> dict[str, Callable[[], Regime]]:
    """All that is decided by measurement on such a device, by name."""
    measures: dict[str, Callable[[], Regime]] = {}
    if device.type != "cpu":
        measures["layer_norm"] = partial(tune_layer_norm, device, progress)
        measures["matching_cost"] = partial(tune_matching_cost, device, progress)
        measures |= {group.regime: partial(tune_group, group, device, progress) for group in GROUPS}
        measures["linear_assignment"] = partial(tune_linear_assignment, device, progress)
    measures["linear_assignment on the CPU"] = partial(tune_threads, progress)
    return measures


def tune(device: torch.device, progress: Progress = print, only: Collection[str] | None = None) -> Iterator[Regime]:
    """Take these `measures`, all where None, one after the other; about a minute.

    What can't be measured is told, and stays as it was.
    """
    for name, measure in measures(device, progress).items():
        if only is not None and name not in only:
            continue
        try:
            yield measure()
        except Exception as error:  # a kernel that fails here must not keep the others from being measured
            reason = (str(error).strip().splitlines() or ["no message"])[0]
            progress(f"FAILED {name}, which stays as it was: {type(error).__name__}: {reason}")


def tune_group(group: Group, device: torch.device, progress: Progress = print) -> Regime:
    """One of `tuning_cases.GROUPS`."""
    cases = ((text, size, make(device)) for text, size, make in group.cases)
    return _against(group.other, group.op, device, cases, progress, group.regime, ours=group.ours, repeats=8)


def tune_layer_norm(device: torch.device, progress: Progress = print) -> Regime:
    """LayerNorm, forward and backward, at DETR's width over growing numbers of rows."""
    cases = [
        (f"({rows}, 256) bf16", rows * 256 * 2, layer_norm_step(device, rows, 256))
        for rows in (256, 1024, 4096, 16384, 65536, 262144)
    ]
    return _against("eager", "layer_norm", device, cases, progress)


def tune_matching_cost(device: torch.device, progress: Progress = print) -> Regime:
    """Costs of six decoder layers over growing batches: 100 queries, 20 boxes, 92 classes."""
    cases = [
        (f"6 × {images} × (20, 100)", 6 * images * 20 * 100 * 4, matching_cost_step(device, images, 20, 100))
        for images in (1, 4, 16, 64)
    ]
    return _against("eager", "matching_cost", device, cases, progress)


def tune_linear_assignment(device: torch.device, progress: Progress = print) -> Regime:
    """24 problems on the device, beside one transfer to the host's threads and back: the kernel loses large ones first."""
    timings = []
    for targets, queries in ((5, 100), (20, 100), (64, 300), (128, 300), (256, 900), (512, 1000)):
        step = assignment_step(device, 24, targets, queries)
        right = agree(step, "linear_assignment", "threads", "triton")
        measured = _interleaved(step, "linear_assignment", ("threads", "triton"), repeats=2)
        timings.append(Timing(targets**2 * queries, *measured, right))
        progress(_line(f"linear_assignment 24 × ({targets}, {queries})", "threads", timings[-1]))
    return Regime(
        "linear_assignment",
        _architecture(device),
        0,
        0,
        source(device),
        eager_maximum=ceiling(timings),
        unit=regimes.SCANS,
    )


def tune_threads(progress: Progress = print) -> Regime:
    """Assignment on the CPU: SciPy in one thread beside several, by the row scans of all problems (N² Q each)."""
    device, timings = torch.device("cpu"), []
    for problems, targets, queries in ((24, 20, 100), (48, 20, 100), (24, 50, 300), (24, 100, 300), (24, 300, 300)):
        step = assignment_step(device, problems, targets, queries)
        step()
        measured = _interleaved(step, "linear_assignment", ("scipy", "threads"), repeats=3)
        timings.append(Timing(problems * targets**2 * queries, *measured))
        progress(
            _line(f"linear_assignment {problems} × ({targets}, {queries}) on the CPU", "scipy", timings[-1], "threads")
        )
    minimum = threshold(timings)
    return Regime("linear_assignment", "cpu", minimum, minimum, source(device), unit=regimes.SCANS)


def source(device: torch.device) -> str:
    """What the measurements of a device are of."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    import scipy

    return f"{torch.get_num_threads()} threads of this CPU, scipy {scipy.__version__}"


def layer_norm_step(device: torch.device, rows: int, columns: int) -> Step:
    x = torch.randn(rows, columns, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight, bias = (torch.randn(columns, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    dy = torch.randn_like(x)

    def step() -> tuple[torch.Tensor, ...]:
        y = layer_norm(x, (columns,), weight, bias)
        return (y, *torch.autograd.grad(y, (x, weight, bias), dy))

    return step


def matching_cost_step(device: torch.device, images: int, targets: int, queries: int) -> Step:
    logits, boxes = torch.randn(6, images, queries, 92, device=device), torch.rand(6, images, queries, 4, device=device)
    labels = torch.randint(91, (images, targets), device=device)
    true_boxes, counts = torch.rand(images, targets, 4, device=device), labels.new_full((images,), targets)
    return lambda: matching_cost(logits, boxes, labels, true_boxes, counts)


def assignment_step(device: torch.device, problems: int, targets: int, queries: int) -> Step:
    cost = torch.rand(problems, targets, queries, device=device)
    counts = torch.full((problems,), targets, device=device)
    return lambda: (linear_assignment(cost, counts),)


def agree(step: Step, op: str, expected: str, found: str) -> bool:
    """Whether two implementations of `op` give the same, integers exactly."""
    with use_backend(**{op: expected}):
        right = step()
    with use_backend(**{op: found}):
        ours = step()
    return all(
        bool(((a - b).float().norm() <= 2e-2 * b.float().norm()).item() and a.isfinite().all().item())
        if a.is_floating_point()
        else torch.equal(a, b)
        for a, b in zip(ours, right)
    )


def _against(
    other: str,
    op: str,
    device: torch.device,
    cases: Iterable[tuple[str, int, Step]],
    progress: Progress,
    regime: str | None = None,
    *,
    ours: str = "triton",
    repeats: int = 20,
) -> Regime:
    """From which size on the kernel of `op` is faster than another implementation, by the name that `advice` looks up."""
    regime = regime or op
    eager_timings: list[Timing] = []
    captured_timings: list[Timing] = []
    for text, size, step in cases:
        right = agree(step, op, other, ours)
        for captured, timings in ((False, eager_timings), (True, captured_timings)):
            measured = _interleaved(step, op, (other, ours), captured=captured, repeats=repeats)
            timings.append(Timing(size, *measured, right))
            progress(_line(f"{regime} {text}{' in a graph' if captured else ''}", other, timings[-1]))
    return Regime(regime, _architecture(device), threshold(eager_timings), threshold(captured_timings), source(device))


def _architecture(device: torch.device) -> str:
    name = dispatch.architecture(device)
    assert name is not None
    return name


def _line(text: str, other: str, timing: Timing, ours: str = "kernel") -> str:
    wrong = "" if timing.right else "; the kernel's result is WRONG, it stays off here"
    ratio = timing.eager / timing.kernel
    return f"{text}: {other} {timing.eager:.4f} ms, {ours} {timing.kernel:.4f} ms ({ratio:.2f}×){wrong}"


def _interleaved(
    step: Step, op: str, backends: tuple[str, str], *, captured: bool = False, repeats: int = 20
) -> tuple[float, float]:
    """Median milliseconds with each backend, measured in turns so that a drifting clock hits both."""
    runs: list[Callable[[], object]] = []
    for backend in backends:
        with use_backend(**{op: backend}):
            for _ in range(3):
                step()
            runs.append(_captured(step) if captured else step)
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(_ROUNDS):
        for backend, run, measured in zip(backends, runs, times):
            with use_backend(**{op: backend}):
                measured.append(_milliseconds(run, repeats))
    return statistics.median(times[0]), statistics.median(times[1])


def _captured(step: Step) -> Callable[[], None]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
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
