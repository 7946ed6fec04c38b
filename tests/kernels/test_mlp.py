"""A perceptron and a linear map beside it, in fp32 by products of split factors, and the gradients of all of it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from detr_fast.kernels import mlp
from detr_fast.kernels.attention_tiles import dot
from detr_fast.kernels.launch import Variant, jit, launch, tl
from detr_fast.kernels.mlp import Kept, Layers

from detr_fast.testing import assert_as_accurate_as_eager
from detr_fast.testing.cases import generated, sizes
from detr_fast.testing.interpreter import checked_interpreter

interpreted = pytest.mark.interpreter(int32_limit=1 << 18)  # all gradients in one row
fp32 = torch.float32


class KernelHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, sigmoid, x, *layers):
        y, z, h1, h2 = mlp.mlp_forward(x, Layers(*layers), ends_in_sigmoid=sigmoid)
        ctx.save_for_backward(x, *layers, h1, h2, y if sigmoid else None)
        return y if z is None else torch.cat([y, z], -1)

    @staticmethod
    def backward(ctx, dyz):
        x, *layers, h1, h2, y = ctx.saved_tensors
        layers = Layers(*layers)
        sizes = [layers.sizes[2], layers.sizes[3]]
        dy, dz = dyz.split(sizes, -1)
        dx, flat = mlp.mlp_backward(dy, dz if sizes[1] else None, x, Kept(h1, h2, y), layers)
        parts = iter(flat.split([t.numel() for t in layers if t is not None]))
        return None, dx, *(None if t is None else next(parts).view(t.shape) for t in layers)


def eager(sigmoid, x, w1, b1, w2, b2, w3, b3, wc, bc):
    h = F.linear(x, w1, b1).relu()
    h = h if w2 is None else F.linear(h, w2, b2).relu()
    y = F.linear(h, w3, b3)
    y = y.sigmoid() if sigmoid else y
    return y if wc is None else torch.cat([y, F.linear(x, wc, bc)], -1)


def layers(C, H, D, N, middle, draw=torch.randn):
    shapes = [(H, C), (H,), (H, H), (H,), (D, H), (D,), (N, C), (N,)]
    present = [True, True, middle, middle, True, True, N > 0, N > 0]
    return [draw(shape) / shape[-1] ** 0.5 if one else None for shape, one in zip(shapes, present)]


# No rows; one; a cut tile behind a full one, and DETR's widths; no whole runs anywhere, or in y and z alone; several tiles of columns.
@interpreted
@pytest.mark.parametrize(
    ("shape", "H", "D", "N", "middle", "sigmoid"),
    [
        ((0, 64), 64, 4, 92, True, True),
        ((1, 16), 16, 1, 1, True, False),
        ((2, 17, 256), 64, 4, 92, True, True),
        ((5, 100), 37, 2, 0, False, False),
        ((3, 8), 20, 5, 7, False, True),
        ((2, 3, 1), 1, 4, 3, True, True),
        ((40, 40), 136, 70, 140, True, False),
    ],
)
def test_it_is_as_accurate_as_eager(interpreter, shape, H, D, N, middle, sigmoid):
    inputs = [sigmoid, torch.randn(shape), *layers(shape[-1], H, D, N, middle)]
    assert_as_accurate_as_eager(KernelHeads.apply, reference=eager, inputs=inputs, dtype=fp32)


@interpreted
def test_large_values_are_as_accurate_as_eager(interpreter):
    inputs = [False, 1e18 * torch.randn(3, 32), *layers(32, 32, 4, 9, True)]
    assert_as_accurate_as_eager(KernelHeads.apply, reference=eager, inputs=inputs, dtype=fp32)


@interpreted
def test_gradients_of_many_rows_are_added_up_by_several_programs(interpreter):
    inputs = [True, torch.randn(530, 16), *layers(16, 16, 4, 0, False)]
    assert_as_accurate_as_eager(KernelHeads.apply, reference=eager, inputs=inputs, dtype=fp32)
    (sums,) = (one for one in interpreter.launches if one.variant.name == "mlp_weights_kernel")
    assert sums.grid == (2, 2)  # tiles, shares of rows


@interpreted
def test_rows_and_gradients_that_lie_apart_are_read_where_they_are(interpreter):
    wide, turned = torch.randn(6, 160), torch.randn(68, 6).t()
    for upstream in (lambda y: turned, lambda y: torch.randn(()).expand(y.shape)):
        for x in (wide[:, 8:72], wide[:, 1:65], torch.randn(64, 6).t()):
            inputs = [True, x, *layers(64, 64, 4, 64, True)]
            assert_as_accurate_as_eager(
                KernelHeads.apply, reference=eager, inputs=inputs, dtype=fp32, upstream=upstream
            )


@interpreted
def test_nan_goes_on_and_is_active(interpreter):
    x = torch.randn(2, 16)
    x[1, 3] = torch.nan
    given = layers(16, 16, 4, 5, True)
    y, z, h1, h2 = mlp.mlp_forward(x, Layers(*given), ends_in_sigmoid=True)
    for t in (y, z, h1, h2):
        assert t.isnan().all(-1).tolist() == [False, True]


@interpreted
@generated(
    8,
    count=sizes(40, tile=32),
    columns=sizes(72, tile=64, least=1),
    hidden=sizes(72, tile=64, least=1),
    outputs=sizes(40, tile=16, least=1),
    classes=sizes(70, tile=64),
)
def test_any_case_is_as_accurate_as_eager(values, count, columns, hidden, outputs, classes):
    middle, sigmoid = bool(count % 2), bool(columns % 2)
    given = layers(columns, hidden, outputs, classes, middle)
    with checked_interpreter(seed=values.seed, int32_limit=1 << 18):
        inputs = [sigmoid, torch.randn(count, columns), *given]
        assert_as_accurate_as_eager(KernelHeads.apply, reference=eager, inputs=inputs, dtype=fp32)


@jit
def product_kernel(a_ptr, b_ptr, y_ptr, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    n = tl.arange(0, SIZE)
    place = n[:, None] * SIZE + n[None, :]
    a, b = tl.load(a_ptr + place), tl.load(b_ptr + place)
    tl.store(y_ptr + place, dot(a, b, tl.zeros((SIZE, SIZE), tl.float32), PRECISION))


@interpreted
def test_products_of_split_factors_are_as_accurate_as_those_of_fp32(interpreter):
    def product(precision):
        def run(a, b):
            y = torch.empty_like(a)
            constants = {"SIZE": 64, "PRECISION": precision}
            launch(Variant(product_kernel, ("*fp32",) * 3, constants), (1,), a, b, y)
            return y

        return run

    a, b = torch.randn(2, 64, 64)
    exact = a.double() @ b.double()
    errors = {name: (product(name)(a, b) - exact).abs().max() for name in ("interpreted_split", "interpreted")}
    assert errors["interpreted_split"] <= 1.5 * errors["interpreted"]
    rounded = (a.view(torch.int32) & -0x2000).view(fp32) @ (b.view(torch.int32) & -0x2000).view(fp32)
    assert (rounded - exact).abs().max() > 300 * errors["interpreted"]  # one of tf32's


class TensorCores:
    """tf32 products whose sums, of 8 products at a time, lose what lies below 24 bits, and are not rounded."""

    @staticmethod
    def cut(x):
        mantissa, exponent = torch.frexp(x)
        return torch.ldexp((mantissa * 2.0**24).trunc(), exponent - 24)

    def product(self, a, b, total):
        for k in range(0, a.shape[1], 8):
            total = self.cut(total + a[:, k : k + 8].double() @ b[k : k + 8].double())
        return total


def test_tensor_cores_that_cut_off_sums_are_as_accurate_as_eager_on_split_factors():
    def split(x):
        high = ((x.view(torch.int32) + 0x1000) & -0x2000).view(fp32)
        return high, ((x - high).view(torch.int32) & -0x2000).view(fp32)

    a, b = torch.randn(32, 256), torch.randn(256, 32)
    cores, total = TensorCores(), torch.zeros(32, 32)
    for k in range(0, 256, 32):
        (a_high, a_low), (b_high, b_low) = split(a[:, k : k + 32].clone()), split(b[k : k + 32].clone())
        step = cores.product(a_low, b_high, torch.zeros(32, 32, dtype=torch.float64))
        step = cores.product(a_high, b_high, cores.product(a_high, b_low, step))
        total = total + step.float()
    exact = a.double() @ b.double()
    assert (total - exact).abs().max() <= 2 * (a @ b - exact).abs().max()


@pytest.mark.offline
@pytest.mark.parametrize(("target", "instruction"), [("sm_80", "mma.sync"), ("sm_90", "mma.sync")])
def test_fp32_products_run_on_tensor_cores(target, instruction):
    from detr_fast.kernels.offline import compile_variant

    variant = mlp.forward_variant(mlp.form_of(256, 256, 4, 92, True, "split"), True)
    _, assembly, _ = compile_variant(variant, target)
    assert assembly.count(f"{instruction}.aligned.m16n8k8.row.col.f32.tf32.tf32.f32") > 0
    assert "fma.rn.f32" not in assembly
