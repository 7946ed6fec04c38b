"""Where an implementation was measured to be faster than what it replaces: data that `auto` reads.

A `Regime` says from and up to which amount of work it wins, on one architecture, with the measurement behind it.
`detr-fast tune` measures the user's own machine and writes more of them to a cache file, which outranks those shipped here:
what `make gpu` wrote on a GPU of that architecture, as it is, in `measured/<architecture>.json`.
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

from detr_fast import dispatch, native
from detr_fast.dispatch import NEVER as NEVER
from detr_fast.dispatch import Call, forget_decisions
from detr_fast.kernels import launch

SCANS = "row scans"  # of an assignment: N² Q, what a search over Q columns for each of N rows may take
OVERLAP = "overlapping_launches"  # 0 bytes where they were measured to be faster (`kernels.overlap`), else NEVER
UNMEASURED_MINIMUM_BYTES = 32 << 20  # 10 µs at 3 TB/s: above the host's cost of an eager Triton launch (6–13 µs)


@dataclass(frozen=True)
class Regime:
    """The sizes from a minimum up to a maximum are where an op's kernel is faster than what there is besides.

    Those of the op's main input in bytes (or what `unit` says), launched eagerly, and inside a CUDA graph; NEVER as a
    minimum: at none. Calls that need no gradient have entries of their own, "<op>_inference", where that was measured.
    """

    op: str
    architecture: str  # "sm_90", "gfx942"; "cpu" for threads against one thread
    eager_minimum: int
    captured_minimum: int
    source: str  # machine, versions and date of the measurement
    eager_maximum: int = NEVER
    captured_maximum: int = NEVER
    unit: str = "bytes"
    host: str = "python"  # or "c++": what launched the kernels eagerly (see `native`)


def read(path: Path) -> tuple[Regime, ...]:
    """The entries of a file; an unreadable one counts as empty."""
    try:
        return tuple(Regime(**entry) for entry in json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return ()


def _shipped() -> Iterable[Regime]:
    """What was measured on GPUs: of the machine's CPU each file has an entry, too, which says nothing of another's.

    Behind "sm_90.json" comes "sm_90-python.json", an earlier run's, which launched kernels from Python.
    """
    for path in sorted((Path(__file__).parent / "measured").glob("*.json"), key=lambda path: path.stem):
        yield from (entry for entry in read(path) if entry.architecture == path.stem.partition("-")[0])


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
    *_shipped(),
)


def cache_file() -> Path:
    """The user's own measurements: $DETR_FAST_CACHE/regimes.json, by default under ~/.cache/detr-fast."""
    return native.cache_folder() / "regimes.json"


def save(regimes: Iterable[Regime]) -> Path:
    """Add measurements to the cache file (atomically), in place of older ones of the same, and make them count from now on."""
    entries = {(r.op, r.architecture): r for r in (*read(cache_file()), *regimes)}
    path = cache_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps([asdict(r) for r in entries.values()], indent=1))
    os.replace(temporary, path)
    known.cache_clear()
    forget_decisions()
    launch.forget_programs()
    return path


@lru_cache(maxsize=1)
def known() -> tuple[Regime, ...]:
    """The user's measurements first, then those shipped."""
    return read(cache_file()) + SHIPPED


def overlapped(device: torch.device) -> bool:
    """Whether launches on a device may overlap: where that was measured to be faster, and right, on its very architecture."""
    architecture = dispatch.architecture(device)
    minimums = [r.captured_minimum for r in known() if (r.op, r.architecture) == (OVERLAP, architecture)]
    return minimums[:1] == [0]  # the user's own comes first


launch.overlapped = overlapped


def inference(op: str) -> str:
    """The name of an op's measurements without gradients."""
    return f"{op}_inference"


@torch.compiler.assume_constant_result
def find(op: str, architecture: str | None, gradients: bool = True, captured: bool = False) -> Regime | None:
    """The entry for the architecture, else that of the nearest one by the same maker; without gradients its own if there is one.

    Where launches are from Python, times of launches from C++ say nothing, but for those of CUDA graphs (captured). The user's own entry comes
    before one that is shipped, and of several shipped ones that whose kernels were launched as they are here.
    """
    host = "python" if native.host is None else "c++"
    names = [op] if gradients else [inference(op), op]
    maker = (architecture or "")[:3]
    entries = known()
    own = len(entries) - len(SHIPPED)

    def rank(place: int) -> tuple[int, int, bool]:
        entry = entries[place]
        distance = abs(_number(entry.architecture) - _number(architecture or ""))
        return distance, names.index(entry.op), place >= own and not captured and entry.host != host

    related = (
        i
        for i, entry in enumerate(entries)
        if entry.op in names and entry.architecture[:3] == maker and (captured or entry.host in ("python", host))
    )
    best = min(related, key=rank, default=None)
    return None if best is None else entries[best]


def least(op: str, architecture: str | None, gradients: bool | None = None) -> int:
    """The size from which `advice` may be for the kernel, run eagerly; gradients: None for with or without."""
    entries = [find(op, architecture, one) for one in ((True, False) if gradients is None else (gradients,))]
    return min(UNMEASURED_MINIMUM_BYTES if entry is None else entry.eager_minimum for entry in entries)


def bytes_of(x: torch.Tensor, *_: object) -> int:
    """At least what advice about a call on x goes by: autocast makes elements no larger."""
    return x.nbytes


def advice(op: str, call: Call, size: int, other: str = "PyTorch") -> str | None:
    """The measured (or, unmeasured, conservative) reason against a kernel for this much work; other: what is there besides."""
    captured = call.situation.regime == "captured"
    entry = find(op, call.architecture, call.needs_grad, captured)
    if entry is None:
        if captured or size >= UNMEASURED_MINIMUM_BYTES:
            return None
        return f"below {_readable(UNMEASURED_MINIMUM_BYTES)} of input it stays eager until measured: run detr-fast tune"
    minimum, maximum = entry.eager_minimum, entry.eager_maximum
    if captured:
        minimum, maximum = entry.captured_minimum, entry.captured_maximum
    if minimum <= size <= maximum:
        return None
    limit = f"below {_amount(minimum, entry.unit)}" if size < minimum else f"above {_amount(maximum, entry.unit)}"
    where = "at all sizes" if minimum == NEVER else limit
    return f"{where} {other} is faster{' in a CUDA graph' if captured else ''} (measured on {entry.architecture}: {entry.source})"


def unmeasured(op: str, call: Call) -> bool:
    """Whether no entry of this very architecture stands behind the choice."""
    entry = find(op, call.architecture, call.needs_grad)
    return entry is None or entry.architecture != call.architecture


def note(op: str, call: Call) -> str:
    """What stands behind the choice of a kernel: `unmeasured on this GPU …` or `measured on …`."""
    if unmeasured(op, call):
        return "unmeasured on this GPU: run detr-fast tune"
    entry = find(op, call.architecture, call.needs_grad, call.situation.regime == "captured")
    assert entry is not None
    return f"measured on {entry.source}"


def _number(architecture: str) -> int:
    digits = "".join(c for c in architecture if c in "0123456789abcdef")
    return int(digits, 16) if digits else 0


def _readable(size: int) -> str:
    return f"{size / 2**20:g} MiB" if size >= 2**20 else f"{size / 2**10:g} KiB"


def _amount(size: int, unit: str) -> str:
    return f"{_readable(size)} of input" if unit == "bytes" else f"{size:,} {unit}"
