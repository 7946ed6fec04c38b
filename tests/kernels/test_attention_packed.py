"""Packed batches: each sequence as if it were alone, whatever lies beside it."""

from __future__ import annotations

import pytest
import torch
from detr_fast.kernels import attention_split
from detr_fast.kernels.attention import attention_forward
from detr_fast.kernels.attention_backward import attention_backward
from detr_fast.kernels.attention_problem import Problem, Sequences

from detr_fast.ops.attention_eager import EagerAttention
from detr_fast.testing import assert_as_accurate_as_eager

pytestmark = pytest.mark.interpreter

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def ends(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def problem_of(q, k, v, lengths_q, lengths_k, **options):
    sequences = Sequences(ends(lengths_q), ends(lengths_k), max(lengths_q), max(lengths_k))
    return Problem(q[None], k[None], v[None], sequences=sequences, **options)


class Packed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, lengths_q, lengths_k, causal):
        ctx.problem = problem_of(q, k, v, lengths_q, lengths_k, causal=causal)
        out, lse = attention_forward(ctx.problem)
        ctx.save_for_backward(out, lse)
        return out[0]

    @staticmethod
    def backward(ctx, dout):
        gradients = attention_backward(ctx.problem, *ctx.saved_tensors, dout[None])[:3]
        return *(g[0] for g in gradients), None, None, None


def one_by_one(q, k, v, lengths_q, lengths_k, causal):
    """Each sequence on its own, and zeros behind the last."""
    parts = [
        t.split([*lengths, len(t) - sum(lengths)]) for t, lengths in zip((q, k, v), (lengths_q, lengths_k, lengths_k))
    ]
    pieces = []
    for own_q, own_k, own_v in list(zip(*parts))[:-1]:
        call = (own_q[None], own_k[None], own_v[None], None, None, causal, 0.0, None, q.shape[1] != k.shape[1])
        pieces.append(EagerAttention().run(*call)[0])
    return torch.cat([*pieces, parts[0][-1][..., :1].expand(-1, -1, v.shape[2]) * 0])


def inputs(lengths_q, lengths_k, heads, dim, value_dim=None, key_heads=None, surplus=0):
    shapes = (
        (lengths_q, heads, dim),
        (lengths_k, key_heads or heads, dim),
        (lengths_k, key_heads or heads, value_dim or dim),
    )
    return [torch.randn(sum(lengths) + surplus, h, e) for lengths, h, e in shapes]


# Tiles are up to 128 queries and keys in 16 bits, 64 and 32 in fp32: sequences of one tile, one more and one less.
@pytest.mark.parametrize(
    ("dtype", "lengths_q", "lengths_k", "options", "causal"),
    [
        (FP32, (33, 1, 20), (33, 1, 20), {"dim": 32}, False),
        (FP16, (5, 130, 1), (5, 130, 1), {"dim": 32}, True),
        (BF16, (10, 10), (64, 127), {"dim": 32, "surplus": 40}, False),
        (FP16, (20, 3), (2, 65), {"dim": 20, "value_dim": 72, "heads": 1, "surplus": 5}, True),
        (FP32, (7, 2), (9, 4), {"dim": 8, "heads": 4, "key_heads": 2}, False),
    ],
)
def test_every_sequence_is_as_accurate_as_eager_on_it_alone(interpreter, dtype, lengths_q, lengths_k, options, causal):
    assert_as_accurate_as_eager(
        lambda q, k, v: Packed.apply(q, k, v, lengths_q, lengths_k, causal),
        reference=lambda q, k, v: one_by_one(q, k, v, lengths_q, lengths_k, causal),
        inputs=inputs(lengths_q, lengths_k, **{"heads": 2, **options}),
        dtype=dtype,
    )
    copies = 0 if options["dim"] % 8 == 0 else 2
    assert len(interpreter.launches) == 3 + copies


@pytest.fixture
def many_multiprocessors(monkeypatch):
    """As many as leave some idle, so that programs share keys."""
    monkeypatch.setattr(attention_split, "multiprocessors", lambda device: 16)


# Of three parts, all, two or one have keys.
def test_shared_keys_are_as_accurate_as_eager(interpreter, many_multiprocessors):
    lengths_q, lengths_k, options = (10, 0, 33), (300, 20, 150), {"dim": 16, "value_dim": 20, "surplus": 150}
    assert_as_accurate_as_eager(
        lambda q, k, v: Packed.apply(q, k, v, lengths_q, lengths_k, False),
        reference=lambda q, k, v: one_by_one(q, k, v, lengths_q, lengths_k, False),
        inputs=inputs(lengths_q, lengths_k, **{"heads": 2, **options}),
        dtype=FP16,
    )
    assert interpreter.counts()["attention_combine_kernel"] == interpreter.counts()["attention_copy_kernel"] == 2
    assert len(interpreter.launches) == 7


