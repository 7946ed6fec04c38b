from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from detr_fast.kernels.dropout import scale
from torch.autograd import forward_ad

from benchmarks.hardware import DEVICE, sized
from detr_fast import dispatch, ops
from detr_fast.dispatch import BackendError, use_backend
from detr_fast.ops.dropout import keep_mask, next_seed
from detr_fast.testing import assert_as_accurate_as_eager

interpreter = pytest.mark.interpreter
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def triton():
    with use_backend(rms_norm="triton", add_rms_norm="triton"):
        yield


def inputs(rows, columns, count=1):
    return [*(torch.randn(rows, columns) + 1 for _ in range(count)), torch.randn(columns) + 1]


def rms_norm(x, weight=None, eps=None):
    return ops.rms_norm(x, x.shape[-1:], weight, eps)


def eager(x, weight=None, eps=None):
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def eager_sum(x, residual, weight=None, factor=1.0):
    total = residual + x * factor
    return eager(total, weight), total


@interpreter
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 37])  # none, one, no multiple of a tile
def test_rms_norm_is_as_accurate_as_eager(triton, rows, dtype):
    values = [torch.randn(rows, 96) * 50 + 100, torch.randn(96) + 1]
    assert_as_accurate_as_eager(rms_norm, reference=eager, inputs=values, dtype=dtype)


@interpreter
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["triton", "eager"])
def test_without_an_eps_it_is_torchs_own_for_each_dtype(dtype, backend):
    x = torch.full((3, 16), 1e-3, dtype=dtype)  # of fp16, finfo(fp16).eps would give 0.03
    with use_backend(rms_norm=backend, add_rms_norm=backend):
        torch.testing.assert_close(rms_norm(x), eager(x))
        torch.testing.assert_close(ops.add_rms_norm(x, torch.zeros_like(x)), eager(x))
        torch.testing.assert_close(rms_norm(x, eps=1.0), eager(x, eps=1.0))


@interpreter
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_weight_in_fp32_leaves_the_inputs_dtype_as_torch_does(triton, dtype):
    x, residual, weight = (t.to(d).requires_grad_() for t, d in zip(inputs(9, 40, 2), (dtype, dtype, torch.float32)))
    dy = torch.randn(9, 40).to(dtype)
    for ours, theirs, leaves in (
        (rms_norm, eager, (x, weight)),
        (ops.add_rms_norm, lambda *t: eager_sum(*t)[0], (x, residual, weight)),
    ):
        y, expected = ours(*leaves), theirs(*leaves)
        torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)  # dtypes, too
        for one, other in zip(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(expected, leaves, dy)):
            torch.testing.assert_close(one, other, rtol=3e-2, atol=6e-2)


@interpreter
def test_several_normalised_dimensions_odd_layouts_and_no_weight_work(triton):
    for weight in (torch.randn(3, 10), None):
        assert_as_accurate_as_eager(
            lambda x, w: ops.rms_norm(x.transpose(0, 1), (3, 10), w),
            reference=lambda x, w: F.rms_norm(x.transpose(0, 1), (3, 10), w),
            inputs=[torch.randn(4, 5, 3, 10), weight],
            dtype=torch.float32,
            upstream=lambda y: torch.randn(1, 1, 3, 10).expand(y.shape),
        )


@interpreter
def test_dropout_and_its_gradients_follow_the_seed_of_torchs_generator(triton):
    leaves = [t.requires_grad_() for t in inputs(20, 64, 2)]
    state = torch.get_rng_state()
    factor = keep_mask(*next_seed(torch.device("cpu")), 0.3, 1, 20, 64)[0] * scale(0.3)
    torch.set_rng_state(state)
    y, total = ops.add_rms_norm(*leaves, dropout_p=0.3, return_sum=True)
    expected = eager_sum(*leaves, factor)
    torch.testing.assert_close((y, total), expected)
    upstream = [torch.randn_like(y), torch.randn_like(y)]
    found, truth = (torch.autograd.grad(of, leaves, upstream) for of in ((y, total), expected))
    torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-5)


@interpreter
@pytest.mark.parametrize("name", ["rms_norm", "add_rms_norm"])
def test_the_double_backward_is_right(triton, name):
    ours, theirs = {"rms_norm": (rms_norm, eager), "add_rms_norm": (ops.add_rms_norm, lambda *t: eager_sum(*t)[0])}[
        name
    ]
    leaves = [t.requires_grad_() for t in inputs(3, 6, 1 + (name == "add_rms_norm"))]

    def penalty(function):
        first = torch.autograd.grad(function(*leaves).pow(3).sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    torch.testing.assert_close(penalty(ours), penalty(theirs), rtol=1e-3, atol=1e-3)


@interpreter
@pytest.mark.parametrize("given", ["weight", "nothing"])
def test_opcheck_accepts_the_ops_without_a_mean(given):
    x, residual, weight = (t.requires_grad_() for t in inputs(5, 24, 2))
    weight = weight if given == "weight" else None
    own = torch.ops.detr_fast
    torch.library.opcheck(own.layer_norm.default, (x, weight, None, 1e-5, torch.float32, False))
    _, mean, rstd = own.layer_norm(x.detach(), weight, None, 1e-5, torch.float32, False)
    assert mean.numel() == 0
    dy, wanted = torch.randn(5, 24), [True, weight is not None, False]
    torch.library.opcheck(own.layer_norm_backward.default, (dy, x, weight, None, None, rstd.detach(), 1e-5, wanted))
    settings = (torch.tensor([9]), 1, 0.5, 1e-5)
    forward = (x, residual, weight, None, *settings, True, torch.float32, False)
    torch.library.opcheck(own.add_layer_norm.default, forward)
    _, total, _, rstd = own.add_layer_norm(x.detach(), residual.detach(), *forward[2:])
    rest = (weight, None, None, rstd.detach(), *settings, torch.float32, torch.float32, weight is not None, False)
    torch.library.opcheck(own.add_layer_norm_backward.default, (dy, dy, total.detach(), None, *rest))


@interpreter
def test_a_compiled_model_has_no_graph_break_and_equal_gradients(triton):
    leaves = [t.requires_grad_() for t in inputs(4, 16, 2)]

    def model(add, norm, x, residual, weight):
        y, total = add(x * 2, residual, weight)
        return norm(total + y, weight)

    ours = partial(model, partial(ops.add_rms_norm, return_sum=True), rms_norm)
    y = torch.compile(ours, fullgraph=True, backend="aot_eager")(*leaves)
    expected = model(eager_sum, eager, *leaves)
    torch.testing.assert_close(y, expected)
    found, truth = (torch.autograd.grad(of.square().sum(), leaves, retain_graph=True) for of in (y, expected))
    torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-5)


