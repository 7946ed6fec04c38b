from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from detr_fast.kernels import launch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.hardware import DEVICE, sized
from detr_fast import ops, use_backend
from detr_fast.dispatch import BackendError
from detr_fast.ops.feed_forward import ACTIVATIONS, FEED_FORWARD
from detr_fast.situation import situation
from detr_fast.testing import assert_as_accurate_as_eager, count

interpreter = pytest.mark.interpreter
FORMS = ["plain", "post-norm", "norm and sum", "sum"]
IMPLEMENTATIONS = ["triton", "triton_recompute", "triton_one_kernel"]


@pytest.fixture(params=IMPLEMENTATIONS)
def kernel(request):
    with use_backend(feed_forward=request.param):
        yield request.param


def ours(activation, norm, p=0.0, output_p=0.0):
    if not norm:
        return lambda x, w1, b1, w2, b2: ops.feed_forward(x, w1, b1, w2, b2, activation, p)
    return lambda *tensors: ops.feed_forward_add_layer_norm(*tensors, 1e-5, activation, p, output_p)


def eager(activation, norm):
    def compute(x, w1, b1, w2, b2, norm_weight=None, norm_bias=None):
        y = F.linear(ACTIVATIONS[activation](F.linear(x, w1, b1)), w2, b2)
        return F.layer_norm(x + y, y.shape[-1:], norm_weight, norm_bias) if norm else y

    return compute


def tensors(rows=(2, 5), width=16, hidden=40, norm=True, grad=False, dtype=torch.float32):
    shapes = [(*rows, width), (hidden, width), (hidden,), (width, hidden), (width,), (width,), (width,)]
    scales = [1, max(width, 1) ** -0.5, 1, hidden**-0.5, 1, 1, 1]
    made = [torch.randn(s, dtype=dtype) * scale for s, scale in zip(shapes, scales)]
    return [t.requires_grad_(grad) for t in made[: 7 if norm else 5]]


@interpreter
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize(
    ("activation", "dtype", "rows"),
    [
        ("relu", torch.float32, (0,)),
        ("relu", torch.bfloat16, (2, 17)),
        ("relu", torch.float16, (1,)),
        ("gelu", torch.float32, (2, 17)),
        ("gelu_tanh", torch.float16, (5,)),
        ("silu", torch.bfloat16, (3,)),
    ],
)
def test_it_is_as_accurate_as_eager(kernel, activation, dtype, rows, norm):
    inputs = tensors(rows, norm=norm)
    assert_as_accurate_as_eager(ours(activation, norm), reference=eager(activation, norm), inputs=inputs, dtype=dtype)


def residual_form(ours, sums_only, p=0.0, output_p=0.0):
    """What a pre-norm layer runs, ours or eager: (norm, sum) side by side, or the sum alone; the residual is the last input."""

    def compute(x, w1, b1, w2, b2, norm_weight, norm_bias, residual):
        weights, norm = (w1, b1, w2, b2), (norm_weight, norm_bias)
        if ours and sums_only:
            return ops.feed_forward(x, *weights, "relu", p, residual, output_p)
        if ours:
            options = (1e-5, "relu", p, output_p, residual, True)
            return torch.cat(ops.feed_forward_add_layer_norm(x, *weights, *norm, *options), -1)
        total = residual + F.linear(F.relu(F.linear(x, w1, b1)), w2, b2)
        return total if sums_only else torch.cat([F.layer_norm(total, total.shape[-1:], *norm), total], -1)

    return compute


@interpreter
@pytest.mark.parametrize("sums_only", [False, True], ids=["norm and sum", "sum"])
@pytest.mark.parametrize(("dtype", "rows"), [(torch.float32, (2, 17)), (torch.bfloat16, (9,)), (torch.float16, (0,))])
def test_with_a_residual_it_is_as_accurate_as_eager(kernel, dtype, rows, sums_only):
    inputs = [*tensors(rows), torch.randn(*rows, 16)]
    if sums_only:
        inputs[5:7] = [None, None]
    ours, theirs = (residual_form(one, sums_only) for one in (True, False))
    assert_as_accurate_as_eager(ours, reference=theirs, inputs=inputs, dtype=dtype)


