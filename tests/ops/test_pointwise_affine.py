from __future__ import annotations

import importlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.hardware import DEVICE, sized
from detr_fast import dispatch, ops
from detr_fast.dispatch import BackendError, use_backend
from detr_fast.ops import regimes
from detr_fast.ops.pointwise_affine import EagerPointwiseAffine, measured_as
from detr_fast.ops.regimes import NEVER, Regime
from detr_fast.testing import assert_as_accurate_as_eager, count

module = importlib.import_module("detr_fast.ops.pointwise_affine")  # whose name the function has, too
# Offsets inside a tile of 128 rows pass the usual limit of 32-bit arithmetic.
interpreter = pytest.mark.interpreter(int32_limit=1 << 16)
DTYPES = [torch.bfloat16, torch.float16]
KINDS = {"alone": (False, False), "residual": (True, False), "scaled residual": (True, True)}


@pytest.fixture
def triton():
    with use_backend(pointwise_affine="triton"):
        yield


@pytest.fixture
def scaled_weights(monkeypatch):
    """Launches that cost nothing: one gradient and scaled weights, from six pixels a channel on."""
    monkeypatch.setattr(module, "LAUNCH", 0)


def make_case(shape=(2, 24, 3, 5), channels=40, kind="scaled residual", device="cpu", spread=0.0):
    """x, weight, residual, and what there is for each channel, of either sign, spread over so many orders of magnitude."""
    residual, scaled = KINDS[kind]
    like = shape[0], channels, *shape[2:]
    x, other = (torch.randn(s, device=device).contiguous(memory_format=torch.channels_last) for s in (shape, like))
    weight = torch.randn(channels, shape[1], 1, 1, device=device) / shape[1] ** 0.5
    scale, shift, residual_scale = (torch.randn(channels, device=device) for _ in range(3))
    scale = scale * 10.0 ** torch.linspace(-spread, spread, channels, device=device)
    return x, weight, other if residual else None, scale, shift, residual_scale if scaled else None


def assert_right(case, dtype, **settings):
    *trained, scale, shift, residual_scale = case
    assert_as_accurate_as_eager(
        lambda x, weight, residual: ops.pointwise_affine(x, weight, scale, shift, residual, residual_scale),
        reference=lambda x, weight, residual: EagerPointwiseAffine().run(
            x, weight, scale, shift, residual, residual_scale
        ),
        inputs=trained,
        dtype=dtype,
        **settings,
    )


# no pixel, one, several tiles; channels that are a power of two, a multiple of 16 bytes, and neither
@interpreter
@pytest.mark.parametrize(
    ("shape", "channels", "kind", "dtype"),
    [
        ((0, 16, 2, 2), 32, "residual", torch.bfloat16),
        ((1, 16, 1, 1), 1, "scaled residual", torch.float16),
        ((1, 1, 1, 2), 16, "residual", torch.bfloat16),
        ((2, 64, 9, 8), 256, "residual", torch.float16),
        ((2, 256, 9, 8), 64, "alone", torch.bfloat16),
        ((3, 48, 7, 5), 136, "scaled residual", torch.bfloat16),
        ((2, 7, 5, 3), 130, "residual", torch.bfloat16),
    ],
)
def test_it_is_as_accurate_as_eager(triton, shape, channels, kind, dtype):
    assert_right(make_case(shape, channels, kind), dtype)


@interpreter
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_over_six_orders_of_magnitude_cost_no_accuracy(triton, scaled_weights, kind, dtype):
    assert_right(make_case((2, 8, 9, 8), 24, kind, spread=3.0), dtype)


@interpreter
def test_a_weight_times_a_scale_may_leave_fp16s_range(triton, scaled_weights):
    x, weight, residual = (torch.full(s, 1e-3).half() for s in ((1, 8, 9, 8), (24, 8, 1, 1), (1, 24, 9, 8)))
    trained = [t.requires_grad_() for t in (x, weight.fill_(100.0), residual)]
    scale = torch.full((24,), 1e3)
    y = ops.pointwise_affine(x, weight, scale, torch.zeros(24), residual)
    found = torch.autograd.grad(y, trained, torch.full_like(y, 1e-4))
    assert all(g.isfinite().all() for g in found)
    torch.testing.assert_close(found[0], torch.full_like(x, 240.0), rtol=1e-2, atol=0)


