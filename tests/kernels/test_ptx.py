"""Every op's compiled machine program, run on the CPU: as accurate as eager, with no race and no stray access."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from detr_fast import ops, use_backend
from detr_fast.testing import assert_as_accurate_as_eager
from detr_fast.testing.ptx import emulated_gpu

pytestmark = pytest.mark.offline


@pytest.fixture(autouse=True)
def gpu():
    with emulated_gpu() as gpu, use_backend("triton"):
        yield gpu


@pytest.mark.parametrize(
    ("rows", "columns", "dtype"), [(37, 256, torch.bfloat16), (5, 100, torch.float32), (2, 1000, torch.float16)]
)
def test_layer_norms_programs_are_as_accurate_as_eager(gpu, rows, columns, dtype):
    assert_as_accurate_as_eager(
        lambda x, w, b: ops.layer_norm(x, (columns,), w, b),
        reference=lambda x, w, b: F.layer_norm(x, (columns,), w, b),
        inputs=[torch.randn(rows, columns) * 50 + 1000, torch.randn(columns) + 1, torch.randn(columns)],
        dtype=dtype,
    )
    assert [kernel for kernel, _ in gpu.launches] == [
        "layer_norm_forward_kernel",
        "layer_norm_backward_kernel",
        "sum_partials_kernel",
    ]


def test_layer_norms_programs_read_rows_that_lie_at_no_multiple_of_16_bytes():
    x = torch.randn(9, 257, dtype=torch.float16)[:, 1:]
    assert_as_accurate_as_eager(
        lambda x: ops.layer_norm(x, (256,)),
        reference=lambda x: F.layer_norm(x, (256,)),
        inputs=[x],
        dtype=torch.float16,
        upstream=lambda y: torch.randn(1, 256).to(y.dtype).expand(y.shape),
    )
