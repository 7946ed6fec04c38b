"""Consecutive bottlenecks with frozen norms, forward and backward, written out by hand: see `ops.bottlenecks_choice`.

With m what arrives for a block's output y where y > 0, s and b its norms' scales and shifts (named as in `Bottleneck`):

    dw3 = s3 * (m^T @ z2)        dc2 = (m @ (s3 * w3)) * s2 where z2 > 0
    dz1, dw2 = those of conv2    dc1 = dz1 * s1 where z1 > 0           dw1 = dc1^T @ x
    dx = dc1 @ w1 + m, or instead of m the gradients of conv4 with the weights s4 * w4

and as x is the output of the block before, m of that is dx where x > 0. Kept are x, z1, z2 and y.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from detr_fast.dispatch import TritonImplementation
from detr_fast.kernels.product_tiles import sums_16_bits_in_fp32
from detr_fast.ops.bottlenecks import Bottleneck
from detr_fast.ops.bottlenecks_choice import BOTTLENECKS, OneNode, OnKernels
from detr_fast.ops.boundary import wants_grad
from detr_fast.ops.channel_affine import CHANNEL_AFFINE, gradient_inside
from detr_fast.ops.pixels import input_gradient, pixels_of
from detr_fast.ops.pointwise_affine import POINTWISE_AFFINE
from detr_fast.ops.pointwise_gradient import pointwise_gradient
from detr_fast.ops.products import eager_gradients, goes_by_eager_ops


@dataclass
class Link:
    """Of a node's output, which one other node reads alone; masked: what arrives for it is zero where the output is."""

    masked: bool = False


class Chain:
    """Stages behind each other, of which each alone reads what the one before wrote."""

    def __init__(self) -> None:
        self.last: Link | None = None

    def one_node(self, x: Tensor, blocks: Sequence[Bottleneck | None]) -> Tensor | None:
        """Consecutive blocks of one stage, of x (B, C, H, W), as one node; None where they are to run part by part.

        weights: cast to x's dtype. All blocks have as many channels. Returns (B, N, H', W'), channels last.
        """
        before, self.last = self.last, None
        known = [block for block in blocks if block is not None]
        if len(known) < len(blocks) or not wants_grad(x, *(w for block in known for w in block.weights)):
            return None
        chosen = BOTTLENECKS.choose(x, known)
        kernels = isinstance(chosen, OnKernels)
        if not (kernels or isinstance(chosen, OneNode)):
            return None
        self.last = Link()
        return through_one_node(x, [_cast(block, x.dtype) for block in known], kernels, before, self.last)


def _cast(block: Bottleneck, dtype: torch.dtype) -> Bottleneck:
    if all(w.dtype == dtype for w in block.weights):
        return block
    return block._replace(weights=tuple(w.to(dtype, memory_format=torch.channels_last) for w in block.weights))


def through_one_node(
    x: Tensor,
    blocks: Sequence[Bottleneck],
    kernels: bool = False,
    before: Link | None = None,
    after: Link | None = None,
) -> Tensor:
    """What `Chain.one_node` makes of blocks, whatever the dispatcher thinks of it, in any dtype.

    kernels: whether products and their gradients run on our kernels. before, after: of x and the output.
    """
    weights = (w for block in blocks for w in block.weights)
    y: Tensor = _Node.apply(blocks, kernels, before, after or Link(), x, *weights)
    return y


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        blocks: Sequence[Bottleneck],
        kernels: bool,
        before: Link | None,
        after: Link,
        x: Tensor,
        *weights: Tensor,
    ) -> Tensor:
        kept, passes = _forward(x, blocks, kernels)
        ctx.kernels = _Kernels(passes, kernels)
        ctx.geometries = [block.geometries for block in blocks]
        ctx.masks = before is not None and ctx.needs_input_grad[4] and kernels
        if before is not None:
            before.masked = ctx.masks
        ctx.after = after
        ctx.save_for_backward(x, *weights, *(t for b in blocks for t in (*b.scales, *b.shifts)), *kept)
        ctx.set_materialize_grads(False)
        return kept[-1]

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> Any:
        wanted_x, *wanted = ctx.needs_input_grad[4:]
        if dy is None:
            return *[None] * 5, *(None for _ in wanted)
        x, *saved = ctx.saved_tensors
        blocks, kept = _unpacked(iter(saved), ctx.geometries)
        if goes_by_eager_ops(dy):
            inputs = [x, *(w for block in blocks for w in block.weights)]
            return *[None] * 4, *eager_gradients(partial(_last, blocks), inputs, dy, [wanted_x, *wanted])
        backward = _Backward(x, blocks, kept, wanted_x, iter(wanted), ctx.kernels, ctx.masks)
        return *[None] * 4, backward.run(dy, ctx.after.masked), *backward.gradients()


