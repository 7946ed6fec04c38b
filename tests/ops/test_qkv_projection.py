from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.hardware import DEVICE, sized
from detr_fast import ops, use_backend
from detr_fast.dispatch import BackendError
from detr_fast.ops.qkv_projection import QKV_PROJECTION, project
from detr_fast.testing import assert_as_accurate_as_eager, count

interpreter = pytest.mark.interpreter
WIDTH = 64  # two thirds of 3 * 64 columns are whole tiles


@pytest.fixture
def triton():
    with use_backend(qkv_projection="triton"):
        yield


def eager(x, weight, bias=None, position=None):
    if position is None:
        return F.linear(x, weight, bias)
    n = weight.shape[0] * 2 // 3
    biases = (None, None) if bias is None else bias.tensor_split([n])
    return torch.cat([F.linear(t, w, b) for t, w, b in zip((x + position, x), weight.tensor_split([n]), biases)], -1)


def tensors(rows=(2, 5), position=(1, 5), grad=False):
    shapes = [(*rows, WIDTH), (3 * WIDTH, WIDTH), (3 * WIDTH,), (*position, WIDTH)]
    return [(torch.randn(s) * scale).requires_grad_(grad) for s, scale in zip(shapes, (1, 0.1, 1, 1))]


# The position of one sequence, of each row, of all rows.
@interpreter
@pytest.mark.parametrize(
    ("rows", "position", "dtype"),
    [
        ((2, 5), (1, 5), torch.float32),
        ((2, 5), (5,), torch.bfloat16),
        ((2, 17), (2, 17), torch.float16),
        ((1,), (1,), torch.float32),
        ((0, 5), (5,), torch.float32),
    ],
)
def test_it_is_as_accurate_as_eager(triton, rows, position, dtype):
    inputs = tensors(rows, position)
    assert_as_accurate_as_eager(ops.qkv_projection, reference=eager, inputs=inputs, dtype=dtype)


@interpreter
def test_position_and_bias_may_be_absent(triton):
    inputs = tensors()[:2]
    assert_as_accurate_as_eager(ops.qkv_projection, reference=eager, inputs=inputs, dtype=torch.float32)


@interpreter
@pytest.mark.parametrize("backend", ["triton", "eager"])
@pytest.mark.parametrize("columns", [0, 2 * WIDTH, 3 * WIDTH])
def test_a_residual_that_passes_the_projection_brings_its_gradient_back_in(backend, columns):
    x, weight, bias, position = inputs = tensors(grad=True)
    with use_backend(qkv_projection=backend):
        found = project(x, weight, bias, position if columns else None, columns)
    if backend == "eager" and columns == 2 * WIDTH:
        assert found is None
        return
    y, residual = found
    left = F.linear(x + position if columns else x, weight[:columns], bias[:columns])
    expected = torch.cat([left, F.linear(x, weight[columns:], bias[columns:])], -1)
    torch.testing.assert_close(y, expected)
    assert torch.equal(residual, x)
    dy, dx = torch.randn_like(y), torch.randn_like(x)
    options = {"allow_unused": True, "retain_graph": True}
    right = torch.autograd.grad([expected, x.view_as(x)], inputs, [dy, dx.clone()], **options)
    again = torch.autograd.grad([y, residual], inputs, [dy, dx.clone()], create_graph=True, **options)
    once = torch.autograd.grad([y, residual], inputs, [dy, dx], **options)
    for ours, under_create_graph, theirs in zip(once, again, right):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(under_create_graph, theirs, rtol=1e-4, atol=1e-4)


# One position for each image; sequence first, one for each place of the sequence.
def test_a_position_that_repeats_inside_rows_gets_the_sum_over_them():
    x, weight, bias, position = inputs = tensors((2, 5), (2, 1), grad=True)
    y, residual = project(x, weight, bias, position, weight.shape[0])
    expected = F.linear(x + position, weight, bias)
    dy, dx = torch.randn_like(y), torch.randn_like(x)
    found = torch.autograd.grad([y, residual], inputs, [dy, dx.clone()])
    for ours, theirs in zip(found, torch.autograd.grad([expected, x.view_as(x)], inputs, [dy, dx])):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@interpreter
