"""`explain(model, *inputs)`: which implementation each module's ops run on, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from detr_fast import dispatch
from detr_fast.dispatch import Record


class Explanation(list[Record]):
    """The records of a run, one per module and op; prints as one line each."""

    def __str__(self) -> str:
        if not self:
            return "no op of detr-fast was called (accelerate the model, or build it from detr_fast.nn)"
        return "\n".join(map(str, self))

    def as_dicts(self) -> list[dict[str, Any]]:
        """Plain data, ready for JSON."""
        return [{**vars(record), "reasons": dict(record.reasons)} for record in self]


@contextmanager
def explaining(model: nn.Module | None = None) -> Iterator[Explanation]:
    """Collect one record per module and op while the block runs; module names are those inside `model`."""
    names = {module: name for name, module in model.named_modules()} if model is not None else {}
    path: list[str] = []
    explanation = Explanation()
    index: dict[tuple[str, ...], int] = {}

    def record(op: str, decision: Any) -> None:
        module = path[-1] if path else ""
        new = Record(module, op, decision.shapes, decision.implementation.name, decision.reasons, decision.note)
        key = (module, op, new.shapes, new.chosen)
        if key in index:
            known = explanation[index[key]]
            explanation[index[key]] = replace(known, calls=known.calls + 1)
        else:
            index[key] = len(explanation)
            explanation.append(new)

    def enter(module: nn.Module, args: Any) -> None:
        path.append(names.get(module, path[-1] if path else type(module).__name__))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        path.pop()

    # Global hooks: a hook on a module itself would change what some layers do (torch's fast path, our fused layers).
    handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
    try:
        with dispatch.recording(record):
            yield explanation
    finally:
        for handle in handles:
            handle.remove()


def explain(model: nn.Module | Callable[..., Any], *inputs: Any, quiet: bool = False, **kwargs: Any) -> Explanation:
    """Run `model(*inputs)` once without gradients and print one line per module: op, shapes, choice, reasons.

    The run uses the model's present mode (train or eval) and does not touch random state. Where training matters,
    wrap a whole step in `explaining(model)` instead.

    Returns the records (a list). Raises what the model raises.
    """
    module = model if isinstance(model, nn.Module) else None
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices), torch.no_grad(), explaining(module) as explanation:
        model(*inputs, **kwargs)
    if not quiet:
        print(explanation)
    return explanation
