"""Tensors on several devices: no kernel may take another device's addresses for its own."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from detr_fast import dispatch, ops, use_backend

SCORES, BOXES = torch.zeros(2, 5, 4), torch.zeros(2, 5, 4)
TRUE = (torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, 4), torch.zeros(2, dtype=torch.int64))
MATCHED = (torch.zeros(1, 2, 3, dtype=torch.int64), *TRUE, torch.zeros(1, 2, 5, dtype=torch.bool), TRUE[2])
CASES = {
    "channel_affine": [torch.zeros(1, 8, 4, 4), torch.zeros(8), torch.zeros(8)],
    "pointwise_affine": [
        torch.zeros(1, 8, 4, 4).half(),
        torch.zeros(6, 8, 1, 1).half(),
        *torch.zeros(2, 6),
        torch.zeros(1, 6, 4, 4).half(),
    ],
    "rotary_embedding": [*[torch.zeros(1, 6, 2, 8)] * 2, *[torch.zeros(6, 8)] * 2],
    "resnet_stem": [torch.zeros(1, 3, 8, 8), torch.zeros(16, 3, 7, 7), torch.zeros(16), torch.zeros(16)],
    "gated_activation": [torch.zeros(2, 8), torch.zeros(2, 8)],
    "prediction_heads": [
        torch.zeros(2, 8),
        *[torch.zeros(8, 8), torch.zeros(8)] * 2,
        torch.zeros(5, 8),
        torch.zeros(5),
    ],
    "linear_assignment": [torch.zeros(2, 3, 5), TRUE[2]],
    "deformable_attention": [torch.zeros(1, 6, 2, 8), torch.zeros(1, 5, 2, 1, 3, 2), torch.zeros(1, 5, 2, 1, 3)],
    "deformable_attention_from_offsets": [
        torch.zeros(1, 6, 2, 8),
        torch.zeros(1, 5, 1, 2),
        torch.zeros(1, 5, 2, 1, 3, 2),
        torch.zeros(1, 5, 2, 1, 3),
    ],
    "matching_cost": [SCORES, BOXES, *TRUE],
    "detection_losses": [SCORES[None], BOXES[None], *MATCHED],
    "linear_cross_entropy": [
        torch.zeros(6, 8),
        torch.zeros(5, 8),
        torch.zeros(5),
        torch.zeros(6).long(),
        torch.zeros(5),
    ],
    "attention": [*[torch.zeros(2, 6, 1, 8)] * 3, torch.zeros(2, 6, dtype=torch.bool), torch.zeros(6, 6)],
    "attention_varlen": [*[torch.zeros(6, 1, 8)] * 3, torch.zeros(6, 6)],
}


def call(op, *tensors):
    if op == "linear_cross_entropy":
        return ops.linear_cross_entropy(*tensors[:4], class_weight=tensors[4])
    if op == "prediction_heads":
        return ops.prediction_heads(tensors[0], tensors[1:5:2], tensors[2:5:2], *tensors[5:])
    if op == "attention":
        return ops.attention(*tensors[:3], key_padding_mask=tensors[3], attn_mask=tensors[4])
    if op.startswith("deformable_attention"):
        return getattr(ops, op)(tensors[0], [(2, 3)], *tensors[1:])
    if op == "attention_varlen":
        ends = torch.tensor([0, 6], dtype=torch.int32, device=tensors[0].device)
        return ops.attention_varlen(*tensors[:3], ends, ends, 6, 6, attn_mask=tensors[3])
    return getattr(ops, op)(*tensors)


@pytest.mark.parametrize(("op", "left"), [(op, i) for op, tensors in CASES.items() for i in range(1, len(tensors))])
def test_a_tensor_left_on_the_cpu_is_refused_also_after_a_call_that_was_right(op, left):
    with FakeTensorMode() as mode, use_backend(**{op.removesuffix("_from_offsets"): "triton"}):
        tensors = [mode.from_tensor(t) for t in CASES[op]]
        placed = [t.to("cuda") for t in tensors]
        call(op, *placed)
        with pytest.raises(
            dispatch.BackendError, match=r"(lie on (several devices|one device)|is on cpu; expected cuda)"
        ):
            call(op, *placed[:left], tensors[left], *placed[left + 1 :])


class Mine(torch.Tensor):
    pass


@pytest.mark.parametrize(("op", "which"), [(op, i) for op, tensors in CASES.items() for i in range(len(tensors))])
def test_a_tensor_of_a_class_of_its_own_is_seen_in_each_place_also_after_a_call_with_plain_ones(op, which):
    told = []
    with dispatch.recording(lambda _, decision: told.append(decision)):
        call(op, *CASES[op])
        tensors = list(CASES[op])
        tensors[which] = tensors[which].as_subclass(Mine)
        call(op, *tensors)
    assert "Mine" not in str(told[0].reasons)
    assert "tensor subclass Mine" in told[-1].reasons["triton"]
