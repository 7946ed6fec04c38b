"""What `tune` measures of whole layers: all parts on kernels, by one program of the host's, beside a choice for each part.

In training, with dropout and padding, at DETR's sizes (see `ops.tuning_cases`). And of two bottlenecks of each of ResNet-50's stages.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

from detr_fast.nn.forked import Forked
from detr_fast.nn.transformer import TransformerDecoderLayer, TransformerEncoderLayer
from detr_fast.ops import pointwise_cases, tuning_cases
from detr_fast.ops.bottlenecks import PRODUCT, Bottleneck
from detr_fast.ops.bottlenecks_autograd import Chain
from detr_fast.ops.bottlenecks_choice import Sizes, measured_as, savings
from detr_fast.ops.channel_affine import channel_affine
from detr_fast.ops.tuning_cases import DROPOUT, QUERIES, TOKENS
from detr_fast.ops.tuning_groups import Case, Group, Step, call_step, draw, step_of

# Of two results in bf16: each is up to 0.04 from an fp64 layer's, where a ReLU or a norm turns a rounding into more.
TOLERANCE = 0.1


def encoder_layer_step(
    device: torch.device, images: int, tokens: int, dropout_p: float = 0.0, gradients: bool = True
) -> Step:
    layer = _made(TransformerEncoderLayer, device, dropout_p)
    x, padding = draw(device, images, tokens, tuning_cases.WIDTH), _padding(device, images, tokens)
    return step_of(lambda x, *_: layer(x, src_key_padding_mask=padding), (x, *layer.parameters()), gradients)


def decoder_layer_step(
    device: torch.device, images: int, tokens: int, dropout_p: float = 0.0, gradients: bool = True
) -> Step:
    layer = _made(TransformerDecoderLayer, device, dropout_p)
    x, memory = (draw(device, images, n, tuning_cases.WIDTH) for n in (QUERIES, tokens))
    padding = _padding(device, images, tokens)
    return step_of(
        lambda x, memory, *_: layer(x, memory, memory_key_padding_mask=padding),
        (x, memory, *layer.parameters()),
        gradients,
    )


def _made(kind: type[torch.nn.Module], device: torch.device, dropout_p: float) -> torch.nn.Module:
    sizes = tuning_cases.WIDTH, tuning_cases.HEADS, tuning_cases.HIDDEN
    return kind(*sizes, dropout=dropout_p, batch_first=True, device=device, dtype=torch.bfloat16)


def _padding(device: torch.device, images: int, tokens: int) -> torch.Tensor:
    return torch.arange(tokens, device=device).expand(images, -1) >= tokens * 3 // 4


def _groups() -> Iterator[Group]:
    for op, make, lengths in (
        ("encoder_layer", encoder_layer_step, None),
        ("decoder_layer", decoder_layer_step, QUERIES),
    ):
        cases = []
        for images, tokens in ((1, TOKENS), (2, TOKENS), (4, TOKENS), (16, TOKENS)):
            size = images * (lengths or tokens) * tuning_cases.WIDTH * 2
            timed = partial(call_step, make, (images, tokens, DROPOUT))
            cases.append(Case(f"({images}, {tokens})", size, timed, checked=partial(call_step, make, (images, tokens))))
        yield Group(op, tuple(cases), tolerance=TOLERANCE)


def bottlenecks_step(device: torch.device, size: pointwise_cases.Size, gradients: bool = True) -> Step:
    """Two blocks of so many channels inside, and four times as many outside."""
    wide, geometry = 4 * size.width, {1: PRODUCT, 3: PRODUCT._replace(padding=(1, 1))}
    shapes = [(size.width, wide, 1, 1), (size.width, size.width, 3, 3), (wide, size.width, 1, 1)]

    def weight(shape: tuple[int, ...]) -> torch.Tensor:
        drawn = (2 / torch.Size(shape[1:]).numel()) ** 0.5 * torch.randn(shape, device=device)
        return drawn.to(torch.bfloat16, memory_format=torch.channels_last).requires_grad_()

    def affine(low: float) -> tuple[torch.Tensor, ...]:
        return tuple(torch.rand(n, device=device) + low for n, *_ in shapes)

    scales, shifts, geometries = affine(0.5), affine(-0.5), tuple(geometry[shape[-1]] for shape in shapes)
    x = torch.randn(size.images, wide, *size.pixels, device=device).relu()
    leaves = [x.to(torch.bfloat16, memory_format=torch.channels_last).requires_grad_()]
    leaves += [weight(shape) for _ in range(2) for shape in shapes]

    def run(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        blocks = [Bottleneck(tuple(own), scales, shifts, geometries) for own in (weights[:3], weights[3:])]
        y = Chain().one_node(x, blocks)
        return _by_parts(x, blocks) if y is None else y

    return step_of(run, leaves, gradients)


def _by_parts(x: torch.Tensor, blocks: list[Bottleneck]) -> torch.Tensor:
    for block in blocks:
        (first, middle, last), affine = block.weights, list(zip(block.scales, block.shifts))
        z, residual = Forked.apply(x, first)
        z = F.conv2d(channel_affine(z, *affine[0]), middle, None, *block.geometries[1])
        z = F.conv2d(channel_affine(z, *affine[1]), last)
        x = channel_affine(z, *affine[2], residual)
    return x


def _else(size: pointwise_cases.Size) -> str:
    """What `auto` takes in the kernels' place: the later the stage, the more weights, and the fewer features of few images."""
    inside, wide = size.width, 4 * size.width
    weights = inside * wide, 9 * inside * inside, wide * inside
    rows = size.images * size.pixels[0] * size.pixels[1]
    return (
        "one_node" if savings([Sizes(rows, (wide, inside, wide), weights, (True,) * 3, True)] * 2, 2) > 0 else "eager"
    )


def _bottlenecks() -> Iterator[Group]:
    sizes = [size for size in pointwise_cases.SIZES if size.residual and size.images > 1]
    for name in dict.fromkeys(measured_as(size.width) for size in sizes):
        cases = (
            Case(f"2 × {size}", 4 * size.nbytes, partial(call_step, bottlenecks_step, (size,)), _else(size))
            for size in sorted(sizes, key=lambda size: size.nbytes)
            if measured_as(size.width) == name
        )
        yield Group("bottlenecks", tuple(cases), name, kernel="kernels", tolerance=TOLERANCE)


GROUPS = (*_groups(), *_bottlenecks())