@interpreter
@pytest.mark.parametrize("sums_only", [False, True], ids=["norm and sum", "sum"])
def test_with_a_residual_the_backward_drops_what_the_forward_dropped(kernel, sums_only):
    leaves = [t.requires_grad_() for t in (*tensors((40,)), torch.randn(40, 16))]
    inputs = [*leaves[:5], None, None, leaves[7]] if sums_only else leaves
    leaves = [t for t in inputs if t is not None]
    y = residual_form(True, sums_only, 0.3, 0.4)(*inputs)
    dy = torch.randn_like(y)
    by_kernel = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    eagerly = torch.autograd.grad(y, leaves, dy, create_graph=True)  # recomputed with the twin of the mask
    for one, other in zip(by_kernel, eagerly):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


@interpreter
@pytest.mark.parametrize("given", [0, 4, 5, 7])  # x, b2, the norm's weight, the residual
def test_a_sum_needs_a_gradient_where_what_it_adds_does(kernel, given):
    inputs = [t.requires_grad_(place == given) for place, t in enumerate((*tensors(), torch.randn(2, 5, 16)))]
    y, total = ops.feed_forward_add_layer_norm(*inputs[:7], residual=inputs[7], return_sum=True)
    assert (y.requires_grad, total.requires_grad) == (True, given != 5)
    (gradient,) = torch.autograd.grad(y.square().sum(), inputs[given])
    assert gradient.abs().max() > 0


@interpreter
@pytest.mark.parametrize("form", FORMS)
def test_the_double_backward_is_right(kernel, form):
    leaves = [t.requires_grad_() for t in (*tensors((7,)), torch.randn(7, 16))]
    if form in ("plain", "post-norm"):
        leaves = leaves[: 7 if form == "post-norm" else 5]
        functions = [f("gelu", form == "post-norm") for f in (ours, eager)]
        inputs = leaves
    else:
        inputs = [*leaves[:5], None, None, leaves[7]] if form == "sum" else leaves
        leaves = [t for t in inputs if t is not None]
        functions = [residual_form(one, form == "sum") for one in (True, False)]

    def penalty(function):
        gradients = torch.autograd.grad(function(*inputs).square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in gradients), leaves, allow_unused=True)

    for one, other in zip(*map(penalty, functions)):
        one, other = (torch.zeros(1) if t is None else t for t in (one, other))
        torch.testing.assert_close(
            *torch.broadcast_tensors(one, other), rtol=1e-3, atol=1e-3 * other.abs().max().item()
        )


@interpreter
def test_biases_may_be_absent(kernel):
    x, w1, _, w2, _, norm_weight, _ = tensors()
    inputs = [x, w1, None, w2, None, norm_weight, None]
    assert_as_accurate_as_eager(ours("gelu", True), reference=eager("gelu", True), inputs=inputs, dtype=torch.float32)


@interpreter
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_the_backward_drops_what_the_forward_dropped(kernel, activation, norm):
    inputs = tensors((40,), norm=norm, grad=True)
    y = ours(activation, norm, 0.3, 0.4)(*inputs)
    dy = torch.randn_like(y)
    by_kernel = torch.autograd.grad(y, inputs, dy, retain_graph=True)
    eagerly = torch.autograd.grad(y, inputs, dy, create_graph=True)  # recomputed with the twin of the mask
    for one, other in zip(by_kernel, eagerly):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    torch.autograd.grad(eagerly[0].square().sum(), inputs, allow_unused=True)


