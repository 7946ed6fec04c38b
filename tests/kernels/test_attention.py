from __future__ import annotations

import pytest
import torch
from detr_fast.kernels import attention as kernels
from detr_fast.kernels import (
    attention_backward,
    attention_backward_atomics,
    attention_problem,
    attention_split,
    dropout,
)
from detr_fast.kernels.attention_problem import LOG2_E, Problem, mask_run, readable

from detr_fast.ops.attention_eager import EagerAttention, attention_weights
from detr_fast.ops.dropout import keep_mask
from detr_fast.testing import assert_as_accurate_as_eager
from detr_fast.testing.interpreter import checked_interpreter
from tests.attention_inputs import padded, qkv

pytestmark = pytest.mark.interpreter

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


class KernelAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, padding, mask, causal, scale, generation=None):
        ctx.problem = Problem(q, k, v, padding, mask, causal=causal, scale=scale, generation=generation)
        out, lse = kernels.attention_forward(ctx.problem)
        ctx.save_for_backward(out, lse)
        return out

    @staticmethod
    def backward(ctx, dout):
        with_mask = ctx.needs_input_grad[4]
        *gradients, dmask = attention_backward.attention_backward(
            ctx.problem, *ctx.saved_tensors, dout, with_mask=with_mask
        )
        return *gradients, None, dmask, None, None, None


def eager(q, k, v, padding, mask, causal, scale):
    return EagerAttention().run(q, k, v, padding, mask, causal, 0.0, scale, q.shape[2] != k.shape[2])


def check(dtype, inputs, padding=None, mask=None, causal=False, scale=None, generation=None, **options):
    assert_as_accurate_as_eager(
        lambda q, k, v, mask: KernelAttention.apply(q, k, v, padding, mask, causal, scale, generation),
        reference=lambda q, k, v, mask: eager(q, k, v, padding, mask, causal, scale),
        inputs=[*inputs, mask],
        dtype=[dtype] * 3 + [FP32 if dtype == BF16 else dtype],
        **options,
    )


# Tiles are 128 queries by 64 keys in 16 bits (64 by 64 in the backward), 64 by 32 in fp32: sizes of one tile, one more and
# one less; pairs of features.
@pytest.mark.parametrize(
    ("dtype", "shape", "padding", "mask", "causal"),
    [
        (FP32, (1, 33, 65, 1, 32), None, None, False),
        (FP16, (2, 63, 65, 1, 32), "end", None, False),
        (BF16, (2, 20, 130, 1, 32), "scattered", None, False),
        (BF16, (1, 129, 64, 1, 16), "all", None, False),
        (FP16, (1, 130, 100, 1, 64), None, None, True),
        (BF16, (1, 70, 130, 1, 32), "end", None, True),
        (FP32, (2, 31, 32, 1, 32), "scattered", None, True),
        (FP16, (1, 40, 66, 2, 32), None, "bool rows", False),
        (FP16, (2, 17, 80, 1, 32), "end", "float heads", False),
        (FP32, (1, 40, 40, 2, 8), "scattered", "bool keys", True),
        (BF16, (2, 9, 70, 1, 128), "end", "float keys", False),
        (FP16, (1, 40, 66, 1, 256), "end", None, False),
        (FP32, (4, 9, 33, 2, 16), None, "float again", False),
        (BF16, (4, 9, 33, 2, 32), "end", "float again keys", True),
    ],
)
def test_attention_is_as_accurate_as_eager(interpreter, dtype, shape, padding, mask, causal):
    batch, queries, keys, heads, dim = shape
    masks = {
        None: lambda: None,
        "bool rows": lambda: torch.rand(queries, keys) > 0.3,
        "bool keys": lambda: torch.rand(batch, 1, 1, keys) > 0.3,
        "float heads": lambda: torch.randn(1, heads, queries, keys),
        "float keys": lambda: torch.randn(keys).masked_fill(torch.rand(keys) > 0.7, -torch.inf),
        # Of two batch elements, which come again.
        "float again": lambda: torch.randn(1, 2, heads, queries, keys),
        "float again keys": lambda: torch.randn(1, 2, heads, 1, keys),
    }
    padding = None if padding is None else padded(padding, batch, keys)
    check(dtype, qkv(batch, queries, keys, heads, dim), padding, masks[mask](), causal)