def test_shared_keys_leave_zeros_and_no_log_sum_exp_behind_the_end(interpreter, many_multiprocessors):
    lengths_q, lengths_k = (3, 2, 4), (200, 0, 130)
    q, k, v = inputs(lengths_q, lengths_k, 1, 16, surplus=40)
    problem = problem_of(q, k, v, lengths_q, lengths_k)
    out, lse = attention_forward(problem)
    gradients = attention_backward(problem, out, lse, torch.randn_like(out))[:3]
    assert interpreter.counts()["attention_combine_kernel"] == 2
    for tensor, used in ((out, 9), (gradients[0], 9), (gradients[1], 330), (gradients[2], 330)):
        assert tensor.isfinite().all()
        assert not tensor[0, used:].any()
    assert not out[0, 3:5].any()
    assert torch.equal(lse.isfinite().sum((1, 2)), torch.tensor([3, 0, 4]))


@pytest.mark.parametrize(
    ("lengths_q", "lengths_k"),
    [((3, 2), (4, 0)), ((0, 2), (3, 1)), ((0, 3), (0, 2)), ((2, 0), (2, 0)), ((2, 3), (0, 0))],
)
def test_sequences_may_be_empty_and_surplus_holds_anything(interpreter, lengths_q, lengths_k):
    q, k, v = (t.requires_grad_() for t in inputs(lengths_q, lengths_k, 2, 16, surplus=300))
    dout = torch.randn_like(q)
    with torch.no_grad():
        for tensor, used in ((q, lengths_q), (k, lengths_k), (v, lengths_k), (dout, lengths_q)):
            tensor[sum(used) :] = torch.nan
    problem = problem_of(q.detach(), k.detach(), v.detach(), lengths_q, lengths_k)
    out, lse = attention_forward(problem)
    assert (lse.isfinite().sum((1, 2)) == 2 * torch.tensor([q * (k > 0) for q, k in zip(lengths_q, lengths_k)])).all()
    found = (out[0], *(g[0] for g in attention_backward(problem, out, lse, dout[None])[:3]))
    clean = [t.detach()[: sum(used)].requires_grad_() for t, used in ((q, lengths_q), (k, lengths_k), (v, lengths_k))]
    expected = one_by_one(*clean, lengths_q, lengths_k, False)
    truth = (expected, *torch.autograd.grad(expected, clean, dout[: sum(lengths_q)]))
    for ours, right in zip(found, truth):
        torch.testing.assert_close(ours[: len(right)], right.detach(), atol=1e-5, rtol=1e-5)
        assert not ours[len(right) :].any()


# Of a mask's rows those are read that the sequence has, whose first token is read anew behind the loop.
@pytest.mark.parametrize(
    ("heads", "dim", "options"),
    [(2, 16, {}), (2, 16, {"mask": torch.rand(35, 35) > 0.3}), (1, 96, {"causal": True, "generation": "hopper"})],
    ids=["plain", "mask", "causal"],
)
def test_dropout_is_that_of_the_padded_batch(interpreter, heads, dim, options):
    lengths = (20, 35)
    q, k, v = (t.half() for t in inputs(lengths, lengths, heads, dim))
    options = options | {"dropout_p": 0.3, "seed": torch.tensor([99]), "offset": 4}
    packed = problem_of(q, k, v, lengths, lengths, **options)
    out, lse = attention_forward(packed)
    padding = torch.arange(35) >= torch.tensor(lengths)[:, None]
    dout = torch.randn_like(out)
    padded = [torch.zeros(2, 35, heads, dim).half() for _ in range(4)]
    for there, here in zip(padded, (q, k, v, dout[0])):
        there[~padding] = here
    problem = Problem(*padded[:3], padding, **options)
    expected, padded_lse = attention_forward(problem)
    found = out, *attention_backward(packed, out, lse, dout)[:3]
    gradients = attention_backward(problem, expected, padded_lse, padded[3])[:3]
    for ours, right in zip(found, (expected, *gradients)):
        torch.testing.assert_close(ours[0], right[~padding], atol=4e-3, rtol=4e-3)
