"""Fused kernels of other libraries, called as their documentation says; `NotInstalled` where one is not here.

None is needed. On a machine without network their wheels travel in `wheels/` (see benchmarks/gpu.py): liger-kernel's and
cut-cross-entropy's fit any torch, xformers' wants CUDA 12's runtime beside it, and flash-attn and apex are built from source.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import NotInstalled


def library(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise NotInstalled(f"{module.split('.')[0]} is not installed ({error})") from error


@cache
def xformers_ops() -> Any:
    """Its wheel is linked with CUDA 12's runtime, which nvidia-cuda-runtime-cu12 brings and a PyTorch for CUDA 13 does not. Without
    it, it takes no call at all, although the kernels that it calls for attention are PyTorch's own.
    """
    runtime = importlib.util.find_spec("nvidia")
    for folder in (runtime and runtime.submodule_search_locations) or ():
        for path in Path(folder).glob("cuda_runtime/lib/libcudart.so.12"):
            ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
    found = library("xformers.ops")
    if not library("xformers._cpp_lib")._built_with_cuda:
        raise NotInstalled("xformers can't load its part in C++, and takes no call: is nvidia-cuda-runtime-cu12 here?")
    return found


def liger_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return library("liger_kernel.transformers.functional").liger_layer_norm(x, weight, bias, 1e-5)


def liger_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    # In place it would write the input's gradient over the result's, which each step is given again.
    function = library("liger_kernel.transformers.functional").liger_rms_norm
    return function(x, weight, 1e-5, in_place=False)


def liger_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Of (B, H, L, E), whose memory it writes over where heads lie behind tokens, as it does over that of arriving gradients."""
    found: tuple[Tensor, Tensor] = library("liger_kernel.transformers.rope").liger_rotary_pos_emb(q, k, cos, sin)
    return found


def apex_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    function = library("apex.normalization.fused_layer_norm").FusedLayerNormAffineFunction
    library("fused_layer_norm_cuda")  # apex installs without it, too
    return function.apply(x, weight, bias, x.shape[-1:], 1e-5)


