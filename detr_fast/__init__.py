"""detr-fast: fused Triton kernels for DETR and every transformer built from torch.nn parts."""

from __future__ import annotations

__version__ = "0.1.0"
