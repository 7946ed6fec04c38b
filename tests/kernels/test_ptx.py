"""Compiled machine programs, run on the CPU: every example of the catalog gives what the interpreter gives, and ops are
as accurate as eager, with no race and no stray access."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from detr_fast.kernels import rows
from detr_fast.kernels.catalog import CATALOG

from detr_fast import ops, use_backend
from detr_fast.ops.attention_eager import EagerAttention
from detr_fast.testing import assert_as_accurate_as_eager
from detr_fast.testing.ptx import emulated_gpu
from tests.conftest import IDENTICAL_WRITES

pytestmark = pytest.mark.offline


def distinct_examples():
    """By name, what sm_80 runs of the catalog: one entry for each example, most of which launch several entries' programs."""
    found = {}
    for one in CATALOG:
        if one.is_for("sm_80"):
            call = (
                one.example
            )  # a partial; those of 65 programs and more only repeat, under a GPU's many multiprocessors
            found.setdefault((call.func, call.args, tuple(call.keywords.items())), one)
    return {one.name: one for one in found.values()}


EXAMPLES = distinct_examples()
MANY_PROGRAMS = [
    "linear_norm_forward_c256_bf16",
    "feed_forward_c256_relu_bf16",
]  # 65 programs: their "few" run the rest
CHOSEN = [name for name in EXAMPLES if name not in MANY_PROGRAMS]

# Run in another process, in the interpreter, whose results the tests of every kernel compare with fp64.
INTERPRET = """
import sys
import torch
from detr_fast.kernels.catalog import entry
from detr_fast.testing.interpreter import checked_interpreter

for name in sys.argv[2:]:
    torch.manual_seed(0)
    with checked_interpreter(int32_limit=1 << 22):
        torch.save(entry(name).example(torch.device("cpu"))(), f"{sys.argv[1]}/{name}")
"""


@pytest.fixture(scope="session")
def interpreted(tmp_path_factory):
    """Results by name; where tests run in several processes, one makes them for all."""
    root = tmp_path_factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "interpreted"
    try:
        folder.mkdir()
    except FileExistsError:
        while not (folder / "done").exists():
            time.sleep(1)
    else:
        try:
            environment = {**os.environ, "TRITON_INTERPRET": "1"}
            command = [sys.executable, "-c", INTERPRET, str(folder), *CHOSEN]
            subprocess.run(command, check=True, env=environment, cwd=Path(__file__).parents[2])
        finally:
            (folder / "done").touch()
    return lambda name: torch.load(folder / name)


@pytest.mark.parametrize("name", CHOSEN)
def test_the_catalogs_programs_give_what_the_interpreter_gives(interpreted, name):
    torch.manual_seed(0)
    with emulated_gpu(identical_writes=IDENTICAL_WRITES) as gpu:
        found = EXAMPLES[name].example(torch.device("cpu"))()
    assert EXAMPLES[name].variant.name in gpu.counts()
    coarsest = max((torch.finfo(t.dtype).eps for t in found if t.is_floating_point()), default=0.0)
    for index, (ours, expected) in enumerate(zip(found, interpreted(name), strict=True)):
        assert_alike(f"{name}'s output {index}", ours, expected, max(coarsest, 16 * torch.finfo(torch.float32).eps))


def assert_alike(what, ours, expected, share):
    """Alike up to `share` of the largest value: sums are taken in another order, and what was rounded differently is summed."""
    assert ours.dtype == expected.dtype, what
    if not ours.is_floating_point():
        assert torch.equal(ours, expected), what
        return
    finite = torch.isfinite(expected)
    assert torch.equal(torch.isfinite(ours), finite), f"{what}: NaN or inf elsewhere than in the interpreter"
    scale = expected[finite].double().abs().max()
    allowed = share * scale
    wrong = (ours.double() - expected.double())[finite].abs().max()
    assert wrong <= allowed, f"{what} is off by {wrong:.2e}, allowed {allowed:.2e}"


@pytest.fixture
def gpu():
    with emulated_gpu(identical_writes=IDENTICAL_WRITES) as gpu, use_backend("triton"):
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
    assert list(gpu.counts()) == ["layer_norm_forward_kernel", "layer_norm_backward_kernel", "sum_partials_kernel"]


