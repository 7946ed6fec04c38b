from __future__ import annotations

import math

import pytest
import torch
from detr_fast.kernels import sine_positions as kernels
from torch._subclasses.fake_tensor import FakeTensorMode

from detr_fast import dispatch, ops
from detr_fast.dispatch import use_backend
from detr_fast.testing import count
from detr_fast.testing.interpreter import checked_interpreter

interpreter = pytest.mark.interpreter
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# What the original and Deformable DETR's code ask for, and rows and columns as they are.
KINDS = {"original": {}, "deformable": {"shift": -0.5}, "raw": {"normalize": False}, "seen": {"padding": False}}


def mask_of(height, width, *visible):
    mask = torch.ones(len(visible), height, width, dtype=torch.bool)
    for image, (rows, columns) in zip(mask, visible):
        image[:rows, :columns] = False
    return mask


def by_hand(mask, features, temperature=10_000.0, normalize=True, scale=2 * math.pi, shift=0.0, padding=True):
    """One number after the other, in fp64."""
    visible = (mask != padding).double()
    axes = []
    for axis in (1, 2):
        position = visible.cumsum(axis)
        if normalize:
            position = (position + shift) / (visible.sum(axis, keepdim=True) + 1e-6) * scale
        for k in range(features):
            angle = position / temperature ** (2 * (k // 2) / features)
            axes.append(angle.cos() if k % 2 else angle.sin())
    return torch.stack(axes, -1)


def where_pixels_are_visible(mask, positions, padding=True, **_):
    """Of rows and columns with no visible pixel nobody asks; where shifted, they are at -3 million."""
    seen = (mask != padding).any(1, keepdim=True) & (mask != padding).any(2, keepdim=True)
    return positions.double()[seen]


# one pixel; more columns than a program writes and rows than it counts at once; channels that are no power of two; a
# mask that is no rectangle; an image without a visible pixel; no image; no pixel
CASES = {
    "one pixel": (mask_of(1, 1, (1, 1)), 4),
    "two images": (mask_of(35, 11, (35, 11), (20, 7)), 128),
    "odd channels": (mask_of(3, 40, (3, 33), (2, 40)), 18),
    "holes": (torch.rand(2, 9, 7, generator=torch.Generator().manual_seed(0)) < 0.5, 32),
    "nothing visible": (mask_of(4, 5, (4, 5), (0, 0)), 8),
    "no image": (torch.zeros(0, 3, 3, dtype=torch.bool), 8),
    "no pixel": (torch.zeros(2, 0, 3, dtype=torch.bool), 8),
}


@interpreter
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_the_kernel_is_as_accurate_as_eager(case, kind):
    mask, features = CASES[case]
    exact = by_hand(mask, features, **KINDS[kind])
    for dtype in DTYPES:
        eager = ops.sine_positions(mask, features, dtype=dtype, **KINDS[kind])
        with checked_interpreter(), use_backend(sine_positions="triton"):
            found = ops.sine_positions(mask, features, dtype=dtype, **KINDS[kind])
        assert (found.shape, found.dtype) == (exact.shape, dtype)
        assert found.isfinite().all()
        right, found, eager = (where_pixels_are_visible(mask, t, **KINDS[kind]) for t in (exact, found, eager))
        assert (found - right).norm() <= 2 * (eager - right).norm()
        torch.testing.assert_close(found, right, rtol=0, atol=1e-5 + torch.finfo(dtype).eps)


@interpreter
def test_other_temperatures_and_scales_and_a_mask_of_any_strides():
    mask = CASES["two images"][0]
    settings = {"temperature": 20.0, "scale": 1.0}
    with checked_interpreter(), use_backend(sine_positions="triton"):
        for given in (mask, mask.mT.contiguous().mT, mask[:1].expand(2, -1, -1), mask[:, ::2, ::3]):
            found = ops.sine_positions(given, 16, **settings)
            torch.testing.assert_close(found.double(), by_hand(given, 16, **settings), rtol=0, atol=1e-6)


@interpreter
def test_waves_of_large_angles_are_right():
    """637 turns, of angles that are rounded to 2**-13."""
    mask = mask_of(40, 1, (40, 1))
    with checked_interpreter(), use_backend(sine_positions="triton"):
        found = ops.sine_positions(mask, 2, 1.0, scale=4000.0)
    torch.testing.assert_close(found.double(), by_hand(mask, 2, 1.0, scale=4000.0), rtol=0, atol=5e-4)


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
def test_eager_is_what_the_paper_says(dtype):
    for kind in KINDS.values():
        mask, features = CASES["two images"]
        found = ops.sine_positions(mask, features, dtype=dtype, **kind)
        assert found.dtype == dtype
        tolerance = 1e-9 if dtype == torch.float64 else 1e-5 + torch.finfo(dtype).eps
        found, right = (where_pixels_are_visible(mask, t, **kind) for t in (found, by_hand(mask, features, **kind)))
        torch.testing.assert_close(found, right, rtol=0, atol=tolerance)


def test_a_gpu_takes_one_launch_also_in_a_module():
    from detr_fast import nn

    with FakeTensorMode():
        mask = torch.zeros(4, 25, 34, dtype=torch.bool, device="cuda")
        tokens = torch.empty(4, 25, 34, 256, dtype=torch.bfloat16, device="cuda")
        counts = count(lambda: nn.SinePositionEmbedding2D(256, add=False)(tokens, mask))
    assert dict(counts.launches) == {"sine_positions_kernel": 1}


@pytest.mark.parametrize(
    ("shape", "features", "reason"),
    [
        ((65_536, 1, 1), 2, "up to 65,535 images of as many rows"),
        ((1, 4096, 4096), 64, "each of less than 2**31 elements"),
        ((1, 2, 2), 2050, "an even number of features, up to 2,048"),
    ],
)
def test_what_the_kernel_does_not_take_runs_eagerly(shape, features, reason):
    found = []
    with FakeTensorMode(), dispatch.recording(lambda op, decision: found.append(decision)):
        mask = torch.empty(shape, dtype=torch.bool, device="cuda")
        ops.sine_positions(mask, features)
        with pytest.raises(ValueError, match="it takes"):
            kernels.sine_positions(mask, features, 1e4, True, 1.0, 0.0, True, torch.float32)
    assert found[0].implementation.name == "eager"
    assert reason in found[0].reasons["triton"]


@interpreter
def test_opcheck_accepts_the_op():
    arguments = (CASES["two images"][0], 16, 10_000.0, True, 6.28, 0.0, True, torch.bfloat16)
    torch.library.opcheck(torch.ops.detr_fast.sine_positions.default, arguments)


def test_under_torch_compile_it_is_left_to_inductor_in_one_graph():
    mask = CASES["two images"][0]
    found = torch.compile(lambda m: ops.sine_positions(m, 16), backend="aot_eager", fullgraph=True)(mask)
    torch.testing.assert_close(found, ops.sine_positions(mask, 16))


def test_vmap_takes_each_samples_mask():
    mask = CASES["two images"][0]
    found = torch.vmap(lambda one: ops.sine_positions(one[None], 16)[0])(mask)
    torch.testing.assert_close(found, ops.sine_positions(mask, 16))


def test_what_is_no_mask_is_refused():
    for mask in (torch.zeros(2, 3, dtype=torch.bool), torch.zeros(1, 2, 3)):
        with pytest.raises(ValueError, match=r"got a mask .* expected \(N, H, W\) of torch.bool"):
            ops.sine_positions(mask, 8)
    with pytest.raises(ValueError, match=r"7 features.*an even number"):
        ops.sine_positions(torch.zeros(1, 2, 3, dtype=torch.bool), 7)
