"""Inputs that the tests of attention share."""

from __future__ import annotations

import torch


def qkv(batch=1, queries=5, keys=7, heads=1, dim=8, value_dim=None, key_heads=None, **options):
    key_heads = key_heads or heads
    shapes = (queries, heads, dim), (keys, key_heads, dim), (keys, key_heads, value_dim or dim)
    return [torch.randn(batch, *shape, **options) for shape in shapes]


def padded(kind, batch, keys):
    """Padding masks: at the end of the first element, scattered, of all keys of the first element."""
    mask = torch.zeros(batch, keys, dtype=torch.bool)
    if kind == "end":
        mask[0, keys * 2 // 3 :] = True
    elif kind == "scattered":
        mask[:] = torch.rand(batch, keys) > 0.6
    elif kind == "all":
        mask[0] = True
    return mask


def end_padding(batch=1, keys=7):
    """The last two keys of the first element are padding."""
    mask = torch.zeros(batch, keys, dtype=torch.bool)
    mask[0, keys - 2 :] = True
    return mask


def ends(*lengths):
    """0 and the end of each of these sequences, packed."""
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def sequences(lengths_q, lengths_k, surplus=0, heads=2, dim=8, value_dim=6, dtype=torch.float64, key_heads=None):
    """What `ops.attention_varlen` takes, of so many queries and keys a sequence, and surplus tokens behind them."""
    q = torch.randn(sum(lengths_q) + surplus, heads, dim, dtype=dtype, requires_grad=True)
    k = torch.randn(sum(lengths_k) + surplus, key_heads or heads, dim, dtype=dtype, requires_grad=True)
    v = torch.randn(sum(lengths_k) + surplus, key_heads or heads, value_dim, dtype=dtype, requires_grad=True)
    longest = max(lengths_q, default=0), max(lengths_k, default=0)
    return (q, k, v, ends(*lengths_q), ends(*lengths_k), *longest)
