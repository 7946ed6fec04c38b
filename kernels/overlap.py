"""A kernel that starts while the one before it still ends: CUDA's programmatic dependent launch, of sm_90 and newer.

A launch that allows it (`launch.overlapped`) may put its programs on the GPU as soon as all programs of the launch before run, or
have ended. So every kernel begins with `wait_for_previous()`: it waits until all that was launched before is done and seen, and then
lets the next launch come this near. What overlaps is the start of programs, and nothing that reads or writes a tensor. Launches
that don't allow it do not wait for anything here, and the two instructions cost a program next to nothing.
Source: CUDA C++ Programming Guide, "Programmatic Dependent Launch and Synchronization".
"""

from __future__ import annotations

from typing import Any

from .launch import triton


def capability(architecture: str) -> int:
    """NVIDIA's compute capability, times ten, of an architecture's name: 90 of "sm_90", and of Triton's "sm90"; 0 of another maker's."""
    number = architecture.removeprefix("sm").removeprefix("_")
    return int(number) if architecture[:2] == "sm" and number.isdigit() else 0


def is_able(architecture: str) -> bool:
    """Whether launches can overlap on a GPU of this architecture."""
    return capability(architecture) >= 90


def wait_for_previous(_semantic: Any = None) -> None:
    """The first thing that a kernel does. In Triton's interpreter, and where GPUs can't, nothing."""
    if _semantic is not None and is_able(str(getattr(_semantic.builder.options, "arch", ""))):
        from triton.language.extra import cuda

        cuda.gdc_wait(_semantic=_semantic)
        cuda.gdc_launch_dependents(_semantic=_semantic)


if triton is not None and not triton.knobs.runtime.interpret:
    wait_for_previous = triton.language.core.builtin(wait_for_previous)
