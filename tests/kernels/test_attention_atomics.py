"""The backward that adds dq up by atomics: what it shares with the deterministic one is proven in test_attention.py."""

from __future__ import annotations

import pytest
import torch
from detr_fast.kernels import dropout
from detr_fast.kernels.attention import attention_forward
from detr_fast.kernels.attention_backward import attention_backward
from detr_fast.kernels.attention_backward_atomics import attention_backward_atomics
from detr_fast.kernels.attention_problem import Problem, Sequences

from detr_fast.ops.attention_eager import EagerAttention, attention_weights
from detr_fast.ops.dropout import keep_mask
from detr_fast.testing import assert_as_accurate_as_eager
from detr_fast.testing.interpreter import checked_interpreter
from tests.attention_inputs import ends, padded, qkv

pytestmark = pytest.mark.interpreter

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


class Atomics(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, padding, mask, causal, scale, generation):
        ctx.problem = Problem(q, k, v, padding, mask, causal=causal, scale=scale, generation=generation)
        out, lse = attention_forward(ctx.problem)
        ctx.save_for_backward(out, lse)
        return out

    @staticmethod
    def backward(ctx, dout):
        return *attention_backward_atomics(ctx.problem, *ctx.saved_tensors, dout), *(None,) * 5


def check(dtype, inputs, padding=None, mask=None, causal=False, scale=None, generation=None, **options):
    def eager(q, k, v):
        return EagerAttention().run(q, k, v, padding, mask, causal, 0.0, scale, q.shape[2] != k.shape[2])

    assert_as_accurate_as_eager(
        lambda q, k, v: Atomics.apply(q, k, v, padding, mask, causal, scale, generation),
        reference=eager,
        inputs=inputs,
        dtype=dtype,
        **options,
    )


# Tiles are 64 queries by 64 keys in 16 bits (32 queries under a mask), 32 by 32 in fp32: one tile, one more and one less.
@pytest.mark.parametrize(
    ("dtype", "shape", "padding", "mask", "causal"),
    [
        (FP32, (1, 33, 65, 1, 32), None, None, False),
        (FP16, (2, 63, 65, 1, 32), "end", None, False),
        (BF16, (2, 65, 130, 1, 32), "scattered", None, False),
        (FP16, (2, 9, 64, 1, 16), "all", None, False),
        (BF16, (1, 130, 70, 1, 64), "end", None, True),
        (FP32, (2, 31, 33, 1, 64), "scattered", None, True),
        (FP16, (1, 40, 64, 2, 32), None, "bool rows", False),
        (BF16, (2, 17, 80, 1, 32), "end", "float keys", False),
        (FP32, (1, 40, 40, 2, 8), "scattered", "bool rows", True),
    ],
)
def test_it_is_as_accurate_as_eager(interpreter, dtype, shape, padding, mask, causal):
    batch, queries, keys, *_ = shape
    masks = {
        None: lambda: None,
        "bool rows": lambda: torch.rand(queries, keys) > 0.3,
        "float keys": lambda: torch.randn(keys, dtype=dtype).masked_fill(torch.rand(keys) > 0.7, -torch.inf),
    }
    check(dtype, qkv(*shape), None if padding is None else padded(padding, batch, keys), masks[mask](), causal)


def test_tiles_for_hopper_are_as_accurate_as_eager(interpreter):
    check(FP16, qkv(1, 33, 130, 1, 64), padded("scattered", 1, 130), generation="hopper")


@pytest.mark.parametrize(("dim", "value_dim"), [(1, 1), (20, 40), (48, 7)])
def test_head_dimensions_may_be_odd_and_unequal(interpreter, dim, value_dim):
    check(FP16, qkv(1, 20, 30, 1, dim, value_dim))


# Causal: with batch elements and heads worked out anew for each head.
@pytest.mark.parametrize("causal", [False, True])
def test_fewer_key_heads_serve_groups_of_query_heads(interpreter, causal):
    check(FP16, qkv(2, 20, 30, 4, 16, key_heads=2), padded("end", 2, 30), causal=causal)


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_the_scale_may_be_any_number(interpreter, scale):
    check(BF16, qkv(1, 20, 70, 1, 32), padded("scattered", 1, 70), scale=scale)