def _unpacked(saved: Iterator[Tensor], geometries: Sequence[Any]) -> tuple[list[Bottleneck], list[Tensor]]:
    weights = [tuple(next(saved) for _ in one) for one in geometries]
    affine = [(tuple(next(saved) for _ in one), tuple(next(saved) for _ in range(3))) for one in geometries]
    return [Bottleneck(w, *a, g) for w, a, g in zip(weights, affine, geometries)], list(saved)


class _Kernels(NamedTuple):
    """Whether passes, and products with what follows on them, run on kernels."""

    passes: bool
    products: bool


def _forward(x: Tensor, blocks: Sequence[Bottleneck], kernels: bool) -> tuple[list[Tensor], bool]:
    """z1, z2 and y of each block, and whether passes ran on a kernel."""
    kept: list[Tensor] = []
    for block in blocks:
        z1 = _product_affine(x, block, 0, kernels)
        given = _convolved(z1, block, 1), block.scales[1], block.shifts[1], None, None
        passes = CHANNEL_AFFINE.choose(*given)
        z2 = passes.run(*given)
        beside = (_convolved(x, block, 3), block.scales[3]) if len(block.weights) > 3 else (x, None)
        x = _product_affine(z2, block, 2, kernels, *beside)
        kept += [z1, z2, x]
    return kept, isinstance(passes, TritonImplementation)


def _product_affine(x: Tensor, block: Bottleneck, n: int, kernels: bool, *beside: Tensor | None) -> Tensor:
    """A product and the pass behind it."""
    given = x, block.weights[n], block.scales[n], block.shifts[n], *(beside or (None, None))
    chosen = POINTWISE_AFFINE.implementations[0] if kernels else POINTWISE_AFFINE.choose(*given)
    y: Tensor = chosen.run(*given)
    return y


def _last(blocks: Sequence[Bottleneck], x: Tensor, *weights: Tensor) -> Tensor:
    """The blocks' output by operations that autograd follows."""
    given = iter(weights)
    blocks = [block._replace(weights=tuple(next(given) for _ in block.weights)) for block in blocks]
    return _forward(x, blocks, False)[0][-1]


def _convolved(x: Tensor, block: Bottleneck, n: int) -> Tensor:
    return F.conv2d(x, block.weights[n], None, *block.geometries[n])


