from __future__ import annotations

import pytest
import torch
from detr_fast.kernels import detection_losses as kernels
from detr_fast.kernels.matching_cost import matching_cost_variant
from detr_fast.kernels.offline import compile_variant
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.hardware import DEVICE, sized
from detr_fast import dispatch, ops
from detr_fast.dispatch import use_backend
from detr_fast.testing import assert_as_accurate_as_eager, count
from detr_fast.testing.interpreter import checked_interpreter

interpreter = pytest.mark.interpreter
FOCAL = pytest.mark.parametrize("focal", [False, True], ids=["softmax", "focal"])


def make_case(layers=2, counts=(3, 0), capacity=4, queries=8, classes=6, scale=3.0, device="cpu"):
    """logits, boxes, and what else `detection_losses` takes; each image's true boxes are matched with random queries."""
    images = len(counts)
    logits = torch.randn(layers, images, queries, classes) * scale
    boxes = torch.rand(layers, images, queries, 4) * 0.5 + 0.2
    labels, true_boxes = torch.randint(classes - 1, (images, capacity)), torch.rand(images, capacity, 4) * 0.5 + 0.2
    number = torch.tensor(counts)
    order = torch.rand(layers, images, max(queries, capacity)).argsort(-1)[..., :capacity]
    query = torch.where((torch.arange(capacity) < number[:, None]) & (order < queries), order, -1)
    broken = torch.zeros(layers, images, queries, dtype=torch.bool)
    case = (logits, boxes, query, labels, true_boxes, number, broken, number)
    return [t.to(device) for t in case]


def of_backend(name, **options):
    def run(*case):
        with use_backend(detection_losses=name):
            return ops.detection_losses(*case, **options)[0]

    return run


@interpreter
def test_probabilities_of_logits_far_from_zero_lose_nothing_to_the_rounding_of_their_logsumexp():
    logits, boxes, *rest = make_case()
    with checked_interpreter():
        assert_as_accurate_as_eager(
            lambda l: of_backend("triton")(l, boxes, *rest),
            reference=lambda l: of_backend("eager")(l, boxes.to(l.dtype), *rest),
            inputs=[logits + 1000.0],
            dtype=torch.float32,
        )


@interpreter
@FOCAL
@pytest.mark.parametrize(
    ("dtypes", "case"),
    [
        # no multiple of a block of queries, boxes or classes; more boxes than queries; none at all
        (torch.float32, {"counts": (19, 0), "capacity": 21, "queries": 19, "classes": 70}),
        (torch.bfloat16, {"counts": (12, 3), "capacity": 12, "queries": 9, "classes": 65}),
        ((torch.float16, torch.float32), {"layers": 1, "counts": (0,), "capacity": 0, "queries": 1, "classes": 2}),
        (torch.float32, {"scale": 80.0}),  # probabilities of 0 and 1
    ],
    ids=["odd sizes", "more boxes than queries", "one query", "large logits"],
)
def test_losses_and_gradients_are_as_accurate_as_eager(focal, dtypes, case):
    logits, boxes, *rest = make_case(**case)
    pair = [dtypes] * 2 if isinstance(dtypes, torch.dtype) else dtypes
    true_boxes = rest[2].clone()
    with checked_interpreter():
        assert_as_accurate_as_eager(
            lambda l, b: of_backend("triton", focal=focal, ranks=2, eos_coef=0.3)(l, b, *rest),
            reference=lambda l, b: of_backend("eager", focal=focal, ranks=2, eos_coef=0.3)(l, b, *rest),
            inputs=[logits, boxes],
            dtype=pair,
        )
    assert torch.equal(rest[2], true_boxes)


