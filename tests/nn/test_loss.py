from __future__ import annotations

import pytest
import torch
from torch import nn as torch_nn

import detr_fast
from detr_fast import nn, use_backend
from detr_fast.dispatch import BackendError
from detr_fast.explanation import explaining
from detr_fast.testing import assert_as_accurate_as_eager

pytestmark = pytest.mark.skipif(
    not hasattr(torch_nn, "LinearCrossEntropyLoss"), reason="this PyTorch has no LinearCrossEntropyLoss"
)

TARGET = torch.tensor([3, -100, 0, 11, 3])
OPTIONS = [
    {},
    {"bias": True, "label_smoothing": 0.1},
    {"reduction": "sum", "weight": torch.linspace(0.1, 2, 12, dtype=torch.float64)},
    {"reduction": "none", "ignore_index": 3},
]


@pytest.mark.parametrize("options", OPTIONS, ids=" ".join)
@pytest.mark.parametrize("backend", [None, {"linear_cross_entropy": "chunked"}], ids=str)
def test_losses_and_gradients_are_torch_nns(backend, options, twins, assert_same_step):
    ours, original = twins("LinearCrossEntropyLoss", 6, 12, **options)
    target = TARGET.clamp(min=0) if "ignore_index" in options else TARGET
    for x, y in ((torch.randn(5, 6), target), (torch.randn(6), target[3])):
        assert_same_step(ours, original, (x.double(),), rtol=1e-10, backend=backend, target=y)


@pytest.mark.interpreter
def test_the_kernel_is_as_accurate_as_torch_nn():
    ours, original = (source.LinearCrossEntropyLoss(6, 12, bias=True) for source in (nn, torch_nn))
    names = list(dict(ours.named_parameters()))

    def run(module, x, *values):
        return torch.func.functional_call(module, dict(zip(names, values)), (x, TARGET))

    def kernel(*tensors):
        with use_backend("triton"), explaining() as records:
            loss = run(ours, *tensors)
        assert [(r.op, r.chosen) for r in records] == [("linear_cross_entropy", "triton")]
        return loss

    parameters = [torch.randn_like(p) for p in original.parameters()]
    inputs = [torch.randn(5, 6), *parameters]
    assert_as_accurate_as_eager(kernel, reference=lambda *t: run(original, *t), inputs=inputs, dtype=torch.float32)


def left_to_torch_nn():
    probabilities = torch.rand(5, 12, dtype=torch.float64).softmax(-1)
    yield {}, torch.randn(5, 6).double(), probabilities, "class probabilities"
    yield {"out_features": (2,)}, torch.randn(5, 6).double(), TARGET[:, None].repeat(1, 2), "out_features"
    chunks = getattr(torch_nn, "LinearCrossEntropyOptions", dict)()
    yield {"options": chunks}, torch.randn(5, 6).double(), TARGET, "options"


@pytest.mark.parametrize(
    ("options", "x", "target", "reason"), [*left_to_torch_nn()], ids=["class probabilities", "out_features", "options"]
)
def test_what_only_torch_nns_forward_takes_runs_there_unless_a_kernel_is_asked_for(
    options, x, target, reason, twins, assert_same_step
):
    ours, original = twins("LinearCrossEntropyLoss", 6, 12, **options)
    assert_same_step(ours, original, (x,), rtol=0, exact=True, target=target)
    with use_backend("triton"), pytest.raises(BackendError, match=f"'triton' but got {reason}"):
        ours(x, target)


@pytest.mark.parametrize(
    ("x", "target"),
    [
        (torch.randn(5, 6), TARGET[:4]),
        (torch.randn(5, 7), TARGET),
        (torch.randn(1, 5, 6), TARGET[None]),
        (torch.randn(5, 6), TARGET.clamp(min=0).int()),
    ],
)
def test_wrong_shapes_and_labels_are_torch_nns_errors(x, target, twins):
    ours, original = twins("LinearCrossEntropyLoss", 6, 12, dtype=torch.float32)
    with pytest.raises((RuntimeError, ValueError)) as theirs:
        original(x, target)
    with pytest.raises(type(theirs.value)) as mine:
        ours(x, target)
    assert str(mine.value) == str(theirs.value)


def test_accelerate_switches_it_and_explain_names_what_runs():
    model = torch_nn.ModuleDict({"head": torch_nn.LinearCrossEntropyLoss(6, 12)})
    detr_fast.accelerate(model)
    with explaining() as records:
        model["head"](torch.randn(5, 6), TARGET)
    assert [(r.op, r.chosen) for r in records] == [("linear_cross_entropy", "eager")]
    detr_fast.restore(model)
    assert type(model["head"]) is torch_nn.LinearCrossEntropyLoss
