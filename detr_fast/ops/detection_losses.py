"""DETR's losses of matched predictions: the contract, the eager reference, the Triton kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from detr_fast import dispatch
from detr_fast.dispatch import Call, Implementation, Op, Situation, TritonImplementation
from detr_fast.kernels import detection_losses as kernels
from detr_fast.kernels.set_tiles import too_large
from detr_fast.ops import regimes
from detr_fast.ops.boundary import SEVERAL_DEVICES, define, double_backward, integers, on_one_device, wants_grad
from detr_fast.ops.boxes import BORDER_SLACK, generalized_iou

Losses = tuple[Tensor, Tensor, Tensor]


def detection_losses(
    logits: Tensor,
    boxes: Tensor,
    query: Tensor,
    labels: Tensor,
    true_boxes: Tensor,
    counts: Tensor,
    broken: Tensor,
    total: Tensor,
    *,
    ranks: int = 1,
    eos_coef: float = 0.1,
    focal: bool = False,
) -> Losses:
    """The losses of all decoder layers and images, given which query predicts which true box.

    Class loss: the mean cross-entropy, in which "no object", the last class, weighs eos_coef, also where it is a true box's
    label; or with `focal` the sum of sigmoid focal losses (alpha 0.25, gamma 2) of all but the last logit. Box losses: the sums over matched queries of
    |box - true box|₁ and of 1 - GIoU. All but the cross-entropy are divided by the number of boxes, sum(total) / ranks
    or 1 if that is more.

    Shapes: logits (L, B, Q, K) and boxes (L, B, Q, 4), (center x, center y, width, height); query (L, B, N) int64, the
    query of each true box, no one twice, or -1; labels (B, N) int64, true_boxes (B, N, 4), counts (B,) int64, how many of
    an image's N are boxes; broken (L, B, Q) bool, predictions that are no numbers; total (M,) int64.
    Returns, in fp32 (fp64 for fp64 logits):
        losses (3, L): class, L1 and GIoU loss, differentiable for logits and boxes;
        cardinality error (L,): by how many objects an image's prediction is off, on average;
        summary (3,): the last layer's class error, percent of matched queries with the wrong class (100 without any; "no object" aside); how
            many of all layers' predictions are broken; how many true boxes lie outside [0, 1], have no area or a label outside
            [0, K - 2]. Labels out of range count as the nearest in range: nothing here ends a CUDA context. But queries of a
            label -100 have no part in the cross-entropy, as in PyTorch's.
    Other integers than int64 are converted. Raises ValueError where the shapes do not fit, TypeError where dtypes don't.
    Sources: arXiv:2005.12872, sections 3.1 and A.2; arXiv:1902.09630 for GIoU; arXiv:1708.02002 for the focal loss.
    """
    images, size = (labels.shape[0], labels.shape[-1]) if labels.ndim == 2 else (-1, -1)
    if (
        logits.ndim != 4
        or logits.shape[0] < 1
        or logits.shape[1] != images
        or logits.shape[-1] < 2
        or boxes.shape != (*logits.shape[:3], 4)
        or query.shape != (logits.shape[0], images, size)
        or true_boxes.shape != (images, size, 4)
        or broken.shape != logits.shape[:3]
        or tuple(counts.shape) != (images,)
        or total.ndim != 1
    ):
        given = (logits, boxes, query, labels, true_boxes, counts, broken, total)
        raise ValueError(
            f"got logits, boxes, query, labels, true_boxes, counts, broken and total of shapes {[tuple(t.shape) for t in given]}; "
            "expected (L, B, Q, K), (L, B, Q, 4), (L, B, N), (B, N), (B, N, 4), (B,), (L, B, Q) and (M,), with L over 0 and K over 1"
        )
    if broken.dtype != torch.bool:
        raise TypeError(f"got broken of {broken.dtype}; expected torch.bool")
    query, labels, counts, total = integers(query=query, labels=labels, counts=counts, total=total)
    tensors = (logits, boxes, query, labels, true_boxes, counts, broken, total)
    if not (dispatch.intervening or logits.is_cuda):
        return _eager(*tensors, ranks, eos_coef, focal)
    return DETECTION_LOSSES(*tensors, ranks, eos_coef, focal)


@dataclass(frozen=True)
class DetectionLossesCall(Call):
    boxes_dtype: torch.dtype
    wanted: tuple[bool, bool]  # which of the two gradients
    layers: int
    images: int
    queries: int
    classes: int
    targets: int
    focal: bool
    one_device: bool

    def shapes(self) -> str:
        return f"({self.layers}, {self.images}, {self.queries}, {self.classes}), {self.targets} targets"


def _signature(logits: Tensor, boxes: Tensor, query: Tensor, *rest: Any) -> tuple[Any, ...]:
    predictions = ((t.shape, t.dtype, t.requires_grad) for t in (logits, boxes))
    places = ((type(t), t.device) for t in (logits, boxes, query, *rest[:5]))
    return *predictions, query.shape, *places, rest[-1]


def _describe(logits: Tensor, boxes: Tensor, query: Tensor, *rest: Any, situation: Situation) -> DetectionLossesCall:
    return DetectionLossesCall(
        device=logits.device,
        architecture=dispatch.architecture(logits.device),
        dtype=logits.dtype,
        tensor_type=dispatch.tensor_type((logits, boxes, query, *rest[:5])),
        needs_grad=wants_grad(logits, boxes),
        situation=situation,
        boxes_dtype=boxes.dtype,
        wanted=(wants_grad(logits), wants_grad(boxes)),
        layers=logits.shape[0],
        images=logits.shape[1],
        queries=logits.shape[2],
        classes=logits.shape[3],
        targets=query.shape[2],
        focal=rest[-1],
        one_device=on_one_device(logits, boxes, query, *rest[:5]),
    )


class TritonDetectionLosses(TritonImplementation):
    def why_not(self, call: DetectionLossesCall) -> str | None:
        if not call.one_device:
            return SEVERAL_DEVICES
        if call.boxes_dtype not in self.dtypes:
            return f"{str(call.boxes_dtype).removeprefix('torch.')} boxes: it takes bfloat16, float16, float32"
        return too_large(call.queries, call.classes, call.targets)

    def advice(self, call: DetectionLossesCall) -> str | None:
        if regimes.find("detection_losses", call.architecture) is None:
            return None  # unmeasured; but it is two launches where eager makes some 80
        size = call.layers * call.images * call.queries * call.classes * call.dtype.itemsize
        return regimes.advice("detection_losses", call, size)

    def note(self, call: DetectionLossesCall) -> str | None:
        return regimes.note("detection_losses", call)

    def compiled_key(self, call: DetectionLossesCall) -> Any:
        return call.device, call.dtype, call.boxes_dtype, call.wanted, call.focal

    def prepare(self, call: DetectionLossesCall) -> None:
        kernels.compile_detection_losses(call.dtype, call.boxes_dtype, call.focal, call.wanted, call.device)

    def run(self, *arguments: Any) -> Losses:
        return _forward(*arguments)[:3]


class EagerDetectionLosses(Implementation):
    name = "eager"

    def run(self, *arguments: Any) -> Losses:
        return _eager(*arguments)


DETECTION_LOSSES = Op(
    "detection_losses",
    signature=_signature,
    describe=_describe,
    implementations=(TritonDetectionLosses(), EagerDetectionLosses()),
)


# ---------------------------------------------------------------------------------------------------------------------
# The reference: masked sums, all layers and images at once.


def _eager(
    logits: Tensor,
    boxes: Tensor,
    query: Tensor,
    labels: Tensor,
    true_boxes: Tensor,
    counts: Tensor,
    broken: Tensor,
    total: Tensor,
    ranks: int,
    eos_coef: float,
    focal: bool,
) -> Losses:
    losses, classes = _losses(logits, boxes, query, labels, true_boxes, total, ranks, eos_coef, focal)
    with torch.no_grad():
        scores = logits.to(losses.dtype)
        class_error = _class_error(scores[-1], classes[-1], focal)
        broken_targets = _count_broken(labels, true_boxes, counts, logits.shape[-1] - 1)
        summary = torch.stack([t.to(losses.dtype) for t in (class_error, broken.sum(), broken_targets)])
        return losses, _cardinality_error(scores, counts, focal), summary


def _losses(
    logits: Tensor,
    boxes: Tensor,
    query: Tensor,
    labels: Tensor,
    true_boxes: Tensor,
    total: Tensor,
    ranks: int,
    eos_coef: float,
    focal: bool,
) -> tuple[Tensor, Tensor]:
    """losses (3, L), and the class (L, B, Q) that each query should have."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    logits, boxes, true_boxes = (t.to(dtype) for t in (logits, boxes, true_boxes))
    num_boxes = (total.sum().to(dtype) / ranks).clamp(min=1)
    matched, no_object = query >= 0, logits.shape[-1] - 1
    nearest = labels.clamp(0, no_object - focal)
    if not focal:
        nearest = torch.where(labels == -100, labels, nearest)
    classes = _target_classes(query, matched, nearest, logits.shape[2], no_object)
    if focal:
        class_loss = _focal_loss(logits[..., :-1], classes) / num_boxes
    else:
        class_loss = _cross_entropy(logits, classes, no_object, eos_coef)
    predicted = boxes.gather(2, query.clamp(min=0)[..., None].expand(-1, -1, -1, 4))
    true = true_boxes.expand_as(predicted)
    # Padding compares a harmless box with itself: multiplying a NaN by zero would not make it harmless.
    predicted = torch.where(matched[..., None], predicted, 0.5)
    true = torch.where(matched[..., None], true, 0.5)
    distance = (predicted - true).abs().sum((1, 2, 3))
    missing_overlap = (1 - generalized_iou(predicted, true)).sum((1, 2))
    return torch.stack((class_loss, distance / num_boxes, missing_overlap / num_boxes)), classes


