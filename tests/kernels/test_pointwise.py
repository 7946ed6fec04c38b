from __future__ import annotations

import pytest
import torch
from detr_fast.kernels import pointwise as kernels

from detr_fast.testing import assert_as_accurate_as_eager
from tests.row_layouts import ROW_LAYOUTS

# Offsets inside a tile of 128 rows pass the usual limit of 32-bit arithmetic.
pytestmark = pytest.mark.interpreter(int32_limit=1 << 16)

DTYPES = [torch.bfloat16, torch.float16]
# No pixel, one, no multiple of a tile, several tiles; channels that are whole tiles, multiples of 16 bytes, and neither;
# products of one step, of several, and long ones.
SIZES = [(0, 8, 8), (1, 1, 1), (70, 24, 40), (3, 33, 17), (65, 64, 256), (130, 256, 64), (40, 296, 136), (9, 7, 130)]


def eager_forward(x, w, residual, scale, shift, residual_scale):
    dtype = torch.promote_types(x.dtype, torch.float32)
    y = (x @ w.T).to(dtype) * scale + shift
    if residual is not None:
        y = y + residual.to(dtype) * (1.0 if residual_scale is None else residual_scale)
    return y.relu().to(x.dtype)


def forward(x, w, residual, scale, shift, residual_scale):
    return kernels.pointwise_forward(x, w, scale, shift, residual, residual_scale)


def eager_backward(g, w, added, y, scale):
    dtype = torch.promote_types(g.dtype, torch.float32)
    out = (g @ w).to(dtype)
    out = out if added is None else out + added.to(dtype)
    out = out if y is None else out.masked_fill(y <= 0, 0.0)
    return (out if scale is None else out * scale).to(g.dtype)


def uneven(columns):
    """A factor for each column, of either sign and over six orders of magnitude, as trained norms fold to."""
    return torch.randn(columns) * 10.0 ** torch.linspace(-3, 3, columns)


@pytest.mark.parametrize("beside", ["nothing", "residual", "scaled residual"])
@pytest.mark.parametrize(("pixels", "K", "N"), SIZES)
def test_the_forward_is_as_accurate_as_eager(interpreter, pixels, K, N, beside):
    residual = None if beside == "nothing" else torch.randn(pixels, N)
    per_channel = [uneven(N), torch.randn(N), torch.randn(N) if beside == "scaled residual" else None]
    dtype = DTYPES[(pixels + N) % 2]
    assert_as_accurate_as_eager(
        forward,
        reference=eager_forward,
        inputs=[torch.randn(pixels, K), torch.randn(N, K) / 8, residual, *per_channel],
        dtype=[dtype] * 3 + [torch.float32] * 3,
        grad=False,
    )


@pytest.mark.parametrize("given", ["", "y", "added", "scale", "added y", "y scale", "added y scale"])
@pytest.mark.parametrize(("pixels", "N", "K"), SIZES[2:])
def test_the_backward_is_as_accurate_as_eager(interpreter, pixels, N, K, given):
    beside = [torch.randn(pixels, K) if name in given.split() else None for name in ("added", "y")]
    dtype = DTYPES[(pixels + N) % 2]
    assert_as_accurate_as_eager(
        kernels.pointwise_backward,
        reference=eager_backward,
        inputs=[torch.randn(pixels, N), torch.randn(N, K) / 8, *beside, uneven(K) if "scale" in given else None],
        dtype=[dtype] * 4 + [torch.float32],
        grad=False,
    )


def test_a_sum_is_rounded_once(interpreter):
    """257 is 256 in bf16, so that what rounds between a product and a sum finds nothing left of 257 - 256."""
    x, w = torch.tensor([[256.0, 1.0]]).bfloat16(), torch.ones(1, 2).bfloat16()
    residual = torch.tensor([[-256.0]]).bfloat16()
    assert kernels.pointwise_forward(x, w, torch.ones(1), torch.zeros(1), residual).item() == 1
    assert kernels.pointwise_backward(x, w.T, residual).item() == 1


def test_nan_goes_on_and_what_relu_stopped_is_exactly_zero(interpreter):
    x, w = torch.randn(5, 16).bfloat16(), torch.randn(24, 16).bfloat16()
    x[2] = float("nan")
    y = kernels.pointwise_forward(x, w, torch.ones(24), torch.zeros(24))
    assert y[2].isnan().all()
    assert y[[0, 1, 3, 4]].min() == 0
    g = torch.full((5, 8), float("inf")).bfloat16()
    w_behind = torch.rand(8, 24).bfloat16() + 1
    found = kernels.pointwise_backward(g, w_behind, y=y)
    assert torch.equal(found == 0, y <= 0)
    assert torch.equal(found == float("inf"), ~(y <= 0))


@pytest.mark.parametrize("layout", ROW_LAYOUTS)
def test_any_layout_is_read_right(interpreter, layout):
    arrange = ROW_LAYOUTS[layout]
    x, w, residual = (torch.randn(*shape).half() for shape in ((2, 9, 16), (24, 16), (2, 9, 24)))
    scale, shift = torch.randn(24), torch.randn(24)
    for i in range(3):
        given = [arrange(t) if i == which else t for which, t in enumerate((x, w, residual))]
        y = forward(*given, scale, shift, scale)
        torch.testing.assert_close(y, eager_forward(*given, scale, shift, scale), rtol=1e-2, atol=1e-2)
        assert y.is_contiguous()
    g, added, mask = residual, *(torch.randn(2, 9, 16).half() for _ in range(2))
    for i in range(4):
        given = [arrange(t) if i == which else t for which, t in enumerate((g, w, added, mask))]
        out = kernels.pointwise_backward(*given)
        torch.testing.assert_close(out, eager_backward(*given, None), rtol=1e-2, atol=1e-2)
        assert out.is_contiguous()
