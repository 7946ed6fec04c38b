"""Parameters may lie in memory in any way, as PyTorch's may: strided, expanded from one element."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from detr_fast import ops, use_backend

pytestmark = pytest.mark.interpreter
ROWS, WIDTH, HIDDEN = 3, 32, 128
LINE, ROW = (WIDTH,), (ROWS, WIDTH)

CALLS: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "layer_norm": (lambda x, w, b: ops.layer_norm(x, LINE, w, b), [ROW, LINE, LINE]),
    "layer_norm, wide": (lambda x, w, b: ops.layer_norm(x, (8200,), w, b), [(2, 8200), (8200,), (8200,)]),
    "add_layer_norm": (ops.add_layer_norm, [ROW, ROW, LINE, LINE]),
    "rms_norm": (lambda x, w: ops.rms_norm(x, LINE, w), [ROW, LINE]),
    "add_rms_norm": (ops.add_rms_norm, [ROW, ROW, LINE]),
    "linear_add_layer_norm": (ops.linear_add_layer_norm, [ROW, (WIDTH, WIDTH), LINE, ROW, LINE, LINE]),
    "feed_forward": (ops.feed_forward, [ROW, (HIDDEN, WIDTH), (HIDDEN,), (WIDTH, HIDDEN), LINE]),
    "feed_forward_add_layer_norm": (
        ops.feed_forward_add_layer_norm,
        [ROW, (HIDDEN, WIDTH), (HIDDEN,), (WIDTH, HIDDEN), LINE, LINE, LINE],
    ),
    "qkv_projection": (partial(ops.qkv_projection, position_columns=0), [ROW, (3 * WIDTH, WIDTH), (3 * WIDTH,)]),
}


def strided(tensor: Tensor) -> Tensor:
    return torch.stack([tensor, torch.full_like(tensor, torch.nan)], -1)[..., 0]


@pytest.mark.parametrize(
    ("name", "backend"),
    [(name, "triton") for name in CALLS]
    + [(name, other) for name in CALLS if "feed" in name for other in ("triton_recompute", "triton_one_kernel")],
)
def test_parameters_of_any_stride_give_what_contiguous_ones_do(name, backend):
    function, shapes = CALLS[name]
    given = [torch.randn(shape) / shape[-1] ** 0.5 for shape in shapes]
    with use_backend("triton", **({"feed_forward": backend} if "feed" in name else {})):
        results = []
        for layout in (torch.clone, strided):
            inputs = [layout(t).requires_grad_() for t in given]
            y = function(*inputs)
            results.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    for contiguous, other in zip(*results):
        torch.testing.assert_close(other, contiguous, rtol=1e-5, atol=1e-5)


def test_a_weight_expanded_from_one_element_is_read_as_often_as_it_stands_for():
    x, one = torch.randn(ROW), torch.tensor([2.0])
    with use_backend("triton"):
        assert torch.equal(ops.layer_norm(x, LINE, one.expand(WIDTH)), ops.layer_norm(x, LINE, torch.full(LINE, 2.0)))


def test_no_rows_under_autocast_have_gradients_too():
    x, residual = torch.randn(0, WIDTH, requires_grad=True), torch.randn(0, WIDTH, requires_grad=True)
    w, b, scale = torch.randn(WIDTH, WIDTH), torch.randn(WIDTH), torch.randn(WIDTH)
    w1, b1, w2 = torch.randn(HIDDEN, WIDTH), torch.randn(HIDDEN), torch.randn(WIDTH, HIDDEN)
    with use_backend("triton"), torch.autocast("cpu", torch.bfloat16):
        y = ops.linear_add_layer_norm(x, w, b, residual, scale)
        z = ops.feed_forward_add_layer_norm(x, w1, b1, w2, b, scale, scale)
    for gradient in torch.autograd.grad(y.sum() + z.sum(), [x, residual], allow_unused=True):
        assert gradient is None or gradient.shape == (0, WIDTH)


def test_a_gradient_of_a_gradient_needs_nothing_of_the_block_to_be_trained():
    x, w1, b1, w2 = torch.randn(ROW), torch.randn(HIDDEN, WIDTH), torch.randn(HIDDEN), torch.randn(WIDTH, HIDDEN)
    scale = torch.randn(WIDTH, requires_grad=True)
    found = []
    for backend in ("triton", "eager"):
        with use_backend(feed_forward=backend):
            y = ops.feed_forward_add_layer_norm(x, w1, b1, w2, None, scale, None)
        (first,) = torch.autograd.grad(y.square().sum(), scale, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), scale)[0])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
