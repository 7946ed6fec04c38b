from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from detr_fast.kernels import launch as launching
from detr_fast.kernels import layer_norm as kernels
from detr_fast.kernels import read_ahead, rows
from detr_fast.kernels.launch import launch
from hypothesis import strategies as st

from detr_fast.testing import assert_as_accurate_as_eager
from detr_fast.testing.cases import generated, sizes
from detr_fast.testing.interpreter import checked_interpreter

pytestmark = pytest.mark.interpreter

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


class KernelLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, out_dtype):
        y, mean, rstd = kernels.layer_norm_forward(x, weight, bias, 1e-5, out_dtype)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias, mean, rstd = ctx.saved_tensors
        dx, dw, db = kernels.layer_norm_backward(
            dy,
            x,
            weight,
            mean,
            rstd,
            with_dw=weight is not None,
            with_db=bias is not None,
            parameter_dtype=None if bias is None else bias.dtype,
        )
        return dx, dw, db, None


def layer_norm(x, weight=None, bias=None):
    return KernelLayerNorm.apply(x, weight, bias, None)


def eager(x, weight=None, bias=None):
    return F.layer_norm(x, x.shape[-1:], weight, bias)


def parameters(columns):
    return torch.randn(columns) + 1, torch.randn(columns)


# One row, no multiple of a tile, several tiles and several persistent rounds; every block size.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "columns"),
    [
        (1, 256),
        (100, 256),
        (41, 1),
        (300, 16),
        (150, 20),
        (70, 64),
        (9, 96),
        (65, 128),
        (33, 512),
        (17, 768),
        (9, 1000),
    ],
)
def test_layer_norm_is_as_accurate_as_eager(interpreter, rows, columns, dtype):
    inputs = [torch.randn(rows, columns) * 3 + 1, *parameters(columns)]
    assert_as_accurate_as_eager(layer_norm, reference=eager, inputs=inputs, dtype=dtype)


@pytest.mark.parametrize("columns", [2048, 3000, 4096, 8191, 8192])
def test_rows_that_spread_over_warps_are_as_accurate_as_eager(interpreter, columns):
    inputs = [torch.randn(5, columns) * 3 + 1, *parameters(columns)]
    assert_as_accurate_as_eager(layer_norm, reference=eager, inputs=inputs, dtype=torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("scale", "offset"), [(1e4, 0.0), (1.0, 1e4), (6e4, 0.0), (1e-3, 0.0)])
def test_large_values_and_small_spreads_are_as_accurate_as_eager(interpreter, scale, offset, dtype):
    x = (torch.rand(10, 256) * 2 - 1) * scale + offset
    assert_as_accurate_as_eager(layer_norm, reference=eager, inputs=[x, *parameters(256)], dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_parameters_may_stay_in_fp32(interpreter, dtype):
    weight, bias = parameters(96)
    x = torch.randn(12, 96).to(dtype)
    dy = torch.randn(12, 96).to(dtype)
    y, mean, rstd = kernels.layer_norm_forward(x, weight, bias, 1e-5)
    dx, dw, db = kernels.layer_norm_backward(dy, x, weight, mean, rstd)
    truth = x.double().requires_grad_(), weight.double().requires_grad_(), bias.double().requires_grad_()
    expected = F.layer_norm(truth[0], (96,), *truth[1:])
    expected.backward(dy.double())
    assert (y.dtype, dx.dtype, dw.dtype, db.dtype) == (dtype, dtype, torch.float32, torch.float32)
    torch.testing.assert_close(y, expected.to(dtype))
    torch.testing.assert_close(dx, truth[0].grad.to(dtype))
    torch.testing.assert_close(dw, truth[1].grad.float())
    torch.testing.assert_close(db, truth[2].grad.float())


def test_the_output_dtype_can_be_fp32_as_under_autocast(interpreter):
    x = torch.randn(9, 256).half()
    y, mean, rstd = kernels.layer_norm_forward(x, None, None, 1e-5, out_dtype=torch.float32)
    torch.testing.assert_close(y, F.layer_norm(x.float(), (256,)))
    dx, dw, db = kernels.layer_norm_backward(torch.randn(9, 256), x, None, mean, rstd, with_dw=False, with_db=False)
    assert (y.dtype, dx.dtype, dw, db) == (torch.float32, torch.float16, None, None)
    assert bool(dx.isfinite().all())


@pytest.mark.parametrize("weight", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_weight_and_bias_may_be_absent(interpreter, weight, bias):
    w, b = parameters(40)
    inputs = [torch.randn(21, 40), w if weight else None, b if bias else None]
    assert_as_accurate_as_eager(layer_norm, reference=eager, inputs=inputs, dtype=torch.float32)


@pytest.mark.parametrize("wanted", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1), (1, 1, 0), (0, 0, 0)])
def test_only_the_wanted_gradients_are_computed(interpreter, wanted):
    x, dy, (weight, bias) = torch.randn(37, 64), torch.randn(37, 64), parameters(64)
    _, mean, rstd = kernels.layer_norm_forward(x, weight, bias, 1e-5)
    every = kernels.layer_norm_backward(dy, x, weight, mean, rstd)
    interpreter.launches.clear()
    flags = dict(zip(("with_dx", "with_dw", "with_db"), map(bool, wanted)))
    some = kernels.layer_norm_backward(dy, x, weight, mean, rstd, **flags)
    for want, one, same in zip(wanted, some, every):
        assert torch.equal(one, same) if want else one is None
    assert len(interpreter.launches) == min(1, sum(wanted)) + min(1, wanted[1] + wanted[2])


