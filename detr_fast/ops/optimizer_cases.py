"""What `tune` measures of `ops.optimizer_step`: AdamW with clipping, of as many parameters as some layers of a transformer have."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch
from torch import Tensor

from detr_fast.ops.optimizer_step import optimizer_step

MAX_NORM = 0.1


def shapes(layers: int, width: int, hidden: int) -> list[tuple[int, ...]]:
    """Weights and biases by turns, as an encoder's layers have them, norms included."""
    of_weights: list[tuple[int, ...]] = [(3 * width, width), (width, width), (hidden, width), (width, hidden)]
    layer = [shape for weight in of_weights for shape in (weight, weight[:1])] + [(width,)] * 4
    return layer * layers


def bytes_of(layers: int, width: int, hidden: int) -> int:
    return 4 * sum(map(prod, shapes(layers, width, hidden)))


def adamw(given: list[Tensor], gradients: list[Tensor]) -> tuple[torch.optim.Optimizer, list[Tensor]]:
    """An optimizer that a CUDA graph takes, and its parameters, which are leaves with those gradients."""
    parameters = [t.detach().clone().requires_grad_() for t in given]
    for parameter, gradient in zip(parameters, gradients):
        parameter.grad = gradient.clone()
    optimizer = torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1, fused=True, capturable=True)
    optimizer._warned_capturable_if_run_uncaptured = True  # type: ignore[attr-defined]  # of steps launched eagerly, too
    return optimizer, parameters


def timed_step(
    device: torch.device, layers: int, width: int, hidden: int, gradients: bool = True
) -> Callable[[], tuple[Tensor, ...]]:
    """Steps one behind the other, by the same gradients; each gives the first parameter."""
    drawn = [torch.randn(shape, device=device) for shape in shapes(layers, width, hidden)]
    optimizer, parameters = adamw(drawn, drawn)

    def step() -> tuple[Tensor, ...]:
        optimizer_step(optimizer, parameters, MAX_NORM)
        return (parameters[0].detach(),)

    return step


def checked_step(
    device: torch.device, layers: int, width: int, hidden: int, gradients: bool = True
) -> Callable[[], tuple[Tensor, ...]]:
    """Two steps from the same start: parameters and moments after them."""
    of = shapes(layers, width, hidden)
    drawn, arriving = ([torch.randn(shape, device=device) for shape in of] for _ in range(2))

    def step() -> tuple[Tensor, ...]:
        optimizer, parameters = adamw(drawn, arriving)
        for _ in range(2):
            for parameter, gradient in zip(parameters, arriving):  # PyTorch's clipping wrote to the last one
                parameter.grad = gradient.clone()
            optimizer_step(optimizer, parameters, MAX_NORM)
        moments = [optimizer.state[p][name] for p in parameters for name in ("exp_avg", "exp_avg_sq")]
        return (*(p.detach() for p in parameters), *moments)

    return step
