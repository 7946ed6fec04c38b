"""RMSNorm classes of transformers, and whoever has copied their code, on `ops.rms_norm`.

Copies differ in where they round, so they are known by all of their code (`base.fingerprint`). They take the mean of squares in fp32 and write
each step to memory; the kernel does so in one launch and rounds once, at the end, to the dtype that theirs come to. Where no kernel takes the
call, their own code runs.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Module

from detr_fast.adapters.base import (
    Adapter,
    Scriptable,
    fingerprint,
    joined,
    joined_of,
    kind_of,
    names_used,
    why_not_switch,
)
from detr_fast.adapters.blocks import is_dispatched
from detr_fast.kernels.gated import Gate
from detr_fast.ops.gated_activation import GATED_ACTIVATION
from detr_fast.ops.rms_norm import RMS_NORM


def _normalised(x: Any, weight: Any, eps: float, dtype: torch.dtype | None = None) -> Tensor | None:
    """RMSNorm over the last dimension in `dtype`, by default x's; None where no kernel computes it."""
    if not isinstance(eps, float):  # a tensor, in classes that only have the code of those we know
        return None
    arguments = (x, tuple(x.shape[-1:]), weight, eps, dtype or x.dtype)
    kernel = RMS_NORM.kernel(*arguments)
    return None if kernel is None else kernel.run(*arguments)


class LlamaRMSNorm(Scriptable):
    """weight * normalised.to(x's dtype): what both promote to."""

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        y = None
        if is_dispatched(hidden_states):
            dtype = torch.promote_types(hidden_states.dtype, self.weight.dtype)
            y = _normalised(hidden_states, self.weight, self.variance_epsilon, dtype)
        return super().forward(hidden_states) if y is None else y  # type: ignore[misc]


class Llama4RMSNorm(Scriptable):
    """The same of Llama 4, and of the repositories that Meta's Llama came in."""

    def forward(self: Any, x: Tensor) -> Tensor:
        y = None
        if is_dispatched(x):
            y = _normalised(x, self.weight, self.eps, torch.promote_types(x.dtype, self.weight.dtype))
        return super().forward(x) if y is None else y  # type: ignore[misc]


class OlmoRMSNorm(Scriptable):
    """(weight * normalised).to(x's dtype)."""

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        y = None
        if is_dispatched(hidden_states):
            y = _normalised(hidden_states, self.weight, self.variance_epsilon)
        return super().forward(hidden_states) if y is None else y  # type: ignore[misc]


class T5LayerNorm(Scriptable):
    """weight * normalised, which is cast to a weight of 16 bits, and else stays in fp32."""

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        y = None
        if is_dispatched(hidden_states):
            y = _normalised(hidden_states, self.weight, self.variance_epsilon, self.weight.dtype)
        return super().forward(hidden_states) if y is None else y  # type: ignore[misc]


class GemmaRMSNorm(Scriptable):
    """(normalised * (1 + weight)).type_as(x)."""

    def forward(self: Any, x: Tensor) -> Tensor:
        y = None
        # Asked first: a call that no kernel takes would make the launches of 1 + weight for nothing.
        if is_dispatched(x) and (torch.compiler.is_compiling() or not RMS_NORM.is_small(x.nbytes, x.device)):
            y = _normalised(x, 1.0 + self.weight.float(), self.eps)
        return super().forward(x) if y is None else y  # type: ignore[misc]


class MoshiRMSNorm(Scriptable):
    """(normalised * weight).type_as(x)."""

    def forward(self: Any, x: Tensor) -> Tensor:
        y = _normalised(x, self.weight, self.eps) if is_dispatched(x) else None
        return super().forward(x) if y is None else y  # type: ignore[misc]


class Gemma4RMSNorm(Scriptable):
    """The same, with a weight or without."""

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        y = None
        if is_dispatched(hidden_states):
            y = _normalised(hidden_states, self.weight if self.with_scale else None, self.eps)
        return super().forward(hidden_states) if y is None else y  # type: ignore[misc]


class NanoChatRMSNorm(Scriptable):
    """normalised.type_as(x)."""

    def forward(self: Any, x: Tensor) -> Tensor:
        y = _normalised(x, None, self.eps) if is_dispatched(x) else None
        return super().forward(x) if y is None else y  # type: ignore[misc]


