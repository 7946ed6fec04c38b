"""Gated feed-forward blocks (SwiGLU, GEGLU) of transformers, timm, the DINOv2, DINOv3 and Llama repositories, and whoever has copied their code.

down(activation(gate(x)) * up(x)): the product is `ops.gated_activation`, and all else is called as before, so that projections may be wrapped
(LoRA), quantised or hooked. The mixture-of-experts layers of transformers have the same product between their grouped ones, some with a limit, as
gpt-oss and DeepSeek V4. Classes are known by their code (`base.fingerprint`). Where no kernel takes the call, PyTorch computes what theirs
does, to the bit.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

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
    public_name,
    why_not_switch,
)
from detr_fast.adapters.blocks import activation_name, is_dispatched
from detr_fast.kernels.gated import Gate
from detr_fast.nn.bare import has_hooks
from detr_fast.ops.gated_activation import GATED_ACTIVATION


class _Names(NamedTuple):
    """The attributes that hold a block's parts.

    gate, up: the projections; without up, gate gives both, in halves. activation: a module's name, or a function. before, behind: what
    is called in turn before the projections, and from the product on. gate_last: the gate is the second half; None: where the
    block says so. casts: the product is
    cast to the last projection's dtype, as T5's is, whose last projection may stay in fp32. limit: the attribute that holds the gate's and up's.
    """

    gate: str
    up: str | None
    activation: str | Callable[[Tensor], Tensor]
    behind: tuple[str, ...]
    before: tuple[str, ...] = ()
    gate_last: bool | None = False
    casts: bool = False
    limit: str | None = None


class _Experts(NamedTuple):
    """The gate of experts, both in one tensor: its activation, or the attribute that holds it or its factor; and its limit.

    factor: it is gate * sigmoid(factor * gate), and up + 1. neighbours: as `ops.gated_activation` has them.
    """

    activation: str | Callable[[Tensor], Tensor] | None = None
    limit: str | None = None
    factor: str | None = None
    neighbours: bool = False


_LLAMA = _Names("gate_proj", "up_proj", "act_fn", ("down_proj",))
_T5 = _Names("wi_0", "wi_1", "act", ("dropout", "wo"))
_CODE = {
    "d933868666754eca": _LLAMA,
    "03da77c8a4bebb44": _LLAMA,  # Qwen2.5-VL's vision model
    "74c7b5b5ab5bbf67": _LLAMA,  # Idefics
    "c601edf8132a3d49": _LLAMA,  # RecurrentGemma
    "bbb8062c062e7cf2": _LLAMA._replace(activation="activation_fn"),  # Llama 4
    "7458e7eae3832c0a": _LLAMA._replace(behind=("dropout", "down_proj")),  # T5Gemma
    "02acbf4298da9b55": _LLAMA._replace(behind=("ffn_sub_norm", "down_proj")),  # BitNet
    "db502625dabe0130": _Names("gate_up_proj", None, "activation_fn", ("down_proj",)),  # Phi-3, GLM-4
    "f5206d6a70214880": _Names("input_linear", None, "activation", ("output_linear",)),  # Granite's shared experts
    "47a1111a2bcc4c79": _Names("Wi", None, "act", ("drop", "Wo")),  # ModernBERT
    "6232fa5286e1a381": _Names("fc1", None, "activation_fn", ("fc2",), gate_last=True),  # Moonshine's decoder
    "1ddae88e05edbbfb": _Names("proj", None, "activation_fn", (), gate_last=True),  # CLVP
    "9065c67ad87d8d41": _Names(  # Phi-4's audio model
        "gate_up_proj", None, "act_fn", ("dropout", "down_proj", "dropout"), ("layer_norm",), gate_last=True
    ),
    "f34c1207dfb87df6": _T5._replace(casts=True),
    "dd6c2088c40f439b": _T5,  # LongT5
    "d1453860e714795d": _Names("w_0", "w_1", "act", ()),  # CPM-Ant
    "2263289782b22562": _LLAMA._replace(limit="limit"),  # DeepSeek V4
    "0703c79b4cc8aa07": _LLAMA._replace(limit="swiglu_limit"),  # GLM-5
    "b74464f6ea98bedc": _LLAMA._replace(limit="swiglu_limit"),  # its vision model
    "1de5d0c15a77eedf": _LLAMA._replace(limit="swiglu_limit", before=("proj", "post_projection_norm", "act1")),
    "c795a56c9bc11a66": _Names("w1", "w3", F.silu, ("w2",)),  # LFM2's, and that of Meta's Llama
    "abb09e9a038b80d2": _Names("w1", "w2", F.silu, ("w3",)),  # of DINOv3's repository
    "0a38c62ea38b133c": _Names("w12", None, F.silu, ("w3",)),  # of DINOv2's
    "7a4b6ad71a5f7261": _Names("fc1_g", "fc1_x", "act", ("drop1", "norm", "fc2", "drop2")),  # timm's SwiGLU
    "391702fa2c9e4cf0": _Names("fc1", None, "act", ("drop1", "norm", "fc2", "drop2"), gate_last=None),  # timm's GluMlp
    "fc35e98eec5d767e": _Names("w0", "w1", "act", ("drop1", "w2", "drop2"), ("norm",)),  # ViTamin
}
_EXPERTS = {  # the gates of transformers' experts
    "6e76de5423df53a9": _Experts("act_fn"),
    "4da760ce3b86c86b": _Experts("act_fn", "limit"),  # DeepSeek V4
    "d9e8990bfccc82e5": _Experts(F.silu, "swiglu_limit"),  # GLM-5, Hunyuan 4
    "0e2492dda5cb0aa8": _Experts(None, "limit", "alpha", neighbours=True),  # gpt-oss
    "b463c41d582cb5f8": _Experts(None, "limit", "alpha"),  # OpenAI's privacy filter
    "2d7441ed5f677982": _Experts(None, "swiglu_limit", "swiglu_alpha"),  # MiniMax M3
}
_FACTOR = 1.702  # of quick_gelu
# What the code of each of them reads, one or the other: others need no second look.
_READ = {names.gate for names in _CODE.values()}


def _product(activation: Any, gate: Tensor, up: Tensor | None, gate_last: bool, limit: float | None) -> Tensor:
    """activation(gate) * up, both within the limit where there is one."""
    name = _named(activation)
    if name is not None and (limit is None or _is_limit(limit)):
        arguments = (gate, up, Gate(name, gate_last, False, limit if limit is None else float(limit)))
        kernel = GATED_ACTIVATION.kernel(*arguments)
        if kernel is not None:
            y: Tensor = kernel.run(*arguments)
            return y
    if up is None:
        gate, up = gate.chunk(2, dim=-1)
        if gate_last:
            gate, up = up, gate
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
    y = activation(gate) * up
    return y


def _named(activation: Any) -> str | None:
    # The class of a function is nothing that Dynamo of torch 2.11 looks into.
    return "silu" if activation is F.silu else activation_name(activation)


def _is_limit(limit: Any) -> bool:
    return isinstance(limit, (int, float)) and 0 < limit < math.inf


class GatedBlock(Scriptable):
    """The forward of a block; everything else is the class's that this is mixed into."""

    detr_fast_names: _Names
    detr_fast_argument: str  # the name that the original has for its input

    @classmethod
    def attributes_for(cls, original: type[Module]) -> dict[str, Any]:
        argument = list(inspect.signature(original.forward).parameters)[1]
        kind: Any = original
        return {"detr_fast_names": _names(kind), "detr_fast_argument": argument}

    def forward(self: Any, x: Tensor | None = None, /, **named: Tensor) -> Tensor:
        """As the original's, which runs for CPU tensors."""
        if x is None and set(named) == {self.detr_fast_argument}:
            x = named.pop(self.detr_fast_argument)
        if x is None or named:  # which the original refuses
            return super().forward(*(() if x is None else (x,)), **named)  # type: ignore[misc]
        if not is_dispatched(x):
            return super().forward(x)  # type: ignore[misc]
        names = self.detr_fast_names
        for part in names.before:
            x = getattr(self, part)(x)
        gate = getattr(self, names.gate)(x)
        up = None if names.up is None else getattr(self, names.up)(x)
        activation = _activation(self, names)
        limit = None if names.limit is None else getattr(self, names.limit)
        y = _product(activation, gate, up, _gate_last(self, names), limit)
        for part in names.behind:
            called = getattr(self, part)
            if names.casts and part == names.behind[-1]:
                y = _cast(y, called.weight)
            y = called(y)
        return y


