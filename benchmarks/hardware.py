"""What GPU tests and benchmarks run on: a GPU; or, in a rehearsal without one, the CPU with everything small.

    DEVICE                    # where tensors lie
    sized(500_000, 300)        # the number for a GPU, and the one for a rehearsal

`DETR_FAST_REHEARSAL=1` makes it a rehearsal: kernels run in Triton's interpreter, and tests/rehearsal.py stands in for what
bodies ask of CUDA itself. Nothing that it measures means anything: it shows that the bodies run, and hold what they assert.
"""

from __future__ import annotations

import os
from typing import TypeVar

import pytest
import torch

REHEARSAL = os.environ.get("DETR_FAST_REHEARSAL") == "1"
DEVICE = torch.device("cpu" if REHEARSAL else "cuda")
T = TypeVar("T")

# The marks of a module that needs a GPU.
NEEDS_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (REHEARSAL or torch.cuda.is_available()), reason="timings need a GPU"),
]


def sized(real: T, small: T) -> T:
    """`real` on a GPU, `small` in a rehearsal."""
    return small if REHEARSAL else real