class GatedRMSNorm(Scriptable):
    """(weight * normalised.to(x's dtype) * silu(gate)).to(x's dtype), the last product in fp32: Qwen3-Next's, of its linear attention."""

    def forward(self: Any, hidden_states: Tensor, gate: Tensor) -> Tensor:
        y = None
        if is_dispatched(hidden_states) and self.activation == "silu" and gate.shape == hidden_states.shape:
            dtype = torch.promote_types(hidden_states.dtype, self.weight.dtype)
            y = _normalised(hidden_states, self.weight, self.variance_epsilon, dtype)
        if y is None:
            return super().forward(hidden_states, gate)  # type: ignore[misc,no-any-return]
        arguments = (gate, y, Gate("silu"))
        kernel = GATED_ACTIVATION.kernel(*arguments) if gate.dtype == y.dtype == hidden_states.dtype else None
        if kernel is not None:
            found: Tensor = kernel.run(*arguments)
            return found
        return (y * F.silu(gate.float())).to(hidden_states.dtype)


# By the fingerprints of forward and of the method that it calls, where there is one.
_NORM = "ca4c65479fe5191b"
_CODE: dict[tuple[str | None, str | None], type[Module]] = {
    ("91da25249da50ad8", None): LlamaRMSNorm,
    ("efb961b8e0d76a41", _NORM): Llama4RMSNorm,
    ("cfcfee9dce3b6411", None): OlmoRMSNorm,
    ("0b6e282afb263e49", None): OlmoRMSNorm,  # with the weight in fp32
    ("e2a4b994da9dd984", None): T5LayerNorm,
    ("bb69f6825696d4d9", _NORM): GemmaRMSNorm,
    ("b724336c24cd5195", _NORM): MoshiRMSNorm,
    ("038f6b1c4c1c6c82", "ae57079cb6657f55"): Gemma4RMSNorm,
    ("fd8944f3bef443f6", _NORM): NanoChatRMSNorm,
    ("86ea651ba7ea7f76", None): GatedRMSNorm,
    ("db3e6a3c253832e1", None): NanoChatRMSNorm,  # with the factor rounded, too
}
# What the code of each of them reads, one or the other: others need no second look.
_READ = {"rsqrt", "_norm"}


class RMSNorms(Adapter):
    """Classes whose code is that of the norms above, wherever they are defined."""

    @classmethod
    def consider(cls, module: Module) -> type[Module] | str | None:
        kind: Any = kind_of(module)
        if isinstance(module, nn.RMSNorm | Scriptable):  # torch.nn's, or switched already
            return None
        ours = _known(kind)
        if ours is None:
            return _why_unknown(kind)
        if "_norm" in module.__dict__:
            return "its _norm was replaced on the instance"
        return why_not_switch(module) or joined(ours, kind, kind)

    @classmethod
    def describe(cls, replacement: type[Module]) -> str:
        return f"{__name__}.{joined_of(replacement).__name__}"


@cache
def _known(kind: Any) -> type[Module] | None:
    """The class above that has the code of this one."""
    parts = [kind.forward, *filter(None, [getattr(kind, "_norm", None)])]
    if not all(inspect.isfunction(inspect.unwrap(part)) for part in parts) or not _READ & names_used(kind.forward):
        return None
    if not kind.__module__.startswith("transformers.") and not all(map(means_what_it_says, parts)):
        return None
    return _CODE.get((fingerprint(parts[0]), fingerprint(parts[1]) if len(parts) > 1 else None))


def means_what_it_says(function: Any) -> bool:
    """Whether nothing is wrapped around a function, and what its code calls torch is torch."""
    if hasattr(function, "__wrapped__") or function.__closure__:
        return False
    return "torch" not in names_used(function) or function.__globals__.get("torch") is torch


@cache
def _why_unknown(kind: Any) -> str | None:
    """Why a class is left alone that is an RMSNorm by its name, or by the class that it is derived from."""
    bases = [base for base in kind.__mro__[1:] if issubclass(base, Module)]
    for base in bases:
        if _known(base) is not None:
            return f"{kind.__name__} overrides forward or _norm of {base.__name__}"
    return "its code is that of no RMSNorm that is known here" if "RMSNorm" in kind.__name__ else None
