"""Sizes beyond what a kernel's offsets of 32 bits reach are refused in words."""

from __future__ import annotations

import pytest
import torch
from detr_fast.kernels.rows import MAX_ROW_STRIDE
from torch import Tensor

from detr_fast import dispatch, ops, use_backend

LONG = MAX_ROW_STRIDE + 1


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


SET = (empty(1, 4, dtype=torch.int64), empty(1, 4, 4, dtype=torch.float32), empty(1, dtype=torch.int64))
MANY = 600_000  # queries, in more blocks than a grid's second dimension holds
CALLS = {
    "linear_add_layer_norm": lambda: ops.linear_add_layer_norm(
        empty(2, LONG), empty(8, LONG), None, empty(2, 8), empty(8)
    ),
    "feed_forward": lambda: ops.feed_forward(empty(2, 8), empty(LONG, 8), None, empty(8, LONG), None),
    "qkv_projection": lambda: ops.qkv_projection(empty(2, LONG), empty(384, LONG)),
    "deformable_attention": lambda: ops.deformable_attention(
        empty(1, LONG, 8, 32), [(1, LONG)], empty(1, 2, 8, 1, 4, 2), empty(1, 2, 8, 1, 4)
    ),
    "matching_cost": lambda: ops.matching_cost(empty(1, MANY, 3), empty(1, MANY, 4), *SET),
    "rotary_embedding": lambda: ops.rotary_embedding(
        empty(1, (1 << 31) - 1, 29, 2), None, *[empty((1 << 31) - 1, 2)] * 2, interleaved=True
    ),
    "detection_losses": lambda: ops.detection_losses(
        empty(1, 1, 1 << 16, 1 << 15), empty(1, 1, 1 << 16, 4), SET[0][None], *SET, empty(1, 1, 1 << 16).bool(), SET[2]
    ),
}


@pytest.mark.parametrize("op", CALLS)
def test_what_32_bits_do_not_reach_is_refused(op):
    with (
        use_backend(**{op: "triton"}),
        pytest.raises(dispatch.BackendError, match=r"it takes up to 8388608|32 bits|over 2\^31"),
    ):
        CALLS[op]()