# Tiles for sm_90 are 128 queries by 128 keys (64 at head dimension 128).
@pytest.mark.parametrize(
    ("dtype", "shape", "padding", "causal", "few"),
    [
        (BF16, (2, 20, 300, 1, 32), "scattered", False, False),
        (BF16, (2, 20, 300, 1, 32), "scattered", False, True),
        (FP16, (1, 129, 257, 1, 32), None, False, False),
        (FP16, (1, 140, 140, 1, 20), None, True, True),
        (BF16, (1, 65, 129, 1, 64), "end", False, False),
        (FP16, (1, 65, 70, 1, 64), None, True, False),
        (FP16, (1, 33, 130, 1, 128), None, False, False),
    ],
)
def test_tiles_for_hopper_are_as_accurate_as_eager(interpreter, monkeypatch, dtype, shape, padding, causal, few):
    monkeypatch.setattr(attention_problem, "FEW_TILES", 132 if few else 0)
    padding = None if padding is None else padded(padding, shape[0], shape[2])
    check(dtype, qkv(*shape), padding, None, causal, generation="hopper")


# Tiles for masks whose rows start anywhere: 64 queries by 32 or 16 keys (over 64 128), in the keys' kernel 64 keys by 32 or 16 queries.
@pytest.mark.parametrize(
    ("dtype", "dim", "transposed"), [(BF16, 32, False), (FP16, 64, False), (BF16, 32, True), (FP16, 96, False)]
)
def test_tiles_for_masks_whose_rows_start_anywhere_are_as_accurate_as_eager(interpreter, dtype, dim, transposed):
    mask = torch.randn(97, 65).T if transposed else torch.randn(65, 97)
    check(dtype, qkv(1, 65, 97, 1, dim), None, mask, generation="ampere")


# The forward's tiles are 128 queries by 64 keys for a float32 mask in runs over 64.
def test_tiles_for_float32_masks_over_64_columns_are_as_accurate_as_eager(interpreter):
    check(BF16, qkv(1, 33, 68, 1, 96), padded("end", 1, 68), torch.randn(33, 68), generation="ampere")


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # numpy's, in the interpreter
@pytest.mark.parametrize("generation", ["", "hopper"])
@pytest.mark.parametrize("key", [3, 200])
def test_nan_in_a_visible_key_is_not_hidden(interpreter, generation, key):
    q, k, v = (t.half() for t in qkv(1, 5, 201, 1, 32))
    k[:, key] = torch.nan
    out, _ = kernels.attention_forward(Problem(q, k, v, generation=generation))
    assert out.isnan().all()


@pytest.mark.parametrize(
    "shape", [(2, 2, 40, 40), (2, 1, 40, 40), (40, 40), (1, 2, 1, 40), (40,)]
)  # whole; shared by heads; by batch and heads; by batch and rows; by all but keys
def test_the_gradient_of_a_float_mask_is_summed_over_what_shares_it(interpreter, shape):
    check(FP32, qkv(2, 40, 40, 2, 16), padded("end", 2, 40), torch.randn(shape))
    assert interpreter.counts()["attention_backward_mask_kernel"] == 1


@pytest.mark.parametrize(
    ("shape", "batch", "heads"),
    [((2, 11, 12), 17, 2), ((11, 12), 9, 2), ((2, 1, 11, 12), 2, 16), ((12,), 17, 1), ((1, 2, 1, 11, 12), 16, 2)],
)
def test_few_tiles_of_a_mask_are_shared_out_where_many_share_the_mask(interpreter, shape, batch, heads):
    check(FP32, qkv(batch, 11, 12, heads, 16), None, torch.randn(shape))
    assert interpreter.counts()["attention_backward_mask_kernel"] == interpreter.counts()["sum_partials_kernel"] == 1


