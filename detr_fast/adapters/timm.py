"""timm's vision transformers: their attention, block and norm classes, and the attentions of both versions of Swin."""

from __future__ import annotations

from typing import Any

import timm.models.swin_transformer as swin
import timm.models.swin_transformer_v2 as swin_v2
import timm.models.vision_transformer as theirs
import torch
import torch.nn.functional as F
from timm.layers import LayerNorm as TimmLayerNorm
from timm.layers import RmsNorm as TimmRmsNorm
from torch import Tensor, nn
from torch.nn import Module

from detr_fast.adapters.base import Adapter, Scriptable, kind_of, names, names_used, reads, why_not_switch
from detr_fast.adapters.blocks import NORMS, comes_apart, is_dispatched, is_plain
from detr_fast.adapters.windows import attend, bias_of, cosines, with_shift
from detr_fast.nn.bare import is_bare
from detr_fast.nn.blocks import probability, sum_and_norm
from detr_fast.ops.attention import ATTENTION
from detr_fast.ops.layer_norm import LAYER_NORM
from detr_fast.ops.rms_norm import RMS_NORM

_BLOCK = ("self x attn_mask is_causal", "drop_path1 ls1 attn norm1 drop_path2 ls2 mlp norm2")
# What the forwards that we know read; another one computes something else.
_KNOWN = {
    theirs.Attention: names(
        "shape gate sigmoid qkv reshape num_heads head_dim permute unbind q_norm k_norm fused_attn F "
        "scaled_dot_product_attention attn_drop p training scale transpose resolve_self_attn_mask maybe_add_mask softmax "
        "attn_dim norm proj proj_drop"
    ),
    theirs.Block: names(_BLOCK[1]),
    TimmLayerNorm: names("_fast_norm fast_layer_norm normalized_shape weight bias eps F layer_norm"),
    TimmRmsNorm: names("_fast_norm fast_rms_norm normalized_shape weight eps rms_norm"),
    swin.WindowAttention: names(
        "shape qkv reshape num_heads permute unbind fused_attn _get_rel_pos_bias view expand torch nn functional "
        "scaled_dot_product_attention training attn_drop p scale transpose unsqueeze softmax proj proj_drop"
    ),
    swin_v2.WindowAttention: names(
        "shape q_bias qkv torch cat k_bias v_bias qkv_bias_separate F linear weight reshape num_heads permute unbind "
        "normalize transpose clamp logit_scale math log exp cpb_mlp relative_coords_table view relative_position_index "
        "window_size contiguous sigmoid unsqueeze softmax attn_drop proj proj_drop"
    ),
}


class Attention(theirs.Attention, Scriptable):
    """The same attention on `ops.attention`, in the layout that the projection leaves."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """As timm's. CPU tensors, and models that have timm's fused attention switched off, take the original."""
        if not self.fused_attn or not is_dispatched(x) or (attn_mask is not None and is_causal):
            return super().forward(x, attn_mask, is_causal)
        project_gate = getattr(self, "gate", None)  # newer versions have it
        gate = None if project_gate is None else project_gate(x).sigmoid()
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(2)
        dropout = self.attn_drop.p if self.training else 0.0
        y = ATTENTION(self.q_norm(q), self.k_norm(k), v, None, attn_mask, is_causal, dropout, None)
        y = self.norm(y.flatten(2))
        return self.proj_drop(self.proj(y if gate is None else y * gate))


class LayerNorm(TimmLayerNorm, Scriptable):
    """The same LayerNorm on `ops.layer_norm`."""

    def forward(self, x: Tensor) -> Tensor:
        """As timm's. With timm's fast norm switched on, which casts under autocast, the original runs."""
        if self._fast_norm:
            return super().forward(x)
        if is_dispatched(x):
            return LAYER_NORM(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class RmsNorm(TimmRmsNorm, Scriptable):
    """The same RMSNorm on `ops.rms_norm`."""

    def forward(self, x: Tensor) -> Tensor:
        """As timm's, which runs with its fast norm switched on."""
        if self._fast_norm:
            return super().forward(x)
        if is_dispatched(x):
            return RMS_NORM(x, self.normalized_shape, self.weight, self.eps)
        return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)


class Block(theirs.Block, Scriptable):
    """The same block; the sum behind attention and the second norm are one op."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """As timm's."""
        if not comes_apart(x, self.norm2):
            return super().forward(x, attn_mask, is_causal)
        y = self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)
        x, y = sum_and_norm(self.drop_path1(self.ls1(y)), x, self.norm2)
        return x + self.drop_path2(self.ls2(self.mlp(y)))


class WindowAttention(swin.WindowAttention, Scriptable):
    """Swin's attention on `ops.attention`."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """As timm's."""
        if not is_dispatched(x) or not _is_softmax(self.softmax, self.attn_drop):
            return super().forward(x, mask)
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        both = with_shift(self._get_rel_pos_bias()[0], mask)
        y = attend([qkv], both, probability(self.attn_drop), self.scale)
        return self.proj_drop(self.proj(y))


class WindowAttentionV2(swin_v2.WindowAttention, Scriptable):
    """The second version's."""

    def forward(self: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """As timm's."""
        if not is_dispatched(x) or not _is_softmax(self.softmax, self.attn_drop):
            return super().forward(x, mask)  # type: ignore[misc]
        bias = None if self.q_bias is None else torch.cat((self.q_bias, self.k_bias, self.v_bias))
        if bias is None or self.qkv_bias_separate:
            qkv = self.qkv(x) if bias is None else self.qkv(x) + bias
        else:
            qkv = F.linear(x, self.qkv.weight, bias)
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        table = self.cpb_mlp(self.relative_coords_table).view(-1, self.num_heads)
        bias = 16 * torch.sigmoid(bias_of(table, self.relative_position_index))
        both = with_shift(bias, mask)
        y = attend(cosines(q, k, v, self.logit_scale), both, probability(self.attn_drop), 1.0)
        return self.proj_drop(self.proj(y))  # type: ignore[no-any-return]


def _is_softmax(softmax: Module, dropout: Module) -> bool:
    """Whether what lies between scores and weights is what it was."""
    return type(softmax) is nn.Softmax and is_bare(softmax) and is_plain(dropout)


_REPLACEMENTS: dict[type[Module], type[Module]] = {
    swin.WindowAttention: WindowAttention,
    swin_v2.WindowAttention: WindowAttentionV2,
    theirs.Attention: Attention,
    theirs.Block: Block,
    TimmLayerNorm: LayerNorm,
    TimmRmsNorm: RmsNorm,
}
NORMS.update((TimmLayerNorm, LayerNorm))


class Timm(Adapter):
    """Exactly timm's Attention, Block, LayerNorm and RmsNorm, and Swin's attentions."""

    @classmethod
    def consider(cls, module: Module) -> type[Module] | str | None:
        kind = kind_of(module)
        replacement = _REPLACEMENTS.get(kind)
        if replacement is None:
            return None
        if (kind is theirs.Block and reads(theirs.Block.forward) != _BLOCK) or (
            kind is TimmRmsNorm and kind.forward.__globals__.get("rms_norm") is not F.rms_norm
        ):
            return "this version of timm computes it differently"
        if unknown := names_used(kind.forward) - _KNOWN[kind]:
            return f"this version of timm computes it differently ({', '.join(sorted(unknown))})"
        if (arguments := reads(kind.forward)[0]) != reads(replacement.forward)[0]:
            return f"this version of timm calls it differently ({arguments})"
        return why_not_switch(module) or replacement
