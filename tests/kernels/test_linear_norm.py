from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from detr_fast.kernels import linear_norm as kernels
from detr_fast.kernels.add_layer_norm_backward import dropped_backward
from detr_fast.kernels.dropout import Dropout
from detr_fast.kernels.rows import sum_partials

from detr_fast.ops.dropout import keep_mask
from detr_fast.testing import assert_as_accurate_as_eager
from detr_fast.testing.interpreter import checked_interpreter

pytestmark = pytest.mark.interpreter

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
DROPOUT = Dropout(torch.tensor([11]), 5, 0.25)


def backward(dy, xhat, rstd, weight, dropout=None, **dtypes):
    ds, dproduct, partial = kernels.residual_norm_backward(dy, xhat, rstd, weight, dropout, **dtypes)
    return ds, dproduct, *sum_partials((partial, weight.dtype))


class Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, b, residual, norm_weight, norm_bias, dropout):
        y, _, *kept = kernels.linear_norm_forward(x, w, b, residual, norm_weight, norm_bias, 1e-5, dropout=dropout)
        ctx.save_for_backward(x, w, b, norm_weight, norm_bias, *kept)
        ctx.dropout, ctx.residual_dtype = dropout, residual.dtype
        return y

    @staticmethod
    def backward(ctx, dy):
        x, w, b, norm_weight, norm_bias, xhat, rstd = ctx.saved_tensors
        dtypes = {"dresidual_dtype": ctx.residual_dtype, "dx_dtype": x.dtype}
        ds, dproduct, sums = backward(dy, xhat, rstd, norm_weight, ctx.dropout, **dtypes)
        dproduct = ds if dproduct is None else dproduct
        d_norm_weight, d_norm_bias, db = sums.chunk(3)
        flat = dproduct.flatten(0, -2)
        db, d_norm_bias = (None if p is None else g.to(p.dtype) for p, g in ((b, db), (norm_bias, d_norm_bias)))
        return dproduct @ w, flat.T @ x.flatten(0, -2), db, ds, d_norm_weight, d_norm_bias, None


def fused(dropout=None):
    return lambda *inputs: Fused.apply(*inputs, dropout)


def eager(dropout=None):
    def compute(x, w, b, residual, norm_weight, norm_bias):
        y = F.linear(x, w, b)
        if dropout is not None:
            kept = keep_mask(dropout.seed, dropout.offset, dropout.p, 1, y[..., 0].numel(), y.shape[-1])
            y = y * kept.view(y.shape) / (1 - dropout.p)
        return F.layer_norm(residual + y, y.shape[-1:], norm_weight, norm_bias)

    return compute


def inputs(rows, width, columns, scale=1.0):
    x, w, b = torch.randn(*rows, width), torch.randn(columns, width), torch.randn(columns)
    return [x * scale, w, b, torch.randn(*rows, columns), torch.randn(columns) + 1, torch.randn(columns)]