def test_no_rows_give_no_output_and_zero_parameter_gradients(interpreter):
    x, (weight, bias) = torch.randn(0, 3, 48), parameters(48)
    y, mean, rstd = kernels.layer_norm_forward(x, weight, bias, 1e-5)
    assert interpreter.counts() == {}
    dx, dw, db = kernels.layer_norm_backward(y, x, weight, mean, rstd)
    assert (y.shape, dx.shape, mean.shape) == ((0, 3, 48), (0, 3, 48), (0,))
    assert torch.equal(dw, torch.zeros(48))
    assert torch.equal(db, torch.zeros(48))


LAYOUTS = {
    "a view with gaps between rows": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "every other row": lambda x: torch.stack([x, x], -2)[..., 0, :],
    "one row for all": lambda x: x[:1, :1].expand(x.shape),
    "transposed leading dimensions": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "transposed columns": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "one value for all": lambda x: x[:1, :1, :1].expand(x.shape),
    "rows off 16 bytes": lambda x: torch.cat([x, x[..., :1]], -1)[..., : x.shape[-1]],
    "an address off 16 bytes": lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("columns", [40, 256])
def test_any_layout_of_input_and_gradient_works(interpreter, layout, columns):
    arrange = LAYOUTS[layout]
    x = torch.randn(5, 4, columns)
    dy = torch.randn(5, 4, columns)
    weight, bias = parameters(columns)
    flat_x, flat_dy = arrange(x).contiguous(), arrange(dy).contiguous()
    y, mean, rstd = kernels.layer_norm_forward(arrange(x), weight, bias, 1e-5)
    expected, _, _ = kernels.layer_norm_forward(flat_x, weight, bias, 1e-5)
    assert torch.equal(y, expected)
    assert y.is_contiguous()
    gradients = kernels.layer_norm_backward(flat_dy, flat_x, weight, mean, rstd)
    for some_dy, some_x in ((arrange(dy), arrange(x)), (arrange(dy), flat_x), (flat_dy, arrange(x))):
        for ours, same in zip(kernels.layer_norm_backward(some_dy, some_x, weight, mean, rstd), gradients):
            # Tiles differ with the alignment, and so does the order in which rows are added up.
            torch.testing.assert_close(ours, same)
            assert ours.is_contiguous()


@pytest.mark.parametrize(
    ("layout", "copied"),
    [(name, name.startswith(("transposed", "one value"))) for name in LAYOUTS],
)
def test_rows_at_a_constant_distance_are_read_without_a_copy(layout, copied):
    x = LAYOUTS[layout](torch.randn(5, 4, 40))
    rows, distance = kernels.as_rows(x)
    assert (rows is not x) == copied
    flat = torch.as_strided(rows, (20, 40), (distance, 1))
    assert torch.equal(flat, x.reshape(20, 40))


def test_rows_very_far_apart_are_copied_so_that_tile_offsets_fit_32_bits():
    far = torch.empty(2, (1 << 23) + 8, dtype=torch.uint8)
    assert kernels.as_rows(far[:, :8])[1] == 8
    assert kernels.as_rows(far[:1, :8])[1] == 8  # a single row has no distance
    near = kernels.as_rows(far[:, 8:].as_strided((2, 8), (1 << 23, 1)))[1]
    assert near == 1 << 23
    assert 255 * near + 256 < 1 << 31  # the largest tile: of a weight of 256 rows


def test_offsets_use_64_bits_where_rows_times_columns_is_large():
    x, (weight, _) = torch.randn(64, 256), parameters(256)
    with checked_interpreter(int32_limit=4096):  # a tile is 2,048 elements (4,096 in the backward), the tensor 16,384
        y, mean, rstd = kernels.layer_norm_forward(x, weight, None, 1e-5)
        kernels.layer_norm_backward(x, x, weight, mean, rstd)
    torch.testing.assert_close(y, F.layer_norm(x, (256,), weight))


def test_the_backward_is_deterministic_whatever_order_programs_run_in():
    x, dy, (weight, _) = torch.randn(200, 64), torch.randn(200, 64), parameters(64)
    results = []
    for seed in range(3):
        with checked_interpreter(seed=seed):
            _, mean, rstd = kernels.layer_norm_forward(x, weight, None, 1e-5)
            results.append(kernels.layer_norm_backward(dy, x, weight, mean, rstd))
    for other in results[1:]:
        assert all(torch.equal(one, same) for one, same in zip(results[0], other))


# Several rounds of loads, columns of one program and of several; runs of 16 bytes and none.
@pytest.mark.parametrize("columns", [(40, 1100), (43, 5), (16, 4200)])
def test_partial_sums_of_many_programs_are_all_added(interpreter, columns):
    first, second = torch.randn(1601, columns[0]), torch.randn(3, columns[1])
    sums = rows.sum_partials((first, torch.float32), (second, torch.bfloat16))
    torch.testing.assert_close(sums[0], first.double().sum(0).float())
    torch.testing.assert_close(sums[1], second.double().sum(0).bfloat16())
    halves = rows.sum_partials((first[:, :8], torch.float32), (first[:, 8:], torch.bfloat16), (second, torch.float32))
    torch.testing.assert_close(torch.cat([halves[0], halves[1].float()]), sums[0], rtol=1e-2, atol=1e-2)
    assert halves[1].dtype == torch.bfloat16
    torch.testing.assert_close(halves[2], second.double().sum(0).float())


def shifted(x):
    """x at an address off 16 bytes."""
    return torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "arrange"),
    [
        ((0, 8), lambda x: x),
        ((0, 3, 0), lambda x: x),
        ((3, 0), lambda x: x),
        ((1, 1), lambda x: x),
        ((3, 700, 24), lambda x: x),  # in 16 bits two rounds of loads
        ((70, 16), shifted),
        ((70, 16), lambda x: torch.cat([x, x], -1)[:, :16]),  # rows far apart
        ((1, 24), lambda x: x.expand(50, 24)),
        ((16, 70), lambda x: x.T),
        ((rows.MANY_ROWS + 1, 8), lambda x: x),  # in two launches
    ],
)
def test_sums_over_rows_are_as_accurate_as_eager(interpreter, shape, arrange, dtype):
    x = torch.randn(shape) + 1.0  # a mean of zero would hide rows that are left out
    assert_as_accurate_as_eager(
        lambda x: rows.sum_rows(arrange(x)),
        reference=lambda x: arrange(x).flatten(0, -2).sum(0),
        inputs=[x],
        dtype=dtype,
        grad=False,
    )


