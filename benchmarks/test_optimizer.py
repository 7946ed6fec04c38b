"""Clipping and AdamW of all of DETR-R50's parameters, fp32, beside PyTorch's fused one.

python -m pytest benchmarks/test_optimizer.py          # needs a GPU
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor

from benchmarks.hardware import DEVICE, NEEDS_GPU, sized
from benchmarks.timing import Claim, compare
from detr_fast import ops, use_backend
from detr_fast.models import ModelConfig, build_model

pytestmark = NEEDS_GPU

MAX_NORM = 0.1


def shapes() -> list[torch.Size]:
    with torch.device("meta"):
        model = build_model(ModelConfig(num_classes=91))
    return [p.shape for p in model.parameters() if p.requires_grad]


SHAPES = sized(shapes, lambda: [torch.Size(shape) for shape in ((70,), (5, 7), (3,))])()


class Training:
    """Parameters with gradients, and their optimizer; what is the same for all peers begins alike."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        drawn = [torch.randn(shape, device=DEVICE).to(dtype) for shape in SHAPES]
        self.parameters = [t.requires_grad_() for t in drawn]
        self.gradients = [torch.randn(shape, device=DEVICE).to(dtype) for shape in SHAPES]
        for parameter, gradient in zip(self.parameters, self.gradients):
            parameter.grad = gradient.clone()
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, weight_decay=1e-4, fused=True, capturable=True)

    def step(self, clips: bool) -> Sequence[Tensor]:
        ops.optimizer_step(self.optimizer, self.parameters, MAX_NORM if clips else 0.0)
        return []

    def results(self, clips: bool) -> list[Tensor]:
        """After two steps by the same gradients."""
        for _ in range(2):
            for parameter, gradient in zip(self.parameters, self.gradients):  # PyTorch's clipping wrote to the last one
                parameter.grad = gradient.clone()
            self.step(clips)
        states = [self.optimizer.state[p] for p in self.parameters]
        moments = [[state[name] for state in states] for name in ("exp_avg", "exp_avg_sq")]
        return [torch.cat([t.detach().flatten() for t in tensors]) for tensors in (self.parameters, *moments)]


def on(backend: str, call: Callable[[], Sequence[Tensor]]) -> Callable[[], Sequence[Tensor]]:
    return use_backend(optimizer_step=backend)(call)


@pytest.mark.parametrize("clips", [True, False], ids=["clipping", "no clipping"])
def test_optimizer_step(clips: bool) -> None:
    def fresh(backend: str, dtype: torch.dtype = torch.float32) -> Callable[[], Sequence[Tensor]]:
        return lambda: on(backend, partial(Training(dtype).results, clips))()

    backends = "auto", "triton", "eager"
    peers = {name: on(name, partial(Training().step, clips)) for name in backends}
    count = sum(shape.numel() for shape in SHAPES)
    compare(
        f"{'clipping and ' * clips}AdamW of {count:,} parameters in {len(SHAPES)} tensors, fp32",
        peers,
        eager=fresh("eager"),
        truth=fresh("eager", torch.float64),
        checks={name: fresh(name) for name in backends},
        claims=[Claim("clipping and AdamW: over PyTorch's fused", ("eager",), 1.3, "triton", ("graph",))] * clips,
        moves=count * 4 * (8 if clips else 7),
    )
