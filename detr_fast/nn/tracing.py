"""torch.fx keeps torch.nn's modules whole; ours, which live elsewhere, ask for the same."""

from __future__ import annotations

from functools import wraps
from typing import Any, TypeVar

from torch import fx
from torch.nn import Module

from detr_fast.nn.replacements import REPLACEMENTS

M = TypeVar("M", bound=type[Module])


def is_traced(value: Any) -> bool:
    """Whether torch.fx is tracing this value symbolically."""
    return isinstance(value, fx.Proxy)


def is_whole(module: Module) -> bool:
    """Whether torch.fx would keep torch.nn's counterpart whole: a user's subclass is looked into."""
    return type(module) in REPLACEMENTS.values()


def as_leaf(module: Module, first: Any, *rest: Any, **kwargs: Any) -> Any:
    """Record the call of `module` on `first`, which is traced, as one node of the graph."""
    tracer = first.tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(module), (first, *rest), kwargs)


def keeps_whole(container: M) -> M:
    """Class decorator for containers, where one more Python call does not count."""
    original = container.forward

    @wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if args and is_traced(args[0]) and is_whole(self):
            return as_leaf(self, *args, **kwargs)
        return original(self, *args, **kwargs)

    container.forward = forward  # type: ignore[method-assign]
    return container
