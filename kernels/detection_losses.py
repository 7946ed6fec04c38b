# mypy: allow-incomplete-defs
"""DETR's losses of matched predictions, all decoder layers and images at once, forward and backward.

    class:  sum over queries of w · (logsumexp(x) - x[class]) / sum of w,   w = eos_coef for "no object", else 1
            or the focal loss, sum over queries and object classes of a · e² · BCE / boxes,   e = |sigmoid(x) - is class|
    boxes:  sum over matched queries of |box - true box|₁ / boxes, and of (1 - GIoU(box, true box)) / boxes

A program takes a block of queries of one layer and image, finds the true box of each, and writes its sums; a second kernel
adds these up, always in one order. Backward (detection_losses_backward.py) reads the predictions again, and what is kept
besides them is the sum of each query's exponentials, its largest logit and its true box. Arithmetic is fp32.
Sources: Carion et al., 2020, arXiv:2005.12872; Rezatofighi et al., 2019, arXiv:1902.09630 (GIoU); Lin et al., 2017,
arXiv:1708.02002 (focal loss).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial

import torch
from torch import Tensor

from .detection_losses_backward import TILE, backward_variant, detection_losses_backward
from .entry import Budget, Entry
from .launch import Variant, compile_variant, empty, jit, launch, pointer, tl
from .overlap import wait_for_previous
from .set_tiles import count_broken, extend_logsumexp, find_match, focal_loss, load_boxes, overlap, target_class

SUMS = 9  # what a program writes: see the end of the kernel


@jit
def detection_losses_kernel(
    logits_ptr,
    boxes_ptr,
    query_ptr,
    labels_ptr,
    true_boxes_ptr,
    count_ptr,
    broken_ptr,
    lse_ptr,
    match_ptr,
    partial_ptr,
    images: tl.int32,
    targets: tl.int32,
    queries: tl.int32,
    classes: tl.int32,
    eos_coef: tl.float32,
    FOCAL: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Sums over a block of queries; lse (2, L, images, queries), the largest logit and the sum of exp(logit - largest); match,
    the number of the true box or -1, (L, images, queries).
    """
    wait_for_previous()
    problem = tl.program_id(0).to(tl.int64)
    image = problem % images
    layer = (problem // images).to(tl.int32)
    query = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    exists = query < queries
    labels_ptr += image * targets
    true_boxes_ptr += image * targets * 4
    match = find_match(query_ptr + problem * targets, query, targets, BLOCK_N)
    matched = exists & (match >= 0)
    tl.store(match_ptr + problem * queries + query, match, mask=exists)
    label = target_class(labels_ptr, match, matched, classes, FOCAL)
    has_object = label < classes - 1  # which a true box labelled "no object" is not

    logits_ptr += problem * queries * classes
    top = tl.full((BLOCK_Q,), float("-inf"), tl.float32)  # of the object classes
    guess = tl.zeros((BLOCK_Q,), tl.int32)
    largest = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    for start in range(0, classes, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        mask = exists[:, None] & (k < classes)[None, :]
        x = tl.load(logits_ptr + query[:, None] * classes + k[None, :], mask=mask, other=float("-inf")).to(tl.float32)
        is_object = (k < classes - 1)[None, :]
        objects = tl.where(is_object, x, float("-inf"))
        block_top = tl.max(objects, axis=1)
        first = tl.min(tl.where(objects == block_top[:, None], k[None, :], classes), axis=1)
        guess = tl.where(block_top > top, first, guess)
        top = tl.maximum(top, block_top)
        if FOCAL:
            loss, _ = focal_loss(x, k[None, :] == label[:, None])
            total += tl.sum(tl.where(mask & is_object, loss, 0.0), axis=1)
        else:
            largest, total = extend_logsumexp(largest, total, x)

    none = tl.load(logits_ptr + query * classes + (classes - 1), mask=exists, other=0.0).to(tl.float32)
    weight = tl.where(has_object, 1.0, tl.where(exists, eos_coef, 0.0))
    if FOCAL:
        class_loss = total
        found = top >= 0.0
        correct = has_object & (guess == label)
    else:
        # Two numbers: rounding their logsumexp, of 10 say, would put a probability off by 1e-6 of itself.
        kept = lse_ptr + problem * queries + query
        tl.store(kept, largest, mask=exists)
        tl.store(kept + tl.num_programs(0).to(tl.int64) * queries, total, mask=exists)
        weight = tl.where(label >= 0, weight, 0.0)
        counts = exists & (label >= 0)
        chosen = tl.load(logits_ptr + query * classes + label, mask=counts, other=0.0).to(tl.float32)
        class_loss = tl.where(counts, weight * (largest - chosen + tl.log(total)), 0.0)
        found = top >= none
        correct = has_object & (guess == label) & found

    x, y, width, height = load_boxes(boxes_ptr + problem * queries * 4, query, matched)
    tx, ty, twidth, theight = load_boxes(true_boxes_ptr, match, matched)
    distance = tl.abs(x - tx) + tl.abs(y - ty) + tl.abs(width - twidth) + tl.abs(height - theight)
    overlap_x, hull_x = overlap(x, width, tx, twidth)
    overlap_y, hull_y = overlap(y, height, ty, theight)
    intersection, hull = overlap_x * overlap_y, hull_x * hull_y
    union = width * height + twidth * theight - intersection
    apart = 2.0 - intersection / union - union / hull

    broken_targets = tl.full((), 0, tl.int32)
    if (layer == 0) & (tl.program_id(1) == 0):
        count = tl.load(count_ptr + image)
        broken_targets = count_broken(labels_ptr, true_boxes_ptr, count, targets, classes, BLOCK_N)
    broken = tl.load(broken_ptr + problem * queries + query, mask=exists, other=0).to(tl.int32)

    place = (layer * tl.num_programs(1) + tl.program_id(1)) * images + image
    partial_ptr += place
    size = tl.num_programs(0) * tl.num_programs(1)
    tl.store(partial_ptr, tl.sum(class_loss, axis=0))
    tl.store(partial_ptr + size, tl.sum(weight, axis=0))
    tl.store(partial_ptr + 2 * size, tl.sum(tl.where(matched, distance, 0.0), axis=0))
    tl.store(partial_ptr + 3 * size, tl.sum(tl.where(matched, apart, 0.0), axis=0))
    tl.store(partial_ptr + 4 * size, tl.sum(has_object.to(tl.float32), axis=0))
    tl.store(partial_ptr + 5 * size, tl.sum(correct.to(tl.float32), axis=0))
    tl.store(partial_ptr + 6 * size, tl.sum((exists & found).to(tl.float32), axis=0))
    tl.store(partial_ptr + 7 * size, tl.sum(broken, axis=0).to(tl.float32))
    tl.store(partial_ptr + 8 * size, broken_targets.to(tl.float32))


@jit
def sum_detection_losses_kernel(
    partial_ptr,
    count_ptr,
    total_ptr,
    losses_ptr,
    cardinality_ptr,
    summary_ptr,
    scale_ptr,
    images: tl.int32,
    blocks: tl.int32,
    totals: tl.int32,
    ranks: tl.float32,
    FOCAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A layer's losses (3, L), cardinality error (L,), and scale (2, L), what its sums are multiplied with; the summary (3,)."""
    wait_for_previous()
    layer, layers = tl.program_id(0), tl.num_programs(0)
    size = layers * blocks * images
    lane = tl.arange(0, BLOCK)
    boxes = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, totals, BLOCK):
        boxes += tl.load(total_ptr + start + lane, mask=start + lane < totals, other=0).to(tl.float32)
    num_boxes = tl.maximum(tl.sum(boxes, axis=0) / ranks, 1.0)

    class_loss = tl.zeros((BLOCK,), tl.float32)
    weight = tl.zeros((BLOCK,), tl.float32)
    distance = tl.zeros((BLOCK,), tl.float32)
    apart = tl.zeros((BLOCK,), tl.float32)
    matched = tl.zeros((BLOCK,), tl.float32)
    correct = tl.zeros((BLOCK,), tl.float32)
    off = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, images, BLOCK):
        image = start + lane
        mask = image < images
        found = tl.zeros((BLOCK,), tl.float32)
        for block in range(blocks):
            place = partial_ptr + (layer * blocks + block) * images + image
            class_loss += tl.load(place, mask=mask, other=0.0)
            weight += tl.load(place + size, mask=mask, other=0.0)
            distance += tl.load(place + 2 * size, mask=mask, other=0.0)
            apart += tl.load(place + 3 * size, mask=mask, other=0.0)
            matched += tl.load(place + 4 * size, mask=mask, other=0.0)
            correct += tl.load(place + 5 * size, mask=mask, other=0.0)
            found += tl.load(place + 6 * size, mask=mask, other=0.0)
        off += tl.abs(found - tl.load(count_ptr + image, mask=mask, other=0).to(tl.float32))

    box_scale = 1.0 / num_boxes
    class_scale = box_scale
    if not FOCAL:
        class_scale = 1.0 / tl.sum(weight, axis=0)
    tl.store(losses_ptr + layer, tl.sum(class_loss, axis=0) * class_scale)
    tl.store(losses_ptr + layers + layer, tl.sum(distance, axis=0) * box_scale)
    tl.store(losses_ptr + 2 * layers + layer, tl.sum(apart, axis=0) * box_scale)
    tl.store(cardinality_ptr + layer, tl.sum(off, axis=0) / images)
    tl.store(scale_ptr + layer, class_scale)
    tl.store(scale_ptr + layers + layer, box_scale)
    if layer == layers - 1:
        share = tl.sum(correct, axis=0) / tl.maximum(tl.sum(matched, axis=0), 1.0)
        tl.store(summary_ptr, 100.0 - 100.0 * share)
        for flag in range(2):
            broken = tl.zeros((BLOCK,), tl.float32)
            for start in range(0, size, BLOCK):
                place = partial_ptr + (7 + flag) * size + start + lane
                broken += tl.load(place, mask=start + lane < size, other=0.0)
            tl.store(summary_ptr + 1 + flag, tl.sum(broken, axis=0))


def detection_losses_forward(
    logits: Tensor,
    boxes: Tensor,
    query: Tensor,
    labels: Tensor,
    true_boxes: Tensor,
    counts: Tensor,
    broken: Tensor,
    total: Tensor,
    eos_coef: float,
    ranks: float,
    focal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Losses of matched predictions, and what backward needs.

    logits (L, B, Q, K), boxes (L, B, Q, 4): fp16, bf16 or fp32. query (L, B, N) int64, of each true box, or -1; labels
    (B, N) int64; true_boxes (B, N, 4) fp32; counts (B,) int64; broken (L, B, Q) bool; total (M,) int64.
    Returns losses (3, L), the cardinality error (L,), the summary (3,): the last layer's class error, broken predictions
    and broken targets; and for backward lse (2, L, B, Q) (empty with focal), match (L, B, Q) int32, scale (2, L).
    """
    layers, images, queries, classes = logits.shape
    device, fp32 = logits.device, torch.float32
    variant = forward_variant(logits.dtype, boxes.dtype, focal)
    blocks = -(-queries // int(variant.constants["BLOCK_Q"]))
    lse = empty((0,) if focal else (2, layers, images, queries), fp32, device)
    match = empty((layers, images, queries), torch.int32, device)
    partial = empty((SUMS, layers, blocks, images), fp32, device)
    tensors = (t.contiguous() for t in (logits, boxes, query, labels, true_boxes, counts, broken))
    sizes = images, labels.shape[1], queries, classes
    launch(variant, (layers * images, blocks), *tensors, None if focal else lse, match, partial, *sizes, eos_coef)

    losses, scale = empty((3, layers), fp32, device), empty((2, layers), fp32, device)
    cardinality, summary = empty((layers,), fp32, device), empty((3,), fp32, device)
    inputs = partial, counts.contiguous(), total.contiguous()
    totals = images, blocks, total.shape[0]
    launch(sum_variant(focal), (layers,), *inputs, losses, cardinality, summary, scale, *totals, float(ranks))
    return losses, cardinality, summary, lse, match, scale


def compile_detection_losses(
    logits: torch.dtype, boxes: torch.dtype, focal: bool, wanted: tuple[bool, bool], device: torch.device
) -> None:
    """Compile what the launchers above launch for such predictions; wanted: which of the two gradients."""
    compile_variant(forward_variant(logits, boxes, focal), device)
    compile_variant(sum_variant(focal), device)
    if any(wanted):
        compile_variant(backward_variant(logits, boxes, focal, *wanted), device)


@cache
def forward_variant(logits: torch.dtype, boxes: torch.dtype, focal: bool) -> Variant:
    """The program that sums up a block of queries."""
    lse = None if focal else torch.float32
    tensors = (logits, boxes, torch.int64, torch.int64, torch.float32, torch.int64, torch.bool, lse)
    types = (*map(pointer, (*tensors, torch.int32, torch.float32)), "i32", "i32", "i32", "i32", "fp32")
    return Variant(detection_losses_kernel, types, {"FOCAL": focal, **TILE, "BLOCK_N": 16}, num_warps=4)


@cache
def sum_variant(focal: bool) -> Variant:
    """The program that adds up a layer's sums."""
    tensors = (torch.float32, torch.int64, torch.int64, *[torch.float32] * 4)
    types = (*map(pointer, tensors), "i32", "i32", "i32", "fp32")
    return Variant(sum_detection_losses_kernel, types, {"FOCAL": focal, "BLOCK": 32}, num_warps=1)


def catalog_entries() -> Iterator[Entry]:
    fp32, bf16 = torch.float32, torch.bfloat16
    tile = TILE["BLOCK_Q"] * TILE["BLOCK_K"]
    variants = (
        ("forward_fp32", forward_variant(fp32, fp32, False), tile, Budget(88, 512, 64, 512), (fp32, False)),
        ("sum", sum_variant(False), 32, Budget(80, 64, 64, 64), (fp32, False)),
        (
            "backward_bf16_focal",
            backward_variant(bf16, bf16, True, True, True),
            tile,
            Budget(56, 64, 64, 64),
            (bf16, True),
        ),
    )
    for name, variant, elements, budget, case in variants:
        example = partial(_example, *case)
        yield Entry("detection_losses", f"detection_losses_{name}", variant, elements, budget, example)


def _example(dtype: torch.dtype, focal: bool, device: torch.device) -> Callable[[], tuple[Tensor, ...]]:
    """Two layers of two images; more queries, boxes and classes than one block."""
    logits, boxes = torch.randn(2, 2, 19, 70, device=device).to(dtype), torch.rand(2, 2, 19, 4, device=device).to(dtype)
    labels, counts = torch.zeros(2, 18, dtype=torch.int64, device=device), torch.tensor([18, 3], device=device)
    true_boxes, g = torch.rand(2, 18, 4, device=device) + 0.1, torch.randn(3, 2, device=device)
    order = torch.arange(18, device=device)
    query = torch.where(order < counts[:, None], order, -1).expand(2, 2, 18)
    broken = torch.zeros(2, 2, 19, dtype=torch.bool, device=device)

    def call() -> tuple[Tensor, ...]:
        inputs = (logits, boxes, query, labels, true_boxes, counts, broken, counts)
        losses, cardinality, summary, lse, match, scale = detection_losses_forward(*inputs, 0.1, 1.0, focal)
        kept = (logits, boxes, labels, true_boxes, lse, match, scale)
        dlogits, dboxes = detection_losses_backward(g, *kept, 0.1, focal)
        assert dlogits is not None
        assert dboxes is not None
        return losses, cardinality, summary, dlogits, dboxes

    return call