@interpreter
@FOCAL
def test_errors_and_flags_equal_eagers(focal):
    case = make_case(layers=2, counts=(19, 2), capacity=20, queries=20, classes=70, scale=1.0)
    logits, _, query, labels, true_boxes, _, broken, _ = case
    logits.round_()  # so that there are ties
    labels[0, 4:19] = logits[-1, 0, query[-1, 0, 4:19], :-1].argmax(-1)
    logits[-1, 0, query[-1, 0, 4]] = 0  # all of them, whatever the label
    labels[0, 0], labels[0, 1], true_boxes[0, 2, 2], true_boxes[0, 3, 0] = -7, 1 << 40, 0.0, float("nan")
    labels[1, 2] = 99  # behind the last box
    broken[0, 1, 7] = broken[1, 0, 19] = True
    with checked_interpreter(), use_backend(detection_losses="triton"):
        _, cardinality, summary = ops.detection_losses(*case, focal=focal)
    with use_backend(detection_losses="eager"):
        _, expected_cardinality, expected = ops.detection_losses(*case, focal=focal)
    torch.testing.assert_close(cardinality, expected_cardinality)
    torch.testing.assert_close(summary, expected)
    assert summary[1:].tolist() == [2, 4]
    assert 0 < summary[0] < 100


@interpreter
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_a_true_box_labelled_no_object_weighs_as_such_and_is_told_of(backend):
    logits, boxes, query, labels, *rest = make_case(layers=1, counts=(3, 2), classes=6)
    query[0] = torch.tensor([[4, 1, 7, -1], [0, 2, -1, -1]])
    labels[0, 1] = labels[1, 0] = 5
    expected_classes = torch.full((2, 8), 5)
    expected_classes[0, 4], expected_classes[0, 7], expected_classes[1, 2] = labels[0, 0], labels[0, 2], labels[1, 1]
    logits.requires_grad_()
    with checked_interpreter(), use_backend(detection_losses=backend):
        losses, _, summary = ops.detection_losses(logits, boxes, query, labels, *rest, eos_coef=0.3)
        found = torch.autograd.grad(losses[0].sum(), logits)[0]
    weight = torch.tensor([1.0] * 5 + [0.3])
    expected = torch.nn.functional.cross_entropy(logits[0].transpose(1, 2), expected_classes, weight)
    torch.testing.assert_close(losses[0, 0], expected)
    torch.testing.assert_close(found, torch.autograd.grad(expected, logits)[0])
    with_object = expected_classes < 5
    right = (logits[0].argmax(-1) == expected_classes)[with_object].float().mean()
    torch.testing.assert_close(summary[[0, 2]], torch.stack((100 - 100 * right, torch.tensor(2.0))))


@interpreter
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_a_label_of_minus_100_has_no_part_in_cross_entropy(backend):
    logits, boxes, query, labels, *rest = make_case(layers=1, counts=(2,), classes=6)
    query[0, 0, :2], labels[0, 0] = torch.tensor([4, 1]), -100
    expected_classes = torch.full((1, 8), 5)
    expected_classes[0, 4], expected_classes[0, 1] = labels[0, 0], labels[0, 1]
    logits.requires_grad_()
    with checked_interpreter(), use_backend(detection_losses=backend):
        losses, _, summary = ops.detection_losses(logits, boxes, query, labels, *rest, eos_coef=0.3)
        found = torch.autograd.grad(losses[0].sum(), logits)[0]
    weight = torch.tensor([1.0] * 5 + [0.3])
    expected = torch.nn.functional.cross_entropy(logits[0].transpose(1, 2), expected_classes, weight)
    torch.testing.assert_close(losses[0, 0], expected)
    torch.testing.assert_close(found, torch.autograd.grad(expected, logits)[0])
    assert summary[2] == 1  # and it is told of


