# mypy: allow-incomplete-defs
"""What lies between the convolutions of a network with frozen batch norms, channels last, in one pass over the features.

    y = relu(x * scale + shift + residual * residual_scale),   of each channel a scale and a shift

    g = dy where y > 0, else 0,   dx = g * scale,   dresidual = g * residual_scale

x, residual, y are (rows, C), rows being pixels; scale, shift and residual_scale are fp32 (C,). The backward keeps y alone,
which the next convolution keeps, too. NaN goes on to y, as from PyTorch's ReLU.
Source: He et al., 2015, arXiv:1512.03385 (residual blocks); Carion et al., 2020, arXiv:2005.12872 (frozen batch norm).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, lru_cache, partial

import torch
from torch import Tensor

from .configs import CHANNEL_AFFINE
from .entry import Budget, Entry
from .launch import Variant, empty, jit, launch, pointer, tl
from .overlap import wait_for_previous
from .rows import (
    MAX_PLANS,
    Plan,
    address_of,
    arriving_rows,
    block_of,
    column_block,
    load_parameters,
    packed,
    row_constants,
    run_length,
    run_pointers,
    tile_elements,
)


@jit
def channel_affine_kernel(
    x_ptr,
    residual_ptr,
    scale_ptr,
    shift_ptr,
    residual_scale_ptr,
    y_ptr,
    rows: tl.int64,
    C: tl.int32,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    FULL: tl.constexpr,
    VEC: tl.constexpr,
):
    wait_for_previous()
    first = tl.program_id(0).to(tl.int64) * ROWS  # rows * C can pass 2**31; offsets from the first row cannot
    row = tl.arange(0, ROWS)
    column, inside, _ = column_block(C, BLOCK_C, FULL, VEC)
    mask = (row < tl.minimum(rows - first, ROWS).to(tl.int32))[:, None] & inside
    stride = BLOCK_C if FULL else C
    place, start = first * stride, row[:, None] * stride
    scale = load_parameters(scale_ptr, column, inside, VEC)
    shift = load_parameters(shift_ptr, column, inside, VEC)
    if residual_scale_ptr is not None:
        residual_scale = load_parameters(residual_scale_ptr, column, inside, VEC)
    x = tl.load(run_pointers(x_ptr + place, start, column, VEC), mask=mask, other=0.0).to(tl.float32)
    y = x * scale + shift
    if residual_ptr is not None:
        residual = tl.load(run_pointers(residual_ptr + place, start, column, VEC), mask=mask, other=0.0).to(tl.float32)
        if residual_scale_ptr is not None:
            residual *= residual_scale
        y += residual
    y = tl.where(y < 0.0, 0.0, y)  # NaN stays NaN
    tl.store(run_pointers(y_ptr + place, start, column, VEC), y.to(y_ptr.dtype.element_ty), mask=mask)


@jit
def channel_affine_backward_kernel(
    dy_ptr,
    y_ptr,
    scale_ptr,
    residual_scale_ptr,
    dx_ptr,
    dresidual_ptr,
    rows: tl.int64,
    C: tl.int32,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    FULL: tl.constexpr,
    VEC: tl.constexpr,
):
    wait_for_previous()
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    column, inside, _ = column_block(C, BLOCK_C, FULL, VEC)
    mask = (row < tl.minimum(rows - first, ROWS).to(tl.int32))[:, None] & inside
    stride = BLOCK_C if FULL else C
    place, start = first * stride, row[:, None] * stride
    if dx_ptr is not None:
        scale = load_parameters(scale_ptr, column, inside, VEC)
    if residual_scale_ptr is not None:
        residual_scale = load_parameters(residual_scale_ptr, column, inside, VEC)
    dy = tl.load(run_pointers(dy_ptr + place, start, column, VEC), mask=mask, other=0.0).to(tl.float32)
    y = tl.load(run_pointers(y_ptr + place, start, column, VEC), mask=mask, other=0.0)
    g = tl.where(y <= 0.0, 0.0, dy)  # where y is NaN, dy goes on, as in PyTorch
    if dx_ptr is not None:
        tl.store(run_pointers(dx_ptr + place, start, column, VEC), (g * scale).to(dx_ptr.dtype.element_ty), mask=mask)
    if dresidual_ptr is not None:
        if residual_scale_ptr is not None:
            g *= residual_scale
        pointers = run_pointers(dresidual_ptr + place, start, column, VEC)
        tl.store(pointers, g.to(dresidual_ptr.dtype.element_ty), mask=mask)


def channel_affine_forward(
    x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None = None, residual_scale: Tensor | None = None
) -> Tensor:
    """relu(x * scale + shift + residual * residual_scale); x, residual (..., C) of one dtype, the others fp32 (C,).

    Returns y (..., C) in x's dtype, contiguous. Raises ValueError for no or more than 8,192 channels.
    """
    x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    scale, shift, residual_scale = scale.contiguous(), shift.contiguous(), packed(residual_scale)
    y = empty(x.shape, x.dtype, x.device)
    given = x.dtype, residual is not None, residual_scale is not None
    addresses = address_of(x) | address_of(residual) | _addresses(scale, shift, residual_scale)
    plan = _plan_forward(x.shape[:-1].numel(), x.shape[-1], given, addresses % 16)
    launch(plan.variant, plan.grid, x, residual, scale, shift, residual_scale, y, *plan.sizes)
    return y


def channel_affine_backward(
    dy: Tensor,
    y: Tensor,
    scale: Tensor,
    residual_scale: Tensor | None = None,
    *,
    with_dx: bool = True,
    with_dresidual: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of `channel_affine_forward` for x and the residual, in y's dtype; dy and y (..., C)."""
    if not (with_dx or with_dresidual):
        return None, None
    dy, y = arriving_rows(dy.contiguous())[0], y.contiguous()
    scale, residual_scale = scale.contiguous(), packed(residual_scale)
    dx, dresidual = (empty(y.shape, y.dtype, y.device) if wanted else None for wanted in (with_dx, with_dresidual))
    given = dy.dtype, y.dtype, residual_scale is not None, with_dx, with_dresidual
    addresses = address_of(dy) | address_of(y) | _addresses(scale, residual_scale)
    plan = _plan_backward(y.shape[:-1].numel(), y.shape[-1], given, addresses % 16)
    launch(plan.variant, plan.grid, dy, y, scale, residual_scale, dx, dresidual, *plan.sizes)
    return dx, dresidual