@interpreter
def test_dropout_hits_hidden_and_output_independently(kernel):
    eye = torch.eye(32)
    hidden = ops.feed_forward(torch.ones(64, 32), eye, None, eye, None, "relu", 0.5) > 0
    assert abs(hidden.float().mean().item() - 0.5) < 0.05
    big = torch.full((64, 32), 100.0)
    y = ops.feed_forward_add_layer_norm(
        torch.zeros(64, 32), eye * 0, big[0], eye, None, torch.ones(32), None, 1e-5, "relu", 0.5, 0.5
    )
    share = (y > 0).float().mean().item()
    assert abs(share - 0.25) < 0.05  # kept by both


@interpreter
def test_opcheck_accepts_the_ops():
    seed = torch.tensor([3])
    for norm, activation in ((True, "silu"), (False, "relu")):
        residual = torch.randn(2, 5, 16) if norm else None
        for added in {residual, None}:
            inputs = [*tensors(norm=norm, grad=True), *[None] * (0 if norm else 2), added, seed]
            arguments = (*inputs, activation, 1, 0.25, 0.5, 1e-5, torch.float32, norm and added is not None)
            own = added is not None and norm
            torch.library.opcheck(torch.ops.detr_fast.feed_forward.default, (*arguments, True, norm, False, own, own))
        kept = (torch.randn(10, 16), torch.rand(10), torch.randn(16)) if norm else (None, None, None)
        again = (torch.randn(10, 16), torch.randn(40, 16), torch.randn(40))
        settings = (seed, activation, 1, 0.25, 0.5, torch.float32, True)
        for hidden in ((torch.randn(10, 40), None, None, None, None), (None, None, *again)):
            dsum = torch.randn(10, 16) if norm else None
            backward = (torch.randn(10, 16), dsum, *kept, torch.randn(16, 40), *hidden, *settings)
            torch.library.opcheck(torch.ops.detr_fast.feed_forward_backward.default, backward)
    half = [t if t is None else t.detach().half() for t in tensors(norm=False)]
    arguments = (
        *half,
        None,
        None,
        None,
        seed,
        "relu",
        1,
        0.25,
        0.0,
        1e-5,
        torch.float16,
        False,
        True,
        True,
        *[False] * 3,
    )
    torch.library.opcheck(torch.ops.detr_fast.feed_forward.default, arguments)
    _, _, saved, active, *_ = torch.ops.detr_fast.feed_forward.default(*arguments)
    assert active.shape == (10, 8)
    hidden = (half[3], saved, active, None, None, None, seed, "relu", 1, 0.25, 0.0, torch.float16, True)
    backward = (torch.randn(2, 5, 16).half(), *[None] * 4, *hidden)
    torch.library.opcheck(torch.ops.detr_fast.feed_forward_backward.default, backward)


@interpreter
def test_a_compiled_model_has_no_graph_break_and_equal_gradients(kernel):
    inputs = tensors(grad=True)
    compiled = torch.compile(lambda *a: ours("gelu", True)(*a) * 2, fullgraph=True, backend="aot_eager")
    y, expected = compiled(*inputs), eager("gelu", True)(*inputs) * 2
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    for one, other in zip(torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected, inputs, dy)):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@interpreter
def test_only_wanted_gradients_are_computed(kernel):
    x, *parameters = tensors(grad=False)
    x.requires_grad_()
    y = ours("relu", True)(x, *parameters)
    counts = count(lambda: y.sum().backward())
    assert counts.launches["aten.mm.default"] == 0
    assert counts.launches["aten.addmm_.default"] == 1
    assert x.grad is not None


def test_without_gradients_nothing_is_kept(kernel):
    inputs = [t.to("meta") for t in tensors((100,), 256, 2048)]
    with torch.no_grad():
        assert count(lambda: ours("gelu", True)(*inputs)).saved_bytes == 0


