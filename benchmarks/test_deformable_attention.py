"""Multi-scale deformable attention, forward and backward, beside what models do with PyTorch's grid_sample.

python -m pytest benchmarks/test_deformable_attention.py          # needs a GPU
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.hardware import DEVICE, NEEDS_GPU, sized
from benchmarks.timing import Claim, compare, compiled
from detr_fast import ops, use_backend

pytestmark = NEEDS_GPU

# An image of 800 x 1066 at strides of 8 to 64: Deformable DETR's encoder, whose queries are all pixels, and its decoder.
LEVELS = sized([(100, 134), (50, 67), (25, 34), (13, 17)], [(3, 4), (2, 2), (1, 2), (1, 1)])
PIXELS = sum(height * width for height, width in LEVELS)
HEADS, CHANNELS, POINTS = sized((8, 32, 4), (1, 8, 2))


def sampling(backend: str, op: Callable[..., Tensor] = ops.deformable_attention) -> Callable[..., Tensor]:
    def run(value: Tensor, *rest: Tensor) -> Tensor:
        with use_backend(deformable_attention=backend):
            return op(value, LEVELS, *rest)

    return run


@pytest.mark.parametrize(("images", "queries"), sized([(1, PIXELS), (4, PIXELS), (4, 300)], [(2, 3)]))
def test_deformable_attention(images: int, queries: int) -> None:
    torch.manual_seed(0)
    bf16, shape = torch.bfloat16, (images, queries, HEADS, len(LEVELS), POINTS)
    value = torch.randn(images, PIXELS, HEADS, CHANNELS, device=DEVICE).to(bf16).requires_grad_()
    weights = torch.rand(shape, device=DEVICE).flatten(3).softmax(-1).view(shape).to(bf16).requires_grad_()
    # As offsets begin: a few pixels around a query's own place.
    place = torch.rand(images, queries, 1, 1, 1, 2, device=DEVICE)
    locations = (place + 0.03 * torch.randn(*shape, 2, device=DEVICE)).requires_grad_()
    leaves = (value, locations, weights)
    dout = torch.randn(images, queries, HEADS, CHANNELS, device=DEVICE)

    def step(function: Callable[..., Tensor], leaves: Sequence[Tensor] = leaves) -> Callable[[], Sequence[Tensor]]:
        def run() -> Sequence[Tensor]:
            out = function(*leaves)
            return [out, *torch.autograd.grad(out, leaves, dout.to(out.dtype))]

        return run

    functions = {name: sampling(name) for name in ("eager", "auto", "triton")}
    functions["torch.compile"] = compiled(sampling("eager"))
    exact = [t.detach().double().requires_grad_() for t in leaves]
    compare(
        f"deformable attention, {images} x {queries} queries of {PIXELS} pixels, {HEADS} heads of {CHANNELS}, bf16, forward and backward",
        {name: step(function) for name, function in functions.items()},
        eager=step(sampling("eager")),
        truth=step(sampling("eager"), exact),
        claims=[Claim("Deformable attention: at least twice grid_sample's speed", ("eager",), 2.0)],
    )


@pytest.mark.parametrize(("images", "queries"), sized([(4, PIXELS), (4, 300)], [(2, 3)]))
def test_deformable_attention_from_offsets(images: int, queries: int) -> None:
    """With what models compute before it, which the kernel has in its launch, and beside it, where the kernel only samples."""
    torch.manual_seed(0)
    bf16, shape = torch.bfloat16, (images, queries, HEADS, len(LEVELS), POINTS)
    value = torch.randn(images, PIXELS, HEADS, CHANNELS, device=DEVICE).to(bf16).requires_grad_()
    offsets = torch.randn(*shape, 2, device=DEVICE).to(bf16).requires_grad_()
    logits = torch.randn(shape, device=DEVICE).to(bf16).requires_grad_()
    points = torch.rand(images, queries, 1, 2, device=DEVICE)
    leaves = (value, offsets, logits)
    dout = torch.randn(images, queries, HEADS, CHANNELS, device=DEVICE)
    size = torch.tensor([level[::-1] for level in LEVELS], device=DEVICE)[:, None]

    def apart(value: Tensor, shapes: Any, points: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
        weights = logits.flatten(3).softmax(-1).view_as(logits)
        return ops.deformable_attention(value, shapes, points[:, :, None, :, None] + offsets / size, weights)

    def step(function: Callable[..., Tensor], leaves: Sequence[Tensor] = leaves) -> Callable[[], Sequence[Tensor]]:
        def run() -> Sequence[Tensor]:
            out = function(leaves[0], points.to(torch.promote_types(leaves[0].dtype, points.dtype)), *leaves[1:])
            return [out, *torch.autograd.grad(out, leaves, dout.to(out.dtype))]

        return run

    whole = ops.deformable_attention_from_offsets
    functions = {name: sampling(name, whole) for name in ("eager", "auto", "triton")}
    functions["triton, sampling alone"] = sampling("triton", apart)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    compare(
        f"deformable attention from offsets, {images} x {queries} queries of {PIXELS} pixels, {HEADS} heads of {CHANNELS}, bf16, forward and backward",
        {name: step(function) for name, function in functions.items()},
        eager=step(sampling("eager", whole)),
        truth=step(sampling("eager", whole), exact),
        claims=[
            Claim(
                "Deformable attention from offsets: at least the speed of its sampling alone",
                ("triton, sampling alone",),
                1.0,
            )
        ],
    )