def flash_norm(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
    return library("flash_attn.ops.triton.layer_norm").layer_norm_fn(x, weight, bias, residual=residual, eps=1e-5)


ROW_NORMS: dict[str, dict[str, Callable[..., Tensor]]] = {
    "layer_norm": {"liger": liger_norm, "apex": apex_norm, "flash_attn": flash_norm},
    "add_layer_norm": {"flash_attn": flash_norm},
    "rms_norm": {"liger": liger_rms_norm},
    "add_rms_norm": {},
}


def liger_silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """Its backward writes the gradients over gate and up."""
    return library("liger_kernel.ops.swiglu").LigerSiLUMulFunction.apply(gate, up)


def liger_gelu_product(gate: Tensor, up: Tensor) -> Tensor:
    """As `liger_silu_product`; GELU by its tangent approximation."""
    return library("liger_kernel.ops.geglu").LigerGELUMulFunction.apply(gate, up)


def liger_silu_of_halves(both: Tensor) -> Tensor:
    module = library("liger_kernel.ops.swiglu")
    if not hasattr(module, "LigerFusedGateUpSiLUMulFunction"):
        raise NotInstalled("this liger-kernel has no gate of halves")
    return module.LigerFusedGateUpSiLUMulFunction.apply(both)


# By activation, and whether gate and up are the halves of one tensor.
GATES: dict[tuple[str, bool], dict[str, Callable[..., Tensor]]] = {
    ("silu", False): {"liger": liger_silu_product},
    ("gelu_tanh", False): {"liger": liger_gelu_product},
    ("silu", True): {"liger": liger_silu_of_halves},
}


def liger_cross_entropy(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return library("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss()(weight, x, target)


def cut_cross_entropy(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return library("cut_cross_entropy").linear_cross_entropy(x, weight, target)


def chunked_cross_entropy(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """PyTorch's own, in chunks."""
    if not hasattr(F, "linear_cross_entropy"):
        raise NotInstalled(f"torch {torch.__version__} has no linear_cross_entropy")
    return F.linear_cross_entropy(x, weight, target, options=torch.nn.LinearCrossEntropyOptions())


CROSS_ENTROPIES = {
    "liger": liger_cross_entropy,
    "cut_cross_entropy": cut_cross_entropy,
    "F.linear_cross_entropy": chunked_cross_entropy,
}


class Padded:
    """What libraries want to know of padded keys, made once for a batch: `visible` is (B, S), keys that count come first.

    The bias, which SDPA broadcasts itself, lies in rows of a multiple of eight: PyTorch's memory-efficient kernel would copy another
    in each call.
    """

    def __init__(self, visible: Tensor, queries: int, dtype: torch.dtype) -> None:
        batch, keys = visible.shape
        self.lengths, self.longest = visible.sum(1), keys
        self.queries = [queries] * batch
        self.places = visible.flatten().nonzero().squeeze(1)
        self.query_ends = torch.arange(batch + 1, device=visible.device, dtype=torch.int32) * queries
        self.key_ends = torch.cat([self.lengths.new_zeros(1), self.lengths.cumsum(0)]).to(torch.int32)
        bias = torch.zeros(batch, 1, 1, -(-keys // 8) * 8, device=visible.device, dtype=dtype)[..., :keys]
        self.bias = bias.masked_fill_(~visible[:, None, None], float("-inf"))
        self.blocks: Any = None  # xformers' form of it

    def rows(self, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        """Of all batch elements, one after the other, without padded keys: what kernels for packed batches take."""
        return [q.flatten(0, 1), *(t.flatten(0, 1).index_select(0, self.places) for t in (k, v))]


def flash_attention(q: Tensor, k: Tensor, v: Tensor, padded: Padded | None, dropout_p: float) -> Tensor:
    module = library("flash_attn")
    if padded is None:
        return module.flash_attn_func(q, k, v, dropout_p=dropout_p)
    ends = padded.query_ends, padded.key_ends
    out = module.flash_attn_varlen_func(*padded.rows(q, k, v), *ends, q.shape[1], padded.longest, dropout_p=dropout_p)
    return out.view(q.shape)


def xformers_attention(q: Tensor, k: Tensor, v: Tensor, padded: Padded | None, dropout_p: float) -> Tensor:
    """With padding, on packed keys: its form for a bias is PyTorch's memory-efficient kernel, which is timed as such."""
    attend = xformers_ops().memory_efficient_attention
    if padded is None:
        return attend(q, k, v, p=dropout_p)
    if padded.blocks is None:
        blocks = xformers_ops().fmha.attn_bias.BlockDiagonalMask
        padded.blocks = blocks.from_seqlens(padded.queries, padded.lengths.tolist(), device=q.device)
    rows = (t[None] for t in padded.rows(q, k, v))
    return attend(*rows, attn_bias=padded.blocks, p=dropout_p).view(q.shape)


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, padded: Padded | None, dropout_p: float) -> Tensor:
    """PyTorch's own for packed batches, which is Flash Attention 2; without padding that is one of SDPA's backends."""
    if padded is None or dropout_p:
        raise NotImplementedError("varlen_attn is for packed batches, and has no dropout")
    ends = padded.query_ends, padded.key_ends
    return varlen()(*padded.rows(q, k, v), *ends, q.shape[1], padded.longest).view(q.shape)


def varlen() -> Any:
    return library("torch.nn.attention.varlen").varlen_attn


def varlen_packed(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int) -> Tensor:
    return varlen()(q, k, v, ends, ends, longest, longest)


def flash_packed(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int) -> Tensor:
    return library("flash_attn").flash_attn_varlen_func(q, k, v, ends, ends, longest, longest)


ATTENTIONS = {"flash_attn": flash_attention, "xformers": xformers_attention, "varlen_attn": varlen_attention}
