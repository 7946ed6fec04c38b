"""Hugging Face transformers' detection losses: DETR's, and Conditional DETR's with sigmoid focal classification.

Theirs goes decoder layer by decoder layer: costs to the host, an assignment image by image, indices back, checks that look at
the device. Ours does all layers and images at once, and on a GPU the host waits for nothing. A model asks for its loss by
its attribute `loss_function`: that is what is set and taken away, and only where it is transformers' own, with the code
that ours was written for. Whatever ours does not take (see `_fits`) goes to transformers' function.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import Module
from transformers.loss import loss_deformable_detr, loss_for_object_detection
from transformers.loss.loss_utils import LOSS_MAPPING
from transformers.modeling_utils import PreTrainedModel

from detr_fast import dispatch, ops
from detr_fast.adapters.base import Adapter, names, why_class_is_taken
from detr_fast.nn.weighted_sum import WeightedSum

_ATTRIBUTE = "_loss_function"  # where transformers keeps a loss function that was set
_ALPHA = 0.25  # of the focal loss on our ops
_NAMES = ("loss_ce", "loss_bbox", "loss_giou", "cardinality_error")
_sum = WeightedSum()

Loss = tuple[Tensor, dict[str, Tensor], Any]


@torch.compiler.disable  # numbers of boxes would be constants of a graph, which is compiled again for others
def object_detection_loss(*arguments: Any, **options: Any) -> Loss:
    """transformers' ForObjectDetectionLoss: softmax cross-entropy with "no object" as the last class."""
    return _either(False, loss_for_object_detection.ForObjectDetectionLoss, *arguments, **options)


@torch.compiler.disable
def focal_object_detection_loss(*arguments: Any, **options: Any) -> Loss:
    """transformers' DeformableDetrForObjectDetectionLoss: sigmoid focal loss, and no logit for "no object"."""
    return _either(True, loss_deformable_detr.DeformableDetrForObjectDetectionLoss, *arguments, **options)


def _either(
    focal: bool,
    theirs: Any,
    logits: Tensor,
    labels: Any,
    device: Any,
    pred_boxes: Tensor,
    config: Any,
    outputs_class: Any = None,
    outputs_coord: Any = None,
    **kwargs: Any,
) -> Loss:
    found = _loss(focal, logits, labels, pred_boxes, config, outputs_class, outputs_coord)
    if found is None:
        found = theirs(logits, labels, device, pred_boxes, config, outputs_class, outputs_coord, **kwargs)
    return found


class _Targets(NamedTuple):
    """True boxes padded to (B, N, 4) by copies of others, labels (B, N), counts (B,), and whether all are in range."""

    boxes: Tensor
    labels: Tensor
    counts: Tensor
    good: Tensor


def _loss(
    focal: bool, logits: Tensor, labels: Any, pred_boxes: Tensor, config: Any, outputs_class: Any, outputs_coord: Any
) -> Loss | None:
    """transformers' three results, or None where they are to come from transformers."""
    layers = (outputs_class, outputs_coord) if config.auxiliary_loss else ()
    if not _fits(focal, logits, labels, pred_boxes, config, layers):
        return None
    if not config.auxiliary_loss and _has_values(logits) and not dispatch.intervening:
        return None  # of one layer on a CPU, theirs takes 0.8 of the time (benchmarks/test_criterion.py); of two, twice
    auxiliary = None
    logits, boxes = logits[None], pred_boxes[None]
    if config.auxiliary_loss:
        auxiliary = loss_for_object_detection._set_aux_loss(outputs_class, outputs_coord)
        logits = torch.cat((outputs_class[:-1], logits))
        boxes = torch.cat((outputs_coord[:-1], boxes))
    with torch.no_grad():
        targets = _padded(labels, logits.device, config.num_labels)
        good = targets.good & (boxes[..., 2:] >= 0).all()
        if _has_values(logits) and not good:
            return None  # which says what is wrong
    if focal:
        logits = torch.nn.functional.pad(logits, (0, 1))  # our ops' logit for "no object", which has no part in it
    true = (targets.labels, targets.boxes, targets.counts)
    costs = (config.class_cost, config.bbox_cost, config.giou_cost)
    cost, broken = ops.matching_cost(logits, boxes, *true, weights=costs, focal=focal)
    if _has_values(logits) and broken.any():
        return None
    query = ops.linear_assignment(cost, targets.counts)
    total, ranks = _boxes_of_all_processes(targets.counts)
    eos_coef = 1.0 if focal else config.eos_coefficient
    values, cardinality, summary = ops.detection_losses(
        logits, boxes, query, *true, broken, total, ranks=ranks, eos_coef=eos_coef, focal=focal
    )
    # Where transformers would look and raise an error, without a look: losses that are NaN, and so are their gradients.
    good = good & (summary[1] == 0)
    by_name = _by_name(values * torch.where(good, 1.0, float("nan")), cardinality)
    weights = _weights(config)
    weighted = [name for name in by_name if name in weights]
    loss = _sum([by_name[name] for name in weighted], [weights[name] for name in weighted])
    return loss, by_name, auxiliary


