"""Compile the catalog for GPUs that are not there, and read off what each program uses.

Triton compiles from source to machine code without a driver; its own cache, keyed by a hash of source, options and
version, lies in TRITON_CACHE_DIR (~/.triton/cache) and makes a second compilation immediate.
"""

from __future__ import annotations

import math
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

from . import launch
from .analysis import RATES, analyse, nvidia_tool
from .catalog import TARGETS, Entry, entry
from .launch import Variant
from .launch import older_compiler as older_compiler


@dataclass(frozen=True)
class Resources:
    """What one program needs: registers a thread, bytes spilled a thread, bytes of shared memory.

    occupancy: resident warps over the most that a multiprocessor holds.
    """

    registers: int
    spills: int
    shared_memory: int
    warps: int
    stages: int
    occupancy: float


@dataclass(frozen=True)
class Compiled:
    """An entry's machine code for a target, its assembly (PTX or AMD's), and its figures; or why there are none."""

    name: str
    target: str
    binary: bytes = b""
    assembly: str = ""
    resources: Resources | None = None
    error: str | None = None


@dataclass(frozen=True)
class _Multiprocessor:
    warps: int
    programs: int
    shared_memory: int


# CUDA C++ Programming Guide, "Compute Capabilities"; CDNA 2 and 3 instruction set guides.
_MULTIPROCESSORS = {
    "sm_80": _Multiprocessor(64, 32, 164 << 10),
    "sm_86": _Multiprocessor(48, 16, 100 << 10),
    "sm_89": _Multiprocessor(48, 24, 100 << 10),
    "sm_90": _Multiprocessor(64, 32, 228 << 10),
    "sm_100": _Multiprocessor(64, 32, 228 << 10),
    "sm_120": _Multiprocessor(48, 24, 100 << 10),
    "gfx90a": _Multiprocessor(32, 32, 64 << 10),
    "gfx942": _Multiprocessor(32, 32, 64 << 10),
}


