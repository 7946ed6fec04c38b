"""From the model's outputs to detections in pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from detr_fast import nn
from detr_fast.models.boxes import to_corners


class PostProcess(nn.Module):
    """Scores, labels and pixel boxes, one detection per query; filter by score as you like.

    Args:
        focal: scores are sigmoids, of a model trained with focal loss, rather than a softmax with "no object".
    """

    def __init__(self, focal: bool = False) -> None:
        super().__init__()
        self.focal = focal

    def read(self, outputs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Scores (B, Q), labels (B, Q) and boxes (B, Q, 4), x0, y0, x1, y1 as shares of the unpadded image's size."""
        logits = outputs["pred_logits"]
        probabilities = logits[..., :-1].sigmoid() if self.focal else logits.softmax(-1)[..., :-1]
        scores, labels = probabilities.max(-1)
        return scores, labels, to_corners(outputs["pred_boxes"])

    @torch.no_grad()
    def forward(
        self, outputs: dict[str, Any], target_sizes: Tensor | Sequence[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        """Read the last decoder layer's predictions.

        Args:
            outputs: the model's.
            target_sizes: (B, 2), height and width of each image as wanted for the boxes, in pixels: the original
                image's for evaluation. A list of pairs will do.

        Returns:
            for each image {"scores": (Q,) in [0, 1], "labels": (Q,), "boxes": (Q, 4) as x0, y0, x1, y1 in pixels}
        """
        images = outputs["pred_logits"].shape[0]
        target_sizes = torch.as_tensor(target_sizes)
        if target_sizes.shape != (images, 2):
            raise ValueError(
                f"got target_sizes of shape {tuple(target_sizes.shape)}; expected {(images, 2)}, "
                "the height and the width of each image"
            )
        scores, labels, corners = self.read(outputs)
        height, width = target_sizes.to(corners).unbind(1)
        pixels = corners * torch.stack((width, height, width, height), dim=1)[:, None]
        return [
            {"scores": s, "labels": l, "boxes": b}
            for s, l, b in zip(scores.unbind(0), labels.unbind(0), pixels.unbind(0))
        ]
