"""Every kernel variant that ships, as data, with its budget of registers and shared memory.

One list serves offline compilation in tests, `detr-fast kernels`, the static report and the GPU run. Variants come from
the functions that launches use, so what is compiled here is what runs there. The list is a cover, not an enumeration:
each kernel in each dtype and each way of reading memory at the model's usual width, and the extremes of the width.
To add a kernel: give its file a `catalog_entries()` and list the file in FAMILIES.
"""

from __future__ import annotations

from . import (
    adam,
    add_layer_norm,
    assignment,
    attention_catalog,
    cast_together,
    channel_affine,
    cross_entropy,
    deformable_attention,
    detection_losses,
    feed_forward,
    gated,
    layer_norm,
    linear,
    linear_norm,
    matching_cost,
    mlp,
    pointwise,
    rotary,
    sine_positions,
    stem,
)
from .entry import TARGETS as TARGETS
from .entry import Budget as Budget
from .entry import Entry as Entry

FAMILIES = (
    layer_norm,
    add_layer_norm,
    assignment,
    matching_cost,
    detection_losses,
    cross_entropy,
    linear,
    linear_norm,
    feed_forward,
    mlp,
    gated,
    channel_affine,
    pointwise,
    stem,
    sine_positions,
    attention_catalog,
    deformable_attention,
    rotary,
    adam,
    cast_together,
)
CATALOG: tuple[Entry, ...] = tuple(one for family in FAMILIES for one in family.catalog_entries())


def entries(op: str | None = None) -> tuple[Entry, ...]:
    """All entries, or those of one op; ValueError where there is no such op."""
    found = tuple(entry for entry in CATALOG if op in (None, entry.op))
    if not found:
        known = ", ".join(sorted({entry.op for entry in CATALOG}))
        raise ValueError(f"no op {op!r} in the kernel catalog: choose one of {known}")
    return found


def entry(name: str) -> Entry:
    """The entry of that name."""
    return next(one for one in CATALOG if one.name == name)
