"""Post-norm layers and their feed-forward block, forward and backward, beside their peers. A wrong result is never timed.

python -m pytest benchmarks/test_layers.py          # needs a GPU
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn as torch_nn

from benchmarks.hardware import DEVICE, NEEDS_GPU, check, sized
from detr_fast import nn, ops, use_backend

pytestmark = NEEDS_GPU

WIDTH, HEADS, HIDDEN = sized((256, 8, 2048), (32, 2, 48))
ROWS = sized([800, 6800, 27200], [20])  # 8 images' queries; their tokens at stride 32; at stride 16
SHAPES = sized([(8, 100), (8, 850)], [(2, 6)])
FUSED = {"attention": "triton", "linear_add_layer_norm": "triton", "feed_forward": "triton"}
BACKENDS = {"eager": {}, "torch.compile": {}, "auto": {}, "triton": FUSED}
BY_NAME = {name: FUSED | {"feed_forward": name} for name in ("triton_recompute", "triton_one_kernel")}


def eager_block(x, w1, b1, w2, b2, norm_weight, norm_bias):
    y = torch_nn.functional.linear(torch_nn.functional.linear(x, w1, b1).relu(), w2, b2)
    return torch_nn.functional.layer_norm(x + y, (WIDTH,), norm_weight, norm_bias)


def run_checked(benchmark, peer, step, eager, truth):
    """Check one step's results, then time it."""
    check(peer, step(), eager(), truth())

    def synchronised():
        step()
        torch.cuda.synchronize()

    benchmark.pedantic(synchronised, rounds=30, iterations=4, warmup_rounds=5)


@pytest.mark.parametrize("peer", [*BACKENDS, *BY_NAME])
@pytest.mark.parametrize("rows", ROWS)
def test_feed_forward_block(benchmark, rows, peer):
    benchmark.group = f"feed-forward block ({rows}, {WIDTH}) hidden {HIDDEN} bf16, forward and backward"
    shapes = [(rows, WIDTH), (HIDDEN, WIDTH), (HIDDEN,), (WIDTH, HIDDEN), *[(WIDTH,)] * 3]
    tensors = [torch.randn(s, device=DEVICE, dtype=torch.bfloat16) * s[-1] ** -0.5 for s in shapes]
    tensors = [t.requires_grad_() for t in tensors]
    dy = torch.randn(rows, WIDTH, device=DEVICE, dtype=torch.bfloat16)
    block: Any = ops.feed_forward_add_layer_norm
    if peer in ("eager", "torch.compile"):
        block = torch.compile(eager_block) if peer == "torch.compile" else eager_block
    backend = {**BACKENDS, **BY_NAME}[peer]

    def step(function=block, tensors=tensors):
        y = function(*tensors)
        return y, *torch.autograd.grad(y, tensors, dy.to(y.dtype))

    exact = [t.detach().double().requires_grad_() for t in tensors]

    with use_backend(**backend):
        run_checked(benchmark, peer, step, lambda: step(eager_block), lambda: step(eager_block, exact))


@pytest.mark.parametrize("peer", [*BACKENDS, *BY_NAME])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_encoder_layer(benchmark, shape, peer):
    benchmark.group = f"encoder layer {shape} d {WIDTH} hidden {HIDDEN} bf16, forward and backward"
    settings: dict[str, Any] = {
        "d_model": WIDTH,
        "nhead": HEADS,
        "dim_feedforward": HIDDEN,
        "batch_first": True,
        "device": DEVICE,
        "dtype": torch.bfloat16,
        "dropout": 0.0,
    }
    original = torch_nn.TransformerEncoderLayer(**settings)
    layer: torch_nn.Module = original
    if peer == "torch.compile":
        layer = torch.compile(original)  # type: ignore[assignment]
    elif peer != "eager":
        layer = nn.TransformerEncoderLayer(**settings)
        layer.load_state_dict(original.state_dict())
    x = torch.randn(*shape, WIDTH, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn_like(x)
    backend = {**BACKENDS, **BY_NAME}[peer]

    def step(module=layer, x=x):
        y = module(x)
        return y, *torch.autograd.grad(y, (x, *module.parameters()), dy.to(y.dtype))

    exact, exact_x = copy.deepcopy(original).double(), x.detach().double().requires_grad_()

    with use_backend(**backend):
        run_checked(benchmark, peer, step, lambda: step(original), lambda: step(exact, exact_x))


C = sized(256, 64)  # two thirds of 3 * 64 columns are whole tiles
PARTS: dict[str, tuple[Any, Any, list[tuple[int, ...]]]] = {  # ours, eager, shapes behind those of x (rows, C)
    "add_layer_norm": (
        ops.add_layer_norm,
        lambda x, residual, w, b: F.layer_norm(residual + x, (C,), w, b),
        [(-1, C), (C,), (C,)],
    ),
    "linear_add_layer_norm": (
        ops.linear_add_layer_norm,
        lambda x, w1, b1, residual, w, b: F.layer_norm(residual + F.linear(x, w1, b1), (C,), w, b),
        [(C, C), (C,), (-1, C), (C,), (C,)],
    ),
    "qkv_projection": (
        ops.qkv_projection,
        lambda x, w, b, position: torch.cat(
            [F.linear(x + position, w[: 2 * C], b[: 2 * C]), F.linear(x, w[2 * C :], b[2 * C :])], -1
        ),
        [(3 * C, C), (3 * C,), (-1, C)],
    ),
}


@pytest.mark.parametrize("peer", ["eager", "torch.compile", "auto", "triton"])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", PARTS)
def test_part_of_a_layer(benchmark, name, rows, peer):
    benchmark.group = f"{name} ({rows}, {C}) bf16, forward and backward"
    ours, original, shapes = PARTS[name]
    tensors = [
        (torch.randn(rows if n < 0 else n, *rest, device=DEVICE) / (rest[-1] if n > 0 and rest else 1) ** 0.5)
        .to(torch.bfloat16)
        .requires_grad_()
        for n, *rest in ((rows, C), *shapes)
    ]
    function = {"eager": original, "torch.compile": torch.compile(original)}.get(peer, ours)
    dy = torch.randn_like(original(*tensors))

    def step(function=function, tensors=tensors):
        y = function(*tensors)
        return y, *torch.autograd.grad(y, tensors, dy.to(y.dtype))

    exact = [t.detach().double().requires_grad_() for t in tensors]
    with use_backend(**({name: "triton"} if peer == "triton" else {})):
        run_checked(benchmark, peer, step, lambda: step(original), lambda: step(original, exact))