def _gradients(
    dy: Tensor, x: Tensor, block: Bottleneck, n: int, weight: Tensor, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Of x and of the weight, of a block's convolution."""
    stride, padding, dilation, groups = block.geometries[n]
    given = dy, x, weight, None, stride, padding, dilation, False, (0, 0), groups
    dx, dweight, _ = torch.ops.aten.convolution_backward(*given, (*wanted, False))
    return dx, dweight


class _Backward:
    """One backward of a run of blocks. masks: whether x's gradient is to be zero where x is."""

    def __init__(
        self,
        x: Tensor,
        blocks: Sequence[Bottleneck],
        kept: Sequence[Tensor],
        wanted_x: bool,
        wanted: Iterator[bool],
        kernels: _Kernels,
        masks: bool,
    ) -> None:
        self.blocks, self.kernels, self.masks = blocks, kernels, masks
        self.inside = list(zip(kept[::3], kept[1::3]))
        self.features = [x, *kept[2::3]]
        self.wanted = [tuple(next(wanted) for _ in block.weights) for block in blocks]
        self.below = [wanted_x]  # whether a gradient goes on below a block
        for one in self.wanted:
            self.below.append(self.below[-1] or any(one))
        self.scales = _stacked([block.scales[2] for block in blocks])[..., None]
        last = _stacked([block.weights[2].flatten(1) for block in blocks])
        self.scaled = torch.mul(last, self.scales, out=torch.empty_like(last))
        self.wide = x.dtype.itemsize == 2 and sums_16_bits_in_fp32(x.device)
        self.sums = torch.empty_like(last, dtype=torch.float32 if self.wide else None)
        self.found: list[list[Tensor | None]] = [[None] * len(block.weights) for block in blocks]

    def run(self, dy: Tensor, masked: bool) -> Tensor | None:
        """The gradient of x; masked: dy is zero where the output is."""
        found = dy
        if not (masked and self.kernels.products):  # else it is added to in place
            found = gradient_inside(dy, self.features[-1], self.blocks[-1].scales[2], False, self.kernels.passes)
        for i in reversed(range(len(self.blocks))):
            if not self.below[i + 1]:
                break
            found = self._through(i, found)
        return found if self.below[0] else None

    def gradients(self) -> Iterator[Tensor | None]:
        """Of all weights, in order."""
        if any(one[2] for one in self.wanted):
            scaled = torch.mul(self.sums, self.scales, out=torch.empty_like(self.scaled) if self.wide else self.sums)
            for block, found, wanted, gradient in zip(self.blocks, self.found, self.wanted, scaled):
                found[2] = gradient.view_as(block.weights[2]) if wanted[2] else None
        return (gradient for found in self.found for gradient in found)

    def _through(self, i: int, m: Tensor) -> Tensor:
        """From what arrives where block i's output is above zero to the same of the block before, which may be in m's memory."""
        block, wanted, found, below, x = self.blocks[i], self.wanted[i], self.found[i], self.below[i], self.features[i]
        z1, z2 = self.inside[i]
        to_first = below or wanted[0]
        if wanted[2]:
            dtype = {"out_dtype": torch.float32} if self.wide else {}
            torch.mm(pixels_of(m).t(), pixels_of(z2), out=self.sums[i], **dtype)
        if to_first or wanted[1]:
            if self.kernels.products:
                dc2 = pointwise_gradient(m, self.scaled[i], None, z2, block.scales[1].float())
            else:
                dc2 = self._inside(input_gradient(m, self.scaled[i], z2), z2, block.scales[1])
            dz1, found[1] = _gradients(dc2, z1, block, 1, block.weights[1], (to_first, wanted[1]))
        if to_first:
            assert dz1 is not None
            dc1 = self._inside(dz1, z1, block.scales[0])
            if wanted[0]:
                found[0] = (pixels_of(dc1).t() @ pixels_of(x)).view_as(block.weights[0])
        beside: Tensor | None = m
        if len(wanted) > 3 and (below or wanted[3]):
            scale = block.scales[3].view(-1, 1, 1, 1)
            weight = block.weights[3]
            scaled = torch.mul(weight, scale, out=torch.empty_like(weight)) if below else weight
            beside, gradient = _gradients(m, x, block, 3, scaled, (below, wanted[3]))
            found[3] = None if gradient is None else gradient.mul_(scale)
        if not below:
            return m
        assert beside is not None
        masks, matrix = i > 0 or self.masks, block.weights[0].flatten(1)
        if masks and self.kernels.products:
            return pointwise_gradient(dc1, matrix, beside, x, None)
        dx = input_gradient(dc1, matrix, x, beside)
        if not masks:
            return dx
        return gradient_inside(dx, x, self.blocks[i - 1].scales[2], False, self.kernels.passes)

    def _inside(self, dz: Tensor, z: Tensor, scale: Tensor) -> Tensor:
        return gradient_inside(dz, z, scale, True, self.kernels.passes)


def _stacked(tensors: list[Tensor]) -> Tensor:
    return tensors[0][None] if len(tensors) == 1 else torch.stack(tensors)
