"""Every op's compiled machine program, run on the CPU: as accurate as eager, with no race and no stray access."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from detr_fast import ops, use_backend
from detr_fast.ops.attention_eager import EagerAttention
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


@pytest.mark.parametrize(
    ("dtype", "queries", "keys", "dim"), [(torch.float16, 70, 100, 32), (torch.float32, 33, 40, 16)]
)
def test_what_two_programs_add_up_by_atomics_is_as_accurate_as_eager(gpu, dtype, queries, keys, dim):
    padding = torch.rand(1, keys) > 0.6
    with use_backend(attention="triton_atomics"):
        assert_as_accurate_as_eager(
            lambda q, k, v: ops.attention(q, k, v, key_padding_mask=padding),
            reference=lambda q, k, v: EagerAttention().run(q, k, v, padding, None, False, 0.0, None),
            inputs=[torch.randn(1, n, 1, dim) for n in (queries, keys, keys)],
            dtype=dtype,
        )
    assert ("attention_backward_keys_kernel", (2, 1, 1)) in [
        (kernel, (*grid, 1, 1)[:3]) for kernel, grid in gpu.launches
    ]
