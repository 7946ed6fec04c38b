"""LayerNorm, alone and behind a residual sum, beside its peers.

python -m pytest benchmarks/test_layer_norm.py          # needs a GPU
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from benchmarks import libraries
from benchmarks.hardware import DEVICE, NEEDS_GPU, sized
from benchmarks.timing import Claim, compare, compiled
from detr_fast import ops, use_backend

pytestmark = NEEDS_GPU

# From 16 MB of input on, memory's speed counts; before, a batch's queries and tokens.
SHAPES = sized(
    [(32_768, 256), (524_288, 256), (32_768, 1024), (6_800, 256), (800, 256)],
    [(20, 256), (9, 1024)],
)
LARGE = sized(16_000_000, 0)


def eager(x, weight, bias):
    return F.layer_norm(x, x.shape[-1:], weight, bias)


def eager_sum(x, weight, bias, residual):
    return eager(residual + x, weight, bias)


def layer_norm(x, weight, bias):
    return ops.layer_norm(x, x.shape[-1:], weight, bias)


def add_layer_norm(x, weight, bias, residual):
    return ops.add_layer_norm(x, residual, weight, bias)


def named(function, **backends):
    def run(*tensors, **options):
        with use_backend(**backends):
            return function(*tensors, **options)

    return run


@pytest.mark.parametrize(
    ("backward", "shape"), [*((True, shape) for shape in SHAPES), *((False, shape) for shape in SHAPES[:3])], ids=str
)
@pytest.mark.parametrize("op", ["layer_norm", "add_layer_norm"])
def test_row_wise_norms(op, backward, shape):
    original, ours = (eager, layer_norm) if op == "layer_norm" else (eager_sum, add_layer_norm)
    count = 2 if op == "layer_norm" else 3
    x, dy, *residual = (torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for _ in range(count))
    weight, bias = (torch.randn(shape[-1], device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    leaves = [t.requires_grad_(backward) for t in (x, weight, bias, *residual)]
    exact = [t.detach().double().requires_grad_(backward) for t in leaves]

    def step(function, leaves=leaves):
        def run():
            y = function(*leaves)
            return (y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))) if backward else (y,)

        return run

    # x and the residual in, y out, and their sum for backward; there, the saved input and y's gradient in, x's out.
    passes = (2 if op == "layer_norm" else 3) + backward * (3 if op == "layer_norm" else 4)
    moves = passes * x.numel() * x.element_size()
    source, target = (torch.empty(moves // 2, dtype=torch.int8, device=DEVICE) for _ in range(2))
    peers = {
        "auto": step(ours),
        "triton": step(named(ours, **{op: "triton"})),
        "eager": step(original),
        "torch.compile": step(compiled(original)),
        "copy": lambda: [target.copy_(source)],  # as many bytes, and nothing else
    }
    peers |= {name: step(function) for name, function in libraries.ROW_NORMS[op].items()}
    claims = []
    if x.numel() * x.element_size() >= LARGE:
        claims.append(Claim("norms: copy bandwidth from 16 MB up", ("copy",), 0.85, "triton", ("gpu",)))
    if backward:
        claims.append(Claim("norms: over eager, forward and backward", ("eager",), 1.5))
    compare(
        f"{op} {shape} bf16, {'forward and backward' if backward else 'forward'}",
        peers,
        eager=step(original),
        truth=step(original, exact),
        checks={"copy": step(original)},
        claims=claims,
        moves=moves,
    )


@pytest.mark.parametrize("shape", sized([(6_800, 256), (6_800, 250)], [(20, 250)]), ids=str)  # 250: read one by one
def test_norm_of_a_dropped_out_sum(shape):
    x, dy, residual = (torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for _ in range(3))
    weight, bias = (torch.randn(shape[-1], device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    leaves = [t.requires_grad_() for t in (x, residual, weight, bias)]
    exact = [t.detach().double().requires_grad_() for t in leaves]

    def original(x, residual, weight, bias, p=0.1):
        return eager(residual + F.dropout(x, p), weight, bias)

    def ours(x, residual, weight, bias, p=0.1):
        return ops.add_layer_norm(x, residual, weight, bias, dropout_p=p)

    def step(function, leaves=leaves, **options):
        def run():
            y = function(*leaves, **options)
            return (y, *torch.autograd.grad(y, leaves, dy.to(y.dtype)))

        return run

    functions = {"auto": ours, "triton": named(ours, add_layer_norm="triton"), "eager": original}
    functions["torch.compile"] = compiled(original)
    compare(
        f"add_layer_norm with dropout {shape} bf16, forward and backward",
        {name: step(function) for name, function in functions.items()},
        eager=step(original, p=0.0),
        truth=step(original, exact, p=0.0),
        checks={name: step(function, p=0.0) for name, function in functions.items()},
        claims=[Claim("norms: over eager, forward and backward", ("eager",), 1.5)],
    )