LAYOUTS = {
    "sequence first": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "off 16 bytes": lambda t: torch.cat([t, t], 3)[..., 1 : 1 + t.shape[3]],
    "one value everywhere": lambda t: t[:1, :1, :1, :1].expand(t.shape),
}


# In fp32 the sums lie in dq itself. (Of one value everywhere it is zero, but for rounding.)
@pytest.mark.parametrize(
    ("layout", "dtype"), [*((layout, FP16) for layout in LAYOUTS), ("sequence first", FP32), ("off 16 bytes", FP32)]
)
def test_any_layout_of_inputs_and_gradients_is_read(interpreter, layout, dtype):
    arrange = LAYOUTS[layout]
    inputs = [arrange(t) for t in qkv(2, 10, 20, 2, 16)]
    check(dtype, inputs, upstream=lambda y: arrange(torch.randn_like(y)))


# A hidden key's zero row would score 0 where the row's log-sum-exp is -1e4: an infinite weight, and NaN in dq.
@pytest.mark.parametrize(("offset", "dtype"), [(-1e4, FP32), (1e4, FP32), (-1e4, FP16), (1e4, BF16)])
def test_hidden_keys_weigh_nothing_whatever_the_logits_are(offset, dtype):
    q, k, v = qkv(1, 10, 70, 1, 16)
    q[..., 0], k[..., 0] = 100.0, offset / 100.0
    with checked_interpreter(ordered=dtype == FP32):  # with the BLAS of some CPUs backward's scores are not forward's
        check(dtype, (q, k, v), padded("scattered", 1, 70), scale=1.0)


def test_hidden_keys_weigh_nothing_whatever_a_float_mask_adds_to_them(interpreter):
    padding = padded("scattered", 1, 70)
    mask = torch.where(padding[0], 1e4, torch.randn(70))
    check(FP32, qkv(1, 10, 70, 1, 16), padding, mask)


@pytest.mark.parametrize("kind", ["end", "scattered", "all"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_in_padded_keys_never_leak(interpreter, kind, value):
    padding = padded(kind, 1, 70)
    q, k, v = (t.half() for t in qkv(1, 20, 70, 1, 32))
    results = []
    for fill in (0.0, value):
        k, v = (t.masked_fill(padding[:, :, None, None], fill) for t in (k, v))
        problem = Problem(q, k, v, padding)
        out, lse = attention_forward(problem)
        results.append(attention_backward_atomics(problem, out, lse, torch.ones_like(out)))
    torch.testing.assert_close(*results)
    assert not any(t[padding].any() for t in results[1][1:])  # no gradient for what is padding
    if kind == "all":
        assert not any(t.any() for t in results[1])


@pytest.mark.parametrize(
    ("dim", "causal", "generation"), [(16, False, "hopper"), (64, True, "hopper"), (64, True, "ampere")]
)
def test_dropout_is_the_twins(interpreter, dim, causal, generation):
    q, k, v = (t.half() for t in qkv(1, 40, 70, 2, dim))
    seed, p = torch.tensor([1234567890123]), 0.25
    padding = padded("scattered", 1, 70)
    problem = Problem(q, k, v, padding, causal=causal, dropout_p=p, seed=seed, offset=3, generation=generation)
    out, lse = attention_forward(problem)
    dout = torch.randn_like(out)
    keep = keep_mask(seed, 3, p, 2, 40, 70, tiles=True)[None]
    exact = [t.double().requires_grad_() for t in (q, k, v)]
    weights = attention_weights(*exact[:2], padding, None, causal, None) * keep * dropout.scale(p)
    expected = torch.einsum("bhls,bshe->blhe", weights, exact[2])
    found = attention_backward_atomics(problem, out, lse, dout)
    for ours, truth in zip(found, torch.autograd.grad(expected, exact, dout.double())):
        assert (ours - truth).norm() <= 2e-3 * truth.norm()


@pytest.mark.parametrize(("queries", "keys"), [(0, 5), (5, 0), (1, 2), (2, 1)])
def test_sequences_may_be_empty_or_single(interpreter, queries, keys):
    problem = Problem(*(t.half() for t in qkv(2, queries, keys, 1, 16)))
    out, lse = attention_forward(problem)
    dout = torch.randn_like(out)
    expected = attention_backward(problem, out, lse, dout)[:3]
    torch.testing.assert_close(attention_backward_atomics(problem, out, lse, dout), expected, atol=1e-3, rtol=1e-3)


def test_the_gradient_of_the_log_sum_exp_is_taken_in(interpreter):
    problem = Problem(*qkv(1, 20, 40, 1, 16), padded("end", 1, 40))
    out, lse = attention_forward(problem)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    expected = attention_backward(problem, out, lse, dout, dlse)[:3]
    found = attention_backward_atomics(problem, out, lse, dout, dlse)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "launches"), [(FP32, 2), (FP16, 3)])
