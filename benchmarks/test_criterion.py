"""Matcher and criterion beside the original's algorithm: 6 layers, 8 images, 20 boxes an image, 100 queries.

python -m pytest benchmarks/test_criterion.py                  # needs a GPU
python -m benchmarks.test_criterion                            # on the CPU: the ratio, both in turn
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.hardware import DEVICE, NEEDS_GPU, sized
from benchmarks.libraries import library
from benchmarks.original_step import OriginalCriterion
from benchmarks.timing import Claim, NotInstalled, compare
from detr_fast.models import ModelConfig, Targets, build_criterion

pytestmark = NEEDS_GPU

LAYERS, IMAGES, BOXES, QUERIES, CLASSES = sized((6, 8, 20, 100, 91), (2, 2, 3, 10, 91))


def make_case(device: str) -> tuple[dict[str, Any], list[dict[str, Tensor]], Targets]:
    torch.manual_seed(0)
    layers = [
        {
            "pred_logits": torch.randn(IMAGES, QUERIES, CLASSES + 1, device=device).requires_grad_(),
            "pred_boxes": (torch.rand(IMAGES, QUERIES, 4, device=device) * 0.5 + 0.2).requires_grad_(),
        }
        for _ in range(LAYERS)
    ]
    targets = [
        {"boxes": torch.rand(BOXES, 4) * 0.5 + 0.2, "labels": torch.randint(CLASSES, (BOXES,))} for _ in range(IMAGES)
    ]
    padded = Targets.from_list(targets).to(device)
    on_device = [{name: value.to(device) for name, value in target.items()} for target in targets]
    return {**layers[-1], "aux_outputs": layers[:-1]}, on_device, padded


def functions(device: str) -> dict[str, Callable[[], dict[str, Tensor]]]:
    outputs, targets, padded = make_case(device)
    ours, original = build_criterion(ModelConfig(num_classes=CLASSES)), OriginalCriterion(CLASSES)
    found = {"auto": lambda: ours(outputs, padded), "original": lambda: original(outputs, targets)}
    mine, theirs = found["auto"](), found["original"]()
    for name, value in theirs.items():  # a wrong result is never timed
        torch.testing.assert_close(mine[name], value, rtol=1e-4, atol=1e-5)
    return found


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward and backward"])
def test_criterion(backward: bool) -> None:
    found = functions(DEVICE.type)
    weights = build_criterion(ModelConfig(num_classes=CLASSES)).weight_dict

    def step(call: Callable[[], dict[str, Tensor]]) -> Callable[[], list[Tensor]]:
        def run() -> list[Tensor]:
            losses = call()
            if backward:
                weighted(weights, losses).backward()
            return list(losses.values())

        return run

    case = f"matcher and criterion {LAYERS} x {IMAGES} x {BOXES} x {QUERIES}, {'forward and backward' if backward else 'forward'}"
    claims = [Claim("matcher and criterion: over the original's algorithm", ("original",), 4.0)]
    compare(case, {name: step(call) for name, call in found.items()}, claims=claims)


def boxes_of(images: int, boxes: int, classes: int, device: str) -> list[dict[str, Tensor]]:
    """Labels as transformers takes them."""
    return [
        {
            "boxes": torch.rand(boxes, 4, device=device) * 0.5 + 0.2,
            "class_labels": torch.randint(classes, (boxes,), device=device),
        }
        for _ in range(images)
    ]


def predictions(shape: tuple[int, ...], classes: int, device: str) -> tuple[Tensor, Tensor]:
    boxes = torch.rand(*shape, 4, device=device) * 0.5 + 0.2
    return torch.randn(*shape, classes, device=device).requires_grad_(), boxes.requires_grad_()


def losses_in_transformers(device: str, images: int = IMAGES, boxes: int = BOXES) -> dict[str, Callable[[], Tensor]]:
    """transformers' DETR loss and what `accelerate` puts in its place: the sum of the losses, on the same predictions."""
    theirs = library("transformers.loss.loss_for_object_detection").ForObjectDetectionLoss
    ours = library("detr_fast.adapters.hugging_face_loss_detr").object_detection_loss
    config = library("transformers").DetrConfig(num_labels=CLASSES, auxiliary_loss=True, decoder_layers=LAYERS)
    torch.manual_seed(0)
    logits, found = predictions((LAYERS, images, QUERIES), CLASSES + 1, device)
    labels = boxes_of(images, boxes, CLASSES, device)
    return checked(lambda loss: loss(logits[-1], labels, device, found[-1], config, logits, found)[0], ours, theirs)