def _target_classes(query: Tensor, matched: Tensor, labels: Tensor, num_queries: int, no_object: int) -> Tensor:
    # Unmatched slots write into one column more, which is then cut off.
    classes = torch.full((*query.shape[:2], num_queries + 1), no_object, device=query.device)
    slot = torch.where(matched, query, num_queries)
    return classes.scatter_(2, slot, labels.expand_as(slot))[..., :num_queries]


def _cross_entropy(logits: Tensor, classes: Tensor, no_object: int, eos_coef: float) -> Tensor:
    """(L,): each layer's weighted mean."""
    nll = F.cross_entropy(logits.flatten(0, 2), classes.flatten(), reduction="none").view(classes.shape)
    weight = (classes >= 0).to(nll.dtype).masked_fill(classes == no_object, eos_coef)
    return (nll * weight).sum((1, 2)) / weight.sum((1, 2))


def _focal_loss(logits: Tensor, classes: Tensor, alpha: float = 0.25) -> Tensor:
    """(L,): the sum over queries and classes."""
    positive = F.one_hot(classes, logits.shape[-1] + 1)[..., :-1].to(logits.dtype)
    probability = logits.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(logits, positive, reduction="none")
    error = probability + positive - 2 * probability * positive
    weight = 1 - alpha + (2 * alpha - 1) * positive
    return (weight * error**2 * entropy).sum((1, 2, 3))


