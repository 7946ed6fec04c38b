"""Attentions of transformers that turn queries and keys by a function that `rotary_functions` knows: their own code, which finds another.

What else is true of attentions that ask transformers' registry holds for them, too.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

from torch.nn import Module

from detr_fast.adapters.base import (
    MARK,
    Followed,
    Following,
    Mark,
    Scriptable,
    joined,
    kind_of,
    names_used,
    why_not_switch,
)
from detr_fast.adapters.hugging_face import HuggingFaceAttention
from detr_fast.adapters.rotary_functions import place_of


class RotaryAttention(Followed):
    """A module whose forward calls such functions."""

    @classmethod
    def attributes_for(cls, original: type[Module]) -> dict[str, Any]:
        return cls.as_attributes(original, Following(original.forward, _place_of, _places(original.forward)))


class LoneRotaryAttention(RotaryAttention):
    """One whose attention stays transformers', as `HuggingFaceAttention` says why."""


class HuggingFaceRotary(HuggingFaceAttention):
    """Such modules, which also run on our attention where they ask transformers' registry for one."""

    @classmethod
    def consider(cls, module: Module) -> type[Module] | str | None:
        kind = kind_of(module)
        known = not isinstance(module, Scriptable) and kind.__module__.startswith("transformers.")
        if not known or not _places(kind.forward):
            return None
        if (reason := why_not_switch(module)) is not None:
            return reason
        lone = isinstance(super().consider(module), str)
        return joined(LoneRotaryAttention if lone else RotaryAttention, kind, kind)

    @classmethod
    def describe(cls, replacement: type[Module]) -> str:
        if issubclass(replacement, LoneRotaryAttention):
            reason = cls.why_never(replacement) or "its model does not run on SDPA"
            return f"detr_fast.ops.rotary_embedding ({reason}: the rest stays transformers')"
        attention = ", detr_fast.ops.attention (transformers' registry)" if _asks(replacement.__bases__[-1]) else ""
        return "detr_fast.ops.rotary_embedding" + attention

    @classmethod
    def switched(cls, module: Module) -> None:
        if _asks(_original(module)) and not isinstance(module, LoneRotaryAttention):
            super().switched(module)

    @classmethod
    def again(cls, module: Module) -> str | None:
        original = _original(module)
        reason = super().again(module) if _asks(original) else None
        lone = isinstance(module, LoneRotaryAttention) and type(module) is kind_of(module)
        if lone and reason is None:
            module.__class__ = joined(RotaryAttention, original, original)  # its model runs on SDPA since
            cls.switched(module)
        return reason

    @classmethod
    def restored(cls, module: Module) -> None:
        if _asks(kind_of(module)):
            super().restored(module)


def _original(module: Module) -> type[Module]:
    mark: Mark = module.__dict__[MARK]
    return mark.original


def _asks(kind: type[Module]) -> bool:
    """Whether modules of a class ask transformers' registry for an attention."""
    return "ALL_ATTENTION_FUNCTIONS" in names_used(kind.forward)


def _places(forward: Any) -> list[str]:
    """Under which names a forward's code finds functions that something takes the place of."""
    if not isinstance(forward, FunctionType) or hasattr(forward, "__wrapped__"):
        return []
    named = [name for name in sorted(names_used(forward)) if "rot" in name]
    return [name for name in named if _place_of(forward.__globals__.get(name)) is not None]


def _place_of(function: Any) -> Callable[..., Any] | None:
    return place_of(function) if isinstance(function, FunctionType) else None
