"""`MSDeformAttn`, the attention of Deformable DETR's repository, and of DINO, DAB-Deformable-DETR, Mask2Former and others after it.

Known by name and code: no repository is imported. Theirs asks the host whether levels' sizes, which lie on the device, fit, computes
locations and weights, and calls a CUDA extension, which users compile. Where our kernel takes the call it does the three, with sizes
that it reads on the device: the host does not wait, and where they don't fit the result is NaN. In 16 bits, too.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from detr_fast.adapters.base import Adapter, Scriptable, joined, joined_of, kind_of, reads, times_read, why_not_switch
from detr_fast.adapters.blocks import is_dispatched
from detr_fast.adapters.deformable import sampled_around, taken_around

_NAME = "MSDeformAttn"
_ARGUMENTS = "self query reference_points input_flatten input_spatial_shapes input_level_start_index input_padding_mask"
# The code that we know: the names that forward reads, and how often.
_BODY = (
    "F MSDeformAttnFunction ValueError apply attention_weights d_model float format im2col_step masked_fill n_heads n_heads n_heads n_heads "
    "n_heads n_levels n_levels n_levels n_points n_points n_points n_points output_proj sampling_offsets shape shape shape shape shape softmax "
    "stack sum torch value_proj view view view view"
)
_FP16 = "MSDeformAttnFunction apply dtype float16 float16 float32 float32 im2col_step output_proj to to to torch torch torch torch"
_KNOWN = (
    Counter(_BODY.split()),
    Counter(f"{_BODY} ms_deform_attn_core_pytorch".split()),  # Mask2Former's, which goes on without the extension
    Counter(f"{_BODY} {_FP16} stack torch use_4D_normalizer".split()),  # DINO's
)
_HALF = 0.5  # the only fraction in it


class MSDeformAttn(Scriptable):
    """Its forward; everything else is the class's that this is mixed into."""

    def forward(
        self: Any,
        query: Tensor,
        reference_points: Tensor,
        input_flatten: Tensor,
        input_spatial_shapes: Tensor,
        input_level_start_index: Tensor,
        input_padding_mask: Tensor | None = None,
    ) -> Tensor:
        # DINO's option: offsets are in pixels of a level, each as long as half of the box is.
        in_pixels = reference_points.shape[-1] == 4 and getattr(self, "use_4D_normalizer", False)
        spread = _HALF * self.n_points if in_pixels else _HALF
        places = reference_points, input_spatial_shapes
        taken = taken_around(self, query, input_flatten, *places, spread=spread) if is_dispatched(query) else None
        if taken is None:
            levels = input_spatial_shapes, input_level_start_index
            return super().forward(query, reference_points, input_flatten, *levels, input_padding_mask)  # type: ignore[misc,no-any-return]
        references = reference_points
        if in_pixels:
            extent = references[..., 2:] / input_spatial_shapes.flip(-1)
            references = torch.cat([references[..., :2], extent], -1)
        value = self.value_proj(input_flatten)
        return self.output_proj(sampled_around(self, taken, query, value, input_padding_mask, references))  # type: ignore[no-any-return]


class OriginalDeformable(Adapter):
    """Classes called MSDeformAttn that have the code of one of these repositories."""

    @classmethod
    def consider(cls, module: Module) -> type[Module] | str | None:
        kind = kind_of(module)
        if kind.__name__ != _NAME or isinstance(module, MSDeformAttn):
            return None
        forward: Any = kind.forward
        fractions = [one for one in forward.__code__.co_consts if isinstance(one, float)]
        if reads(forward)[0] != _ARGUMENTS or times_read(forward) not in _KNOWN or fractions != [_HALF]:
            return "its name is that of the attention of Deformable DETR's repository, its code is not"
        return why_not_switch(module) or joined(MSDeformAttn, kind, kind)

    @classmethod
    def describe(cls, replacement: type[Module]) -> str:
        return f"detr_fast.adapters.original_deformable.{joined_of(replacement).__name__}"