def _class_error(logits: Tensor, classes: Tensor, focal: bool) -> Tensor:
    """Of one layer, (B, Q, K) and (B, Q)."""
    has_object = classes != logits.shape[-1] - 1
    guess = (logits[..., :-1] if focal else logits).argmax(-1)
    correct = (has_object & (guess == classes)).sum()
    return 100 - 100 * correct / has_object.sum().clamp(min=1)


def _cardinality_error(logits: Tensor, counts: Tensor, focal: bool) -> Tensor:
    # The largest logit is not the last one's: amax takes a fifth of argmax's time on a CPU.
    found = logits[..., :-1].amax(-1) >= (0 if focal else logits[..., -1])
    return (found.sum(-1) - counts).abs().to(logits.dtype).mean(-1)


def _count_broken(labels: Tensor, boxes: Tensor, counts: Tensor, no_object: int) -> Tensor:
    # Written so that NaN fails.
    good = ((boxes >= 0) & (boxes <= 1 + BORDER_SLACK)).all(-1) & (boxes[..., 2:] > 0).all(-1)
    good &= (labels >= 0) & (labels < no_object)
    valid = torch.arange(labels.shape[1], device=counts.device) < counts[:, None]
    return (valid & ~good).sum()


# ---------------------------------------------------------------------------------------------------------------------
# Registration.