@interpreter
def test_a_gradient_at_ties_is_torchs():
    logits, boxes, query, labels, true_boxes, *rest = make_case(layers=1, counts=(4,), queries=4)
    query[0, 0] = torch.arange(4)
    boxes[0, 0, 0] = true_boxes[0, 0]  # the very box
    boxes[0, 0, 1], true_boxes[0, 1] = torch.tensor([0.25, 0.25, 0.5, 0.5]), torch.tensor([0.5, 0.25, 1.0, 0.25])
    boxes[0, 0, 2], true_boxes[0, 2] = torch.tensor([0.5, 0.5, 0.5, 0.5]), torch.tensor([0.5, 0.5, 0.25, 0.25])
    true_boxes[0, 3] = boxes[0, 0, 3] + 0.5  # far apart
    found = []
    for backend in ("triton", "eager"):
        leaf = boxes.clone().requires_grad_()
        losses = of_backend(backend)(logits, leaf, query, labels, true_boxes, *rest)
        found.append(torch.autograd.grad(losses.sum(), leaf)[0])
    torch.testing.assert_close(*found)


@interpreter
@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_gradients_are_written_only_where_wanted(wanted):
    logits, boxes, *rest = make_case()
    leaves = [t.requires_grad_(want) for t, want in zip((logits, boxes), wanted)]
    found = [
        torch.autograd.grad(of_backend(backend)(*leaves, *rest).sum(), [t for t in leaves if t.requires_grad])[0]
        for backend in ("triton", "eager")
    ]
    torch.testing.assert_close(*found)


@interpreter
def test_any_layout_works_and_the_upstream_gradient_may_be_expanded():
    logits, boxes, query, labels, true_boxes, *rest = make_case(layers=3)
    far = logits.transpose(0, 3).contiguous().transpose(0, 3).requires_grad_()
    wide = boxes[..., None].expand(*boxes.shape, 2)[..., 0].requires_grad_()
    near = logits.clone().requires_grad_(), boxes.clone().requires_grad_()
    others = (query.transpose(0, 2).contiguous().transpose(0, 2), labels.T.contiguous().T, true_boxes, *rest)
    ours = of_backend("triton")(far, wide, *others)
    expected = of_backend("eager")(*near, query, labels, true_boxes, *rest)
    torch.testing.assert_close(ours, expected)
    for one, other in zip(
        torch.autograd.grad(ours.sum(), (far, wide)), torch.autograd.grad(expected.sum(), near), strict=True
    ):
        torch.testing.assert_close(one, other)


@interpreter
def test_broken_predictions_make_the_class_loss_nan_and_leave_the_other_gradients():
    logits, boxes, query, *rest = make_case(layers=1, counts=(2, 1))
    query[0, 0, :2] = torch.tensor([0, 1])
    logits[0, 0, 4, 2] = float("nan")
    boxes[0, 0, 5] = float("nan")  # not matched
    boxes.requires_grad_()
    losses = of_backend("triton")(logits, boxes, query, *rest)
    assert losses[0].isnan().all()
    assert losses[1:].isfinite().all()
    assert torch.autograd.grad(losses[1:].sum(), boxes)[0].isfinite().all()


