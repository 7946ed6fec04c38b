"""DETR's heads in fp32, boxes by a perceptron of three layers and 92 classes, beside PyTorch's products.

python -m pytest benchmarks/test_prediction_heads.py          # needs a GPU
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.hardware import DEVICE, NEEDS_GPU, sized
from benchmarks.timing import Claim, compare, compiled
from detr_fast import ops, use_backend

pytestmark = NEEDS_GPU

Heads = Callable[..., tuple[Tensor, ...]]
WIDTH = sized(256, 32)
# Queries of six decoder layers: one image, four, sixteen; and Deformable DETR's 300 of four.
ROWS = sized([600, 2400, 9600, 7200], [3, 5])


def heads(x: Tensor, *layers: Tensor) -> tuple[Tensor, ...]:
    boxes, classes = ops.prediction_heads(x, layers[:3], layers[3:6], *layers[6:], sigmoid=True)
    assert classes is not None
    return boxes, classes


def original(x: Tensor, *layers: Tensor) -> tuple[Tensor, ...]:
    h = x
    for weight, bias in zip(layers[:2], layers[3:5]):
        h = F.linear(h, weight, bias).relu()
    return F.linear(h, layers[2], layers[5]).sigmoid(), F.linear(x, *layers[6:])


def on(backend: str) -> Heads:
    return use_backend(prediction_heads=backend)(heads)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("backward", [True, False], ids=["forward and backward", "forward"])
def test_prediction_heads(rows: int, backward: bool) -> None:
    shapes = (WIDTH, WIDTH), (WIDTH, WIDTH), (4, WIDTH), (WIDTH,), (WIDTH,), (4,), (92, WIDTH), (92,)
    given = [WIDTH**-0.5 * torch.randn(shape, device=DEVICE) for shape in shapes]
    given.insert(0, torch.randn(rows, WIDTH, device=DEVICE))
    upstream = [torch.randn(rows, n, device=DEVICE) for n in (4, 92)]

    def step(function: Heads, dtype: torch.dtype = torch.float32) -> Callable[[], Sequence[Tensor]]:
        leaves = [t.to(dtype).clone().requires_grad_(backward) for t in given]
        arriving = [t.to(dtype) for t in upstream]

        def run() -> Sequence[Tensor]:
            results = function(*leaves)
            return (*results, *torch.autograd.grad(results, leaves, arriving)) if backward else results

        return run

    compare(
        f"prediction heads ({rows}, {WIDTH}) fp32, {'forward and backward' if backward else 'forward'}",
        {
            "auto": step(heads),
            "triton": step(on("triton")),
            "eager": step(original),
            "torch.compile": step(compiled(original)),
        },
        eager=step(original),
        truth=step(original, torch.float64),
        claims=[Claim("heads: over PyTorch's products", ("eager",), 1.5, "triton", ("graph",))],
    )