def rt_detr_losses_in_transformers(
    device: str, images: int = IMAGES, boxes: int = BOXES
) -> dict[str, Callable[[], Tensor]]:
    """RT-DETR's: 300 queries, 80 classes, the encoder's predictions, and the denoising queries that it has for such images."""
    theirs = library("transformers.loss.loss_rt_detr").RTDetrForObjectDetectionLoss
    ours = library("detr_fast.adapters.hugging_face_loss_rt_detr").rt_detr_object_detection_loss
    config = library("transformers").RTDetrConfig(num_labels=80)
    return of_denoising(config, ours, theirs, device, images, boxes)


def of_denoising(
    config: Any, ours: Any, theirs: Any, device: str, images: int, boxes: int, edges: bool = False
) -> dict[str, Callable[[], Tensor]]:
    torch.manual_seed(0)
    queries, groups = sized(300, 20), max(1, config.num_denoising // boxes)
    positive = (torch.arange(groups) * 2 * boxes)[:, None] + torch.arange(boxes)
    denoising = {
        "dn_positive_idx": (positive.flatten().to(device),) * images,
        "dn_num_group": groups,
        "dn_num_split": [2 * boxes * groups, queries],
    }
    shape = (images, LAYERS, 2 * boxes * groups + queries)
    logits, found = predictions(shape, 80, device)
    corners, references = predictions(shape, 4 * 33, device)
    rest = {"predicted_corners": corners, "initial_reference_points": references.detach()} if edges else {}
    encoder = predictions((images, queries), 80, device)
    labels = boxes_of(images, boxes, 80, device)
    arguments = (labels, device, found[:, -1], config, logits, found, *encoder, denoising)
    if reason := library("detr_fast.adapters.hugging_face_loss").why_not_loss(theirs, config):
        raise NotInstalled(reason)  # as we know it
    return checked(lambda loss: loss(logits[:, -1], *arguments, **rest)[0], ours, theirs)


def d_fine_losses_in_transformers(
    device: str, images: int = IMAGES, boxes: int = BOXES
) -> dict[str, Callable[[], Tensor]]:
    """D-FINE's: as RT-DETR's, with the distributions of 33 bins for each edge of a box."""
    theirs = library("transformers.loss.loss_d_fine").DFineForObjectDetectionLoss
    ours = library("detr_fast.adapters.hugging_face_loss_d_fine").d_fine_object_detection_loss
    config = library("transformers").DFineConfig(num_labels=80)
    return of_denoising(config, ours, theirs, device, images, boxes, edges=True)


def lw_detr_losses_in_transformers(
    device: str, images: int = IMAGES, boxes: int = BOXES
) -> dict[str, Callable[[], Tensor]]:
    """LW-DETR's: 3 layers and the encoder's predictions, 13 groups of 300 queries, 80 classes."""
    theirs = library("transformers.loss.loss_lw_detr").LwDetrForObjectDetectionLoss
    ours = library("detr_fast.adapters.hugging_face_loss_lw_detr").lw_detr_object_detection_loss
    config = library("transformers").LwDetrConfig(num_labels=80)
    torch.manual_seed(0)
    queries = sized(300, 20) * config.group_detr
    logits, found = predictions((config.decoder_layers, images, queries), 80, device)
    encoder = predictions((images, queries), 80, device)
    labels = boxes_of(images, boxes, 80, device)
    return checked(
        lambda loss: loss(logits[-1], labels, device, found[-1], config, logits, found, *encoder)[0], ours, theirs
    )


def grounding_dino_losses_in_transformers(
    device: str, images: int = IMAGES, boxes: int = BOXES
) -> dict[str, Callable[[], Tensor]]:
    """Grounding DINO's: 6 layers and the encoder's predictions, 900 queries, 20 classes of 2 words of 256 that there may be."""
    theirs = library("transformers.loss.loss_grounding_dino").GroundingDinoForObjectDetectionLoss
    ours = library("detr_fast.adapters.hugging_face_loss_grounding").grounding_dino_object_detection_loss
    config = library("transformers").GroundingDinoConfig(auxiliary_loss=True)
    torch.manual_seed(0)
    queries = sized(900, 20)
    mask = (torch.arange(256, device=device) < 62).expand(images, queries, 256)
    classes = torch.arange(20, device=device)[:, None] * 3 + 1
    words = torch.arange(256, device=device)
    maps = (((words == classes) | (words == classes + 1)).long(),) * images
    logits, found = predictions((LAYERS, images, queries), 256, device)
    encoder, encoder_boxes = predictions((images, queries), 256, device)
    hidden = [one.detach().masked_fill(~mask, float("-inf")).requires_grad_() for one in (logits, encoder)]
    labels = boxes_of(images, boxes, 20, device)
    rest = (config, maps, mask, hidden[0], found, hidden[1], encoder_boxes)
    return checked(lambda loss: loss(hidden[0][-1], labels, device, found[-1], *rest)[0], ours, theirs)


def checked(call: Callable[[Any], Tensor], ours: Any, theirs: Any) -> dict[str, Callable[[], Tensor]]:
    calls = {"auto": lambda: call(ours), "huggingface": lambda: call(theirs)}
    torch.testing.assert_close(calls["auto"](), calls["huggingface"](), rtol=1e-4, atol=1e-5)
    return calls


IN_TRANSFORMERS = {
    "DETR": losses_in_transformers,
    "RT-DETR": rt_detr_losses_in_transformers,
    "D-FINE": d_fine_losses_in_transformers,
    "LW-DETR": lw_detr_losses_in_transformers,
    "Grounding DINO": grounding_dino_losses_in_transformers,
}


@pytest.mark.parametrize("kind", IN_TRANSFORMERS)
def test_loss_of_accelerated_detectors(kind: str) -> None:
    def step(call: Callable[[], Tensor]) -> Callable[[], list[Tensor]]:
        def run() -> list[Tensor]:
            loss = call()
            loss.backward()
            return [loss]

        return run

    try:
        calls = IN_TRANSFORMERS[kind](DEVICE.type)
    except NotInstalled as error:
        pytest.skip(str(error))
    case = f"transformers' {kind} loss {LAYERS} x {IMAGES} x {BOXES}, forward and backward"
    claims = [Claim("detectors' loss: over transformers' own", ("huggingface",), 2.0)]
    steps = {name: step(call) for name, call in calls.items()}
    compare(case, steps, claims=claims, in_graphs=False)  # targets come from the host


def weighted(weights: Mapping[str, float], losses: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([weights[name] * value for name, value in losses.items() if name in weights]).sum()


def in_turn(steps: Mapping[str, Callable[[], object]], rounds: int = 30) -> list[float]:
    """Median milliseconds of each of two on the CPU, in turn, and the median of their ratios."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            begun = time.perf_counter()
            step()
            times[name].append((time.perf_counter() - begun) * 1e3)
    first, second = times.values()
    return [statistics.median(each) for each in (first, second, [b / a for a, b in zip(first, second)])]


def with_backward(call: Callable[[], dict[str, Tensor]]) -> Callable[[], None]:
    weights = build_criterion(ModelConfig(num_classes=CLASSES)).weight_dict
    return backward_of(lambda: weighted(weights, call()))


def backward_of(call: Callable[[], Tensor]) -> Callable[[], None]:
    return lambda: call().backward()


if __name__ == "__main__":
    line = "{}: ours {:.1f} ms, {} {:.1f} ms, {:.1f} times"
    calls = functions("cpu")
    for what, steps in (("forward", calls), ("and backward", {n: with_backward(c) for n, c in calls.items()})):
        ours, other, times = in_turn(steps)
        print(line.format(what, ours, "the original's", other, times))
    for kind, losses in IN_TRANSFORMERS.items():
        for images, boxes in ((2, 8), (4, 8), (8, 8), (8, 20)):
            both = losses("cpu", images, boxes)
            ours, other, times = in_turn({name: backward_of(call) for name, call in both.items()})
            case = f"{kind}, {images} images of {boxes} boxes, with backward"
            print(line.format(case, ours, "transformers'", other, times))