# One row, no multiple of a tile, several tiles; columns that fill their block, whole runs of 16 bytes, and neither.
@pytest.mark.parametrize("dropout", [None, DROPOUT], ids=["", "dropout"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width", "columns"), [((1,), 16, 32), ((2, 19), 40, 24), ((35,), 9, 17)])
def test_the_fused_rows_are_as_accurate_as_eager(interpreter, rows, width, columns, dtype, dropout):
    assert_as_accurate_as_eager(
        fused(dropout), reference=eager(dropout), inputs=inputs(rows, width, columns), dtype=dtype
    )


@pytest.mark.parametrize(("limit", "value", "rows"), [("FEW_ROWS", 0, 80), ("LONG_ROWS", 40, 81)])
def test_many_rows_and_long_ones_take_larger_tiles_with_the_same_dropout(monkeypatch, limit, value, rows):
    monkeypatch.setattr(kernels, limit, value)
    with checked_interpreter() as checks:
        assert_as_accurate_as_eager(
            fused(DROPOUT), reference=eager(DROPOUT), inputs=inputs((rows,), 40, 24), dtype=torch.bfloat16
        )
        assert checks.launches[0].variant.constants["BLOCK_M"] == 64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("columns", [32, 17])
def test_a_product_that_pytorch_computes_is_finished_as_one_in_the_kernel_is(interpreter, monkeypatch, columns, dtype):
    monkeypatch.setattr(kernels, "LONG_ROWS", 24)
    arguments = [t.to(dtype) for t in inputs((2, 70), 24, columns, scale=100.0 if dtype == torch.float16 else 1.0)]
    arguments[3] = arguments[3][:1].expand(2, 70, columns)
    for norm in (arguments[4:], (None, None), (arguments[4], None)):
        options = {"dropout": DROPOUT, "with_sum": True}
        one = kernels.linear_norm_forward(*arguments[:4], *norm, 1e-5, **options)
        two = kernels.linear_norm_forward(*arguments[:4], *norm, 1e-5, **options, one_launch=False)
        assert [None if t is None else (t.shape, t.dtype) for t in one] == [
            None if t is None else (t.shape, t.dtype) for t in two
        ]
        for ours, theirs in zip(two, one):
            if theirs is not None:
                torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
    launched = interpreter.counts()
    assert (launched["linear_norm_kernel"], launched["finish_kernel"]) == (3, 3)
    kernels.linear_norm_forward(*(t.float() for t in arguments), 1e-5, one_launch=False)
    assert interpreter.counts()["linear_norm_kernel"] == 4  # PyTorch's product of fp32 may round to tf32


def test_biases_may_be_absent(interpreter):
    x, w, _, residual, norm_weight, _ = inputs((5,), 16, 24)
    arguments = [x, w, None, residual, norm_weight, None]
    assert_as_accurate_as_eager(fused(), reference=eager(), inputs=arguments, dtype=torch.float32)


def test_a_sum_over_fp16s_range_stays_finite_and_right(interpreter):
    x, w, b, residual, norm_weight, norm_bias = (t.half() for t in inputs((6,), 16, 32))
    residual = residual + 60_000
    b[::2] += 20_000  # half of the sums are over 65,504
    with pytest.raises(AssertionError):
        assert eager()(x, w, b, residual, norm_weight, norm_bias).isfinite().all()
    leaves = [t.requires_grad_() for t in (x, w, b, residual, norm_weight, norm_bias)]
    y = fused()(*leaves)
    truth = [t.detach().double().requires_grad_() for t in leaves]
    expected = eager()(*truth)
    torch.testing.assert_close(y.double(), expected, rtol=2e-3, atol=2e-3)
    dy = torch.randn_like(y)
    for ours, theirs in zip(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(expected, truth, dy.double())):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-2, atol=1e-2 * theirs.abs().max().item())


def test_the_residual_may_be_fp32_as_under_autocast(interpreter):
    dtypes = [torch.bfloat16] * 3 + [torch.float32] * 3
    x, w, b, residual, norm_weight, norm_bias = (t.to(d) for t, d in zip(inputs((9,), 16, 24), dtypes))
    y, _, xhat, rstd = kernels.linear_norm_forward(x, w, b, residual, norm_weight, norm_bias, 1e-5)
    dtypes = {"dresidual_dtype": torch.float32, "dx_dtype": torch.bfloat16}
    ds, dproduct, sums = backward(y, xhat, rstd, norm_weight, **dtypes)
    assert (y.dtype, ds.dtype, dproduct.dtype, sums.dtype) == (torch.float32,) * 2 + (torch.bfloat16, torch.float32)
    expected = eager()(*(t.double() for t in (x, w, b, residual, norm_weight, norm_bias)))
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dproduct, ds.bfloat16())


