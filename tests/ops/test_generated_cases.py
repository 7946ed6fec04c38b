"""Every op's kernels on generated cases: any dtype, size, magnitude and layout, judged as all kernels are.

LayerNorm's are in tests/kernels/test_layer_norm.py. No dropout here: eager PyTorch draws other masks.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st

from detr_fast import ops
from detr_fast.dispatch import use_backend
from detr_fast.testing import assert_as_accurate_as_eager, assert_close_to_truth
from detr_fast.testing.cases import generated, sizes, values

# Tiles of matrix products span 128 rows of any stride.
pytestmark = pytest.mark.interpreter(int32_limit=1 << 16)

MODERATE = values(scales=(1e-2, 1.0, 8.0), offsets=(0.0,))


def by(backend, op, **options):
    """The op by a named implementation."""

    def run(*inputs):
        with use_backend(**{op.__name__: backend}):
            return op(*inputs, **options)

    return run


def judge(op, inputs, dtype, **options):
    assert_as_accurate_as_eager(
        by("triton", op, **options), reference=by("eager", op, **options), inputs=inputs, dtype=dtype
    )


@generated(
    12,
    rows=sizes(20, tile=16),
    columns=sizes(140, tile=128, least=1),
    return_sum=st.booleans(),
    affine=st.booleans(),
)
def test_add_layer_norm(values, rows, columns, return_sum, affine):
    weight, bias = values.parameter(columns, mean=1.0), values.parameter(columns)
    inputs = [values(rows, columns), values(rows, columns), weight if affine else None, bias if affine else None]
    judge(ops.add_layer_norm, inputs, values.dtype, return_sum=return_sum)


@generated(
    8,
    values=MODERATE,
    rows=sizes(40, tile=16, least=1),
    width=sizes(40, tile=32, least=1),
    columns=sizes(70, tile=64, least=2),
)
def test_linear_add_layer_norm(values, rows, width, columns):
    weights = [values.parameter(columns, width), values.parameter(columns)]
    norm = [values.parameter(columns, mean=1.0), values.parameter(columns)]
    inputs = [values(rows, width), *weights, values(rows, columns), *norm]
    judge(ops.linear_add_layer_norm, inputs, values.dtype)


@generated(
    8,
    values=MODERATE,
    rows=sizes(30, least=1),
    width=sizes(40, tile=32, least=1),
    hidden=sizes(70, tile=64, least=1),
    activation=st.sampled_from(["relu", "gelu", "silu"]),
)
def test_feed_forward(values, rows, width, hidden, activation):
    inputs = [values(rows, width), values.parameter(hidden, width), values.parameter(hidden)]
    inputs += [values.parameter(width, hidden), values.parameter(width)]
    judge(ops.feed_forward, inputs, values.dtype, activation=activation)


@generated(
    8,
    values=values(scales=(1e-2, 1.0), offsets=(0.0,)),
    batch=sizes(2, least=1),
    queries=sizes(40, tile=32, least=1),
    keys=sizes(70, tile=64, least=2),  # with one, eager's gradients of q and k are exactly zero
    dim=sizes(40, tile=32, least=1),
    padded=st.booleans(),
    causal=st.booleans(),
)
def test_attention(values, batch, queries, keys, dim, padded, causal):
    inputs = [values(batch, length, 1, dim) for length in (queries, keys, keys)]
    padding = values.flags(batch, keys, share=0.3) if padded else None
    judge(ops.attention, inputs, values.dtype, key_padding_mask=padding, is_causal=causal)


@generated(
    12,
    values=values(scales=(0.1, 3.0), offsets=(0.0,)),
    queries=sizes(40, tile=32, least=1),
    targets=sizes(9, tile=8, least=1),
    classes=sizes(70, tile=64, least=2),
    focal=st.booleans(),
)
def test_matching_cost(values, queries, targets, classes, focal):
    counts = torch.tensor([targets, targets // 2])
    logits, boxes = values(2, queries, classes)[None], values(2, queries, 4).abs()[None] + 0.1
    labels, true_boxes = torch.randint(classes - 1, (2, targets)), torch.rand(2, targets, 4) + 0.1

    def cost(backend, logits, boxes):
        run = by(backend, ops.matching_cost, focal=focal)
        return run(
            logits, boxes, labels, true_boxes.to(boxes.dtype if boxes.dtype == torch.float64 else torch.float32), counts
        )[0]

    ours, eager = (cost(backend, logits, boxes) for backend in ("triton", "eager"))
    truth = cost("eager", logits.double(), boxes.double())
    assert torch.equal(ours.isinf(), truth.isinf())
    finite = truth.isfinite()
    assert_close_to_truth("cost", ours[finite], eager[finite], truth[finite])


@generated(15, values=values(dtypes=(torch.float32,)), targets=sizes(9), queries=sizes(18, tile=16, least=1))
def test_linear_assignment(values, targets, queries):
    cost, counts = values(2, targets, queries), torch.tensor([targets, targets // 2])
    ours, scipys = (by(backend, ops.linear_assignment)(cost, counts) for backend in ("triton", "scipy"))
    for one, mine, theirs in zip(cost.double(), ours, scipys):
        assert (mine >= 0).sum() == (theirs >= 0).sum()
        assert len(set(mine[mine >= 0].tolist())) == int((mine >= 0).sum())
        best, found = (one[q >= 0].gather(1, q[q >= 0, None]).sum() for q in (theirs, mine))
        torch.testing.assert_close(found, best, rtol=1e-9, atol=1e-9 * float(cost.abs().max()) if cost.numel() else 0)
