from __future__ import annotations

import sys
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.hardware import DEVICE, sized
from detr_fast import dispatch, ops, use_backend
from detr_fast.dispatch import BackendError
from detr_fast.ops import regimes
from detr_fast.ops.regimes import Regime
from detr_fast.testing import assert_as_accurate_as_eager, count

interpreter = pytest.mark.interpreter
module = sys.modules["detr_fast.ops.prediction_heads"]
fp32 = torch.float32


def given(C=32, H=16, D=4, N=9, layers=3, rows=(2, 5), device="cpu", **options):
    """x, weights, biases, and the linear map's weight and bias, or None for both."""
    widths = [C, *[H] * (layers - 1), D]
    weights = [torch.randn(n, k, device=device, **options) / k**0.5 for k, n in pairwise(widths)]
    biases = [torch.randn(n, device=device, **options) for n in widths[1:]]
    beside = (
        [torch.randn(N, C, device=device, **options), torch.randn(N, device=device, **options)] if N else [None] * 2
    )
    return [torch.randn(*rows, C, device=device, **options), *weights, *biases, *beside]


def joined(x, *parameters, sigmoid=True):
    layers = len(parameters[:-2]) // 2
    y, z = ops.prediction_heads(x, parameters[:layers], parameters[layers:-2], *parameters[-2:], sigmoid=sigmoid)
    return y if z is None else torch.cat([y, z], -1)


def ours(*tensors, sigmoid=True, backend="triton"):
    with use_backend(prediction_heads=backend):
        return joined(*tensors, sigmoid=sigmoid)


def eager(x, *parameters, sigmoid=True):
    *parameters, weight, bias = parameters
    layers = len(parameters) // 2
    h = x
    for w, b in zip(parameters[: layers - 1], parameters[layers:-1]):
        h = torch.relu(F.linear(h, w, b))
    y = F.linear(h, parameters[layers - 1], parameters[-1])
    y = y.sigmoid() if sigmoid else y
    return y if weight is None else torch.cat([y, F.linear(x, weight, bias)], -1)


def leaves(tensors):
    return [t.detach().clone().requires_grad_() for t in tensors if t is not None]


@interpreter
@pytest.mark.parametrize(("layers", "classes"), [(3, 9), (3, 0), (2, 9), (2, 0)])
def test_it_is_as_accurate_as_eager(layers, classes):
    assert_as_accurate_as_eager(ours, reference=eager, inputs=given(N=classes, layers=layers), dtype=fp32)


@interpreter
def test_what_needs_no_gradient_gets_none_and_costs_no_launch(interpreter):
    for trained in ("x", "layers"):
        tensors = given()
        for i, t in enumerate(tensors):
            t.requires_grad_((i == 0) == (trained == "x"))
        wanted = [t for t in tensors if t.requires_grad]
        before = interpreter.counts().get("mlp_weights_kernel", 0)
        found, expected = (torch.autograd.grad(f(*tensors).square().sum(), wanted) for f in (ours, eager))
        for a, b in zip(found, expected):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        assert interpreter.counts().get("mlp_weights_kernel", 0) - before == (trained == "layers")


@interpreter
def test_a_gradient_for_boxes_or_classes_alone_is_enough():
    tensors = leaves(given())
    for part in (slice(0, 4), slice(4, None)):
        with use_backend(prediction_heads="triton"):
            found = ops.prediction_heads(tensors[0], tensors[1:4], tensors[4:7], *tensors[7:])
        one = found[0] if part.start == 0 else found[1]
        gradients = torch.autograd.grad(one.sum(), tensors, allow_unused=True)
        expected = torch.autograd.grad(eager(*tensors, sigmoid=False)[..., part].sum(), tensors, materialize_grads=True)
        for a, b in zip(gradients, expected):
            torch.testing.assert_close(a, b)


@interpreter
def test_the_backward_can_be_differentiated():
    found = []
    for function in (ours, eager):
        torch.manual_seed(1)
        tensors = leaves(given())
        first = torch.autograd.grad(function(*tensors).square().sum(), tensors, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), tensors))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@interpreter
@pytest.mark.parametrize(("layers", "classes"), [(3, 9), (2, 0)])
def test_opcheck_accepts_both_ops(layers, classes):
    x, *parameters = (None if t is None else t.requires_grad_() for t in given(layers=layers, N=classes))
    weights, biases, beside = parameters[:layers], parameters[layers:-2], parameters[-2:]
    middle = [weights[1], biases[1]] if layers == 3 else [None, None]
    flat = [weights[0], biases[0], *middle, weights[-1], biases[-1], *beside]
    torch.library.opcheck(torch.ops.detr_fast.prediction_heads.default, (x, *flat, True))
    with torch.no_grad():
        y, z, h1, h2 = module._forward(x, *flat, True)
    rest = [None if t is None else t.detach() for t in (x, h1, h2 if layers == 3 else None, y, *flat)]
    arguments = (y, z if classes else None, *rest, [True, True])
    torch.library.opcheck(torch.ops.detr_fast.prediction_heads_backward.default, arguments)


