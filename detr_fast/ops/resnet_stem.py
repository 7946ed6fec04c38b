"""A ResNet's first convolution, its norm, ReLU and max pooling: the contract, its eager reference, its Triton kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from detr_fast import dispatch
from detr_fast.dispatch import Call, Implementation, Op, Situation, TritonImplementation
from detr_fast.kernels import stem as kernels
from detr_fast.ops.boundary import SEVERAL_DEVICES, define, on_one_device, wants_grad
from detr_fast.ops.channel_affine import channel_affine, channels_last


def resnet_stem(images: Tensor, weight: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """max pooling (3×3, stride 2, padding 1) of relu(conv(images) * scale + shift); conv: 7×7, stride 2, padding 3, no bias.

    Shapes: images (B, 3, H, W), weight (N, 3, 7, 7), scale and shift (N,). The images are converted to the weight's dtype.
    Returns (B, N, ceil(H/4), ceil(W/4)) in the weight's dtype, channels last.
    Raises ValueError where the shapes do not fit; BackendError as `use_backend` says.
    Source: He et al., 2015, arXiv:1512.03385, table 1.
    """
    fits = images.ndim == 4 and images.shape[1] == 3 and weight.ndim == 4 and weight.shape[1:] == (3, 7, 7)
    if not fits or any(t.shape != weight.shape[:1] for t in (scale, shift)):
        raise ValueError(
            f"got images {tuple(images.shape)}, weight {tuple(weight.shape)}, scale {tuple(scale.shape)} and shift "
            f"{tuple(shift.shape)}; expected (B, 3, H, W), (N, 3, 7, 7), (N,) and (N,)"
        )
    if not (dispatch.intervening or images.is_cuda):
        return _eager(images, weight, scale, shift)
    return RESNET_STEM(images, weight, scale, shift)


@dataclass(frozen=True)
class ResNetStemCall(Call):
    images: torch.Size
    image_dtype: torch.dtype
    channels: int
    one_device: bool

    def shapes(self) -> str:
        return f"{tuple(self.images)} {str(self.dtype).removeprefix('torch.')}"


def _signature(*tensors: Tensor) -> tuple[Any, ...]:
    images, weight, *_ = tensors
    return images.shape, weight.shape, *((type(t), t.dtype, t.device, t.requires_grad) for t in tensors)


def _describe(images: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, *, situation: Situation) -> ResNetStemCall:
    return ResNetStemCall(
        device=images.device,
        architecture=dispatch.architecture(images.device),
        dtype=weight.dtype,
        tensor_type=dispatch.tensor_type((images, weight, scale, shift)),
        needs_grad=wants_grad(images, weight, scale, shift),
        situation=situation,
        images=images.shape,
        image_dtype=images.dtype,
        channels=weight.shape[0],
        one_device=on_one_device(images, weight, scale, shift),
    )


class TritonResNetStem(TritonImplementation):
    """PyTorch's convolution between two kernels of ours."""

    def why_not(self, call: ResNetStemCall) -> str | None:
        if not call.one_device:
            return SEVERAL_DEVICES
        if call.needs_grad:
            return "the stem or its images need a gradient: only eager gives one"
        if call.image_dtype not in (torch.float16, torch.bfloat16, torch.float32):
            return f"images of {call.image_dtype}: it takes bfloat16, float16 and float32"
        if not kernels.may_pool(call.channels):
            return f"{call.channels} channels: it takes a power of two from 16 to 1,024"
        if call.images[1:].numel() >= kernels.MAX_IMAGE or call.images[-1] * call.channels >= kernels.MAX_IMAGE:
            return f"images of {tuple(call.images[1:])}: too large for offsets of 32 bits"
        if call.images[0] > kernels.MAX_GRID or call.images[2] > kernels.MAX_HEIGHT:
            limits = f"{kernels.MAX_GRID:,} images of {kernels.MAX_HEIGHT:,} rows"
            return f"{call.images[0]:,} images of {call.images[2]:,} rows: it takes up to {limits}"
        return None

    def advice(self, call: ResNetStemCall) -> str | None:
        if call.situation.regime == "compiled":
            return "under torch.compile its parts stay what Inductor can see"
        return None  # measured: 4 images of 800×1066 take an H200 0.24 ms, where eager's parts took 1.2

    def compiled_key(self, call: ResNetStemCall) -> Any:
        return call.device, call.channels, call.image_dtype, call.dtype

    def prepare(self, call: ResNetStemCall) -> None:
        kernels.compile_stem(call.channels, call.image_dtype, call.dtype, call.device)

    def run(self, images: Tensor, weight: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        blocks = _pixel_blocks(images, weight.dtype)
        inner = kernels.block_weights(weight).contiguous(memory_format=torch.channels_last)
        return _affine_pool(F.conv2d(blocks, inner), scale.float(), shift.float())


class EagerResNetStem(Implementation):
    name = "eager"

    def run(self, images: Tensor, weight: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return _eager(images, weight, scale, shift)


RESNET_STEM = Op(
    "resnet_stem",
    signature=_signature,
    describe=_describe,
    implementations=(TritonResNetStem(), EagerResNetStem()),
)


def _eager(images: Tensor, weight: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    x = F.conv2d(channels_last(images, weight.dtype), weight, stride=2, padding=3)
    return F.max_pool2d(channel_affine(x, scale, shift), 3, stride=2, padding=1)


# ---------------------------------------------------------------------------------------------------------------------
# Registration. Nothing here has a gradient: it is run where none is needed.


def _run_blocks(images: Tensor, dtype: torch.dtype) -> Tensor:
    return kernels.pixel_blocks(images, dtype).permute(0, 3, 1, 2)


def _fake_blocks(images: Tensor, dtype: torch.dtype) -> Tensor:
    batch, _, height, width = images.shape
    return images.new_empty((batch, (height + 1) // 2 + 3, (width + 1) // 2 + 3, 16), dtype=dtype).permute(0, 3, 1, 2)


def _run_pool(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return kernels.affine_pool(x.permute(0, 2, 3, 1), scale, shift).permute(0, 3, 1, 2)


def _fake_pool(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    return x.new_empty((batch, (height + 1) // 2, (width + 1) // 2, channels)).permute(0, 3, 1, 2)


def _autograd_blocks(images: Tensor, dtype: torch.dtype) -> Any:
    return _pixel_blocks.below(images, dtype)


def _autograd_pool(x: Tensor, scale: Tensor, shift: Tensor) -> Any:
    return _affine_pool.below(x, scale, shift)


_pixel_blocks = define(
    "pixel_blocks(Tensor images, ScalarType dtype) -> Tensor",
    run=_run_blocks,
    fake=_fake_blocks,
    autograd=_autograd_blocks,
)
_affine_pool = define(
    "affine_pool(Tensor x, Tensor scale, Tensor shift) -> Tensor",
    run=_run_pool,
    fake=_fake_pool,
    autograd=_autograd_pool,
)
