"""Rotary embedding's kernel: pairs of both kinds, angles of all widths, any strides, and the turn back."""

from __future__ import annotations

import pytest
import torch
from detr_fast.kernels import rotary
from detr_fast.kernels.rotary import Turn
from hypothesis import strategies as st

from detr_fast.ops.rotary_embedding import eager
from detr_fast.testing import assert_as_accurate_as_eager
from detr_fast.testing.cases import generated, sizes
from detr_fast.testing.interpreter import checked_interpreter

interpreted = pytest.mark.interpreter


class KernelRotary(torch.autograd.Function):
    """Of q and k, or q alone."""

    @staticmethod
    def forward(ctx, cos, sin, turn, firsts, *heads):
        ctx.rest = cos, sin, turn, firsts
        return tuple(t for t in rotary.rotary_embedding(*(*heads, None)[:2], cos, sin, turn, firsts) if t is not None)

    @staticmethod
    def backward(ctx, *gradients):
        cos, sin, turn, firsts = ctx.rest
        dq, dk = (*map(rotary.arriving, gradients), None)[:2]
        found = rotary.rotary_embedding(dq, dk, cos, sin, turn._replace(back=True), firsts)
        return None, None, None, None, *found[: len(gradients)]


def angles(batches, tokens, rotated, turn, dtype=torch.float32):
    """Not of unit length, and another for each channel: what holds for them holds for cosines and sines."""
    width = rotated // 2 if turn.per_pair else rotated
    return [torch.randn(batches, max(tokens - turn.first, 0), width).to(dtype) for _ in range(2)]


def assert_right(heads, cos, sin, turn, dtype, firsts=(False, False), **settings):
    def reference(*heads):
        found = eager(*(*heads, None)[:2], cos, sin, turn)
        return tuple(t for t in found if t is not None)

    with checked_interpreter():
        assert_as_accurate_as_eager(
            lambda *heads: KernelRotary.apply(cos, sin, turn, firsts, *heads),
            reference=reference,
            inputs=heads,
            dtype=dtype,
            **settings,
        )


@interpreted
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("per_pair", [False, True])
@pytest.mark.parametrize(
    ("dtype", "table", "q_shape", "k_heads", "rotated"),
    [
        (torch.bfloat16, torch.bfloat16, (2, 37, 5, 64), 2, 64),  # a cut tile of tokens, heads that fill no chunk
        (torch.float16, torch.float32, (1, 9, 4, 80), 4, 32),  # some channels copied
        (torch.float32, torch.float32, (3, 1, 2, 128), 1, 128),  # one step of decoding
        (torch.bfloat16, torch.float32, (1, 3, 1, 256), 0, 256),  # queries alone
        (torch.float16, torch.float16, (2, 3, 2, 20), 3, 20),  # runs of two or four elements
        (torch.float32, torch.bfloat16, (1, 4, 3, 7), 1, 2),  # one pair, rows at odd places
    ],
)
def test_both_ways_are_as_accurate_as_eager(interleaved, per_pair, dtype, table, q_shape, k_heads, rotated):
    turn = Turn(interleaved, per_pair)
    batches, tokens, _, columns = q_shape
    heads = [torch.randn(q_shape)] + ([torch.randn(batches, tokens, k_heads, columns)] if k_heads else [])
    assert_right(heads, *angles(1, tokens, rotated, turn, table), turn, dtype)


