"""What a call of attention is to the dispatcher: what fits, its signature, its description."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from detr_fast import dispatch
from detr_fast.dispatch import Call, Situation
from detr_fast.ops.boundary import on_one_device, wants_grad
from detr_fast.ops.layouts import Layouts, key, layouts

Weights = Literal["heads", "mean"] | None  # whether the attention weights are returned too, and how


@dataclass(frozen=True)
class AttentionCall(Call):
    """dtype: what is computed in, autocast's under autocast. layouts: of q, k, v and the mask."""

    batch: int
    heads: int
    key_heads: int
    queries: int
    keys: int
    head_dim: int
    value_dim: int
    key_padding: bool
    attn_mask: str | None  # its dtype's name
    mask_shape: tuple[int, ...]
    mask_grad: bool
    is_causal: bool
    dropout: bool
    return_lse: bool
    weights: Weights
    one_dtype: bool  # of q, k and v, and of a float mask unless that is fp32
    misfit: str | None  # what does not fit, in words
    layouts: Layouts

    def shapes(self) -> str:
        extras = [
            name
            for name, present in (
                ("key_padding_mask", self.key_padding),
                (f"{self.attn_mask} attn_mask", self.attn_mask),
                ("causal", self.is_causal),
                ("dropout", self.dropout),
                ("log-sum-exp", self.return_lse),
                ("weights", self.weights),
            )
            if present
        ]
        dims = self.head_dim if self.head_dim == self.value_dim else f"{self.head_dim}/{self.value_dim}"
        heads = self.heads if self.heads == self.key_heads else f"{self.heads}/{self.key_heads}"
        dtype = str(self.dtype).removeprefix("torch.")
        return " ".join([f"B {self.batch} H {heads} {self.queries}×{self.keys} hd {dims} {dtype}", *extras])


def misfit(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    padding: Tensor | None,
    mask: Tensor | None,
    dropout_p: float,
    enable_gqa: bool = False,
) -> str | None:
    """What does not fit in a call of attention, in words; None where all does."""
    if not (q.ndim == k.ndim == v.ndim == 4):
        return f"attention takes q (B, L, H, E), k (B, S, H, E), v (B, S, H, Ev); got {_shape(q)}, {_shape(k)}, {_shape(v)}"
    batch, length, heads, dim = q.shape
    keys, key_heads = k.shape[1], k.shape[2]
    if (
        k.shape != (batch, keys, key_heads, dim)
        or v.shape[:3] != k.shape[:3]
        or (key_heads != heads and not enable_gqa)
    ):
        return (
            f"k must be (B, S, H, E) and v (B, S, H, Ev) with q's B {batch}, H {heads}, E {dim} and one S; "
            f"got q {_shape(q)}, k {_shape(k)}, v {_shape(v)}"
        )
    if key_heads != heads and (key_heads == 0 or heads % key_heads):
        return f"with enable_gqa, k's and v's heads must divide q's; got {key_heads} and {heads}"
    if not 0.0 <= dropout_p <= 1.0:
        return f"dropout_p must lie in [0, 1]; got {dropout_p}"
    if padding is not None and (padding.dtype != torch.bool or padding.shape != (batch, keys)):
        return (
            f"key_padding_mask must be bool of shape (B, S) = ({batch}, {keys}), True = padding; "
            f"got {padding.dtype} {_shape(padding)}"
        )
    if mask is not None and mask.ndim == 5 and mask.shape[0] == 1 and mask.shape[1] and batch % mask.shape[1] == 0:
        mask, batch = mask[0], mask.shape[1]  # what comes again in the next batch elements
    return None if mask is None else mask_misfit(mask, (batch, heads, length, keys), "(B, H, L, S)")


def mask_misfit(mask: Tensor, shape: tuple[int, int, int, int], names: str) -> str | None:
    """What does not fit in an attn_mask that is to broadcast to that shape, in words."""
    fits = mask.ndim <= 4 and all(m in (1, s) for m, s in zip(mask.shape[::-1], shape[::-1]))
    if fits and (mask.dtype == torch.bool or mask.is_floating_point()):
        return None
    return (
        f"attn_mask must be bool (True = may attend) or float and broadcast to {names} = {shape}; "
        f"got {mask.dtype} {_shape(mask)}"
    )


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


@torch.compiler.assume_constant_result
def tf32() -> bool:
    """Whether fp32 products may be TF32, by torch's setting; AMD's GPUs before gfx942 have none."""
    return torch.version.hip is None and bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


def signature(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    padding: Tensor | None,
    mask: Tensor | None,
    is_causal: bool,
    dropout_p: float,
    scale: float | None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    weights: Weights = None,
) -> tuple[Any, ...]:
    return (
        *map(key, (q, k, v, padding, mask)),
        is_causal,
        dropout_p > 0.0,
        0.0 <= dropout_p <= 1.0,
        enable_gqa,
        return_lse,
        weights,
        q.dtype == torch.float32 and tf32(),
    )


def describe(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    padding: Tensor | None,
    mask: Tensor | None,
    is_causal: bool,
    dropout_p: float,
    scale: float | None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    weights: Weights = None,
    *,
    situation: Situation,
) -> AttentionCall:
    batch, queries, heads, dim = q.shape
    tensors = [q, k, v] if mask is None else [q, k, v, mask]
    dtypes = [computed_dtype(t.dtype, situation.autocast) for t in tensors if t.dtype != torch.bool]
    if mask is not None and dtypes[-1] == torch.float32:
        dtypes = dtypes[:3]
    return AttentionCall(
        device=q.device,
        architecture=dispatch.architecture(q.device),
        dtype=dtypes[0],
        tensor_type=dispatch.tensor_type((q, k, v, padding, mask)),
        needs_grad=wants_grad(q, k, v, mask),
        situation=situation,
        batch=batch,
        heads=heads,
        key_heads=k.shape[2],
        queries=queries,
        keys=k.shape[1],
        head_dim=dim,
        value_dim=v.shape[-1],
        key_padding=padding is not None,
        attn_mask=None if mask is None else str(mask.dtype).removeprefix("torch."),
        mask_shape=() if mask is None else tuple(mask.shape),
        mask_grad=wants_grad(mask),
        is_causal=is_causal,
        dropout=dropout_p > 0.0,
        return_lse=return_lse,
        weights=weights,
        one_dtype=len(set(dtypes)) == 1,
        misfit=misfit(q, k, v, padding, mask, dropout_p, enable_gqa)
        or (None if on_one_device(*tensors, padding) else "q, k, v and the masks must lie on one device"),
        layouts=layouts(situation, *tensors),
    )


def computed_dtype(dtype: torch.dtype, autocast: torch.dtype | None) -> torch.dtype:
    """What a tensor of `dtype` is cast to, as torch's SDPA casts its inputs under autocast."""
    return dtype if autocast is None or dtype == torch.float64 or not dtype.is_floating_point else autocast


def autocast_dtype(q: Tensor) -> torch.dtype | None:
    """What autocast makes of attention's inputs, or None where it is off; meta tensors know no autocast."""
    enabled = not q.is_meta and torch.is_autocast_enabled(q.device.type)
    return torch.get_autocast_dtype(q.device.type) if enabled else None


def weights_dtype(dtype: torch.dtype, device: torch.device, autocast: torch.dtype | None) -> torch.dtype:
    """Of the attention weights that are returned: as nn.MultiheadAttention's, whose softmax is fp32 in autocast on GPUs."""
    if autocast is not None and device.type == "cuda" and dtype != torch.float64:
        return torch.float32
    return computed_dtype(dtype, autocast)