@pytest.mark.parametrize("one_launch", [True, False])
@pytest.mark.parametrize("columns", [24, 21])
def test_the_result_is_written_rounded_beside_it(interpreter, one_launch, columns):
    dtypes = [torch.bfloat16] * 3 + [torch.float32] * 3
    arguments = [t.to(d) for t, d in zip(inputs((9,), kernels.LONG_ROWS, columns), dtypes)]
    rounded = torch.full((9, columns), torch.nan, dtype=torch.bfloat16)
    y = kernels.linear_norm_forward(*arguments, 1e-5, one_launch=one_launch, rounded=rounded).y
    assert y.dtype == torch.float32
    assert torch.equal(rounded, y.bfloat16())


@pytest.mark.parametrize("expanded", ["dy", "residual"])
def test_expanded_rows_are_read_through_their_strides(interpreter, expanded):
    x, w, b, residual, norm_weight, norm_bias = inputs((12,), 16, 24)
    if expanded == "residual":
        residual = residual[:1].expand(12, 24)
    assert_as_accurate_as_eager(
        fused(),
        reference=eager(),
        inputs=[x, w, b, residual, norm_weight, norm_bias],
        dtype=torch.float32,
        upstream=torch.randn_like
        if expanded == "residual"
        else lambda y: torch.randn(1, 24).to(y.dtype).expand(y.shape),
    )


def test_without_a_backward_to_come_nothing_is_kept(interpreter):
    x, w, b, residual, norm_weight, norm_bias = inputs((3,), 16, 24)
    y, *kept = kernels.linear_norm_forward(x, w, b, residual, norm_weight, norm_bias, 1e-5, keep=False)
    assert kept == [None, None, None]
    torch.testing.assert_close(y, eager()(x, w, b, residual, norm_weight, norm_bias))
    assert sum(interpreter.counts().values()) == 1


def test_no_rows_give_zero_parameter_gradients(interpreter):
    x, w, b, residual, norm_weight, norm_bias = inputs((0,), 16, 24)
    y, _, xhat, rstd = kernels.linear_norm_forward(x, w, b, residual, norm_weight, norm_bias, 1e-5)
    _, _, sums = backward(y, xhat, rstd, norm_weight, dresidual_dtype=y.dtype, dx_dtype=y.dtype)
    assert torch.equal(sums, torch.zeros(3 * 24))


@pytest.mark.parametrize("residual_dtype", [torch.float32, torch.bfloat16])
def test_the_sum_is_returned_in_the_dtype_of_its_terms_promoted_beside_the_norm(interpreter, residual_dtype):
    dtypes = [torch.bfloat16] * 3 + [residual_dtype] * 3
    arguments = [t.to(d) for t, d in zip(inputs((9,), 16, 24), dtypes)]
    options = {"dropout": DROPOUT, "out_dtype": torch.float32}
    alone = kernels.linear_norm_forward(*arguments, 1e-5, **options)
    both = kernels.linear_norm_forward(*arguments, 1e-5, **options, with_sum=True)
    only = kernels.linear_norm_forward(*arguments[:4], None, None, 0.0, dropout=DROPOUT)
    assert torch.equal(both.y, alone.y)
    assert torch.equal(both.total, only.total)
    assert (both.total.dtype, alone.total, only.y, only.xhat, only.rstd) == (residual_dtype, *[None] * 4)
    expected = F.layer_norm(both.total.float(), (24,), *(t.float() for t in arguments[4:]))
    torch.testing.assert_close(both.y, expected, rtol=1e-4, atol=1e-4 if residual_dtype == torch.float32 else 0.1)


def test_dropout_alone_goes_back_as_it_went(interpreter):
    x, w, b, residual, _, _ = inputs((37,), 16, 24)
    forward = kernels.linear_norm_forward(x, w, b, residual, None, None, 0.0, dropout=DROPOUT).total
    plain = kernels.linear_norm_forward(x, w, b, residual, None, None, 0.0).total
    kept = (forward - residual) / (plain - residual)  # 0 or 1 / (1 - p)
    dsum = torch.randn(1, 24).expand(37, 24)
    dx, partial = dropped_backward(dsum, DROPOUT, torch.float32)
    torch.testing.assert_close(dx, dsum * kept, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(partial.sum(0), dx.sum(0))
