"""Casting all weights that DETR-R50's products read to bf16, and their gradients back, beside PyTorch's copies.

python -m pytest benchmarks/test_casts.py          # needs a GPU
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from benchmarks.hardware import DEVICE, NEEDS_GPU, sized
from benchmarks.timing import Claim, compare
from detr_fast import ops, use_backend
from detr_fast.models import ModelConfig, build_model

pytestmark = NEEDS_GPU


def shapes() -> list[torch.Size]:
    """Of convolutions, and of the encoder's and decoder's products."""
    with torch.device("meta"):
        model = build_model(ModelConfig(num_classes=91))
    convolutions = [part.weight.shape for part in model.backbone.modules() if isinstance(part, nn.Conv2d)]
    products = [p.shape for name, p in model.transformer.named_parameters() if "norm" not in name]
    return [*convolutions, *products]


SHAPES = sized(shapes, lambda: [torch.Size(shape) for shape in ((70,), (5, 8, 3, 3), (3,))])()
LAST = torch.channels_last


@pytest.mark.parametrize("back", [False, True], ids=["weights", "gradients"])
def test_casts(back: bool) -> None:
    torch.manual_seed(0)
    drawn = [torch.randn(shape, device=DEVICE) for shape in SHAPES]
    if back:
        drawn = [t.bfloat16() for t in drawn]
        drawn = [t.contiguous(memory_format=LAST) if t.ndim == 4 else t for t in drawn]
    dtype = torch.float32 if back else torch.bfloat16

    def on(backend: str, dtype: torch.dtype = dtype) -> Callable[[], Sequence[Tensor]]:
        return use_backend(cast_together=backend)(lambda: ops.cast_together(drawn, dtype, not back))

    count = sum(shape.numel() for shape in SHAPES)
    compare(
        f"{'gradients of ' * back}{count:,} weights in {len(SHAPES)} tensors, {'bf16 to fp32' if back else 'fp32 to bf16'}",
        {name: on(name) for name in ("auto", "triton", "eager")},
        eager=on("eager"),
        truth=on("eager", torch.float64),
        claims=[
            Claim("casts of a training step's weights: over PyTorch's copies", ("eager",), 2.0, "triton", ("graph",))
        ],
        moves=6 * count,
    )
