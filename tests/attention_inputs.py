"""Inputs that the tests of attention's kernels share."""

from __future__ import annotations

import torch


def qkv(batch, queries, keys, heads, dim, value_dim=None, key_heads=None):
    key_heads = key_heads or heads
    shapes = (queries, heads, dim), (keys, key_heads, dim), (keys, key_heads, value_dim or dim)
    return [torch.randn(batch, *shape) for shape in shapes]


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
