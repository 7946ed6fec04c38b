from __future__ import annotations

import pytest
import torch
from detr_fast.kernels.matching_cost import INVALID_COST
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.hardware import DEVICE, sized
from detr_fast import dispatch, ops
from detr_fast.dispatch import use_backend
from detr_fast.testing import assert_close_to_truth, count
from detr_fast.testing.interpreter import checked_interpreter

interpreter = pytest.mark.interpreter
FOCAL = pytest.mark.parametrize("focal", [False, True], ids=["softmax", "focal"])


def make_case(layers=2, counts=(3, 0), capacity=4, queries=8, classes=6, dtype=torch.float32):
    images = len(counts)
    logits = (torch.randn(layers, images, queries, classes) * 3).to(dtype)
    boxes = (torch.rand(layers, images, queries, 4) * 0.5 + 0.2).to(dtype)
    labels = torch.randint(classes - 1, (images, capacity))
    return logits, boxes, labels, torch.rand(images, capacity, 4) * 0.5 + 0.2, torch.tensor(counts)


def by_hand(logits, boxes, label, true):
    """Of one query and one box, in plain words."""
    (ax, ay, aw, ah), (bx, by, bw, bh) = boxes.tolist(), true.tolist()
    width = max(0.0, min(ax + aw / 2, bx + bw / 2) - max(ax - aw / 2, bx - bw / 2))
    height = max(0.0, min(ay + ah / 2, by + bh / 2) - max(ay - ah / 2, by - bh / 2))
    hull = (max(ax + aw / 2, bx + bw / 2) - min(ax - aw / 2, bx - bw / 2)) * (
        max(ay + ah / 2, by + bh / 2) - min(ay - ah / 2, by - bh / 2)
    )
    union = aw * ah + bw * bh - width * height
    giou = width * height / union - (hull - union) / hull
    return -logits.softmax(-1)[label].item() + 5 * (boxes - true).abs().sum().item() - 2 * giou


def test_costs_are_those_of_the_paper_pair_by_pair():
    case = [t.double() if t.is_floating_point() else t for t in make_case()]
    logits, boxes, labels, true_boxes, _ = case
    cost, _ = ops.matching_cost(*case)
    for layer in range(2):
        for query in range(8):
            for n in range(3):
                expected = by_hand(logits[layer, 0, query], boxes[layer, 0, query], labels[0, n], true_boxes[0, n])
                assert cost[layer, 0, n, query].item() == pytest.approx(expected, rel=1e-10)


@interpreter
@FOCAL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_kernel_is_as_accurate_as_eager(focal, dtype):
    # no multiple of a block of queries, boxes or classes; none, one and several blocks of boxes
    case = make_case(layers=2, counts=(19, 0, 1), capacity=21, queries=37, classes=70, dtype=dtype)
    weights = {"weights": (1.5, 5.0, 2.0), "focal": focal}
    with checked_interpreter(), use_backend(matching_cost="triton"):
        ours, broken = ops.matching_cost(*case, **weights)
    eager, _ = ops.matching_cost(*case, **weights)
    truth, _ = ops.matching_cost(*(t.double() if t.is_floating_point() else t for t in case), **weights)
    assert not broken.any()
    assert torch.equal(ours.isinf(), truth.isinf())
    finite = truth.isfinite()
    assert_close_to_truth("cost", ours[finite], eager[finite], truth[finite])


@FOCAL
@pytest.mark.parametrize("backend", [pytest.param("triton", marks=interpreter), "eager"])
def test_costs_are_infinite_behind_the_last_box_and_finite_elsewhere(focal, backend):
    logits, boxes, labels, true_boxes, counts = make_case(layers=1)
    logits[0, 0, 1] = float("nan")
    boxes[0, 0, 2] = float("inf")
    boxes[0, 0, 3, 2:] = 0
    boxes[0, 0, 4] = 1e12  # finite, but beyond what fp64 adds to other costs without rounding them away
    boxes[0, 1, 5, 0] = float("nan")  # an image without true boxes
    logits[0, 1, 6, 2] = float("-inf")  # a class ruled out is no fault
    with use_backend(matching_cost=backend):
        cost, broken = ops.matching_cost(logits, boxes, labels, true_boxes, counts, focal=focal)
    valid = torch.arange(4) < counts[:, None]
    assert torch.equal(cost.isinf(), ~valid[None, :, :, None].expand_as(cost))
    assert (cost[0, 0, :3, 1:3] == INVALID_COST).all()
    assert (cost[0, 0, :3, 4] == INVALID_COST).all()
    assert broken.nonzero().tolist() == [[0, 0, 1], [0, 0, 2], [0, 1, 5]]


