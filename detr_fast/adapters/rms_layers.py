"""Layers of language models, and of vision models in the same code, whose second norm takes the sum before it: one op.

Known by all of their code (`base.fingerprint`), wherever they are defined. Norms are RMSNorms that `rms_norms` knows, or LayerNorms.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

from torch import Tensor
from torch.nn import Module

from detr_fast.adapters import t5_layers as t5
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
from detr_fast.adapters.blocks import comes_apart, is_dispatched, is_norm
from detr_fast.adapters.rms_norms import means_what_it_says
from detr_fast.adapters.rms_sums import sum_and_rms_norm, takes_sums
from detr_fast.nn.blocks import sum_and_norm


class LlamaDecoderLayer(Scriptable):
    """Llama's layer and its many copies, which differ in the order of their arguments."""

    detr_fast_given: dict[str, Any]  # what the attention is given by name besides x, and what by default
    _second = "post_attention_layernorm"

    @classmethod
    def attributes_for(cls, original: type[Module]) -> dict[str, Any]:
        _, _, *given = inspect.signature(original.forward).parameters.values()
        named = {one.name: one.default for one in given if one.kind is one.POSITIONAL_OR_KEYWORD}
        return {"detr_fast_given": {name: None if value is inspect._empty else value for name, value in named.items()}}

    def forward(self: Any, hidden_states: Tensor, *rest: Any, **named: Any) -> Tensor:
        norm = getattr(self, self._second)
        add = _sum_and_norm_of(hidden_states, norm)
        if add is None:
            return super().forward(hidden_states, *rest, **named)  # type: ignore[misc,no-any-return]
        given = {**self.detr_fast_given, **dict(zip(self.detr_fast_given, rest)), **named}
        y, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **given)
        total, y = add(self._attended(y), hidden_states, norm)
        return total + self._fed(self.mlp(y))  # type: ignore[no-any-return]

    def _attended(self: Any, y: Tensor) -> Tensor:
        """What is added of the attention's output."""
        return y

    def _fed(self: Any, y: Tensor) -> Tensor:
        """What is added of the feed-forward block's."""
        return y


class GraniteDecoderLayer(LlamaDecoderLayer):
    """Granite's, which scales what it adds."""

    def _attended(self: Any, y: Tensor) -> Tensor:
        return y * self.residual_multiplier  # type: ignore[no-any-return]

    _fed = _attended


class Phi3DecoderLayer(LlamaDecoderLayer):
    """Phi-3's, with dropout."""

    def _attended(self: Any, y: Tensor) -> Tensor:
        return self.resid_attn_dropout(y)  # type: ignore[no-any-return]

    def _fed(self: Any, y: Tensor) -> Tensor:
        return self.resid_mlp_dropout(y)  # type: ignore[no-any-return]


class GemmaDecoderLayer(LlamaDecoderLayer):
    """The layer of Gemma 2 and 3, which normalises what it adds, too."""

    _second = "pre_feedforward_layernorm"

    def _attended(self: Any, y: Tensor) -> Tensor:
        return self.post_attention_layernorm(y)  # type: ignore[no-any-return]

    def _fed(self: Any, y: Tensor) -> Tensor:
        return self.post_feedforward_layernorm(y)  # type: ignore[no-any-return]


class Glm4DecoderLayer(LlamaDecoderLayer):
    """GLM-4's, likewise."""

    def _attended(self: Any, y: Tensor) -> Tensor:
        return self.post_self_attn_layernorm(y)  # type: ignore[no-any-return]

    def _fed(self: Any, y: Tensor) -> Tensor:
        return self.post_mlp_layernorm(y)  # type: ignore[no-any-return]


class VisionBlock(Scriptable):
    """The block of Qwen2-VL's vision model and its copies; some normalise by LayerNorms, some by Llama's."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        cu_seqlens: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        norm = self.norm2
        add = _sum_and_norm_of(hidden_states, norm)
        if add is None:
            return super().forward(hidden_states, cu_seqlens, position_embeddings, **kwargs)  # type: ignore[misc,no-any-return]
        y = self.norm1(hidden_states)
        y = self.attn(y, cu_seqlens=cu_seqlens, position_embeddings=position_embeddings, **kwargs)
        total, y = add(y, hidden_states, norm)
        return total + self.mlp(y)  # type: ignore[no-any-return]


def _sum_and_norm_of(x: Any, norm: Any) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """What computes a sum and such a norm of it, which is a LayerNorm or an RMSNorm; None where the norm has to be called."""
    if is_norm(norm):
        return sum_and_norm if comes_apart(x, norm) else None
    return sum_and_rms_norm if is_dispatched(x) and takes_sums(norm) else None


# By the fingerprint of a forward.
_CODE: dict[str | None, type[Module]] = {
    "0df2f77903ae34c9": LlamaDecoderLayer,
    "131db2e119415395": LlamaDecoderLayer,  # Mixtral's
    "35920fee16ff2c49": GraniteDecoderLayer,
    "7fc4440241e36c27": Phi3DecoderLayer,
    "b5deed995e88141b": GemmaDecoderLayer,
    "923366b8013e47f6": Glm4DecoderLayer,
    "5c22f714c673c9f1": Glm4DecoderLayer,  # GLM-4.1V's
    "8de5806ed00657e9": VisionBlock,
    "e0313603445c8907": t5.T5Block,
    "ba20aed234a5021d": t5.UMT5Block,
    "3bb545510593f980": t5.LongT5Block,
}
# What the code of each of them reads, one or the other: others need no second look.
_READ = {"post_attention_layernorm", "norm2", "layer"}


class RMSNormLayers(Adapter):
    """Classes whose code is that of the layers above, wherever they are defined."""

    @classmethod
    def consider(cls, module: Module) -> type[Module] | str | None:
        kind: Any = kind_of(module)
        ours = None if isinstance(module, Scriptable) else _known(kind)
        return None if ours is None else why_not_switch(module) or joined(ours, kind, kind)

    @classmethod
    def describe(cls, replacement: type[Module]) -> str:
        return f"{__name__}.{joined_of(replacement).__name__}"


@cache
def _known(kind: Any) -> type[Module] | None:
    """The class above that has the code of this one."""
    forward = kind.forward
    if not inspect.isfunction(inspect.unwrap(forward)) or not _READ & names_used(forward):
        return None
    ours = kind.__module__.startswith("transformers.") or means_what_it_says(forward)
    return _CODE.get(fingerprint(forward)) if ours else None