def _fits(focal: bool, logits: Tensor, labels: Any, boxes: Tensor, config: Any, layers: Sequence[Any]) -> bool:
    """Whether everything is as transformers documents it; if not, transformers' function knows what to do."""
    classes = config.num_labels + (0 if focal else 1)
    predicted = logits.ndim == 3 and logits.shape[-1] == classes and tuple(boxes.shape) == (*logits.shape[:2], 4)
    if logits.device.type not in ("cpu", "cuda", "meta"):  # where the assignment has an implementation
        return False
    if not predicted or not isinstance(labels, Sequence) or len(labels) != logits.shape[0] or not labels:
        return False
    if not all(isinstance(one, Tensor) and one.ndim == 4 for one in layers):
        return False
    if focal and config.focal_alpha != _ALPHA:
        return False
    if config.class_cost == config.bbox_cost == config.giou_cost == 0:
        return False
    return all(_is_target(target, logits.device) for target in labels)


def _is_target(target: Any, device: torch.device) -> bool:
    if not isinstance(target, Mapping) or "class_labels" not in target or "boxes" not in target:
        return False
    labels, boxes = target["class_labels"], target["boxes"]
    return (
        isinstance(labels, Tensor)
        and isinstance(boxes, Tensor)
        and labels.dtype == torch.int64
        and boxes.is_floating_point()
        and labels.ndim == 1
        and tuple(boxes.shape) == (len(labels), 4)
        and labels.device == boxes.device == device
    )


def _padded(labels: Sequence[Mapping[str, Tensor]], device: torch.device, num_labels: int) -> _Targets:
    """What the shapes say travels to the device in one copy that the host does not wait for."""
    counts = [len(target["class_labels"]) for target in labels]
    most = max(counts)
    starts = [0, *accumulate(counts)]
    last = max(starts[-1] - 1, 0)
    places = [min(start + n, last) for start in starts[:-1] for n in range(most)]
    on_host = torch.tensor([*counts, *places], device="cpu")
    if device.type == "cuda" and torch.cuda.is_available():
        on_host = on_host.pin_memory()
    count, place = on_host.to(device, non_blocking=True).split([len(counts), len(places)])
    place = place.view(len(counts), most)
    classes = torch.cat([target["class_labels"] for target in labels])[place]
    boxes = torch.cat([target["boxes"] for target in labels])[place]
    in_range = (classes == classes.clamp(0, num_labels - 1)).all()
    return _Targets(boxes, classes, count, in_range & (boxes[..., 2:] >= 0).all() & (boxes == boxes).all())


def _has_values(tensor: Tensor) -> bool:
    """Whether a look costs nothing and there is something to see."""
    traced = isinstance(tensor, FakeTensor) or torch.jit.is_tracing()
    return tensor.device.type == "cpu" and not traced


def _boxes_of_all_processes(counts: Tensor) -> tuple[Tensor, int]:
    """Numbers whose sum divided by the second result is the number of boxes that transformers divides by.

    It takes accelerate's mean over processes, and divides that by their number once more.
    """
    theirs: Any = loss_for_object_detection
    state = getattr(theirs, "PartialState", None)  # where accelerate is installed
    if state is None or state._shared_state == {} or (processes := state().num_processes) == 1:
        return counts, 1
    # As theirs, to the dtype: another process's batch may be one that goes to transformers.
    return theirs.reduce(counts.sum().float()[None], "sum").long(), processes**2


