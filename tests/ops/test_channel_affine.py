from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.hardware import DEVICE, sized
from detr_fast import dispatch, ops
from detr_fast.dispatch import BackendError, use_backend
from detr_fast.ops.channel_affine import EagerChannelAffine
from detr_fast.testing import assert_as_accurate_as_eager, count
from detr_fast.testing.interpreter import checked_interpreter

interpreter = pytest.mark.interpreter
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = {"alone": (False, False), "residual": (True, False), "scaled residual": (True, True)}


@pytest.fixture
def triton():
    with checked_interpreter(), use_backend(channel_affine="triton"):
        yield


def make_case(shape=(2, 24, 3, 5), kind="scaled residual", device="cpu"):
    """x, residual, and what there is for each channel; a negative scale turns the order of values round."""
    residual, scaled = KINDS[kind]
    x, other = (torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last) for _ in range(2))
    scale, shift, residual_scale = (torch.randn(shape[1], device=device) for _ in range(3))
    return x, other if residual else None, scale, shift, residual_scale if scaled else None


def assert_right(case, dtype, function=ops.channel_affine, **settings):
    *images, scale, shift, residual_scale = case
    assert_as_accurate_as_eager(
        lambda x, residual: function(x, scale, shift, residual, residual_scale),
        reference=lambda x, residual: EagerChannelAffine().run(x, scale, shift, residual, residual_scale),
        inputs=images,
        dtype=dtype,
        **settings,
    )


# no pixel, one, no multiple of a tile; channels that are a power of two, a multiple of 16 bytes, and neither
@interpreter
@pytest.mark.parametrize(
    ("shape", "kind", "dtype"),
    [
        ((0, 16, 2, 2), "residual", torch.float32),
        ((2, 16, 0, 3), "alone", torch.bfloat16),
        ((1, 16, 1, 1), "scaled residual", torch.bfloat16),
        ((2, 64, 9, 8), "alone", torch.bfloat16),
        ((2, 64, 9, 8), "residual", torch.float16),
        ((3, 48, 7, 5), "scaled residual", torch.float32),
        ((1, 256, 5, 7), "residual", torch.bfloat16),
        ((2, 7, 5, 3), "scaled residual", torch.float16),
        ((1, 2048, 2, 3), "scaled residual", torch.bfloat16),
        ((1, 5000, 1, 2), "alone", torch.float32),
    ],
)
def test_it_is_as_accurate_as_eager(triton, shape, kind, dtype):
    assert_right(make_case(shape, kind), dtype)


@interpreter
def test_images_and_gradients_of_any_layout_work(triton):
    x, residual, *rest = make_case()
    expanded = residual[:, :, :1].expand(x.shape)
    assert_right((x.contiguous(), expanded, *rest), torch.float32, upstream=lambda y: torch.randn(5).expand(y.shape))


@interpreter
def test_results_are_channels_last_and_only_y_is_kept(triton):
    x, residual, scale, shift, residual_scale = make_case()
    x.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = ops.channel_affine(x, scale, shift, residual, residual_scale)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert {t.data_ptr() for t in kept} == {y.data_ptr(), scale.data_ptr(), residual_scale.data_ptr()}


@pytest.mark.parametrize("mapped", ["images", "scales", "gradients"])
def test_vmap_gives_each_samples_images_channels_last(mapped):
    x, residual, scale, shift, residual_scale = make_case((6, 24, 3, 5))

    def one(x, scale):
        if mapped == "gradients":
            return torch.func.grad(lambda x: ops.channel_affine(x, scale, shift).sum())(x)
        return ops.channel_affine(x, scale, shift, residual[:2], residual_scale)

    inputs = (x[:2], torch.randn(3, 24)) if mapped == "scales" else (x.unflatten(0, (3, 2)), scale)
    dims = (None, 0) if mapped == "scales" else (0, None)
    for i, found in enumerate(torch.vmap(one, dims)(*inputs)):
        assert found.is_contiguous(memory_format=torch.channels_last)
        expected = one(*(t if dim is None else t[i] for t, dim in zip(inputs, dims)))
        torch.testing.assert_close(found, expected)


@interpreter
def test_a_residual_that_does_not_train_gets_no_gradient(triton):
    x, residual, scale, shift, residual_scale = make_case()
    for x_trains in (True, False):
        x.requires_grad_(x_trains), residual.requires_grad_(not x_trains)
        y = ops.channel_affine(x, scale, shift, residual, residual_scale)
        (found,) = torch.autograd.grad(y.sum(), x if x_trains else residual)
        factor = scale if x_trains else residual_scale
        torch.testing.assert_close(found, (y > 0) * factor[:, None, None])


