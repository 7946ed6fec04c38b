"""torch.nn's LayerNorm, RMSNorm, MultiheadAttention and Transformer classes."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import nn
from torch.nn import Module
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

import detr_fast.nn as ours
from detr_fast.adapters.base import Adapter, fingerprint, joined, overriding, public_name, why_not_fuse, why_not_switch
from detr_fast.nn.replacements import REPLACEMENTS

_Parts = dict[str, tuple[type[Module], ...]]
_NORM = (nn.LayerNorm, ours.LayerNorm)
_ATTENTION = (nn.MultiheadAttention, ours.MultiheadAttention)
_LAYER: _Parts = {
    "self_attn": _ATTENTION,
    "multihead_attn": _ATTENTION,
    "linear1": (nn.Linear,),
    "linear2": (nn.Linear,),
    **dict.fromkeys(("norm1", "norm2", "norm3"), _NORM),
    **dict.fromkeys(("dropout", "dropout1", "dropout2", "dropout3"), (nn.Dropout,)),
}
_PARTS: dict[type[Module], _Parts] = {
    nn.MultiheadAttention: {"out_proj": (nn.Linear, NonDynamicallyQuantizableLinear)},
    nn.TransformerEncoderLayer: _LAYER,
    nn.TransformerDecoderLayer: _LAYER,
}
_OURS = frozenset(REPLACEMENTS.values())
# Forwards around torch.nn's own, which they call by super(): of images with channels first or last (ConvNeXt's and its copies in
# transformers), and of ESM C's.
_AROUND = {"2f0a31bdc64f630a", "965cc98b95a32e21"}


class TorchNN(Adapter):
    """Exactly torch.nn's classes, and subclasses that keep its forward, or are known to call it."""

    @classmethod
    def consider(cls, module: Module) -> type[Module] | str | None:
        original = next((base for base in type(module).__mro__ if base in REPLACEMENTS), None)
        if original is None or isinstance(module, REPLACEMENTS[original]):
            return None
        reason = why_not_switch(module) or why_not_fuse(module, _PARTS.get(original, {}))
        if reason is not None:
            return reason
        kind = type(module)
        if kind is original:
            return REPLACEMENTS[original]
        if kind.__module__.startswith("torch.ao."):
            return "it is quantised (torch.ao)"
        other: Any = overriding(module, original)
        if other is not None and not _calls_original(other):
            return f"{other.__name__} overrides forward of torch.nn.{original.__name__}"
        return joined(kind, REPLACEMENTS[original], kind)

    @classmethod
    def describe(cls, replacement: type[Module]) -> str:
        return public_name(next(one for one in replacement.__mro__ if one in _OURS))


@cache
def _calls_original(kind: Any) -> bool:
    """Whether a class' forward is one that calls torch.nn's, and finds ours in its place where that is behind it."""
    return fingerprint(kind.forward) in _AROUND
