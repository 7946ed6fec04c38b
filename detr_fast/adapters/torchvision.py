"""torchvision's vision transformers: the encoder block; its parts are torch.nn's."""

from __future__ import annotations

from typing import Any

import torchvision.models.vision_transformer as theirs
from torch import Tensor
from torch.nn import Module

from detr_fast.adapters.base import Adapter, Scriptable, kind_of, reads, why_not_switch
from detr_fast.adapters.blocks import comes_apart
from detr_fast.nn.blocks import probability, sum_and_norm

_KNOWN = ("self input", "torch _assert dim shape ln_1 self_attention dropout ln_2 mlp")


class EncoderBlock(theirs.EncoderBlock, Scriptable):
    """The same block; dropout, the sum behind attention and the second norm are one op."""

    def forward(self: Any, input: Tensor) -> Tensor:
        """As torchvision's."""
        if not comes_apart(input, self.ln_2, self.dropout) or input.ndim != 3:
            return super().forward(input)  # type: ignore[no-any-return, misc]
        x = self.ln_1(input)
        x, _ = self.self_attention(x, x, x, need_weights=False)
        x, y = sum_and_norm(x, input, self.ln_2, probability(self.dropout, self.training))
        return x + self.mlp(y)


class Torchvision(Adapter):
    """Exactly torchvision's EncoderBlock."""

    @classmethod
    def consider(cls, module: Module) -> type[Module] | str | None:
        if kind_of(module) is not theirs.EncoderBlock:
            return None
        if reads(theirs.EncoderBlock.forward) != _KNOWN:
            return "this version of torchvision computes it differently"
        return why_not_switch(module) or EncoderBlock
