from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from detr_fast.kernels.dropout import scale
from torch.utils.checkpoint import checkpoint

from benchmarks.hardware import DEVICE, sized
from detr_fast import ops
from detr_fast.dispatch import BackendError, use_backend
from detr_fast.ops.dropout import keep_mask, next_seed, shared_seed
from detr_fast.testing import assert_as_accurate_as_eager

interpreter = pytest.mark.interpreter


@pytest.fixture
def triton():
    with use_backend(add_layer_norm="triton"):
        yield


def inputs(rows, columns):
    x, residual = torch.randn(rows, columns), torch.randn(rows, columns)
    return [x, residual, torch.randn(columns) + 1, torch.randn(columns)]


def reference(x, residual, weight, bias, mask=None):
    total = residual + (x if mask is None else x * mask)
    return F.layer_norm(total, total.shape[-1:], weight, bias), total


def mask_of_next_call(p, *shape):
    state = torch.get_rng_state()
    seed, offset = next_seed(torch.device("cpu"))
    torch.set_rng_state(state)
    return keep_mask(seed, offset, p, 1, *shape)[0] * scale(p)


@interpreter
@pytest.mark.parametrize("given", ["both", "neither", "bias"])
def test_values_and_gradients_with_and_without_parameters(triton, given):
    x, residual, weight, bias = inputs(7, 48)
    values = [x, residual, weight if given == "both" else None, bias if given != "neither" else None]
    assert_as_accurate_as_eager(
        lambda *v: ops.add_layer_norm(*v, return_sum=True), reference=reference, inputs=values, dtype=torch.float32
    )


@interpreter
def test_dropout_and_its_gradients_follow_the_seed_of_torchs_generator(triton):
    leaves = [t.requires_grad_() for t in inputs(20, 64)]
    mask = mask_of_next_call(0.3, 20, 64)
    y = ops.add_layer_norm(*leaves, dropout_p=0.3)
    expected, _ = reference(*leaves, mask)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    for one, other in zip(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(expected, leaves, dy)):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@interpreter
def test_without_dropout_no_seed_is_drawn(triton):
    values, state = inputs(4, 32), torch.get_rng_state()
    torch.testing.assert_close(ops.add_layer_norm(*values, dropout_p=0.0), reference(*values)[0])
    assert torch.equal(torch.get_rng_state(), state)


