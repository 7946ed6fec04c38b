"""What a measurement of `tune` is made of: cases, groups of them, and steps that make their results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from detr_fast.ops import regimes
from detr_fast.ops.attention_atomics import measured_with_atomics

Step = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """One size of an op.

    Attributes:
        text, size: for the reader, and as `advice` counts it.
        make: makes the step on a device, which returns the results and, with `gradients`, those of all leaves.
        other: the implementation that `auto` would take at this size without the kernel.
        checked: makes the step whose results are compared where that is another, without dropout.
    """

    text: str
    size: int
    make: Callable[..., Step]
    other: str = "eager"
    checked: Callable[..., Step] | None = None


@dataclass(frozen=True)
class Group:
    """Cases of one `Regime`, named as the op's `advice` looks it up, or of two.

    Without gradients, as in inference, the measurements have a name of their own.

    Attributes:
        kernel: the implementation that is measured.
        atomics: whether attention's kernel with that backward is measured, too, for a `Regime` of its own.
        tolerance: how far results may be apart, as a share of the right one's norm.
        repeats: whether a timed step gives the same each time.
        graphs_only: whether the kernel is for CUDA graphs alone, and nothing launched eagerly is timed.
    """

    op: str
    cases: tuple[Case, ...]
    name: str = ""
    gradients: bool = True
    kernel: str = "triton"
    atomics: bool = False
    tolerance: float = 2e-2
    repeats: bool = True
    graphs_only: bool = False

    @property
    def regime(self) -> str:
        name = self.name or self.op
        return name if self.gradients else regimes.inference(name)

    @property
    def ours(self) -> dict[str, str]:
        """The implementations that are measured, each beside all before it: their regimes' names."""
        return {self.kernel: self.regime} | (
            {"triton_atomics": measured_with_atomics(self.regime)} if self.atomics else {}
        )


def draw(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(shape, device=device).to(torch.bfloat16).requires_grad_()


def draw_weight(device: torch.device, rows: int, columns: int) -> Tensor:
    return (columns**-0.5 * torch.randn(rows, columns, device=device)).to(torch.bfloat16).requires_grad_()


def step_of(function: Callable[..., Any], leaves: Sequence[Tensor], gradients: bool) -> Step:
    """The results of `function`, a tensor or several, and the gradients of all leaves."""

    @torch.no_grad()
    def inference() -> tuple[Tensor, ...]:
        y = function(*leaves)
        return y if isinstance(y, tuple) else (y,)

    if not gradients:
        return inference
    upstream = [torch.randn_like(y) for y in inference()]

    def training() -> tuple[Tensor, ...]:
        y = function(*leaves)
        y = y if isinstance(y, tuple) else (y,)
        return (*y, *torch.autograd.grad(y, leaves, upstream))

    return training


def call_step(make: Callable[..., Step], size: Sequence[Any], device: torch.device, gradients: bool = True) -> Step:
    """A case's step, of what makes it and its size, device and gradients come last."""
    return make(device, *size, gradients=gradients)
