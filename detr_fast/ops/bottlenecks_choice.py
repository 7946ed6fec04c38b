"""Consecutive bottlenecks of a ResNet with frozen norms as one node of autograd's, and whether that is worth it.

By itself each convolution and each pass between two is a node. At a block's end one of them writes two gradients of the
block's output, where its ReLU let something through: one for the residual sum, and one times the last norm's scale. One node
writes the first alone, as products with scaled weights make the other superfluous: (m * scale) @ w = m @ (scale * w), and
(m * scale)^T @ z = scale * (m^T @ z). With products on our kernels (`pointwise_affine`'s, and `pointwise_gradient`), these take in the
mask and the scale of what comes next: at a block's end nothing is left to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from detr_fast import dispatch
from detr_fast.dispatch import Call, Implementation, Op, Situation, TritonImplementation
from detr_fast.kernels import launch
from detr_fast.kernels.configs import POINTWISE_LONG
from detr_fast.kernels.rows import MAX_BLOCK
from detr_fast.ops import pointwise_gradient, regimes
from detr_fast.ops.bottlenecks import LAUNCH, Bottleneck
from detr_fast.ops.boundary import SEVERAL_DEVICES, on_one_device, wants_grad
from detr_fast.ops.channel_affine import CHANNEL_AFFINE, rehearse_gradients
from detr_fast.ops.pointwise_affine import POINTWISE_AFFINE

MEASURED_MIDDLE = 512  # channels inside a block, of what `detr-fast tune` measures of kernels


class Sizes(NamedTuple):
    """Of one block.

    rows: pixels that come out; channels: of its input, middle and output; weights: their elements, of which `trained` says
    which train; below: whether the input does.
    """

    rows: int
    channels: tuple[int, int, int]
    weights: tuple[int, ...]
    trained: tuple[bool, ...]
    below: bool

    @property
    def reaches_inside(self) -> bool:
        """Whether a gradient goes through the last convolution."""
        return self.below or any(self.trained[:2])


@dataclass(frozen=True)
class BottlenecksCall(Call):
    """size: bytes of x. passes: what was asked for, of `channel_affine`."""

    blocks: tuple[Sizes, ...]
    size: int
    one_device: bool
    passes: str | None

    @property
    def middle(self) -> int:
        """The most channels inside a block."""
        return max(one.channels[1] for one in self.blocks)

    def shapes(self) -> str:
        last = self.blocks[-1]
        return (
            f"{len(self.blocks)} blocks of ({last.rows}, {last.channels[2]}) {str(self.dtype).removeprefix('torch.')}"
        )


def _sizes(x: Tensor, blocks: Sequence[Bottleneck]) -> tuple[Sizes, ...]:
    found = []
    batch, _, height, width = x.shape
    below = wants_grad(x)
    for block in blocks:
        middle, entering, *_ = block.weights[0].shape
        channels = entering, middle, block.weights[2].shape[0]
        height, width = block.geometries[1].size(height, width, block.weights[1])
        trained = tuple(map(wants_grad, block.weights))
        found.append(Sizes(batch * height * width, channels, tuple(w.numel() for w in block.weights), trained, below))
        below = below or any(trained)
    return tuple(found)


def savings(blocks: Sequence[Sizes], itemsize: int) -> int:
    """Bytes that one node moves less than a node for each part; what its launches cost is taken off."""
    saved = launches = 0
    several = len(blocks) > 1
    if any(
        one.reaches_inside for one in blocks
    ):  # weights times scales; of several blocks they, and the scales, are one
        launches += 3 if several else 1
        saved -= sum(one.weights[2] for one in blocks) * itemsize * (4 if several else 2)
    if any(one.trained[2] for one in blocks):  # gradients times scales, from fp32
        launches += 1
        saved -= sum(one.weights[2] for one in blocks if one.trained[2]) * 8
    for one in blocks:
        features, shortcut = one.rows * one.channels[2] * itemsize, len(one.weights) > 3
        beside = one.below or (shortcut and one.trained[3])
        if beside and (one.reaches_inside or one.trained[2]):
            saved += features
        if shortcut:
            scaled = one.below + one.trained[3]
            launches += scaled
            saved -= scaled * 2 * one.weights[3] * itemsize
    return saved - launches * LAUNCH


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
        blocks=_sizes(x, blocks),
        size=x.nbytes,
        one_device=on_one_device(*tensors),
        passes=CHANNEL_AFFINE.requested,
    )


def measured_as(middle: int) -> str:
    """The name of the measurements that blocks of so many channels inside go by: later stages' products are long, and cuBLAS's best."""
    return "bottlenecks" + "_long" * (middle >= POINTWISE_LONG)


def _why_not(call: BottlenecksCall) -> str | None:
    if not call.needs_grad:
        return "nothing needs a gradient"
    return None if call.one_device else SEVERAL_DEVICES


def _advice(call: BottlenecksCall) -> str | None:
    if call.situation.regime == "compiled":
        return "under torch.compile Inductor fuses what lies between products"
    if call.passes == "eager":
        return "channel_affine was asked to run on 'eager', and so do its parts one by one"
    return None


BF16_ALONE = frozenset({torch.bfloat16})  # a weight times a scale can leave fp16's range


class OnKernels(TritonImplementation):
    """One node, all of whose products, and their gradients, run on our kernels, with what follows on them."""

    name = "kernels"
    dtypes = BF16_ALONE

    def why_not(self, call: BottlenecksCall) -> str | None:
        widest = max(max(one.channels) for one in call.blocks)
        if widest > MAX_BLOCK:
            return f"{widest} channels: its passes take up to {MAX_BLOCK}"
        return _why_not(call)

    def advice(self, call: BottlenecksCall) -> str | None:
        against = _advice(call)
        if against is not None:
            return against
        measured = measured_as(call.middle)
        entry = regimes.find(measured, call.architecture)
        if entry is None or entry.architecture != call.architecture:
            return "products against cuBLAS stay PyTorch's until measured: run detr-fast tune"
        if call.middle > MEASURED_MIDDLE:
            return f"{call.middle} channels inside: measured, and chosen, up to {MEASURED_MIDDLE}; ask for it by name"
        return regimes.advice(measured, call, call.size)

    def note(self, call: BottlenecksCall) -> str | None:
        return regimes.note(measured_as(call.middle), call)

    def prepare(self, call: BottlenecksCall) -> None:
        launch.compile_launches(lambda: _rehearse(call), call.device)

    def compiled_key(self, call: BottlenecksCall) -> Any:
        return call.device, frozenset((one.channels, len(one.weights)) for one in call.blocks), call.dtype

    def run(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("nodes are made by ops.bottlenecks_autograd")


def _rehearse(call: BottlenecksCall) -> None:
    for one in call.blocks:
        entering, middle, leaving = one.channels
        rehearse_gradients((middle, leaving), call.dtype)
        pointwise_gradient.rehearse(entering, middle, leaving, len(one.weights) > 3, call.dtype)


class OneNode(Implementation):
    """Its passes and products run on what the dispatcher chooses for them."""

    name = "one_node"
    dtypes = BF16_ALONE
    plain = True

    def why_not(self, call: BottlenecksCall) -> str | None:
        return _why_not(call)

    def advice(self, call: BottlenecksCall) -> str | None:
        if call.device_type == "cpu":
            return "on a CPU it was never measured"
        against = _advice(call)
        if against is None and savings(call.blocks, call.dtype.itemsize) <= 0:
            against = "scaling its weights takes longer than the bytes that this saves"
        return against

    def prepare(self, call: BottlenecksCall) -> None:
        on_kernels = call.passes != "eager" if call.device_type == "cuda" else call.passes == "triton"
        if launch.triton is not None and on_kernels:
            channels = {n for one in call.blocks for n in one.channels[1:]}
            launch.compile_launches(lambda: rehearse_gradients(channels, call.dtype), call.device)

    def compiled_key(self, call: BottlenecksCall) -> Any:
        return call.device, frozenset(n for one in call.blocks for n in one.channels[1:]), call.dtype

    def run(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("nodes are made by ops.bottlenecks_autograd")


class EachPart(Implementation):
    """A node for each convolution and each pass, each as the dispatcher chooses for it."""

    name = "eager"

    def run(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("parts are run by whoever asked")


BOTTLENECKS = Op(
    "bottlenecks", signature=_signature, describe=_describe, implementations=(OnKernels(), OneNode(), EachPart())
)


def asked_for() -> bool:
    """Whether an op that a frozen ResNet in 16 bits is made of was asked for by name, so that it has to be one also on a CPU."""
    return any(op.requested is not None for op in (CHANNEL_AFFINE, POINTWISE_AFFINE, BOTTLENECKS))
