"""torchvision's vision transformers: the encoder block, whose parts are torch.nn's, and Swin's attentions and block."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import torchvision.models.swin_transformer as swin
import torchvision.models.vision_transformer as theirs
from torch import Tensor
from torch.nn import Module

from detr_fast.adapters.base import Adapter, Scriptable, fingerprint, kind_of, reads, why_not_switch
from detr_fast.adapters.blocks import comes_apart, is_dispatched
from detr_fast.adapters.windows import attend, cosines, merged, partition, shift_mask, with_shift
from detr_fast.nn.blocks import probability, sum_and_norm

# What the forwards that we know read, and the fingerprint of the function that Swin's attentions call.
_KNOWN = {
    theirs.EncoderBlock: ("self input", "torch _assert dim shape ln_1 self_attention dropout ln_2 mlp"),
    swin.ShiftedWindowAttention: (
        "self x",
        "get_relative_position_bias shifted_window_attention qkv weight proj window_size num_heads shift_size "
        "attention_dropout dropout bias training",
    ),
    swin.ShiftedWindowAttentionV2: (
        "self x",
        "get_relative_position_bias shifted_window_attention qkv weight proj window_size num_heads shift_size "
        "attention_dropout dropout bias logit_scale training",
    ),
    swin.SwinTransformerBlock: ("self x", "stochastic_depth attn norm1 mlp norm2"),
}
_WINDOWS = "bd4845568147b87f"


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


class ShiftedWindowAttention(swin.ShiftedWindowAttention, Scriptable):
    """Swin's attention on `ops.attention`."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """As torchvision's."""
        if not is_dispatched(x):
            return super().forward(x)  # type: ignore[no-any-return, misc]
        return _attend_in_windows(self, x)


class ShiftedWindowAttentionV2(swin.ShiftedWindowAttentionV2, Scriptable):
    """The second version's."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """As torchvision's."""
        if not is_dispatched(x):
            return super().forward(x)  # type: ignore[no-any-return, misc]
        return _attend_in_windows(self, x, self.logit_scale)


def _attend_in_windows(attention: Any, given: Tensor, logit_scale: Tensor | None = None) -> Tensor:
    """torchvision's `shifted_window_attention` of (B, height, width, C)."""
    rows, columns = window = attention.window_size
    _, height, width, channels = given.shape
    right, below = -width % columns, -height % rows
    x = F.pad(given, (0, 0, 0, right, 0, below)) if right or below else given  # which would be a copy for nothing
    _, padded_height, padded_width, _ = x.shape
    # A window that is as large as the features is not shifted.
    shift = [s if w < size else 0 for s, w, size in zip(attention.shift_size, window, x.shape[1:3])]
    if sum(shift) > 0:
        x = torch.roll(x, shifts=(-shift[0], -shift[1]), dims=(1, 2))
    x = partition(x, rows, columns)

    bias = attention.qkv.bias
    if logit_scale is not None and bias is not None:
        bias = torch.cat([bias[:channels], bias.new_zeros(channels), bias[2 * channels :]])
    qkv = F.linear(x, attention.qkv.weight, bias).unflatten(-1, (3, attention.num_heads, -1))
    packs, scale = [qkv], None
    if logit_scale is not None:
        q, k, v = qkv.unbind(2)
        packs, scale = cosines(q, k, v, logit_scale), 1.0
    hidden = shift_mask(given, (padded_height, padded_width), window, shift) if sum(shift) > 0 else None
    mask = with_shift(attention.get_relative_position_bias()[0], hidden)
    x = attend(packs, mask, probability(attention.attention_dropout, attention.training), scale)
    x = F.linear(x, attention.proj.weight, attention.proj.bias)
    x = F.dropout(x, attention.dropout, attention.training)

    x = merged(x, rows, columns, padded_height, padded_width)
    if sum(shift) > 0:
        x = torch.roll(x, shifts=(shift[0], shift[1]), dims=(1, 2))
    return x[:, :height, :width].contiguous()


class SwinTransformerBlock(swin.SwinTransformerBlock, Scriptable):
    """Swin's block; the sum behind attention and the second norm are one op."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """As torchvision's."""
        if not comes_apart(x, self.norm2):
            return super().forward(x)  # type: ignore[no-any-return, misc]
        x, y = sum_and_norm(self.stochastic_depth(self.attn(self.norm1(x))), x, self.norm2)
        return x + self.stochastic_depth(self.mlp(y))


_REPLACEMENTS: dict[type[Module], type[Module]] = {
    theirs.EncoderBlock: EncoderBlock,
    swin.ShiftedWindowAttention: ShiftedWindowAttention,
    swin.ShiftedWindowAttentionV2: ShiftedWindowAttentionV2,
    swin.SwinTransformerBlock: SwinTransformerBlock,
}


class Torchvision(Adapter):
    """Exactly torchvision's EncoderBlock, Swin's attentions, and the block of its first version."""

    @classmethod
    def consider(cls, module: Module) -> type[Module] | str | None:
        kind = kind_of(module)
        replacement = _REPLACEMENTS.get(kind)
        if replacement is None:
            return None
        windows = issubclass(kind, swin.ShiftedWindowAttention)
        known = not windows or fingerprint(swin.shifted_window_attention) == _WINDOWS
        if not known or reads(kind.forward) != _KNOWN[kind]:
            return "this version of torchvision computes it differently"
        return why_not_switch(module) or replacement