@FOCAL
@pytest.mark.parametrize("backend", [pytest.param("triton", marks=interpreter), "eager"])
def test_labels_and_counts_out_of_range_stay_inside_the_tensors(focal, backend):
    logits, boxes, labels, true_boxes, _ = make_case(layers=1)
    labels[0, 0], labels[0, 1] = -7, 1 << 40
    with use_backend(matching_cost=backend):
        cost, _ = ops.matching_cost(logits, boxes, labels, true_boxes, torch.tensor([99, -1]), focal=focal)
    assert cost[:, 0].isfinite().all()
    assert cost[:, 1].isinf().all()


@interpreter
def test_any_layout_and_leading_shape_works():
    logits, boxes, labels, true_boxes, counts = make_case()
    expected, _ = ops.matching_cost(logits, boxes, labels, true_boxes, counts)
    far = (logits.transpose(0, 2).contiguous().transpose(0, 2), boxes[..., None].expand(*boxes.shape, 2)[..., 0])
    with use_backend(matching_cost="triton"):
        cost, broken = ops.matching_cost(far[0][None], far[1][None], labels, true_boxes, counts)
        single, _ = ops.matching_cost(logits[0], boxes[0], labels, true_boxes, counts)
    torch.testing.assert_close(cost[0], expected)
    torch.testing.assert_close(single, expected[0])
    assert broken.shape == (1, 2, 2, 8)


@pytest.mark.parametrize("backend", [pytest.param("triton", marks=interpreter), "eager"])
def test_no_boxes_or_no_images_give_empty_costs(backend):
    with use_backend(matching_cost=backend):
        cost, broken = ops.matching_cost(*make_case(counts=(0, 0), capacity=0))
        assert (cost.shape, broken.shape) == ((2, 2, 0, 8), (2, 2, 8))
        assert not broken.any()


@interpreter
@FOCAL
def test_opcheck_accepts_the_kernel(focal):
    torch.library.opcheck(torch.ops.detr_fast.matching_cost.default, (*make_case(), [1.0, 5.0, 2.0], focal))


def test_a_gpu_takes_one_kernel():
    chosen = []
    with FakeTensorMode(), dispatch.recording(lambda op, decision: chosen.append(decision.implementation.name)):
        case = [t.to("cuda") for t in make_case()]
        counts = count(lambda: ops.matching_cost(*case))
    assert chosen == ["triton"]
    assert counts.launches["matching_cost_kernel"] == 1
    assert counts.total_synchronisations == 0


def test_shapes_that_do_not_fit_are_refused():
    logits, boxes, labels, true_boxes, counts = make_case()
    with pytest.raises(ValueError, match=r"got logits \(2, 2, 8, 6\), boxes \(2, 8, 4\).*expected \(\.\.\., B, Q, K\)"):
        ops.matching_cost(logits, boxes[0], labels, true_boxes, counts)
    with pytest.raises(ValueError, match=r"counts \(1,\)"):
        ops.matching_cost(logits, boxes, labels, true_boxes, counts[:1])
    with pytest.raises(ValueError, match="K over 0"):  # or a kernel would read the logit of class -1
        ops.matching_cost(logits[..., :0], boxes, labels, true_boxes, counts)


@interpreter
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_other_integers_than_int64_count_the_same_and_other_dtypes_are_refused(backend):
    logits, boxes, labels, true_boxes, counts = make_case()
    with checked_interpreter(), use_backend(matching_cost=backend):
        found = ops.matching_cost(logits, boxes, labels.int(), true_boxes, counts.short())
        assert all(map(torch.equal, found, ops.matching_cost(logits, boxes, labels, true_boxes, counts)))
        with pytest.raises(TypeError, match=r"got counts of torch\.float32; expected integers"):
            ops.matching_cost(logits, boxes, labels, true_boxes, counts.float())


@pytest.mark.gpu
@FOCAL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu_the_kernel_is_as_accurate_as_eager(focal, dtype):
    case = [t.to(DEVICE) for t in make_case(sized(6, 1), (20, 0, 64, 1), 64, sized(300, 50), 92, dtype)]
    with use_backend(matching_cost="triton"):
        ours, _ = ops.matching_cost(*case, focal=focal)
    with use_backend(matching_cost="eager"):
        eager, _ = ops.matching_cost(*case, focal=focal)
        truth, _ = ops.matching_cost(*(t.double() if t.is_floating_point() else t for t in case), focal=focal)
    finite = truth.isfinite()
    assert_close_to_truth("cost", ours[finite], eager[finite], truth[finite])
