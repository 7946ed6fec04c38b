"""LayerNorm and RMSNorm, alone and behind a residual sum, beside their peers.

python -m pytest benchmarks/test_layer_norm.py          # needs a GPU
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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


def eager_rms(x, weight):
    return F.rms_norm(x, x.shape[-1:], weight, 1e-5)


def eager_rms_sum(x, weight, residual):
    return eager_rms(residual + x, weight)


def layer_norm(x, weight, bias):
    return ops.layer_norm(x, x.shape[-1:], weight, bias)


def add_layer_norm(x, weight, bias, residual):
    return ops.add_layer_norm(x, residual, weight, bias)


def rms_norm(x, weight):
    return ops.rms_norm(x, x.shape[-1:], weight, 1e-5)


def add_rms_norm(x, weight, residual):
    return ops.add_rms_norm(x, residual, weight, 1e-5)


# PyTorch's, ours, and how many parameters they take.
NORMS: dict[str, tuple[Callable[..., Any], Callable[..., Any], int]] = {
    "layer_norm": (eager, layer_norm, 2),
    "add_layer_norm": (eager_sum, add_layer_norm, 2),
    "rms_norm": (eager_rms, rms_norm, 1),
    "add_rms_norm": (eager_rms_sum, add_rms_norm, 1),
}
CASES = [
    (op, backward, shape) for op in NORMS for backward in (True, False) for shape in SHAPES[: 5 if backward else 3]
]
FEW = (SHAPES[0], *SHAPES[2:4])  # of RMSNorm, which runs on LayerNorm's kernels


def named(function, **backends):
    def run(*tensors, **options):
        with use_backend(**backends):
            return function(*tensors, **options)

    return run


@pytest.mark.parametrize(
    ("op", "backward", "shape"), [case for case in CASES if "rms" not in case[0] or case[2] in FEW], ids=str
)
def test_row_wise_norms(op, backward, shape):
    original, ours, parameters = NORMS[op]
    added = op.startswith("add")
    x, dy, *residual = (torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for _ in range(2 + added))
    given = (torch.randn(shape[-1], device=DEVICE, dtype=torch.bfloat16) for _ in range(parameters))
    leaves = [t.requires_grad_(backward) for t in (x, *given, *residual)]
    exact = [t.detach().double().requires_grad_(backward) for t in leaves]

    def step(function, leaves=leaves):
        def run():
            y = function(*leaves)
            return (y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))) if backward else (y,)

        return run

    # x and the residual in, y out, and their sum for backward; there, the saved input and y's gradient in, x's out.
    passes = (2 + added) + backward * (3 + added)
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