def _activation(block: Module, names: _Names) -> Any:
    return getattr(block, names.activation) if isinstance(names.activation, str) else names.activation


def _gate_last(block: Module, names: _Names) -> bool:
    return bool(block.gate_last) if names.gate_last is None else names.gate_last


def _cast(y: Tensor, weight: Any) -> Tensor:
    """In the dtype of the weight that is next, unless it is quantised."""
    plain = isinstance(weight, Tensor) and weight.dtype not in (y.dtype, torch.int8)
    return y.to(weight.dtype) if plain else y


class GatedExperts(Scriptable):
    """The product of transformers' mixture-of-experts layers; their forward calls it between two grouped products."""

    detr_fast_gate: _Experts

    @classmethod
    def attributes_for(cls, original: type[Module]) -> dict[str, Any]:
        kind: Any = original
        return {"detr_fast_gate": _experts(kind)}

    def _apply_gate(self: Any, gate_up_out: Tensor) -> Tensor:
        if is_dispatched(gate_up_out) and (kind := _gate_of(self, self.detr_fast_gate)) is not None:
            kernel = GATED_ACTIVATION.kernel(gate_up_out, None, kind)
            if kernel is not None:
                y: Tensor = kernel.run(gate_up_out, None, kind)
                return y
        return super()._apply_gate(gate_up_out)  # type: ignore[misc,no-any-return]


