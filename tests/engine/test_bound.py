"""What of a model a captured graph is bound to."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from detr_fast.engine.bound import Bound


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.more = nn.Linear(2, 2, bias=False), nn.ModuleList()


@pytest.mark.parametrize(
    "add",
    [
        lambda model: model.more.append(nn.ReLU()),
        lambda model: model.linear.register_parameter("bias", nn.Parameter(torch.ones(2))),
        lambda model: model.linear.register_buffer("scale", torch.ones(2)),
    ],
    ids=["a part of an empty list", "a parameter", "a buffer"],
)
def test_a_graph_is_not_bound_to_a_model_to_which_something_was_added(add: Callable[[nn.Module], None]):
    model = _Model()
    bound = Bound(model)
    before = bound()
    assert bound() == before
    add(model)
    assert bound() != before