@pytest.mark.parametrize("backend", [pytest.param("triton", marks=interpreter), "eager"])
def test_nan_goes_on_forward_and_backward_as_through_pytorchs_relu(backend):
    x, _, scale, shift, _ = make_case(kind="alone")
    x[0, 3, 1, 2] = float("nan")
    x.requires_grad_()
    with use_backend(channel_affine=backend):
        y = ops.channel_affine(x, scale, shift)
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert y.isnan().nonzero().tolist() == [[0, 3, 1, 2]]
    assert dx[0, 3, 1, 2] == scale[3]


@interpreter
def test_the_double_backward_is_right(triton):
    x, residual, scale, shift, residual_scale = make_case()
    dy = torch.randn_like(x).requires_grad_()
    x.requires_grad_(), residual.requires_grad_()

    def penalty(backend):
        with use_backend(channel_affine=backend):
            y = ops.channel_affine(x, scale, shift, residual, residual_scale)
            dx, dresidual = torch.autograd.grad(y, (x, residual), dy, create_graph=True)
            return torch.autograd.grad((dx * dresidual).sum() + dx.square().sum(), dy)

    torch.testing.assert_close(penalty("triton"), penalty("eager"))


@interpreter
@pytest.mark.parametrize("kind", KINDS)
def test_opcheck_accepts_both_ops(kind):
    x, residual, scale, shift, residual_scale = make_case(kind=kind)
    x.requires_grad_()
    forward, backward = torch.ops.detr_fast.channel_affine, torch.ops.detr_fast.channel_affine_backward
    torch.library.opcheck(forward.default, (x, scale, shift, residual, residual_scale))
    y = forward(x.detach(), scale, shift, residual, residual_scale)
    arguments = (torch.randn_like(y).requires_grad_(), y, scale, residual_scale, [True, residual is not None])
    torch.library.opcheck(backward.default, arguments)


@interpreter
def test_a_compiled_model_has_no_graph_break_and_equal_gradients(triton):
    x, residual, *rest = make_case()
    x.requires_grad_()

    def step(x):
        return ops.channel_affine(x, *rest[:2], residual, rest[2]).square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    found, expected = (torch.autograd.grad(run(x), x)[0] for run in (compiled, step))
    torch.testing.assert_close(found, expected)


def test_a_gpu_takes_one_kernel():
    with FakeTensorMode():
        x, residual, *rest = make_case(device="cuda")
        counts = count(lambda: ops.channel_affine(x, *rest[:2], residual, rest[2]))
    assert counts.launches["channel_affine_kernel"] == 1


def test_what_no_kernel_takes_is_left_to_eager_with_a_reason():
    with FakeTensorMode():
        x, _, scale, shift, _ = make_case(kind="alone", device="cuda")
        reasons = []
        with dispatch.recording(lambda op, decision: reasons.append(decision.reasons.get("triton"))):
            ops.channel_affine(x, scale.requires_grad_(), shift)
            ops.channel_affine(x, scale.detach(), shift, x.half())
    assert reasons[0] == "a scale or shift needs a gradient: only eager gives one"
    assert reasons[1].startswith("a residual of torch.float16 beside torch.float32")


def test_shapes_that_do_not_fit_are_refused():
    x, residual, scale, shift, residual_scale = make_case()
    with pytest.raises(ValueError, match=r"got x \(2, 24, 3, 5\), \(24,\), \(23,\) for its channels and residual None"):
        ops.channel_affine(x, scale, shift[1:])
    with pytest.raises(ValueError, match="neither residual nor its scale"):
        ops.channel_affine(x, scale, shift, None, residual_scale)
    with pytest.raises(ValueError, match="a residual like x"):
        ops.channel_affine(x, scale, shift, residual[:, :, 1:])


@interpreter
def test_what_was_asked_for_by_name_and_cannot_be_is_an_error(triton):
    x, _, scale, shift, _ = make_case(kind="alone")
    with pytest.raises(BackendError, match="float64 inputs: it takes bfloat16, float16, float32"):
        ops.channel_affine(x.double(), scale, shift)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [64, 100, 2048])
def test_on_a_gpu_it_is_as_accurate_as_eager(channels, kind, dtype):
    with use_backend(channel_affine="triton"):
        assert_right(make_case((2, channels, sized(67, 3), 5), kind, DEVICE), dtype)
