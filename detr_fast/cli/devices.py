"""The --device option."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def pick_device(name: str) -> torch.device:
    """ "auto" is the GPU if PyTorch sees one; raises ConfigError for a name unknown or a GPU that isn't there."""
    import torch

    from detr_fast.engine.errors import ConfigError

    if name not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"the device is {name!r}, expected auto, cpu or cuda")
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ConfigError("the device is 'cuda', but PyTorch sees no GPU here; use --device cpu or auto")
    return torch.device("cuda" if available and name != "cpu" else "cpu")
