from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F

from benchmarks.hardware import DEVICE, sized
from detr_fast import ops
from detr_fast.dispatch import use_backend
from detr_fast.testing import assert_as_accurate_as_eager
from detr_fast.testing.counters import count
from detr_fast.testing.interpreter import checked_interpreter

module = sys.modules["detr_fast.ops.linear_cross_entropy"]
blocks = sys.modules["detr_fast.ops.linear_probabilities"]
interpreter = pytest.mark.interpreter


@pytest.fixture
def chunked(monkeypatch):
    """Blocks of five rows, or of that many columns where the vocabulary is cut."""
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 5 * 13)
    with use_backend(linear_cross_entropy="chunked"):
        yield


@pytest.fixture
def triton(monkeypatch):
    """The kernel in the interpreter, on blocks of five rows."""
    monkeypatch.setattr(module, "BLOCK_ROWS", 5)
    monkeypatch.setattr(module, "BLOCK_BYTES", 0)
    with use_backend(linear_cross_entropy="triton"), checked_interpreter():
        yield


def inputs(rows=17, features=6, classes=13, ignored=True):
    target = torch.randint(0, classes, (rows,))
    if ignored:
        target[::4] = -100
    return [torch.randn(rows, features), torch.randn(classes, features), torch.randn(classes), target]


def reference(x, weight, bias, target, **options):
    if "class_weight" in options:
        options["weight"] = options.pop("class_weight").to(x.dtype)
    return F.cross_entropy(F.linear(x, weight, bias), target, **options)


OPTIONS = [
    {},
    {"reduction": "sum"},
    {"reduction": "none"},
    {"label_smoothing": 0.1},
    {"class_weight": torch.linspace(0.1, 2, 13)},
    {"class_weight": torch.linspace(0.1, 2, 13), "label_smoothing": 0.3, "reduction": "none"},
    {"class_weight": torch.linspace(0, 2, 13), "label_smoothing": 0.3},
    {"ignore_index": 3, "label_smoothing": 1.0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(options) or "defaults")
def test_losses_and_gradients_are_as_accurate_as_eager(chunked, options):
    ignored = "ignore_index" not in options
    assert_as_accurate_as_eager(
        lambda *v: ops.linear_cross_entropy(*v, **options),
        reference=lambda *v: reference(*v, **options),
        inputs=inputs(ignored=ignored),
        dtype=torch.float32,
    )


@interpreter
@pytest.mark.parametrize("backend", ["eager", "chunked", "triton"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_rows_that_are_ignored_leave_the_loss_as_it_is_even_if_they_are_nan(backend, label_smoothing):
    x, weight, bias, target = inputs(rows=5)
    with use_backend(linear_cross_entropy=backend):
        expected = ops.linear_cross_entropy(x, weight, bias, target, label_smoothing=label_smoothing)
        x = x.masked_fill((target == -100)[:, None], torch.nan)
        assert torch.equal(ops.linear_cross_entropy(x, weight, bias, target, label_smoothing=label_smoothing), expected)


@interpreter
@pytest.mark.parametrize("backend", ["eager", "chunked", "triton"])
def test_a_label_whose_class_is_ruled_out_has_an_infinite_loss_and_a_gradient(backend):
    x, weight, bias, target = inputs(rows=5, ignored=False)
    bias[target[0]] = -torch.inf
    x.requires_grad_()
    with use_backend(linear_cross_entropy=backend):
        found = ops.linear_cross_entropy(x, weight, bias, target, reduction="sum")
    expected = reference(x, weight, bias, target, reduction="sum")
    assert found == expected == torch.inf
    torch.testing.assert_close(torch.autograd.grad(found, x), torch.autograd.grad(expected, x))


@interpreter
@pytest.mark.parametrize("backend", ["eager", "chunked", "triton"])
def test_a_single_row_needs_no_leading_dimension(backend):
    x, weight, bias, target = inputs(rows=1, ignored=False)
    with use_backend(linear_cross_entropy=backend):
        loss = ops.linear_cross_entropy(x[0], weight, bias, target[0], reduction="none")
    torch.testing.assert_close(loss, reference(x, weight, bias, target))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 50.0])
def test_low_precision_and_large_logits_are_as_accurate_as_eager(chunked, dtype, scale):
    x, *rest = inputs(rows=40, features=32)
    assert_as_accurate_as_eager(ops.linear_cross_entropy, reference=reference, inputs=[x * scale, *rest], dtype=dtype)


@pytest.mark.parametrize("rows", [0, 1, 5, 6])
def test_any_number_of_rows_and_no_bias(chunked, rows):
    x, weight, _, target = inputs(rows=rows, ignored=False)
    assert_as_accurate_as_eager(
        lambda x, w: ops.linear_cross_entropy(x, w, None, target, reduction="sum"),
        reference=lambda x, w: reference(x, w, None, target, reduction="sum"),
        inputs=[x, weight],
        dtype=torch.float32,
    )


def test_leading_dimensions_are_kept_and_expanded_inputs_work(chunked):
    x, weight, bias, target = inputs(rows=12)
    x, target = x.view(3, 4, 6).transpose(0, 1), target.view(3, 4).T
    loss = ops.linear_cross_entropy(x, weight[:1].expand(13, 6), bias, target, reduction="none")
    expected = reference(x.flatten(0, 1), weight[:1].expand(13, 6), bias, target.flatten(), reduction="none")
    torch.testing.assert_close(loss, expected.view(4, 3))


def test_backward_keeps_one_number_a_row_and_never_the_logits(chunked):
    x, weight, bias, target = inputs(rows=1000)
    x.requires_grad_()
    counts = count(lambda *v: ops.linear_cross_entropy(*v), x, weight, bias, target)
    # per row: the label, the sum's logarithm, what the row counts; the logits would be 52 bytes
    assert counts.saved_bytes <= 1000 * (8 + 4 + 4) + 64


def test_the_double_backward_is_right(chunked):
    x, weight, bias, target = inputs()
    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]

    def penalty(function):
        first = torch.autograd.grad(function(*leaves, target, label_smoothing=0.1), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    for one, other in zip(penalty(ops.linear_cross_entropy), penalty(reference)):
        torch.testing.assert_close(one, other)


def test_the_double_backward_of_large_logits_is_as_accurate_as_eager(chunked):
    *leaves, target = inputs(ignored=False)
    leaves[0] *= 40

    def penalty(function, dtype):
        given = [t.to(dtype).requires_grad_() for t in leaves]
        first = torch.autograd.grad(function(*given, target), given, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), given[1])[0].double()

    truth = penalty(reference, torch.float64)
    ours, eager = (
        (penalty(f, torch.float32) - truth).abs().max() / truth.abs().max()
        for f in (ops.linear_cross_entropy, reference)
    )
    assert ours <= 2 * eager + 1e-6


