from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from detr_fast.kernels import add_layer_norm as kernels
from detr_fast.kernels import offline, rows
from detr_fast.kernels.analysis import analyse
from detr_fast.kernels.catalog import entry
from detr_fast.kernels.dropout import Dropout, scale

from detr_fast.ops.dropout import keep_mask
from detr_fast.testing import assert_as_accurate_as_eager
from detr_fast.testing.interpreter import checked_interpreter

interpreted = pytest.mark.interpreter


def dropout(p):
    return Dropout(torch.tensor([-1234567890123456789]), 3, p) if p else None


class KernelAddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, bias, p, with_sum):
        y, total, mean, rstd = kernels.add_layer_norm_forward(
            x, residual, weight, bias, 1e-5, dropout(p), with_sum=with_sum
        )
        ctx.save_for_backward(*((total, None) if with_sum else (x, residual)), weight, mean, rstd)
        ctx.rest = (p, x.dtype, residual.dtype, bias is not None)
        return (y, total) if with_sum else y

    @staticmethod
    def backward(ctx, dy, dsum=None):
        x, residual, weight, mean, rstd = ctx.saved_tensors
        p, x_dtype, residual_dtype, with_db = ctx.rest
        gradients = kernels.add_layer_norm_backward(
            dy,
            dsum,
            x,
            residual,
            weight,
            mean,
            rstd,
            dropout(p),
            dx_dtype=x_dtype,
            dresidual_dtype=residual_dtype,
            with_dw=weight is not None,
            with_db=with_db,
        )
        return *gradients, None, None


def eager(x, residual, weight, bias, p, with_sum):
    if p:
        kept = keep_mask(*dropout(p)[:2], p, 1, x.shape[:-1].numel(), x.shape[-1]).view(x.shape)
        x = x * kept * scale(p)
    total = residual + x
    y = F.layer_norm(total, total.shape[-1:], weight, bias)
    return (y, total) if with_sum else y


def inputs(rows, columns, p, with_sum):
    x, residual = torch.randn(rows, columns) * 3 + 1, torch.randn(rows, columns)
    return [x, residual, torch.randn(columns) + 1, torch.randn(columns), p, with_sum]


# One row, no multiple of a tile, several tiles and persistent rounds; blocks full and not, aligned and not.
@interpreted
@pytest.mark.parametrize(
    ("rows", "columns", "dtype", "p", "with_sum"),
    [
        (1, 256, torch.float32, 0.1, False),
        (100, 256, torch.bfloat16, 0.1, False),
        (37, 256, torch.bfloat16, 0.0, False),  # by two warps in turn
        (9, 256, torch.float16, 0.0, True),
        (41, 1, torch.float32, 0.5, True),
        (9, 1, torch.bfloat16, 0.0, True),  # a sum that is rounded after its statistics has a gradient of noise
        (150, 20, torch.float16, 0.0, False),
        (70, 64, torch.bfloat16, 0.0, True),
        (9, 96, torch.float16, 0.3, True),
        (9, 1000, torch.float32, 0.9, False),
        (3, 8192, torch.float32, 0.1, False),
        (2, 8192, torch.float16, 0.1, False),
        (3, 4099, torch.bfloat16, 0.1, False),
        (2, 4099, torch.float16, 0.1, True),
        (3, 9000, torch.float32, 0.1, True),
        (3, 8200, torch.bfloat16, 0.5, False),
        (2, 8193, torch.float32, 0.0, True),
        (2, 8200, torch.bfloat16, 0.1, True),
    ],
)
def test_add_layer_norm_is_as_accurate_as_eager(interpreter, rows, columns, dtype, p, with_sum):
    values = inputs(rows, columns, p, with_sum)
    assert_as_accurate_as_eager(KernelAddLayerNorm.apply, reference=eager, inputs=values, dtype=dtype)


@interpreted
def test_everything_dropped_leaves_the_residuals_norm(interpreter):
    values = inputs(5, 64, 1.0, False)
    y = KernelAddLayerNorm.apply(*values)
    torch.testing.assert_close(y, F.layer_norm(values[1], (64,), values[2], values[3]))


@interpreted
@pytest.mark.parametrize("columns", [256, 9000])
def test_an_fp16_sum_beyond_65504_stays_finite(interpreter, columns):
    x, residual = (torch.randn(4, columns).clamp(-2, 2).mul(30_000).half().requires_grad_() for _ in range(2))
    y = KernelAddLayerNorm.apply(x, residual, None, None, 0.0, False)
    expected = F.layer_norm(residual.double() + x.double(), (columns,))
    assert not (residual + x).isfinite().all()
    torch.testing.assert_close(y.double(), expected, rtol=2e-3, atol=2e-3)
    (gradient,) = torch.autograd.grad(y, x, torch.randn_like(y))
    assert bool(gradient.isfinite().all())


