from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from detr_fast.kernels import launch
from detr_fast.kernels import stem as kernels
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.hardware import DEVICE, sized
from detr_fast import dispatch, ops
from detr_fast.dispatch import use_backend
from detr_fast.testing import assert_as_accurate_as_eager, count
from detr_fast.testing.interpreter import checked_interpreter

interpreter = pytest.mark.interpreter
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make_case(size=(9, 70), channels=16, batch=2, device="cpu"):
    images, weight = torch.randn(batch, 3, *size), torch.randn(channels, 3, 7, 7) / 12
    scale, shift = torch.randn(channels), torch.randn(channels)  # a negative scale turns the order of values round
    return tuple(t.to(device) for t in (images, weight, scale, shift))


def by_hand(images, weight, scale, shift):
    x = F.conv2d(images.to(weight.dtype), weight, stride=2, padding=3)
    x = torch.relu(x * scale[:, None, None] + shift[:, None, None]).to(weight.dtype)
    return F.max_pool2d(x, 3, stride=2, padding=1)


def assert_right(case, dtype):
    images, *rest = case
    assert_as_accurate_as_eager(
        ops.resnet_stem,
        reference=by_hand,
        inputs=[images.to(dtype).float(), *rest],
        dtype=(torch.float32, *[dtype] * 3),
        grad=False,
    )


# one pixel, odd sizes, several blocks of columns; no image
@interpreter
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "batch"), [((1, 1), 1), ((9, 70), 2), ((6, 133), 1), ((4, 4), 0)])
def test_the_stem_is_as_accurate_as_eager(size, batch, dtype):
    with checked_interpreter(), use_backend(resnet_stem="triton"):
        assert_right(make_case(size, batch=batch), dtype)


@interpreter
def test_images_of_any_layout_and_float_work():
    images, *rest = make_case()
    expected = ops.resnet_stem(images, *rest)
    with checked_interpreter(), use_backend(resnet_stem="triton"):
        for given in (images.contiguous(memory_format=torch.channels_last), images.mT.contiguous().mT):
            torch.testing.assert_close(ops.resnet_stem(given, *rest), expected)
        y = ops.resnet_stem(images.half(), *rest)
    torch.testing.assert_close(y, expected, rtol=1e-2, atol=1e-2)
    assert y.is_contiguous(memory_format=torch.channels_last)


@interpreter
@pytest.mark.parametrize("channels", [16, 64, 256])
def test_nan_reaches_every_window_that_sees_it(channels):
    x = torch.randn(1, channels, 5, 7)
    x[0, 1, 2, 3] = float("nan")
    rows = x.permute(0, 2, 3, 1)
    found = kernels.affine_pool(rows, torch.ones(channels), torch.zeros(channels)).permute(0, 3, 1, 2)
    torch.testing.assert_close(found, F.max_pool2d(x.relu(), 3, 2, 1), equal_nan=True)
    assert found.isnan().sum() == 2


def test_a_stem_that_trains_and_one_on_a_cpu_run_eagerly():
    images, weight, scale, shift = make_case(size=(8, 9))
    weight.requires_grad_()
    y = ops.resnet_stem(images, weight, scale, shift)
    torch.testing.assert_close(y, by_hand(images, weight, scale, shift))
    assert torch.autograd.grad(y.sum(), weight)[0].abs().sum() > 0
    reasons = []
    with FakeTensorMode(), dispatch.recording(lambda op, decision: reasons.append(decision.reasons.get("triton"))):
        images, weight, *rest = make_case(device="cuda")
        ops.resnet_stem(images, weight.requires_grad_(), *rest)
    assert reasons[0] == "the stem or its images need a gradient: only eager gives one"


def test_vmap_takes_each_samples_images():
    images, *rest = make_case(batch=4)
    found = torch.vmap(lambda one: ops.resnet_stem(one, *rest))(images.unflatten(0, (2, 2)))
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found.flatten(0, 1), ops.resnet_stem(images, *rest))


def test_a_gpu_takes_two_kernels_of_ours():
    with FakeTensorMode():
        case = make_case(device="cuda")
        counts = count(lambda: ops.resnet_stem(*case))
    assert (counts.launches["pixel_blocks_kernel"], counts.launches["affine_pool_kernel"]) == (1, 1)


@pytest.mark.parametrize(
    ("shape", "strides"),
    [((4, 3, 2048, 2048), (2**22, 512 * 2**22, 2**11, 1)), ((4, 3, 1, 9), (27, 9, 2**40, 1))],
    ids=["channels outside of a long batch", "one row of any stride"],
)
def test_images_that_lie_far_apart_are_copied(monkeypatch, shape, strides):
    launched = []
    monkeypatch.setattr(launch, "observers", [launched.append])
    images = torch.empty_strided(shape, strides, device="meta", dtype=torch.bfloat16)
    kernels.pixel_blocks(images, torch.bfloat16)
    (one,) = launched
    assert one.arguments[2:6] == torch.empty(shape, device="meta").stride()
    near = torch.empty(shape, device="meta").mT.contiguous().mT
    kernels.pixel_blocks(near, torch.float32)
    assert launched[1].arguments[0] is near


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ((65_536, 3, 8, 8), "65,536 images of 8 rows: it takes up to 65,535 images of 131,064 rows"),
        ((1, 3, 131_065, 8), "1 images of 131,065 rows"),
    ],
)
def test_more_images_or_rows_than_a_grid_holds_run_eagerly(shape, reason):
    found = []
    with FakeTensorMode(), dispatch.recording(lambda op, decision: found.append(decision)):
        images = torch.empty(shape, device="cuda")
        ops.resnet_stem(images, *make_case(device="cuda")[1:])
        with pytest.raises(ValueError, match="expected up to 65,535, of up to 131,064 rows"):
            kernels.pixel_blocks(images, torch.float32)
    assert reason in found[0].reasons["triton"]


@interpreter
def test_opcheck_accepts_both_ops():
    images, _, scale, shift = make_case()
    torch.library.opcheck(torch.ops.detr_fast.pixel_blocks.default, (images, torch.bfloat16))
    torch.library.opcheck(torch.ops.detr_fast.affine_pool.default, (torch.randn(2, 16, 5, 6), scale, shift))


def test_shapes_that_do_not_fit_are_refused():
    images, weight, scale, shift = make_case()
    with pytest.raises(ValueError, match=r"got images \(2, 9, 70\), weight \(16, 3, 7, 7\)"):
        ops.resnet_stem(images[:, 0], weight, scale, shift)
    with pytest.raises(ValueError, match=r"weight \(16, 3, 5, 7\).*expected \(B, 3, H, W\), \(N, 3, 7, 7\)"):
        ops.resnet_stem(images, weight[:, :, 1:6], scale, shift)
    with pytest.raises(ValueError, match="images of 4 channels; expected 3"):
        kernels.pixel_blocks(torch.zeros(1, 4, 2, 2), torch.float32)
    with pytest.raises(ValueError, match=r"got \(1, 2, 2, 24\); expected 16 to 1,024 channels, a power of two"):
        kernels.affine_pool(torch.zeros(1, 2, 2, 24), scale, shift)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_gpu_the_stem_is_as_accurate_as_eager(dtype):
    with use_backend(resnet_stem="triton"):
        assert_right(make_case(sized((133, 270), (9, 20)), 64, device=DEVICE), dtype)