def assert_double_backward_through_shared_weights(leaves, ids, target):
    """Of a language model whose embedding is its head: x depends on weight."""
    weight, bias = leaves

    def penalty(function):
        loss = function(weight[ids].tanh(), weight, bias, target, label_smoothing=0.1)
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        return *first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    for one, other in zip(penalty(ops.linear_cross_entropy), penalty(reference), strict=True):
        torch.testing.assert_close(one, other)


def test_weights_that_x_depends_on_count_once_under_create_graph(chunked):
    _, weight, bias, target = inputs()
    leaves = [t.double().requires_grad_() for t in (weight, bias)]
    assert_double_backward_through_shared_weights(leaves, target.clamp(0).flip(0), target)


IGNORED = [{}, {"label_smoothing": 0.1}, {"class_weight": torch.linspace(0.1, 2, 13), "label_smoothing": 0.1}]


def assert_nothing_but_ignored_rows_give_nan_and_no_gradient(options):
    x, weight, bias, target = inputs(rows=7)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    for function in (reference, ops.linear_cross_entropy):  # PyTorch's behaviour, and ours
        loss = function(*leaves, target.fill_(-100), **options)
        assert loss.isnan()
        for gradient in torch.autograd.grad(loss, leaves):
            assert torch.equal(gradient, torch.zeros_like(gradient)), function


def assert_rows_that_count_nothing_give_nan_and_ignored_rows_beside_them_no_gradient():
    x, weight, bias, target = inputs(rows=7)
    leaves, one_weighs = [t.requires_grad_() for t in (x, weight, bias)], torch.eye(13)[0]
    target = target.masked_fill(target == 0, 1)
    assert {-100} < set(target.tolist())
    for options in ({"label_smoothing": 0.0}, {"label_smoothing": 0.1}):
        for function in (reference, ops.linear_cross_entropy):
            loss = function(*leaves, target, class_weight=one_weighs, **options)
            assert loss.isnan()
            dx, dw, db = torch.autograd.grad(loss, leaves)
            assert torch.equal(dx.isnan(), (target != -100)[:, None].expand_as(dx)), (function, options)
            assert dw.isnan().all(), (function, options)
            assert db.isnan().all(), (function, options)


