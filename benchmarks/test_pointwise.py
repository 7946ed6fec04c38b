"""A frozen ResNet's 1×1 convolutions with scale, shift, residual and ReLU in the product: beside a convolution and one pass.

python -m pytest benchmarks/test_pointwise.py          # needs a GPU
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
from detr_fast.ops.pointwise_cases import STAGES, Size, inputs

pytestmark = NEEDS_GPU

IMAGES = sized(4, 1)
Function = Callable[..., Tensor]


def size_of(stage: int, residual: bool) -> Size:
    pixels, inside = sized(STAGES[stage], ((2, 3), 8))
    return Size(IMAGES, pixels, *((inside, 4 * inside) if residual else (4 * inside, inside)), residual)


def moved(size: Size) -> int:
    """What must be read and written: x, the residual, the result, and the weight."""
    features = size.images * size.pixels[0] * size.pixels[1] * (size.width + (1 + size.residual) * size.channels)
    return 2 * (features + size.width * size.channels)


def asked(backend: str, scale: Tensor, shift: Tensor) -> Function:
    def run(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Tensor:
        with use_backend(pointwise_affine=backend):
            return ops.pointwise_affine(x, weight, scale, shift, residual)

    return run


def written_out(scale: Tensor, shift: Tensor) -> Function:
    """As a model has it, for Inductor to fuse."""

    def run(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Tensor:
        y = torch.addcmul(shift[:, None, None], F.conv2d(x, weight), scale[:, None, None])
        return (y if residual is None else y + residual).relu().to(x.dtype)

    return run


def by_cudnn(scale: Tensor, shift: Tensor) -> Function:
    """cuDNN's own fusion, for inference, of weights that were scaled before."""
    known: dict[int, tuple[Tensor, Tensor]] = {}

    def run(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Tensor:
        if id(weight) not in known:
            known[id(weight)] = (weight * scale[:, None, None, None]).to(weight.dtype), shift.to(weight.dtype)
        scaled, bias = known[id(weight)]
        if residual is None:
            return torch.cudnn_convolution_relu(x, scaled, bias, (1, 1), (0, 0), (1, 1), 1)
        return torch.cudnn_convolution_add_relu(x, scaled, residual, 1.0, bias, (1, 1), (0, 0), (1, 1), 1)

    return run


@pytest.mark.parametrize("stage", sized([1, 2, 3, 4], [1]))
@pytest.mark.parametrize("residual", [True, False])
def test_inference(stage: int, residual: bool) -> None:
    torch.manual_seed(0)
    size = size_of(stage, residual)
    leaves, scale, shift = inputs(DEVICE, size)

    def step(function: Function, given: Sequence[Tensor] = leaves) -> Callable[[], list[Tensor]]:
        @torch.no_grad()
        def run() -> list[Tensor]:
            return [function(*given)]

        return run

    functions = {name: asked(name, scale, shift) for name in ("auto", "triton", "eager")}
    functions["cuDNN, fused"] = by_cudnn(scale, shift)
    functions["torch.compile"] = compiled(written_out(scale, shift))
    over = ("eager", "cuDNN, fused", "torch.compile")
    compare(
        f"1x1 convolution and its end, {size}{' and a residual' * residual}, bf16, inference",
        {name: step(function) for name, function in functions.items()},
        eager=step(asked("eager", scale, shift)),
        truth=step(asked("eager", scale, shift), [t.detach().double() for t in leaves]),
        claims=[Claim("Products of pixels with their end: over a convolution and a pass", over, 1.0, "triton")],
        moves=moved(size),
    )


@pytest.mark.parametrize("stage", sized([1, 3, 4], [1]))
@pytest.mark.parametrize("residual", [True, False])
def test_training(stage: int, residual: bool) -> None:
    torch.manual_seed(0)
    size = size_of(stage, residual)
    leaves, scale, shift = inputs(DEVICE, size)
    dy = torch.randn(size.images, size.channels, *size.pixels, device=DEVICE).to(
        torch.bfloat16, memory_format=torch.channels_last
    )

    def step(function: Function, given: Sequence[Tensor] = leaves) -> Callable[[], list[Tensor]]:
        def run() -> list[Tensor]:
            y = function(*given)
            return [y, *torch.autograd.grad(y, given, dy.to(y.dtype))]

        return run

    functions = {name: asked(name, scale, shift) for name in ("auto", "triton", "eager")}
    functions["torch.compile"] = compiled(written_out(scale, shift))
    exact = [t.detach().double().requires_grad_() for t in leaves]
    compare(
        f"1x1 convolution and its end, {size}{' and a residual' * residual}, bf16, forward and backward",
        {name: step(function) for name, function in functions.items()},
        eager=step(asked("eager", scale, shift)),
        truth=step(asked("eager", scale, shift), exact),
        claims=[
            Claim(
                "Products of pixels with their end, trained: over a convolution and a pass", ("eager",), 1.0, "triton"
            )
        ],
    )
