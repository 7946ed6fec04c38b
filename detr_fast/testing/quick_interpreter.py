"""Triton's interpreter without what it does again and again, or for nothing: what kernels compute stays the same.

* At each call of a function in a kernel (`tl.sum` is one) it replaces the language's functions by interpreted ones: over
  a quarter of its time. Here once.
* For each sum and product of 32-bit integers it computes whether a longer integer would hold another value, and then
  drops the answer unless it debugs. `checked_interpreter` has a limit of its own.
* Each tensor's type and shape are built anew, with their names; a kernel has few.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock


@contextmanager
def quick_interpreter() -> Iterator[None]:
    """Inside the block Triton's interpreter takes about half the time; the language's functions are interpreted throughout."""
    import triton.language as tl
    from triton.runtime import interpreter as module

    builder, core = module.interpreter_builder, tl.core

    def replace_nothing(function: Any) -> Any:
        return module._LangPatchScope()

    languages = SimpleNamespace(__globals__={"tl": tl, "core": core})
    scope = module._patch_lang(languages)
    try:
        with (
            mock.patch.object(module, "_patch_lang", replace_nothing),
            mock.patch.object(module, "_get_np_dtype", _remembered_dtype(module._get_np_dtype)),
            mock.patch.object(builder, "options", replace(builder.options, sanitize_overflow=False)),
            mock.patch.object(core.block_type, "__init__", _remembered_type(core.block_type.__init__, core.constexpr)),
            mock.patch.object(core.tensor, "__init__", _remembered_shape(core.tensor.__init__)),
        ):
            yield
    finally:
        scope.restore()


def _remembered_dtype(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
    known: dict[str, Any] = {}

    def numpys(dtype: Any) -> Any:
        name = dtype.scalar.name
        if name not in known:
            known[name] = original(dtype)
        return known[name]

    return numpys


def _remembered_type(original: Callable[..., None], constexpr: Any) -> Callable[..., None]:
    known: dict[tuple[int, ...], tuple[Any, Any, str]] = {}

    def initialise(self: Any, element_type: Any, shape: Any) -> None:
        sizes = tuple(size.value if isinstance(size, constexpr) else size for size in shape)
        if sizes not in known:
            original(self, element_type, shape)
            known[sizes] = self.shape, self.numel, str(self.shape)
        self.element_ty = element_type
        self.shape, self.numel, name = known[sizes]
        self.name = f"<{name}, {element_type}>"

    return initialise


def _remembered_shape(original: Callable[..., None]) -> Callable[..., None]:
    known: dict[tuple[int, ...], tuple[Any, Any]] = {}

    def initialise(self: Any, handle: Any, type: Any) -> None:
        sizes = tuple(type.shape) if type.is_block() else ()
        if sizes not in known:
            original(self, handle, type)
            known[sizes] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = known[sizes]

    return initialise