@pytest.mark.parametrize("shape", [(2, 1, 40, 1), (1, 1)])
def test_a_mask_that_all_keys_share_has_no_gradient(interpreter, shape):
    q, k, v = qkv(2, 40, 40, 1, 16)
    mask = torch.randn(shape, requires_grad=True)
    out = KernelAttention.apply(q, k, v, None, mask, False, None)
    (gradient,) = torch.autograd.grad(out, mask, torch.randn_like(out))
    torch.testing.assert_close(gradient, torch.zeros(shape), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("dim", "value_dim"), [(1, 1), (20, 40), (24, 16), (48, 7)])
def test_head_dimensions_may_be_odd_and_unequal(interpreter, dim, value_dim):
    check(FP16, qkv(1, 20, 30, 1, dim, value_dim))


def test_fewer_key_heads_serve_groups_of_query_heads(interpreter):
    check(FP16, qkv(1, 20, 30, 4, 16, key_heads=2), padded("end", 1, 30))


@pytest.mark.parametrize("scale", [-0.3, 0.0, 2.0])
def test_the_scale_may_be_any_number(interpreter, scale):
    check(FP16, qkv(1, 20, 70, 1, 32), padded("scattered", 1, 70), scale=scale)


# In fp32 the backward's weights are exact only if it computes the very scores that the forward's log-sum-exp is of. On a GPU
# it does: products add up in the order of K in every kernel. BLAS, which the interpreter asks, has an order for each shape.
@pytest.mark.parametrize("scale", [-0.7, 0.7])
def test_large_logits_of_either_sign_are_as_exact_as_eagers_in_fp32(scale):
    with checked_interpreter(ordered=True):
        for queries in (10, 20):
            check(FP32, qkv(1, queries, 70, 1, 32), padded("scattered", 1, 70), scale=scale)


@pytest.mark.parametrize(("queries", "keys"), [(0, 5), (5, 0), (1, 2), (2, 1)])
def test_sequences_may_be_empty_or_single(interpreter, queries, keys):
    q, k, v = (t.requires_grad_() for t in qkv(1, queries, keys, 1, 16))
    out = KernelAttention.apply(q, k, v, None, None, False, None)
    expected = eager(q, k, v, None, None, False, None)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    dout = torch.randn_like(out)
    for ours, theirs in zip(torch.autograd.grad(out, (q, k, v), dout), torch.autograd.grad(expected, (q, k, v), dout)):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


