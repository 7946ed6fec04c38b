# mypy: allow-incomplete-defs
"""A ResNet's stem where nothing of it trains: what lies before and behind its convolution.

    y = max over 3×3 pixels, stride 2, padding 1, of relu(conv(x) * scale + shift),   conv: 7×7, stride 2, padding 3

Tensor cores want channels in sixteens, and images have three. Two by two pixels of three channels, and four zeros, are one
pixel of sixteen, and the convolution over them is 4×4 with stride 1: `pixel_blocks` writes the images so, in the
convolution's dtype, channels last and with its padding; `block_weights` the weights.
Behind it, `affine_pool` reads the convolution's output once and writes a quarter as much.
Source: He et al., 2015, arXiv:1512.03385.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .entry import Budget, Entry
from .launch import Variant, compile_variant, empty, jit, launch, pointer, tl
from .overlap import wait_for_previous

MAX_IMAGE = 1 << 31  # elements: offsets inside an image are 32 bits wide
MAX_GRID = 65_535  # images, and rows of blocks
MAX_HEIGHT = 2 * (MAX_GRID - 3)


@jit
def pixel_blocks_kernel(
    x_ptr,
    y_ptr,
    image_stride: tl.int64,
    channel_stride: tl.int32,
    row_stride: tl.int32,
    column_stride: tl.int32,
    height: tl.int32,
    width: tl.int32,
    block_rows: tl.int32,
    block_columns: tl.int32,
    BLOCK_J: tl.constexpr,
):
    """y[b, i, j, (2p + q) * 3 + c] = x[b, c, 2 (i - 2) + p, 2 (j - 2) + q], 0 outside of x; one row of blocks a program."""
    wait_for_previous()
    i = tl.program_id(1)
    image = tl.program_id(2).to(tl.int64)
    j = tl.program_id(0) * BLOCK_J + tl.arange(0, BLOCK_J)[:, None]
    k = tl.arange(0, 16)[None, :]
    channel, place = k % 3, k // 3
    row, column = 2 * i - 4 + place // 2, 2 * j - 4 + place % 2
    inside = (k < 12) & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    offset = channel * channel_stride + row * row_stride + column * column_stride
    x = tl.load(x_ptr + image * image_stride + offset, mask=inside, other=0.0)
    pointers = y_ptr + (image * block_rows + i) * block_columns * 16 + (j * 16 + k)
    tl.store(tl.multiple_of(pointers, (1, 16)), x.to(y_ptr.dtype.element_ty), mask=j < block_columns)


@jit
def affine_pool_kernel(
    x_ptr,
    scale_ptr,
    shift_ptr,
    y_ptr,
    height: tl.int32,
    width: tl.int32,
    pooled_rows: tl.int32,
    pooled_columns: tl.int32,
    C: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """x (B, height, width, C) -> y (B, pooled_rows, pooled_columns, C); one row of y a program."""
    wait_for_previous()
    i = tl.program_id(1)
    image = tl.program_id(2).to(tl.int64)
    j = tl.program_id(0) * BLOCK_J + tl.arange(0, BLOCK_J)[:, None]
    c = tl.arange(0, C)[None, :]
    scale, shift = tl.load(scale_ptr + c), tl.load(shift_ptr + c)
    x_ptr += image * height * width * C
    y = tl.zeros((BLOCK_J, C), tl.float32)  # what ReLU gives at least
    for down in tl.static_range(3):
        # Beyond the edge, the pixel at the edge once more: it is in the window, too.
        row = tl.minimum(tl.maximum(2 * i - 1 + down, 0), height - 1)
        row_ptr = x_ptr + row.to(tl.int64) * width * C
        for right in tl.static_range(3):
            column = tl.minimum(tl.maximum(2 * j - 1 + right, 0), width - 1)
            x = tl.load(tl.multiple_of(row_ptr + (column * C + c), (1, 16))).to(tl.float32)
            y = tl.maximum(y, x * scale + shift, propagate_nan=tl.PropagateNan.ALL)
    pointers = y_ptr + (image * pooled_rows + i) * pooled_columns * C + (j * C + c)
    tl.store(tl.multiple_of(pointers, (1, 16)), y.to(y_ptr.dtype.element_ty), mask=j < pooled_columns)


def pixel_blocks(images: Tensor, dtype: torch.dtype) -> Tensor:
    """images (B, 3, H, W), any strides -> (B, ceil(H/2) + 3, ceil(W/2) + 3, 16) of `dtype`, with the padding of a 4×4
    convolution, contiguous. Raises ValueError for other channels, images of 2**31 elements, or more than a grid holds."""
    batch, channels, height, width = images.shape
    if channels != 3:
        raise ValueError(f"got images of {channels} channels; expected 3")
    rows, columns = (height + 1) // 2 + 3, (width + 1) // 2 + 3
    if images.shape[1:].numel() >= MAX_IMAGE:
        raise ValueError(f"got an image of shape {tuple(images.shape[1:])}; expected less than 2**31 elements")
    if max(rows, batch) > MAX_GRID:
        raise ValueError(
            f"got images of shape {tuple(images.shape)}; expected up to {MAX_GRID:,}, of up to {MAX_HEIGHT:,} rows"
        )
    if sum(stride * size for stride, size in zip(images.stride()[1:], images.shape[1:])) >= MAX_IMAGE:
        # spread out, as where a batch lies inside its channels; strides of one row count, too: they are passed on
        images = images.clone(memory_format=torch.contiguous_format)
    image_stride, *strides = images.stride()
    y = empty((batch, rows, columns, 16), dtype, images.device)
    variant = blocks_variant(images.dtype, dtype)
    grid = (-(-columns // int(variant.constants["BLOCK_J"])), rows, batch)
    launch(variant, grid, images, y, image_stride, *strides, height, width, rows, columns)
    return y


def affine_pool(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """relu(x * scale + shift), then the largest of 3×3 pixels, stride 2, padding 1.

    x (B, H, W, C), C a power of two from 16 to 1,024; scale and shift fp32 (C,). Returns (B, ceil(H/2), ceil(W/2), C) in
    x's dtype, contiguous. Raises ValueError for other channels, or a row of 2**31 elements.
    """
    batch, height, width, channels = x.shape
    if not may_pool(channels) or width * channels >= MAX_IMAGE:
        raise ValueError(
            f"got {tuple(x.shape)}; expected 16 to 1,024 channels, a power of two, in rows of less than 2**31"
        )
    rows, columns = (height + 1) // 2, (width + 1) // 2
    y = empty((batch, rows, columns, channels), x.dtype, x.device)
    variant = pool_variant(channels, x.dtype)
    grid = (-(-columns // int(variant.constants["BLOCK_J"])), rows, batch)
    tensors = (x.contiguous(), scale.contiguous(), shift.contiguous(), y)
    launch(variant, grid, *tensors, height, width, rows, columns)
    return y


def may_pool(channels: int) -> bool:
    """Whether `affine_pool` takes so many channels."""
    return 16 <= channels <= 1024 and channels & (channels - 1) == 0


def block_weights(weight: Tensor) -> Tensor:
    """A 7×7 convolution's weight (N, 3, 7, 7) as that of the 4×4 convolution over `pixel_blocks`: (N, 16, 4, 4)."""
    # A row and a column of zeros before the others: the window of eight pixels begins at an even place.
    eight = F.pad(weight, (1, 0, 1, 0)).unflatten(3, (4, 2)).unflatten(2, (4, 2))  # (N, c, i, p, j, q)
    return F.pad(eight.permute(0, 3, 5, 1, 2, 4).flatten(1, 3), (0, 0, 0, 0, 0, 4))


