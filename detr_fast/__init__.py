"""detr-fast: fused Triton kernels for DETR and every transformer built from torch.nn parts.

from detr_fast import nn              # torch.nn, faster
detr_fast.accelerate(model)           # the same for a model that exists, in place
detr_fast.explain(model, *inputs)     # what runs where, and why
with detr_fast.use_backend("eager"):  # ask for an implementation by name
    ...
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "accelerate",
    "accelerated",
    "explain",
    "explaining",
    "nn",
    "ops",
    "provide_deformable_extension",
    "restore",
    "use_backend",
]

# Imported on first use, so that `detr-fast --help` and `import detr_fast` stay quick.
_WHERE = {
    "use_backend": "detr_fast.dispatch",
    "BackendError": "detr_fast.dispatch",
    "accelerate": "detr_fast.acceleration",
    "accelerated": "detr_fast.acceleration",
    "restore": "detr_fast.acceleration",
    "provide_deformable_extension": "detr_fast.adapters.deformable_extension",
    "explain": "detr_fast.explanation",
    "explaining": "detr_fast.explanation",
}
_ROOMS = (
    "acceleration",
    "adapters",
    "cli",
    "data",
    "dispatch",
    "engine",
    "explanation",
    "kernels",
    "models",
    "nn",
    "ops",
    "testing",
)

if TYPE_CHECKING:
    from detr_fast import nn as nn
    from detr_fast import ops as ops
    from detr_fast.acceleration import accelerate as accelerate
    from detr_fast.acceleration import accelerated as accelerated
    from detr_fast.acceleration import restore as restore
    from detr_fast.adapters.deformable_extension import provide_deformable_extension as provide_deformable_extension
    from detr_fast.dispatch import BackendError as BackendError
    from detr_fast.dispatch import use_backend as use_backend
    from detr_fast.explanation import explain as explain
    from detr_fast.explanation import explaining as explaining


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        importlib.import_module("detr_fast.ops")  # all ops must be known before one can be asked for by name
        value = getattr(importlib.import_module(_WHERE[name]), name)
        globals()[name] = value
        return value
    if name in _ROOMS:
        return importlib.import_module(f"detr_fast.{name}")
    raise AttributeError(f"module 'detr_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({name for name in globals() if name.startswith("__")} | {*__all__, *_ROOMS})