def test_launches_are_two_in_fp32_and_three_in_16_bits(interpreter, dtype, launches):
    problem = Problem(*(t.to(dtype) for t in qkv(1, 10, 10, 1, 16)))
    out, lse = attention_forward(problem)
    interpreter.launches.clear()
    attention_backward_atomics(problem, out, lse, out)
    assert len(interpreter.launches) == launches
    assert interpreter.counts()["attention_backward_keys_kernel"] == 1


@pytest.mark.parametrize("dtype", [FP32, FP16])
def test_gradients_are_written_where_they_are_wanted(interpreter, dtype):
    problem = Problem(*(t.to(dtype) for t in qkv(2, 10, 10, 2, 16)))
    out, lse = attention_forward(problem)
    together = torch.full((2, 10, 3, 2, 16), torch.nan, dtype=dtype)
    attention_backward_atomics(problem, out, lse, out, into=together.unbind(2))
    expected = attention_backward(problem, out, lse, out)[:3]
    torch.testing.assert_close(together.unbind(2), expected, atol=1e-3, rtol=1e-3)


def test_sums_do_not_depend_on_the_order_of_programs_by_more_than_rounding():
    problem = Problem(*qkv(1, 40, 270, 1, 16), padded("scattered", 1, 270))
    results = []
    for seed in range(2):
        with checked_interpreter(seed=seed):
            out, lse = attention_forward(problem)
            results.append(attention_backward_atomics(problem, out, lse, out))
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


@pytest.mark.interpreter(None)  # its own limit is higher
def test_offsets_use_64_bits_where_tensors_are_large():
    wide = torch.randn(2, 400, 3, 600)[..., :16]
    q, k = wide[:, :17], wide[:, :18]
    with checked_interpreter(int32_limit=1 << 18):  # a tile spans 64 rows of 1,800 elements, a batch element 400
        problem = Problem(q, k, k)
        out, lse = attention_forward(problem)
        found = attention_backward_atomics(problem, out, lse, out)
    torch.testing.assert_close(found, attention_backward(problem, out, lse, out)[:3], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("dtype", "lengths", "options"),
    [
        (FP32, ((20, 0, 35), (40, 5, 17)), {}),
        (FP16, ((65, 1), (30, 70)), {"dropout_p": 0.3, "seed": torch.tensor([7]), "generation": "hopper"}),
        (BF16, ((9, 70), (9, 70)), {"causal": True}),
        (FP16, ((17, 3), (24, 19)), {"mask": torch.rand(2, 17, 24) > 0.4}),
        (FP16, ((5, 4), (0, 0)), {}),
    ],
)
def test_of_a_packed_batch_it_gives_what_the_deterministic_one_gives(interpreter, dtype, lengths, options):
    """Gradients of surplus tokens are zero. With two key heads for four."""
    queries, keys = map(sum, lengths)
    q = torch.randn(1, queries + 3, 4, 16).to(dtype)
    k, v = (torch.randn(1, keys + 2, 2, 16).to(dtype) for _ in range(2))
    mask = options.get("mask")
    options = options | {"mask": None if mask is None else mask.repeat(2, 1, 1)}
    problem = Problem(q, k, v, sequences=Sequences(*(ends(*n) for n in lengths), *map(max, lengths)), **options)
    out, lse = attention_forward(problem)
    dout = torch.randn_like(out)
    found = attention_backward_atomics(problem, out, lse, dout)
    for ours, expected, used in zip(found, attention_backward(problem, out, lse, dout), (queries, keys, keys)):
        assert not ours[:, used:].any()
        assert (ours - expected).norm() <= (1e-6 if dtype == FP32 else 4e-3) * expected.norm()