def _by_name(values: Tensor, cardinality: Tensor) -> dict[str, Tensor]:
    """The last layer's losses, then the others', under transformers' names and in its order."""
    layers = len(cardinality)
    scalars = values.flatten().unbind(0)  # all at once: one launch then puts their gradients together
    rows = (*(scalars[start : start + layers] for start in (0, layers, 2 * layers)), cardinality.float().unbind(0))
    by_name = {name: row[-1] for name, row in zip(_NAMES, rows)}
    for layer in range(layers - 1):
        by_name |= {f"{name}_{layer}": row[layer] for name, row in zip(_NAMES, rows)}
    return by_name


def _weights(config: Any) -> dict[str, float]:
    weights = {
        "loss_ce": 1.0,
        "loss_bbox": float(config.bbox_loss_coefficient),
        "loss_giou": float(config.giou_loss_coefficient),
    }
    earlier = range(config.decoder_layers - 1) if config.auxiliary_loss else ()
    return weights | {f"{name}_{layer}": weight for layer in earlier for name, weight in weights.items()}


class HuggingFaceLoss(Adapter):
    """Detectors whose loss is one of transformers' two above."""

    @classmethod
    def consider(cls, module: Module) -> type[Module] | str | None:
        kind = getattr(module, "loss_type", None)
        if not isinstance(module, PreTrainedModel) or not isinstance(kind, str) or not kind.endswith(_TASKS):
            return None
        if (reason := why_class_is_taken(module)) is not None:
            return reason
        if "loss_function" not in names_read(inspect.unwrap(type(module).forward)):
            return None  # it computes its loss without asking for it
        if hasattr(module, _ATTRIBUTE):
            return "its loss_function was set by hand"
        asked: Any = PreTrainedModel.__dict__.get("loss_function")
        if inspect.getattr_static(module, "loss_function", None) is not asked:
            return "its class has a loss_function of its own"
        if names_read(getattr(asked, "fget", None)) != names(_PROPERTY):
            return "this version of transformers asks for the loss function differently"
        return _why_not_loss(LOSS_MAPPING.get(kind), module.config) or type(module)

    @classmethod
    def describe(cls, replacement: type[Module]) -> str:
        return "its loss on detr_fast.ops.detection_losses, all decoder layers at once"

    @classmethod
    def switched(cls, module: Module) -> None:
        kind: Any = module.loss_type
        known = _LOSSES.get(getattr(LOSS_MAPPING.get(kind), "__name__", ""))
        if known is not None and not hasattr(module, _ATTRIBUTE):  # nothing was set, or replaced, since
            module.__dict__[_ATTRIBUTE] = known[0]

    @classmethod
    def restored(cls, module: Module) -> None:
        if module.__dict__.get(_ATTRIBUTE) in (object_detection_loss, focal_object_detection_loss):
            del module.__dict__[_ATTRIBUTE]


def _why_not_loss(function: Any, config: Any) -> str | None:
    name = getattr(function, "__name__", str(function))
    if name.endswith("SegmentationLoss"):
        return f"its loss, transformers' {name}, is one over masks, too, which runs as it is"
    if name not in _LOSSES:
        return f"its loss, {name}, is none of those known: {', '.join(_LOSSES)}"
    if _find(name) is not function:
        return f"its loss, {name}, is not transformers' own"
    for path, known in _LOSSES[name][1].items():
        if (found := _find(path)) is None or names_read(found) != names(known):
            return f"this version of transformers computes its loss differently ({path})"
    alpha = getattr(config, "focal_alpha", _ALPHA)
    if name == _FOCAL and alpha != _ALPHA:
        return f"its focal_alpha is {alpha}, and our focal loss has {_ALPHA}"
    return None


def names_read(function: Any) -> frozenset[str]:
    """The globals, attributes and floats that a function's code reads, its comprehensions' too: as no version of Python differs."""
    read: set[str] = set()
    codes = [getattr(inspect.unwrap(function, stop=_is_no_wrapper_of_torchs), "__code__", None)]
    while codes:
        if (code := codes.pop()) is not None:
            read.update(code.co_names)
            read.update(repr(one) for one in code.co_consts if isinstance(one, float))
            codes += [one for one in code.co_consts if inspect.iscode(one)]
    return frozenset(read)