@interpreter
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_it_compiles_without_a_graph_break(backend):
    tensors, others = (leaves(given()) for _ in range(2))
    for a, b in zip(tensors, others):
        b.data.copy_(a)
    compiled = torch.compile(joined, backend=backend, fullgraph=True)
    with use_backend(prediction_heads="triton"):
        y, expected = compiled(*tensors), eager(*others)
    torch.testing.assert_close(y, expected)
    for a, b in zip(torch.autograd.grad(y.sum(), tensors), torch.autograd.grad(expected.sum(), others)):
        torch.testing.assert_close(a, b)


def test_detrs_heads_take_four_launches_forward_and_backward():
    x, *layers = (t.requires_grad_() for t in leaves(given(256, 256, 4, 92, rows=(6, 4, 100), device="meta")))

    def step(backend):
        with use_backend(prediction_heads=backend):
            y, z = ops.prediction_heads(x, layers[:3], layers[3:6], *layers[6:], sigmoid=True)
        torch.autograd.backward([y, z], [torch.empty_like(y), torch.empty_like(z)])

    found = count(lambda: step("triton"))
    kernels = ("mlp_forward_kernel", "mlp_backward_kernel", "mlp_weights_kernel", "sum_partials_kernel")
    assert found.launches == dict.fromkeys(kernels, 1)
    assert found.total_launches == 4 < count(lambda: step("eager")).total_launches / 5


def chosen(*tensors, context=None):
    """The decision of `auto` on fake tensors of a GPU."""
    told = []
    with FakeTensorMode() as mode, dispatch.recording(lambda _, one: told.append(one)):
        placed = [None if t is None else mode.from_tensor(t).to("cuda") for t in tensors]
        ours(*placed, backend="auto")
    return told[-1]


def test_auto_stays_with_pytorch_until_this_very_architecture_was_measured(monkeypatch, unmeasured):
    tensors = given(256, 256, 4, 92, rows=(6, 4, 100))
    found = chosen(*tensors)
    assert found.implementation.name == "eager"
    assert "eager until measured: run detr-fast tune" in found.reasons["triton"]
    for architecture, name in (("sm_80", "eager"), ("sm_90", "triton")):
        entry = Regime("prediction_heads", architecture, 0, 0, "a test")
        monkeypatch.setattr(regimes, "SHIPPED", (entry,))
        regimes.known.cache_clear()
        dispatch.forget_decisions()
        assert chosen(*tensors).implementation.name == name


def test_where_tf32_is_allowed_auto_leaves_it_to_pytorch(monkeypatch, unmeasured):
    monkeypatch.setattr(regimes, "SHIPPED", (Regime("prediction_heads", "sm_90", 0, 0, "a test"),))
    regimes.known.cache_clear()
    dispatch.forget_decisions()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        found = chosen(*given())
    finally:
        torch.set_float32_matmul_precision(before)
    assert "tf32 products, which were never measured" in found.reasons["triton"]


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        (given(dtype=torch.bfloat16), "bfloat16 inputs: it takes float32"),
        (given(C=520), "layers of 4 to 520 columns: it takes 1 to 512"),
        ([*given()[:4], None, *given()[5:]], "a layer has no bias"),
        ([given()[0].half(), *given()[1:]], "float16 inputs: it takes float32"),
        ([given()[0], given()[1].half(), *given()[2:]], "torch.float16 beside torch.float32 inputs"),
    ],
)
def test_what_the_kernels_cannot_take_is_refused_in_words(tensors, reason):
    with pytest.raises(BackendError, match=reason), FakeTensorMode() as mode:
        ours(*(None if t is None else mode.from_tensor(t).to("cuda") for t in tensors))


def test_hidden_layers_of_two_widths_are_refused_in_words():
    tensors = given()
    tensors[2], tensors[5], tensors[3] = torch.randn(12, 16), torch.randn(12), torch.randn(4, 12)
    torch.testing.assert_close(ours(*tensors, backend="auto"), eager(*tensors))
    reason = "16 and 12 hidden units: it takes layers of one width"
    with pytest.raises(BackendError, match=reason), FakeTensorMode() as mode:
        ours(*(mode.from_tensor(t).to("cuda") for t in tensors))


@interpreter
def test_under_autocast_it_is_pytorchs_products_in_16_bits():
    tensors = given()
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(*tensors, backend="auto").dtype is torch.bfloat16
        with pytest.raises(BackendError, match=r"autocast to torch\.bfloat16: it is for heads that are kept in fp32"):
            ours(*tensors)


def test_another_number_of_layers_is_refused():
    x, w, b = torch.zeros(2, 8), torch.zeros(8, 8), torch.zeros(8)
    for weights, biases in (([w], [b]), ([w] * 4, [b] * 4), ([w] * 3, [b] * 2)):
        with pytest.raises(
            ValueError, match=f"got {len(weights)} weights and {len(biases)} biases; expected two or three"
        ):
            ops.prediction_heads(x, weights, biases)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        ops.prediction_heads(x, [w, torch.zeros(8, 7)], [b, b])


@pytest.mark.gpu
@pytest.mark.parametrize(("layers", "classes"), [(3, 92), (2, 0)])
@pytest.mark.parametrize("columns", [256, 101])
def test_on_a_gpu_it_is_as_accurate_as_eager(layers, classes, columns):
    tensors = given(columns, sized(columns, 40), 4, classes, layers, rows=(sized(2400, 3),), device=DEVICE)
    assert_as_accurate_as_eager(ours, reference=eager, inputs=tensors, dtype=fp32)
