"""Under autocast: what is cast once, or written in 16 bits by what computed it, and gradients in fp32 without a cast or a sum of their own."""

from __future__ import annotations

import gc
import weakref
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from detr_fast import nn, ops, use_backend
from detr_fast.ops import feed_forward_autograd
from detr_fast.ops.dropout import shared_seed
from detr_fast.ops.products import is_batch
from detr_fast.ops.qkv_projection import project
from detr_fast.ops.rounded import rounded
from detr_fast.testing import assert_as_accurate_as_eager, count

pytestmark = pytest.mark.interpreter
WIDTH, HIDDEN = 64, 24
autocast = partial(torch.autocast, "cpu", torch.bfloat16)


@pytest.fixture(autouse=True)
def _kernels():
    with use_backend("triton"):
        yield


def block_inputs():
    shapes = [(2, 5, WIDTH), (HIDDEN, WIDTH), (HIDDEN,), (WIDTH, HIDDEN), (WIDTH,), (WIDTH,), (WIDTH,)]
    return [torch.randn(shape) * (0.1 if len(shape) == 2 else 1) for shape in shapes]


@autocast()
def block(x, w1, b1, w2, b2, weight, bias):
    return ops.feed_forward_add_layer_norm(x, w1, b1, w2, b2, weight, bias)


@autocast()
def eager_block(x, w1, b1, w2, b2, weight, bias):
    return F.layer_norm(x + F.linear(F.relu(F.linear(x, w1, b1)), w2, b2), (WIDTH,), weight, bias)


def projection_inputs(position=(1, 5)):
    shapes = [(2, 5, WIDTH), (3 * WIDTH, WIDTH), (3 * WIDTH,), (*position, WIDTH)]
    return [torch.randn(shape) * (0.1 if i == 1 else 1) for i, shape in enumerate(shapes)]


@autocast()
def projection(x, weight, bias, position):
    y, residual = project(x, weight, bias, position, 2 * WIDTH)
    return y.float(), residual * 3


@autocast()
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
    with autocast():
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


def test_compiled_there_is_no_graph_break_and_gradients_are_equal():
    inputs = [t.requires_grad_() for t in block_inputs()]

    def step(function):
        with autocast(), shared_seed():
            y = function(*inputs)
        return [y, *torch.autograd.grad(y.square().sum(), inputs)]

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(step(compiled), step(block)):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_each_tensor_is_cast_once():
    inputs = [t.requires_grad_() for t in projection_inputs()]
    with autocast():
        counts = count(lambda: project(*inputs, 2 * WIDTH))
    assert counts.launches == {"aten._to_copy.default": 4, "linear_kernel": 1}


def test_a_batch_of_gradients_is_each_ones_gradients():
    x, weight, bias, position = inputs = [t.requires_grad_() for t in projection_inputs()]
    with autocast():
        outputs = project(x, weight, bias, position, 2 * WIDTH)
    upstream = [torch.randn(3, *y.shape).to(y.dtype) for y in outputs]
    found = torch.autograd.grad(outputs, inputs, upstream, is_grads_batched=True, retain_graph=True)
    for i in range(3):
        one = torch.autograd.grad(outputs, inputs, [g[i].clone() for g in upstream], retain_graph=True)
        for ours, theirs in zip(found, one):
            torch.testing.assert_close(ours[i], theirs, rtol=2e-2, atol=2e-2)


def test_a_batch_of_a_blocks_gradients_is_not_added_inside_a_product_which_on_gpus_takes_none(monkeypatch):
    def product(total, a, b):
        assert not is_batch(total, a)
        return total.addmm_(a.float(), b.float())

    monkeypatch.setattr(feed_forward_autograd, "plus_product", product)
    inputs = [t.requires_grad_() for t in block_inputs()]
    y = block(*inputs)
    upstream = torch.randn(2, *y.shape)
    found = torch.autograd.grad(y, inputs, upstream, is_grads_batched=True, retain_graph=True)
    for i in range(2):
        for ours, theirs in zip(found, torch.autograd.grad(y, inputs, upstream[i], retain_graph=True)):
            torch.testing.assert_close(ours[i], theirs, rtol=2e-2, atol=2e-2)


