"""Feed-forward blocks that are a module of their own: timm's and torchvision's by name, Hugging Face's by their code.

Two linear layers with an activation and dropout between; the original's forward runs where a part is not plainly that.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Module

from detr_fast.adapters.base import (
    Adapter,
    Scriptable,
    fingerprint,
    joined,
    kind_of,
    public_name,
    why_not_fuse,
    why_not_switch,
)
from detr_fast.adapters.blocks import activation_name, feed_forward_of, is_dispatched, is_plain
from detr_fast.nn.bare import is_bare
from detr_fast.nn.blocks import FeedForwardParts, probability


class _Names(NamedTuple):
    """The attributes that hold a block's parts; dropouts are modules, numbers, or None where there is none."""

    first: str
    activation: str
    dropout: str | None
    second: str
    output_dropout: str | None
    early_dropout: str | None = None  # one before the activation, where the op has none: it must not drop anything


_KNOWN = {
    "timm.layers.mlp.Mlp": _Names("fc1", "act", "drop1", "fc2", "drop2"),
    "torchvision.models.vision_transformer.MLPBlock": _Names("0", "1", "2", "3", "4"),
    "torchvision.ops.misc.MLP": _Names("0", "1", "2", "3", "4"),  # Swin's
}
# Of transformers, whose models copy their blocks from each other: by the fingerprint of their forward.
_CODE = {
    "27bd2fbf4c9a2aaa": _Names("fc1", "activation_fn", "activation_dropout", "fc2", "dropout"),  # DetrMLP
    "be6be78ac7ccecf8": _Names("fc1", "activation_fn", None, "fc2", None),  # CLIPMLP
    "0c7c54402a16d5b0": _Names("fc1", "act", "drop", "fc2", "drop"),  # VitDetMlp
    "0fd144a0805b31fc": _Names("layers.0", "act", None, "layers.1", None),  # DFineMLP
    # Wav2Vec2FeedForward
    "1c2c23b21527109b": _Names(
        "intermediate_dense", "intermediate_act_fn", "intermediate_dropout", "output_dense", "output_dropout"
    ),
    "a633c94862c8b322": _Names("lin1", "act", None, "lin2", None),  # SamMLPBlock
    "152f12f397876a65": _Names("up_proj", "act_fn", None, "down_proj", None),  # DINOv3ViTMLP
    "1c4cd04a68a7f1f5": _Names("linear_fc1", "act_fn", None, "linear_fc2", None),  # Qwen3VLVisionMLP
    "db26261f66ca73e2": _Names("fc1", "act", None, "fc2", None),  # Qwen2-VL's VisionMlp
    "837133055a5f7055": _Names("linear_1", "act", None, "linear_2", None),  # LlavaMultiModalProjector
    "c8a6d21008121fff": _Names("linear_1", "act", None, "linear_2", None),  # VoxtralMultiModalProjector
    "8fd692b28fb4d7f4": _Names("c_fc", "act", None, "c_proj", "dropout"),  # GPTNeoMLP
    "694bef80e0a63f00": _Names("fc_in", "act", None, "fc_out", "dropout"),  # GPTJMLP
    "425f2a9f50a12c28": _Names("dense_h_to_4h", "act", None, "dense_4h_to_h", None),  # GPTNeoXMLP
    "5bef2687e7826108": _Names("fc1", "activation", "drop", "fc2", "drop"),  # FocalNetMlp
    "bb5a5853af1d22cb": _Names(
        "linear1", "activation", "activation_dropout", "linear2", None
    ),  # ParakeetEncoderFeedForward
    "128ab49c886a85dd": _Names("fc1", "activation", None, "fc2", None),  # VitPoseBackboneMLP
    "7077407459cd7e65": _Names("wi", "act", "dropout", "wo", None),  # T5DenseActDense
    "379fc92cdf45bb61": _Names("proj_in", "activation", None, "proj_out", None),  # Sam2FeedForward
    "88d823c453379acc": _Names("fc1", "activation_fn", None, "fc2", None, "dropout"),  # Sam3MLP
    "7f6e062925602053": _Names("fc1", "act", "dropout", "fc2", None),  # NllbMoeDenseActDense
}


