"""What the dispatcher costs where it has nothing to offer: tiny CPU calls beside torch.nn's own.

    python -m pytest benchmarks/test_overhead.py -s

Rounds of both alternate, so that a machine's drift hits both; the ratio is the median over rounds.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable

import pytest
import torch

from detr_fast import nn

LIMIT = 1.10
ROUNDS = 301
SECONDS_PER_ROUND = 1e-3
ATTEMPTS = 3  # a busy neighbour can spoil a whole measurement


def _duration(call: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def interleaved(ours: Callable[[], object], original: Callable[[], object]) -> tuple[float, float, float]:
    """Median seconds a call of both, and the median of the rounds' ratios."""
    for call in (ours, original):
        _duration(call, 200)
    repeats = max(1, round(SECONDS_PER_ROUND / _duration(original, 200)))
    pairs = []
    gc.disable()
    try:
        for index in range(ROUNDS):
            first, second = (ours, original) if index % 2 else (original, ours)
            durations = {first: _duration(first, repeats), second: _duration(second, repeats)}
            pairs.append((durations[ours], durations[original]))
    finally:
        gc.enable()
    times = [statistics.median(column) for column in zip(*pairs)]
    return times[0], times[1], statistics.median(a / b for a, b in pairs)


def _norm(module: type[torch.nn.LayerNorm] | type[torch.nn.RMSNorm], training: bool) -> Callable[[], object]:
    norm, x = module(16).requires_grad_(training), torch.randn(2, 4, 16)
    return lambda: norm(x)


def _attention(module: type[torch.nn.MultiheadAttention], training: bool, cross: bool) -> Callable[[], object]:
    attention = module(16, 4, batch_first=True).train(training).requires_grad_(training)
    x = torch.randn(2, 4, 16)
    memory = torch.randn(2, 4, 16) if cross else x
    return lambda: attention(x, memory, memory, need_weights=False)


CASES: dict[str, Callable[..., Callable[[], object]]] = {
    "LayerNorm(16), training": lambda source: _norm(source.LayerNorm, True),
    "LayerNorm(16), inference": lambda source: _norm(source.LayerNorm, False),
    "RMSNorm(16), training": lambda source: _norm(source.RMSNorm, True),
    "MultiheadAttention(16, 4), self, training": lambda source: _attention(source.MultiheadAttention, True, False),
    "MultiheadAttention(16, 4), cross, training": lambda source: _attention(source.MultiheadAttention, True, True),
    "MultiheadAttention(16, 4), self, inference": lambda source: _attention(source.MultiheadAttention, False, False),
}


@pytest.mark.parametrize("name", CASES)
def test_a_tiny_cpu_call_is_within_ten_percent_of_torch_nn(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(ATTEMPTS):
            ours, original, ratio = interleaved(CASES[name](nn), CASES[name](torch.nn))
            if ratio <= LIMIT:
                break
    finally:
        torch.set_num_threads(threads)
    with capsys.disabled():
        print(f"\n{name:45} ours {ours * 1e6:7.2f} µs   torch.nn {original * 1e6:7.2f} µs   ratio {ratio:.3f}")
    assert ratio <= LIMIT, f"{name}: {ratio:.3f} times torch.nn's time, at most {LIMIT} is allowed"
