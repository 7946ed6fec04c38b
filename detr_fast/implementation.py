"""What an implementation of an op declares, and the call that it is asked about."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from detr_fast.kernels import launch
from detr_fast.situation import Situation

NEVER = 1 << 62  # beyond any size

# Whether kernels run in Triton's interpreter, on the CPU: TRITON_INTERPRET=1 was set when Python started.
INTERPRETING: bool = launch.triton is not None and bool(launch.triton.knobs.runtime.interpret)


@dataclass(frozen=True)
class Call:
    """One call as its implementations see it; every op adds its own fields."""

    device: torch.device
    architecture: str | None  # "sm_90", "gfx942"; None on a CPU
    dtype: torch.dtype
    tensor_type: type
    needs_grad: bool
    situation: Situation

    @property
    def device_type(self) -> str:
        return self.device.type

    def shapes(self) -> str:
        """The call's sizes, as `explain` prints them."""
        return ""


class Implementation(ABC):
    """One way to compute an op. Capability is data, reasons are strings, and nothing else decides."""

    name: ClassVar[str]
    devices: ClassVar[frozenset[str] | None] = None  # None: any
    dtypes: ClassVar[frozenset[torch.dtype] | None] = None
    plain: ClassVar[bool] = False  # True: neither tensor subclasses nor transforms (vmap, export, …)

    def why_not(self, call: Any) -> str | None:
        """The reason why this implementation can't take the call, in words a user can act on."""
        return None

    def advice(self, call: Any) -> str | None:
        """Why this implementation, though able, should not be picked by `auto`: it was measured slower, or never."""
        return None

    def why_not_instead(self, call: Any) -> str | None:
        """The reason why this implementation can't stand in for a kernel that failed to compile."""
        return None

    def least(self, architecture: str | None, *kind: Any) -> int:
        """The size below which `advice` is against it in all calls (of a kind) on such a device that are launched eagerly."""
        return 0

    def note(self, call: Any) -> str | None:
        """A remark for `explain` when this implementation is chosen."""
        return None

    def prepare(self, call: Any) -> None:
        """Compile all that forward and backward of such a call will launch; raise if that fails."""
        return None

    def compiled_key(self, call: Any) -> Any:
        """What of the call the compiled programs depend on; one that failed to compile is not tried again for it."""
        return call

    @abstractmethod
    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the op."""


class TritonImplementation(Implementation):
    """What all Triton kernels have in common."""

    name = "triton"
    dtypes = frozenset({torch.float16, torch.bfloat16, torch.float32})
    plain = True
    oldest_capability: ClassVar[int] = 80
    capabilities: ClassVar[frozenset[int]] = frozenset({80, 86, 87, 89, 90, 100, 103, 120, 121})
    amd: ClassVar[frozenset[str]] = frozenset({"gfx90a", "gfx942", "gfx950"})

    def refusal(self, call: Call, by_name: bool) -> str | None:
        """The reasons that hold for every Triton kernel.

        When asked by name, it takes CPU tensors in Triton's interpreter, and meta tensors (nothing runs; for counting).
        """
        if launch.triton is None:
            return launch.TRITON_MISSING
        elsewhere = call.device_type == "meta" or (call.device_type == "cpu" and INTERPRETING)
        if call.device_type != "cuda" and not (by_name and elsewhere):
            return f"tensors on {call.device_type}: Triton kernels run on GPUs"
        arch = call.architecture
        if arch is None or arch in self.amd:
            return None
        if arch.startswith("gfx"):
            return f"{arch} is not among the AMD GPUs that the kernels are built for ({', '.join(sorted(self.amd))})"
        capability = int(arch.removeprefix("sm_"))
        if capability < self.oldest_capability:
            return f"{arch} is older than sm_{self.oldest_capability}"
        if capability not in self.capabilities:  # the compiler would not fail: it would end the process
            return f"{arch} is newer than this detr-fast: it knows {', '.join(f'sm_{c}' for c in sorted(self.capabilities))}"
        return None


class Parts(Implementation):
    """Stands in a record where an op's parts run one by one, each with a record of its own."""

    name = "its parts"

    def run(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("parts are run by whoever asked")


PARTS = Parts()
