"""Positions of pixels by sines and cosines, beside PyTorch's operations and torch.compile.

python -m pytest benchmarks/test_sine_positions.py          # needs a GPU
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.hardware import DEVICE, NEEDS_GPU, sized
from benchmarks.timing import Claim, compare, compiled
from detr_fast import ops, use_backend

pytestmark = NEEDS_GPU

# Images, rows and columns of their features: DETR's, and Deformable DETR's finest level.
SHAPES = sized([(4, 25, 34), (4, 100, 134)], [(2, 3, 5)])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sine_positions(shape):
    mask = torch.zeros(shape, dtype=torch.bool, device=DEVICE)
    mask[1:, :, shape[2] - shape[2] // 4 :] = True

    def step(backend=None, dtype=torch.bfloat16, run=ops.sine_positions):
        def call():
            with use_backend(**({"sine_positions": backend} if backend else {})):
                return [run(mask, 128, dtype=dtype)]

        return call

    compare(
        f"sine positions {shape} bf16",
        {
            "auto": step(),
            "triton": step("triton"),
            "eager": step("eager"),
            "torch.compile": step("eager", run=compiled(ops.sine_positions)),
        },
        eager=step("eager"),
        truth=step("eager", torch.float64),
        claims=[Claim("positions of pixels: over eager", ("eager",), 1.5)],
    )
