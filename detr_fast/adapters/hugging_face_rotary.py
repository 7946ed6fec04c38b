"""Attentions of transformers that turn queries and keys by a function that `rotary_functions` knows: their own code, which finds another.

What else is true of attentions that ask transformers' registry holds for them, too.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

from torch.nn import Module

from detr_fast.adapters.base import MARK, Mark, Scriptable, joined, kind_of, names_used, why_not_switch, with_globals
from detr_fast.adapters.hugging_face import HuggingFaceAttention
from detr_fast.adapters.rotary_functions import place_of


class RotaryAttention(Scriptable):
    """A module whose forward calls such functions."""

    _detr_fast_forward: Callable[..., Any]

    @classmethod
    def attributes_for(cls, original: type[Module]) -> dict[str, Any]:
        return {"_detr_fast_forward": with_globals(original.forward, _places(original.forward))}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._detr_fast_forward(*args, **kwargs)


class LoneRotaryAttention(RotaryAttention):
    """One whose attention stays transformers', as its model does not run on SDPA."""


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
            return "detr_fast.ops.rotary_embedding (its model does not run on SDPA: the rest stays transformers')"
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


def _places(forward: Any) -> dict[str, Any]:
    """By its name in a forward's code, what takes a function's place."""
    if not isinstance(forward, FunctionType) or hasattr(forward, "__wrapped__"):
        return {}
    named = ((name, forward.__globals__.get(name)) for name in sorted(names_used(forward)) if "rot" in name)
    places = ((name, place_of(function)) for name, function in named if isinstance(function, FunctionType))
    return {name: place for name, place in places if place is not None}
