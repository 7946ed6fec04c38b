"""Where an implementation was measured to be faster than what it replaces: data that `auto` reads.

A `Regime` says from and up to which amount of work it wins, on one architecture, with the measurement behind it.
`detr-fast tune` measures the user's own machine and writes more of them to a cache file, which outranks those shipped here.
Without an entry for the architecture the nearest one counts, and `explain` says so. Without any entry, the conservative
default holds: only where the GPU's time surely outweighs the host's, or where launches are free (a captured CUDA graph).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import torch

from detr_fast.dispatch import Call, forget_decisions

NEVER = 1 << 62  # beyond any size
SCANS = "row scans"  # of an assignment: N² Q, what a search over Q columns for each of N rows may take
UNMEASURED_MINIMUM_BYTES = 32 << 20  # 10 µs at 3 TB/s: above the host's cost of an eager Triton launch (6–13 µs)


@dataclass(frozen=True)
class Regime:
    op: str
    architecture: str  # "sm_90", "gfx942"; "cpu" for threads against one thread
    eager_minimum: int  # bytes of the op's main input (or `unit`), run eagerly; below it the alternative is faster
    captured_minimum: int  # the same inside a CUDA graph
    source: str  # machine, versions and date of the measurement
    eager_maximum: int = NEVER  # above it the alternative is faster
    unit: str = "bytes"


SHIPPED: tuple[Regime, ...] = (
    Regime(
        "linear_assignment",
        "cpu",
        18_000_000,
        18_000_000,
        "two cores of a shared Intel Xeon (24 problems of 50 × 300: 4.5 ms in one thread, 3.2 to 3.8 in two; of 20 × 100: "
        "0.5 and 1.8), torch 2.14.1, scipy 1.17.1, November 2026",
        unit=SCANS,
    ),
)  # no GPU has been measured yet; `make gpu` proposes entries


def cache_file() -> Path:
    """The user's own measurements: $DETR_FAST_CACHE/regimes.json, by default under ~/.cache/detr-fast."""
    root = os.environ.get("DETR_FAST_CACHE") or os.path.join(os.path.expanduser("~"), ".cache", "detr-fast")
    return Path(root) / "regimes.json"


def save(regimes: Iterable[Regime]) -> Path:
    """Add measurements to the cache file (atomically), in place of older ones of the same, and make them count from now on."""
    entries = {(r.op, r.architecture): r for r in (*_own(), *regimes)}
    path = cache_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps([asdict(r) for r in entries.values()], indent=1))
    os.replace(temporary, path)
    known.cache_clear()
    forget_decisions()
    return path


@lru_cache(maxsize=1)
def known() -> tuple[Regime, ...]:
    """The user's measurements first, then those shipped. An unreadable cache file counts as empty."""
    return _own() + SHIPPED


def _own() -> tuple[Regime, ...]:
    try:
        return tuple(Regime(**entry) for entry in json.loads(cache_file().read_text()))
    except (OSError, ValueError, TypeError):
        return ()


@torch.compiler.assume_constant_result
def find(op: str, architecture: str | None) -> Regime | None:
    """The entry for the architecture, else that of the nearest one by the same maker."""
    entries = [r for r in known() if r.op == op]
    for entry in entries:
        if entry.architecture == architecture:
            return entry
    maker = (architecture or "")[:3]
    related = [r for r in entries if r.architecture[:3] == maker]
    return min(related, key=lambda r: abs(_number(r.architecture) - _number(architecture or "")), default=None)


def advice(op: str, call: Call, size: int, other: str = "PyTorch") -> str | None:
    """The measured (or, unmeasured, conservative) reason against a kernel for this much work; other: what is there besides."""
    entry = find(op, call.architecture)
    captured = call.situation.regime == "captured"
    if entry is None:
        if captured or size >= UNMEASURED_MINIMUM_BYTES:
            return None
        return f"below {_readable(UNMEASURED_MINIMUM_BYTES)} of input it stays eager until measured: run detr-fast tune"
    minimum, maximum = (entry.captured_minimum, NEVER) if captured else (entry.eager_minimum, entry.eager_maximum)
    if size < minimum:
        return f"below {_amount(minimum, entry.unit)} {other} is faster (measured on {entry.architecture})"
    if size > maximum:
        return f"above {_amount(maximum, entry.unit)} the host is faster (measured on {entry.architecture})"
    return None


def note(op: str, call: Call) -> str | None:
    """`unmeasured on this GPU …` where no entry of this very architecture stands behind the choice."""
    entry = find(op, call.architecture)
    if entry is None or entry.architecture != call.architecture:
        return "unmeasured on this GPU: run detr-fast tune"
    return None


def _number(architecture: str) -> int:
    digits = "".join(c for c in architecture if c in "0123456789abcdef")
    return int(digits, 16) if digits else 0


def _readable(size: int) -> str:
    return f"{size / 2**20:g} MiB" if size >= 2**20 else f"{size / 2**10:g} KiB"


def _amount(size: int, unit: str) -> str:
    return f"{_readable(size)} of input" if unit == "bytes" else f"{size:,} {unit}"