@interpreted
@pytest.mark.parametrize(("columns", "rotated"), [(64, 64), (20, 12)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neighbours_that_come_as_halves_are_as_accurate_as_eager(columns, rotated, dtype):
    turn = Turn(True, True, sorts=True)
    heads = [torch.randn(2, 9, n, columns) for n in (3, 1)]
    assert_right(heads, *angles(2, 9, rotated, turn), turn, dtype)


def of_heads_first(x):
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def of_packed(x):
    return torch.stack([x, x + 1.0, x], 2)[:, :, 1]


def of_channels_apart(x):
    return torch.stack([x, x], -1)[..., 0]


def of_one_token(x):
    return x[:, :1].expand(x.shape)


def of_odd_rows(x):
    return torch.cat([x, x[..., :1]], -1)[..., :-1]


@interpreted
@pytest.mark.parametrize("lie", [of_heads_first, of_packed, of_channels_apart, of_one_token, of_odd_rows])
def test_any_layout_of_inputs_angles_and_gradients_works(lie):
    turn = Turn()
    cos, sin = (lie(t[:, :, None])[:, :, 0] for t in angles(2, 5, 16, turn))
    heads = [lie(torch.randn(2, 5, n, 16)) for n in (3, 2)]
    assert_right(heads, cos, sin, turn, torch.bfloat16, (True, False), upstream=lambda y: lie(torch.randn(y.shape)))


@interpreted
def test_results_lie_with_heads_first_where_that_is_asked():
    q, k = torch.randn(2, 5, 3, 16), torch.randn(2, 5, 4, 16)
    with checked_interpreter():
        q_turned, k_turned = rotary.rotary_embedding(q, k, *angles(1, 5, 16, Turn()), Turn(), (True, False))
    assert q_turned.transpose(1, 2).is_contiguous()
    assert k_turned.is_contiguous()


@interpreted
@pytest.mark.parametrize("back", [False, True])
def test_tokens_before_the_first_are_copied_whatever_they_hold(back):
    turn = Turn(back=back, first=2)
    q = torch.randn(2, 5, 3, 16)
    q[:, 0] = torch.inf
    cos, sin = angles(2, 5, 16, turn)
    with checked_interpreter():
        turned, _ = rotary.rotary_embedding(q, None, cos, sin, turn, (False, False))
        alone, _ = rotary.rotary_embedding(q[:, 2:], None, cos, sin, turn._replace(first=0), (False, False))
    assert torch.equal(turned[:, :2], q[:, :2])
    assert torch.equal(turned[:, 2:], alone)


@interpreted
@pytest.mark.parametrize("shape", [(0, 5, 2, 16), (2, 0, 2, 16), (2, 5, 0, 16)])
def test_no_sequences_tokens_or_heads_of_queries_work(shape):
    q, k = torch.randn(shape), torch.randn(*shape[:2], 3, 16)
    table = angles(1, shape[1], 16, Turn())
    with checked_interpreter():
        found = rotary.rotary_embedding(q, k, *table, Turn(), (False, False))
    torch.testing.assert_close(found, eager(q, k, *table, Turn()))


@interpreted
@generated(
    12,
    batches=sizes(3, least=1),
    tokens=sizes(40, tile=16, least=1),
    heads=sizes(6, tile=4, least=1),
    pairs=st.integers(1, 24),
    rest=st.sampled_from([0, 0, 3, 8]),
    kinds=st.tuples(st.booleans(), st.booleans()),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_any_case_is_as_accurate_as_eager(values, batches, tokens, heads, pairs, rest, kinds, dtype):
    turn = Turn(*kinds, first=min(1, tokens - 1))
    x = values(batches * tokens * heads, 2 * pairs + rest).view(batches, tokens, heads, -1)
    assert_right([x], *angles(batches, tokens, 2 * pairs, turn), turn, dtype)


@interpreted
def test_too_wide_heads_are_refused():
    q, cos = torch.zeros(1, 2, 1, 258), torch.zeros(1, 2, 258)
    with pytest.raises(ValueError, match="heads of 258 channels: this kernel takes up to 256"):
        rotary.rotary_embedding(q, None, cos, cos, Turn(), (False, False))


def test_a_run_is_what_every_tensor_keeps_together():
    def run(columns=64, step=64, start=0, table=torch.bfloat16, pairs=32, **kinds):
        q = (torch.bfloat16, torch.Size((2, 5, 3, columns)), (15 * step, 3 * step, step, 1), start)
        cos = (table, torch.Size((1, 5, 2 * pairs)), (10 * pairs, 2 * pairs, 1), 0)
        return rotary.run_of((q, cos, cos, q), pairs, columns, Turn(**kinds))

    assert run() == 8
    assert run(start=8) == 4
    assert run(step=66) == 2
    assert run(start=2) == 1
    assert run(table=torch.float32) == 8
    assert run(columns=20, step=20, pairs=10) == 2
    assert run(columns=20, step=20, pairs=10, interleaved=True) == 4
