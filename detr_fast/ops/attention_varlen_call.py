"""What a call of attention over packed sequences is to the dispatcher: what fits, its signature, its description."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from detr_fast import dispatch
from detr_fast.dispatch import Call, Situation
from detr_fast.ops.attention_call import computed_dtype, mask_misfit, tf32
from detr_fast.ops.boundary import on_one_device, wants_grad
from detr_fast.ops.dropout import check_probability
from detr_fast.ops.layouts import Layouts, key, layouts


@dataclass(frozen=True)
class VarlenCall(Call):
    """dtype: what is computed in, autocast's under autocast. layouts: of q, k, v and the mask."""

    sequences: int
    queries: int
    keys: int
    max_q: int
    max_k: int
    heads: int
    key_heads: int
    head_dim: int
    value_dim: int
    attn_mask: str | None  # its dtype's name
    mask_shape: tuple[int, ...]
    mask_grad: bool
    is_causal: bool
    dropout: bool
    return_lse: bool
    one_dtype: bool  # of q, k and v, and of a float mask unless that is fp32
    one_device: bool
    layouts: Layouts

    def shapes(self) -> str:
        heads = self.heads if self.heads == self.key_heads else f"{self.heads}/{self.key_heads}"
        text = (
            f"{self.sequences} sequences H {heads} {self.queries}×{self.keys} tokens, at most "
            f"{self.max_q}×{self.max_k} hd {self.head_dim} {str(self.dtype).removeprefix('torch.')}"
        )
        mask = (f"{self.attn_mask} attn_mask", self.attn_mask)
        extras = (mask, ("causal", self.is_causal), ("dropout", self.dropout), ("log-sum-exp", self.return_lse))
        return " ".join([text, *(name for name, present in extras if present)])


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ends_q: Tensor,
    ends_k: Tensor,
    max_q: int,
    max_k: int,
    mask: Tensor | None,
    dropout_p: float,
    enable_gqa: bool,
) -> None:
    shapes = f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not (q.ndim == k.ndim == v.ndim == 3):
        raise ValueError(f"attention_varlen takes q (Tq, H, E), k (Tk, H, E), v (Tk, H, Ev), without a batch; {shapes}")
    heads, key_heads = q.shape[1], k.shape[1]
    if k.shape[2] != q.shape[2] or v.shape[:2] != k.shape[:2] or (key_heads != heads and not enable_gqa):
        raise ValueError(
            f"q, k and v must have the same H (unless enable_gqa), q and k the same E, k and v the same number of tokens; "
            f"{shapes}"
        )
    if key_heads != heads and (key_heads == 0 or heads % key_heads):
        raise ValueError(f"with enable_gqa, k's and v's heads must divide q's; got {key_heads} and {heads}")
    check_probability(dropout_p)
    for name, ends in (("cu_seqlens_q", ends_q), ("cu_seqlens_k", ends_k)):
        if ends.ndim != 1 or len(ends) < 1 or ends.dtype != torch.int32 or ends.device != q.device:
            raise ValueError(
                f"{name} must be int32 of shape (B + 1,) on {q.device}: 0, then the end of each sequence; "
                f"got {ends.dtype} {tuple(ends.shape)} on {ends.device}"
            )
    if len(ends_q) != len(ends_k):
        raise ValueError(f"cu_seqlens_q is of {len(ends_q) - 1} sequences and cu_seqlens_k of {len(ends_k) - 1}")
    if mask is not None and (
        wrong := mask_misfit(mask, (len(ends_q) - 1, heads, max_q, max_k), "(B, H, max_q, max_k)")
    ):
        raise ValueError(wrong)
    if q.device.type == "cpu" and not isinstance(ends_q, dispatch.FakeTensor) and not torch.compiler.is_compiling():
        _check_lengths("q", ends_q.tolist(), q.shape[0], max_q)
        _check_lengths("k", ends_k.tolist(), k.shape[0], max_k)


def _check_lengths(which: str, ends: list[int], tokens: int, longest: int) -> None:
    lengths = [end - start for start, end in pairwise(ends)]
    if ends[0] != 0 or min(lengths, default=0) < 0 or ends[-1] > tokens:
        raise ValueError(
            f"cu_seqlens_{which} must start at 0, never fall and end at {tokens} tokens or before; got {ends}"
        )
    if max(lengths, default=0) > longest:
        raise ValueError(f"max_{which} is {longest}, but a sequence has {max(lengths)} tokens")


def signature(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_q: int,
    max_k: int,
    mask: Tensor | None,
    is_causal: bool,
    dropout_p: float,
    scale: float | None,
    enable_gqa: bool = False,
    return_lse: bool = False,
) -> tuple[Any, ...]:
    tensors = (q, k, v, cu_seqlens_q, cu_seqlens_k, mask)
    return (
        *map(key, tensors),
        max_q,
        max_k,
        is_causal,
        dropout_p > 0.0,
        return_lse,
        q.dtype == torch.float32 and tf32(),
    )


def describe(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_q: int,
    max_k: int,
    mask: Tensor | None,
    is_causal: bool,
    dropout_p: float,
    scale: float | None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    *,
    situation: Situation,
) -> VarlenCall:
    dtypes = {computed_dtype(t.dtype, situation.autocast) for t in (q, k, v)}
    if mask is not None and mask.dtype not in (torch.bool, torch.float32):
        dtypes.add(computed_dtype(mask.dtype, situation.autocast))
    return VarlenCall(
        device=q.device,
        architecture=dispatch.architecture(q.device),
        dtype=computed_dtype(q.dtype, situation.autocast),
        tensor_type=dispatch.tensor_type((q, k, v, cu_seqlens_q, cu_seqlens_k, mask)),
        needs_grad=wants_grad(q, k, v, mask),
        situation=situation,
        sequences=len(cu_seqlens_q) - 1,
        queries=q.shape[0],
        keys=k.shape[0],
        max_q=max_q,
        max_k=max_k,
        heads=q.shape[1],
        key_heads=k.shape[1],
        head_dim=q.shape[2],
        value_dim=v.shape[2],
        attn_mask=None if mask is None else str(mask.dtype).removeprefix("torch."),
        mask_shape=() if mask is None else tuple(mask.shape),
        mask_grad=wants_grad(mask),
        is_causal=is_causal,
        dropout=dropout_p > 0.0,
        return_lse=return_lse,
        one_dtype=len(dtypes) == 1,
        one_device=on_one_device(q, k, v, cu_seqlens_q, cu_seqlens_k, mask),
        layouts=layouts(situation, q, k, v, mask),
    )
