"""torch.fx keeps torch.nn's modules whole; ours, which live elsewhere, ask for the same."""

from __future__ import annotations

from typing import Any

from torch import fx
from torch.nn import Module


def is_traced(value: Any) -> bool:
    """Whether torch.fx is tracing this value symbolically."""
    return isinstance(value, fx.Proxy)


def as_leaf(module: Module, first: Any, *rest: Any) -> Any:
    """Record the call of `module` on `first`, which is traced, as one node of the graph."""
    tracer = first.tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(module), (first, *rest), {})