def compile_stem(channels: int, image_dtype: torch.dtype, dtype: torch.dtype, device: torch.device) -> None:
    """Compile what `pixel_blocks` and `affine_pool` launch."""
    compile_variant(blocks_variant(image_dtype, dtype), device)
    compile_variant(pool_variant(channels, dtype), device)


@cache
def blocks_variant(image_dtype: torch.dtype, dtype: torch.dtype) -> Variant:
    """The program of `pixel_blocks`; a lane writes 16 bytes."""
    types = (*map(pointer, (image_dtype, dtype)), "i64", *["i32"] * 7)
    return Variant(pixel_blocks_kernel, types, {"BLOCK_J": 64}, num_warps=4)


@cache
def pool_variant(channels: int, dtype: torch.dtype) -> Variant:
    """The program of `affine_pool`: 8 elements a lane, as nine windows of them are on their way at once."""
    types = (*map(pointer, (dtype, torch.float32, torch.float32, dtype)), *["i32"] * 4)
    constants = {"C": channels, "BLOCK_J": max(1, 1024 // channels)}
    return Variant(affine_pool_kernel, types, constants, num_warps=4)


def catalog_entries() -> Iterator[Entry]:
    bf16, fp32 = torch.bfloat16, torch.float32
    variants = {"pixel_blocks": (blocks_variant(fp32, bf16), 64 * 16), "affine_pool": (pool_variant(64, bf16), 1024)}
    for name, (variant, elements) in variants.items():
        yield Entry("resnet_stem", f"{name}_bf16", variant, elements, Budget(80, 0, 64, 0), partial(_example, bf16))


def _example(dtype: torch.dtype, device: torch.device) -> Callable[[], tuple[Tensor, ...]]:
    """Odd sizes, and more columns than a program takes."""
    images, x = torch.randn(2, 3, 5, 133, device=device), torch.randn(2, 3, 37, 64, device=device).to(dtype)
    scale, shift = torch.randn(64, device=device), torch.randn(64, device=device)
    return lambda: (pixel_blocks(images, dtype), affine_pool(x, scale, shift))
