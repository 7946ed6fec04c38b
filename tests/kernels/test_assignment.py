"""The assignment kernel: the least total cost, whatever the costs look like."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from detr_fast.kernels import assignment as kernels

from benchmarks.hardware import DEVICE, sized
from detr_fast.testing.assignment import solve_assignments
from detr_fast.testing.interpreter import checked_interpreter

linear_sum_assignment = pytest.importorskip("scipy.optimize").linear_sum_assignment

interpreter = pytest.mark.interpreter


def random_costs(kind, problems, targets, queries, seed=0):
    """Costs of one kind; fp32 values."""
    random = np.random.default_rng((seed, problems, targets, queries))
    cost = random.standard_normal((problems, targets, queries))
    if kind == "ties":
        cost = random.integers(0, 3, cost.shape)
    elif kind == "duplicates":  # equal rows and equal columns
        cost = cost[:, np.arange(targets) // 2][:, :, np.arange(queries) // 3]
    elif kind == "equal":
        cost = np.full(cost.shape, 0.25)
    elif kind == "huge":
        cost = cost * 1e30
    elif kind == "tiny":
        cost = cost * 1e-30
    elif kind == "both":  # a few pairs that must be avoided
        cost = np.where(random.random(cost.shape) < 0.2, 1e8, cost)
    elif kind == "ordered":  # every row prefers the same columns: the longest paths
        cost = np.outer(np.arange(1, targets + 1), np.arange(1, queries + 1))[None] / queries + cost * 1e-3
    return np.ascontiguousarray(cost.astype(np.float32))


KINDS = ["normal", "ties", "duplicates", "equal", "huge", "tiny", "both", "ordered"]


def counts_for(problems, targets, seed=0):
    """No targets, all of them, and numbers between."""
    counts = np.random.default_rng(seed).integers(0, targets + 1, problems)
    counts[:1], counts[1:2] = targets, 0
    return counts


def assert_least_total(cost, counts, query):
    """`query` matches as many rows as it can, no column twice, at SciPy's total."""
    for costs, count, columns in zip(cost.astype(np.float64), counts, query):
        row, best = linear_sum_assignment(costs[:count])
        own = np.flatnonzero(columns >= 0)
        assert len(own) == len(row)
        assert len(np.unique(columns[own])) == len(own)
        assert (own < count).all()
        scale = np.abs(costs[:count]).max(initial=0) * len(row)
        assert costs[own, columns[own]].sum() == pytest.approx(costs[row, best].sum(), rel=1e-9, abs=1e-13 * scale)


def solve(cost, counts):
    return kernels.linear_assignment(torch.from_numpy(cost), torch.from_numpy(counts)).numpy()


# 336 problems; few steps each in most of them, as a step takes the interpreter a millisecond. Square ones need the duals.
@interpreter
@pytest.mark.parametrize("kind", KINDS)
def test_totals_equal_scipys_in_the_interpreter(kind):
    for problems, targets, queries in ((16, 6, 6), (6, 10, 10), (10, 3, 8), (6, 5, 17), (2, 16, 32), (2, 9, 4)):
        cost, counts = random_costs(kind, problems, targets, queries), counts_for(problems, targets)
        if targets == queries:  # every column is wanted: without the right duals, one in ten comes out wrong
            counts[:] = targets
        with checked_interpreter():
            query = solve(cost, counts)
        assert_least_total(cost, counts, query)
        assert np.array_equal(query, solve_assignments(cost, counts))


# 10,236 problems, up to the largest that the kernel takes; "ordered" ones need N² / 2 steps each, so no large ones of them.
@pytest.mark.parametrize("kind", KINDS)
def test_the_twin_finds_scipys_totals(kind):
    sizes = ((1000, 7, 20), (150, 20, 7), (80, 30, 100), (46, 64, 64), (2, 200, 300), (1, 512, 1000), (1, 512, 200))
    for problems, targets, queries in sizes[: 4 if kind == "ordered" else None]:
        cost, counts = random_costs(kind, problems, targets, queries), counts_for(problems, targets)
        assert_least_total(cost, counts, solve_assignments(cost, counts))


def test_a_unique_optimum_is_found_index_by_index():
    cost, counts = random_costs("normal", 200, 20, 50), np.full(200, 20)
    expected = np.stack([linear_sum_assignment(one)[1] for one in cost])
    assert np.array_equal(solve_assignments(cost, counts), expected)


@interpreter
def test_the_kernel_finds_a_unique_optimum_index_by_index():
    cost, counts = random_costs("normal", 4, 8, 20), np.full(4, 8)
    expected = np.stack([linear_sum_assignment(one)[1] for one in cost])
    with checked_interpreter():
        assert np.array_equal(solve(cost, counts), expected)


@interpreter
def test_pairs_with_a_cost_that_is_no_number_come_last():
    cost = random_costs("normal", 3, 3, 6)
    cost[0, :, :3] = np.nan
    cost[1, :, 3:] = np.inf
    cost[2] = np.nan
    counts = np.array([3, 3, 3])
    with checked_interpreter():
        query = solve(cost, counts)
    assert sorted(query[0]) == [3, 4, 5]
    assert sorted(query[1]) == [0, 1, 2]
    assert len(set(query[2])) == 3
    assert np.array_equal(query, solve_assignments(cost, counts))


@interpreter
def test_counts_are_shared_by_all_layers_and_never_leave_the_tensor():
    cost = random_costs("normal", 6, 4, 9)
    with checked_interpreter():
        query = solve(cost, np.array([2, 99, -5]))  # two layers of three images
    assert (query >= 0).sum(1).tolist() == [2, 4, 0, 2, 4, 0]


@pytest.mark.parametrize("shape", [(2, 0, 5), (0, 3, 5), (2, 3, 0)])
def test_empty_problems_have_empty_solutions(shape):
    query = kernels.linear_assignment(torch.zeros(shape), torch.zeros(max(1, shape[0]), dtype=torch.int64))
    assert torch.equal(query, torch.full(shape[:2], -1))


def test_too_many_queries_are_refused():
    with pytest.raises(ValueError, match="1001 queries: the kernel takes 1 to 1000"):
        kernels.linear_assignment(torch.zeros(1, 3, 1001), torch.tensor([3]))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("problems", "targets", "queries"),
    sized(
        [(500, 16, 32), (96, 20, 100), (48, 100, 100), (24, 64, 300), (8, 512, 1000), (8, 512, 200)],
        [(6, 4, 5), (2, 9, 4)],
    ),
)
def test_on_a_gpu_totals_equal_scipys(kind, problems, targets, queries):
    cost, counts = random_costs(kind, problems, targets, queries), counts_for(problems, targets)
    query = kernels.linear_assignment(torch.from_numpy(cost).to(DEVICE), torch.from_numpy(counts).to(DEVICE))
    assert_least_total(cost, counts, query.cpu().numpy())
