from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.hardware import DEVICE, sized
from detr_fast import ops, use_backend
from detr_fast.dispatch import BackendError
from detr_fast.ops.linear_add_layer_norm import LINEAR_ADD_LAYER_NORM
from detr_fast.testing import assert_as_accurate_as_eager, count

interpreter = pytest.mark.interpreter


@pytest.fixture
def triton():
    with use_backend(linear_add_layer_norm="triton"):
        yield


def eager(x, w, b, residual, norm_weight, norm_bias):
    return F.layer_norm(residual + F.linear(x, w, b), norm_weight.shape, norm_weight, norm_bias)


def eager_with_sum(x, w, b, residual, norm_weight, norm_bias):
    total = residual + F.linear(x, w, b)
    return F.layer_norm(total, norm_weight.shape, norm_weight, norm_bias), total


def with_sum(*inputs):
    return ops.linear_add_layer_norm(*inputs, return_sum=True)


def joined(function):
    """Both results of `function` as one: each has a gradient of its own."""
    return lambda *inputs: torch.cat(function(*inputs), -1)


def tensors(rows=(2, 5), width=16, columns=24, grad=False, dtype=torch.float32):
    shapes = [(*rows, width), (columns, width), (columns,), (*rows, columns), (columns,), (columns,)]
    return [torch.randn(s, dtype=dtype).requires_grad_(grad) for s in shapes]


@interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [(0,), (1,), (2, 17)])
def test_it_is_as_accurate_as_eager(triton, rows, dtype):
    assert_as_accurate_as_eager(ops.linear_add_layer_norm, reference=eager, inputs=tensors(rows), dtype=dtype)


@interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [(0,), (1,), (2, 17)])
def test_with_the_sum_it_is_as_accurate_as_eager(triton, rows, dtype):
    inputs = tensors(rows)
    assert_as_accurate_as_eager(joined(with_sum), reference=joined(eager_with_sum), inputs=inputs, dtype=dtype)


@interpreter
@pytest.mark.parametrize("used", [0, 1], ids=["norm", "sum"])
def test_either_result_may_be_all_that_is_used(triton, used):
    inputs = tensors(grad=True)
    ours, theirs = (
        torch.autograd.grad(f(*inputs)[used].square().sum(), inputs, allow_unused=True)
        for f in (with_sum, eager_with_sum)
    )
    for one, other in zip(ours, theirs):
        torch.testing.assert_close(one, torch.zeros_like(one) if other is None else other, rtol=1e-3, atol=1e-3)


@interpreter
@pytest.mark.parametrize("given", [0, 2, 3, 4])  # x, bias, residual, the norm's weight
def test_a_sum_needs_a_gradient_where_what_it_adds_does(triton, given):
    inputs = [t.requires_grad_(place == given) for place, t in enumerate(tensors())]
    y, total = with_sum(*inputs)
    assert (y.requires_grad, total.requires_grad) == (True, given < 4)
    (gradient,) = torch.autograd.grad(y.square().sum(), inputs[given])
    (expected,) = torch.autograd.grad(eager_with_sum(*inputs)[0].square().sum(), inputs[given])
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-3)


@interpreter
def test_norm_and_gradients_stay_finite_where_the_sum_overflows_fp16(triton):
    x, w, b, residual, norm_weight, norm_bias = (t.half() for t in tensors((6,)))
    residual, b = residual + 60_000, b.clone()
    b[::2] += 20_000  # half of the sums are over 65,504
    inputs = [t.requires_grad_() for t in (x, w, b, residual, norm_weight, norm_bias)]
    y, total = with_sum(*inputs)
    assert not total.isfinite().all()
    truth = [t.detach().double().requires_grad_() for t in inputs]
    expected, _ = eager_with_sum(*truth)
    torch.testing.assert_close(y.double(), expected, rtol=2e-3, atol=2e-3)
    dy = torch.randn_like(y)
    for one, other in zip(torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected, truth, dy.double())):
        torch.testing.assert_close(one.double(), other, rtol=1e-2, atol=1e-2 * other.abs().max().item())


@interpreter
def test_the_double_backward_with_the_sum_drops_the_same_elements(triton):
    inputs = tensors(grad=True)
    results = ops.linear_add_layer_norm(*inputs, 1e-5, 0.5, True)
    dy = [torch.randn_like(t) for t in results]
    once = torch.autograd.grad(results, inputs, dy, retain_graph=True)
    again = torch.autograd.grad(results, inputs, dy, create_graph=True)  # recomputed eagerly
    for kernel, eagerly in zip(once, again):
        torch.testing.assert_close(kernel, eagerly, rtol=1e-3, atol=1e-3)


@interpreter
def test_the_double_backward_is_right_with_the_same_elements_dropped(triton):
    inputs = tensors(grad=True, dtype=torch.float32)

    def penalty(function):
        torch.manual_seed(3)
        y = function(*inputs)
        gradients = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in gradients), inputs)

    for ours, theirs in (
        (ops.linear_add_layer_norm, eager),
        (joined(with_sum), joined(eager_with_sum)),
    ):
        for one, other in zip(penalty(ours), penalty(theirs)):  # through the sum, of which nothing is kept
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * other.abs().max().item())
    dropping = [penalty(lambda *a: ops.linear_add_layer_norm(*a, 1e-5, 0.5)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*dropping))
    torch.manual_seed(3)
    y = ops.linear_add_layer_norm(*inputs, 1e-5, 0.5)
    once = torch.autograd.grad(y.square().sum(), inputs, retain_graph=True)
    again = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)  # recomputed eagerly
    for kernel, eagerly in zip(once, again):
        torch.testing.assert_close(kernel, eagerly, rtol=1e-3, atol=1e-3)


