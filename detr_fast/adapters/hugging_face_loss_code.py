"""Whether a loss is transformers' own, with the code that ours was written for: told by the names that its functions read."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import torch

from detr_fast.adapters.base import names, times_read


class KnownLoss(NamedTuple):
    """A loss of transformers', and ours for it."""

    ours: Callable[..., Any]
    code: Mapping[str, str]  # what each function of it reads, "Class.method" or "function", its own first
    modules: tuple[ModuleType, ...]  # where those are found, in this order
    why_not: Callable[[Any], str | None]  # the reason why ours does not take a model's configuration
    splits: int = 0  # how often its function splits a tensor, in which versions of transformers differ


def why_other_code(loss: KnownLoss) -> str | None:
    """Which function of transformers' computes something else than ours does, or None."""
    for path, known in loss.code.items():
        if (found := find(loss.modules, path)) is None or names_read(found) != names(known):
            return f"this version of transformers computes its loss differently ({path})"
    path = next(iter(loss.code))
    if times_read(find(loss.modules, path))["split"] != loss.splits:
        return f"this version of transformers takes denoising queries differently ({path})"
    return None


def find(modules: tuple[ModuleType, ...], path: str) -> Any:
    """A function by name, "Class.method" or "function", in the first of the modules that has it."""
    first, *rest = path.split(".")
    found: Any = next((getattr(one, first) for one in modules if hasattr(one, first)), None)
    for name in rest:
        found = getattr(found, name, None)
    return found


def names_read(function: Any) -> frozenset[str]:
    """The globals, attributes and floats that a function's code reads, its comprehensions' too: as no version of Python differs."""
    read: set[str] = set()
    codes = [getattr(inspect.unwrap(function, stop=_is_no_wrapper_of_torchs), "__code__", None)]
    while codes:
        if (code := codes.pop()) is not None:
            read.update(code.co_names)
            read.update(repr(one) for one in code.co_consts if isinstance(one, float))
            codes += [one for one in code.co_consts if inspect.iscode(one)]
    return frozenset(read)


def _is_no_wrapper_of_torchs(function: Any) -> bool:
    code = getattr(
        function, "__code__", None
    )  # of `torch.no_grad`, say: others may do something else than what they wrap
    return code is None or not code.co_filename.startswith(os.path.dirname(torch.__file__))
