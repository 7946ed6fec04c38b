"""LayerNorm and RMSNorm through the dispatcher."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from detr_fast import dispatch
from detr_fast.nn.replacements import replaces
from detr_fast.nn.tracing import as_leaf, is_traced
from detr_fast.ops.layer_norm import LAYER_NORM
from detr_fast.ops.rms_norm import RMS_NORM


@replaces(nn.LayerNorm)
class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm`, on the implementation that the dispatcher chooses for `ops.layer_norm`.

    Arguments, shapes, state_dict and errors are its own.
    """

    def forward(self, input: Tensor) -> Tensor:
        # Anything but a tensor has no is_cuda, and torch.fx's Proxy one that is no bool; both are rare, so they come last.
        if dispatch.intervening or getattr(input, "is_cuda", False) is not False:
            if is_traced(input) and (node := as_leaf(self, (input,))) is not None:
                return node
            if isinstance(input, Tensor):
                return LAYER_NORM(input, self.normalized_shape, self.weight, self.bias, self.eps)
        return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


@replaces(nn.RMSNorm)
class RMSNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm`, on the implementation that the dispatcher chooses for `ops.rms_norm`.

    Arguments, shapes, state_dict and errors are its own.
    """

    def forward(self, x: Tensor) -> Tensor:
        # As in LayerNorm.
        if dispatch.intervening or getattr(x, "is_cuda", False) is not False:
            if is_traced(x) and (node := as_leaf(self, (x,))) is not None:
                return node
            if isinstance(x, Tensor):
                return RMS_NORM(x, self.normalized_shape, self.weight, self.eps)
        return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)
