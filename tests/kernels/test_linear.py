from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from detr_fast.kernels import linear as kernels
from detr_fast.kernels.dropout import Dropout
from detr_fast.kernels.rows import sum_partials

from detr_fast.testing import assert_as_accurate_as_eager, assert_close_to_truth
from detr_fast.testing.interpreter import checked_interpreter
from tests.row_layouts import ROW_LAYOUTS

# Offsets inside a tile of 128 rows pass the usual limit of 32-bit arithmetic.
pytestmark = pytest.mark.interpreter(int32_limit=1 << 15)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ACTIVATIONS = {
    "none": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


def linear(activation, **options):
    return lambda x, w, b=None: kernels.linear_forward(x, w, b, activation=activation, **options)[0]


def eager(activation):
    return lambda x, w, b=None: ACTIVATIONS[activation](F.linear(x, w, b))


# No row, one, no multiple of a tile, several tiles; K that are no multiple of a step or of 16 bytes.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "columns", "width"), [(0, 8, 8), (1, 1, 1), (70, 40, 24), (3, 17, 33), (33, 140, 64), (130, 8, 7)]
)
def test_a_product_of_any_size_is_as_accurate_as_eager(interpreter, rows, columns, width, dtype):
    inputs = [torch.randn(rows, width), torch.randn(columns, width), torch.randn(columns)]
    assert_as_accurate_as_eager(linear("none"), reference=eager("none"), inputs=inputs, dtype=dtype, grad=False)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 1.0), (torch.float16, 40.0), (torch.bfloat16, 0.1)])
def test_activations_are_as_accurate_as_eager(interpreter, activation, dtype, scale):
    inputs = [torch.randn(20, 16) * scale, torch.randn(24, 16), torch.randn(24)]
    reference = eager(activation)
    assert_as_accurate_as_eager(linear(activation), reference=reference, inputs=inputs, dtype=dtype, grad=False)
    assert_as_accurate_as_eager(linear(activation), reference=reference, inputs=inputs[:2], dtype=dtype, grad=False)


@pytest.mark.parametrize("layout", ROW_LAYOUTS)
def test_any_layout_is_read_right(interpreter, layout):
    arrange = ROW_LAYOUTS[layout]
    x, w = torch.randn(2, 9, 16), torch.randn(24, 16)
    for some_x, some_w in ((arrange(x), w), (x, arrange(w))):
        y, _ = kernels.linear_forward(some_x, some_w, None)
        torch.testing.assert_close(y, F.linear(some_x, some_w), rtol=1e-5, atol=1e-5)
        assert y.is_contiguous()


