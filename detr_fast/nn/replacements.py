"""Which class of ours replaces which class of torch.nn: the one table that containers and `accelerate` read."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

from torch.nn import Module

REPLACEMENTS: dict[type[Module], type[Module]] = {}

M = TypeVar("M", bound=type[Module])


def replaces(original: type[Module]) -> Callable[[M], M]:
    """Class decorator: enter a subclass of `original` into the table."""

    def register(ours: M) -> M:
        REPLACEMENTS[original] = ours

        def prepare_scriptable(self: Any) -> Any:
            # TorchScript compiles neither super() nor the dispatcher: it gets the original, on the same parameters.
            return as_class(self, original) if type(self) is ours else self

        ours.__prepare_scriptable__ = prepare_scriptable  # type: ignore[attr-defined]
        return ours

    return register


def as_class(module: Module, kind: type[Module]) -> Module:
    """The same module, on the same parameters, as another class."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    twin.__class__ = kind
    return twin


def converts_children(container: M) -> M:
    """Class decorator: whatever the original's constructor builds or is given, our classes are inside afterwards."""
    original = container.__init__

    @wraps(original)
    def construct(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        convert(self)

    container.__init__ = construct  # type: ignore[method-assign]
    return container


def convert(module: Module) -> None:
    """Switch the class of every module inside whose class is exactly one of torch.nn's that we replace, in place."""
    for part in module.modules():
        replacement = REPLACEMENTS.get(type(part))
        if replacement is not None:
            part.__class__ = replacement
