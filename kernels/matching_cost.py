# mypy: allow-incomplete-defs
"""What each pair of a query and a true box costs, for all decoder layers and images, never mixing images.

    cost = a · class + b · |query's box - true box|₁ - c · GIoU(query's box, true box)
    class = -softmax(logits)[label], or the focal loss of calling it the label less that of calling it nothing

One program takes a block of queries of one layer and image: first their logsumexp over the classes, then all of the
image's boxes, in blocks. Arithmetic is fp32.
Sources: Carion et al., 2020, arXiv:2005.12872, section 3.1; Rezatofighi et al., 2019, arXiv:1902.09630 (GIoU); Zhu et al.,
2020, arXiv:2010.04159 (focal cost).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial

import torch
from torch import Tensor

from .entry import Budget, Entry
from .launch import Variant, compile_variant, empty, jit, launch, older_compiler, pointer, tl
from .overlap import wait_for_previous
from .set_tiles import extend_logsumexp, finite, load_boxes, overlap

# NaN and infinite costs become this: far above any cost that a sigmoid's boxes can have, so that such a pair is matched
# last, yet small enough that the other costs keep 8 digits behind the point beside it in fp64.
INVALID_COST = 1e8


@jit
def matching_cost_kernel(
    logits_ptr,
    boxes_ptr,
    labels_ptr,
    true_boxes_ptr,
    count_ptr,
    cost_ptr,
    broken_ptr,
    images: tl.int32,
    targets: tl.int32,
    queries: tl.int32,
    classes: tl.int32,
    cost_class: tl.float32,
    cost_bbox: tl.float32,
    cost_giou: tl.float32,
    FOCAL: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """logits (L, images, queries, classes), boxes (L, images, queries, 4) -> cost (L, images, targets, queries)."""
    wait_for_previous()
    problem = tl.program_id(0).to(tl.int64)
    image = problem % images
    count = tl.load(count_ptr + image)
    count = tl.minimum(tl.maximum(count, 0), targets.to(tl.int64)).to(tl.int32)
    query = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    exists = query < queries
    logits_ptr += problem * queries * classes
    lse = _logsumexp(logits_ptr, query, exists, classes, BLOCK_Q, BLOCK_K)
    x, y, width, height = load_boxes(boxes_ptr + problem * queries * 4, query, exists)
    broken = (finite(lse) & finite(x) & finite(y) & finite(width) & finite(height)) == 0
    tl.store(broken_ptr + problem * queries + query, broken, mask=exists)

    cost_ptr += problem * targets * queries
    for start in range(0, targets, BLOCK_N):
        target = start + tl.arange(0, BLOCK_N)
        mask = (target < targets)[:, None] & exists[None, :]
        place = target[:, None] * queries + query[None, :]
        if start < count:
            valid = target < count
            label = tl.load(labels_ptr + image * targets + target, mask=valid, other=0).to(tl.int32)
            label = tl.minimum(tl.maximum(label, 0), classes - 1)
            pair = valid[:, None] & exists[None, :]
            chosen = tl.load(logits_ptr + query[None, :] * classes + label[:, None], mask=pair, other=0.0).to(
                tl.float32
            )
            if FOCAL:
                cost = cost_class * _focal(chosen)
            else:
                cost = -cost_class * tl.exp(chosen - lse[None, :])
            a_x, a_y, a_width, a_height = x[None, :], y[None, :], width[None, :], height[None, :]
            tx, ty, twidth, theight = load_boxes(true_boxes_ptr + image * targets * 4, target, valid)
            b_x, b_y, b_width, b_height = tx[:, None], ty[:, None], twidth[:, None], theight[:, None]
            distance = tl.abs(a_x - b_x) + tl.abs(a_y - b_y) + tl.abs(a_width - b_width) + tl.abs(a_height - b_height)
            overlap_x, hull_x = overlap(a_x, a_width, b_x, b_width)
            overlap_y, hull_y = overlap(a_y, a_height, b_y, b_height)
            intersection, hull = overlap_x * overlap_y, hull_x * hull_y
            union = a_width * a_height + b_width * b_height - intersection
            giou = intersection / union + union / hull - 1.0
            cost = cost + cost_bbox * distance - cost_giou * giou
            cost = tl.where(finite(cost), tl.minimum(tl.maximum(cost, -1e8), 1e8), 1e8)
            cost = tl.where(valid[:, None], cost, float("inf"))
            tl.store(cost_ptr + place, cost, mask=mask)
        else:
            tl.store(cost_ptr + place, tl.full((BLOCK_N, BLOCK_Q), float("inf"), tl.float32), mask=mask)


@jit
def _logsumexp(logits_ptr, query, exists, classes, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """(BLOCK_Q,): NaN or infinite where a logit is NaN or +inf, or all are -inf."""
    top = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    for start in range(0, classes, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        mask = exists[:, None] & (k < classes)[None, :]
        x = tl.load(logits_ptr + query[:, None] * classes + k[None, :], mask=mask, other=float("-inf")).to(tl.float32)
        top, total = extend_logsumexp(top, total, x)
    return top + tl.log(total)


@jit
def _focal(x):
    """Focal loss (alpha 0.25, gamma 2) of calling it the class, less that of calling it none."""
    p = 1.0 / (1.0 + tl.exp(-x))
    softplus = tl.log(1.0 + tl.exp(-tl.abs(x)))
    return 0.25 * (1.0 - p) * (1.0 - p) * (softplus - tl.minimum(x, 0.0)) - 0.75 * p * p * (
        softplus + tl.maximum(x, 0.0)
    )


def matching_cost(
    logits: Tensor,
    boxes: Tensor,
    labels: Tensor,
    true_boxes: Tensor,
    counts: Tensor,
    weights: tuple[float, float, float],
    focal: bool,
) -> tuple[Tensor, Tensor]:
    """Costs of all pairs, and which predictions are broken.

    logits (L, B, Q, K), boxes (L, B, Q, 4): fp16, bf16 or fp32. labels (B, N) int64; those out of range are clamped.
    true_boxes (B, N, 4) fp32. counts (B,) int64. weights: of class, L1 and GIoU.
    Returns cost (L, B, N, Q) fp32, +inf behind an image's count, and broken (L, B, Q) bool.
    """
    layers, images, queries, classes = logits.shape
    targets = labels.shape[1]
    cost = empty((layers, images, targets, queries), torch.float32, logits.device)
    broken = empty((layers, images, queries), torch.bool, logits.device)
    variant = matching_cost_variant(logits.dtype, boxes.dtype, focal)
    grid = (layers * images, -(-queries // int(variant.constants["BLOCK_Q"])))
    tensors = (t.contiguous() for t in (logits, boxes, labels, true_boxes, counts))
    launch(variant, grid, *tensors, cost, broken, images, targets, queries, classes, *map(float, weights))
    return cost, broken


def compile_matching_cost(logits: torch.dtype, boxes: torch.dtype, focal: bool, device: torch.device) -> None:
    """Compile what `matching_cost` launches for such tensors."""
    compile_variant(matching_cost_variant(logits, boxes, focal), device)


@cache
def matching_cost_variant(logits: torch.dtype, boxes: torch.dtype, focal: bool) -> Variant:
    """The program for predictions of these types."""
    tensors = (logits, boxes, torch.int64, torch.float32, torch.int64, torch.float32, torch.bool)
    types = (*map(pointer, tensors), "i32", "i32", "i32", "i32", "fp32", "fp32", "fp32")
    # DETR's 100 queries in 4 blocks: 6 layers × 8 images fill a GPU. 64 classes at once: 16 logits a thread.
    constants = {"FOCAL": focal, "BLOCK_Q": 32, "BLOCK_N": 16, "BLOCK_K": 64}
    # By triton 3.6, ptxas spills 32 bytes on sm_90 for three programs a multiprocessor.
    registers = 200 if focal and logits.itemsize == 2 and older_compiler() else 0
    return Variant(matching_cost_kernel, types, constants, num_warps=4, registers=registers)


def catalog_entries() -> Iterator[Entry]:
    variant = matching_cost_variant(torch.float32, torch.float32, False)
    budget, example = Budget(168, 512, 80, 512), partial(_example, torch.float32, False)
    yield Entry("matching_cost", "matching_cost_fp32", variant, 32 * 16, budget, example)


def _example(dtype: torch.dtype, focal: bool, device: torch.device) -> Callable[[], tuple[Tensor, ...]]:
    """Two layers of two images, one of which has more boxes than a block; more queries and classes than one, too."""
    logits, boxes = torch.randn(2, 2, 35, 70, device=device).to(dtype), torch.rand(2, 2, 35, 4, device=device).to(dtype)
    labels, counts = torch.zeros(2, 18, dtype=torch.int64, device=device), torch.tensor([18, 3], device=device)
    true_boxes = torch.rand(2, 18, 4, device=device)

    def call() -> tuple[Tensor, ...]:
        cost, broken = matching_cost(logits, boxes, labels, true_boxes, counts, (1.0, 5.0, 2.0), focal)
        return cost.masked_fill(cost.isinf(), 0.0), broken

    return call
