"""From the last features to a distribution over classes, or to boxes with classes."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from detr_fast import dispatch
from detr_fast.nn.bare import is_bare
from detr_fast.ops import linear_cross_entropy, linear_softmax
from detr_fast.ops.prediction_heads import PREDICTION_HEADS


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


def fused_heads(
    x: Tensor, layers: Sequence[nn.Module], classifier: nn.Module, *others: nn.Module, sigmoid: bool
) -> tuple[Tensor, Tensor] | None:
    """`ops.prediction_heads` of linear layers, three of a perceptron and one beside it: y (…, D) and classes (…, N).

    None where they are to run one by one: where one is anything but a plain, bare torch.nn.Linear, one of the others, which they are parts of, is not
    bare, or the kernel is not chosen.
    """
    if not (dispatch.intervening or x.is_cuda) or x.is_nested or len(layers) != 3:
        return None
    parts = (*layers, classifier)
    if not (all(type(part) is nn.Linear for part in parts) and all(map(is_bare, (*parts, *others)))):
        return None
    arguments = (x, *(t for part in parts for t in (part.weight, part.bias)), sigmoid)
    kernel = PREDICTION_HEADS.kernel(*arguments)
    return None if kernel is None else kernel.run(*arguments)
