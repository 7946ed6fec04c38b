"""Positions of pixels in transformers' detectors and segmenters, by sines and cosines: one launch in place of some 28.

Known by all of their code. Without a mask theirs are the same for every batch and kept, so there they stay.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from detr_fast import ops
from detr_fast.adapters.base import Adapter, Scriptable, fingerprint, joined, kind_of, why_not_bypass, why_not_switch
from detr_fast.adapters.blocks import is_dispatched

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _are_taken(mask: Any) -> bool:
    return is_dispatched(mask) and mask.dtype == torch.bool and mask.ndim == 3


class OfAShape(Scriptable):
    """DETR's, Deformable DETR's, MaskFormer's, SAM's and others': for features of a shape, in a dtype, computed in fp32."""

    shift = 0.0

    def forward(self: Any, shape: Any, device: Any, dtype: torch.dtype, mask: Any = None) -> Tensor:
        if not _are_taken(mask) or dtype not in _DTYPES:
            found: Tensor = super().forward(shape, device, dtype, mask)  # type: ignore[misc]
            return found
        kind = {"normalize": bool(self.normalize), "scale": self.scale, "shift": self.shift}
        settings = (self.num_position_features, self.temperature)
        return ops.sine_positions(mask, *settings, **kind, padding=False, dtype=dtype).permute(0, 3, 1, 2)


class Shifted(OfAShape):
    """Deformable DETR's, which measures to the pixel's middle."""

    shift = -0.5


class OfAMask(Scriptable):
    """Grounding DINO's and Table Transformer's, in fp32."""

    def forward(self: Any, pixel_values: Tensor, pixel_mask: Tensor) -> Tensor:
        if not _are_taken(pixel_mask):
            found: Tensor = super().forward(pixel_values, pixel_mask)  # type: ignore[misc]
            return found
        kind = {"normalize": bool(getattr(self, "normalize", True)), "scale": self.scale, "padding": False}
        return ops.sine_positions(pixel_mask, self.embedding_dim, self.temperature, **kind).permute(0, 3, 1, 2)


_FORWARD = "e4cb5578a7012a3a"  # of those with a function that builds positions
_BUILDING = {"7d200f81c6f30c86": OfAShape, "f5072022554e1d3f": Shifted}
_OF_A_MASK = ("8bfaa6189fba36d6", "19c7321385c69e10")


class SinePositions(Adapter):
    """Modules with that code."""

    @classmethod
    def consider(cls, module: Module) -> type[Module] | str | None:
        kind: Any = kind_of(module)
        mixin = _mixin(kind)
        if mixin is None or isinstance(module, (OfAShape, OfAMask)):
            return None
        return why_not_switch(module) or why_not_bypass(module, mixin) or joined(mixin, kind, kind)

    @classmethod
    def describe(cls, replacement: type[Module]) -> str:
        return "detr_fast.ops.sine_positions"


@cache
def _mixin(kind: Any) -> type[Module] | None:
    if not kind.__module__.startswith("transformers.") or "Sine" not in kind.__name__:
        return None
    forward, build = fingerprint(kind.forward), getattr(kind, "build_sine_position_embedding", None)
    if forward == _FORWARD:
        return _BUILDING.get(fingerprint(build) or "")
    return OfAMask if forward in _OF_A_MASK else None
