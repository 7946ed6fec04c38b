# mypy: allow-incomplete-defs
"""Linear assignment by shortest augmenting paths, one problem a program, all of its state in registers.

Each row (a target) gets a column of its own (a query), so that the sum of their costs is the least possible. Rows are
added one by one. From a new row, Dijkstra's search walks over reduced costs `cost[i, j] - u[i] - v[j]` to the nearest
free column; then the dual variables are updated, and rows change columns along the path found.

Only the columns have state: v, the path's length and last step, and the row that owns them. u needs none: an owned
column's reduced cost is 0, so u[i] = cost[i, j] - v[j]. What threads tell each other goes through reductions, whose
barriers the compiler places. Distances and duals are fp64; costs are read as fp32. Of pairs whose cost is infinite or no number
as few as possible are made, and the others at the least total.

Where there are more targets than queries, rows and columns change roles, problem by problem.
Source: Jonker and Volgenant, 1987, "A shortest augmenting path algorithm for dense and sparse linear assignment problems",
Computing 38; rectangular as Crouse, 2016, "On implementing 2D rectangular assignment algorithms", IEEE TAES 52(4).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial

import torch
from torch import Tensor

from .configs import ASSIGNMENT_WARPS
from .entry import Budget, Entry
from .launch import Variant, compile_variant, empty, jit, launch, pointer, tl
from .overlap import wait_for_previous

MAX_QUERIES = 1000
MAX_TARGETS = 512


@jit
def linear_assignment_kernel(
    cost_ptr,
    count_ptr,
    query_ptr,
    images: tl.int32,
    targets: tl.int32,
    queries: tl.int32,
    BLOCK: tl.constexpr,
):
    """cost (problems, targets, queries), count (images,) int64 -> query (problems, targets) int64."""
    wait_for_previous()
    problem = tl.program_id(0).to(tl.int64)
    count = tl.load(count_ptr + problem % images)
    count = tl.minimum(tl.maximum(count, 0), targets.to(tl.int64)).to(tl.int32)
    cost_ptr += problem * targets * queries
    flipped = count > queries
    rows = tl.where(flipped, queries, count)
    columns = tl.where(flipped, count, queries)
    row_stride = tl.where(flipped, 1, queries)
    column_stride = tl.where(flipped, queries, 1)

    column = tl.arange(0, BLOCK)
    exists = column < columns
    owner = tl.full((BLOCK,), -1, tl.int32)
    # What a cost counts as that is infinite or no number. Where such a pair had to be made, the other costs' differences were lost
    # in the lengths of paths: the problem is solved once more, with less.
    limit = tl.full((), 3.4028234663852886e38, tl.float32)
    attempts = tl.full((), 0, tl.int32)
    while attempts < 2:
        owner = _solved(cost_ptr, rows, row_stride, column, column_stride, exists, limit, BLOCK)
        attempts += 2
        if limit > 3.3e38:
            made = tl.load(cost_ptr + owner * row_stride + column * column_stride, mask=owner >= 0, other=0.0)
            if tl.min((tl.abs(made) < float("inf")).to(tl.int32), axis=0) == 0:
                limit = _over_all(cost_ptr, rows, row_stride, column * column_stride, exists, BLOCK)
                attempts = 0

    query_ptr += problem * targets
    if flipped:
        tl.store(query_ptr + column, owner.to(tl.int64), mask=exists)
    else:
        tl.store(query_ptr + owner, column.to(tl.int64), mask=owner >= 0)
    nothing = tl.full((BLOCK,), -1, tl.int64)
    tl.store(query_ptr + column, nothing, mask=(column >= count) & (column < targets))


@jit
def _solved(cost_ptr, rows, row_stride, column, column_stride, exists, limit, BLOCK: tl.constexpr):
    """The row that owns each column, -1 for none."""
    v = tl.zeros((BLOCK,), tl.float64)
    owner = tl.full((BLOCK,), -1, tl.int32)
    for new_row in range(rows):
        shortest = tl.full((BLOCK,), float("inf"), tl.float64)
        trail = tl.zeros((BLOCK,), tl.uint32)  # (the column before) + 1, and in 10 bits the row that leads on from it
        opened = exists  # not reached for good
        row, reached = tl.full((), 0, tl.int32) + new_row, tl.full((), -1, tl.int32)
        nearest = tl.full((), 0, tl.float64)
        length = tl.full((), 0, tl.float64)  # of the path to `row`, less the row's dual
        while row >= 0:
            cost = tl.load(cost_ptr + row * row_stride + column * column_stride, mask=exists, other=0.0)
            distance = length + (_as_finite(cost, limit).to(tl.float64) - v)
            nearer = opened & (distance < shortest)
            shortest = tl.where(nearer, distance, shortest)
            trail = tl.where(nearer, _packed(reached + 1, row), trail)
            nearest = tl.min(tl.where(opened, shortest, float("inf")), axis=0)
            # Of several nearest columns a free one, else the first; its owner comes along in the lowest bits.
            place = _packed((owner >= 0).to(tl.int32) * 1024 + column, owner + 1)
            found = tl.min(tl.where(opened & (shortest == nearest), place, 0xFFFFFFFF), axis=0)
            reached = ((found >> 10) & 1023).to(tl.int32)
            row = (found & 1023).to(tl.int32) - 1
            here = column == reached
            opened = opened & (column != reached)
            own = _as_finite(tl.load(cost_ptr + tl.maximum(row, 0) * row_stride + reached * column_stride), limit)
            length = nearest - (own.to(tl.float64) - tl.sum(tl.where(here, v, 0.0), axis=0))
        v = tl.where(exists & (opened == 0), v + (shortest - nearest), v)
        while reached >= 0:
            step = tl.sum(tl.where(column == reached, trail, 0), axis=0)
            owner = tl.where(column == reached, (step & 1023).to(tl.int32), owner)
            reached = (step >> 10).to(tl.int32) - 1
    return owner


@jit
def _packed(high, low):
    """Two numbers in one, of which `low` has 10 bits: one reduction then finds both."""
    return (high.to(tl.uint32) << 10) | low.to(tl.uint32)


@jit
def _as_finite(cost, limit):
    """NaN counts as the limit; infinities as the limit and its negative."""
    cost = tl.where(cost == cost, cost, limit)
    return tl.minimum(tl.maximum(cost, -limit), limit)


@jit
def _over_all(cost_ptr, rows, row_stride, places, exists, BLOCK: tl.constexpr):
    """A number for costs that are none: an assignment with fewer of them costs less, whatever its finite costs are."""
    largest = tl.zeros((BLOCK,), tl.float32)
    for row in range(rows):
        size = tl.abs(tl.load(cost_ptr + row * row_stride + places, mask=exists, other=0.0))
        largest = tl.where(size < float("inf"), tl.maximum(largest, size), largest)  # NaN is not less
    most = tl.max(largest, axis=0)
    return tl.where(most > 0.0, tl.minimum(most * (2 * rows + 1).to(tl.float32), 3.3e38), 1.0)


def linear_assignment(cost: Tensor, counts: Tensor) -> Tensor:
    """The column of each row with the least total cost.

    cost: (problems, N, Q) fp32, N up to 512 and Q up to 1,000. counts: (images,) int64, the rows that take part, of
    problem p at p % images. Returns (problems, N) int64, -1 where a row has no column.
    Raises ValueError for another size.
    """
    problems, targets, queries = cost.shape
    query = empty((problems, targets), torch.int64, cost.device)
    if query.numel() == 0 or queries == 0:
        return query.fill_(-1)
    variant = assignment_variant(max(targets, queries))
    launch(variant, (problems,), cost.contiguous(), counts.contiguous(), query, counts.shape[0], targets, queries)
    return query


def compile_linear_assignment(targets: int, queries: int, device: torch.device) -> None:
    """Compile what `linear_assignment` launches for such problems."""
    if targets and queries:
        compile_variant(assignment_variant(max(targets, queries)), device)


@cache
def assignment_variant(longest: int) -> Variant:
    """The program for problems whose longer side has up to `longest` entries."""
    if longest > MAX_QUERIES:
        raise ValueError(f"{longest} queries: the kernel takes 1 to {MAX_QUERIES}; use 'threads'")
    block = max(32, 1 << (longest - 1).bit_length())
    types = (*map(pointer, (torch.float32, torch.int64, torch.int64)), "i32", "i32", "i32")
    return Variant(linear_assignment_kernel, types, {"BLOCK": block}, ASSIGNMENT_WARPS[block])


def catalog_entries() -> Iterator[Entry]:
    variant = assignment_variant(MAX_QUERIES)  # of all sizes the one with the most state a lane
    elements, example = int(variant.constants["BLOCK"]), partial(_example, MAX_QUERIES)
    yield Entry("linear_assignment", "linear_assignment_q1000", variant, elements, Budget(152, 64, 96, 64), example)


def _example(queries: int, device: torch.device) -> Callable[[], tuple[Tensor, ...]]:
    """Two layers of two images, one without targets."""
    cost, counts = torch.randn(4, 3, queries, device=device), torch.tensor([3, 0], device=device)
    return lambda: (linear_assignment(cost, counts),)
