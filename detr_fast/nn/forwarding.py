"""`import detr_fast.nn.utils` and the like: modules of torch.nn that are not ours, by our name; the very modules, not copies."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from types import ModuleType

_OURS, _THEIRS = "detr_fast.nn", "torch.nn"


class _Theirs(Loader):
    """Loads what is loaded, or is to be, under another name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = import_module(self.name)
        self.own = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.own  # importlib wrote ours over it


class _Finder(MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not name.startswith(f"{_OURS}."):
            return None
        first, *_ = name.removeprefix(f"{_OURS}.").split(".")
        if PathFinder.find_spec(f"{_OURS}.{first}", sys.modules[_OURS].__path__) is not None:
            return None
        theirs = _THEIRS + name.removeprefix(_OURS)
        if find_spec(theirs) is None:
            return None
        return ModuleSpec(name, _Theirs(theirs))


def install() -> None:
    """Before Python's own finders, which would find torch's files by the path of a package of torch's, and load them again."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