def _is_no_wrapper_of_torchs(function: Any) -> bool:
    code = getattr(
        function, "__code__", None
    )  # of `torch.no_grad`, say: others may do something else than what they wrap
    return code is None or not code.co_filename.startswith(os.path.dirname(torch.__file__))


def _find(path: str) -> Any:
    """A function of transformers' two modules, by name: "Class.method" or "function"."""
    first, *rest = path.split(".")
    found: Any = getattr(loss_for_object_detection, first, None) or getattr(loss_deformable_detr, first, None)
    for name in rest:
        found = getattr(found, name, None)
    return found


_TASKS = ("ForObjectDetection", "ForSegmentation")
_PROPERTY = "LOSS_MAPPING _loss_function getattr hasattr logger warning_once"
_FOCAL = "DeformableDetrForObjectDetectionLoss"
_TOTAL = (
    "_set_aux_loss auxiliary_loss bbox_cost bbox_loss_coefficient class_cost decoder_layers giou_cost giou_loss_coefficient items "
    "num_labels range sum to update "
)
_MATCH = (
    "as_tensor bbox_cost cat cdist center_to_corners_format class_cost cpu dtype enumerate finfo flatten generalized_box_iou "
    "giou_cost int64 len linear_sum_assignment max nan_to_num shape split torch view "
)
# What the functions read whose results ours gives; others compute something else.
_SHARED = {
    "_set_aux_loss": "zip",
    "ImageLoss.forward": "PartialState _shared_state as_tensor clamp device enumerate float get_loss is_accelerate_available item "
    "items iter len losses matcher next num_processes reduce sum torch update values",
    "ImageLoss.get_loss": "ValueError loss_boxes loss_cardinality loss_labels loss_masks",
    "ImageLoss.loss_boxes": "KeyError _get_source_permutation_idx cat center_to_corners_format diag functional "
    "generalized_box_iou l1_loss nn sum torch zip",
    "ImageLoss._get_source_permutation_idx": "cat enumerate full_like torch",
    "HungarianMatcher.__init__": "ValueError __init__ bbox_cost class_cost giou_cost requires_backends super",
    "generalized_box_iou": "ValueError all box_iou clamp max min torch",
    "box_iou": "box_area clamp max min torch",
    "box_area": "_upcast",
}
_LOSSES: dict[str, tuple[Any, dict[str, str]]] = {
    "ForObjectDetectionLoss": (
        object_detection_loss,
        _SHARED
        | {
            "ForObjectDetectionLoss": _TOTAL + "HungarianMatcher ImageLoss eos_coefficient",
            "ImageLoss.__init__": "Buffer __init__ empty_weight eos_coef losses matcher nn num_classes ones super torch",
            "ImageLoss.loss_labels": "KeyError _get_source_permutation_idx cat cross_entropy device empty_weight full functional "
            "int64 nn num_classes shape torch transpose zip",
            "ImageLoss.loss_cardinality": "argmax as_tensor device float functional l1_loss len nn shape sum torch",
            "HungarianMatcher.forward": _MATCH + "softmax",
        },
    ),
    _FOCAL: (
        focal_object_detection_loss,
        _SHARED
        | {
            _FOCAL: _TOTAL + "DeformableDetrHungarianMatcher DeformableDetrImageLoss focal_alpha",
            "DeformableDetrImageLoss.__init__": "Module __init__ focal_alpha losses matcher nn num_classes",
            "DeformableDetrImageLoss.loss_labels": "KeyError _get_source_permutation_idx cat device dtype focal_alpha full int64 "
            "layout num_classes scatter_ shape sigmoid_focal_loss torch unsqueeze zeros zip",
            "DeformableDetrImageLoss.loss_cardinality": "0.5 as_tensor device float functional l1_loss len max nn sigmoid sum torch "
            "values",
            "DeformableDetrHungarianMatcher.forward": _MATCH + "0.25 1e-08 2.0 log sigmoid",
            "sigmoid_focal_loss": "binary_cross_entropy_with_logits functional mean nn sigmoid sum",
        },
    ),
}
