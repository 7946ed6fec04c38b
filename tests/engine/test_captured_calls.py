"""What calls of a captured function may bring and take: each is as an eager call of its own."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from detr_fast.engine.captured import CapturedInference
from detr_fast.engine.graphs import GraphedFunction

CPU = torch.device("cpu")


def test_what_a_caller_takes_out_of_a_result_is_there_in_the_next(emulated):
    model = nn.Linear(3, 2)
    inference = CapturedInference(Several(model))
    x = torch.randn(4, 3)
    for _ in range(4):
        found = inference(x)
        assert torch.equal(found.pop("all"), model(x))
        assert len(found["layers"]) == 2
        found["layers"].clear()
    assert inference.graphs == 1


class Several(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        y = self.inner(x)
        return {"all": y, "layers": [y, y + 1]}


@pytest.mark.parametrize(("first", "second"), [(2, 2.0), (1, True), ([0, 1], (0, 1))], ids=["float", "bool", "tuple"])
def test_arguments_that_compare_equal_and_are_of_other_kinds_have_graphs_of_their_own(first, second, emulated):
    function = (lambda x, index: x[index]) if isinstance(first, list) else torch.mul
    graphed, x = GraphedFunction(function, CPU), torch.arange(6).view(2, 3) > 2
    for value in (first, second, first):
        for _ in range(3):
            expected = function(x, value)
            torch.testing.assert_close(graphed(x, value), expected, rtol=0, atol=0)
    assert graphed.graphs == 2


def test_calls_that_a_mode_or_anomaly_detection_looks_at_run_eagerly(emulated):
    weight = torch.randn(3, 2)
    graphed, x = GraphedFunction(lambda x: x @ weight, CPU), torch.randn(4, 3)
    for _ in range(3):
        graphed(x)
    for _ in range(4):
        with FlopCounterMode(display=False) as counted:
            torch.testing.assert_close(graphed(x), x @ weight)
        assert counted.get_total_flops() == 2 * 2 * 4 * 3 * 2  # of this test's product, too
    for _ in range(4):
        with torch.autograd.set_detect_anomaly(True):
            graphed(torch.randn(5, 3))
    assert graphed.graphs == 1


def test_the_gradient_of_an_argument_is_there_after_each_call(emulated):
    weight = torch.randn(3, requires_grad=True)

    def step(x):
        loss = (x * weight).sum()
        loss.backward()
        return loss.detach()

    graphed = GraphedFunction(step, CPU, before=lambda: setattr(weight, "grad", None))
    with pytest.warns(RuntimeWarning, match="an argument requires a gradient, which"):
        graphed(torch.randn(3, requires_grad=True))
    for _ in range(5):
        x = torch.randn(3, requires_grad=True)
        graphed(x)
        assert torch.equal(x.grad, weight)
    assert graphed.graphs == 0
    for _ in range(4):
        graphed(torch.randn(3))
    assert graphed.graphs == 1


@pytest.mark.parametrize("kind", ["sparse", "nested"])
def test_an_argument_without_strides_leaves_its_calls_eager(kind, emulated):
    dense = torch.randn(4, 3)
    x = dense.to_sparse() if kind == "sparse" else torch.nested.nested_tensor([dense, dense[:2]])
    graphed = GraphedFunction(lambda x: x * 2, CPU)
    with pytest.warns(RuntimeWarning, match="an argument is sparse or nested"):
        graphed(x)
    for _ in range(4):
        found = graphed(x)
        for one, two in zip([found] if kind == "sparse" else found.unbind(), [x] if kind == "sparse" else x.unbind()):
            torch.testing.assert_close(one.to_dense(), two.to_dense() * 2)
    assert graphed.graphs == 0


@pytest.mark.parametrize("setting", ["dtype", "accumulation"], ids=["default dtype", "fp16 accumulation"])
def test_defaults_that_an_eager_call_goes_by_have_graphs_of_their_own(setting, emulated):
    graphed = GraphedFunction(lambda x: torch.ones(2) + 0, CPU)
    x = torch.randn(3)
    matmul = torch.backends.cuda.matmul
    change = {
        "dtype": (torch.get_default_dtype, torch.set_default_dtype, torch.float64),
        "accumulation": (
            lambda: matmul.allow_fp16_accumulation,
            lambda value: setattr(matmul, "allow_fp16_accumulation", value),
            True,
        ),
    }
    read, write, value = change[setting]
    before = read()
    try:
        for now in (before, value):
            write(now)
            for _ in range(3):
                found = graphed(x)
            assert found.dtype == torch.get_default_dtype()
    finally:
        write(before)
    assert graphed.graphs == 2