class FeedForward(Scriptable):
    """The forward of a block; everything else is the class's that this is mixed into."""

    detr_fast_names: _Names  # of the attributes that hold the block's parts
    detr_fast_argument: str  # the name that the original has for its input

    @classmethod
    def attributes_for(cls, original: type[Module]) -> dict[str, Any]:
        argument = list(inspect.signature(original.forward).parameters)[1]
        return {"detr_fast_names": _names(original), "detr_fast_argument": argument}

    def forward(self: Any, x: Tensor | None = None, /, **named: Tensor) -> Tensor:
        """As the original's, which runs for CPU tensors and where a part was wrapped or hooked since."""
        if x is None and set(named) == {self.detr_fast_argument}:
            x = named.pop(self.detr_fast_argument)
        if x is None or named:  # which the original refuses
            return super().forward(*(() if x is None else (x,)), **named)  # type: ignore[misc]
        parts = parts_of(self) if is_dispatched(x) else None
        if parts is None:
            return super().forward(x)  # type: ignore[misc]
        y = feed_forward_of(x, parts)
        return F.dropout(y, parts.output_dropout_p) if parts.output_dropout_p else y


def parts_of(block: Any) -> FeedForwardParts | None:
    """The parts of a switched block; None where it has to be called."""
    if not isinstance(block, FeedForward) or not all(map(is_bare, block.children())):
        return None
    if not _has_two_layers(block):
        return None
    names = block.detr_fast_names
    first, second = block.get_submodule(names.first), block.get_submodule(names.second)
    activation = activation_name(getattr(block, names.activation))
    if activation is None or not (is_plain(first) and is_plain(second)):
        return None
    if first.weight.dtype != second.weight.dtype:  # as T5 has it in fp16; its block casts in between
        return None
    if names.early_dropout is not None and probability(getattr(block, names.early_dropout), block.training):
        return None
    inner, outer = (
        0.0 if name is None else probability(getattr(block, name), block.training)
        for name in (names.dropout, names.output_dropout)
    )
    return FeedForwardParts(first, activation, inner, second, outer)


def _names(kind: type[Module]) -> _Names | None:
    """The attributes that hold the parts of such a block; None of a class that is none."""
    if kind.__module__.startswith("transformers."):
        return _names_by_code(kind.forward)
    return _KNOWN.get(f"{kind.__module__}.{kind.__qualname__}")


@cache
def _names_by_code(forward: Any) -> _Names | None:
    return _CODE.get(fingerprint(forward) or "")


def _has_two_layers(block: Any) -> bool:
    """D-FINE's blocks, SAM 2's and torchvision's may have another number, and torchvision's may normalise in between."""
    if (isinstance(block, nn.Sequential) and len(block) != 5) or getattr(block, "sigmoid_output", False):  # SAM 2's
        return False
    return getattr(block, "num_layers", 2) == 2


class FeedForwardBlocks(Adapter):
    """Exactly the classes and the code in the tables above; timm's may also normalise in between, which is left alone."""

    @classmethod
    def consider(cls, module: Module) -> type[Module] | str | None:
        kind = kind_of(module)
        parts = _names(kind)
        if parts is None or isinstance(module, FeedForward) or not _has_two_layers(module):
            return None
        expected: dict[str, tuple[type[Module], ...]] = dict.fromkeys((parts.first, parts.second), (nn.Linear,))
        if (reason := why_not_switch(module) or why_not_fuse(module, expected)) is not None:
            return reason
        if activation_name(activation := getattr(module, parts.activation)) is None:
            name = getattr(activation, "__name__", "") or public_name(type(activation))
            return f"its activation {name} is none that the fused block knows"
        if not isinstance(getattr(module, "norm", _NOTHING), nn.Identity):
            return "it normalises between its two layers"
        return joined(FeedForward, kind, kind)

    @classmethod
    def describe(cls, replacement: type[Module]) -> str:
        return "detr_fast.ops.feed_forward"


_NOTHING = nn.Identity()
