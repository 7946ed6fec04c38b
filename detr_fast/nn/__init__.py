"""Drop-in replacements for torch.nn; names that are not replaced are torch.nn's own."""

from __future__ import annotations

from typing import Any

from torch import nn as _torch_nn


def __getattr__(name: str) -> Any:
    return getattr(_torch_nn, name)
