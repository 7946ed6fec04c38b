"""What `tune` measures of `ops.cast_together`: weights of as many layers of a transformer, and 3×3 convolutions, in bf16 and back."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch
from torch import Tensor

from detr_fast.ops.cast_together import cast_together
from detr_fast.ops.optimizer_cases import shapes


def shapes_of(layers: int, width: int, hidden: int) -> list[tuple[int, ...]]:
    return shapes(layers, width, hidden) + [(width, width, 3, 3)] * layers


def elements_of(layers: int, width: int, hidden: int) -> int:
    return sum(map(prod, shapes_of(layers, width, hidden)))


def cast_step(
    device: torch.device, layers: int, width: int, hidden: int, gradients: bool = True
) -> Callable[[], tuple[Tensor, ...]]:
    """What a training step does to weights and, as if they were gradients, back."""
    weights = [torch.randn(shape, device=device) for shape in shapes_of(layers, width, hidden)]

    def step() -> tuple[Tensor, ...]:
        cast = cast_together(weights, torch.bfloat16, channels_last=True)
        return (*cast, *cast_together(cast, torch.float32))

    return step
