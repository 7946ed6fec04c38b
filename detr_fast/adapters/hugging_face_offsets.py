"""Attention modules of transformers' detectors with deformable attention: offsets and softmax go into the launch that samples.

Their projections stay modules that are called. Attention weights, which their layers drop, are None, as those of transformers' other
attentions on kernels are; where somebody asks for them, or has put a hook on the module, and where no kernel takes the call, their
code runs. Grounding DINO's and OmDet-Turbo's modules are to return the weights unless their layers tell them that they are dropped.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import Module

from detr_fast.adapters.base import fingerprint
from detr_fast.adapters.blocks import is_dispatched
from detr_fast.adapters.deformable import sampled_around, taken_around
from detr_fast.adapters.hugging_face_blocks import Told
from detr_fast.nn.bare import is_bare
from detr_fast.ops.boundary import is_memory


class Names(NamedTuple):
    """Of the attributes of a module that says each level's points: their list, 1 / points of each, and how it samples."""

    points: str
    scale: str
    method: str


class _Kind(NamedTuple):
    """valid: its mask is True where there is no padding. projected: it has `value_proj` and `output_proj`.

    told: its layers may return the weights, and tell it where they are dropped.
    """

    valid: bool = True
    projected: bool = True
    names: Names | None = None
    told: bool = False


# By the fingerprint of a forward.
_KINDS = {
    "3f50b2321ea8768f": _Kind(),  # Deformable DETR's, RT-DETR's, LW-DETR's, RF-DETR's, PP-DocLayout's
    "e51287611c81a091": _Kind(valid=False),  # Mask2Former's
    "fa5b051a6e040d4d": _Kind(valid=False),  # OneFormer's
    "35e2f6e7c3eceb44": _Kind(names=Names("n_points_list", "n_points_scale", "method")),  # RT-DETR v2's
    # D-FINE's and DEIMv2's
    "409760352e064ef5": _Kind(projected=False, names=Names("num_points_list", "num_points_scale", "decoder_method")),
    "0d0f4de88be10195": _Kind(told=True),  # Grounding DINO's, both
    "c42c44df01a71eb4": _Kind(told=True),  # OmDet-Turbo's
}


SAMPLES = "af9a3b827beed9b4"  # the fingerprint of MultiScaleDeformableAttention, a module that only samples


@cache
def kind_of_forward(forward: Any) -> _Kind | None:
    return _KINDS.get(fingerprint(forward) or "")


def samples_plainly(module: Any) -> bool:
    """Whether the module that samples for this one, where there is one, is transformers', and nobody is to see its calls."""
    part = module._modules.get("attn")
    return part is None or (is_bare(part) and _only_samples(part.__class__))


@cache
def _only_samples(kind: type[Module]) -> bool:
    classes = (one for one in kind.__mro__ if "forward" in vars(one) and not one.__module__.startswith("detr_fast."))
    return fingerprint(vars(next(classes))["forward"]) == SAMPLES


class FromOffsets(Told):
    """Its forward, before that of the class or of what else is mixed into it."""

    _detr_fast_kind: _Kind
    _detr_fast_arguments: tuple[str, ...]  # by position

    @classmethod
    def attributes_for(cls, original: type[Module]) -> dict[str, Any]:
        forward: Any = inspect.unwrap(original.forward)
        arguments = tuple(inspect.signature(forward).parameters)[1:]
        found = {"_detr_fast_kind": kind_of_forward(forward), "_detr_fast_arguments": arguments}
        return super().attributes_for(original) | found

    def forward(self: Any, *args: Any, weights_are_dropped: bool = False, **kwargs: Any) -> Any:
        found = None
        if weights_are_dropped or not self._detr_fast_kind.told:
            found = _attended(self, dict(zip(self._detr_fast_arguments, args)) | kwargs)
        return super().forward(*args, **kwargs) if found is None else (found, None)


def _attended(module: Any, given: dict[str, Any]) -> Tensor | None:
    x, memory, references = map(given.get, ("hidden_states", "encoder_hidden_states", "reference_points"))
    if not (isinstance(x, Tensor) and isinstance(memory, Tensor) and isinstance(references, Tensor)):
        return None
    if not is_dispatched(x) or torch.compiler.is_compiling():  # where Inductor fuses the samples
        return None
    if module._forward_hooks or given.get("output_attentions") or not samples_plainly(module):
        return None
    kind: _Kind = module._detr_fast_kind
    points, spread = None, 0.5
    if kind.names is not None:
        points, spread = getattr(module, kind.names.points), module.offset_scale
        if (
            references.shape[2:] != (1, 4)
            or getattr(module, kind.names.method) != "default"
            or not _is_plain(module, getattr(module, kind.names.scale), points)
        ):
            return None
    mask, position = given.get("attention_mask"), given.get("position_embeddings")
    places = references, given["spatial_shapes_list"], points, spread
    taken = taken_around(module, x, memory, *places, position=position, projected=kind.projected)
    if taken is None:  # their code asks for the sampling alone
        return None
    if mask is not None and kind.valid:
        mask = ~mask
    query = x if position is None else x + position
    value = module.value_proj(memory) if kind.projected else memory
    found = sampled_around(module, taken, query, value, mask, references)
    return module.output_proj(found) if kind.projected else found  # type: ignore[no-any-return]


# Of modules that hold 1 / points in a buffer, which a checkpoint may hold otherwise: the buffer that was looked at, when, and what it was.
_scales: WeakKeyDictionary[Module, tuple[Tensor, int, bool]] = WeakKeyDictionary()


def _is_plain(module: Module, scale: Tensor, points: list[int]) -> bool:
    """Whether the buffer holds 1 / points of each point's level, for which the host waits once, and again where it was written to."""
    known = _scales.get(module)
    if not is_memory(scale) or scale.is_inference():
        return False
    if known is None or known[0] is not scale or known[1] != scale._version:
        if scale.is_cuda and torch.cuda.is_current_stream_capturing():
            return False
        expected = torch.tensor([1 / n for n in points for _ in range(n)], dtype=scale.dtype)
        known = scale, scale._version, torch.equal(scale.cpu(), expected)
        _scales[module] = known
    return known[2]
