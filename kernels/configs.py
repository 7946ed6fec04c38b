"""Launch configurations: frozen data, each with the static analysis or the measurement behind it.

Figures come from machine code compiled offline (`kernels/analysis.py`); no entry is measured on a GPU yet.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RowConfig:
    """How a row-wise kernel lies on the machine.

    rows: rows a tile; num_warps: warps a program; programs: programs per multiprocessor of a persistent kernel.
    """

    rows: int
    num_warps: int
    programs: int = 0


# Keyed by BLOCK_C, the number of columns rounded up to a power of two. A warp owns whole rows up to C = 1,024, so that
# reductions need shuffles only; beyond, a row spreads over warps at 32 elements a lane.
LAYER_NORM_FORWARD = {
    16: RowConfig(rows=128, num_warps=4),
    32: RowConfig(rows=128, num_warps=4),
    64: RowConfig(rows=64, num_warps=4),
    128: RowConfig(rows=32, num_warps=4),
    256: RowConfig(rows=16, num_warps=4),
    512: RowConfig(rows=8, num_warps=4),
    1024: RowConfig(rows=4, num_warps=4),
    2048: RowConfig(rows=1, num_warps=2),
    4096: RowConfig(rows=1, num_warps=4),
    8192: RowConfig(rows=1, num_warps=8),
}

# The backward holds the weight and bias gradients of every column in registers over its loop, so it has fewer rows a
# tile, and two wide programs per multiprocessor rather than many narrow ones: each writes one row of partial sums.
LAYER_NORM_BACKWARD = {
    16: RowConfig(rows=128, num_warps=8, programs=2),
    32: RowConfig(rows=64, num_warps=8, programs=2),
    64: RowConfig(rows=32, num_warps=8, programs=2),
    128: RowConfig(rows=32, num_warps=8, programs=2),
    256: RowConfig(rows=16, num_warps=8, programs=2),
    512: RowConfig(rows=8, num_warps=8, programs=2),
    1024: RowConfig(rows=4, num_warps=8, programs=2),
    2048: RowConfig(rows=1, num_warps=4, programs=4),
    4096: RowConfig(rows=1, num_warps=8, programs=2),
    8192: RowConfig(rows=1, num_warps=16, programs=1),
}