def test_a_sum_over_rows_has_no_more_programs_than_a_grid_holds(monkeypatch):
    seen = []
    monkeypatch.setattr(launching, "observers", [seen.append])
    rows.sum_rows(torch.empty(600_000_000, 1, dtype=torch.bfloat16, device="meta"))
    assert [one.grid for one in seen] == [(1, 65_535), (1, 1)]


@pytest.mark.parametrize(
    ("tiles", "programs"),
    [
        (0, 0),
        (1, 1),
        (132, 132),  # one each
        (133, 67),  # two each, but for the last
        (425, 213),
        (4000, 500),  # half of the most, and eight each
        (8000, 1000),  # eight each
        (65_536, 1041),  # 63 each: with 1,056, too, the longest take 63
    ],
)
def test_tiles_are_shared_evenly_by_few_programs(tiles, programs):
    assert rows.persistent_programs(tiles, 132, 8) == programs


# Six programs of tiles of 64 rows: a cut tile alone, one, one and a cut one, two for each, then three for some, and a cut one.
@pytest.mark.parametrize("count", [3, 64, 70, 768, 1000])
def test_reading_a_tile_ahead_changes_no_bit(interpreter, count):
    x, dy, (weight, _) = torch.randn(count, 16).half(), torch.randn(count, 16).half(), parameters(16)
    _, mean, rstd = kernels.layer_norm_forward(x, weight, None, 1e-5)
    variant = kernels.backward_variant(16, *(x.dtype,) * 2, weight.dtype, True, True, True, 8)
    assert variant.constants["AHEAD"]
    programs = read_ahead.backward_programs(variant, count, 0, 1)
    results = []
    for ahead in (True, False):
        variant = dataclasses.replace(variant, constants={**variant.constants, "AHEAD": ahead})
        dx, sums = torch.full_like(x, float("nan")), torch.full((2, programs, 16), float("nan"))
        arguments = (dy, x, weight, mean, rstd, dx, *sums, 16, 16, count, 16)
        launch(variant, (programs,), *arguments)
        results.append((dx, sums))
    assert all(torch.equal(one, same) for one, same in zip(*results))
    assert bool(results[0][0].isfinite().all())


