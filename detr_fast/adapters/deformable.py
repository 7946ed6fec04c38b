"""What modules with deformable attention share: their offsets and logits, and the one launch that samples by them.

Where no kernel takes the call their own code runs, from the start: the two products are then computed again, by modules that may be anyone's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from detr_fast.adapters.blocks import is_dispatched
from detr_fast.dispatch import TritonImplementation
from detr_fast.ops.deformable_attention import DEFORMABLE_ATTENTION, arguments_of


def sampled(
    value: Tensor,
    shapes: Any,
    locations: Tensor,
    weights: Tensor,
    points: Sequence[int] | None = None,
    references: Tensor | None = None,
    spread: float = 0.0,
) -> Tensor | None:
    """`ops.deformable_attention`, or with references `deformable_attention_from_offsets`, as (B, Q, H · E); None where PyTorch's operations are to run."""
    if not is_dispatched(value):
        return None
    try:
        arguments = arguments_of(value, shapes, locations, weights, points, references, spread)
    except (TypeError, ValueError):  # of other shapes or dtypes than we know: theirs says what is wrong, if anything is
        return None
    chosen = DEFORMABLE_ATTENTION.choose(*arguments)
    return chosen.run(*arguments).flatten(2) if isinstance(chosen, TritonImplementation) else None


def sampled_around(
    module: Any,
    query: Tensor,
    value: Tensor,
    padding: Tensor | None,
    references: Tensor,
    shapes: Any,
    points: Sequence[int] | None = None,
    spread: float = 0.5,
) -> Tensor | None:
    """What a module with `sampling_offsets` and `attention_weights` samples for its queries.

    value (B, S, C), of which padding (B, S), True there, is zero; points: of each level where they are not `n_points`.
    """
    if padding is not None:
        value = value.masked_fill(padding[..., None], 0.0)
    heads, points = module.n_heads, points or [module.n_points] * module.n_levels
    offsets = module.sampling_offsets(query).unflatten(-1, (heads, sum(points), 2))
    logits = module.attention_weights(query).unflatten(-1, (heads, sum(points)))
    return sampled(value.unflatten(-1, (heads, -1)), shapes, offsets, logits, points, references, spread)
