"""timm's blocks of EVA, BEiT and Swin, whose second norm takes the sum before it, and the attentions of the first two.

Known by all of their code (`base.fingerprint`). EVA's are those of its DINOv3, too.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import apply_rot_embed_cat
from torch import Tensor
from torch.nn import Module

from detr_fast.adapters.base import Adapter, Scriptable, fingerprint, joined, joined_of, kind_of, why_not_switch
from detr_fast.adapters.blocks import comes_apart, is_dispatched, is_plain
from detr_fast.adapters.rotary_functions import Form, turned
from detr_fast.adapters.windows import attend, merged, partition
from detr_fast.nn.blocks import probability, sum_and_norm
from detr_fast.ops.attention import ATTENTION


class EvaAttention(Scriptable):
    """EVA's attention on `ops.attention`."""

    def forward(
        self: Any,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        both = attn_mask is not None and is_causal
        if both or not (self.fused_attn and is_dispatched(x) and is_plain(self.attn_drop)):
            return super().forward(x, rope, attn_mask, is_causal)  # type: ignore[misc,no-any-return]
        gate = None if self.gate is None else self.gate(x).sigmoid()
        if self.qkv is None:
            q, k, v = (part(x).unflatten(-1, (self.num_heads, -1)) for part in (self.q_proj, self.k_proj, self.v_proj))
        else:
            q, k, v = _projected(self, x).unbind(2)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            found = _turned(self, q, k, rope) or (_rotated(self, part, rope) for part in (q, k))
            q, k = (part.to(v.dtype) for part in found)
        y = self.norm(ATTENTION(q, k, v, None, attn_mask, is_causal, probability(self.attn_drop), None).flatten(2))
        return self.proj_drop(self.proj(y if gate is None else y * gate))  # type: ignore[no-any-return]


def _turned(attention: Any, q: Tensor, k: Tensor, rope: Tensor) -> tuple[Tensor, Tensor] | None:
    """`_rotated` of both by one kernel; None where no kernel does it."""
    if rope.ndim == 4 and rope.shape[1] == 1:  # of each image its own, for all heads
        rope = rope[:, 0]
    sin, cos = (rope[None] if rope.ndim == 2 else rope).chunk(2, -1)
    form = Form(interleaved=not getattr(attention, "rotate_half", False), casts=True)
    return turned(form, q, k, cos, sin, False, attention.num_prefix_tokens) if rope.ndim < 4 else None


def _rotated(attention: Any, x: Tensor, rope: Tensor) -> Tensor:
    """All but the first tokens, which have no place in the image, turned by their positions."""
    first = attention.num_prefix_tokens
    half = getattr(attention, "rotate_half", False)
    x = x.transpose(1, 2)
    return torch.cat([x[:, :, :first], apply_rot_embed_cat(x[:, :, first:], rope, half=half)], 2).transpose(1, 2)


def _projected(attention: Any, x: Tensor) -> Tensor:
    """q, k and v (B, N, 3, H, E)."""
    bias = None
    if attention.q_bias is not None:
        bias = torch.cat((attention.q_bias, attention.k_bias, attention.v_bias))
    if bias is None or attention.qkv_bias_separate:
        qkv = attention.qkv(x) if bias is None else attention.qkv(x) + bias
    else:
        qkv = F.linear(x, attention.qkv.weight, bias)
    return qkv.unflatten(-1, (3, attention.num_heads, -1))


class EvaBlock(Scriptable):
    """EVA's block."""

    def forward(
        self: Any,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        if not comes_apart(x, self.norm2):
            return super().forward(x, rope, attn_mask, is_causal)  # type: ignore[misc,no-any-return]
        y = self.attn(self.norm1(x), rope=rope, attn_mask=attn_mask, is_causal=is_causal)
        x, y = sum_and_norm(self.drop_path1(_scaled(y, self.gamma_1)), x, self.norm2)
        return x + self.drop_path2(_scaled(self.mlp(y), self.gamma_2))  # type: ignore[no-any-return]


class BeitAttention(Scriptable):
    """BEiT's attention on `ops.attention`, with a bias by relative position or without."""

    def forward(self: Any, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        if not (self.fused_attn and is_dispatched(x) and is_plain(self.attn_drop)):
            return super().forward(x, shared_rel_pos_bias)  # type: ignore[misc,no-any-return]
        bias = shared_rel_pos_bias
        if self.relative_position_bias_table is not None:
            own = self._get_rel_pos_bias()
            bias = own if bias is None else own + bias
        if bias is not None and bias.ndim == 3:
            bias = bias[None]
        y = attend([_projected(self, x)], bias, probability(self.attn_drop))
        return self.proj_drop(self.proj(y))  # type: ignore[no-any-return]


class BeitBlock(Scriptable):
    """BEiT's block."""

    def forward(self: Any, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        if not comes_apart(x, self.norm2):
            return super().forward(x, shared_rel_pos_bias)  # type: ignore[misc,no-any-return]
        y = self.attn(self.norm1(x), shared_rel_pos_bias=shared_rel_pos_bias)
        x, y = sum_and_norm(self.drop_path1(_scaled(y, self.gamma_1)), x, self.norm2)
        return x + self.drop_path2(_scaled(self.mlp(y), self.gamma_2))  # type: ignore[no-any-return]


def _scaled(y: Tensor, gamma: Tensor | None) -> Tensor:
    return y if gamma is None else gamma * y


class SwinBlock(Scriptable):
    """Swin's block, whose features are (B, height, width, C). Where windows fit in them, they are not copied to pad nothing."""

    detr_fast_is_known: bool  # whether its method `_attn` has the code that we know

    @classmethod
    def attributes_for(cls, original: type[Module]) -> dict[str, Any]:
        code = fingerprint(original._attn)  # type: ignore[attr-defined]
        return {"detr_fast_is_known": code == "0daf3c612703d8f1"}

    def forward(self: Any, x: Tensor) -> Tensor:
        if not comes_apart(x, self.norm2):
            return super().forward(x)  # type: ignore[misc,no-any-return]
        x, y = sum_and_norm(self.drop_path1(self._attn(self.norm1(x))), x, self.norm2)
        y = self.drop_path2(self.mlp(y.flatten(1, 2)))
        return x + y.view(x.shape)

    def _attn(self: Any, x: Tensor) -> Tensor:
        (rows, columns), (down, right) = self.window_size, self.shift_size
        _, height, width, _ = x.shape
        if not self.detr_fast_is_known or height % rows or width % columns:
            return super()._attn(x)  # type: ignore[misc,no-any-return]
        if down or right:
            x = torch.roll(x, (-down, -right), (1, 2))
        mask = self.get_attn_mask(x) if getattr(self, "dynamic_mask", False) else self.attn_mask
        y = merged(self.attn(partition(x, rows, columns), mask=mask), rows, columns, height, width)
        return torch.roll(y, (down, right), (1, 2)) if down or right else y


# By the fingerprint of a forward.
_CODE: dict[str | None, type[Module]] = {
    "7c69b4184846b7e7": EvaAttention,
    "2de1776d441c8f75": EvaBlock,
    "3f6797d1eda8d877": BeitAttention,
    "be0f53d846e50f5a": BeitBlock,
    "0d6bb7b2f7498400": SwinBlock,
}


class TimmBlocks(Adapter):
    """Classes of timm whose code is that of the ones above."""

    @classmethod
    def consider(cls, module: Module) -> type[Module] | str | None:
        kind = kind_of(module)
        ours = _known(kind.forward) if kind.__module__.startswith("timm.") else None
        if ours is None or isinstance(module, ours):
            return None
        return why_not_switch(module) or joined(ours, kind, kind)

    @classmethod
    def describe(cls, replacement: type[Module]) -> str:
        return f"{__name__}.{joined_of(replacement).__name__}"


@cache
def _known(forward: Any) -> type[Module] | None:
    return _CODE.get(fingerprint(forward))
