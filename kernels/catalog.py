"""Every kernel variant that ships, as data, with its budget of registers and shared memory.

One list serves offline compilation in tests, `detr-fast kernels`, the static report and the GPU run. Variants come from
the functions that launches use, so what is compiled here is what runs there. The list is a cover, not an enumeration:
each kernel in each dtype and each way of reading memory at the model's usual width, and the extremes of the width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from . import layer_norm
from .launch import TRITON_TYPES, Variant

# What Triton compiles for: backend, architecture, threads a warp.
TARGETS: dict[str, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_86": ("cuda", 86, 32),
    "sm_89": ("cuda", 89, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "sm_120": ("cuda", 120, 32),
    "gfx90a": ("hip", "gfx90a", 64),
    "gfx942": ("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Budget:
    """The most that a variant may use, on any NVIDIA target and on any AMD one: registers a thread, bytes a program."""

    registers: int
    shared: int
    amd_registers: int
    amd_shared: int
    spills: int = 0


@dataclass(frozen=True)
class Entry:
    """A variant that ships: its op, a name unique in the catalog, and the elements that one program's tile covers."""

    op: str
    name: str
    variant: Variant
    elements: int
    budget: Budget


def entries(op: str | None = None) -> tuple[Entry, ...]:
    """All entries, or those of one op; ValueError where there is no such op."""
    found = tuple(entry for entry in CATALOG if op in (None, entry.op))
    if not found:
        known = ", ".join(sorted({entry.op for entry in CATALOG}))
        raise ValueError(f"no op {op!r} in the kernel catalog: choose one of {known}")
    return found


def entry(name: str) -> Entry:
    """The entry of that name."""
    return next(one for one in CATALOG if one.name == name)


def _layer_norm() -> Iterator[Entry]:
    fp16, bf16, fp32 = torch.float16, torch.bfloat16, torch.float32
    forward, narrow, wide = Budget(144, 64, 88, 64), Budget(208, 4096, 152, 4096), Budget(255, 8192, 168, 16384)
    total_budget = Budget(96, 512, 56, 1024)
    # columns, x's dtype, the parameters' dtype, y's dtype, whether all is aligned, the backward's budget
    rows = (
        (256, fp16, fp16, fp16, True, narrow),
        (256, bf16, bf16, bf16, True, narrow),
        (256, fp32, fp32, fp32, True, wide),
        (256, bf16, fp32, fp32, True, wide),  # autocast
        (768, bf16, bf16, bf16, True, wide),  # columns masked in whole runs
        (100, fp32, None, fp32, False, narrow),  # nothing aligned, no parameters
        (8192, bf16, bf16, bf16, True, wide),
        (8192, fp32, fp32, fp32, True, wide),
    )
    for columns, x, parameters, y, aligned, backward_budget in rows:
        vector = 16 // x.itemsize if aligned else 1
        affine = parameters is not None
        ahead = layer_norm.forward_variant(columns, x, parameters, parameters, y, vector)
        back = layer_norm.backward_variant(columns, y, x, parameters, True, affine, affine, vector)
        suffix = f"c{columns}_{TRITON_TYPES[x]}" + ("_autocast" if y != x else "") + ("" if aligned else "_unaligned")
        yield Entry("layer_norm", f"layer_norm_forward_{suffix}", ahead, _tile(ahead), forward)
        yield Entry("layer_norm", f"layer_norm_backward_{suffix}", back, _tile(back), backward_budget)
    for columns, dtype in ((256, bf16), (8192, fp32)):
        total = layer_norm.sum_partials_variant(columns, dtype)
        name = f"layer_norm_sum_partials_c{columns}_{TRITON_TYPES[dtype]}"
        yield Entry("layer_norm", name, total, _tile(total), total_budget)


def _tile(variant: Variant) -> int:
    return int(variant.constants["ROWS"]) * int(variant.constants["BLOCK_C"])


CATALOG: tuple[Entry, ...] = (*_layer_norm(),)