@pytest.mark.parametrize("form", ["post-norm", "norm and sum", "sum"])
def test_launches_and_bytes_kept_of_detrs_block(kernel, form):
    inputs = [t.detach().to("meta").requires_grad_() for t in (*tensors((1000,), 256, 2048), torch.randn(1000, 256))]
    x, w1, b1, w2, b2, *norm, residual = inputs
    used = {"post-norm": inputs[:7], "norm and sum": inputs, "sum": [*inputs[:5], residual]}[form]

    def run(*_):
        if form == "sum":
            return (ops.feed_forward(x, w1, b1, w2, b2, "relu", 0.1, residual, 0.1),)
        added = (residual, True) if form == "norm and sum" else (None, False)
        found = ops.feed_forward_add_layer_norm(x, w1, b1, w2, b2, *norm, 1e-5, "relu", 0.1, 0.1, *added)
        return found if added[1] else (found,)

    def step(*_):
        results = run()
        torch.autograd.grad(results, used, [torch.empty_like(y) for y in results])

    forward, both = count(run, *inputs), count(step, *inputs)
    products = ["feed_forward_kernel"] if kernel == "triton_one_kernel" else ["linear_kernel", "linear_norm_kernel"]
    assert forward.launches == dict.fromkeys([*products, "aten.randint.low"], 1)  # a seed a step
    backward = both.launches - forward.launches
    launches = dict.fromkeys(["add_layer_norm_backward_kernel", "linear_backward_kernel", "sum_partials_kernel"], 1)
    products = {"aten.mm.default": 2, "aten.addmm_.default": 1} if form == "post-norm" else {"aten.mm.default": 3}
    assert backward == launches | products
    hidden, norm = 2048 if kernel == "triton" else 0, 0 if form == "sum" else 256 + 1
    assert forward.saved_bytes <= 1000 * (hidden + norm) * 4 + 8  # hidden, xhat, rstd and the seed


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_all_that_a_call_launches_is_compiled_before_it(kernel, form, p):
    inputs = [t.detach().to("meta", torch.bfloat16).requires_grad_() for t in (*tensors((100,)), torch.randn(100, 16))]
    x, w1, b1, w2, b2, *norm, residual = inputs
    behind = {
        "plain": (None, None, 0.0, "relu", p, 0.0, None, False),
        "post-norm": (*norm, 1e-5, "gelu", p, p, None, False),
        "norm and sum": (*norm, 1e-5, "relu", p, p, residual, True),
        "sum": (None, None, 0.0, "silu", p, p, residual, False),
    }
    arguments = (x, w1, b1, w2, b2, *behind[form])

    def launched(function):
        seen = set()
        with mock.patch.object(launch, "observers", [*launch.observers, lambda one: seen.add(one.variant)]):
            function()
        return seen

    def step():
        y = FEED_FORWARD(*arguments)
        y = y if isinstance(y, tuple) else (y,)
        torch.autograd.backward(y, [torch.empty_like(t) for t in y])

    call = FEED_FORWARD._describe(*arguments, situation=situation("meta"))
    compiled = launched(lambda: FEED_FORWARD.choose(*arguments).rehearse(call))
    used = launched(lambda: count(step))
    assert len(used) >= 3
    assert used <= compiled


def test_fake_cuda_tensors_trace_forward_without_a_gpu(kernel):
    with FakeTensorMode():
        inputs = [t.cuda() for t in tensors((3, 7), 256, 2048)]
        y = ours("relu", True, 0.1, 0.1)(*inputs)
        assert (y.shape, y.dtype, y.device.type) == ((3, 7, 256), torch.float32, "cuda")


def test_auto_stays_eager_until_measured():
    with FakeTensorMode():
        inputs = [t.cuda() for t in tensors((100_000,), 256, 2048)]
        assert FEED_FORWARD.choose(*inputs, 1e-5, "relu", 0.0, 0.0, None, False).name == "eager"


