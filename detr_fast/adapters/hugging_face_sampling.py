"""Multi-scale deformable attention of transformers' models: where their own code samples, the kernel does, if one takes the call.

Their sampling is a module of its own in some models, a function in others; both are known by all of their code (`base.fingerprint`). So
are the modules around it, whose offsets and softmax go into the same launch where nobody looks (`hugging_face_offsets`).
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from detr_fast.adapters.base import (
    Adapter,
    Followed,
    Following,
    Scriptable,
    fingerprint,
    joined,
    joined_of,
    kind_of,
    why_not_switch,
)
from detr_fast.adapters.deformable import sampled
from detr_fast.adapters.hugging_face_offsets import SAMPLES, FromOffsets, kind_of_forward, samples_plainly

Sampling = Callable[..., Tensor]


class MultiScaleDeformableAttention(Scriptable):
    """The module that samples, of Deformable DETR and nine models that copied it."""

    def forward(
        self: Any,
        value: Tensor,
        value_spatial_shapes: Tensor,
        value_spatial_shapes_list: Any,
        level_start_index: Tensor,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: int,
    ) -> Tensor:
        found = sampled(value, value_spatial_shapes_list, sampling_locations, attention_weights)
        if found is not None:
            return found
        places = value_spatial_shapes, value_spatial_shapes_list, level_start_index, sampling_locations
        return super().forward(value, *places, attention_weights, im2col_step)  # type: ignore[misc,no-any-return]


def _by_levels(
    theirs: Sampling, value: Tensor, value_spatial_shapes: Any, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """In place of the function of Mask2Former and OneFormer."""
    found = sampled(value, value_spatial_shapes, sampling_locations, attention_weights)
    if found is not None:
        return found
    return theirs(value, value_spatial_shapes, sampling_locations, attention_weights)


def _by_points(
    theirs: Sampling,
    value: Tensor,
    value_spatial_shapes: Any,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    num_points_list: Sequence[int],
    method: str = "default",
) -> Tensor:
    """In place of the function of RT-DETR v2, D-FINE and DEIMv2; its other method reads the nearest pixel, which stays theirs."""
    found = None
    if method == "default":
        found = sampled(value, value_spatial_shapes, sampling_locations, attention_weights, num_points_list)
    if found is not None:
        return found
    given = sampling_locations, attention_weights, num_points_list, method
    return theirs(value, value_spatial_shapes, *given)


# By the fingerprint of a function: what takes its place, given it.
_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "11701a81af4f08d9": _by_levels,
    "bad4d09c4f7ecbdd": _by_points,
}
_NAMES = ("multi_scale_deformable_attention", "multi_scale_deformable_attention_v2")  # of such functions
_HELD = "ms_deformable_attn_core"  # the attribute of D-FINE's modules that holds one
_BESIDE = (
    "_detr_fast_held"  # the same once more: behind a property of its name torch.compile of 2.11 never finds the first
)


class DeformableAttention(Followed):
    """A module whose forward calls such a function: its own code, which finds another under the function's name."""

    @classmethod
    def attributes_for(cls, original: type[Module]) -> dict[str, Any]:
        return cls.as_attributes(original, _with_function(original))


class OffsetsToFunction(FromOffsets, DeformableAttention):
    """Such a module, with offsets and softmax in the launch, if the function is the one that is known."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        known = True
        if not torch.compiler.is_compiling():
            self._detr_fast_followed.look()
            known = self._detr_fast_followed.whole and self._detr_fast_patched() is None
        first: Any = super() if known else super(FromOffsets, self)
        return first.forward(*args, **kwargs)


class HeldDeformableAttention(Scriptable):
    """A module that holds such a function, of its own Python module: D-FINE's and DEIMv2's."""

    _detr_fast_functions: tuple[Sampling, Sampling]  # theirs, and what takes its place
    _detr_fast_held: Sampling

    @classmethod
    def attributes_for(cls, original: type[Module]) -> dict[str, Any]:
        theirs = _function_of(original)
        place = _place_of(theirs)
        return {"_detr_fast_functions": (theirs, theirs if place is None else partial(place, theirs))}

    @property
    def ms_deformable_attn_core(self) -> Sampling:
        """Before what the instance holds under that name."""
        held: Sampling = self._detr_fast_held
        theirs, place = self._detr_fast_functions
        return place if held is theirs else held

    @ms_deformable_attn_core.setter
    def ms_deformable_attn_core(self, held: Sampling) -> None:
        self.__dict__[_HELD] = self.__dict__[_BESIDE] = held


class OffsetsToHeld(FromOffsets, HeldDeformableAttention):
    """The same with offsets and softmax in the launch, if the function is its Python module's."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        theirs, _ = self._detr_fast_functions
        first: Any = super() if self._detr_fast_held is theirs else super(FromOffsets, self)
        return first.forward(*args, **kwargs)


def _function_of(kind: type[Module]) -> Any:
    names = vars(sys.modules[kind.__module__])
    return next((names[name] for name in _NAMES if name in names), None)


def _with_function(kind: type[Module]) -> Following:
    """The class's forward among the globals of its own module, but for the function."""
    forward: Any = inspect.unwrap(kind.forward)
    name = _name_used(forward)
    assert name is not None
    return Following(forward, _in_place_of, [name])


def _in_place_of(theirs: Any) -> Callable[..., Tensor] | None:
    place = _place_of(theirs)
    return None if place is None else partial(place, theirs)


def _name_used(forward: Any) -> str | None:
    """Under which name a function's code calls such a function."""
    code = getattr(forward, "__code__", None)
    return next((name for name in _NAMES if code is not None and name in code.co_names), None)


@cache
def _place_of(function: Any) -> Callable[..., Tensor] | None:
    return _FUNCTIONS.get(fingerprint(function) or "")


def _ours(module: Module) -> type[Module] | None:
    kind = kind_of(module)
    if not kind.__module__.startswith("transformers."):
        return None
    forward: Any = inspect.unwrap(kind.forward)
    if (name := _name_used(forward)) is not None and _place_of(forward.__globals__.get(name)) is not None:
        return DeformableAttention if kind_of_forward(forward) is None else OffsetsToFunction
    held = module.__dict__.get(_HELD)
    if held is not None and held is _function_of(kind) and _place_of(held) is not None:
        return HeldDeformableAttention if kind_of_forward(forward) is None else OffsetsToHeld
    if _is_module(kind.forward):
        return MultiScaleDeformableAttention
    known = "attn" in module._modules and kind_of_forward(forward) is not None
    return FromOffsets if known and samples_plainly(module) else None


@cache
def _is_module(forward: Any) -> bool:
    return fingerprint(forward) == SAMPLES


class HuggingFaceSampling(Adapter):
    """Modules that sample, by code that is known."""

    @classmethod
    def consider(cls, module: Module) -> type[Module] | str | None:
        ours = _ours(module)
        if ours is None or isinstance(module, ours):
            return None
        kind = kind_of(module)
        return why_not_switch(module) or joined(ours, kind, kind)

    @classmethod
    def describe(cls, replacement: type[Module]) -> str:
        return f"detr_fast.ops.deformable_attention ({joined_of(replacement).__name__})"

    @classmethod
    def switched(cls, module: Module) -> None:
        if isinstance(module, HeldDeformableAttention):
            module.__dict__[_BESIDE] = module.__dict__[_HELD]

    @classmethod
    def restored(cls, module: Module) -> None:
        module.__dict__.pop(_BESIDE, None)
