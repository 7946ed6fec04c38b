from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from detr_fast.kernels import feed_forward as kernels
from detr_fast.kernels.dropout import Dropout
from detr_fast.kernels.linear import linear_forward
from detr_fast.kernels.linear_norm import linear_norm_forward

from detr_fast.testing import assert_as_accurate_as_eager
from detr_fast.testing.interpreter import checked_interpreter

pytestmark = pytest.mark.interpreter


def block(x, w1, b1, w2, b2, weight=None, bias=None, activation="relu", dropout=None, output_dropout=None, keep=False):
    norm = None if weight is None else kernels.Norm(x, weight, bias, 1e-5, x.dtype, False, keep)
    drops = {"dropout": dropout, "output_dropout": output_dropout}
    return kernels.feed_forward(x, w1, b1, w2, b2, norm, activation=activation, **drops)


def eager(x, w1, b1, w2, b2, weight=None, bias=None, activation=F.relu):
    y = F.linear(activation(F.linear(x, w1, b1)), w2, b2)
    return y if weight is None else F.layer_norm(x + y, y.shape[-1:], weight, bias)


def tensors(rows, width, hidden, outputs, norm=True):
    shapes = [(*rows, width), (hidden, width), (hidden,), (outputs, hidden), (outputs,), (outputs,), (outputs,)]
    scales = [1, width**-0.5, 1, hidden**-0.5, 1, 1, 1]
    return [torch.randn(s) * scale for s, scale in zip(shapes, scales)][: 7 if norm else 5]


# No row, one, no multiple of a tile; widths that fill their block, whole runs of 16 bytes and neither; steps that are whole
# or not.
@pytest.mark.parametrize(
    ("rows", "width", "hidden", "outputs", "norm", "dtype"),
    [
        ((0,), 16, 32, 16, True, torch.float32),
        ((1,), 16, 32, 16, True, torch.bfloat16),
        ((2, 19), 40, 40, 24, False, torch.float16),
        ((21,), 24, 72, 24, True, torch.bfloat16),
        ((5,), 9, 33, 9, True, torch.float32),
        ((17,), 17, 70, 3, False, torch.float32),
    ],
)
def test_the_block_is_as_accurate_as_eager(interpreter, rows, width, hidden, outputs, norm, dtype):
    inputs = tensors(rows, width, hidden, outputs, norm)
    assert_as_accurate_as_eager(lambda *a: block(*a)[0], reference=eager, inputs=inputs, dtype=dtype, grad=False)


@pytest.mark.parametrize(("name", "activation"), [("gelu", F.gelu), ("silu", F.silu)])
def test_activations_are_as_accurate_as_eager(interpreter, name, activation):
    assert_as_accurate_as_eager(
        lambda *a: block(*a, activation=name)[0],
        reference=lambda *a: eager(*a, activation=activation),
        inputs=tensors((9,), 16, 32, 16),
        dtype=torch.float32,
        grad=False,
    )


def test_many_rows_take_larger_tiles(monkeypatch):
    monkeypatch.setattr(kernels, "FEW_ROWS", 0)
    with checked_interpreter() as checks:
        inputs = tensors((80,), 24, 40, 24)
        run = {"reference": eager, "inputs": inputs, "dtype": torch.bfloat16, "grad": False}
        assert_as_accurate_as_eager(lambda *a: block(*a)[0], **run)
        assert checks.launches[0].variant.constants["BLOCK_M"] == 64


@pytest.mark.parametrize("hidden_p", [0.0, 0.25])
@pytest.mark.parametrize("output_p", [0.0, 0.5])
def test_it_drops_and_keeps_for_backward_what_two_kernels_do(interpreter, hidden_p, output_p):
    x, w1, b1, w2, b2, weight, bias = tensors((37,), 16, 48, 16)
    seed = torch.tensor([11])
    dropout, output_dropout = (Dropout(seed, 5, p) if p else None for p in (hidden_p, output_p))
    drops = {"dropout": dropout, "output_dropout": output_dropout}
    found = block(x, w1, b1, w2, b2, weight, bias, "silu", keep=True, **drops)
    h, _ = linear_forward(x, w1, b1, activation="silu", dropout=dropout)
    expected = linear_norm_forward(h, w2, b2, x, weight, bias, 1e-5, dropout=output_dropout)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    residual = torch.randn(37, 16)
    for norm in ((weight, bias, 1e-5), (None, None, 0.0)):  # pre-norm: with the sum, or the sum alone
        behind = kernels.Norm(residual, *norm, x.dtype, True, True)
        found = kernels.feed_forward(x, w1, b1, w2, b2, behind, activation="silu", **drops)
        expected = linear_norm_forward(h, w2, b2, residual, *norm, dropout=output_dropout, with_sum=True)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_sum_over_fp16s_range_stays_finite_and_right(interpreter):
    tensors_16 = [t.half() for t in tensors((6,), 16, 32, 16)]
    x, b2 = tensors_16[0], tensors_16[4]
    x[:, ::2] = 60_000
    b2[::2] += 20_000  # half of the sums are over 65,504
    tensors_16[1] *= 1e-4
    assert not eager(*tensors_16).isfinite().all()
    expected = eager(*(t.double() for t in tensors_16))
    torch.testing.assert_close(block(*tensors_16)[0].double(), expected, rtol=3e-3, atol=3e-3)


def test_an_infinite_input_spoils_its_own_row_only(interpreter):
    inputs = tensors((9,), 16, 20, 16, norm=False)  # a step that is not whole
    inputs[0][4, 3] = float("inf")
    y, *_ = block(*inputs)
    assert y.isfinite().all(1).tolist() == [row != 4 for row in range(9)]


@pytest.mark.parametrize("layout", ["transposed", "off 16 bytes"])
def test_any_layout_is_read_right_and_16_bytes_at_a_time(interpreter, layout):
    inputs = tensors((9,), 16, 32, 16)
    expected = eager(*inputs)
    for index in (0, 1, 3, 4, 5, 6):
        t = inputs[index]
        if layout == "transposed":
            turned = t.t().contiguous().t() if t.ndim > 1 else t
        elif t.ndim == 1:
            turned = torch.cat([t[:1], t])[1:]
        else:
            turned = torch.cat([t, t[:, :1]], 1)[:, :-1]
        found = block(*inputs[:index], turned, *inputs[index + 1 :])[0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert interpreter.launches[-1].variant.constants["VEC"] == 4


def test_biases_may_be_absent(interpreter):
    x, w1, _, w2, _, weight, _ = tensors((5,), 16, 24, 16)
    arguments = [x, w1, None, w2, None, weight, None]
    torch.testing.assert_close(block(*arguments)[0], eager(*arguments), rtol=1e-4, atol=1e-5)