@interpreter
def test_opcheck_accepts_the_ops():
    seed = torch.tensor([3])
    for drawn in (None, seed):
        settings = (
            drawn,
            1,
            0.25 if drawn is not None else 0.0,
            1e-5,
            torch.float32,
            drawn is None,
            True,
            drawn is None,
        )
        torch.library.opcheck(torch.ops.detr_fast.linear_add_layer_norm.default, (*tensors(grad=True), *settings))
        dy, xhat = torch.randn(2, 5, 24), torch.randn(2, 5, 24)
        dsum = torch.randn(2, 5, 24) if drawn is None else None
        backward = (dy, dsum, xhat, torch.rand(10), torch.randn(24), drawn, 1, 0.25, torch.float32, torch.float32)
        torch.library.opcheck(torch.ops.detr_fast.residual_norm_backward.default, backward)


@interpreter
def test_a_compiled_model_has_no_graph_break_and_equal_gradients(triton):
    inputs = tensors(grad=True)
    compiled = torch.compile(lambda *a: sum(with_sum(*a)) * 2, fullgraph=True, backend="aot_eager")
    y, expected = compiled(*inputs), sum(eager_with_sum(*inputs)) * 2
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    for ours, theirs in zip(torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected, inputs, dy)):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@interpreter
def test_dropout_repeats_with_the_generator_and_keeps_the_mean(triton):
    x, w, b, residual, norm_weight, _ = tensors((64,))
    zeros = torch.zeros_like(residual)

    def draw(p):
        torch.manual_seed(1)
        return ops.linear_add_layer_norm(x, w, b, zeros, norm_weight, None, 1e-5, p)

    assert torch.equal(draw(0.5), draw(0.5))
    assert not torch.equal(draw(0.5), draw(0.0))
    assert torch.equal(draw(1.0), torch.zeros_like(zeros))


@interpreter
def test_without_gradients_nothing_is_recorded(triton):
    inputs = tensors(grad=True)
    with torch.no_grad():
        assert ops.linear_add_layer_norm(*inputs).grad_fn is None
    with torch.inference_mode():
        assert ops.linear_add_layer_norm(*inputs).shape == (2, 5, 24)


def test_fake_cuda_tensors_trace_forward_without_a_gpu(triton):
    with FakeTensorMode():
        inputs = [t.cuda() for t in tensors((3, 7), 2048, 256)]
        for y in ops.linear_add_layer_norm(*inputs, 1e-5, 0.1, True):
            assert (y.shape, y.dtype, y.device.type) == ((3, 7, 256), torch.float32, "cuda")


@pytest.mark.parametrize("return_sum", [False, True], ids=["norm", "and sum"])
def test_one_launch_forward_and_four_backward(return_sum):
    inputs = [t.detach().to("meta").requires_grad_() for t in tensors((1000,), 2048, 256)]

    def results():
        found = ops.linear_add_layer_norm(*inputs, 1e-5, 0.1, return_sum)
        return found if return_sum else (found,)

    with use_backend(linear_add_layer_norm="triton"):
        forward = count(results)
        dy = [torch.empty(1000, 256, device="meta")] * (1 + return_sum)
        both = count(lambda: torch.autograd.backward(results(), dy))
    assert forward.launches == {"linear_norm_kernel": 1, "aten.randint.low": 1}
    x, weight, _, _, norm_weight, _ = inputs
    kept = [x, weight, norm_weight, torch.empty(1000, 256 + 1)]  # xhat and rstd; neither the residual nor the sum
    assert forward.saved_bytes == sum(t.nbytes for t in kept) + 8  # and the seed
    backward = both.launches - forward.launches
    assert backward == {"add_layer_norm_backward_kernel": 1, "sum_partials_kernel": 1, "aten.mm.default": 2}


def test_auto_stays_eager_until_measured():
    with FakeTensorMode():
        inputs = [t.cuda() for t in tensors((100_000,), 256, 256)]
        assert LINEAR_ADD_LAYER_NORM.choose(*inputs, 1e-5, 0.0, False).name == "eager"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({3: (2, 4, 24)}, r"residual has shape \(2, 4, 24\); expected \(2, 5, 24\)"),
        ({1: (24, 15)}, r"weight has shape \(24, 15\); expected \(24, 16\)"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(triton, change, reason):
    with FakeTensorMode():
        inputs = [torch.randn(change.get(i, t.shape), device="cuda") for i, t in enumerate(tensors())]
        with pytest.raises(BackendError, match=reason):
            ops.linear_add_layer_norm(*inputs)


@pytest.mark.parametrize("columns", [0, 512])
def test_rows_that_no_tile_holds_are_refused(triton, columns):
    with FakeTensorMode(), pytest.raises(BackendError, match=f"{columns} columns: whole rows of 1 to 256 fit a tile"):
        ops.linear_add_layer_norm(*[t.cuda() for t in tensors((4,), 16, columns)])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "columns"), [(777, 256), (6001, 200)])
def test_on_a_gpu_it_is_as_accurate_as_eager(triton, rows, columns, dtype):
    inputs = [t.to(DEVICE) for t in tensors((sized(rows, 20),), sized(1024, 64), columns)]
    assert_as_accurate_as_eager(joined(with_sum), reference=joined(eager_with_sum), inputs=inputs, dtype=dtype)
