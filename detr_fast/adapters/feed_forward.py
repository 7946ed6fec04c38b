"""Feed-forward blocks that are a module of their own: Hugging Face's, timm's and torchvision's, by name.

Two linear layers with an activation and dropout between; the original's forward runs where a part is not plainly that.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Module

from detr_fast import dispatch
from detr_fast.adapters.base import HOOKS, Adapter, joined, why_not_fuse, why_not_switch
from detr_fast.ops.feed_forward import feed_forward


class _Parts(NamedTuple):
    """The attributes that hold a block's parts; dropouts are modules, numbers, or None where there is none."""

    first: str
    activation: str
    dropout: str | None
    second: str
    output_dropout: str | None


_DETR = _Parts("fc1", "activation_fn", "activation_dropout", "fc2", "dropout")
_KNOWN = {
    "transformers.models.detr.modeling_detr.DetrMLP": _DETR,
    "transformers.models.conditional_detr.modeling_conditional_detr.ConditionalDetrMLP": _DETR,
    "transformers.models.vit.modeling_vit.ViTMLP": _Parts("fc1", "activation_fn", None, "fc2", None),
    "timm.layers.mlp.Mlp": _Parts("fc1", "act", "drop1", "fc2", "drop2"),
    "torchvision.models.vision_transformer.MLPBlock": _Parts("0", "1", "2", "3", "4"),
}


class FeedForward(Module):
    """The forward of a block; everything else is the class's that this is mixed into."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """As the original's, which runs for CPU tensors and where a part was wrapped or hooked since."""
        order = type(self).__mro__
        kind = order[order.index(FeedForward) + 1]  # the class that this is mixed into
        parts = _KNOWN[f"{kind.__module__}.{kind.__qualname__}"]
        first, second = getattr(self, parts.first), getattr(self, parts.second)
        activation = activation_name(getattr(self, parts.activation))
        intact = _plain(first) and _plain(second) and not any(map(_is_hooked, self.children()))
        if activation is None or not intact or not (dispatch.intervening or x.is_cuda is not False):
            return super().forward(x)  # type: ignore[misc]
        inner, outer = (_probability(self, name) for name in (parts.dropout, parts.output_dropout))
        y = feed_forward(x, first.weight, first.bias, second.weight, second.bias, activation, inner)
        return F.dropout(y, outer) if outer else y


def activation_name(activation: Any) -> str | None:
    """The op's name for an activation module or function; None for another one."""
    kind = type(activation).__name__
    if kind == "GELU":
        return "gelu" if activation.approximate == "none" else "gelu_tanh"
    if kind == "GELUActivation":  # transformers'
        return "gelu" if activation.act is F.gelu else None
    return {"ReLU": "relu", "SiLU": "silu", "SiLUActivation": "silu", "GELUTanh": "gelu_tanh"}.get(kind)


def _plain(linear: Module) -> bool:
    return type(linear) is nn.Linear and "forward" not in linear.__dict__


def _is_hooked(part: Module) -> bool:
    return any(getattr(part, hooks) for hooks in HOOKS)


def _probability(block: Module, name: str | None) -> float:
    if name is None or not block.training:
        return 0.0
    value: Any = getattr(block, name)
    return float(value.p if isinstance(value, nn.Dropout) else value)


class FeedForwardBlocks(Adapter):
    """Exactly the classes in the table above; timm's may also normalise in between, which is left alone."""

    @classmethod
    def consider(cls, module: Module) -> type[Module] | str | None:
        kind = type(module)
        parts = _KNOWN.get(f"{kind.__module__}.{kind.__qualname__}")
        if parts is None or isinstance(module, FeedForward):
            return None
        expected: dict[str, tuple[type[Module], ...]] = dict.fromkeys((parts.first, parts.second), (nn.Linear,))
        if (reason := why_not_switch(module) or why_not_fuse(module, expected)) is not None:
            return reason
        if activation_name(getattr(module, parts.activation)) is None:
            return (
                f"its activation {type(getattr(module, parts.activation)).__name__} is none that the fused block knows"
            )
        if not isinstance(getattr(module, "norm", _NOTHING), nn.Identity):
            return "it normalises between its two layers"
        return joined(FeedForward, kind, kind)

    @classmethod
    def describe(cls, replacement: type[Module]) -> str:
        return "detr_fast.ops.feed_forward"


_NOTHING = nn.Identity()
