"""The last linear layer's probabilities, whole and the largest ones, a block of rows at a time."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F

from detr_fast import ops
from detr_fast.testing.counters import count

blocks = sys.modules["detr_fast.ops.linear_probabilities"]


def inputs(rows=17, features=6, classes=13):
    return torch.randn(rows, features), torch.randn(classes, features), torch.randn(classes)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [0, 3, 17])
def test_linear_softmax_is_softmax_of_linear(rows, bias, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 5 * 13)  # five rows
    x, weight, b = inputs(rows=rows)
    b = b if bias else None
    torch.testing.assert_close(ops.linear_softmax(x, weight, b), F.linear(x, weight, b).softmax(-1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ops.linear_softmax(x, weight, b).dtype == F.linear(x, weight, b).softmax(-1).dtype


@pytest.mark.parametrize("k", [1, 4, 13])
def test_top_k_probabilities_are_softmaxs_without_writing_it(monkeypatch, k):
    x, weight, bias = inputs()
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 17 * 3)
    probabilities, classes = ops.linear_softmax_topk(x.view(1, 17, 6), weight, bias, k=k)
    expected = F.linear(x, weight, bias).softmax(-1).topk(k)
    torch.testing.assert_close(probabilities[0], expected.values)
    assert torch.equal(classes[0], expected.indices)


@pytest.mark.parametrize("rows", [0, 3])
def test_without_features_the_bias_alone_decides(rows):
    x, weight, bias = inputs(rows=rows, features=0)
    probabilities, classes = ops.linear_softmax_topk(x, weight, bias, k=2)
    expected = bias.softmax(-1).topk(2)
    torch.testing.assert_close(probabilities, expected.values.expand(rows, 2))
    assert torch.equal(classes, expected.indices.expand(rows, 2))


def test_probabilities_are_written_once_and_top_k_never_writes_them_all():
    x, weight = torch.empty(4096, 16, device="meta"), torch.empty(32000, 16, device="meta")
    with torch.no_grad():
        whole = count(lambda: ops.linear_softmax(x, weight))
        best = count(lambda: ops.linear_softmax_topk(x, weight, k=5))
    logits = 4 * 4096 * 32000
    blocked = -(-4096 // (blocks.BLOCK_ELEMENTS // 32000))
    assert whole.launches["aten.softmax.int_out"] == blocked  # straight into the result
    assert whole.launches["aten._softmax.default"] == 1  # of no rows
    assert not any("copy" in name for name in whole.launches)
    assert (
        whole.bytes_moved < 4.1 * logits
    )  # the logits written and read, the result (operand and result of an `out=`) twice
    assert best.bytes_moved < 4.1 * logits  # each block's logits are written, and read by logsumexp and top-k
    assert "aten._softmax.default" not in best.launches


def test_top_k_of_a_vocabulary_that_is_one_block_takes_five_operations():
    x, weight, bias = inputs()
    assert sum(count(lambda: ops.linear_softmax_topk(x, weight, bias, k=4)).launches.values()) == 5


def test_k_outside_the_classes_is_refused():
    x, weight, bias = inputs()
    with pytest.raises(ValueError, match=r"k must lie in \[1, V\] = \[1, 13\]; got 14"):
        ops.linear_softmax_topk(x, weight, bias, k=14)
