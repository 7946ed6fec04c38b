"""Weights as autocast would cast them, which a thread knows for the length of a forward; the modules keep their own.

What computes a layer's products asks here. Whoever does not gets the parameter, which autocast then casts for that product.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

M = TypeVar("M", bound=nn.Module)


class _Thread(threading.local):
    def __init__(self) -> None:
        self.casts: Mapping[int, Tensor] = {}


_thread = _Thread()


@contextmanager
def known_casts(casts: Mapping[int, Tensor]) -> Iterator[None]:
    """Inside the block, in this thread, these are parameters' casts, by the parameters' id: whoever enters keeps those alive."""
    outer, _thread.casts = _thread.casts, {**_thread.casts, **casts}
    try:
        yield
    finally:
        _thread.casts = outer


def cast_of(parameter: Tensor | None) -> Any:
    """The parameter's cast, where there is one that autocast would make here, or the parameter itself."""
    if torch.compiler.is_compiling() or not _thread.casts:
        return parameter
    found = _thread.casts.get(id(parameter))
    if found is None or parameter is None:
        return parameter
    kind = found.device.type
    if not torch.is_autocast_enabled(kind) or torch.get_autocast_dtype(kind) != found.dtype:
        return parameter
    if parameter.requires_grad and torch.is_grad_enabled() and not found.requires_grad:
        return parameter  # its cast is not recorded
    return found


def casts_of(parameters: list[Tensor | None]) -> list[Tensor | None]:
    """`cast_of` each."""
    return [*map(cast_of, parameters)] if _thread.casts else parameters


def linear(module: Any, x: Tensor) -> Any:
    """module(x), by the casts of its weight and bias where there are any."""
    if torch.compiler.is_compiling() or not _thread.casts or _has_any_global_hook():
        return module(x)
    weight = module._parameters.get("weight")
    cast = cast_of(weight)
    return module(x) if cast is weight else F.linear(x, cast, cast_of(module.bias))


def with_casts(module: M) -> M:
    """The module, or where casts of its parameters are known one of its class that has those in their place."""
    if torch.compiler.is_compiling() or not _thread.casts:
        return module
    stand_in = object.__new__(type(module))
    stand_in.__dict__.update(module.__dict__)
    stand_in.__dict__["_parameters"] = {name: cast_of(parameter) for name, parameter in module._parameters.items()}
    children = {name: None if one is None else with_casts(one) for name, one in module._modules.items()}
    stand_in.__dict__["_modules"] = children
    return stand_in
