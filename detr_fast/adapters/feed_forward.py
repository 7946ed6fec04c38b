"""Feed-forward blocks that are a module of their own: Hugging Face's, timm's and torchvision's, by name.

Two linear layers with an activation and dropout between; the original's forward runs where a part is not plainly that.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Module

from detr_fast.adapters.base import (
    MARK,
    Adapter,
    Scriptable,
    joined,
    kind_of,
    public_name,
    why_not_fuse,
    why_not_switch,
)
from detr_fast.adapters.blocks import activation_name, feed_forward_of, is_dispatched, is_plain
from detr_fast.nn.bare import is_bare
from detr_fast.nn.blocks import FeedForwardParts, probability


class _Names(NamedTuple):
    """The attributes that hold a block's parts; dropouts are modules, numbers, or None where there is none."""

    first: str
    activation: str
    dropout: str | None
    second: str
    output_dropout: str | None


_DETR = _Names("fc1", "activation_fn", "activation_dropout", "fc2", "dropout")
_KNOWN = {
    "transformers.models.detr.modeling_detr.DetrMLP": _DETR,
    "transformers.models.conditional_detr.modeling_conditional_detr.ConditionalDetrMLP": _DETR,
    "transformers.models.vit.modeling_vit.ViTMLP": _Names("fc1", "activation_fn", None, "fc2", None),
    "timm.layers.mlp.Mlp": _Names("fc1", "act", "drop1", "fc2", "drop2"),
    "torchvision.models.vision_transformer.MLPBlock": _Names("0", "1", "2", "3", "4"),
}


class FeedForward(Scriptable):
    """The forward of a block; everything else is the class's that this is mixed into."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """As the original's, which runs for CPU tensors and where a part was wrapped or hooked since."""
        parts = parts_of(self) if is_dispatched(x) else None
        if parts is None:
            return super().forward(x)  # type: ignore[misc]
        y = feed_forward_of(x, parts)
        return F.dropout(y, parts.output_dropout_p) if parts.output_dropout_p else y


def parts_of(block: Any) -> FeedForwardParts | None:
    """The parts of a switched block; None where it has to be called."""
    if not isinstance(block, FeedForward) or not all(map(is_bare, block.children())):
        return None
    names = names_of(block)
    first, second = getattr(block, names.first), getattr(block, names.second)
    activation = activation_name(getattr(block, names.activation))
    if activation is None or not (is_plain(first) and is_plain(second)):
        return None
    inner, outer = (
        0.0 if name is None else probability(getattr(block, name), block.training)
        for name in (names.dropout, names.output_dropout)
    )
    return FeedForwardParts(first, activation, inner, second, outer)


def names_of(block: Module) -> _Names:
    """The attributes that hold the parts of a switched block."""
    kind = block.__dict__[MARK].original
    return _KNOWN[f"{kind.__module__}.{kind.__qualname__}"]


class FeedForwardBlocks(Adapter):
    """Exactly the classes in the table above; timm's may also normalise in between, which is left alone."""

    @classmethod
    def consider(cls, module: Module) -> type[Module] | str | None:
        kind = kind_of(module)
        parts = _KNOWN.get(f"{kind.__module__}.{kind.__qualname__}")
        if parts is None or isinstance(module, FeedForward):
            return None
        expected: dict[str, tuple[type[Module], ...]] = dict.fromkeys((parts.first, parts.second), (nn.Linear,))
        if (reason := why_not_switch(module) or why_not_fuse(module, expected)) is not None:
            return reason
        if activation_name(activation := getattr(module, parts.activation)) is None:
            name = getattr(activation, "__name__", "") or public_name(type(activation))
            return f"its activation {name} is none that the fused block knows"
        if not isinstance(getattr(module, "norm", _NOTHING), nn.Identity):
            return "it normalises between its two layers"
        return joined(FeedForward, kind, kind)

    @classmethod
    def describe(cls, replacement: type[Module]) -> str:
        return "detr_fast.ops.feed_forward"


_NOTHING = nn.Identity()
