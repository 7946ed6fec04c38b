# mypy: allow-incomplete-defs
"""The gate of a gated feed-forward block (SwiGLU, GEGLU, ReGLU), forward and backward, in one launch each.

    y = activation(gate) * up,   dup = dy * activation(gate),   dgate = dy * up * activation'(gate)

gate, up and y are (..., F): gate and up are two tensors, or the halves of one, (..., 2 F), or neighbours in it, which is read and whose
gradient is written in place. Computed in fp32 and rounded once. The backward keeps gate and up alone, and computes the activation again.
Under a limit the gate is at most that, and up within it on both sides; in place of up there may be up + 1, as in gpt-oss: what is
not within the limit has no gradient.
Source: Shazeer, 2020, arXiv:2002.05202.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from .configs import GATED, GATED_HALVES
from .entry import Budget, Entry
from .launch import TRITON_TYPES, Variant, empty, jit, launch, pointer, tl
from .overlap import wait_for_previous
from .product_tiles import activate
from .rows import (
    MAX_PLANS,
    MAX_ROW_STRIDE,
    Plan,
    address_of,
    arriving_rows,
    as_rows,
    run_length,
    run_pointers,
    tile_elements,
)

MAX_COLUMNS = MAX_ROW_STRIDE // 2  # of y: two halves lie in rows of twice as many
# Tensors; of one tensor's halves, which the gate is; and of neighbours in one tensor the first ones.
TWO, GATE_FIRST, GATE_LAST, NEIGHBOURS = "two", "gate first", "gate last", "neighbours"


class Gate(NamedTuple):
    """What is computed: activation(gate) * up.

    activation: one of `product_tiles.activate`. gate_last: of halves, the second is the gate. neighbours: the gate is every other column, and
    up those between. limit: of both, before the activation. plus_one: up + 1 in the place of up.
    """

    activation: str
    gate_last: bool = False
    neighbours: bool = False
    limit: float | None = None
    plus_one: bool = False


@jit
def _tile(
    rows, F, ROWS: tl.constexpr, BLOCK_C: tl.constexpr, FLAT: tl.constexpr, FULL: tl.constexpr, VEC: tl.constexpr
):
    """This program's first row, int64, row numbers (ROWS, 1) from it, column numbers (1, BLOCK_C), and which elements exist.

    FLAT: tensors without gaps are one row of BLOCK_C columns after the other, and `rows` is the number of their elements.
    """
    first = tl.program_id(0).to(tl.int64) * ROWS  # rows * F can pass 2**31; offsets from the first row cannot
    row = tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    if FLAT:
        left = tl.minimum(rows - first * BLOCK_C, BLOCK_C).to(tl.int32)
        mask = column // VEC < left // VEC
    elif FULL:
        mask = (row < tl.minimum(rows - first, ROWS).to(tl.int32)) & (column >= 0)
    else:
        mask = (row < tl.minimum(rows - first, ROWS).to(tl.int32)) & (column // VEC < F // VEC)
    return first, row, column, mask


@jit
def _halves(ptr, F, FORM: tl.constexpr):
    """Where the gate and the other half start, of two halves of rows."""
    if FORM == "gate first":
        gate_ptr, up_ptr = ptr, ptr + F
    else:
        gate_ptr, up_ptr = ptr + F, ptr
    return gate_ptr, up_ptr  # neither is None, which Triton 3.6 has no function return beside others


@jit
def _load(base, row_stride, tile, VEC: tl.constexpr):
    """A tile of rows `row_stride` apart, in fp32."""
    first, row, column, mask = tile
    pointers = run_pointers(base + first * row_stride, row * row_stride, column, VEC)
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@jit
def _store(base, row_stride, tile, value, VEC: tl.constexpr):
    first, row, column, mask = tile
    value = value.to(base.dtype.element_ty)
    tl.store(run_pointers(base + first * row_stride, row * row_stride, column, VEC), value, mask=mask)


@jit
def _load_both(
    gate_ptr,
    up_ptr,
    gate_stride,
    up_stride,
    rows,
    F,
    tile,
    FORM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    FULL: tl.constexpr,
    VEC: tl.constexpr,
):
    """Gate and up of a tile, in fp32; one that is not used is not read."""
    if FORM == "neighbours":
        both = _load(gate_ptr, gate_stride, _tile(rows, 2 * F, ROWS, 2 * BLOCK_C, False, FULL, VEC), VEC)
        gate, up = tl.split(tl.reshape(both, (ROWS, BLOCK_C, 2)))
    else:
        gate, up = _load(gate_ptr, gate_stride, tile, VEC), _load(up_ptr, up_stride, tile, VEC)
    return gate, up


@jit
def _limited(gate, up, LIMIT: tl.constexpr, PLUS_ONE: tl.constexpr):
    """Both, within the limit where there is one, and what is there in up's place; NaN stays NaN."""
    if LIMIT is not None:
        gate = tl.where(gate > LIMIT, LIMIT, gate)
        up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
    return gate, up + 1.0 if PLUS_ONE else up