def _run_forward(
    logits: Tensor, boxes: Tensor, query: Tensor, labels: Tensor, true_boxes: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    counts, broken, total, ranks, eos_coef, focal = rest
    inputs = (logits, boxes, query, labels, true_boxes.float(), counts, broken, total)
    return kernels.detection_losses_forward(*inputs, eos_coef, ranks, focal)


def _fake_forward(logits: Tensor, boxes: Tensor, query: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return logits.new_empty(shape, dtype=dtype)

    layers, each = logits.shape[0], logits.shape[:3]
    lse = new(0) if rest[-1] else new(2, *each)
    return new(3, layers), new(layers), new(3), lse, new(*each, dtype=torch.int32), new(2, layers)


def _run_backward(
    g: Tensor,
    logits: Tensor,
    boxes: Tensor,
    query: Tensor,
    labels: Tensor,
    true_boxes: Tensor,
    total: Tensor,
    lse: Tensor,
    match: Tensor,
    scale: Tensor,
    ranks: int,
    eos_coef: float,
    focal: bool,
    wanted: list[bool],
) -> tuple[Tensor, Tensor]:
    inputs = (g, logits, boxes, labels, true_boxes.float(), lse, match, scale)
    gradients = kernels.detection_losses_backward(*inputs, eos_coef, focal, with_logits=wanted[0], with_boxes=wanted[1])
    dlogits, dboxes = (logits.new_empty(0) if d is None else d for d in gradients)
    return dlogits, dboxes


def _fake_backward(g: Tensor, logits: Tensor, boxes: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    wanted = rest[-1]
    dlogits = logits.new_empty(logits.shape if wanted[0] else (0,))
    return dlogits, boxes.new_empty(boxes.shape) if wanted[1] else logits.new_empty(0)


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        losses, cardinality, summary, lse, match, scale = _forward.below(*arguments)
        logits, boxes, query, labels, true_boxes, _, _, total, *ctx.settings = arguments
        ctx.save_for_backward(logits, boxes, query, labels, true_boxes, total, lse, match, scale)
        ctx.mark_non_differentiable(cardinality, summary, lse, match, scale)
        ctx.set_materialize_grads(False)
        return losses, cardinality, summary, lse, match, scale

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, *_: Any) -> Any:
        if g is None:
            return (None,) * 11
        wanted = list(ctx.needs_input_grad[:2])
        gradients = _backward(g, *ctx.saved_tensors, *ctx.settings, wanted)
        return (*(d if want else None for d, want in zip(gradients, wanted)), *[None] * 9)


class _Backward(torch.autograd.Function):
    """The first backward; its own backward (double backward) recomputes eagerly."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        gradients = _backward.below(*arguments)
        ctx.save_for_backward(*arguments[:7])
        *ctx.settings, ctx.wanted = arguments[10:]
        ctx.set_materialize_grads(False)
        return gradients

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> Any:
        g, logits, boxes, *constant = ctx.saved_tensors

        def reference(logits: Tensor, boxes: Tensor) -> Tensor:
            return _losses(logits, boxes, *constant, *ctx.settings)[0]

        d_g, d_inputs = double_backward(reference, (logits, boxes), g, ctx.wanted, upstream)
        return (d_g, *d_inputs, *[None] * 11)


def _autograd_forward(logits: Tensor, boxes: Tensor, *rest: Any) -> Any:
    if wants_grad(logits, boxes):
        return _Forward.apply(logits, boxes, *rest)
    return _forward.below(logits, boxes, *rest)


def _autograd_backward(g: Tensor, logits: Tensor, boxes: Tensor, *rest: Any) -> Any:
    if wants_grad(g, logits, boxes):
        return _Backward.apply(g, logits, boxes, *rest)
    return _backward.below(g, logits, boxes, *rest)


_forward = define(
    "detection_losses(Tensor logits, Tensor boxes, Tensor query, Tensor labels, Tensor true_boxes, Tensor counts, "
    "Tensor broken, Tensor total, int ranks, float eos_coef, bool focal) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    run=_run_forward,
    fake=_fake_forward,
    autograd=_autograd_forward,
)
_backward = define(
    "detection_losses_backward(Tensor g, Tensor logits, Tensor boxes, Tensor query, Tensor labels, Tensor true_boxes, "
    "Tensor total, Tensor lse, Tensor match, Tensor scale, int ranks, float eos_coef, bool focal, bool[2] wanted) "
    "-> (Tensor, Tensor)",
    run=_run_backward,
    fake=_fake_backward,
    autograd=_autograd_backward,
)
