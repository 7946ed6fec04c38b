"""The assignment kernel's algorithm in NumPy, for a whole batch of problems at once: its twin, name by name.

Triton's interpreter takes a millisecond for each step of the kernel; this takes many thousands of problems of all sizes.
"""

from __future__ import annotations

import numpy as np

Array = np.ndarray


def solve_assignments(cost: Array, counts: Array) -> Array:
    """What `kernels.assignment.linear_assignment` returns: cost (P, N, Q), counts (P,) -> (P, N) int64, -1 for none."""
    problems, targets, queries = cost.shape
    query = np.full((problems, targets), -1, np.int64)
    if query.size == 0 or queries == 0:
        return query
    counts = np.clip(counts, 0, targets)
    taking_part = np.arange(targets)[:, None] < counts[:, None, None]
    sizes = np.where(np.isfinite(cost) & taking_part, np.abs(cost), 0.0).max(axis=(1, 2))
    limits = sizes * (2 * np.minimum(counts, queries) + 1).astype(np.float32)
    limits = np.where(sizes > 0, np.minimum(limits, np.float32(3.3e38)), 1.0)[:, None, None]
    cost = np.clip(np.where(np.isnan(cost), limits, cost), -limits, limits).astype(np.float64)
    for flipped in (False, True):
        which = np.flatnonzero((counts > queries) == flipped)
        costs = cost[which].transpose(0, 2, 1) if flipped else cost[which]
        rows, columns = counts[which], np.full(len(which), queries)
        owner = _augment(costs, columns, rows) if flipped else _augment(costs, rows, columns)
        problem, column = np.nonzero(owner >= 0)
        row = owner[problem, column]
        query[which[problem], column if flipped else row] = row if flipped else column
    return query


def _augment(cost: Array, rows: Array, columns: Array) -> Array:
    """The row that owns each column, (P, Q), -1 for none, of problems with `rows` <= `columns` entries."""
    problems, _, width = cost.shape
    column = np.arange(width)
    exists = column < columns.reshape(-1, 1)
    v = np.zeros((problems, width))
    owner = np.full((problems, width), -1)
    for new_row in range(int(rows.max(initial=0))):
        shortest = np.full((problems, width), np.inf)
        trail = np.zeros((problems, width), np.int64)
        opened = exists.copy()
        row = np.where(new_row < rows, new_row, -1)
        reached, nearest, length = np.full(problems, -1), np.zeros(problems), np.zeros(problems)
        while (row >= 0).any():
            p = np.flatnonzero(row >= 0)  # the problems whose search goes on
            distance = length[p, None] + (cost[p, row[p]] - v[p])
            nearer = opened[p] & (distance < shortest[p])
            shortest[p] = np.where(nearer, distance, shortest[p])
            trail[p] = np.where(nearer, ((reached[p, None] + 1) << 10) | row[p, None], trail[p])
            open_lengths = np.where(opened[p], shortest[p], np.inf)
            nearest[p] = open_lengths.min(axis=1)
            place = ((owner[p] >= 0).astype(np.int64) << 20) | (column << 10) | (owner[p] + 1)
            found = np.where(opened[p] & (shortest[p] == nearest[p, None]), place, 0x7FFFFFFF).min(axis=1)
            reached[p] = (found >> 10) & 1023
            row[p] = (found & 1023) - 1
            opened[p, reached[p]] = False
            length[p] = nearest[p] - (cost[p, np.maximum(row[p], 0), reached[p]] - v[p, reached[p]])
        v = np.where(exists & ~opened, v + (shortest - nearest[:, None]), v)
        while (reached >= 0).any():
            p = np.flatnonzero(reached >= 0)
            step = trail[p, reached[p]]
            owner[p, reached[p]] = step & 1023
            reached[p] = (step >> 10) - 1
    return owner
