# mypy: allow-incomplete-defs
"""The gradients of DETR's losses; see detection_losses.py. A program takes a block of queries of one layer and image."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from .launch import Variant, empty, jit, launch, pointer, tl
from .overlap import wait_for_previous
from .set_tiles import axis_slopes, focal_loss, load_boxes, overlap, sign, store_slope, target_class

# DETR's 100 queries in 13 blocks: 6 layers × 2 images fill a GPU. 64 classes at once: 4 logits a thread. 16 queries would
# take 128 registers and spill on some targets.
TILE = {"BLOCK_Q": 8, "BLOCK_K": 64}


@jit
def detection_losses_backward_kernel(
    g_ptr,
    logits_ptr,
    boxes_ptr,
    labels_ptr,
    true_boxes_ptr,
    lse_ptr,
    match_ptr,
    scale_ptr,
    dlogits_ptr,
    dboxes_ptr,
    layers: tl.int32,
    images: tl.int32,
    targets: tl.int32,
    queries: tl.int32,
    classes: tl.int32,
    eos_coef: tl.float32,
    FOCAL: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """g (3, L): the losses' gradients."""
    wait_for_previous()
    problem = tl.program_id(0).to(tl.int64)
    image, layer = problem % images, problem // images
    query = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    exists = query < queries
    match = tl.load(match_ptr + problem * queries + query, mask=exists, other=-1)
    matched = match >= 0

    if dlogits_ptr is not None:
        scale = tl.load(g_ptr + layer) * tl.load(scale_ptr + layer)
        label = target_class(labels_ptr + image * targets, match, matched, classes, FOCAL)
        start_of_problem = problem * queries * classes
        if not FOCAL:
            kept = lse_ptr + problem * queries + query
            largest = tl.load(kept, mask=exists, other=0.0)
            total = tl.load(kept + tl.num_programs(0).to(tl.int64) * queries, mask=exists, other=1.0)
            share = tl.div_rn(1.0, total)
            scale = scale * tl.where(label < 0, 0.0, tl.where(label < classes - 1, 1.0, eos_coef))[:, None]
        for start in range(0, classes, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            mask = exists[:, None] & (k < classes)[None, :]
            place = query[:, None] * classes + k[None, :]
            x = tl.load(logits_ptr + start_of_problem + place, mask=mask, other=0.0).to(tl.float32)
            is_class = k[None, :] == label[:, None]
            if FOCAL:
                _, slope = focal_loss(x, is_class)
                slope = tl.where((k < classes - 1)[None, :], slope, 0.0)
            else:
                slope = tl.exp(x - largest[:, None]) * share[:, None] - is_class.to(tl.float32)
            dlogits = (scale * slope).to(dlogits_ptr.dtype.element_ty)
            tl.store(dlogits_ptr + start_of_problem + place, dlogits, mask=mask)

    if dboxes_ptr is not None:
        box_scale = tl.load(scale_ptr + layers + layer)
        g_distance = tl.load(g_ptr + layers + layer) * box_scale
        g_giou = -tl.load(g_ptr + 2 * layers + layer) * box_scale
        x, y, width, height = load_boxes(boxes_ptr + problem * queries * 4, query, matched)
        tx, ty, twidth, theight = load_boxes(true_boxes_ptr + image * targets * 4, match, matched)
        overlap_x, hull_x = overlap(x, width, tx, twidth)
        overlap_y, hull_y = overlap(y, height, ty, theight)
        intersection, hull = overlap_x * overlap_y, hull_x * hull_y
        union = width * height + twidth * theight - intersection
        by_hull = -union / (hull * hull)
        by_union = 1.0 / hull - intersection / (union * union)
        by_intersection = 1.0 / union - by_union
        dx, dwidth = axis_slopes(x, width, tx, twidth, by_intersection * overlap_y, by_hull * hull_y)
        dy, dheight = axis_slopes(y, height, ty, theight, by_intersection * overlap_x, by_hull * hull_x)
        place = dboxes_ptr + problem * queries * 4 + query * 4
        store_slope(place, g_distance * sign(x - tx) + g_giou * dx, matched, exists)
        store_slope(place + 1, g_distance * sign(y - ty) + g_giou * dy, matched, exists)
        dwidth += by_union * height
        dheight += by_union * width
        store_slope(place + 2, g_distance * sign(width - twidth) + g_giou * dwidth, matched, exists)
        store_slope(place + 3, g_distance * sign(height - theight) + g_giou * dheight, matched, exists)


def detection_losses_backward(
    g: Tensor,
    logits: Tensor,
    boxes: Tensor,
    labels: Tensor,
    true_boxes: Tensor,
    lse: Tensor,
    match: Tensor,
    scale: Tensor,
    eos_coef: float,
    focal: bool,
    *,
    with_logits: bool = True,
    with_boxes: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of `detection_losses_forward`'s losses, whose own is g (3, L) fp32, in the dtypes of logits and boxes."""
    layers, images, queries, classes = logits.shape
    dlogits = empty(logits.shape, logits.dtype, logits.device) if with_logits else None
    dboxes = empty(boxes.shape, boxes.dtype, boxes.device) if with_boxes else None
    variant = backward_variant(logits.dtype, boxes.dtype, focal, with_logits, with_boxes)
    grid = (layers * images, -(-queries // int(variant.constants["BLOCK_Q"])))
    tensors = (t.contiguous() for t in (g, logits, boxes, labels, true_boxes))
    kept = (None if focal else lse, match, scale, dlogits, dboxes)
    launch(variant, grid, *tensors, *kept, layers, images, labels.shape[1], queries, classes, eos_coef)
    return dlogits, dboxes


@cache
def backward_variant(
    logits: torch.dtype, boxes: torch.dtype, focal: bool, with_logits: bool, with_boxes: bool
) -> Variant:
    """The program for a block of queries' gradients."""
    fp32 = torch.float32
    kept = (None if focal else fp32, torch.int32, fp32, logits if with_logits else None, boxes if with_boxes else None)
    tensors = (fp32, logits, boxes, torch.int64, fp32, *kept)
    types = (*map(pointer, tensors), "i32", "i32", "i32", "i32", "i32", "fp32")
    return Variant(detection_losses_backward_kernel, types, {"FOCAL": focal, **TILE}, num_warps=4)