@interpreter
def test_images_weights_and_gradients_of_any_layout_work(triton, scaled_weights):
    x, weight, residual, *rest = make_case((2, 4, 5, 7), 40, kind="residual")
    weight = weight.contiguous(memory_format=torch.channels_last)
    expanded = residual[:, :, :1].expand(residual.shape)
    upstream = {"upstream": lambda y: torch.randn(7).to(y).expand(y.shape)}
    assert_right((x.contiguous(), weight, expanded, *rest), torch.bfloat16, **upstream)


def launched(kind, dtype=torch.bfloat16, residual_trains=True):
    """What a step launches of our kernels, on meta tensors."""
    x, weight, residual, *rest = make_case((2, 8, 9, 8), 24, kind, device="meta")
    x, weight, residual = (None if t is None else t.to(dtype).requires_grad_() for t in (x, weight, residual))
    if residual is not None:
        residual.requires_grad_(residual_trains)
    trained = [t for t in (x, weight, residual) if t is not None and t.requires_grad]

    def step():
        y = ops.pointwise_affine(x, weight, *rest[:2], residual, rest[2])
        torch.autograd.grad(y, trained, torch.empty_like(y))

    with use_backend(pointwise_affine="triton"):
        return count(step)


def test_a_residual_that_trains_costs_no_second_gradient(scaled_weights):
    one = launched("residual").bytes_moved
    features, weights = 2 * 24 * 9 * 8 * 2, 24 * 8 * 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "LAUNCH", 1 << 40)
        two = launched("residual").bytes_moved
    # The second gradient is written no more; for it weights are read, written and read, and their gradients, of 4 bytes, too.
    assert two - features < one < two - features + 16 * weights


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_pass_of_the_backward_are_a_launch_each(scaled_weights, kind, dtype):
    launches = launched(kind, dtype).launches
    ours = {name: n for name, n in launches.items() if name.endswith("_kernel")}
    assert ours == {"pointwise_kernel": 1, "channel_affine_backward_kernel": 1}


@interpreter
@pytest.mark.parametrize("trained", range(3))
def test_what_does_not_train_gets_no_gradient(triton, scaled_weights, trained):
    given = make_case(kind="residual")
    tensors = [t.bfloat16() for t in given[:3]]
    tensors[trained].requires_grad_()
    x, weight, residual = tensors
    y = ops.pointwise_affine(x, weight, *given[3:5], residual)
    y.backward(torch.ones_like(y))
    inside = (y > 0).double()
    through = inside * given[3][:, None, None]
    expected = (
        torch.einsum("bnhw,nk->bkhw", through, weight.double().flatten(1)),
        torch.einsum("bnhw,bkhw->nk", through, x.double())[:, :, None, None],
        inside,
    )[trained]
    assert [t.grad is not None for t in tensors] == [i == trained for i in range(3)]
    assert (tensors[trained].grad - expected).norm() <= 1e-2 * expected.norm()


@interpreter
def test_results_are_channels_last_and_only_inputs_and_y_are_kept(triton):
    x, weight, residual, scale, shift, residual_scale = make_case()
    x, weight, residual = x.bfloat16().requires_grad_(), weight.bfloat16().requires_grad_(), residual.bfloat16()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = ops.pointwise_affine(x, weight, scale, shift, residual, residual_scale)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in (x, weight, y, scale, residual_scale)}


@pytest.mark.parametrize("backend", [pytest.param("triton", marks=interpreter), "eager"])
def test_nan_goes_on_forward_and_backward_as_through_pytorchs_relu(backend):
    x, weight, _, scale, shift, _ = make_case(kind="alone")
    x, weight = x.bfloat16(), weight.bfloat16()
    x[0, 3, 1, 2] = float("nan")
    weight.requires_grad_()
    with use_backend(pointwise_affine=backend):
        y = ops.pointwise_affine(x, weight, scale, shift)
        (dweight,) = torch.autograd.grad(y, weight, torch.ones_like(y))
    assert y.isnan().nonzero()[:, [0, 2, 3]].unique(dim=0).tolist() == [[0, 1, 2]]
    assert dweight.isnan().nonzero()[:, 1].unique().tolist() == [3]