@interpreter
@FOCAL
def test_the_double_backward_is_eagers(focal):
    logits, boxes, *rest = make_case(layers=1)
    weights = torch.tensor([[1.0], [5.0], [2.0]])

    def penalty(backend):
        leaves = logits.clone().requires_grad_(), boxes.clone().requires_grad_()
        total = (of_backend(backend, focal=focal)(*leaves, *rest) * weights).sum()
        first = torch.autograd.grad(total, leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    for one, other in zip(penalty("triton"), penalty("eager"), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@interpreter
@FOCAL
def test_opcheck_accepts_forward_and_backward(focal):
    logits, boxes, *rest = make_case()
    op = torch.ops.detr_fast
    leaves = logits.requires_grad_(), boxes.requires_grad_()
    torch.library.opcheck(op.detection_losses.default, (*leaves, *rest, 1, 0.1, focal))
    outputs = op.detection_losses(*(t.detach() for t in leaves), *rest, 1, 0.1, focal)
    query, labels, true_boxes, _, _, total = rest
    inputs = (torch.randn(3, 2), logits.detach(), boxes.detach(), query, labels, true_boxes, total, *outputs[3:])
    torch.library.opcheck(op.detection_losses_backward.default, (*inputs, 1, 0.1, focal, [True, False]))


@interpreter
def test_a_compiled_call_has_no_graph_break():
    logits, boxes, *rest = make_case()
    logits.requires_grad_()
    with use_backend(detection_losses="triton"):
        compiled = torch.compile(lambda *case: ops.detection_losses(*case)[0], fullgraph=True, backend="aot_eager")
        found = compiled(logits, boxes, *rest)
    expected = of_backend("eager")(logits, boxes, *rest)
    torch.testing.assert_close(found, expected)
    for one, other in zip(torch.autograd.grad(found.sum(), logits), torch.autograd.grad(expected.sum(), logits)):
        torch.testing.assert_close(one, other)


@FOCAL
def test_a_gpu_takes_two_kernels_and_never_waits(focal):
    chosen = []
    with FakeTensorMode(), dispatch.recording(lambda op, decision: chosen.append(decision.implementation.name)):
        case = [t.to("cuda") for t in make_case()]
        counts = count(lambda: ops.detection_losses(*case, focal=focal))
    assert chosen == ["triton"]
    assert dict(counts.launches) == {"detection_losses_kernel": 1, "sum_detection_losses_kernel": 1}
    assert counts.total_synchronisations == 0


@pytest.mark.offline
def test_what_the_catalog_leaves_out_compiles_without_spills():
    half, whole = torch.bfloat16, torch.float32
    variants = [kernels.forward_variant(half, half, True), kernels.backward_variant(whole, whole, False, True, True)]
    variants += [matching_cost_variant(half, half, True), kernels.sum_variant(True)]
    for variant in variants:
        assert compile_variant(variant, "sm_90")[2].spills == 0, variant


def test_shapes_that_do_not_fit_are_refused():
    logits, boxes, *rest = make_case()
    with pytest.raises(ValueError, match=r"shapes \[\(2, 2, 8, 6\), \(2, 8, 4\), .*expected \(L, B, Q, K\)"):
        ops.detection_losses(logits, boxes[0], *rest)
    with pytest.raises(ValueError, match="K over 1"):
        ops.detection_losses(logits[..., :1], boxes, *rest)
    query, labels, true_boxes, counts, broken, total = rest
    with pytest.raises(ValueError, match="L over 0"):  # the summary is the last layer's
        ops.detection_losses(logits[:0], boxes[:0], query[:0], labels, true_boxes, counts, broken[:0], total)


@interpreter
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_other_integers_than_int64_count_the_same_and_other_dtypes_are_refused(backend):
    logits, boxes, query, labels, true_boxes, counts, broken, total = make_case()
    small = query.int(), labels.to(torch.uint8), true_boxes, counts.int(), broken, total.short()
    with checked_interpreter(), use_backend(detection_losses=backend):
        found = ops.detection_losses(logits, boxes, *small)
        expected = ops.detection_losses(logits, boxes, query, labels, true_boxes, counts, broken, total)
    assert all(map(torch.equal, found, expected))
    with use_backend(detection_losses=backend):
        with pytest.raises(TypeError, match=r"got labels of torch\.float32; expected integers"):
            ops.detection_losses(logits, boxes, query, labels.float(), true_boxes, counts, broken, total)
        with pytest.raises(TypeError, match=r"got broken of torch\.int64; expected torch\.bool"):
            ops.detection_losses(logits, boxes, query, labels, true_boxes, counts, broken.long(), total)


@pytest.mark.gpu
@FOCAL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu_losses_and_gradients_are_as_accurate_as_eager(focal, dtype):
    logits, boxes, *rest = make_case(
        sized(6, 1), sized((20, 0, 64, 1), (3, 0, 9, 1)), sized(64, 9), sized(300, 30), 92, device=DEVICE
    )
    assert_as_accurate_as_eager(
        lambda l, b: of_backend("triton", focal=focal)(l, b, *rest),
        reference=lambda l, b: of_backend("eager", focal=focal)(l, b, *rest),
        inputs=[logits, boxes],
        dtype=dtype,
    )
