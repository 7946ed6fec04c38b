"""The losses of transformers' detectors, switched to ours.

Theirs go decoder layer by decoder layer: costs to the host, an assignment image by image, indices back, checks that look at
the device. Ours do all layers and images at once, and on a GPU the host waits for nothing. A model asks for its loss by
its attribute `loss_function`: that is what is set and taken away, and only where it is transformers' own, with the code
that ours was written for. Whatever ours does not take goes to transformers' function.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch.nn import Module
from transformers.loss.loss_utils import LOSS_MAPPING
from transformers.modeling_utils import PreTrainedModel

from detr_fast.adapters import (
    hugging_face_loss_d_fine,
    hugging_face_loss_detr,
    hugging_face_loss_grounding,
    hugging_face_loss_lw_detr,
    hugging_face_loss_rt_detr,
)
from detr_fast.adapters.base import Adapter, names, why_class_is_taken
from detr_fast.adapters.hugging_face_loss_code import find, names_read, why_other_code

_ATTRIBUTE = "_loss_function"  # where transformers keeps a loss function that was set
_TASKS = ("ForObjectDetection", "ForSegmentation")
_PROPERTY = "LOSS_MAPPING _loss_function getattr hasattr logger warning_once"
_LOSSES = {
    **hugging_face_loss_detr.KNOWN,
    **hugging_face_loss_rt_detr.KNOWN,
    **hugging_face_loss_d_fine.KNOWN,
    **hugging_face_loss_lw_detr.KNOWN,
    **hugging_face_loss_grounding.KNOWN,
}


class HuggingFaceLoss(Adapter):
    """Detectors whose loss is one of transformers' that we have, too."""

    @classmethod
    def consider(cls, module: Module) -> type[Module] | str | None:
        kind = getattr(module, "loss_type", None)
        if not isinstance(module, PreTrainedModel) or not isinstance(kind, str) or not kind.endswith(_TASKS):
            return None
        if (reason := why_class_is_taken(module)) is not None:
            return reason
        if "loss_function" not in names_read(inspect.unwrap(type(module).forward)):
            return None  # it computes its loss without asking for it
        if hasattr(module, _ATTRIBUTE):
            return "its loss_function was set by hand"
        asked: Any = PreTrainedModel.__dict__.get("loss_function")
        if inspect.getattr_static(module, "loss_function", None) is not asked:
            return "its class has a loss_function of its own"
        if names_read(getattr(asked, "fget", None)) != names(_PROPERTY):
            return "this version of transformers asks for the loss function differently"
        return why_not_loss(LOSS_MAPPING.get(kind), module.config) or type(module)

    @classmethod
    def describe(cls, replacement: type[Module]) -> str:
        return "its loss on detr_fast.ops, all decoder layers at once"

    @classmethod
    def switched(cls, module: Module) -> None:
        kind: Any = module.loss_type
        known = _LOSSES.get(getattr(LOSS_MAPPING.get(kind), "__name__", ""))
        if known is not None and not hasattr(module, _ATTRIBUTE):  # nothing was set, or replaced, since
            module.__dict__[_ATTRIBUTE] = known.ours

    @classmethod
    def restored(cls, module: Module) -> None:
        if module.__dict__.get(_ATTRIBUTE) in [known.ours for known in _LOSSES.values()]:
            del module.__dict__[_ATTRIBUTE]


def why_not_loss(function: Any, config: Any) -> str | None:
    """The reason why a loss of transformers' stays for such a configuration, or None where ours computes the same."""
    name = getattr(function, "__name__", str(function))
    if name.endswith("SegmentationLoss"):
        return f"its loss, transformers' {name}, is one over masks, too, which runs as it is"
    if name not in _LOSSES:
        return f"its loss, {name}, is none of those known: {', '.join(_LOSSES)}"
    known = _LOSSES[name]
    if find(known.modules, name) is not function:
        return f"its loss, {name}, is not transformers' own"
    return why_other_code(known) or known.why_not(config)