# Several rounds of loads, and several shares of the rows; aligned, and not.
@pytest.mark.parametrize(
    ("shape", "dtype"), [((2100, 24), torch.bfloat16), ((8200, 8), torch.float16), ((1100, 8), torch.float32)]
)
@pytest.mark.parametrize("first", [0, 1])
def test_programs_that_sum_rows_are_as_accurate_as_eager(gpu, shape, dtype, first):
    assert_as_accurate_as_eager(
        lambda x: rows.sum_rows(x[:, first:]),
        reference=lambda x: x[:, first:].sum(0),
        inputs=[torch.randn(shape) + 1.0],
        dtype=dtype,
        grad=False,
    )
    assert list(gpu.counts()) == ["sum_partials_kernel"]


def test_layer_norms_programs_read_rows_that_lie_at_no_multiple_of_16_bytes(gpu):
    x = torch.randn(9, 257, dtype=torch.float16)[:, 1:]
    assert_as_accurate_as_eager(
        lambda x: ops.layer_norm(x, (256,)),
        reference=lambda x: F.layer_norm(x, (256,)),
        inputs=[x],
        dtype=torch.float16,
        upstream=lambda y: torch.randn(1, 256).to(y.dtype).expand(y.shape),
    )


ROWS_OF_ONE = {
    "layer_norm, no weight": lambda x, w, b: ops.layer_norm(x, (1,)),
    "layer_norm": lambda x, w, b: ops.layer_norm(x, (1,), w, b),
    "add_layer_norm": lambda x, w, b: ops.add_layer_norm(x, x.flip(0), w, b),
    "linear_add_layer_norm": lambda x, w, b: ops.linear_add_layer_norm(x, w[None], None, x.flip(0), w, b),
}


@pytest.mark.parametrize("op", ROWS_OF_ONE)
def test_rows_of_one_element_have_no_gradient_where_products_and_sums_are_contracted(gpu, op):
    x, dy = torch.randn(9, 1, requires_grad=True), torch.randn(9, 1)
    weight = torch.tensor([1.7])
    y = ROWS_OF_ONE[op](x, weight, torch.randn(1))
    (dx,) = torch.autograd.grad(y, [x], dy, retain_graph=True)
    assert torch.equal(dx, torch.zeros(9, 1))
    dy[3] = float("inf")
    (dx,) = torch.autograd.grad(y, [x], dy)
    assert dx.isnan().squeeze(1).tolist() == [i == 3 or (i == 5 and "add" in op) for i in range(9)]


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


@pytest.mark.parametrize("padding", ["end", "scattered"])
def test_attentions_programs_are_as_accurate_as_eager(gpu, padding):
    """The same kernels in other forms run in the catalog's examples."""
    padded = torch.arange(70) > 40 if padding == "end" else torch.rand(70) > 0.5
    assert_as_accurate_as_eager(
        lambda q, k, v: ops.attention(q, k, v, key_padding_mask=padded[None]),
        reference=lambda q, k, v: eager_attention(q, k, v, padded),
        inputs=[torch.randn(1, 33, 2, 32), torch.randn(1, 70, 2, 32), torch.randn(1, 70, 2, 32)],
        dtype=torch.bfloat16,
    )
    assert gpu.counts()["attention_forward_kernel"] == 1


def test_attentions_programs_read_masks_again_in_the_next_batch_elements(gpu):
    assert_as_accurate_as_eager(
        lambda q, k, v, mask: ops.attention(q, k, v, attn_mask=mask[None]),
        reference=lambda q, k, v, mask: EagerAttention().run(q, k, v, None, mask.repeat(2, 1, 1, 1), False, 0.0, None),
        inputs=[*(torch.randn(4, n, 1, 16) for n in (5, 6, 6)), torch.randn(2, 1, 5, 6)],
        dtype=torch.float32,
    )
    assert gpu.counts()["attention_backward_mask_kernel"] == 1


def eager_attention(q, k, v, padded):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=~padded[None]).transpose(1, 2)
