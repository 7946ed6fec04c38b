"""Attentions in transformers that ask the registry, where there is more to gain than by what the registry is given: Swin's, SAM 2's, Whisper's.

Swin's gives it the mask of shifted windows repeated for each image, here it is repeated for none (see `windows`). What else is true of
attentions that ask the registry holds for them, too.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor
from torch.nn import Module

from detr_fast.adapters.base import Scriptable, fingerprint, joined, joined_of, kind_of
from detr_fast.adapters.blocks import is_dispatched
from detr_fast.adapters.hugging_face import NAME, HuggingFaceAttention, unknown_of
from detr_fast.adapters.hugging_face_hiera import Sam2Attention
from detr_fast.adapters.hugging_face_whisper import AudioAttention, WhisperAttention
from detr_fast.adapters.windows import attend, packed, with_shift


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


# By the fingerprint of a forward: our class.
_CODE: dict[str, type[Module]] = {
    "2459e4d75f280f93": SwinAttention,
    "f79edfb2d96586e8": Sam2Attention,
    "9f4f226bc5b0383b": WhisperAttention,
    "a05f252faa7ced59": AudioAttention,
}


class HuggingFaceSwin(HuggingFaceAttention):
    """Attentions whose code is that of transformers' Swin, SAM 2 or Whisper."""

    @classmethod
    def consider(cls, module: Module) -> type[Module] | str | None:
        kind = kind_of(module)
        ours = _ours(kind.forward) if kind.__module__.startswith("transformers.") else None
        if ours is None:
            return None
        answer = super().consider(module)
        return joined(ours, kind, kind) if isinstance(answer, type) else answer

    @classmethod
    def describe(cls, replacement: type[Module]) -> str:
        ours = joined_of(replacement)
        return f"{ours.__module__}.{ours.__name__}"


@cache
def _ours(forward: Any) -> type[Module] | None:
    return _CODE.get(fingerprint(forward) or "")
