"""From the last features to a distribution over classes."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from detr_fast.ops import linear_cross_entropy, linear_softmax


class LinearSoftmax(nn.Linear):
    """A linear map and a softmax: the transformer's last step.

    Training needs neither probabilities nor, in memory, all logits: `loss` is their cross-entropy.

    Args:
        in_features: C.
        out_features: V, the number of classes.
        bias, device, dtype: as torch.nn.Linear's.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x (…, C) -> probabilities (…, V), which sum to 1."""
        return linear_softmax(x, self.weight, self.bias)

    def logits(self, x: Tensor) -> Tensor:
        """x (…, C) -> (…, V), before the softmax."""
        return F.linear(x, self.weight, self.bias)

    def log_prob(self, x: Tensor) -> Tensor:
        """x (…, C) -> (…, V), the logarithms of what `forward` gives."""
        return self.logits(x).log_softmax(-1)

    def loss(
        self,
        x: Tensor,
        targets: Tensor,
        *,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
    ) -> Tensor:
        """The cross-entropy of x (…, C) against class indices, targets (…), as F.cross_entropy defines the options.

        Raises:
            ValueError: targets whose shape is not x's without its last dimension.
        """
        return linear_cross_entropy(
            x,
            self.weight,
            self.bias,
            targets,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction=reduction,
        )
