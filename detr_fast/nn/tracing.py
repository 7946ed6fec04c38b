"""torch.fx keeps torch.nn's modules whole; ours, which live elsewhere, ask for the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import wraps
from typing import Any, TypeVar

from torch import fx
from torch.fx._symbolic_trace import is_fx_symbolic_tracing
from torch.nn import Module

from detr_fast.nn.replacements import REPLACEMENTS

M = TypeVar("M", bound=type[Module])


def is_traced(value: Any) -> bool:
    """Whether torch.fx is tracing this value symbolically."""
    return isinstance(value, fx.Proxy)


def is_whole(module: Module) -> bool:
    """Whether torch.fx would keep torch.nn's counterpart whole: a user's subclass is looked into."""
    return type(module) in REPLACEMENTS.values()


def as_leaf(module: Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> Any:
    """Record the call of `module` as one node of the graph, where one of its arguments is traced; None where none is."""
    kwargs = kwargs or {}
    traced = next(filter(is_traced, (*args, *kwargs.values())), None)
    if traced is None or not is_whole(module):
        return None
    tracer = traced.tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(module), tuple(args), dict(kwargs))


def keeps_whole(container: M) -> M:
    """Class decorator for containers, where one more Python call does not count."""
    original = container.forward

    @wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if is_fx_symbolic_tracing() and (node := as_leaf(self, args, kwargs)) is not None:
            return node
        return original(self, *args, **kwargs)

    container.forward = forward  # type: ignore[method-assign]
    return container