@interpreter
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_layer_recomputes_the_same_dropout(triton, reentrant):
    x, residual, weight, bias = (t.requires_grad_() for t in inputs(6, 32))

    def layer(x):
        with shared_seed():
            y = ops.add_layer_norm(x, residual, weight, bias, dropout_p=0.5)
            return ops.add_layer_norm(y, x, weight, bias, dropout_p=0.5)

    torch.manual_seed(5)
    (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
    torch.manual_seed(5)
    checkpointed = checkpoint(layer, x, use_reentrant=reentrant).square().sum()
    x.grad = None
    checkpointed.backward()
    torch.testing.assert_close(x.grad, expected)


@interpreter
@pytest.mark.parametrize("return_sum", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_the_double_backward_is_right(triton, p, return_sum):
    leaves = [t.requires_grad_() for t in inputs(3, 16)]
    mask = mask_of_next_call(p, 3, 16) if p else None
    ours = ops.add_layer_norm(*leaves, dropout_p=p, return_sum=True)
    theirs = reference(*leaves, mask)

    def penalty(y, total):
        loss = y.square().sum() + (total.pow(3).sum() if return_sum else 0.0)
        first = torch.autograd.grad(loss, leaves[:2], create_graph=True)
        return torch.autograd.grad(sum((g * (i + 1)).square().sum() for i, g in enumerate(first)), leaves[:3])

    for one, other in zip(penalty(*ours), penalty(*theirs)):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


@interpreter
@pytest.mark.parametrize("with_sum", [False, True])
def test_opcheck_accepts_both_ops(with_sum):
    x, residual, weight, bias = (t.requires_grad_() for t in inputs(5, 24))
    seed = torch.tensor([9])
    forward = (x, residual, weight, bias, seed, 1, 0.5, 1e-5, with_sum, torch.float32)
    torch.library.opcheck(torch.ops.detr_fast.add_layer_norm.default, forward)
    _, total, mean, rstd = torch.ops.detr_fast.add_layer_norm(*(t.detach() for t in forward[:4]), *forward[4:])
    read = (torch.randn(5, 24), total.requires_grad_(), None) if with_sum else (None, x, residual)
    rest = (weight, bias, mean, rstd, seed, 1, 0.5, 1e-5, torch.float32, torch.float32, True, True)
    torch.library.opcheck(torch.ops.detr_fast.add_layer_norm_backward.default, (torch.randn(5, 24), *read, *rest))


@interpreter
def test_a_compiled_model_has_no_graph_break_and_equal_gradients(triton):
    leaves = [t.requires_grad_() for t in inputs(4, 16)]
    compiled = torch.compile(
        lambda *v: ops.add_layer_norm(*v, dropout_p=0.5, return_sum=True), fullgraph=True, backend="aot_eager"
    )
    mask = mask_of_next_call(0.5, 4, 16)
    for one, other in zip(compiled(*leaves), reference(*leaves, mask)):
        torch.testing.assert_close(one, other)
        ours, theirs = (torch.autograd.grad(t.square().sum(), leaves[:2], retain_graph=True) for t in (one, other))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@interpreter
def test_an_absent_gradient_of_one_output_counts_as_zero(triton):
    leaves = [t.requires_grad_() for t in inputs(4, 16)]
    _, total = ops.add_layer_norm(*leaves, return_sum=True)
    gradients = torch.autograd.grad(total.sum(), leaves, allow_unused=True)
    assert all(torch.equal(g, torch.ones(4, 16)) for g in gradients[:2])


@interpreter
@pytest.mark.parametrize("given", [0, 1, 2])  # x, residual, weight
def test_a_sum_needs_a_gradient_where_what_it_adds_does(triton, given):
    leaves = [t.requires_grad_(place == given) for place, t in enumerate(inputs(4, 16))]
    y, total = ops.add_layer_norm(*leaves, return_sum=True)
    assert (y.requires_grad, total.requires_grad) == (True, given < 2)
    (gradient,) = torch.autograd.grad(y.square().sum(), leaves[given])
    (expected,) = torch.autograd.grad(reference(*leaves)[0].square().sum(), leaves[given])
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


def test_fake_cuda_tensors_trace_forward_without_a_gpu():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), use_backend(add_layer_norm="triton"):
        x, residual = (torch.empty(7, 33, device="cuda", dtype=d) for d in (torch.bfloat16, torch.float32))
        y, total = ops.add_layer_norm(x, residual, dropout_p=0.1, return_sum=True)
    assert (y.shape, y.dtype, total.dtype, y.device.type) == ((7, 33), torch.float32, torch.float32, "cuda")


@pytest.mark.parametrize(
    ("shapes", "p", "message"),
    [
        (((2, 4), (4,), (4,)), 0.0, r"one shape \(\.\.\., C\); got \(2, 4\) and \(4,\)"),
        (((2, 4), (2, 4), (5,)), 0.0, r"weight must be \(C,\) = \(4,\); got \(5,\)"),
        (((2, 4), (2, 4), (4,)), 1.5, r"dropout_p must lie in \[0, 1\]; got 1\.5"),
    ],
)
def test_wrong_arguments_are_told_what_was_expected(shapes, p, message):
    with pytest.raises(ValueError, match=message):
        ops.add_layer_norm(*(torch.zeros(shape) for shape in shapes), dropout_p=p)


def test_what_the_kernel_cannot_take_is_refused_in_words():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), use_backend(add_layer_norm="triton"):
        x, residual = (torch.empty(2, 4, device="cuda", dtype=d) for d in (torch.float16, torch.bfloat16))
        with pytest.raises(BackendError, match="x and residual are float16 and bfloat16: use one dtype"):
            ops.add_layer_norm(x, residual)


def test_on_a_cpu_the_call_is_torchs_own():
    values = inputs(3, 8)
    for one, other in zip(ops.add_layer_norm(*values, return_sum=True), reference(*values)):
        assert torch.equal(one, other)
    torch.manual_seed(1)
    found = ops.add_layer_norm(*values, dropout_p=0.5)
    torch.manual_seed(1)
    assert torch.equal(found, F.layer_norm(values[1] + F.dropout(values[0], 0.5), (8,), *values[2:]))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [1, 100, 256, 8192, 10_000])
def test_on_a_gpu_add_layer_norm_is_as_accurate_as_eager(triton, columns, dtype):
    values = [t.to(DEVICE) for t in inputs(sized(1037, 5), columns)]
    assert_as_accurate_as_eager(
        lambda *v: ops.add_layer_norm(*v, return_sum=True), reference=reference, inputs=values, dtype=dtype
    )


@pytest.mark.gpu
def test_on_a_gpu_the_mask_is_the_twins(triton):
    x, residual = torch.ones(300, 256, device=DEVICE), torch.zeros(300, 256, device=DEVICE)
    torch.manual_seed(2)
    _, total = ops.add_layer_norm(x, residual, dropout_p=0.3, return_sum=True)
    torch.manual_seed(2)
    seed, offset = next_seed(x.device)
    assert torch.equal(total != 0, keep_mask(seed, offset, 0.3, 1, 300, 256)[0])