@pytest.mark.parametrize("rows_of_position", [1, 5, 10])
def test_a_position_is_added_for_the_first_columns_only(interpreter, rows_of_position):
    x, w, b = torch.randn(2, 5, 24).bfloat16(), torch.randn(160, 24).bfloat16(), torch.randn(160).bfloat16()
    position = torch.randn(rows_of_position, 24).bfloat16()
    y, _ = kernels.linear_forward(x, w, b, position=position, position_columns=128)
    added = x + position.repeat(10 // rows_of_position, 1).view(x.shape)
    parts = ((added, slice(128)), (x, slice(128, None)))
    truth = torch.cat([F.linear(a.double(), w[i].double(), b[i].double()) for a, i in parts], -1)
    expected = torch.cat([F.linear(a, w[i], b[i]) for a, i in parts], -1)
    assert_close_to_truth("y", y, expected, truth)


def backward(activation, dropout=None):
    """The gradients of w2's product behind an activation, as a model takes them."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, pre, w):
            # The kernel's own forward of an identity product gives y.
            y, _ = kernels.linear_forward(
                pre, torch.eye(pre.shape[1]).to(pre), None, activation=activation, dropout=dropout
            )
            ctx.save_for_backward(y if activation == "relu" else pre, w)
            return F.linear(y, w)

        @staticmethod
        def backward(ctx, dy):
            saved, w = ctx.saved_tensors
            dpre, y, _ = kernels.linear_backward(dy, w, saved, activation=activation, dropout=dropout)
            return dpre, dy.T @ y

    return Function.apply


@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name != "none"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "hidden", "width"), [(1, 8, 8), (37, 20, 9)])
def test_the_backward_through_an_activation_is_as_accurate_as_eager(
    interpreter, activation, dtype, rows, hidden, width
):
    assert_as_accurate_as_eager(
        backward(activation),
        reference=lambda pre, w: F.linear(ACTIVATIONS[activation](pre), w),
        inputs=[torch.randn(rows, hidden), torch.randn(width, hidden)],
        dtype=dtype,
    )


def test_the_backward_of_several_tiles_is_as_accurate_as_eager(interpreter):
    assert_as_accurate_as_eager(
        backward("gelu"),
        reference=lambda pre, w: F.linear(F.gelu(pre), w),
        inputs=[torch.randn(70, 72), torch.randn(16, 72)],
        dtype=torch.float32,
    )


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_the_bias_gradient_is_the_sum_of_rows_in_any_order_of_programs(activation):
    dy, w, saved = torch.randn(300, 16), torch.randn(16, 40), torch.randn(300, 40)
    results = []
    for seed in range(2):
        with checked_interpreter(seed=seed, int32_limit=1 << 15):
            dpre, _, partial = kernels.linear_backward(dy, w, saved, activation=activation)
            (dbias,) = sum_partials((partial, w.dtype))
        results.append(dbias)
        torch.testing.assert_close(dbias, dpre.sum(0), rtol=1e-5, atol=1e-4)
    assert torch.equal(*results)


@pytest.mark.parametrize("dropout", [None, Dropout(torch.tensor([7]), 3, 0.25)], ids=["", "dropout"])
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "quick_gelu"])
@pytest.mark.parametrize(("rows", "hidden", "width", "outputs"), [(1, 8, 8, 8), (37, 20, 9, 16), (70, 136, 24, 8)])
def test_a_backward_that_computes_pre_again_is_the_one_that_read_it(
    interpreter, activation, rows, hidden, width, outputs, dropout
):
    x, w, b = torch.randn(rows, width), torch.randn(hidden, width), torch.randn(hidden)
    dy, w2 = torch.randn(rows, outputs), torch.randn(outputs, hidden)
    options = {"activation": activation, "dropout": dropout}
    y, pre = kernels.linear_forward(x, w, b, keep=True, **options)
    expected = kernels.linear_backward(dy, w2, y if activation == "relu" else pre, **options)
    for one, other in zip(kernels.linear_backward(dy, w2, kernels.Recomputed(x, w, b), **options), expected):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    without = kernels.linear_backward(dy, w2, kernels.Recomputed(x, w, None), with_dbias=False, **options)
    torch.testing.assert_close(without[1], kernels.linear_forward(x, w, None, **options)[0], rtol=1e-5, atol=1e-5)
    assert without[2] is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "hidden", "outputs"), [(0, 8, 8), (1, 8, 8), (70, 200, 24), (3, 129, 7)])
def test_a_bit_for_each_active_element_gives_the_gradients_that_the_elements_give(
    interpreter, rows, hidden, outputs, dtype
):
    dropout = Dropout(torch.tensor([7]), 3, 0.25)
    x, w, b = torch.randn(rows, 16).to(dtype), torch.randn(hidden, 16).to(dtype), torch.randn(hidden).to(dtype)
    dy, w2 = torch.randn(rows, outputs).to(dtype), torch.randn(outputs, hidden).to(dtype)
    options = {"activation": "relu", "dropout": dropout}
    y, active = kernels.linear_forward(x, w, b, keep=True, **options)
    assert torch.equal(y, kernels.linear_forward(x, w, b, **options)[0])
    words = active.view(rows, -(-hidden // 128), 1, 8).to(torch.int32) >> torch.arange(16)[:, None]
    assert torch.equal((words & 1).flatten(1)[:, :hidden].bool(), y > 0)
    expected = kernels.linear_backward(dy, w2, y, **options)
    found = kernels.linear_backward(dy, w2, y, active=active, **options)
    assert torch.equal(found[0], expected[0])
    assert found[1] is y
    (sums,) = sum_partials((found[2], dtype))
    assert_close_to_truth("bias", sums, found[0].sum(0), found[0].double().sum(0))


def test_no_bits_are_kept_in_float32_or_without_dropout_or_a_backward(interpreter):
    x, w, dropout = torch.randn(4, 16), torch.randn(8, 16), Dropout(torch.tensor([7]), 3, 0.25)
    half = x.half(), w.half()
    assert kernels.linear_forward(x, w, None, activation="relu", dropout=dropout, keep=True)[1] is None
    assert kernels.linear_forward(*half, None, activation="relu", keep=True)[1] is None
    assert kernels.linear_forward(*half, None, activation="relu", dropout=dropout)[1] is None


def test_nan_gradients_stop_at_inactive_elements(interpreter):
    x, w, dropout = torch.randn(20, 16).half(), torch.randn(8, 16).half(), Dropout(torch.tensor([7]), 3, 0.25)
    y, active = kernels.linear_forward(x, w, None, activation="relu", dropout=dropout, keep=True)
    dy = torch.full((20, 4), float("inf")).half()
    dpre, _, _ = kernels.linear_backward(dy, torch.ones(4, 8).half(), y, activation="relu", active=active)
    assert torch.equal(dpre.isfinite(), y == 0)
    assert torch.equal(dpre[y == 0], torch.zeros_like(dpre[y == 0]))


def test_pre_is_what_the_activation_was_applied_to(interpreter):
    x, w, b = torch.randn(9, 16).bfloat16(), torch.randn(24, 16).bfloat16(), torch.randn(24)
    y, pre = kernels.linear_forward(x, w, b, activation="silu", keep=True)
    torch.testing.assert_close(pre, F.linear(x, w, b.bfloat16()), rtol=0.02, atol=0.05)
    torch.testing.assert_close(y, F.silu(pre.float()).bfloat16())


def test_offsets_use_64_bits_where_rows_times_columns_is_large():
    x, w = torch.randn(600, 40), torch.randn(40, 40)
    with checked_interpreter(int32_limit=1 << 13):  # a tile is 4,096 elements, the tensor 24,000
        y, _ = kernels.linear_forward(x, w, None)
        kernels.linear_backward(x, w, y, activation="relu")
    torch.testing.assert_close(y, F.linear(x, w), rtol=1e-5, atol=1e-5)


def test_nan_stays_in_its_row_and_passes_relu(interpreter):
    x, w = torch.randn(20, 16), torch.randn(8, 16)
    x[3, 5] = float("nan")
    y, _ = kernels.linear_forward(x, w, None, activation="relu")
    assert y.isnan().any(1).nonzero().flatten().tolist() == [3]
    assert y[3].isnan().all()


def test_dropout_scales_what_it_keeps_and_the_backward_drops_the_same(interpreter):
    dropout = Dropout(torch.tensor([7]), 3, 0.25)
    one = torch.ones(200, 16), torch.full((48, 16), 1 / 16)
    y, _ = kernels.linear_forward(*one, None, activation="relu", dropout=dropout)
    kept = y > 0
    assert y.unique().tolist() == [0.0, pytest.approx(4 / 3, rel=1e-4)]
    assert abs(kept.float().mean().item() - 0.75) < 0.03
    dy, w2 = torch.randn(200, 16), torch.randn(16, 48)
    whole, _, _ = kernels.linear_backward(dy, w2, torch.ones(200, 48), activation="silu")
    for activation, saved in (("relu", y), ("silu", torch.ones(200, 48))):
        dpre, again, _ = kernels.linear_backward(dy, w2, saved, activation=activation, dropout=dropout)
        assert torch.equal(again > 0, kept)
        assert torch.equal(dpre[~kept], torch.zeros_like(dpre[~kept]))
        slope = 1.0 if activation == "relu" else F.silu(torch.ones(1)).item() and whole / (dy @ w2)
        expected = torch.where(kept, (dy @ w2) * slope * (4 / 3), 0.0)
        torch.testing.assert_close(dpre, expected, rtol=1e-3, atol=1e-4)
    other, _ = kernels.linear_forward(*one, None, activation="relu", dropout=dropout._replace(offset=4))
    assert not torch.equal(other, y)


def test_a_dropped_nan_is_gone_and_a_kept_one_passes_relu_and_its_gradient(interpreter):
    x, w = torch.full((9, 8), float("nan")).half(), torch.ones(136, 8).half()
    y, active = kernels.linear_forward(
        x, w, None, activation="relu", dropout=Dropout(torch.tensor([3]), 1, 0.5), keep=True
    )
    dpre, _, _ = kernels.linear_backward(
        torch.ones(9, 4).half(), torch.ones(4, 136).half(), y, activation="relu", active=active
    )
    assert 0.3 < y.isnan().float().mean() < 0.7
    assert torch.equal(y.isnan(), dpre != 0)
    assert (y[~y.isnan()] == 0).all()


@pytest.mark.parametrize(("activation", "with_bias"), [("none", True), ("none", False), ("relu", True)])
def test_what_a_product_of_cublas_ends_in_is_left_to_it(interpreter, monkeypatch, activation, with_bias):
    monkeypatch.setattr(kernels, "_by_cublas", lambda x, bias, activation: True)
    x, w, b = torch.randn(2, 9, 16), torch.randn(24, 16), torch.randn(24) if with_bias else None
    y, kept = kernels.linear_forward(x, w, b, activation=activation, keep=True)
    torch.testing.assert_close(y, ACTIVATIONS[activation](F.linear(x, w, b)), rtol=1e-5, atol=1e-5)
    assert (y.is_contiguous(), kept, len(interpreter.launches)) == (True, None, 0)
    dropout = Dropout(torch.tensor([3]), 1, 0.5)  # in which it doesn't
    kernels.linear_forward(x, w, b, activation=activation, dropout=dropout)
    assert len(interpreter.launches) == 1
