"""Measures the user's GPU and turns the timings into `Regime`s, which `auto` then reads.

Every size is first checked for a right result, then timed forward and backward, eager PyTorch and kernel in turn, both
launched eagerly and replayed from a CUDA graph (where launches are free).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from detr_fast import dispatch
from detr_fast.dispatch import use_backend
from detr_fast.ops import layer_norm
from detr_fast.ops.regimes import Regime

NEVER = 1 << 62  # bytes: the kernel won at no size that was measured
_ROUNDS, _REPEATS = 7, 20


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call at one size, and whether the kernel's result was right."""

    bytes: int
    eager: float
    kernel: float
    right: bool = True


def threshold(timings: Iterable[Timing]) -> int:
    """The smallest size from which on the kernel was right and at least as fast at every larger size too."""
    minimum = NEVER
    for timing in sorted(timings, key=lambda t: t.bytes, reverse=True):
        if not timing.right or timing.kernel > timing.eager:
            break
        minimum = timing.bytes
    return minimum


def tune_layer_norm(device: torch.device, progress: Callable[[str], None] = print) -> Regime:
    """Measure LayerNorm at DETR's width over growing numbers of rows. Takes about 20 s."""
    eager_timings, captured_timings = [], []
    for rows in (256, 1024, 4096, 16384, 65536, 262144):
        step = _layer_norm_step(device, rows, 256)
        right = _agree(step)
        size = rows * 256 * 2
        eager_timings.append(Timing(size, *_interleaved(step, captured=False), right))
        captured_timings.append(Timing(size, *_interleaved(step, captured=True), right))
        progress(
            f"layer_norm ({rows}, 256) bf16: eager {eager_timings[-1].eager:.4f} ms, kernel {eager_timings[-1].kernel:.4f} ms; "
            f"in a graph {captured_timings[-1].eager:.4f} ms, {captured_timings[-1].kernel:.4f} ms"
            + ("" if right else "; the kernel's result is WRONG, it stays off from here down")
        )
    name = dispatch.architecture(device)
    assert name is not None
    source = f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return Regime("layer_norm", name, threshold(eager_timings), threshold(captured_timings), source)


def _layer_norm_step(device: torch.device, rows: int, columns: int) -> Callable[[], tuple[torch.Tensor, ...]]:
    x = torch.randn(rows, columns, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight, bias = (torch.randn(columns, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    dy = torch.randn_like(x)

    def step() -> tuple[torch.Tensor, ...]:
        y = layer_norm(x, (columns,), weight, bias)
        return (y, *torch.autograd.grad(y, (x, weight, bias), dy))

    return step


def _agree(step: Callable[[], tuple[torch.Tensor, ...]]) -> bool:
    with use_backend("eager"):
        expected = step()
    with use_backend("triton"):
        found = step()
    return all(
        ((a - b).float().norm() <= 2e-2 * b.float().norm()).item() and bool(a.isfinite().all().item())
        for a, b in zip(found, expected)
    )


def _interleaved(step: Callable[[], object], *, captured: bool) -> tuple[float, float]:
    """Median milliseconds of (eager, kernel), measured in turns so that a drifting clock hits both."""
    runs = []
    for backend in ("eager", "triton"):
        with use_backend(backend):
            for _ in range(3):
                step()
            runs.append(_captured(step) if captured else step)
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(_ROUNDS):
        for backend, run, measured in zip(("eager", "triton"), runs, times):
            with use_backend(backend):
                measured.append(_milliseconds(run))
    return statistics.median(times[0]), statistics.median(times[1])


def _captured(step: Callable[[], object]) -> Callable[[], None]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _milliseconds(run: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(_REPEATS):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / _REPEATS
