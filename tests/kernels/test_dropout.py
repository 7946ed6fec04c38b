from __future__ import annotations

import dataclasses

import pytest
import torch
from detr_fast.kernels import dropout, offline
from detr_fast.kernels.analysis import analyse
from detr_fast.kernels.launch import Variant, jit, launch, tl
from detr_fast.kernels.rows import run_pointers

from benchmarks.hardware import DEVICE
from detr_fast.ops.dropout import keep_mask
from detr_fast.testing.ptx import emulated_gpu

interpreter_only = pytest.mark.interpreter


@jit
def rows_kernel(
    x_ptr,
    y_ptr,
    seed_ptr,
    offset: tl.int32,
    threshold: tl.int32,
    rows: tl.int64,
    first_row: tl.int64,
    C: tl.int32,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    VEC: tl.constexpr,
    DROP: tl.constexpr = True,
):
    """y = x where kept, else 0. A program takes ROWS rows and goes over the columns, a multiple of VEC, in blocks."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    low, high = dropout.load_seed(seed_ptr)
    for start in range(0, C, BLOCK_C):
        column = start + tl.arange(0, BLOCK_C)[None, :]
        mask = (row < rows) & (column // VEC < C // VEC)
        x = tl.load(run_pointers(x_ptr, row * C, column, VEC), mask=mask, other=0.0).to(tl.float32)
        if DROP:
            keep = dropout.keep_rows(low, high, offset, threshold, first_row + row, start, BLOCK_C, VEC)
            x = tl.where(keep, x, 0.0)
        tl.store(run_pointers(y_ptr, row * C, column, VEC), x.to(y_ptr.dtype.element_ty), mask=mask)


@jit
def tile_kernel(
    y_ptr,
    seed_ptr,
    offset: tl.int32,
    threshold: tl.int32,
    queries: tl.int32,
    keys: tl.int32,
    M: tl.constexpr,
    N: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    VEC: tl.constexpr,
):
    """y (heads, queries, keys) says what is kept."""
    row_start, head = tl.program_id(0) * M, tl.program_id(1)
    low, high = dropout.load_seed(seed_ptr)
    for column_start in range(0, keys, N):
        keep = dropout.keep_tile(low, high, offset, threshold, head, row_start, column_start, M, N, TRANSPOSED, VEC)
        if TRANSPOSED:
            keep = tl.trans(keep)
        row, column = row_start + tl.arange(0, M)[:, None], column_start + tl.arange(0, N)[None, :]
        tl.store(y_ptr + (head * queries + row) * keys + column, keep, mask=(row < queries) & (column < keys))


@jit
def pairs_kernel(
    y_ptr,
    seed_ptr,
    offset: tl.int32,
    threshold: tl.int32,
    M: tl.constexpr,
    N: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
):
    """y (M, N), 1 where kept, else 0, by `drop_pairs`."""
    row, column = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :]
    low, high = dropout.load_seed(seed_ptr)
    words, odd = dropout.draw_tile(low, high, offset, 3, 0, 0, M, N, TRANSPOSED)
    if TRANSPOSED:
        x = dropout.drop_pairs(tl.full((N, M), 1.0, y_ptr.dtype.element_ty), words, odd, threshold, NEIGHBOURS)
        x = tl.trans(x)
    else:
        x = dropout.drop_pairs(tl.full((M, N), 1.0, y_ptr.dtype.element_ty), words, odd, threshold, NEIGHBOURS)
    tl.store(y_ptr + row * N + column, x)


@jit
def spread_kernel(y_ptr, SIZE: tl.constexpr, WARPS: tl.constexpr):
    tl.store(y_ptr + tl.arange(0, SIZE), dropout.spread(SIZE, WARPS))


@jit
def attention_kernel(
    q_ptr,
    k_ptr,
    y_ptr,
    seed_ptr,
    keys: tl.int32,
    offset: tl.int32,
    threshold: tl.int32,
    M: tl.constexpr,
    N: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    DROP: tl.constexpr,
):
    """For its machine code only, with 4 warps: a mask between two matmuls."""
    e = tl.arange(0, 32)[None, :]
    first = tl.program_id(0) * M
    q = tl.load(q_ptr + (first + tl.arange(0, M)[:, None]) * 32 + e)
    total = tl.zeros((M, 32), tl.float32)
    low, high = dropout.load_seed(seed_ptr)
    order = dropout.spread(M, 4)
    for start in range(0, keys, N):
        k = tl.load(k_ptr + (start + tl.arange(0, N)[:, None]) * 32 + e)
        scores = tl.dot(q, tl.trans(k))
        weights = scores.to(tl.bfloat16)
        if DROP:
            if TRANSPOSED:  # as where a tile's rows are keys
                words, odd = dropout.draw_tile(low, high, offset, tl.program_id(1), start, first, N, M, True, order)
            else:
                words, odd = dropout.draw_tile(low, high, offset, tl.program_id(1), first, start, M, N, order=order)
            weights = dropout.drop_pairs(weights, words, odd, threshold, "rows" if TRANSPOSED else "columns")
        total += tl.dot(weights, k)
    tl.store(y_ptr + (first + tl.arange(0, M)[:, None]) * 32 + e, total)


def pairs_variant(kind, transposed, neighbours):
    types = (kind, "*i64", "i32", "i32")
    constants = {"M": 32, "N": 64, "TRANSPOSED": transposed, "NEIGHBOURS": neighbours}
    return Variant(pairs_kernel, types, constants, num_warps=1)


def orders(kind):
    """Of tiles and of what a thread has one behind another: any gives the same, whatever it takes."""
    neighbours = ("columns", "rows", "both") if kind == "*fp32" else ("columns", "rows")
    return [(transposed, one) for transposed in (False, True) for one in neighbours]


def seed_of(value):
    return torch.tensor([value], dtype=torch.int64)


def rows_variant(block, tile, kind="*fp32", vector=8):
    types = (kind, kind, "*i64", "i32", "i32", "i64", "i64", "i32")
    return Variant(rows_kernel, types, {"ROWS": tile, "BLOCK_C": block, "VEC": vector}, num_warps=1)


def tile_variant(m, n, transposed, vector):
    types = ("*i1", "*i64", "i32", "i32", "i32", "i32")
    return Variant(tile_kernel, types, {"M": m, "N": n, "TRANSPOSED": transposed, "VEC": vector})


def attention_variant(m, n, transposed):
    types = ("*bf16", "*bf16", "*fp32", "*i64", "i32", "i32", "i32")
    return Variant(attention_kernel, types, {"M": m, "N": n, "TRANSPOSED": transposed})


def kept_rows(seed, offset, p, rows, columns, tile, block, first_row=0, vector=8):
    x, y = torch.ones(rows, columns), torch.full((rows, columns), float("nan"))
    grid = (-(-rows // tile),)
    arguments = (x, y, seed, offset, dropout.threshold(p), rows, first_row, columns)
    launch(rows_variant(block, tile, vector=vector), grid, *arguments)
    return y == 1


def kept_tiles(seed, offset, p, heads, queries, keys, m, n, transposed, vector=8):
    y = torch.zeros(heads, queries, keys, dtype=torch.bool)
    grid = (-(-queries // m), heads)
    launch(tile_variant(m, n, transposed, vector), grid, y, seed, offset, dropout.threshold(p), queries, keys)
    return y


@interpreter_only
@pytest.mark.parametrize(("tile", "block"), [(1, 8), (4, 16), (2, 64)])
def test_row_masks_are_the_twins_whatever_the_tile(interpreter, tile, block):
    seed = seed_of(-(2**62) - 12345)  # both halves, and the sign, matter
    for columns, vector in ((40, 8), (37, 1)):
        expected = keep_mask(seed, 3, 0.3, 1, 7, columns)[0]
        assert torch.equal(kept_rows(seed, 3, 0.3, 7, columns, tile, block, vector=vector), expected)


@interpreter_only
def test_rows_beyond_32_bits_have_masks_of_their_own(interpreter):
    seed = seed_of(5)
    near, far = (kept_rows(seed, 0, 0.5, 4, 64, 4, 64, first_row=first) for first in (0, 1 << 32))
    assert (near != far).float().mean() > 0.3


@interpreter_only
@pytest.mark.parametrize(("transposed", "vector"), [(False, 8), (True, 8), (False, 1)])
@pytest.mark.parametrize(("m", "n"), [(16, 16), (32, 64), (64, 32)])
def test_tile_masks_are_the_twins_whatever_the_tile(interpreter, m, n, transposed, vector):
    seed = seed_of(987654321987654321)
    for p in (0.4, 0.5, 0.8):  # under a bound below zero, at zero, and kept where under it
        expected = keep_mask(seed, 2, p, 2, 50, 70, tiles=True)
        assert torch.equal(kept_tiles(seed, 2, p, 2, 50, 70, m, n, transposed, vector), expected)


@pytest.mark.interpreter
@pytest.mark.parametrize(("size", "warps"), [(128, 4), (256, 4), (32, 1), (64, 4), (128, 0)])
def test_a_spread_tile_has_each_row_once_and_a_threads_four_in_one_call(interpreter, size, warps):
    order = torch.full((size,), -1, dtype=torch.int32)
    launch(Variant(spread_kernel, ("*i32",), {"SIZE": size, "WARPS": warps}), (1,), order)
    assert order.sort().values.tolist() == list(range(size))
    if warps == 0 or size < 32 * warps:
        assert order.tolist() == list(range(size))
    else:  # rows i, i + 8, i + 16 * warps and i + 16 * warps + 8 of an accumulator
        of_threads = order.view(-1, 2, warps, 2, 8).permute(0, 2, 4, 1, 3).reshape(-1, 4)
        assert torch.equal(of_threads - of_threads[:, :1], torch.tensor([[0, 1, 8, 9]]).expand_as(of_threads).int())


@interpreter_only
def test_everything_can_be_dropped_and_almost_nothing(interpreter):
    assert not kept_rows(seed_of(1), 0, 1.0, 8, 64, 8, 64).any()
    assert kept_rows(
        seed_of(1), 0, 1e-9, 8, 64, 8, 64
    ).all()  # rounds to 2**-16: one in 128 such tensors would lose one


@pytest.mark.parametrize("p", [1e-9, 0.1, 0.5, 0.9, 1 - 1e-5, 1.0])
def test_the_scale_keeps_the_expectation_at_the_resolution_of_p(p):
    kept = dropout.kept_steps(p) / dropout.STEPS
    assert abs(1 - kept - p) <= 1 / dropout.STEPS
    assert dropout.scale(p) * kept == pytest.approx(1.0 if kept else 0.0)
    assert -(2**31) <= dropout.threshold(p) < 2**31


@pytest.mark.offline
@pytest.mark.parametrize("p", [1e-5, 0.1, 0.5, 0.51, 0.999, 1.0])
@pytest.mark.parametrize(("dtype", "kind"), [(torch.float32, "*fp32"), (torch.bfloat16, "*bf16")])
def test_pairs_are_dropped_as_the_twin_drops_elements(p, dtype, kind):
    seed = seed_of(24681012141618)
    expected = keep_mask(seed, 1, p, 4, 32, 64, tiles=True)[3].to(dtype)
    for transposed, neighbours in orders(kind):
        found = torch.full((32, 64), float("nan"), dtype=dtype)
        with emulated_gpu():
            launch(pairs_variant(kind, transposed, neighbours), (1,), found, seed, 1, dropout.threshold(p))
        assert torch.equal(found, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize(("dtype", "kind"), [(torch.float32, "*fp32"), (torch.float16, "*fp16")])
def test_on_a_gpu_pairs_are_dropped_as_the_twin_drops_elements(p, dtype, kind):
    if DEVICE.type == "cpu":
        pytest.skip("inline assembly runs on a GPU, and in the emulator (above)")
    seed = seed_of(24681012141618).to(DEVICE)
    expected = keep_mask(seed, 1, p, 4, 32, 64, tiles=True)[3].to(dtype)
    for transposed, neighbours in orders(kind):
        found = torch.full((32, 64), float("nan"), dtype=dtype, device=DEVICE)
        launch(pairs_variant(kind, transposed, neighbours), (1,), found, seed, 1, dropout.threshold(p))
        assert torch.equal(found, expected)


@pytest.mark.offline
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize(
    ("variant", "elements", "most"),
    [
        (rows_variant(256, 8, "*bf16"), 8 * 256, 8.0),
        (rows_variant(256, 4, "*bf16", vector=1), 4 * 256, 14.0),
        (attention_variant(64, 64, False), 64 * 64, 6.0),
        (attention_variant(128, 64, False), 128 * 64, 6.0),
        (attention_variant(128, 32, True), 128 * 32, 5.0),
    ],
    ids=["rows", "rows one by one", "tile", "two tiles", "transposed"],
)
def test_the_elements_of_a_thread_share_philox_calls(target, variant, elements, most):
    """One call an element would add 40 instructions to each."""
    instructions = []
    for drop in (False, True):
        one = dataclasses.replace(variant, constants={**variant.constants, "DROP": drop})
        binary, _, resources = offline.compile_variant(one, target)
        loop = analyse(binary, int(target.removeprefix("sm_")), elements / one.num_warps)
        instructions.append(loop.instructions_per_element)
        assert resources.spills == 0
    assert instructions[1] - instructions[0] <= most * (1.1 if offline.older_compiler() else 1), instructions