@pytest.mark.parametrize(
    ("count", "programs"),
    [
        (0, 0),
        (800, 100),  # two each, both on their way at once
        (6800, 850),
        (32_768, 1366),  # six each, but for the last
        (524_288, 1580),  # 12 warps a multiprocessor, as registers allow
    ],
)
def test_programs_that_read_ahead_are_as_many_as_registers_allow(count, programs):
    variant = kernels.backward_variant(256, *(torch.bfloat16,) * 3, True, True, True, 8)
    assert read_ahead.backward_programs(variant, count, 1, 132) == programs


def test_nan_and_inf_stay_in_their_row(interpreter):
    x = torch.randn(20, 96)
    x[3, 5], x[7, 0] = float("nan"), float("inf")
    y, _, _ = kernels.layer_norm_forward(x, None, None, 1e-5)
    bad = ~y.isfinite().all(dim=1)
    assert bad.nonzero().flatten().tolist() == [3, 7]


def test_rows_without_columns_are_refused():
    with pytest.raises(ValueError, match=r"of 0 columns: these kernels take 1 to 8192"):
        kernels.layer_norm_forward(torch.zeros(2, 0), None, None, 1e-5)


@pytest.mark.parametrize(("columns", "dtype"), [(8193, torch.float32), (12_288, torch.float16)])
def test_rows_beyond_a_block_are_as_accurate_as_eager(interpreter, columns, dtype):
    inputs = [torch.randn(3, columns) * 3 + 100, *parameters(columns)]
    assert_as_accurate_as_eager(layer_norm, reference=eager, inputs=inputs, dtype=dtype)
    assert interpreter.counts().keys() >= {"wide_forward_kernel", "wide_backward_kernel", "wide_parameters_kernel"}


@generated(
    60,
    rows=sizes(70, tile=64),
    columns=sizes(300, tile=256, least=1),
    affine=st.sampled_from([(False, False), (True, True), (True, False)]),
    expanded=st.booleans(),
)
def test_any_case_is_as_accurate_as_eager(values, rows, columns, affine, expanded):
    weight, bias = values.parameter(columns, mean=1.0), values.parameter(columns)
    with checked_interpreter(seed=values.seed):
        assert_as_accurate_as_eager(
            layer_norm,
            reference=eager,
            inputs=[values(rows, columns), weight if affine[0] else None, bias if affine[1] else None],
            dtype=values.dtype,
            upstream=(lambda y: values.parameter(1, columns).expand(y.shape)) if expanded else torch.randn_like,
        )
