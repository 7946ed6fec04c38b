"""By which way the host gets a call of ours to the GPU: by what was recorded, in C++ (`detr_fast.native`), or from Python."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from detr_fast import native
from detr_fast.ops.boundary import Boundary
from detr_fast.ops.host_program import HostProgram

_COUNTED = {
    Boundary.__call__.__code__: "ops",
    Boundary.python.__code__: "ops from Python",
    HostProgram.forward.__code__: "layers from Python",
}
_LAYER = "ProgramNodeBackward"  # the node of a whole layer in C++


def way(call: Callable[[], Sequence[Tensor]]) -> str | None:
    """Of one call: "C++", "Python", or both where ops go different ways; None where none of our ops ran.

    An op in C++ never reaches what is written in Python. A whole layer calls no op at all, and is told by its node.
    """
    counts: Counter[str] = Counter()

    def count(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and (name := _COUNTED.get(frame.f_code)) is not None:
            counts[name] += 1

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        results = call()
    finally:
        sys.setprofile(before)
    ways = {"Python"} if counts["ops from Python"] or counts["layers from Python"] else set()
    if counts["ops"] > counts["ops from Python"] or _LAYER in _names(results):
        ways.add("C++")
    return " and ".join(sorted(ways)) or None


def _names(results: Sequence[Tensor]) -> set[str]:
    """Of the nodes in C++ that gave the results: torch 2.11 asks none in Python for its name."""
    ahead, found, names = [y.grad_fn for y in results], set(), set()
    while ahead:
        node = ahead.pop()
        if node is not None and node not in found:
            found.add(node)
            ahead += [one for one, _ in node.next_functions]
            if not isinstance(node, torch._C._FunctionBase):
                names.add(node.name())
    return names


@contextmanager
def from_python() -> Iterator[None]:
    """Inside the block nothing is in C++. What was recorded is forgotten."""
    module = native.host
    native.use(None)
    try:
        yield
    finally:
        native.use(module)
