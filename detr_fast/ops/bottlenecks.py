"""Consecutive bottlenecks of a ResNet with frozen norms as one node of autograd's: whether that is worth it, and what it is given.

By itself each convolution and each pass between two is a node. At a block's end one of them writes two gradients of the
block's output, where its ReLU let something through: one for the residual sum, and one times the last norm's scale. One node
writes the first alone, as products with scaled weights make the other superfluous: (m * scale) @ w = m @ (scale * w), and
(m * scale)^T @ z = scale * (m^T @ z).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from detr_fast import dispatch
from detr_fast.dispatch import Call, Implementation, Op, Situation
from detr_fast.kernels import launch
from detr_fast.ops.boundary import SEVERAL_DEVICES, on_one_device, wants_grad
from detr_fast.ops.channel_affine import CHANNEL_AFFINE, rehearse_gradients

# As many bytes as a GPU moves while it launches one small kernel: 2.5 µs (with the gap before it) at 4.1 TB/s, on an H200.
LAUNCH = 10 << 20


class Geometry(NamedTuple):
    """Of a convolution, as `torch.nn.functional.conv2d` takes it."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def size(self, height: int, width: int, weight: Tensor) -> tuple[int, int]:
        """Of what comes out."""
        high, wide = (
            (length + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for length, kernel, stride, padding, dilation in zip(
                (height, width), weight.shape[2:], self.stride, self.padding, self.dilation
            )
        )
        return high, wide


class Bottleneck(NamedTuple):
    """y = relu(s3 * conv3(z2) + b3 + residual), z2 = relu(s2 * conv2(z1) + b2), z1 = relu(s1 * conv1(x) + b1).

    weights: of conv1, conv2, conv3 and, where the residual is s4 * conv4(x) and not x, of conv4; conv1 and conv3 are products
    (`is_product`). scales: (C,) for each weight, shifts: b1, b2, b3, which need no gradient, fp32 (fp64 for fp64).
    """

    weights: tuple[Tensor, ...]
    scales: tuple[Tensor, ...]
    shifts: tuple[Tensor, ...]
    geometries: tuple[Geometry, ...]

    def trained(self) -> tuple[bool, ...]:
        return tuple(map(wants_grad, self.weights))


def is_product(conv: nn.Conv2d) -> bool:
    """Whether a convolution without bias is a product of pixels and channels."""
    plain = conv.kernel_size == (1, 1) and conv.stride == (1, 1) and conv.padding == (0, 0) and conv.groups == 1
    return plain and conv.bias is None


def as_bottleneck(
    convs: Sequence[nn.Conv2d], weights: Sequence[Tensor], scales: Sequence[Tensor], shifts: Sequence[Tensor]
) -> Bottleneck | None:
    """Of conv1 to conv3 and, where there is one, conv4; None for other blocks, and where one pads otherwise than with so many zeros."""
    if len(convs) < 3 or not (is_product(convs[0]) and is_product(convs[2])):
        return None
    if any(conv.padding_mode != "zeros" or isinstance(conv.padding, str) or conv.bias is not None for conv in convs):
        return None
    geometries = tuple(Geometry(conv.stride, conv.padding, conv.dilation, conv.groups) for conv in convs)  # type: ignore[arg-type]
    return Bottleneck(tuple(weights), tuple(scales), tuple(shifts), geometries)


class Sizes(NamedTuple):
    """Of one block: elements of its output and of its weights, which of these train, and whether its input does."""

    features: int
    weights: tuple[int, ...]
    trained: tuple[bool, ...]
    below: bool


@dataclass(frozen=True)
class BottlenecksCall(Call):
    """channels: of the middle and of the output of all blocks. passes: what was asked for, of `channel_affine`."""

    blocks: tuple[Sizes, ...]
    channels: frozenset[int]
    one_device: bool
    passes: str | None

    def shapes(self) -> str:
        return f"{len(self.blocks)} blocks of {self.blocks[0].features:,} {str(self.dtype).removeprefix('torch.')}"


def sizes_of(x: Tensor, blocks: Sequence[Bottleneck]) -> tuple[Sizes, ...]:
    found = []
    batch, _, height, width = x.shape
    below = wants_grad(x)
    for block in blocks:
        height, width = block.geometries[1].size(height, width, block.weights[1])
        features, trained = batch * height * width * block.weights[2].shape[0], block.trained()
        found.append(Sizes(features, tuple(w.numel() for w in block.weights), trained, below))
        below = below or any(trained)
    return tuple(found)


def savings(blocks: Sequence[Sizes], itemsize: int) -> int:
    """Bytes that one node moves less than a node for each part, and what its launches cost is taken off."""
    saved = launches = 0
    several = len(blocks) > 1
    if any(
        _reaches_inside(one) for one in blocks
    ):  # weights times scales; of several blocks they, and the scales, are one
        launches += 3 if several else 1
        saved -= sum(one.weights[2] for one in blocks) * itemsize * (4 if several else 2)
    if any(one.trained[2] for one in blocks):  # gradients times scales, from fp32
        launches += 1
        saved -= sum(one.weights[2] for one in blocks if one.trained[2]) * 8
    for one in blocks:
        shortcut = len(one.weights) > 3
        beside = one.below or (shortcut and one.trained[3])
        if beside and (_reaches_inside(one) or one.trained[2]):
            saved += one.features * itemsize
        if shortcut:
            scaled = one.below + one.trained[3]
            launches += scaled
            saved -= scaled * 2 * one.weights[3] * itemsize
    return saved - launches * LAUNCH


def _reaches_inside(one: Sizes) -> bool:
    """Whether a gradient goes through the last convolution."""
    return one.below or any(one.trained[:2])


def _signature(x: Tensor, blocks: Sequence[Bottleneck]) -> tuple[Any, ...]:
    weights = tuple((type(w), w.shape, w.dtype, w.device, w.requires_grad) for block in blocks for w in block.weights)
    geometries = tuple(block.geometries for block in blocks)
    return type(x), x.shape, x.dtype, x.device, x.requires_grad, weights, geometries, CHANNEL_AFFINE.requested


def _describe(x: Tensor, blocks: Sequence[Bottleneck], *, situation: Situation) -> BottlenecksCall:
    tensors = [x, *(t for block in blocks for t in (*block.weights, *block.scales, *block.shifts))]
    return BottlenecksCall(
        device=x.device,
        architecture=dispatch.architecture(x.device),
        dtype=x.dtype,
        tensor_type=dispatch.tensor_type(tensors),
        needs_grad=wants_grad(*tensors),
        situation=situation,
        blocks=sizes_of(x, blocks),
        channels=frozenset(block.weights[n].shape[0] for block in blocks for n in (0, 1, 2)),
        one_device=on_one_device(*tensors),
        passes=CHANNEL_AFFINE.requested,
    )


class OneNode(Implementation):
    """Its passes and products run on what the dispatcher chooses for them."""

    name = "one_node"
    dtypes = frozenset({torch.bfloat16})  # a weight times a scale can leave fp16's range
    plain = True

    def why_not(self, call: BottlenecksCall) -> str | None:
        if not call.needs_grad:
            return "nothing needs a gradient"
        return None if call.one_device else SEVERAL_DEVICES

    def advice(self, call: BottlenecksCall) -> str | None:
        if call.situation.regime == "compiled":
            return "under torch.compile Inductor fuses what lies between products"
        if call.device_type == "cpu":
            return "on a CPU it was never measured"
        if call.passes == "eager":
            return "channel_affine was asked to run on 'eager', and so do its parts one by one"
        if savings(call.blocks, call.dtype.itemsize) <= 0:
            return "scaling its weights takes longer than the bytes that this saves"
        return None

    def prepare(self, call: BottlenecksCall) -> None:
        on_kernels = call.passes != "eager" if call.device_type == "cuda" else call.passes == "triton"
        if on_kernels and launch.triton is not None:
            launch.compile_launches(lambda: rehearse_gradients(call.channels, call.dtype), call.device)

    def compiled_key(self, call: BottlenecksCall) -> Any:
        return call.device, call.channels, call.dtype

    def run(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("nodes are made by ops.bottlenecks_autograd")


class EachPart(Implementation):
    """A node for each convolution and each pass, each as the dispatcher chooses for it."""

    name = "eager"

    def run(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("parts are run by whoever asked")


BOTTLENECKS = Op("bottlenecks", signature=_signature, describe=_describe, implementations=(OneNode(), EachPart()))
