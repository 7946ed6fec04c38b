"""Programs of attention's kernels by name, to compile of a `Form`."""

from __future__ import annotations

from functools import partial

import torch
from detr_fast.kernels.attention import forward_variant
from detr_fast.kernels.attention_backward import keys_variant, mask_variant, queries_variant
from detr_fast.kernels.attention_weights import weights_variant

VARIANTS = {
    "forward": forward_variant,
    "parts": partial(forward_variant, split=True),
    "queries": queries_variant,
    "keys": keys_variant,
    "atomics": partial(keys_variant, atomics=True),
    "mask": partial(mask_variant, shared_rows=False, shared_columns=False),
    "shared mask": partial(mask_variant, shared_rows=True, shared_columns=False),
    "weights": partial(weights_variant, averaged=True, dtype=torch.float32, run=4),
    "weights one by one": partial(weights_variant, averaged=True, dtype=torch.bfloat16, run=1),
}