@interpreter
@pytest.mark.parametrize("kind", KINDS)
def test_the_double_backward_is_right(triton, scaled_weights, kind):
    given = make_case((2, 4, 5, 7), 40, kind)
    x, weight, residual = (None if t is None else t.bfloat16().requires_grad_() for t in given[:3])
    trained = [t for t in (x, weight, residual) if t is not None]
    dy = torch.randn(2, 40, 5, 7).bfloat16().requires_grad_()

    def penalty(backend):
        with use_backend(pointwise_affine=backend):
            y = ops.pointwise_affine(x, weight, *given[3:5], residual, given[5])
            found = torch.autograd.grad(y, trained, dy, create_graph=True)
            return torch.autograd.grad(sum(g.float().square().sum() for g in found), [x, weight, dy])

    for found, expected in zip(penalty("triton"), penalty("eager")):
        difference = (found.float() - expected.float()).norm()
        assert difference <= 5e-2 * expected.float().norm()  # what is rounded once more may stop at a ReLU


@interpreter
@pytest.mark.parametrize("kind", KINDS)
def test_opcheck_accepts_the_op(kind):
    x, weight, residual, *rest = make_case(kind=kind)
    x, weight, residual = (None if t is None else t.bfloat16().requires_grad_() for t in (x, weight, residual))
    torch.library.opcheck(
        torch.ops.detr_fast.pointwise_affine.default, (x, weight, *rest[:2], residual, rest[2]), rtol=2e-2, atol=2e-2
    )


@interpreter
def test_a_compiled_model_has_no_graph_break_and_equal_gradients(triton, scaled_weights):
    x, weight, residual, *rest = make_case((2, 4, 5, 7), 40)
    x, weight, residual = (t.bfloat16().requires_grad_() for t in (x, weight, residual))

    def step(x, weight):
        return ops.pointwise_affine(x, weight, *rest[:2], residual, rest[2]).float().square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for found, expected in zip(*(torch.autograd.grad(run(x, weight), (x, weight)) for run in (compiled, step))):
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


@interpreter
def test_autocast_casts_images_and_weights_and_their_gradients(triton):
    x, weight, residual, *rest = make_case(kind="residual")
    x.requires_grad_(), weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.pointwise_affine(x, weight, *rest[:2], residual.bfloat16())
    assert y.dtype == torch.bfloat16
    found = torch.autograd.grad(y.float().sum(), (x, weight))
    assert [g.dtype for g in found] == [torch.float32] * 2


@pytest.mark.parametrize("mapped", ["images", "gradients"])
def test_vmap_maps_over_samples(mapped):
    x, weight, residual, scale, shift, residual_scale = make_case((6, 24, 3, 5))

    def one(x):
        def run(x):
            return ops.pointwise_affine(x, weight, scale, shift, residual[:2], residual_scale)

        return torch.func.grad(lambda x: run(x).sum())(x) if mapped == "gradients" else run(x)

    samples = x.unflatten(0, (3, 2))
    for sample, found in zip(samples, torch.vmap(one)(samples)):
        torch.testing.assert_close(found, one(sample))


# ---------------------------------------------------------------------------------------------------------------------


def chosen(shape, channels, residual=True, dtype=torch.bfloat16, **changes):
    """What is chosen on a GPU of sm_90, and the reason against the kernel."""
    with FakeTensorMode():
        x, weight, other, scale, shift, _ = make_case(shape, channels, "residual", device="cuda")
        given = {"x": x.to(dtype), "weight": weight.to(dtype), "residual": other.to(dtype) if residual else None}
        given |= {"scale": scale, "shift": shift}
        given |= {name: change(given[name]) for name, change in changes.items()}
        seen = []
        with dispatch.recording(lambda op, decision: seen.append((op, decision))):
            ops.pointwise_affine(**given)
    op, decision = seen[0]
    assert op == "pointwise_affine"
    return decision.implementation.name, decision.reasons.get("triton")


