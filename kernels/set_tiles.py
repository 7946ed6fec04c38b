# mypy: allow-incomplete-defs
"""What the kernels of matching and of losses share: boxes, their overlaps, logsumexp and focal loss, on tiles in registers."""

from __future__ import annotations

from .launch import jit, tl

LEAST_QUERIES = 8  # a program: the grid's second dimension, of which there are 65,535 at most, counts blocks of queries


def too_large(queries: int, classes: int, targets: int) -> str | None:
    """Why an image is too large for these kernels, in words, or None: offsets inside it fit 32 bits."""
    if queries > 65_535 * LEAST_QUERIES or queries * max(classes, targets, 4) >= 1 << 31:
        return f"{queries} queries of {classes} classes, {targets} targets: an image's offsets take more than 32 bits"
    return None


@jit
def extend_logsumexp(top, total, x):
    """A row's largest element so far and its sum of exp(element - largest), (R,) each, after a further block x (R, K)."""
    new_top = tl.maximum(top, tl.max(x, axis=1))
    shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # else -inf - -inf would be NaN for good
    return new_top, total * tl.exp(top - shift) + tl.sum(tl.exp(x - shift[:, None]), axis=1)


@jit
def load_boxes(boxes_ptr, row, mask):
    """Center x, center y, width and height as fp32."""
    place = boxes_ptr + row * 4
    x = tl.load(place, mask=mask, other=0.5).to(tl.float32)
    y = tl.load(place + 1, mask=mask, other=0.5).to(tl.float32)
    width = tl.load(place + 2, mask=mask, other=0.5).to(tl.float32)
    height = tl.load(place + 3, mask=mask, other=0.5).to(tl.float32)
    return x, y, width, height


@jit
def overlap(a, a_length, b, b_length):
    """Of two intervals: the length that both cover, and the length from the first start to the last end."""
    a_half, b_half = a_length * 0.5, b_length * 0.5
    signed = tl.minimum(a + a_half, b + b_half) - tl.maximum(a - a_half, b - b_half)
    return tl.maximum(signed, 0.0), a_length + b_length - signed


@jit
def finite(x):
    return tl.abs(x) < float("inf")  # NaN compares as False


@jit
def find_match(query_ptr, query, targets, BLOCK_N: tl.constexpr):
    """The number of the true box that each query (BLOCK_Q,) is matched with, or -1."""
    match = tl.full(query.shape, -1, tl.int32)
    for start in range(0, targets, BLOCK_N):
        target = start + tl.arange(0, BLOCK_N)
        of = tl.load(query_ptr + target, mask=target < targets, other=-1).to(tl.int32)
        hit = query[:, None] == of[None, :]
        match = tl.maximum(match, tl.max(tl.where(hit, target[None, :], -1), axis=1))
    return match


@jit
def target_class(labels_ptr, match, matched, classes, FOCAL: tl.constexpr):
    """The class that each query should have; labels out of range count as the nearest in range, to which softmax adds "no object" and -100."""
    label = tl.load(labels_ptr + match, mask=matched, other=0)
    last = classes - 2 if FOCAL else classes - 1
    nearest = tl.minimum(tl.maximum(label, 0), last.to(tl.int64)).to(tl.int32)
    if not FOCAL:
        nearest = tl.where(label == -100, -100, nearest)
    return tl.where(matched, nearest, classes - 1)


@jit
def count_broken(labels_ptr, true_boxes_ptr, count, targets, classes, BLOCK_N: tl.constexpr):
    """How many of an image's true boxes are none, or have a label out of range."""
    broken = tl.zeros((BLOCK_N,), tl.int32)
    for start in range(0, targets, BLOCK_N):
        target = start + tl.arange(0, BLOCK_N)
        mask = (target < targets) & (target < count)
        x, y, width, height = load_boxes(true_boxes_ptr, target, mask)
        label = tl.load(labels_ptr + target, mask=mask, other=0)
        # 1e-5: rounding of a box that touches the border. NaN fails.
        good = (x >= 0.0) & (y >= 0.0) & (x <= 1.00001) & (y <= 1.00001)
        good &= (width > 0.0) & (height > 0.0) & (width <= 1.00001) & (height <= 1.00001)
        good &= (label >= 0) & (label < classes - 1)
        broken += (mask & (good == 0)).to(tl.int32)
    return tl.sum(broken, axis=0)


@jit
def focal_loss(x, is_class):
    """Focal loss (alpha 0.25, gamma 2) of logits, and its derivative."""
    small = tl.exp(-tl.abs(x))
    more = 1.0 / (1.0 + small)
    p = tl.where(x >= 0, more, small * more)  # sigmoid(x), and sigmoid(-x) without cancellation
    q = tl.where(x >= 0, small * more, more)
    rounded = 1.0 + small
    # log(1 + small), exact where 1 + small is rounded
    softplus = tl.where(rounded == 1.0, small, tl.log(rounded) * (small / (rounded - 1.0)))
    error, right = tl.where(is_class, q, p), tl.where(is_class, p, q)
    entropy = softplus + tl.where(is_class, tl.maximum(-x, 0.0), tl.maximum(x, 0.0))
    weight = tl.where(is_class, 0.25, 0.75) * error * error
    slope = weight * (2.0 * right * entropy + error)
    return weight * entropy, tl.where(is_class, -slope, slope)


@jit
def axis_slopes(a, a_length, b, b_length, by_overlap, by_hull):
    """Along one axis, of a function of the overlap's and the hull's lengths: its derivatives for a and a_length."""
    a_half, b_half = a_length * 0.5, b_length * 0.5
    a_end, b_end, a_start, b_start = a + a_half, b + b_half, a - a_half, b - b_half
    # As torch.minimum and maximum: at ties, half.
    end = tl.where(a_end == b_end, 0.5, (a_end < b_end).to(tl.float32))
    start = tl.where(a_start == b_start, 0.5, (a_start > b_start).to(tl.float32))
    overlapping = tl.minimum(a_end, b_end) > tl.maximum(a_start, b_start)
    by_signed = tl.where(overlapping, by_overlap, 0.0) - by_hull
    return by_signed * (end - start), by_signed * 0.5 * (end + start) + by_hull


@jit
def store_slope(place, slope, matched, exists):
    tl.store(place, tl.where(matched, slope, 0.0).to(place.dtype.element_ty), mask=exists)


@jit
def sign(x):
    return (x > 0).to(tl.float32) - (x < 0).to(tl.float32)