@pytest.mark.parametrize("options", IGNORED, ids=lambda options: " ".join(options) or "defaults")
def test_a_mean_over_nothing_is_nan_and_its_gradients_are_zero(chunked, options):
    assert_nothing_but_ignored_rows_give_nan_and_no_gradient(options)


def test_a_mean_over_labels_whose_weights_are_zero_is_nan_with_its_gradients(chunked):
    assert_rows_that_count_nothing_give_nan_and_ignored_rows_beside_them_no_gradient()


def test_autocast_leaves_float64_alone_as_it_does_in_eager(chunked):
    x, weight, bias, target = inputs()
    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = (f(*leaves, target) for f in (ops.linear_cross_entropy, reference))
    assert found.dtype == expected.dtype == torch.float64
    torch.testing.assert_close(found, expected)
    for one, other in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(one, other)


def test_autocast_gives_an_fp32_loss_and_gradients_in_the_parameters_dtype(chunked):
    x, weight, bias, target = inputs()
    weight.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = (f(x, weight, bias, target) for f in (ops.linear_cross_entropy, reference))
    assert found.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
    ours, theirs = (torch.autograd.grad(loss, weight)[0] for loss in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=3e-2, atol=1e-2)


def test_a_compiled_model_has_no_graph_break(chunked):
    x, weight, bias, target = inputs()
    weight.requires_grad_()
    compiled = torch.compile(ops.linear_cross_entropy, fullgraph=True, backend="aot_eager")
    found, expected = (f(x, weight, bias, target, label_smoothing=0.1) for f in (compiled, reference))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, weight), torch.autograd.grad(expected, weight))


@interpreter
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(options) or "defaults")
def test_the_kernels_losses_and_gradients_are_as_accurate_as_eager(triton, options):
    assert_as_accurate_as_eager(
        lambda *v: ops.linear_cross_entropy(*v, **options),
        reference=lambda *v: reference(*v, **options),
        inputs=inputs(rows=11, ignored="ignore_index" not in options),
        dtype=torch.float32,
        grad=options.get("reduction") != "none",
    )


@interpreter
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 50.0])
def test_in_low_precision_and_with_large_logits_the_kernel_is_as_accurate_as_eager(triton, dtype, scale):
    x, *rest = inputs(rows=12, features=32, classes=16)  # whole runs of 16 bytes
    assert_as_accurate_as_eager(ops.linear_cross_entropy, reference=reference, inputs=[x * scale, *rest], dtype=dtype)


@interpreter
@pytest.mark.parametrize(
    ("scale", "options"), [(1e-7, {}), (1e6, {}), (1e-7, {"label_smoothing": 0.1}), (1e-3, {"reduction": "sum"})]
)
def test_class_weights_that_fp16_does_not_hold_do_not_harm_gradients_in_fp16(triton, scale, options):
    x, weight, bias, target = inputs(rows=12, features=32, classes=16)
    class_weight = torch.linspace(0.5, 2, 16)
    scale_of_eager = scale if "reduction" in options else 1.0  # a mean is the same
    assert_as_accurate_as_eager(
        lambda *v: ops.linear_cross_entropy(*v, class_weight=class_weight * scale, **options),
        reference=lambda *v: reference(*v, class_weight=class_weight * scale_of_eager, **options),
        inputs=[x, weight / 8, bias, target],
        dtype=torch.float16,
    )


@interpreter
@pytest.mark.parametrize(("rows", "classes"), [(0, 13), (1, 2), (5, 13), (2, 8200)])
def test_the_kernel_takes_any_number_of_rows_and_classes_and_no_bias(triton, rows, classes):
    x, weight, _, target = inputs(rows=rows, classes=classes, ignored=False)
    weight[: classes // 2] -= 30 * x[:1].sign().sum(0)  # classes of the first block that hardly count
    assert_as_accurate_as_eager(
        lambda x, w: ops.linear_cross_entropy(x, w, None, target, reduction="sum", label_smoothing=0.1),
        reference=lambda x, w: reference(x, w, None, target, reduction="sum", label_smoothing=0.1),
        inputs=[x, weight],
        dtype=torch.float32,
    )


@interpreter
def test_the_kernel_survives_classes_that_are_ruled_out(triton):
    x, weight, bias, target = inputs(rows=2, classes=8300, ignored=False)
    bias[:8192], target = -torch.inf, torch.tensor([8200, 8299])  # all of the first block
    x.requires_grad_()
    found, expected = (f(x, weight, bias, target) for f in (ops.linear_cross_entropy, reference))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, x), torch.autograd.grad(expected, x))


