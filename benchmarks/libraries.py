"""Fused kernels of other libraries, called as their documentation says; `NotInstalled` where one is not here.

None is needed. On a machine without network their wheels travel in `wheels/` (see benchmarks/gpu.py) where they fit its torch;
liger-kernel's fits any, and flash-attn, apex and cut-cross-entropy are built from source.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import NotInstalled


def library(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise NotInstalled(f"{module.split('.')[0]} is not installed ({error})") from error


def liger_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return library("liger_kernel.transformers.functional").liger_layer_norm(x, weight, bias, 1e-5)


def apex_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    function = library("apex.normalization.fused_layer_norm").FusedLayerNormAffineFunction
    library("fused_layer_norm_cuda")  # apex installs without it, too
    return function.apply(x, weight, bias, x.shape[-1:], 1e-5)


def flash_norm(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
    return library("flash_attn.ops.triton.layer_norm").layer_norm_fn(x, weight, bias, residual=residual, eps=1e-5)


ROW_NORMS: dict[str, dict[str, Callable[..., Tensor]]] = {
    "layer_norm": {"liger": liger_norm, "apex": apex_norm, "flash_attn": flash_norm},
    "add_layer_norm": {"flash_attn": flash_norm},
}


def liger_cross_entropy(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return library("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss()(weight, x, target)


def cut_cross_entropy(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return library("cut_cross_entropy").linear_cross_entropy(x, weight, target)


CROSS_ENTROPIES = {"liger": liger_cross_entropy, "cut_cross_entropy": cut_cross_entropy}


class Padded:
    """What libraries want to know of padded keys, made once for a batch: `visible` is (B, S), keys that count come first.

    The bias lies in rows of a multiple of eight: PyTorch's memory-efficient kernel would copy another in each call, all
    heads and queries of it where it is expanded, and xformers' takes no other.
    """

    def __init__(self, visible: Tensor, heads: int, queries: int, dtype: torch.dtype) -> None:
        batch, keys = visible.shape
        self.lengths, self.longest = visible.sum(1), keys
        self.places = visible.flatten().nonzero().squeeze(1)
        self.query_ends = torch.arange(batch + 1, device=visible.device, dtype=torch.int32) * queries
        self.key_ends = torch.cat([self.lengths.new_zeros(1), self.lengths.cumsum(0)]).to(torch.int32)
        bias = torch.zeros(batch, 1, 1, -(-keys // 8) * 8, device=visible.device, dtype=dtype)[..., :keys]
        self.bias = bias.masked_fill_(~visible[:, None, None], float("-inf")).expand(-1, heads, queries, -1)


def flash_attention(q: Tensor, k: Tensor, v: Tensor, padded: Padded | None, dropout_p: float) -> Tensor:
    module = library("flash_attn")
    if padded is None:
        return module.flash_attn_func(q, k, v, dropout_p=dropout_p)
    k, v = (t.flatten(0, 1).index_select(0, padded.places) for t in (k, v))
    ends = padded.query_ends, padded.key_ends
    out = module.flash_attn_varlen_func(q.flatten(0, 1), k, v, *ends, q.shape[1], padded.longest, dropout_p=dropout_p)
    return out.view(q.shape)


def xformers_attention(q: Tensor, k: Tensor, v: Tensor, padded: Padded | None, dropout_p: float) -> Tensor:
    bias = None if padded is None else padded.bias
    return library("xformers.ops").memory_efficient_attention(q, k, v, attn_bias=bias, p=dropout_p)


def flash_packed(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int) -> Tensor:
    return library("flash_attn").flash_attn_varlen_func(q, k, v, ends, ends, longest, longest)


ATTENTIONS = {"flash_attn": flash_attention, "xformers": xformers_attention}