def norm_behind_product(grad=True):
    x, weight, residual = torch.randn(2, 5, 16), torch.randn(WIDTH, 16), torch.randn(2, 5, WIDTH)
    return ops.linear_add_layer_norm(x, weight, None, residual.requires_grad_(grad), torch.ones(WIDTH))


@pytest.mark.parametrize("grad", [True, False])
def test_a_norms_result_is_there_in_16_bits_for_the_next_block(grad):
    def blocks():
        with autocast(), shared_seed():
            y = norm_behind_product(grad)
            assert torch.equal(rounded(y), y.bfloat16())
            assert rounded(y) is rounded(y)
            assert rounded(y).requires_grad == grad
            z = block(y, *block_inputs()[1:])
            assert torch.equal(rounded(z), z.bfloat16())

    counts = count(
        blocks
    )  # of the first product's input and weight, of the block's weights and biases, and `bfloat16()`
    assert counts.launches["aten._to_copy.default"] == 2 + 4 + 2


def test_a_gradient_that_reaches_the_rounded_result_is_the_results():
    with autocast(), shared_seed():
        y = norm_behind_product()
        (found,) = torch.autograd.grad(rounded(y).float().square().sum(), y)
    torch.testing.assert_close(found, 2 * y.bfloat16().float(), rtol=1e-2, atol=1e-2)


def test_a_position_is_cast_once_for_all_layers_of_a_block():
    x, weight, bias, position = [t.requires_grad_() for t in projection_inputs()]

    def layers():
        with autocast(), shared_seed():
            for _ in range(3):
                project(x * 1, weight, bias, position, 2 * WIDTH)

    assert count(layers).launches["aten._to_copy.default"] == 3 * 3 + 1


def test_what_was_changed_is_cast_again_and_nothing_outlives_the_block():
    x = torch.randn(3, 4)
    with autocast():
        assert rounded(x) is not rounded(x)  # in no block
        with shared_seed():
            before = rounded(x)
            x.add_(1)
            assert torch.equal(rounded(x), x.bfloat16())
            assert not torch.equal(before, rounded(x))
            assert rounded(x.requires_grad_()).requires_grad
            assert not rounded(x.detach_()).requires_grad
            with torch.autocast("cpu", torch.float16):
                assert rounded(x).dtype == torch.float16
            leaves = (
                torch.randn(3),
                torch.randn(3, requires_grad=True),
            )  # as parameters and cached positions, which live on
            alive = [weakref.ref(rounded(leaf)) for leaf in leaves]
            assert all(one() is not None for one in alive)
            gc.disable()
    gc.enable()
    assert [one() for one in alive] == [None, None]


@pytest.mark.parametrize("norm_first", [False, True])
def test_stacks_under_autocast_have_the_same_bits_with_and_without_what_layers_leave_each_other(norm_first):
    options = {"d_model": 16, "nhead": 2, "dim_feedforward": 24, "dropout": 0.1, "batch_first": True}
    layers = [nn.TransformerEncoderLayer(**options, norm_first=norm_first) for _ in range(2)]
    x = torch.randn(1, 4, 16, requires_grad=True)

    def step(run):
        torch.manual_seed(3)
        with autocast(), shared_seed():
            y = x
            for layer in layers:
                y = run(layer, y)
        return [y, *torch.autograd.grad(y.square().sum(), [x, *layers[0].parameters()])]

    together = step(lambda layer, y: layer(y))
    for found in (step(lambda layer, y: layer(y)), step(lambda layer, y: layer(y.view_as(y)))):  # by programs; apart
        for one, other in zip(together, found):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    step(lambda layer, y: checkpoint(layer, y, use_reentrant=False))  # keeps what its recomputation keeps
