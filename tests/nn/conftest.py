from __future__ import annotations

import pytest
import torch
from torch import nn as torch_nn

from detr_fast import nn


@pytest.fixture
def twins():
    """Make one of our modules and torch.nn's with the same, non-trivial parameters: `twins("LayerNorm", 16)`."""

    def make(name, *args, dtype=torch.float64, **kwargs):
        ours = getattr(nn, name)(*args, dtype=dtype, **kwargs)
        original = getattr(torch_nn, name)(*args, dtype=dtype, **kwargs)
        with torch.no_grad():
            for parameter in original.parameters():  # torch starts biases at 0, which would hide a lost one
                if parameter.ndim == 1 or parameter.abs().max() == 0:
                    parameter.uniform_(-0.5, 0.5)
        ours.load_state_dict(original.state_dict())
        return ours, original

    return make


@pytest.fixture
def assert_same_step():
    """Compare outputs, and the gradients of inputs and parameters, of both modules on the same inputs and masks."""

    def check(ours, original, inputs, *, rtol, exact=False, backend=None, **kwargs):
        from contextlib import nullcontext

        from detr_fast import use_backend

        found, expected = [], []
        for module, results in ((ours, found), (original, expected)):
            leaves: dict[int, torch.Tensor] = {}  # a tensor that is given twice stays one tensor
            arguments = [leaves.setdefault(id(t), t.detach().requires_grad_()) for t in inputs]
            module.zero_grad(set_to_none=True)
            with use_backend(**backend) if module is ours and backend else nullcontext():
                outputs = module(*arguments, **kwargs)
                outputs = [y for y in (outputs if isinstance(outputs, tuple) else (outputs,)) if y is not None]
                generator = torch.Generator().manual_seed(3)
                upstream = [torch.randn(y.shape, generator=generator, dtype=y.dtype) for y in outputs]
                torch.autograd.backward(outputs, upstream)
            results += outputs
            results += [leaf.grad for leaf in leaves.values()]
            results += [p.grad for p in module.parameters()]
        assert len(found) == len(expected)
        for mine, theirs in zip(found, expected):
            assert (mine is None) == (theirs is None)
            if theirs is None:
                continue
            if exact:
                assert torch.equal(mine, theirs)
            else:
                torch.testing.assert_close(mine, theirs, rtol=rtol, atol=rtol)

    return check
