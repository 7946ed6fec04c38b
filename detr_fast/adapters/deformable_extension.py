"""`MultiScaleDeformableAttention`, the CUDA extension of Deformable DETR's repository and those after it, on our kernels.

Their code imports it by this name, and can't go on without a compiled one. Its functions take sizes of levels that lie on the device,
where the kernel reads them.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import torch
from torch import Tensor

from detr_fast.dispatch import TritonImplementation
from detr_fast.ops.deformable_attention import DEFORMABLE_ATTENTION, arguments_of, deformable_attention
from detr_fast.ops.deformable_autograd import gradients_of

NAME = "MultiScaleDeformableAttention"


def ms_deform_attn_forward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """(B, Q, H · E), as `ops.deformable_attention`; levels follow one another, and no step is needed."""
    return deformable_attention(value, value_spatial_shapes, sampling_locations, attention_weights).flatten(2)


def ms_deform_attn_backward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    im2col_step: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of value, locations and weights."""
    dout = grad_output.unflatten(2, value.shape[2:])
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in (value, sampling_locations, attention_weights)]
        arguments = arguments_of(leaves[0], value_spatial_shapes, leaves[1], leaves[2], None)
        chosen = DEFORMABLE_ATTENTION.choose(*arguments)
        if not isinstance(chosen, TritonImplementation):
            found = torch.autograd.grad(chosen.run(*arguments), leaves, dout)
            return found[0], found[1], found[2]
    value, locations, weights, levels, _, shapes, _ = arguments
    found = gradients_of(dout, value.detach(), locations.detach(), weights.detach(), levels, shapes)
    return found[0], found[1].view_as(sampling_locations), found[2].view_as(attention_weights)


def provide_deformable_extension() -> None:
    """Let `import MultiScaleDeformableAttention` find these functions: nothing is to be compiled for models that need that extension.

    To be called before such a model is imported. Raises RuntimeError where another module of that name was imported before.
    """
    found = sys.modules.get(NAME)
    if found is not None and getattr(found, "ms_deform_attn_forward", None) is not ms_deform_attn_forward:
        raise RuntimeError(
            f"{NAME} was imported before, from {getattr(found, '__file__', None)}; expected none: "
            "call provide_deformable_extension() first, or leave it out, as the compiled extension is there"
        )
    module = ModuleType(NAME, __doc__)
    # Without one, who asks by importlib.util.find_spec whether it is there would get a ValueError.
    module.__spec__ = ModuleSpec(NAME, None)
    module.__dict__.update(
        ms_deform_attn_forward=ms_deform_attn_forward, ms_deform_attn_backward=ms_deform_attn_backward
    )
    sys.modules[NAME] = module
