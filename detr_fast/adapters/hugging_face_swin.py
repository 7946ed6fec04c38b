"""Swin's attention in transformers, which asks the registry with the mask of shifted windows repeated for each image.

Here it is repeated for none (see `windows`). What else is true of attentions that ask the registry holds for it, too.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor
from torch.nn import Module

from detr_fast.adapters.base import Scriptable, fingerprint, joined, joined_of, kind_of
from detr_fast.adapters.blocks import is_dispatched
from detr_fast.adapters.hugging_face import NAME, HuggingFaceAttention, unknown_of
from detr_fast.adapters.windows import attend, packed, with_shift

_CODE = {"2459e4d75f280f93"}  # fingerprints of forwards


class SwinAttention(Scriptable):
    """What its model is set to run on otherwise, and arguments that are not known here, are for the registry."""

    def forward(
        self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        ours = self.config._attn_implementation == NAME and not unknown_of(kwargs)
        if not (ours and is_dispatched(hidden_states)):
            return super().forward(hidden_states, attention_mask, **kwargs)  # type: ignore[misc]
        shape = -1, self.head_dim
        q, k, v = (part(hidden_states).unflatten(-1, shape) for part in (self.q_proj, self.k_proj, self.v_proj))
        mask = with_shift(self.relative_position_bias()[0], attention_mask)
        p = self.attention_dropout if self.training else 0.0
        return self.o_proj(attend(packed(q, k, v), mask, p, self.scaling)), None


class HuggingFaceSwin(HuggingFaceAttention):
    """Attentions whose code is that of transformers' Swin."""

    @classmethod
    def consider(cls, module: Module) -> type[Module] | str | None:
        kind = kind_of(module)
        if not (kind.__module__.startswith("transformers.") and _known(kind.forward)):
            return None
        answer = super().consider(module)
        return joined(SwinAttention, kind, kind) if isinstance(answer, type) else answer

    @classmethod
    def describe(cls, replacement: type[Module]) -> str:
        return f"{__name__}.{joined_of(replacement).__name__}"


@cache
def _known(forward: Any) -> bool:
    return fingerprint(forward) in _CODE