def test_what_does_not_fit_is_refused_in_words(kernel):
    with FakeTensorMode():
        x, w1, b1, w2, b2 = (t.cuda() for t in tensors(norm=False))
        with pytest.raises(BackendError, match=r"w2 has shape \(16, 41\); expected \(16, 40\)"):
            ops.feed_forward(x, w1, b1, torch.empty(16, 41, device="cuda"), b2)
    with pytest.raises(
        ValueError, match="got activation 'tanh'; expected one of relu, gelu, gelu_tanh, silu, quick_gelu"
    ):
        ops.feed_forward(x, w1, b1, w2, b2, "tanh")


def test_a_norm_over_no_columns_is_left_to_torch(kernel):
    with FakeTensorMode():
        inputs = [t.cuda() for t in tensors(width=0)]
        with pytest.raises(BackendError, match=r"0 columns.*: (whole )?rows of 1 to 256 fit a tile"):
            ops.feed_forward_add_layer_norm(*inputs)
        with use_backend(feed_forward="auto"):
            assert ops.feed_forward_add_layer_norm(*inputs).shape == (2, 5, 0)


@pytest.mark.parametrize(("width", "hidden", "odd"), [(100, 40, 100), (104, 41, 41)])
def test_the_one_kernel_reads_16_bits_by_whole_runs_of_16_bytes(width, hidden, odd):
    with FakeTensorMode(), use_backend(feed_forward="triton_one_kernel"):
        inputs = [t.cuda() for t in tensors((3,), width, hidden, norm=False)]
        assert ops.feed_forward(*inputs).shape == (3, width)
        with pytest.raises(BackendError, match=f"rows of {odd} elements: in 16 bits it takes multiples of 8, whole"):
            ops.feed_forward(*(t.half() for t in inputs))


def test_the_one_kernel_follows_torchs_setting_of_matmul_precision(monkeypatch):
    from detr_fast.kernels import feed_forward, launch

    seen = []
    monkeypatch.setattr(launch, "observers", [lambda one: seen.append(one.variant.constants["PRECISION"])])
    before = torch.get_float32_matmul_precision()
    x, w1, w2 = (torch.empty(shape, device="meta") for shape in ((8, 16), (32, 16), (16, 32)))
    try:
        for setting in ("highest", "high", "highest"):
            torch.set_float32_matmul_precision(setting)
            feed_forward.feed_forward(x, w1, None, w2, None, activation="relu")
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == ["ieee", "tf32", "ieee"]


@pytest.mark.parametrize("p", [-0.1, 1.5, float("nan")])
def test_a_dropout_probability_outside_0_and_1_is_refused(p):
    x, w, one = torch.zeros(2, 4), torch.zeros(4, 4), torch.ones(4)
    for call in (
        lambda: ops.feed_forward(x, w, None, w, None, dropout_p=p),
        lambda: ops.feed_forward_add_layer_norm(x, w, None, w, None, one, output_dropout_p=p),
        lambda: ops.linear_add_layer_norm(x, w, None, x, one, dropout_p=p),
    ):
        with pytest.raises(ValueError, match=rf"dropout_p must lie in \[0, 1\]; got {p}"):
            call()


@pytest.mark.gpu
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu_it_is_as_accurate_as_eager(kernel, dtype, norm):
    inputs = [t.to(DEVICE) for t in tensors((sized(1037, 20),), sized(256, 64), sized(2048, 128), norm=norm)]
    assert_as_accurate_as_eager(ours("relu", norm), reference=eager("relu", norm), inputs=inputs, dtype=dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_on_a_gpu_nan_and_infinity_go_through_relu_as_in_pytorch(kernel, p):
    x, w1, b1, w2, b2 = (t.to(DEVICE, torch.bfloat16) for t in tensors((70,), 64, 128)[:5])
    x[3, 5], x[4, 6] = torch.nan, torch.inf
    y = ops.feed_forward(x, w1, b1, w2, b2, "relu", p)
    assert y.isfinite().all(-1).logical_not().nonzero().flatten().tolist() == [3, 4]