def test_the_double_backward_is_right(triton):
    inputs = tensors(grad=True)

    def penalty(function):
        gradients = torch.autograd.grad(function(*inputs).square().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in gradients), inputs)

    for ours, theirs in zip(penalty(ops.qkv_projection), penalty(eager)):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-2)


@interpreter
def test_opcheck_accepts_the_op():
    inputs = [torch.randn(s, requires_grad=True) for s in ((2, 2, 8), (16, 8), (16,), (2, 8))]
    torch.library.opcheck(torch.ops.detr_fast.qkv_projection.default, (*inputs, 16))


@interpreter
def test_a_compiled_model_has_no_graph_break_and_equal_gradients(triton):
    inputs = tensors(grad=True)
    compiled = torch.compile(lambda *a: ops.qkv_projection(*a) * 2, fullgraph=True, backend="aot_eager")
    y, expected = compiled(*inputs), eager(*inputs) * 2
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    for ours, theirs in zip(torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected, inputs, dy)):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_x_and_position_are_never_added_up_in_memory(triton):
    x, weight, bias, position = (t.detach().to("meta") for t in tensors((2, 500), (1, 500)))
    counts = count(lambda: ops.qkv_projection(x, weight, bias, position))
    assert counts.launches == {"linear_kernel": 1}


@interpreter
@pytest.mark.parametrize("shape", [(3, 0), (0, 3, 0), (0, 3, 4)])
def test_a_sum_over_rows_of_nothing_has_gradients(shape):
    x = torch.randn(shape, requires_grad=True)
    with torch.enable_grad():
        total = torch.ops.detr_fast.sum_rows(x)
    assert torch.equal(total, torch.zeros(shape[-1]))
    assert torch.autograd.grad(total.sum(), x)[0].shape == shape


@interpreter
def test_opcheck_accepts_the_sum_over_rows():
    torch.library.opcheck(torch.ops.detr_fast.sum_rows.default, (torch.randn(2, 3, 8, requires_grad=True),))


def test_a_bias_takes_one_launch_of_the_backward(triton):
    x, weight, bias = (t.detach().to("meta").requires_grad_() for t in tensors((2, 500))[:3])
    forward = count(lambda: ops.qkv_projection(x, weight, bias))
    both = count(lambda: torch.autograd.backward(ops.qkv_projection(x, weight, bias), x.new_empty(2, 500, 3 * WIDTH)))
    assert both.launches - forward.launches == {"sum_partials_kernel": 1, "aten.mm.default": 2}


def test_fake_cuda_tensors_trace_forward_without_a_gpu(triton):
    with FakeTensorMode():
        y = ops.qkv_projection(*[t.cuda() for t in tensors()])
        assert (y.shape, y.device.type) == ((2, 5, 3 * WIDTH), "cuda")


def test_auto_stays_eager_until_measured():
    with FakeTensorMode():
        x, weight, bias, position = (t.cuda() for t in tensors())
        assert QKV_PROJECTION.choose(x, weight, bias, position, 2 * WIDTH).name == "eager"


@pytest.mark.parametrize(
    ("change", "columns", "reason"),
    [
        (
            {3: (2, 1, WIDTH)},
            None,
            r"position has shape \(2, 1, 64\): its rows do not repeat along those of \(2, 5, 64\)",
        ),
        ({1: (192, 63)}, None, r"weight has shape \(192, 63\); expected \(192, 64\)"),
        ({}, 100, "a position in 100 of 192 columns: it takes a multiple of 128"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(triton, change, columns, reason):
    with FakeTensorMode():
        inputs = [torch.randn(change.get(i, t.shape), device="cuda") for i, t in enumerate(tensors())]
        with pytest.raises(BackendError, match=reason):
            ops.qkv_projection(*inputs, columns)


def test_more_position_columns_than_columns_are_refused():
    with pytest.raises(ValueError, match="got position_columns 193; expected 0 to the 192 rows of the weight"):
        ops.qkv_projection(*tensors(), 193)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu_it_is_as_accurate_as_eager(triton, dtype):
    rows = sized(333, 20)
    inputs = [t.to(DEVICE) for t in tensors((2, rows), (1, rows))]
    assert_as_accurate_as_eager(ops.qkv_projection, reference=eager, inputs=inputs, dtype=dtype)