def _addresses(*tensors: Tensor | None) -> int:
    found = 0
    for tensor in tensors:
        found |= address_of(tensor)
    return found


@lru_cache(maxsize=MAX_PLANS)
def _plan_forward(rows: int, columns: int, given: tuple[torch.dtype, bool, bool], offset: int) -> Plan:
    variant = forward_variant(columns, *given, run_length(given[0].itemsize, columns, offset))
    return Plan(variant, (-(-rows // variant.constants["ROWS"]),), (rows, columns))


@lru_cache(maxsize=MAX_PLANS)
def _plan_backward(
    rows: int, columns: int, given: tuple[torch.dtype, torch.dtype, bool, bool, bool], offset: int
) -> Plan:
    vector = run_length(min(given[0].itemsize, given[1].itemsize), columns, offset)
    variant = backward_variant(columns, *given, vector)
    return Plan(variant, (-(-rows // variant.constants["ROWS"]),), (rows, columns))


@cache
def forward_variant(columns: int, dtype: torch.dtype, residual: bool, scaled: bool, vector: int) -> Variant:
    """The program for rows of `columns` channels, read in runs of `vector`; scaled: the residual has a scale."""
    config, fp32 = CHANNEL_AFFINE[block_of(columns)], torch.float32
    tensors = (dtype, dtype if residual else None, fp32, fp32, fp32 if scaled else None, dtype)
    types = (*map(pointer, tensors), "i64", "i32")
    return Variant(channel_affine_kernel, types, row_constants(columns, config, vector), config.num_warps)


@cache
def backward_variant(
    columns: int,
    dy_dtype: torch.dtype,
    dtype: torch.dtype,
    scaled: bool,
    with_dx: bool,
    with_dresidual: bool,
    vector: int,
) -> Variant:
    """The program of the backward, for y of `dtype`."""
    config, fp32 = CHANNEL_AFFINE[block_of(columns)], torch.float32
    written = (dtype if with_dx else None, dtype if with_dresidual else None)
    types = (*map(pointer, (dy_dtype, dtype, fp32, fp32 if scaled else None, *written)), "i64", "i32")
    return Variant(channel_affine_backward_kernel, types, row_constants(columns, config, vector), config.num_warps)


def catalog_entries() -> Iterator[Entry]:
    bf16, budget = torch.bfloat16, Budget(80, 1024, 64, 1024)
    example = partial(_example, 256, bf16)
    variants = {
        "forward": forward_variant(256, bf16, True, True, 8),
        "backward": backward_variant(256, bf16, bf16, True, True, True, 8),
    }
    for kind, variant in variants.items():
        yield Entry(
            "channel_affine", f"channel_affine_{kind}_c256_bf16", variant, tile_elements(variant), budget, example
        )


def _example(columns: int, dtype: torch.dtype, device: torch.device) -> Callable[[], tuple[Tensor, ...]]:
    """Forward and backward of more than two tiles, the last one not full, with all that there can be."""
    rows = 2 * CHANNEL_AFFINE[block_of(columns)].rows + 3
    x, residual, dy = (torch.randn(rows, columns, device=device).to(dtype) for _ in range(3))
    scale, shift, residual_scale = (torch.randn(columns, device=device) for _ in range(3))

    def call() -> tuple[Tensor, ...]:
        y = channel_affine_forward(x, scale, shift, residual, residual_scale)
        dx, dresidual = channel_affine_backward(dy, y, scale, residual_scale)
        assert dx is not None
        assert dresidual is not None
        return y, dx, dresidual

    return call