@interpreter
def test_vmap_and_forward_mode_are_eager_and_the_kernel_says_so(triton):
    x = torch.randn(2, 3, 4)
    with pytest.raises(BackendError, match=r"torch\.func transforms"):
        torch.vmap(rms_norm)(x)
    with use_backend("auto"):
        torch.testing.assert_close(torch.vmap(rms_norm)(x), eager(x))
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, torch.ones_like(x))
            tangents = [forward_ad.unpack_dual(function(dual)).tangent for function in (rms_norm, eager)]
        torch.testing.assert_close(*tangents)


def test_on_a_gpu_results_have_torchs_dtypes_under_autocast_too(monkeypatch):
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    for autocast in (False, True):
        with FakeTensorMode(), use_backend(rms_norm="triton", add_rms_norm="triton"):
            x = torch.empty(7, 33, device="cuda", dtype=torch.float16)
            weight = torch.empty(33, device="cuda")
            with torch.autocast("cuda", torch.float16, enabled=autocast):
                expected = eager(x, weight).dtype
                assert rms_norm(x, weight).dtype == expected
                y, total = ops.add_rms_norm(x, x, weight, dropout_p=0.1, return_sum=True)
                assert (y.dtype, total.dtype) == (expected, torch.float16)


@pytest.mark.parametrize(
    ("shape", "normalized", "dtype", "reason"),
    [
        ((1, 1 << 25), (1 << 25,), torch.float32, "33554432 normalised elements: it takes 1 to 16777216"),
        ((2, 0), (0,), torch.float32, "0 normalised elements"),
        ((2, 4), (4,), torch.float64, "float64 inputs: it takes bfloat16, float16, float32"),
        ((2, 4), (5,), torch.float32, "do not fit each other"),
    ],
)
def test_what_the_kernel_cannot_take_is_refused_in_words(shape, normalized, dtype, reason):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), use_backend(rms_norm="triton"), pytest.raises(BackendError, match=reason):
        ops.rms_norm(torch.empty(shape, device="cuda", dtype=dtype), normalized)


def test_auto_on_a_gpu_is_careful_where_nothing_was_measured(unmeasured):
    from torch._subclasses.fake_tensor import FakeTensorMode

    chosen = {}
    with FakeTensorMode(), dispatch.recording(lambda op, one: chosen.update({(op, one.shapes): one})):
        for rows in (100, 1_000_000):
            x = torch.empty(rows, 256, device="cuda")
            rms_norm(x), ops.add_rms_norm(x, x)
    for op in ("rms_norm", "add_rms_norm"):
        assert chosen[op, "(100, 256) float32"].implementation.name == "eager"
        assert "detr-fast tune" in chosen[op, "(100, 256) float32"].reasons["triton"]
        assert chosen[op, "(1000000, 256) float32"].implementation.name == "triton"


def test_on_a_cpu_the_calls_are_torchs_own():
    x, residual, weight = inputs(3, 8, 2)
    assert torch.equal(rms_norm(x, weight), eager(x, weight))
    for one, other in zip(ops.add_rms_norm(x, residual, weight, return_sum=True), eager_sum(x, residual, weight)):
        assert torch.equal(one, other)
    assert rms_norm(torch.randn(2, 0)).shape == (2, 0)
    with pytest.raises(RuntimeError, match="to be of same shape as normalized_shape"):
        rms_norm(x, weight[:5])
    with pytest.raises(ValueError, match=r"add_rms_norm takes x and residual of one shape \(\.\.\., C\); got \(3, 8\)"):
        ops.add_rms_norm(x, weight)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 100, 256, 1024, 8192, 10_000])
def test_on_a_gpu_both_are_as_accurate_as_eager(triton, columns, dtype):
    x, residual, weight = (t.to(DEVICE) for t in inputs(sized(1037, 5), columns, 2))
    assert_as_accurate_as_eager(rms_norm, reference=eager, inputs=[x, weight], dtype=dtype)
    ours = partial(ops.add_rms_norm, return_sum=True)
    assert_as_accurate_as_eager(ours, reference=eager_sum, inputs=[x, residual, weight], dtype=dtype)


@pytest.mark.gpu
def test_on_a_gpu_autocast_gives_torchs_dtype(triton):
    x, weight = torch.randn(9, 256, device=DEVICE, dtype=torch.bfloat16), torch.randn(256, device=DEVICE)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        torch.testing.assert_close(rms_norm(x, weight), eager(x, weight))
