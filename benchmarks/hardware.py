"""What GPU tests and benchmarks run on: a GPU; or, in a rehearsal without one, the CPU with everything small.

    DEVICE                    # where tensors lie
    sized(500_000, 300)        # the number for a GPU, and the one for a rehearsal

`DETR_FAST_REHEARSAL=1` makes it a rehearsal: kernels run in Triton's interpreter, and tests/rehearsal.py stands in for what
bodies ask of CUDA itself. Nothing that it measures means anything: it shows that the bodies run, and hold what they assert.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TypeVar

import pytest
import torch
from torch import Tensor

REHEARSAL = os.environ.get("DETR_FAST_REHEARSAL") == "1"
DEVICE = torch.device("cpu" if REHEARSAL else "cuda")
T = TypeVar("T")

# The marks of a module that needs a GPU.
NEEDS_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (REHEARSAL or torch.cuda.is_available()), reason="timings need a GPU"),
]


def check(
    peer: str, found: Iterable[Tensor], eager: Iterable[Tensor], truth: Iterable[Tensor], beyond: float = 0.01
) -> None:
    """Refuse to time a wrong result: at most twice eager's error against fp64, and `beyond`.

    Beside eager alone, a ReLU that bf16 rounds to the other side of zero would count as ours.
    """
    for number, (ours, theirs, right) in enumerate(zip(found, eager, truth)):
        error, allowed = (((t.double() - right).norm() / right.norm()).item() for t in (ours, theirs))
        assert error <= 2 * allowed + sized(beyond, 0.2), (  # of few activations, one is a tenth
            f"{peer} is wrong (result {number}: relative error {error:.2e}, eager's {allowed:.2e}): not timed"
        )


def sized(real: T, small: T) -> T:
    """`real` on a GPU, `small` in a rehearsal."""
    return small if REHEARSAL else real
