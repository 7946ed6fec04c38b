# mypy: allow-incomplete-defs
"""The last linear layer of a classifier with its cross-entropy: the gradient in place of the logits, a block of rows at a time.

    logits = x @ weight.T + bias,   lse = log sum exp(logits),   w = class_weight, or 1
    loss = (1 - s) · w[label] · (lse - logits[label]) + s / V · sum over classes of w · (lse - logits)

    of a row's loss:  dlogits = a · softmax(logits) - (1 - s) · w[label] · onehot(label) - s / V · w
                      with a = (1 - s) · w[label] + s / V · sum of w

The products are PyTorch's; between them, a program reads a row of logits twice, for its sum and for its gradient, which it
writes over them. Gradients are of the sum of all losses: the mean's divisor, known only at the end, and what arrives in
backward scale them later, so that fp16 has no small numbers to hold.
Sources: Hsu et al., 2024, arXiv:2410.10989; Wijmans et al., 2024, arXiv:2411.09009.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .entry import Budget, Entry
from .launch import Variant, compile_variant, empty, jit, launch, pointer, tl
from .overlap import wait_for_previous
from .product_tiles import plus_product
from .rows import aligned_run, run_pointers
from .set_tiles import extend_logsumexp


@jit
def cross_entropy_kernel(
    logits_ptr,
    label_ptr,
    class_weight_ptr,
    loss_ptr,
    count_ptr,
    classes: tl.int32,
    ignore_index: tl.int64,
    smoothing: tl.float32,
    GRAD: tl.constexpr,
    SMOOTH: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
):
    """One row: its loss, what it counts (w[label], or 0), and with GRAD its gradient in place of its logits."""
    wait_for_previous()
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * classes
    column = tl.arange(0, BLOCK)[None, :]
    label = tl.load(label_ptr + row)
    known = (label >= 0) & (label < classes)
    chosen = tl.load(logits_ptr + label, mask=known, other=float("nan")).to(tl.float32)
    weight = 1.0
    if class_weight_ptr is not None:
        weight = tl.load(class_weight_ptr + label, mask=known, other=0.0)

    largest = tl.full((1,), float("-inf"), tl.float32)
    total = tl.zeros((1,), tl.float32)
    all_logits = tl.zeros((1,), tl.float32)  # sums of w · (logits - origin) and of w
    all_weights = tl.zeros((1,), tl.float32)
    origin = tl.where(tl.abs(chosen) < float("inf"), chosen, 0.0)  # near, so that large logits lose no digits
    if SMOOTH and class_weight_ptr is not None and not GRAD:  # elsewhere a compiler that knows takes more registers
        tl.assume(classes > 0)
    for start in range(0, classes, BLOCK):
        inside = (start + column) // VEC < classes // VEC
        x = tl.load(run_pointers(logits_ptr, start, column, VEC), mask=inside, other=float("-inf")).to(tl.float32)
        largest, total = extend_logsumexp(largest, total, x)
        if SMOOTH:
            if class_weight_ptr is not None:
                w = tl.load(class_weight_ptr + start + column, mask=inside, other=0.0)
            else:
                w = inside.to(tl.float32)
            all_logits += tl.sum(tl.where(inside, w * (x - origin), 0.0), axis=1)
            all_weights += tl.sum(w, axis=1)
    # The logsumexp is largest + log(total); of large logits, the sum would lose digits.
    at_label = weight * (1.0 - smoothing) if SMOOTH else weight
    loss = at_label * ((largest - chosen) + tl.log(total))  # NaN where the label is no class
    scale = tl.full((1,), 0.0, tl.float32) + at_label
    share = 0.0
    if SMOOTH:
        share = smoothing / classes
        # The sum's only use: of two, a pass of triton 3.8's compiler stops at an assertion.
        everywhere = share * all_weights
        loss += everywhere * ((largest - origin) + tl.log(total)) - share * all_logits
        scale += everywhere
    ignored = label == ignore_index
    one = tl.arange(0, 1)
    tl.store(loss_ptr + row + one, tl.where(ignored, 0.0, loss))
    tl.store(count_ptr + row, tl.where(ignored, 0.0, weight))

    if GRAD:
        scale = tl.where(ignored, 0.0, tl.where(known, scale / total, float("nan")))
        at_label = tl.where(ignored, 0.0, at_label)
        share = tl.where(ignored, 0.0, share)
        place_of_label = label.to(tl.int32)
        tl.debug_barrier()  # all threads have read the row, also `chosen`, before one writes
        for start in range(0, classes, BLOCK):
            inside = (start + column) // VEC < classes // VEC
            place = run_pointers(logits_ptr, start, column, VEC)
            x = tl.load(place, mask=inside, other=float("-inf")).to(tl.float32)
            g = scale[:, None] * tl.exp(x - largest[:, None]) - tl.where(
                start + column == place_of_label, at_label, 0.0
            )
            if SMOOTH:
                if class_weight_ptr is not None:
                    g -= share * tl.load(class_weight_ptr + start + column, mask=inside, other=0.0)
                else:
                    g -= share
            tl.store(place, g.to(logits_ptr.dtype.element_ty), mask=inside)


def linear_cross_entropy_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    smoothing: float,
    wanted: tuple[bool, bool, bool],
    rows_at_once: int,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The losses of all rows, and the gradients of their sum.

    x (N, E), weight (V, E), bias (V,) or None, of one dtype; target (N,) int64; class_weight (V,) fp32 or None. wanted:
    whether x, weight and bias need gradients. rows_at_once: whose logits exist together.
    Returns losses (N,) and counts (N,) fp32; dx in x's dtype, dweight and dbias in fp32, None where not wanted. A label
    that is no class and not ignored makes losses and gradients NaN.
    """
    rows, classes = x.shape[0], weight.shape[0]
    device, fp32 = x.device, torch.float32
    losses, counts = empty((rows,), fp32, device), empty((rows,), fp32, device)
    dx = empty(tuple(x.shape), x.dtype, device) if wanted[0] else None
    dw = db = None
    variant = cross_entropy_variant(classes, x.dtype, class_weight is not None, any(wanted), smoothing > 0.0)
    if class_weight is not None:
        class_weight = class_weight.contiguous()
    for start in range(0, rows, rows_at_once):
        part = slice(start, start + rows_at_once)
        logits = F.linear(x[part], weight, bias)
        tensors = logits, target[part].contiguous(), class_weight, losses[part], counts[part]
        launch(variant, (logits.shape[0],), *tensors, classes, ignore_index, float(smoothing))
        if dx is not None:
            torch.mm(logits, weight, out=dx[part])
        if wanted[1]:
            dw = plus_product(dw, logits.mT, x[part])
        if wanted[2]:
            own = logits.sum(0, dtype=fp32)
            db = own if db is None else db.add_(own)
        del logits  # or the next block's would be computed beside them
    if wanted[1] and dw is None:
        dw = torch.zeros(weight.shape, dtype=fp32, device=device)
    if wanted[2] and db is None:
        db = torch.zeros((classes,), dtype=fp32, device=device)
    return losses, counts, dx, dw, db