@jit
def gated_kernel(
    gate_ptr,
    up_ptr,
    y_ptr,
    gate_row_stride: tl.int32,
    up_row_stride: tl.int32,
    rows: tl.int64,
    F: tl.int32,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    FORM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    FLAT: tl.constexpr,
    FULL: tl.constexpr,
    VEC: tl.constexpr,
):
    """FLAT: see `_tile`; strides and F are BLOCK_C then. FULL: F is a multiple of BLOCK_C."""
    wait_for_previous()
    tile = _tile(rows, F, ROWS, BLOCK_C, FLAT, FULL, VEC)
    if FORM == "gate first" or FORM == "gate last":
        gate_ptr, up_ptr = _halves(gate_ptr, F, FORM)
    gate, up = _load_both(
        *(gate_ptr, up_ptr, gate_row_stride, up_row_stride, rows, F, tile), FORM, ROWS, BLOCK_C, FULL, VEC
    )
    gate, up = _limited(gate, up, LIMIT, PLUS_ONE)
    active, _ = activate(gate, ACTIVATION)
    _store(y_ptr, F, tile, active * up, VEC)


@jit
def gated_backward_kernel(
    dy_ptr,
    gate_ptr,
    up_ptr,
    dgate_ptr,
    dup_ptr,
    gate_row_stride: tl.int32,
    up_row_stride: tl.int32,
    gradient_row_stride: tl.int32,
    rows: tl.int64,
    F: tl.int32,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    FORM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    FLAT: tl.constexpr,
    FULL: tl.constexpr,
    VEC: tl.constexpr,
):
    wait_for_previous()
    tile = _tile(rows, F, ROWS, BLOCK_C, FLAT, FULL, VEC)
    if FORM == "gate first" or FORM == "gate last":
        gate_ptr, up_ptr = _halves(gate_ptr, F, FORM)
        dgate_ptr, dup_ptr = _halves(dgate_ptr, F, FORM)
    dy = _load(dy_ptr, F, tile, VEC)
    gate, up = _load_both(
        *(gate_ptr, up_ptr, gate_row_stride, up_row_stride, rows, F, tile), FORM, ROWS, BLOCK_C, FULL, VEC
    )
    limited, other = _limited(gate, up, LIMIT, PLUS_ONE)
    active, slope = activate(limited, ACTIVATION)
    dgate, dup = dy * other * slope, dy * active
    if LIMIT is not None:
        dgate, dup = tl.where(gate >= LIMIT, 0.0, dgate), tl.where(tl.abs(up) >= LIMIT, 0.0, dup)
    if FORM == "neighbours":
        both = tl.reshape(tl.join(dgate, dup), (ROWS, 2 * BLOCK_C))
        wide = _tile(rows, 2 * F, ROWS, 2 * BLOCK_C, False, FULL, VEC)
        _store(dgate_ptr, gradient_row_stride, wide, both, VEC)
    else:
        if dgate_ptr is not None:
            _store(dgate_ptr, gradient_row_stride, tile, dgate, VEC)
        if dup_ptr is not None:
            _store(dup_ptr, gradient_row_stride, tile, dup, VEC)