def compile_catalog(entries: Iterable[Entry], targets: Iterable[str], workers: int | None = None) -> Iterator[Compiled]:
    """Compile each entry for each target that it is for, in `workers` processes (up to one per core where None), in the order given.

    A failure comes back as a `Compiled` with an error that names kernel, target and remedy. Raises ValueError for an
    unknown target, RuntimeError where TRITON_INTERPRET is set, ImportError without triton; OSError, on the way, where
    this machine can't keep what is compiled.
    """
    jobs = [(one.name, target) for target in _known(targets) for one in entries if one.is_for(target)]
    launch.require_triton()
    if launch.triton.knobs.runtime.interpret:
        raise RuntimeError("kernels can't be compiled while TRITON_INTERPRET is set: unset it and start again")
    # A process takes as long to start as several variants to compile.
    return _compile_jobs(jobs, workers or min(os.cpu_count() or 1, len(jobs) // 8))


def compile_variant(variant: Variant, target: str) -> tuple[bytes, str, Resources]:
    """Machine code, assembly and figures of one variant for one target."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_source

    backend, architecture, warp = TARGETS[target]
    source = ASTSource(variant.kernel, variant.signature(), variant.all_constants())
    compiled = compile_source(source, target=GPUTarget(backend, architecture, warp), options=variant.options())
    shared = int(compiled.metadata.shared)
    if backend == "cuda":
        binary, assembly = compiled.asm["cubin"], compiled.asm["ptx"]
        registers, spills = _nvidia_usage(binary)
    else:
        binary, assembly = compiled.asm["hsaco"], compiled.asm["amdgcn"]
        registers, spills = _amd_usage(assembly)
    resident = occupancy(target, registers, shared, variant.num_warps)
    return binary, assembly, Resources(registers, spills, shared, variant.num_warps, variant.num_stages, resident)


def occupancy(target: str, registers: int, shared: int, warps: int) -> float:
    """Resident warps over the most that one multiprocessor (compute unit) of `target` holds."""
    unit = _MULTIPROCESSORS[target]
    # Registers come in runs of eight a thread: 512 a thread and scheduler on both makers' GPUs, four schedulers.
    by_registers = 4 * (512 // max(8, math.ceil(registers / 8) * 8)) // warps
    reserved = 1024 if target.startswith("sm_") else 0
    by_shared = unit.shared_memory // max(1, shared + reserved)
    programs = min(unit.programs, unit.warps // warps, by_registers, by_shared)
    return round(programs * warps / unit.warps, 3)


def over_budget(one: Entry, compiled: Compiled) -> list[str]:
    """One sentence for each budget that a compiled entry exceeds: what, where, and the remedy."""
    if compiled.resources is None:
        return []
    amd = not compiled.target.startswith("sm_")
    budget, used = one.budget, compiled.resources
    shared = budget.amd_shared if amd else budget.shared
    if compiled.target in ("sm_80", "sm_90", "sm_100"):
        shared = max(shared, budget.large_shared)
    registers = budget.amd_registers if amd else budget.registers
    spills = budget.amd_spills if amd else budget.spills
    if older_compiler():  # measured over the cover with triton 3.6: at most 220 registers for 184, 2 KiB, 24 bytes
        registers, shared, spills = round(1.2 * registers), shared + 2048, spills + 24
    limits = (
        ("registers a thread", used.registers, registers),
        ("bytes spilled a thread", used.spills, spills),
        ("bytes of shared memory", used.shared_memory, shared),
    )
    return [
        f"{one.name} for {compiled.target} uses {value} {what}, over its budget of {limit}: give it fewer rows a tile or "
        "more warps in kernels/configs.py or attention_configs.py, or raise the budget in kernels/catalog.py where a measurement says it pays"
        for what, value, limit in limits
        if value > limit
    ]


def describe(one: Entry, compiled: Compiled) -> dict[str, object]:
    """An entry of index.json: what was compiled, what it uses, and on GPUs with known rates how its inner loop is bound."""
    record: dict[str, object] = {
        "name": one.name,
        "op": one.op,
        "target": compiled.target,
        "kernel": one.variant.name,
        "signature": one.variant.signature(),
        "constants": dict(one.variant.constants),
    }
    if compiled.resources is None:
        return record | {"error": compiled.error}
    record |= asdict(compiled.resources) | {"over_budget": over_budget(one, compiled)}
    architecture = TARGETS[compiled.target][1]
    if isinstance(architecture, int) and architecture in RATES:
        loop = analyse(compiled.binary, architecture, one.elements / one.variant.num_warps)
        record |= {
            "instructions_per_element": round(loop.instructions_per_element, 2),
            "cycles_per_element": round(loop.cycles_per_element, 4),
            "bound": loop.bound,
        }
    return record


def _compile_jobs(jobs: list[tuple[str, str]], workers: int) -> Iterator[Compiled]:
    if workers <= 1:
        yield from map(_compile_job, jobs)
        return
    # A fresh process each: a forked one would inherit torch's threads in an unknown state.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(_compile_job, jobs)


def _compile_job(job: tuple[str, str]) -> Compiled:
    name, target = job
    try:
        return Compiled(name, target, *compile_variant(entry(name).variant, target))
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # a jit function inside a kernel wraps what happened
            cause = cause.__cause__
        if isinstance(cause, OSError):  # a full disk, or a cache that can't be written: no kernel's fault
            raise OSError(cause.errno, cause.strerror, cause.filename or launch.triton.knobs.cache.dir) from None
        reason = str(cause).strip().splitlines() or [type(cause).__name__]
        return Compiled(
            name,
            target,
            error=f"{name} does not compile for {target}: {reason[-1]}. Compile it alone with "
            f"'detr-fast kernels --target {target}' and TRITON_CACHE_DIR at an empty folder, and mend the kernel or "
            "take the target from kernels/catalog.py",
        )


def _known(targets: Iterable[str]) -> list[str]:
    targets = list(targets)
    for target in targets:
        if target not in TARGETS:
            raise ValueError(f"unknown target {target!r}: choose from {', '.join(TARGETS)}")
    return targets


def _nvidia_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and spilled bytes a thread; a Triton kernel's stack holds nothing but spills."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        text = nvidia_tool("cuobjdump", "--dump-resource-usage", str(path))
    usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return usage["REG"], max(usage["STACK"], usage["LOCAL"])


def _amd_usage(assembly: str) -> tuple[int, int]:
    """Vector registers and spilled bytes a thread, from the metadata at the assembly's end."""
    figures = {key: int(value) for key, value in re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", assembly)}
    return figures["vgpr_count"], 4 * figures["vgpr_spill_count"]