@interpreter
def test_a_label_that_is_no_class_gives_nan_and_stays_inside_the_tensors(triton):
    x, weight, bias, _ = inputs(rows=4)
    x.requires_grad_()
    loss = ops.linear_cross_entropy(x, weight, bias, torch.tensor([1, 13, -1, -100]), reduction="sum")
    (dx,) = torch.autograd.grad(loss, x)
    assert loss.isnan()
    assert dx.isnan().all(-1).tolist() == [False, True, True, False]
    assert not dx[3].any()


@interpreter
def test_the_kernels_double_backward_goes_through_eager(triton):
    x, weight, bias, target = inputs(rows=6)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]

    def penalty(function):
        first = torch.autograd.grad(function(*leaves, target, label_smoothing=0.1), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    for one, other in zip(penalty(ops.linear_cross_entropy), penalty(reference), strict=True):
        torch.testing.assert_close(one, other)


@interpreter
def test_with_the_kernel_weights_that_x_depends_on_count_once_under_create_graph(triton):
    _, weight, bias, target = inputs(rows=6)
    assert_double_backward_through_shared_weights(
        [t.requires_grad_() for t in (weight, bias)], target.clamp(0).flip(0), target
    )


@interpreter
@pytest.mark.parametrize("options", IGNORED, ids=lambda options: " ".join(options) or "defaults")
def test_with_the_kernel_a_mean_over_nothing_is_nan_and_its_gradients_are_zero(triton, options):
    assert_nothing_but_ignored_rows_give_nan_and_no_gradient(options)


@interpreter
def test_with_the_kernel_a_mean_over_labels_whose_weights_are_zero_is_nan_with_its_gradients(triton):
    assert_rows_that_count_nothing_give_nan_and_ignored_rows_beside_them_no_gradient()


@interpreter
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize(("dtype", "large"), [(torch.float16, 40000.0), (torch.bfloat16, 256.0)])
def test_a_block_of_the_weights_gradient_neither_overflows_nor_rounds_to_16_bits(triton, dtype, large, autocast):
    # Two blocks: -large / 2 four times and -1/2 sum up to what 16 bits don't hold; then large / 2 four times.
    x = torch.tensor([[large]] * 4 + [[1.0]] + [[-large]] * 4, dtype=torch.float32 if autocast else dtype)
    weight = torch.zeros(2, 1, dtype=x.dtype, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        loss = ops.linear_cross_entropy(x, weight, None, torch.zeros(9, dtype=torch.int64), reduction="sum")
    assert torch.autograd.grad(loss, weight)[0].tolist() == [[-0.5], [0.5]]


@interpreter
def test_the_kernel_under_autocast_and_compile(triton):
    x, weight, bias, target = inputs(rows=6, classes=16)
    weight.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = ops.linear_cross_entropy(x, weight, bias, target)
    assert loss.dtype == torch.float32
    expected = reference(x, weight, bias, target)
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=1e-2)
    (dw,) = torch.autograd.grad(loss, weight)
    assert dw.dtype == torch.float32
    torch.testing.assert_close(dw, torch.autograd.grad(expected, weight)[0], rtol=3e-2, atol=1e-2)


@interpreter
def test_opcheck_accepts_the_kernel_and_a_compiled_model_has_no_graph_break():
    x, weight, bias, target = inputs(rows=4)
    op = torch.ops.detr_fast.linear_cross_entropy.default
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    torch.library.opcheck(op, (*leaves, target, None, -100, "mean", 0.0, [True, True, True]))
    torch.library.opcheck(op, (x.detach(), weight.detach(), None, target.clamp(0), None, 2, "none", 0.1, [False] * 3))
    with use_backend(linear_cross_entropy="triton"):
        compiled = torch.compile(ops.linear_cross_entropy, fullgraph=True, backend="aot_eager")
        found, expected = (f(*leaves, target) for f in (compiled, reference))
    torch.testing.assert_close(found, expected)
    for one, other in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["triton", "chunked"])
def test_on_a_gpu_the_loss_is_as_accurate_as_eager(dtype, backend):
    x, weight, bias, target = (t.to(DEVICE) for t in inputs(sized(3000, 30), 64, sized(9000, 900)))
    with use_backend(linear_cross_entropy=backend):
        assert_as_accurate_as_eager(
            ops.linear_cross_entropy,
            reference=reference,
            inputs=[x, weight / 8, bias, target],
            dtype=dtype,
        )
