"""A moving average of a model's weights, which usually detects better than the weights themselves."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class ExponentialMovingAverage:
    """Holds `module`, a copy of `model` that follows it: average += (1 - decay) * (weight - average), buffers likewise.

    The decay grows with the steps up to its final value, min(decay, (1 + step) / (10 + step)), so that the random start
    is forgotten in short runs too (as in TensorFlow's ExponentialMovingAverage). Integer buffers are copied. Nothing
    waits for the device.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.module = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int | Tensor) -> None:
        """Follow `model`, which has just taken step number `step`; a tensor on the device in a CUDA graph, as steps go on."""
        own, new = self.module.state_dict(), model.state_dict()
        floats = [name for name, value in own.items() if value.is_floating_point()]
        averages, weights = [own[n] for n in floats], [new[n] for n in floats]
        if isinstance(step, Tensor):
            share = 1 - ((1 + step) / (10 + step)).clamp(max=self.decay)
            difference = torch._foreach_sub(weights, averages)
            torch._foreach_mul_(difference, share)
            torch._foreach_add_(averages, difference)
        else:
            torch._foreach_lerp_(averages, weights, 1 - min(self.decay, (1 + step) / (10 + step)))
        for name in own.keys() - set(floats):
            own[name].copy_(new[name])