def compile_cross_entropy(
    classes: int, dtype: torch.dtype, weighted: bool, needs_grad: bool, smoothed: bool, device: torch.device
) -> None:
    """Compile what `linear_cross_entropy_forward` launches for such a call."""
    compile_variant(cross_entropy_variant(classes, dtype, weighted, needs_grad, smoothed), device)


@cache
def cross_entropy_variant(
    classes: int, dtype: torch.dtype, weighted: bool, needs_grad: bool, smoothed: bool
) -> Variant:
    """The program for rows of `classes` logits."""
    fp32 = torch.float32
    types = (*map(pointer, (dtype, torch.int64, fp32 if weighted else None, fp32, fp32)), "i32", "i64", "fp32")
    # 8,192 at once on an H200: 168 µs for 4,096 rows of 32,000 bf16, 213 for 1,024 of 128,000 (4,096: 192, 252; a copy: 126).
    block = min(8192, max(128, 1 << (classes - 1).bit_length()))
    constants = {"GRAD": needs_grad, "SMOOTH": smoothed, "BLOCK": block, "VEC": aligned_run(classes, [dtype])}
    # One by one, ptxas gives a register up on sm_90, for 8 bytes, and takes 128 of them all the same.
    short = (
        dtype == torch.float16 and weighted and smoothed and not needs_grad and block == 8192 and constants["VEC"] == 1
    )
    return Variant(
        cross_entropy_kernel, types, constants, num_warps=8 if block > 1024 else 4, registers=128 if short else 0
    )


def catalog_entries() -> Iterator[Entry]:
    variant = cross_entropy_variant(9000, torch.bfloat16, False, True, False)
    budget = Budget(64, 256, 64, 256)
    yield Entry("linear_cross_entropy", "cross_entropy_bf16", variant, 8192, budget, partial(_example, torch.bfloat16))


def _example(dtype: torch.dtype, device: torch.device) -> Callable[[], tuple[Tensor, ...]]:
    """Rows of more classes than a program reads at once. Without products: racecheck fails in cuBLAS's kernels for sm_90."""
    given = torch.randn(5, 9000, device=device).to(dtype)
    target = torch.tensor([0, 8999, -100, 7, 8192], device=device)
    variant = cross_entropy_variant(9000, dtype, False, True, False)

    def call() -> tuple[Tensor, ...]:
        logits, losses, counts = given.clone(), *(empty((5,), torch.float32, device) for _ in range(2))
        launch(variant, (5,), logits, target, None, losses, counts, 9000, -100, 0.0)
        return losses, counts, logits

    return call
