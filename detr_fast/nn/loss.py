"""LinearCrossEntropyLoss through the dispatcher. Older PyTorch has none, and `detr_fast.nn` neither."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from detr_fast.dispatch import BackendError
from detr_fast.nn.replacements import replaces
from detr_fast.nn.tracing import keeps_whole
from detr_fast.ops.linear_cross_entropy import LINEAR_CROSS_ENTROPY, linear_cross_entropy


@replaces(nn.LinearCrossEntropyLoss)
@keeps_whole
class LinearCrossEntropyLoss(nn.LinearCrossEntropyLoss):
    """`torch.nn.LinearCrossEntropyLoss`, on the implementation that the dispatcher chooses for `ops.linear_cross_entropy`.

    Arguments, shapes, state_dict and errors are its own. Class probabilities, losses of several dimensions (`out_features`) and
    `options`, which ask for PyTorch's own chunks, run as in torch.nn; with a kernel asked for by name they raise BackendError.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """input (N, in_features) or (in_features,), target (N,) or () of class indices -> loss, () or as target's."""
        reason = self._why_torch_nns(input, target)
        if reason is None:
            linear = self.linear
            return linear_cross_entropy(
                input,
                linear.weight,
                linear.bias,
                target,
                class_weight=self.weight,
                ignore_index=-100 if self.ignore_index is None else self.ignore_index,
                reduction=self.reduction,
                label_smoothing=self.label_smoothing,
            )
        requested = LINEAR_CROSS_ENTROPY.requested
        if requested not in (None, "eager"):
            raise BackendError(
                f"linear_cross_entropy was asked to run on {requested!r} but got {reason}, which only torch.nn's own "
                "forward takes. Use linear_cross_entropy='auto'."
            )
        return super().forward(input, target)

    def _why_torch_nns(self, input: Tensor, target: Tensor) -> str | None:
        if self.options is not None:
            return "options"
        if self.out_features:
            return f"out_features {self.out_features}"
        if target.is_floating_point():
            return "class probabilities"
        fits = input.ndim in (1, 2) and input.shape[-1] == self.linear.in_features and target.shape == input.shape[:-1]
        if not fits or target.dtype != torch.int64:  # the original says what is wrong
            return f"input {tuple(input.shape)} and target {tuple(target.shape)} of {target.dtype}"
        return None