def _gate_of(module: Module, gate: _Experts) -> Gate | None:
    """What such experts compute, as they are set now; None where no kernel knows it."""
    if gate.factor is not None:
        name = "quick_gelu" if getattr(module, gate.factor) == _FACTOR else None
    else:
        name = _named(getattr(module, gate.activation) if isinstance(gate.activation, str) else gate.activation)
    limit = None if gate.limit is None else getattr(module, gate.limit)
    if name is None or (gate.limit is not None and not _is_limit(limit)):
        return None
    return Gate(name, False, gate.neighbours, limit if limit is None else float(limit), gate.factor is not None)


class GatedBlocks(Adapter):
    """Classes whose code is in the table above, wherever they are defined."""

    @classmethod
    def consider(cls, module: Module) -> type[Module] | str | None:
        kind: Any = kind_of(module)
        if isinstance(module, Scriptable):  # switched already
            return None
        if (names := _names(kind)) is not None:
            return why_not_switch(module) or _why_not(module, names) or joined(GatedBlock, kind, kind)
        if (gate := _experts(kind)) is not None and getattr(module, "has_gate", True):
            if "_apply_gate" in module.__dict__:
                return "its _apply_gate was replaced on the instance"
            return why_not_switch(module) or _why_not_experts(module, gate) or joined(GatedExperts, kind, kind)
        return _why_unknown(kind)

    @classmethod
    def describe(cls, replacement: type[Module]) -> str:
        where = " (between experts' products)" if joined_of(replacement) is GatedExperts else ""
        return f"detr_fast.ops.gated_activation{where}"


def _why_not(module: Module, names: _Names) -> str | None:
    if getattr(module, "chunk_dim", -1) != -1:
        return "its halves lie in dimension 1, as images' channels"
    return _why_not_limit(module, names.limit) or _why_not_activation(module, names.activation)


def _why_not_experts(module: Module, gate: _Experts) -> str | None:
    if gate.factor is not None and (factor := getattr(module, gate.factor)) != _FACTOR:
        return f"its {gate.factor} is {factor}, where the kernel has {_FACTOR}"
    return _why_not_limit(module, gate.limit) or _why_not_activation(module, gate.activation)


def _why_not_limit(module: Module, name: str | None) -> str | None:
    if name is None or _is_limit(limit := getattr(module, name)):
        return None
    return f"its {name} is {limit}, where the kernel takes a number above 0"


def _why_not_activation(module: Module, name: Any) -> str | None:
    if not isinstance(name, str):
        return None
    activation: Any = getattr(module, name)
    if activation_name(activation) is not None:
        return None
    if isinstance(activation, nn.Module) and has_hooks(activation):
        return f"{name} has hooks, which must see its calls"
    what = getattr(activation, "__name__", "") or public_name(type(activation))
    return f"its activation {what} is none that the kernel knows"


@cache
def _names(kind: Any) -> _Names | None:
    """The attributes that hold the parts of such a block; None of a class that is none."""
    forward = kind.forward
    if not inspect.isfunction(inspect.unwrap(forward)) or not _READ & names_used(forward):
        return None
    return _CODE.get(fingerprint(forward) or "") if _means_what_it_says(forward) else None


def _means_what_it_says(function: Any) -> bool:
    """Whether nothing is wrapped around a function but by transformers, and what its code calls F is torch.nn.functional."""
    theirs = str(function.__module__).startswith("transformers.")
    if not theirs and (hasattr(function, "__wrapped__") or function.__closure__):
        return False
    plain: Any = inspect.unwrap(function)
    return "F" not in names_used(plain) or plain.__globals__.get("F") is F


@cache
def _experts(kind: Any) -> _Experts | None:
    """The gate of experts; None of a class that has none that is known."""
    gate = getattr(kind, "_apply_gate", None)
    if not inspect.isfunction(gate) or not gate.__module__.startswith("transformers.") or not _means_what_it_says(gate):
        return None
    return _EXPERTS.get(fingerprint(gate) or "")


@cache
def _why_unknown(kind: Any) -> str | None:
    """Why a class is left alone that is derived from one that is known."""
    for base in kind.__mro__[1:]:
        if issubclass(base, Module) and _names(base) is not None:
            return f"{kind.__name__} overrides forward of {base.__name__}"
    return None