def gated_forward(gate: Tensor, up: Tensor | None, kind: Gate) -> Tensor:
    """What `kind` says, (..., F), contiguous, in their dtype; up None: both are in `gate`, (..., 2 F)."""
    form = _form(up, kind)
    columns = gate.shape[-1] if up is not None else gate.shape[-1] // 2
    gate, gate_stride = as_rows(gate)
    up, up_stride = (None, gate_stride) if up is None else as_rows(up)
    y = empty((*gate.shape[:-1], columns), gate.dtype, gate.device)
    addresses = address_of(gate) | address_of(up)
    sizes = gate.shape[:-1].numel(), columns, gate_stride, up_stride
    plan = _plan(sizes, gate.dtype, kind, form, addresses % 16)
    launch(plan.variant, plan.grid, gate, up, y, *plan.sizes)
    return y


def gated_backward(
    dy: Tensor,
    gate: Tensor,
    up: Tensor | None,
    kind: Gate,
    *,
    with_dgate: bool = True,
    with_dup: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of `gated_forward` for gate and up, contiguous, in their dtype, which dy has; where both are one tensor, one."""
    form = _form(up, kind)
    columns = dy.shape[-1]
    dy = arriving_rows(dy.contiguous())[0]
    gate, gate_stride = as_rows(gate)
    up, up_stride = (None, gate_stride) if up is None else as_rows(up)
    dgate = empty(gate.shape, gate.dtype, gate.device) if with_dgate or up is None else None
    dup = empty(up.shape, up.dtype, up.device) if with_dup and up is not None else None
    addresses = address_of(dy) | address_of(gate) | address_of(up)
    sizes = gate.shape[:-1].numel(), columns, gate_stride, up_stride
    wanted = dgate is not None, dup is not None
    plan = _plan(sizes, gate.dtype, kind, form, addresses % 16, wanted)
    launch(plan.variant, plan.grid, dy, gate, up, dgate, dup, *plan.sizes)
    return dgate, dup


def _form(up: Tensor | None, kind: Gate) -> str:
    if up is not None:
        return TWO
    return NEIGHBOURS if kind.neighbours else GATE_LAST if kind.gate_last else GATE_FIRST


@lru_cache(maxsize=MAX_PLANS)
def _plan(
    sizes: tuple[int, int, int, int],
    dtype: torch.dtype,
    kind: Gate,
    form: str,
    offset: int,
    wanted: tuple[bool, bool] | None = None,
) -> Plan:
    """Of the forward, or with what is wanted of the backward. sizes: rows, columns of y, distances of gate's and of up's rows."""
    rows, columns, *strides = sizes
    flat = form == TWO and strides == [columns, columns]  # rows of both halves may overlap, as windows do
    vector = run_length(dtype.itemsize, rows * columns if flat else columns | strides[0] | strides[1], offset)
    variant = variant_of(columns, dtype, kind, form, flat, vector, wanted)
    block = int(variant.constants["BLOCK_C"])
    if flat:
        elements, columns, strides = rows * columns, block, [block, block]
        grid, rows = (-(-elements // block), 1), elements
    else:
        grid = -(-rows // int(variant.constants["ROWS"])), -(-columns // block)
    if wanted is not None:
        strides.append(columns if form == TWO else 2 * columns)
    return Plan(variant, grid, (*strides, rows, columns))


def variant_of(
    columns: int,
    dtype: torch.dtype,
    kind: Gate,
    form: str,
    flat: bool,
    vector: int,
    wanted: tuple[bool, bool] | None = None,
) -> Variant:
    """The program of the forward, or of the backward with those gradients that are wanted; flat: all tensors are without gaps."""
    config = GATED if flat or form == TWO or vector == 1 else GATED_HALVES
    elements = config.rows * config.columns
    block = elements if flat else min(config.columns, max(16, 1 << (columns - 1).bit_length()))
    while not flat and block > GATED.columns and -columns % block > columns // 8:  # of lanes that have nothing to do
        block //= 2
    rows = 1 if flat else elements // block
    # Without vectors each element has an address and a mask of its own.
    block, rows = (block, rows) if vector > 1 else (block // 2, rows) if flat else (block, max(1, rows // 2))
    tile = rows, block, config.num_warps
    return _variant(dtype, kind, form, tile, flat, not flat and columns % block == 0, vector, wanted)


@cache
def _variant(
    dtype: torch.dtype,
    kind: Gate,
    form: str,
    tile: tuple[int, int, int],
    flat: bool,
    full: bool,
    vector: int,
    wanted: tuple[bool, bool] | None,
) -> Variant:
    there = (dtype, dtype if form == TWO else None)
    if wanted is None:
        kernel, types = gated_kernel, (*map(pointer, (*there, dtype)), "i32", "i32", "i64", "i32")
    else:
        written = (dtype if one else None for one in wanted)
        types = (*map(pointer, (dtype, *there, *written)), "i32", "i32", "i32", "i64", "i32")
        kernel = gated_backward_kernel
    constants = {"ACTIVATION": kind.activation, "LIMIT": kind.limit, "PLUS_ONE": kind.plus_one, "FORM": form}
    constants |= {"ROWS": tile[0], "BLOCK_C": tile[1], "FLAT": flat, "FULL": full, "VEC": vector}
    return Variant(kernel, types, constants, tile[2])


def catalog_entries() -> Iterator[Entry]:
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    # Of neighbours, among threads; Triton 3.6 takes twice what 3.8 does for AMD's GPUs.
    budget, exchanging = Budget(80, 0, 64, 0), Budget(80, 8192, 64, 16384)
    of_gpt_oss = Gate("quick_gelu", neighbours=True, limit=7.0, plus_one=True)
    of_deepseek = Gate("silu", limit=10.0)
    # What each example runs: the gate, dtype, form, columns and rows. The first is listed.
    by_elements = (Gate("gelu", True), fp16, GATE_LAST, 101, 37), (Gate("relu"), fp32, GATE_FIRST, 1024, 3)
    examples = (
        (((Gate("silu"), bf16, TWO, 1024, 5), (Gate("gelu_tanh"), bf16, GATE_FIRST, 1096, 3)), True, 8),
        (((of_gpt_oss, bf16, NEIGHBOURS, 1096, 3), (of_deepseek, fp32, TWO, 1024, 5), *by_elements), False, 8),
    )
    for cases, flat, vector in examples:
        gate, dtype, form, columns, _ = cases[0]
        for kind, wanted in (("forward", None), ("backward", (True, form == TWO))):
            variant = variant_of(columns, dtype, gate, form, flat, vector, wanted)
            name = f"gated_{kind}_{gate.activation}_{TRITON_TYPES[dtype]}"
            allowed = exchanging if form == NEIGHBOURS else budget
            yield Entry("gated_activation", name, variant, tile_elements(variant), allowed, partial(_example, cases))


def _example(
    cases: tuple[tuple[Gate, torch.dtype, str, int, int], ...], device: torch.device
) -> Callable[[], tuple[Tensor, ...]]:
    """Forward and backward of cases of more than two tiles, the last one not full."""
    given = []
    for kind, dtype, form, columns, rows in cases:
        one, other, dy = (torch.randn(rows, columns, device=device).to(dtype) for _ in range(3))
        gate, up = (one, other) if form == TWO else (torch.cat([one, other], -1), None)
        given.append((gate, up, dy, kind))

    def call() -> tuple[Tensor, ...]:
        found: list[Tensor | None] = []
        for gate, up, dy, kind in given:
            found.append(gated_forward(gate, up, kind))
            found += gated_backward(dy, gate, up, kind)
        return tuple(one for one in found if one is not None)

    return call