LAYOUTS = {
    "sequence first": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "heads first": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "a slice of packed projections": lambda t: torch.cat([t, t], 2)[:, :, t.shape[2] :],
    "off 16 bytes": lambda t: torch.cat([t, t], 3)[..., 1 : 1 + t.shape[3]],
    "one value everywhere": lambda t: t[:1, :1, :1, :1].expand(t.shape),
    "dimensions far apart": lambda t: t.transpose(1, 3).contiguous().transpose(1, 3),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_of_inputs_and_gradients_is_read(interpreter, layout):
    arrange = LAYOUTS[layout]
    inputs = [arrange(t) for t in qkv(2, 10, 20, 2, 16)]
    check(FP16, inputs, upstream=lambda y: arrange(torch.randn_like(y)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_layouts_without_runs_of_16_bytes_are_copied(layout):
    t = LAYOUTS[layout](torch.randn(2, 10, 2, 16).half())
    assert readable(t) == (layout not in ("off 16 bytes", "one value everywhere", "dimensions far apart"))
    assert not readable(t[..., :12])


def test_results_lie_in_memory_as_the_inputs_do(interpreter):
    q, k, v = (LAYOUTS["sequence first"](t) for t in qkv(2, 5, 6, 2, 16))
    problem = Problem(q, k, v)
    out, lse = kernels.attention_forward(problem)
    gradients = attention_backward.attention_backward(problem, out, lse, out)[:3]
    assert all(t.transpose(0, 1).is_contiguous() for t in (out, *gradients))


def test_masks_are_read_in_the_longest_aligned_runs():
    mask = torch.zeros(2, 1, 8, 48, dtype=torch.bool)
    assert mask_run(mask.expand(2, 3, 8, 48)) == 16
    assert mask_run(mask[..., :40]) == 8
    assert mask_run(mask[..., 1:]) == 1
    assert mask_run(mask.half()) == 8
    assert mask_run(mask.half()[..., :36]) == 4
    assert mask_run(mask[..., :1]) == 1
    assert mask_run(mask[..., :1].expand(2, 1, 8, 48)) == mask_run(mask.transpose(2, 3)) == 0


@pytest.mark.parametrize("kind", ["end", "scattered", "all"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_in_padded_keys_never_leak(interpreter, kind, value):
    padding = padded(kind, 1, 70)
    q, k, v = (t.half() for t in qkv(1, 20, 70, 1, 32))
    results = []
    for fill in (0.0, value):
        k, v = (t.masked_fill(padding[:, :, None, None], fill) for t in (k, v))
        problem = Problem(q, k, v, padding)
        out, lse = kernels.attention_forward(problem)
        gradients = attention_backward.attention_backward(problem, out, lse, torch.ones_like(out))[:3]
        results.append((out, lse, *gradients))
    assert all(torch.equal(clean, other) for clean, other in zip(*results))
    assert not any(t[padding].any() for t in results[1][3:])  # no gradient for what is padding
    if kind == "all":
        assert not any(t.any() for t in (*results[1][:1], *results[1][2:]))
        assert (results[1][1] == -torch.inf).all()


def test_rows_whose_mask_hides_all_keys_are_zero_with_zero_gradients(interpreter):
    mask = torch.zeros(20, 30, dtype=torch.bool)
    mask[3:, :7] = True
    problem = Problem(*qkv(1, 20, 30, 1, 16), None, mask)
    out, lse = kernels.attention_forward(problem)
    dq, dk, dv, _ = attention_backward.attention_backward(problem, out, lse, torch.randn_like(out))
    assert not out[:, :3].any()
    assert not dq[:, :3].any()
    assert not dk[:, 7:].any()
    assert all(t.isfinite().all() for t in (out, dq, dk, dv))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_a_row_of_the_masks_gradient_adds_up_exactly_whatever_the_output_is_rounded_to(interpreter, dropout_p):
    q, k, v = (t.bfloat16() for t in qkv(2, 20, 5, 1, 16))
    mask, seed = torch.randn(2, 1, 20, 5), torch.tensor([5])
    problem = Problem(q, k, v, None, mask, dropout_p=dropout_p, seed=seed)
    out, lse = kernels.attention_forward(problem)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    dmask = attention_backward.attention_backward(problem, out, lse, dout, dlse, with_mask=True)[3]
    torch.testing.assert_close(dmask.sum(-1), dlse * LOG2_E, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("offset", "dtype"), [(-1e4, FP32), (1e4, FP32), (-1e4, FP16), (1e4, BF16)])
def test_logits_of_ten_thousand_are_exact_enough(offset, dtype):
    q, k, v = qkv(1, 10, 70, 1, 16)
    q[..., 0], k[..., 0] = 100.0, offset / 100.0
    with checked_interpreter(ordered=dtype == FP32):
        check(dtype, (q, k, v), padded("scattered", 1, 70), scale=1.0)


@pytest.mark.parametrize(
    ("transposed", "generation", "heads", "dim", "kind"),
    [
        (False, "", 2, 16, "scattered"),
        (True, "", 2, 16, "scattered"),
        (False, "hopper", 2, 16, "scattered"),
        (False, "ampere", 1, 96, "scattered"),
        (False, "hopper", 1, 96, None),
        (False, "ampere", 1, 16, "scattered"),
        (False, "ampere", 1, 16, None),
    ],
    ids=["rows", "sequence first", "hopper", "wide", "wide and causal on hopper", "spread", "spread and causal"],
)
def test_dropout_is_the_twins(interpreter, transposed, generation, heads, dim, kind):
    """On hopper, rows of the keys' kernel hold keys in an order of their own; on ampere, rows of all. In causal order where there is no padding."""
    q, k, v = (t.half() for t in qkv(1, 40, 70, heads, dim))
    if transposed:
        q, k, v = (LAYOUTS["sequence first"](t) for t in (q, k, v))
    seed, p = torch.tensor([1234567890123]), 0.25
    padding, causal = None if kind is None else padded(kind, 1, 70), kind is None
    problem = Problem(q, k, v, padding, causal=causal, dropout_p=p, seed=seed, offset=3, generation=generation)
    out, lse = kernels.attention_forward(problem)
    dout = torch.randn_like(out)
    found = (out, *attention_backward.attention_backward(problem, out, lse, dout))

    keep = keep_mask(seed, 3, p, heads, 40, 70, tiles=True)[None]
    exact = [t.double().requires_grad_() for t in (q, k, v)]
    weights = attention_weights(*exact[:2], padding, None, causal, None) * keep * dropout.scale(p)
    expected = torch.einsum("bhls,bshe->blhe", weights, exact[2])
    for ours, truth in zip(found, (expected, *torch.autograd.grad(expected, exact, dout.double()))):
        assert (ours - truth).norm() <= 2e-3 * truth.norm()


@pytest.mark.parametrize("off", ["rows", "address"])
def test_a_gradient_off_16_bytes_is_read_as_one_on_them(interpreter, off):
    q, k, v = (t.half() for t in qkv(1, 9, 20, 2, 16))
    problem = Problem(q, k, v)
    out, lse = kernels.attention_forward(problem)
    dout = torch.randn_like(out)
    if off == "rows":
        moved = torch.cat([dout, dout[..., :1]], -1)[..., :16]
    else:
        moved = torch.cat([dout.flatten()[:1], dout.flatten()])[1:].view(dout.shape)
    for backward in (attention_backward.attention_backward, attention_backward_atomics.attention_backward_atomics):
        for ours, expected in zip(backward(problem, out, lse, moved)[:3], backward(problem, out, lse, dout)[:3]):
            assert torch.equal(ours, expected)


def test_dropping_all_or_nothing_is_exact(interpreter):
    q, k, v = qkv(1, 10, 20, 1, 16)
    problem = Problem(q, k, v, dropout_p=1.0, seed=torch.tensor([5]))
    out, lse = kernels.attention_forward(problem)
    assert not out.any()
    assert not any(t.any() for t in attention_backward.attention_backward(problem, out, lse, torch.randn_like(out))[:3])

    dlse = torch.randn_like(lse)  # which dropout doesn't touch
    found = attention_backward.attention_backward(problem, out, lse, torch.zeros_like(out), dlse)
    expected = attention_backward.attention_backward(Problem(q, k, v), out, lse, torch.zeros_like(out), dlse)
    torch.testing.assert_close(found[:3], expected[:3])


def test_the_log_sum_exp_and_its_gradient_are_right(interpreter):
    q, k, v = qkv(1, 20, 30, 1, 16)
    problem = Problem(q, k, v, padded("end", 1, 30))
    out, lse = kernels.attention_forward(problem)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse).transpose(1, 2).contiguous().transpose(1, 2)
    found = attention_backward.attention_backward(problem, out, lse, dout, dlse)
    exact = [t.double().requires_grad_() for t in (q, k, v)]
    expected = EagerAttention().run(*exact, problem.padding, None, False, 0.0, None, return_lse=True)
    torch.testing.assert_close(lse * torch.log(torch.tensor(2.0)), expected[1].float())
    truth = torch.autograd.grad(expected, exact, (dout.double(), dlse.double() * 1.4426950408889634))
    for ours, right in zip(found, truth):
        torch.testing.assert_close(ours, right.float(), atol=1e-5, rtol=1e-5)


def test_one_launch_forward_and_two_backward(interpreter):
    problem = Problem(*qkv(1, 10, 10, 1, 16))
    out, lse = kernels.attention_forward(problem)
    assert len(interpreter.launches) == 1
    attention_backward.attention_backward(problem, out, lse, out)
    assert len(interpreter.launches) == 3


@pytest.fixture
def many_multiprocessors(monkeypatch):
    monkeypatch.setattr(attention_split, "multiprocessors", lambda device: 64)


# Parts of 128 keys: one key more than two parts and than a block; parts that are all padding; a row without visible keys.
@pytest.mark.parametrize(
    ("dtype", "shape", "padding", "mask", "causal"),
    [
        (FP16, (1, 20, 257, 1, 32), None, None, False),
        (BF16, (2, 3, 450, 1, 20), "scattered", None, False),
        (FP32, (2, 1, 385, 2, 16), "end", None, False),
        (FP16, (2, 2, 300, 1, 16), "all", "float keys", False),
        (FP16, (1, 66, 129, 1, 16), "scattered", None, True),
    ],
)
def test_split_keys_are_as_accurate_as_eager(interpreter, many_multiprocessors, dtype, shape, padding, mask, causal):
    batch, _, keys, *_ = shape
    mask = None if mask is None else torch.randn(keys).masked_fill(torch.rand(keys) > 0.7, -torch.inf)
    check(dtype, qkv(*shape), None if padding is None else padded(padding, batch, keys), mask, causal)
    assert interpreter.counts()["attention_combine_kernel"] >= 2


def test_split_keys_drop_the_same_weights_and_add_one_launch_each_way(interpreter, monkeypatch):
    q, k, v = qkv(1, 20, 300, 1, 16)
    problem = Problem(q, k, v, padded("scattered", 1, 300), dropout_p=0.5, seed=torch.tensor([5]), offset=1)
    results = []
    for multiprocessors, launches in ((64, (2, 3)), (1, (1, 2))):
        monkeypatch.setattr(attention_split, "multiprocessors", lambda device, count=multiprocessors: count)
        out, lse = kernels.attention_forward(problem)
        forward = len(interpreter.launches)
        gradients = attention_backward.attention_backward(problem, out, lse, out)[:3]
        assert (forward, len(interpreter.launches) - forward) == launches
        results.append((out, lse, *gradients))
        interpreter.launches.clear()
    for split, whole in zip(*results):
        torch.testing.assert_close(split, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("tiles", "keys", "parts"),
    [(16, 1000, 8), (16, 200, 2), (16, 100, 1), (66, 4000, 2), (67, 4000, 1), (1, 4000, 32), (0, 4000, 1), (16, 0, 1)],
)
def test_keys_are_split_until_an_h100_is_busy_but_not_below_128(tiles, keys, parts):
    q, k = torch.empty(tiles, 100, 1, 32, device="meta"), torch.empty(tiles, keys, 1, 32, device="meta")
    assert attention_split.key_parts(Problem(q, k, k), 128, q.device) == parts


def test_keys_that_are_all_padding_are_never_read(interpreter):
    q, k, v = (t.half() for t in qkv(1, 10, 200, 1, 16))
    padding = torch.ones(1, 200, dtype=torch.bool)
    padding[:, :10] = False
    out, _ = kernels.attention_forward(Problem(q, k, v, padding))
    short, _ = kernels.attention_forward(Problem(q, k[:, :10], v[:, :10]))
    assert torch.equal(out, short)


def test_a_list_of_visible_keys_may_be_longer_than_one_step_of_the_search(interpreter):
    padding = torch.rand(2, 2100) > 0.03
    padding[0, :1024], padding[1, 1024:] = True, True
    check(FP16, qkv(2, 5, 2100, 1, 16), padding)


@pytest.mark.interpreter(None)  # its own limit is higher
def test_offsets_use_64_bits_where_tensors_are_large():
    wide = torch.randn(2, 400, 3, 600)[..., :16]
    q, k = wide[:, :17], wide[:, :18]
    with checked_interpreter(int32_limit=1 << 18):  # a tile spans 128 rows of 1,800 elements, a batch element 400
        problem = Problem(q, k, k)
        out, lse = kernels.attention_forward(problem)
        attention_backward.attention_backward(problem, out, lse, out)
    torch.testing.assert_close(out, eager(q, k, k, None, None, False, None))


def test_the_backward_is_deterministic_whatever_order_programs_run_in(many_multiprocessors):
    problem = Problem(*(t.half() for t in qkv(1, 70, 270, 1, 16)), padded("scattered", 1, 270))
    results = []
    for seed in range(2):
        with checked_interpreter(seed=seed):
            out, lse = kernels.attention_forward(problem)
            results.append(attention_backward.attention_backward(problem, out, lse, out)[:3])
    assert all(torch.equal(one, same) for one, same in zip(*results))


@pytest.mark.parametrize("dim", [0, 257])
def test_too_small_or_large_heads_are_refused(dim):
    with pytest.raises(ValueError, match=rf"head dimension {dim}: the kernels take 1 to 256"):
        kernels.attention_forward(Problem(*qkv(1, 2, 2, 1, dim), scale=1.0))