@interpreted
@pytest.mark.parametrize(("columns", "start"), [(40, 1), (4104, 0)], ids=["scattered", "whole runs"])
def test_inputs_and_gradients_may_have_dtypes_and_layouts_of_their_own(interpreter, columns, start):
    x = torch.randn(4, 5, columns).bfloat16().transpose(0, 1)
    residual = torch.randn(5, 1, start + columns)[..., start:].expand(5, 4, columns)
    weight, bias, dy = torch.randn(columns), torch.randn(columns), torch.randn(columns).expand(5, 4, columns)
    found, expected = [], []

    def exact(x, *rest):
        return eager(x.float(), *rest)

    for function, results in ((KernelAddLayerNorm.apply, found), (exact, expected)):
        leaves = [t.detach().requires_grad_() for t in (x, residual, weight, bias)]
        y = function(*leaves, 0.3, False)
        results += [y, *torch.autograd.grad(y, leaves, dy)]
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other)  # dtypes, too


@interpreted
@pytest.mark.parametrize(("columns", "dtype"), [(64, torch.float32), (64, torch.bfloat16), (9000, torch.float32)])
def test_only_wanted_gradients_are_computed(interpreter, columns, dtype):
    x, residual, weight, _, p, _ = inputs(9 if columns == 64 else 1, columns, 0.2, False)
    residual = residual.to(dtype)
    _, _, mean, rstd = kernels.add_layer_norm_forward(x, residual, weight, None, 1e-5, dropout(p))
    arguments = (x, None, x, residual, weight, mean, rstd, dropout(p))
    both = {"dx_dtype": x.dtype, "dresidual_dtype": dtype}
    every = kernels.add_layer_norm_backward(*arguments, **both)
    for wanted in range(4):
        types = [kind if wanted == i else None for i, kind in enumerate(both.values())]
        flags = {"with_dw": wanted == 2, "with_db": wanted == 3}
        some = kernels.add_layer_norm_backward(*arguments, dx_dtype=types[0], dresidual_dtype=types[1], **flags)
        for i, (one, same) in enumerate(zip(some, every)):
            assert torch.equal(one, same) if i == wanted else one is None


@interpreted
@pytest.mark.parametrize("columns", [48, 8200])
def test_no_rows_give_no_output_and_zero_parameter_gradients(interpreter, columns):
    x, residual, weight, bias, *_ = inputs(0, columns, 0.0, False)
    y, total, mean, rstd = kernels.add_layer_norm_forward(x, residual, weight, bias, 1e-5, with_sum=True)
    types = {"dx_dtype": x.dtype, "dresidual_dtype": x.dtype}
    dx, _, dw, db = kernels.add_layer_norm_backward(y, total, total, None, weight, mean, rstd, **types)
    assert (y.shape, total.shape, dx.shape) == ((0, columns),) * 3
    assert torch.equal(dw, torch.zeros(columns))
    assert torch.equal(db, torch.zeros(columns))


@interpreted
@pytest.mark.parametrize("columns", [64, 8200])
def test_the_backward_is_deterministic_and_its_offsets_fit(columns):
    x, residual, weight, bias, *_ = inputs(70 if columns == 64 else 2, columns, 0.0, False)
    results = []
    for seed in range(2):
        with checked_interpreter(seed=seed):
            _, _, mean, rstd = kernels.add_layer_norm_forward(x, residual, weight, bias, 1e-5, dropout(0.5))
            types = {"dx_dtype": x.dtype, "dresidual_dtype": x.dtype}
            results.append(
                kernels.add_layer_norm_backward(x, None, x, residual, weight, mean, rstd, dropout(0.5), **types)
            )
    assert all(torch.equal(one, same) for one, same in zip(*results))


BF16 = torch.bfloat16
PRE_NORM = {
    "forward": kernels.forward_variant(256, *(BF16,) * 5, True, False, 8),
    "backward": kernels.backward_variant(
        256, kernels.BackwardForm((BF16, BF16, BF16, None, BF16, None, BF16), True, True, False), 8
    ),
}


@pytest.mark.offline
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize(
    ("kernel", "pre_norm", "most", "streams"),
    [("forward", False, 23, 3), ("forward", True, 17.2, 4), ("backward", False, 37, 5), ("backward", True, 24, 4)],
)
def test_add_layer_norm_at_256_columns_is_bound_by_memory(target, kernel, pre_norm, most, streams):
    variant = PRE_NORM[kernel] if pre_norm else entry(f"add_layer_norm_{kernel}_c256_bf16").variant
    architecture = int(target.removeprefix("sm_"))
    binary, _, _ = offline.compile_variant(variant, target)
    loop = analyse(binary, architecture, rows.tile_elements(variant) / variant.num_warps)
    assert loop.instructions_per_element <= most
    assert loop.dram_headroom(architecture, bytes_per_element=2 * streams) >= 2.0
    moves = [opcode for opcode in loop.opcodes if opcode.startswith(("LDG", "STG"))]
    assert any("128" in opcode for opcode in moves)
