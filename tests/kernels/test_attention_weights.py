from __future__ import annotations

import pytest
import torch
from detr_fast.kernels import dropout
from detr_fast.kernels.attention import attention_forward
from detr_fast.kernels.attention_problem import Problem
from detr_fast.kernels.attention_weights import attention_weights

from detr_fast.ops.attention_eager import attention_weights as eager_weights
from detr_fast.ops.dropout import keep_mask
from detr_fast.testing import assert_as_accurate_as_eager
from detr_fast.testing.interpreter import checked_interpreter

pytestmark = pytest.mark.interpreter

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def qk(batch, queries, keys, heads, dim, key_heads=None):
    return torch.randn(batch, queries, heads, dim), torch.randn(batch, keys, key_heads or heads, dim)


def weights_of(q, k, padding=None, mask=None, causal=False, averaged=False, **options):
    problem = Problem(q, k, k, padding, mask, causal=causal, **options)
    _, lse = attention_forward(problem)
    return attention_weights(problem, lse, averaged, q.dtype)


def eager(q, k, padding=None, mask=None, causal=False, averaged=False, scale=None):
    k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    weights = eager_weights(q, k, padding, mask, causal, scale)
    return (weights.mean(1) if averaged else weights).to(q.dtype)


def end_padding(batch, keys):
    mask = torch.zeros(batch, keys, dtype=torch.bool)
    mask[0, keys * 2 // 3 :] = True
    return mask


# Tiles are 64 by 64 in 16 bits, 32 by 32 in fp32: sizes of one tile, one more and one less; pairs of features.
@pytest.mark.parametrize(
    ("dtype", "shape", "features", "averaged"),
    [
        (FP32, (1, 31, 33, 2, 32), {}, False),
        (FP32, (2, 33, 32, 2, 16), {"padding"}, True),
        (BF16, (2, 65, 20, 2, 32), {"padding"}, True),
        (FP16, (1, 20, 66, 3, 20), {"mask"}, True),
        (BF16, (1, 63, 64, 1, 64), {"causal"}, False),
        (FP16, (2, 9, 72, 2, 8), {"padding", "mask", "causal"}, False),
        (FP16, (1, 5, 40, 1, 256), {"float mask"}, True),
    ],
)
def test_weights_are_as_accurate_as_eager(interpreter, dtype, shape, features, averaged):
    batch, queries, keys, heads, dim = shape
    padding = end_padding(batch, keys) if "padding" in features else None
    mask = torch.rand(heads, queries, keys) > 0.3 if "mask" in features else None
    if "float mask" in features:
        mask = torch.randn(queries, keys).to(dtype)
    arguments = (padding, mask, "causal" in features, averaged)
    assert_as_accurate_as_eager(
        lambda q, k: weights_of(q, k, *arguments),
        reference=lambda q, k: eager(q, k, *arguments),
        inputs=qk(batch, queries, keys, heads, dim),
        dtype=dtype,
        grad=False,
    )
    assert interpreter.counts()["attention_weights_kernel"] == 1


# Tiles are 64 queries by 128 keys for masks that are loaded one by one.
@pytest.mark.parametrize("generation", ["ampere", "hopper"])
def test_weights_of_wide_heads_with_a_mask_whose_rows_start_anywhere_are_as_accurate_as_eager(interpreter, generation):
    mask = torch.randn(65, 127).half()
    assert_as_accurate_as_eager(
        lambda q, k: weights_of(q, k, mask=mask, averaged=True, generation=generation),
        reference=lambda q, k: eager(q, k, mask=mask, averaged=True),
        inputs=qk(1, 65, 127, 1, 96),
        dtype=FP16,
        grad=False,
    )
    assert interpreter.counts()["attention_weights_kernel"] == 1


def test_fewer_key_heads_serve_groups_of_query_heads(interpreter):
    q, k = qk(1, 10, 12, 4, 8, key_heads=2)
    for averaged in (False, True):
        torch.testing.assert_close(weights_of(q, k, averaged=averaged), eager(q, k, averaged=averaged))


@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(0, 5), (5, 0), (1, 1)])
def test_sequences_may_be_empty_or_single(interpreter, queries, keys, averaged):
    q, k = qk(2, queries, keys, 2, 8)
    found = weights_of(q, k, averaged=averaged)
    assert found.shape == ((2, queries, keys) if averaged else (2, 2, queries, keys))
    assert (found == 1).all()


def test_padding_and_rows_that_see_nothing_weigh_zero_whatever_they_hold(interpreter):
    q, k = (t.half() for t in qk(2, 5, 9, 2, 16))
    padding = end_padding(2, 9)
    padding[1] = True
    k[padding] = torch.nan
    weights = weights_of(q, k, padding)
    assert not weights[0, ..., 6:].any()
    assert not weights[1].any()
    torch.testing.assert_close(weights[0].sum(-1), torch.ones(2, 5).half(), atol=2e-3, rtol=0)


@pytest.mark.parametrize("averaged", [False, True])
def test_the_weights_are_those_that_the_output_was_made_with(interpreter, averaged):
    q, k = qk(2, 20, 70, 3, 16)
    seed, p = torch.tensor([1234567890123]), 0.25
    found = weights_of(q, k, averaged=averaged, dropout_p=p, seed=seed, offset=3)
    keep = keep_mask(seed, 3, p, 6, 20, 70, tiles=True).view(2, 3, 20, 70)
    expected = eager(q, k) * keep * dropout.scale(p)
    torch.testing.assert_close(found, expected.mean(1) if averaged else expected)


def test_any_layout_is_read_in_place(interpreter):
    q, k = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in qk(2, 10, 20, 2, 16))
    torch.testing.assert_close(weights_of(q, k), eager(q, k))
    q, k = (torch.cat([t, t], 3)[..., 1:17] for t in (q, k))
    torch.testing.assert_close(weights_of(q, k), eager(q, k))


@pytest.mark.interpreter(None)  # its own limit is higher
def test_offsets_use_64_bits_where_tensors_are_large():
    wide = torch.randn(2, 400, 3, 600)[..., :16]
    q, k = wide[:, :17], wide[:, :18]
    with checked_interpreter(int32_limit=1 << 18):  # a tile spans 64 rows of 1,800 elements, a batch element 400
        found = weights_of(q, k)
    torch.testing.assert_close(found, eager(q, k))
