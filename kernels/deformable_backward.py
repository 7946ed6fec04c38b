# mypy: allow-incomplete-defs
"""Deformable attention's backward: what the forward read is read again (see deformable_attention)."""

from __future__ import annotations

from .deformable_points import (
    cell,
    is_there,
    level_size,
    load_point,
    load_reference,
    peak_of,
    place_of,
    share_of,
    softmax_share,
)
from .launch import jit, tl
from .overlap import wait_for_previous
from .rows import run_pointers


@jit
def deformable_attention_backward_kernel(
    dout_ptr,
    value_ptr,
    location_ptr,
    weight_ptr,
    reference_ptr,
    shapes_ptr,
    dvalue_ptr,
    dlocation_ptr,
    dweight_ptr,
    dreference_ptr,
    rows: tl.int32,
    queries: tl.int32,
    heads: tl.int32,
    channels: tl.int32,
    points: tl.int32,
    height_0: tl.int32,
    width_0: tl.int32,
    points_0: tl.int32,
    height_1: tl.int32,
    width_1: tl.int32,
    points_1: tl.int32,
    height_2: tl.int32,
    width_2: tl.int32,
    points_2: tl.int32,
    height_3: tl.int32,
    width_3: tl.int32,
    points_3: tl.int32,
    height_4: tl.int32,
    width_4: tl.int32,
    points_4: tl.int32,
    height_5: tl.int32,
    width_5: tl.int32,
    points_5: tl.int32,
    reference_image: tl.int64,
    reference_query: tl.int64,
    reference_level: tl.int64,
    spread: tl.float32,
    LEVELS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_E: tl.constexpr,
    FULL: tl.constexpr,
    VEC: tl.constexpr,
    COORDINATES: tl.constexpr,
):
    """dout (B, queries, heads, channels) -> dvalue, fp32, added to; dlocation and dweight; each may be left out.

    With references dlocation and dweight are the offsets' and the logits', and dreference (B, queries, heads, levels, COORDINATES) is each head's part.
    """
    wait_for_previous()
    heights = (height_0, height_1, height_2, height_3, height_4, height_5)
    widths = (width_0, width_1, width_2, width_3, width_4, width_5)
    counts = (points_0, points_1, points_2, points_3, points_4, points_5)
    image, head, query, exists, column, inside = place_of(queries, heads, channels, BLOCK_Q, BLOCK_E, FULL, VEC)
    row_size = heads * channels
    values = image * rows * row_size + head * channels
    place = image * queries * heads * points
    location_ptr += place * 2
    weight_ptr += place
    start = (query * heads + head) * channels
    arriving = run_pointers(dout_ptr + image * queries * row_size, start[:, None], column, VEC)
    dout = tl.load(arriving, mask=exists[:, None] & inside, other=0.0).to(tl.float32)
    base = (query * heads + head) * points
    if reference_ptr is not None:
        reference_ptr += image * reference_image
        peak = peak_of(weight_ptr, base, exists, points)
        shares = tl.zeros((BLOCK_Q,), tl.float32)
        for k in range(points):
            shares += softmax_share(tl.load(weight_ptr + base + k, mask=exists, other=0.0).to(tl.float32), peak)
        part = 1.0 / shares
        mean = tl.zeros((BLOCK_Q,), tl.float32)
    first, begun = 0, 0
    for level in tl.static_range(LEVELS):
        height, width, _ = level_size(shapes_ptr, level, heights[level], widths[level], rows - first)
        if reference_ptr is not None:
            extent = spread / tl.maximum(counts[level], 1)
            from_x, from_y, step_x, step_y = load_reference(
                reference_ptr + query.to(tl.int64) * reference_query + level * reference_level,
                exists,
                height,
                width,
                extent,
                COORDINATES,
            )
            sum_x = tl.zeros((BLOCK_Q,), tl.float32)
            sum_y = tl.zeros((BLOCK_Q,), tl.float32)
            sum_w = tl.zeros((BLOCK_Q,), tl.float32)
            sum_h = tl.zeros((BLOCK_Q,), tl.float32)
        for k in range(begun, begun + counts[level]):
            point = base + k
            x, y, weight = load_point(location_ptr, weight_ptr, point, exists)
            if reference_ptr is not None:
                offset_x, offset_y = x, y
                x, y = from_x + x * step_x, from_y + y * step_y
                weight = softmax_share(weight, peak) * part
            else:
                x, y = x * width - 0.5, y * height - 0.5
            x0, ahead = cell(x, width)
            y0, below = cell(y, height)
            row = first + y0 * width + x0
            dx = tl.zeros((BLOCK_Q,), tl.float32)
            dy = tl.zeros((BLOCK_Q,), tl.float32)
            dweight = tl.zeros((BLOCK_Q,), tl.float32)
            for corner in tl.static_range(4):
                there = is_there(x0 + corner % 2, width) & is_there(y0 + corner // 2, height)
                there = there[:, None] & inside
                across, down = share_of(ahead, corner % 2), share_of(below, corner // 2)
                begin = ((row + (corner // 2) * width + corner % 2) * row_size)[:, None]
                if dvalue_ptr is not None:
                    grown = (weight * across * down)[:, None] * dout
                    pointers = run_pointers(dvalue_ptr + values, begin, column, VEC)
                    tl.atomic_add(pointers, grown, mask=there, sem="relaxed")
                if dweight_ptr is not None or dlocation_ptr is not None or dreference_ptr is not None:
                    found = tl.load(run_pointers(value_ptr + values, begin, column, VEC), mask=there, other=0.0)
                    product = tl.sum(found.to(tl.float32) * dout, axis=1)
                    dweight += across * down * product
                    dx += (down if corner % 2 == 1 else -down) * product
                    dy += (across if corner // 2 == 1 else -across) * product
            dx *= weight
            dy *= weight
            if reference_ptr is not None:
                dweight *= weight
                sum_x += dx
                sum_y += dy
                sum_w += dx * offset_x
                sum_h += dy * offset_y
                dx *= step_x
                dy *= step_y
            else:
                dx *= width
                dy *= height
            if dweight_ptr is not None:
                rounded = dweight.to(dweight_ptr.dtype.element_ty)
                tl.store(dweight_ptr + place + point, rounded, mask=exists)
                if reference_ptr is not None:
                    # Of what is written, not of what was rounded: where one point takes nearly all of the softmax, errors cancel.
                    mean += rounded.to(tl.float32)
            if dlocation_ptr is not None:
                coordinate = dlocation_ptr + place * 2 + point * 2
                element = dlocation_ptr.dtype.element_ty
                tl.store(coordinate, dx.to(element), mask=exists)
                tl.store(coordinate + 1, dy.to(element), mask=exists)
        if dreference_ptr is not None:
            owner = (image * queries + query) * heads + head
            summed = dreference_ptr + (owner * LEVELS + level) * COORDINATES
            tl.store(summed, sum_x * width, mask=exists)
            tl.store(summed + 1, sum_y * height, mask=exists)
            if COORDINATES == 4:
                tl.store(summed + 2, sum_w * (extent * width), mask=exists)
                tl.store(summed + 3, sum_h * (extent * height), mask=exists)
        first += height * width
        begun += counts[level]
    if dweight_ptr is not None and reference_ptr is not None:
        tl.debug_barrier()  # lanes read what others wrote
        for k in range(0, points, 16):
            # Points side by side: one by one, all lanes of a query would do the same.
            beside = k + tl.arange(0, 16)[None, :]
            there, logits = exists[:, None] & (beside < points), base[:, None] + beside
            logit = tl.load(weight_ptr + logits, mask=there, other=0.0).to(tl.float32)
            found = tl.load(dweight_ptr + place + logits, mask=there, other=0.0).to(tl.float32)
            # A softmax passes on what is above the mean.
            dlogit = found - softmax_share(logit, peak[:, None]) * part[:, None] * mean[:, None]
            tl.store(dweight_ptr + place + logits, dlogit.to(dweight_ptr.dtype.element_ty), mask=there)
