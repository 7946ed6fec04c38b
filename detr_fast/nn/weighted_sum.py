"""The sum of losses, each times its weight, in one pass and without the host waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

MAX_WEIGHTS = 16  # sets of weights that are kept on a device


class WeightedSum:
    """`total(values, weights)`: the scalar to call backward on, of scalars and as many numbers."""

    def __init__(self) -> None:
        self._known: dict[Any, Tensor] = {}
        self._in_graphs: dict[int, Tensor] = {}

    def __call__(self, values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        stacked = torch.stack(list(values))
        return torch.dot(stacked, self._on_device(tuple(weights), stacked))

    def _on_device(self, weights: tuple[float, ...], like: Tensor) -> Tensor:
        """The weights as a tensor, made once: each time, the host would wait for the copy."""
        key = weights, like.device, like.dtype
        if (known := self._known.get(key)) is not None:
            if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
                self._in_graphs[id(known)] = known  # which read its memory at each replay
            return known
        with torch.inference_mode(False):
            made = like.new_tensor(weights)
        if type(like) is Tensor and not torch.compiler.is_compiling():  # a fake tensor would outlive its mode
            if len(self._known) >= MAX_WEIGHTS:  # weights that follow a schedule
                self._known.clear()
            self._known[key] = made
        return made

    def __getstate__(self) -> dict[str, Any]:
        return {"_known": {}, "_in_graphs": {}}  # what is kept is of this process
