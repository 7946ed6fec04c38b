"""Losses that add up on the device and are read every so many steps; what went wrong on the device surfaces there."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from detr_fast.engine.errors import TrainingDiverged
from detr_fast.models.structures import TargetError

FLAGS = ("broken_predictions", "broken_targets")


class DeviceMetrics:
    """Sums of scalars, kept on a device in one tensor that never moves, so that a CUDA graph can add to it.

    Args:
        names: of the scalars, in the order that `read` returns.
        device: where they are.
    """

    def __init__(self, names: Sequence[str], device: torch.device | str) -> None:
        self.names = tuple(names)
        self._sums = torch.zeros(len(self.names) + 1, device=device)  # the last one counts the steps

    @torch.no_grad()
    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add one step's scalars; what is not among the names is left out. Waits for nothing."""
        own = [values[name].detach().to(self._sums.dtype) for name in self.names]
        self._sums += torch.stack([*own, torch.ones_like(self._sums[0])])

    def read(self) -> dict[str, float]:
        """The means since the last read, by one copy from the device; NaN where there was no step."""
        *sums, steps = self._sums.tolist()
        self._sums.zero_()
        return {name: value / steps if steps else math.nan for name, value in zip(self.names, sums)}


def raise_for_flags(means: Mapping[str, float], steps: str, advice: str) -> None:
    """Turn what the criterion counted on the device, and a loss that is no number, into one clear error.

    Args:
        means: as `DeviceMetrics.read` returns them, with "loss" and the criterion's flags.
        steps: which steps they are of, such as "steps 11 to 20".
        advice: what to do where the loss or the predictions are not finite.

    Raises:
        TargetError: true boxes or labels out of range came to the device.
        TrainingDiverged: a loss or a prediction is NaN or infinite.
    """
    if means.get("broken_targets", 0.0) > 0:
        raise TargetError(
            f"{steps} had true boxes outside [0, 1], without area, or with a label out of range: "
            f"{means['broken_targets']:g} a step on average; run 'detr-fast doctor' on the data, and build targets with "
            "Targets.from_list, which names the image"
        )
    if not math.isfinite(means["loss"]) or means.get("broken_predictions", 0.0) > 0:
        broken = means.get("broken_predictions", 0.0)
        what = f", and {broken:g} predictions a step are NaN or infinite" if broken else ""
        raise TrainingDiverged(f"the loss of {steps} is not finite{what}; {advice}")
