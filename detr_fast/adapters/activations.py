"""Activations of transformers that write out the tangent approximation of GELU, in eight launches or nine: PyTorch's own, in one.

GPT-2's, and that of T5 1.1 (FLAN-T5, mT5), Phi, GPT-J and others, where no fused block has it inside. Known by all of their code.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module

from detr_fast.adapters.base import Adapter, Scriptable, fingerprint, joined, kind_of, why_not_switch
from detr_fast.adapters.blocks import is_dispatched


class TanhGELU(Scriptable):
    """GELU by its tangent approximation, rounded once."""

    def forward(self: Any, input: Tensor) -> Tensor:
        return F.gelu(input, approximate="tanh") if is_dispatched(input) else super().forward(input)  # type: ignore[misc]


# By the name of a class the fingerprint of its forward.
_CODE = {"NewGELUActivation": "bb19e693c79c8ed7", "FastGELUActivation": "f3237926ccf3ca0e"}


class Activations(Adapter):
    """The two classes above."""

    @classmethod
    def consider(cls, module: Module) -> type[Module] | str | None:
        kind: Any = kind_of(module)
        if isinstance(module, TanhGELU) or not _is_known(kind):
            return None
        return why_not_switch(module) or joined(TanhGELU, kind, kind)

    @classmethod
    def describe(cls, replacement: type[Module]) -> str:
        return "torch.nn.functional.gelu(approximate='tanh')"


@cache
def _is_known(kind: Any) -> bool:
    code = _CODE.get(kind.__name__) if kind.__module__ == "transformers.activations" else None
    return code is not None and code == fingerprint(kind.forward)
