from __future__ import annotations

from collections import Counter
from contextlib import nullcontext

import pytest
import torch

import detr_fast
from detr_fast import use_backend

EXACT = 1e-9  # in fp64, relative to the largest element: what differs is the order of sums
# None: torch's own code; the rest: ours. Norms asked for by name are called, not computed with the sum before them.
BACKENDS = [None, {"attention": "sdpa"}, {"attention": "eager", "layer_norm": "eager"}]


@pytest.fixture
def fp64():
    """transformers' losses make class weights and indices of the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def step():
    """One forward and backward: the outputs, and the gradients by parameter name. `call` makes tensors of the model."""

    def run(model, call, backend=None):
        model.zero_grad(set_to_none=True)
        with use_backend(**backend) if backend else nullcontext():
            outputs = call(model)
            generator = torch.Generator().manual_seed(3)
            upstream = [torch.randn(y.shape, generator=generator).to(y.dtype) for y in outputs]
            torch.autograd.backward(outputs, upstream)
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return [y.detach() for y in outputs], gradients

    return run


@pytest.fixture
def assert_unchanged(step):
    """Accelerate a model in fp64 and compare a whole step on each backend with the step before; return the report."""

    def check(model, call, **options):
        model = model.double()
        outputs, gradients = step(model, call)
        report = detr_fast.accelerate(model, **options)
        for backend in BACKENDS:
            found_outputs, found_gradients = step(model, call, backend)
            for found, expected in zip(found_outputs, outputs, strict=True):
                close(found, expected, str(backend))
            assert found_gradients.keys() == gradients.keys()
            largest = max(float(g.abs().max()) for g in gradients.values())
            for name, expected in gradients.items():
                close(found_gradients[name], expected, f"{name} on {backend}", floor=1e-12 * largest)
        return report

    def close(found, expected, what, floor=0.0):
        tolerance = EXACT * float(expected.abs().max()) + floor
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance, msg=lambda m: f"{what}: {m}")

    return check


@pytest.fixture
def calls():
    """How often each linear part of a module is called from then on, by name."""

    def counted(module):
        found = Counter()
        for name, part in module.named_children():
            if isinstance(part, torch.nn.Linear):
                part.register_forward_hook(lambda *_, name=name: found.update([name]))
        return found

    return counted
