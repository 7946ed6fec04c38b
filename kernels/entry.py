"""What a kernel file says of each variant that it ships: see `catalog`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .launch import Variant

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

# Makes small inputs on a device, and returns a call that launches an entry's variant (among others) on them.
Example = Callable[[torch.device], Callable[[], tuple[Tensor, ...]]]


@dataclass(frozen=True)
class Budget:
    """The most that a variant may use, on any NVIDIA target and on any AMD one: registers a thread, bytes a program.

    large_shared: shared memory on sm_80, sm_90 and sm_100, which have 163 KiB a program or more; 0: as `shared`.
    """

    registers: int
    shared: int
    amd_registers: int
    amd_shared: int
    spills: int = 0
    amd_spills: int = 0
    large_shared: int = 0


@dataclass(frozen=True)
class Entry:
    """A variant that ships: its op, a name unique in the catalog, and the elements that one program's tile covers.

    example: a call of the family's launchers that launches it. On a GPU the sanitizers, CUDA graphs, the check for host
    synchronisations and the profile run it; elsewhere it proves that the catalog lists what calls launch. It must also
    take the devices "cpu" (Triton's interpreter: a few programs) and "meta" (nothing runs).
    targets: those that launch it; None: all.
    """

    op: str
    name: str
    variant: Variant
    elements: int
    budget: Budget
    example: Example = field(compare=False)
    targets: tuple[str, ...] | None = None

    def is_for(self, target: str) -> bool:
        return self.targets is None or target in self.targets
