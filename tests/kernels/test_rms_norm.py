"""RMSNorm, alone and behind a sum, on LayerNorm's kernels, which leave every mean out where they are given none."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from detr_fast.kernels import add_layer_norm, layer_norm, offline, rows
from detr_fast.kernels.analysis import analyse
from detr_fast.kernels.catalog import entry
from detr_fast.kernels.dropout import Dropout, scale
from hypothesis import strategies as st

from detr_fast.ops.dropout import keep_mask
from detr_fast.testing import assert_as_accurate_as_eager
from detr_fast.testing.cases import generated, sizes
from detr_fast.testing.interpreter import checked_interpreter

interpreted = pytest.mark.interpreter
EPS = 1e-5
DROPPED = 0.3


class KernelRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        y, mean, rstd = layer_norm.layer_norm_forward(x, weight, None, EPS, centred=False)
        assert mean is None
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, rstd = ctx.saved_tensors
        affine = weight is not None
        return layer_norm.layer_norm_backward(dy, x, weight, None, rstd, with_dw=affine, with_db=False)[:2]


def dropout(p):
    return Dropout(torch.tensor([-1234567890123456789]), 3, p) if p else None


class KernelAddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, p, with_sum):
        settings = {"with_sum": with_sum, "centred": False}
        y, total, mean, rstd = add_layer_norm.add_layer_norm_forward(
            x, residual, weight, None, EPS, dropout(p), **settings
        )
        assert mean is None
        ctx.save_for_backward(*((total, None) if with_sum else (x, residual)), weight, rstd)
        ctx.rest = p, x.dtype, residual.dtype
        return (y, total) if with_sum else y

    @staticmethod
    def backward(ctx, dy, dsum=None):
        x, residual, weight, rstd = ctx.saved_tensors
        p, *dtypes = ctx.rest
        types = dict(zip(("dx_dtype", "dresidual_dtype"), dtypes)) | {"with_db": False}
        gradients = add_layer_norm.add_layer_norm_backward(
            dy, dsum, x, residual, weight, None, rstd, dropout(p), **types
        )
        return *gradients[:3], None, None


def eager(x, weight=None):
    return F.rms_norm(x, x.shape[-1:], weight, EPS)


def eager_sum(x, residual, weight, p, with_sum):
    if p:
        kept = keep_mask(*dropout(p)[:2], p, 1, x.shape[:-1].numel(), x.shape[-1]).view(x.shape)
        x = x * kept * scale(p)
    total = residual + x
    y = eager(total, weight)
    return (y, total) if with_sum else y


# One column, blocks full and not, rows read by elements, a cut tile behind full ones, several warps a row, a loop over blocks.
# A mean far from 0 is what a kernel that centred would take away.
@interpreted
@pytest.mark.parametrize(
    ("count", "columns", "dtype"),
    [
        (41, 1, torch.float32),
        (9, 1, torch.bfloat16),
        (150, 20, torch.float16),
        (9, 100, torch.float32),
        (37, 256, torch.float16),
        (37, 256, torch.bfloat16),
        (9, 1000, torch.float32),
        (3, 3000, torch.bfloat16),
        (2, 8192, torch.float32),
        (2, 8200, torch.float16),
        (2, 8193, torch.float32),
    ],
)
def test_rms_norm_is_as_accurate_as_eager(interpreter, count, columns, dtype):
    inputs = [torch.randn(count, columns) * 3 + 2, torch.randn(columns) + 1]
    assert_as_accurate_as_eager(KernelRMSNorm.apply, reference=eager, inputs=inputs, dtype=dtype)


@interpreted
@pytest.mark.parametrize(
    ("count", "columns", "dtype", "p", "with_sum"),
    [
        (100, 256, torch.bfloat16, DROPPED, False),
        (41, 1, torch.float32, 0.0, True),
        (9, 100, torch.float16, DROPPED, True),
        (2, 8192, torch.float16, DROPPED, False),
        (2, 8200, torch.float32, DROPPED, False),
        (2, 8200, torch.bfloat16, 0.0, True),
    ],
)
def test_rms_norm_of_a_sum_is_as_accurate_as_eager(interpreter, count, columns, dtype, p, with_sum):
    x, residual = torch.randn(count, columns) * 3 + 1, torch.randn(count, columns)
    values = [x, residual, torch.randn(columns) + 1, p, with_sum]
    assert_as_accurate_as_eager(KernelAddRMSNorm.apply, reference=eager_sum, inputs=values, dtype=dtype)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("factor", [6e4, 1e-3])  # whose squares fp16 can't hold, or eps outweighs
def test_large_and_small_values_are_as_accurate_as_eager(interpreter, factor, dtype):
    x = (torch.rand(10, 256) * 2 - 1) * factor
    inputs = [x, torch.randn(256) + 1]
    assert_as_accurate_as_eager(KernelRMSNorm.apply, reference=eager, inputs=inputs, dtype=dtype)


@interpreted
@generated(
    12,
    count=sizes(70, tile=64),
    columns=sizes(300, tile=256, least=1),
    affine=st.booleans(),
    expanded=st.booleans(),
)
def test_any_case_is_as_accurate_as_eager(values, count, columns, affine, expanded):
    with checked_interpreter(seed=values.seed):
        assert_as_accurate_as_eager(
            KernelRMSNorm.apply,
            reference=eager,
            inputs=[values(count, columns), values.parameter(columns, mean=1.0) if affine else None],
            dtype=values.dtype,
            upstream=(lambda y: values.parameter(1, columns).expand(y.shape)) if expanded else torch.randn_like,
        )


@pytest.mark.offline
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize(("kernel", "most", "streams"), [("forward", 10, 2), ("backward", 14, 3)])
def test_rms_norm_at_256_columns_takes_fewer_instructions_than_layer_norm(target, kernel, most, streams):
    variant = entry(f"rms_norm_{kernel}_c256_bf16").variant
    architecture = int(target.removeprefix("sm_"))
    binary, _, resources = offline.compile_variant(variant, target)
    loop = analyse(binary, architecture, rows.tile_elements(variant) / variant.num_warps)
    assert loop.instructions_per_element <= most
    assert loop.dram_headroom(architecture, bytes_per_element=2 * streams) >= 2.3
    assert resources.spills == 0
