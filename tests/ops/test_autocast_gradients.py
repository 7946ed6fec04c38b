"""Under autocast: what a layer's input is cast to, and its gradient in fp32, without a cast or a sum of its own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from detr_fast import ops, use_backend
from detr_fast.ops.qkv_projection import project
from detr_fast.testing import assert_as_accurate_as_eager, count

pytestmark = pytest.mark.interpreter
WIDTH, HIDDEN = 64, 24
autocast = torch.autocast("cpu", torch.bfloat16)


@pytest.fixture(autouse=True)
def _kernels():
    with use_backend("triton"):
        yield


def block_inputs():
    shapes = [(2, 5, WIDTH), (HIDDEN, WIDTH), (HIDDEN,), (WIDTH, HIDDEN), (WIDTH,), (WIDTH,), (WIDTH,)]
    return [torch.randn(shape) * (0.1 if len(shape) == 2 else 1) for shape in shapes]


@autocast
def block(x, w1, b1, w2, b2, weight, bias):
    return ops.feed_forward_add_layer_norm(x, w1, b1, w2, b2, weight, bias)


@autocast
def eager_block(x, w1, b1, w2, b2, weight, bias):
    return F.layer_norm(x + F.linear(F.relu(F.linear(x, w1, b1)), w2, b2), (WIDTH,), weight, bias)


def projection_inputs(position=(1, 5)):
    shapes = [(2, 5, WIDTH), (3 * WIDTH, WIDTH), (3 * WIDTH,), (*position, WIDTH)]
    return [torch.randn(shape) * (0.1 if i == 1 else 1) for i, shape in enumerate(shapes)]


@autocast
def projection(x, weight, bias, position):
    y, residual = project(x, weight, bias, position, 2 * WIDTH)
    return y.float(), residual * 3


@autocast
def eager_projection(x, weight, bias, position):
    halves = zip((x + position, x), weight.split([2 * WIDTH, WIDTH]), bias.split([2 * WIDTH, WIDTH]))
    return torch.cat([F.linear(*one) for one in halves], -1).to(x.dtype), x * 3


CASES = [(block, eager_block, block_inputs), (projection, eager_projection, projection_inputs)]


@pytest.mark.parametrize(("ours", "eager", "inputs"), CASES)
def test_gradients_are_as_accurate_as_eagers(ours, eager, inputs):
    assert_as_accurate_as_eager(ours, reference=eager, inputs=inputs(), dtype=torch.float32)


@pytest.mark.parametrize(("ours", "eager", "inputs"), CASES)
def test_double_backward_is_as_accurate_as_eagers(ours, eager, inputs):
    def twice(function):
        def gradients(*inputs):
            inputs = [t if t.requires_grad else t.clone().requires_grad_() for t in inputs]
            with torch.enable_grad():
                y = function(*inputs)
                y = y[0] + y[1].mean() if isinstance(y, tuple) else y
                return torch.autograd.grad(y.square().sum(), inputs, create_graph=True)

        return gradients

    assert_as_accurate_as_eager(twice(ours), reference=twice(eager), inputs=inputs(), dtype=torch.float32)


@pytest.mark.parametrize("contiguous", [True, False])
def test_what_arrives_for_x_and_a_products_gradient_are_added_in_fp32(contiguous):
    x, weight, bias, position = inputs = [t.requires_grad_() for t in projection_inputs()]
    with autocast:
        y, residual = project(x, weight, bias, position, 2 * WIDTH)
    dy, arrived = torch.randn_like(y), torch.randn_like(x)
    arrived = arrived if contiguous else arrived.transpose(0, 1).contiguous().transpose(0, 1)
    products = dy.float() @ weight.detach().bfloat16().float()
    expected = products + arrived
    dx, dposition = torch.autograd.grad([y, residual], [x, position], [dy, arrived.clone()], retain_graph=True)
    torch.testing.assert_close(dx, expected, rtol=1e-5, atol=1e-5)
    assert dposition.bfloat16().ne(dposition).any()  # not rounded
    (alone,) = torch.autograd.grad(y, x, dy)
    torch.testing.assert_close(alone, products, rtol=1e-5, atol=1e-5)
    assert all(t.grad is None for t in inputs)


def test_each_tensor_is_cast_once():
    inputs = [t.requires_grad_() for t in projection_inputs()]
    with autocast:
        counts = count(lambda: project(*inputs, 2 * WIDTH))
    assert counts.launches == {"aten._to_copy.default": 4, "linear_kernel": 1}


def test_a_batch_of_gradients_is_each_ones_gradients():
    x, weight, bias, position = inputs = [t.requires_grad_() for t in projection_inputs()]
    with autocast:
        outputs = project(x, weight, bias, position, 2 * WIDTH)
    upstream = [torch.randn(3, *y.shape).to(y.dtype) for y in outputs]
    found = torch.autograd.grad(outputs, inputs, upstream, is_grads_batched=True, retain_graph=True)
    for i in range(3):
        one = torch.autograd.grad(outputs, inputs, [g[i].clone() for g in upstream], retain_graph=True)
        for ours, theirs in zip(found, one):
            torch.testing.assert_close(ours[i], theirs, rtol=2e-2, atol=2e-2)
