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