def test_unmeasured_it_runs_as_a_convolution_and_a_pass(unmeasured):
    name, reason = chosen((4, 64, 200, 267), 256)
    assert (name, reason) == ("eager", "a matrix product against cuBLAS stays eager until measured: run detr-fast tune")


def test_it_is_chosen_where_measured_by_the_kind_of_product_and_the_residual(unmeasured, monkeypatch):
    kept = regimes.SHIPPED
    for residual in (True, False):
        for shape, channels in (((4, 64, 200, 267), 256), ((4, 256, 50, 67), 1024)):
            measured = Regime(measured_as(residual, shape[1], channels), "sm_90", 1 << 20, 1 << 20, "a test")
            monkeypatch.setattr(regimes, "SHIPPED", (*kept, measured))
            regimes.known.cache_clear(), dispatch.forget_decisions()
            assert chosen(shape, channels, residual)[0] == "triton"
            assert chosen(shape, channels, not residual)[0] == "eager"
            monkeypatch.setattr(regimes, "SHIPPED", (*kept, Regime(measured.op, "sm_90", NEVER, NEVER, "a test")))
            regimes.known.cache_clear(), dispatch.forget_decisions()
            name, reason = chosen(shape, channels, residual)
            assert name == "eager"
            assert reason.startswith("at all sizes PyTorch is faster")


def test_beyond_what_is_measured_it_is_left_alone(unmeasured, monkeypatch):
    measured = Regime(measured_as(True, 1024, 1024), "sm_90", 0, 0, "a test")
    monkeypatch.setattr(regimes, "SHIPPED", (measured,))
    regimes.known.cache_clear(), dispatch.forget_decisions()
    name, reason = chosen((4, 1024, 25, 34), 1024)
    assert name == "eager"
    assert reason.startswith("1024 to 1024 channels: measured, and chosen, up to 512 of one")


def test_what_the_kernel_cannot_take_is_left_to_eager_with_a_reason():
    shape = (1, 8, 3, 3)
    assert chosen(shape, 16, dtype=torch.float32)[1].startswith(
        "products in torch.float32: it takes bfloat16 and float16"
    )
    assert chosen(shape, 16, scale=lambda t: t.requires_grad_())[1] == (
        "a scale or shift needs a gradient: only eager gives one"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": 39}, r"\(39,\)"),
        ({"weight": (40, 23, 1, 1)}, r"weight \(40, 23, 1, 1\)"),
        ({"weight": (40, 24, 3, 3)}, r"weight \(40, 24, 3, 3\)"),
        ({"residual": (2, 24, 3, 5)}, r"residual \(2, 24, 3, 5\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change, message):
    names = ("x", "weight", "residual", "scale", "shift", "residual_scale")
    given = dict(zip(names, make_case())) | {name: torch.randn(shape) for name, shape in change.items()}
    with pytest.raises(ValueError, match=message):
        ops.pointwise_affine(**given)


def test_a_scale_without_a_residual_is_refused():
    x, weight, _, scale, shift, residual_scale = make_case()
    with pytest.raises(ValueError, match="neither residual nor its scale"):
        ops.pointwise_affine(x, weight, scale, shift, None, residual_scale)


@interpreter
def test_what_was_asked_for_by_name_and_cannot_be_is_an_error(triton):
    x, weight, residual, scale, shift, _ = make_case(kind="residual")
    with pytest.raises(BackendError, match=r"products in torch.float32: it takes bfloat16 and float16"):
        ops.pointwise_affine(x, weight, scale, shift)
    with pytest.raises(BackendError, match=r"a weight of torch.float32 beside torch.bfloat16 inputs"):
        ops.pointwise_affine(x.bfloat16(), weight, scale, shift)
    with pytest.raises(BackendError, match=r"a residual of torch.float32 beside a product in torch.bfloat16"):
        ops.pointwise_affine(x.bfloat16(), weight.bfloat16(), scale, shift, residual)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("width", "channels"), [(64, 256), (256, 64), (512, 2048), (100, 36)])
def test_on_a_gpu_it_is_as_accurate_as_eager(width, channels, kind, dtype):
    with use_backend(pointwise_affine="triton"):
        assert_right(make_case((2, width, sized(67, 3), 5), channels, kind, DEVICE), dtype)
