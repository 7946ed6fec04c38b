"""DETR: a backbone, a transformer, and two heads that turn object queries into boxes with classes.

Source: Carion et al., 2020, "End-to-End Object Detection with Transformers", arXiv:2005.12872.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from detr_fast import nn
from detr_fast.models.backbone import Joiner
from detr_fast.models.packing import PACKING, Packing
from detr_fast.models.structures import NestedTensor, nested_tensor_from_list
from detr_fast.models.transformer import Transformer
from detr_fast.nn.heads import fused_heads

Images = NestedTensor | Tensor | Sequence[Tensor] | tuple[Tensor, Tensor | None]


class MLP(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(before, after) for before, after in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = nn.functional.relu(layer(x))
        return self.layers[-1](x)


class Detr(nn.Module):
    """The detector.

    Args:
        backbone: images and mask -> features, mask and positions; see Joiner.
        transformer: see Transformer.
        num_classes: number of label values, "no object" not counted; labels run from 0 to num_classes - 1. For COCO
            with its own ids (1 to 90) that is 91.
        num_queries: the largest number of objects that an image can get.
        aux_loss: also return every earlier decoder layer's predictions.
        packed: the encoder skips padding where the images' sizes are known on the host: in a list of images, or a
            NestedTensor made of one. A mask alone is on the device, and to read it would make the host wait: with
            that, and without padding, everything runs as if this were off.
        focal: class scores are read as sigmoids (the last logit, "no object", has no part), and start at 0.01, so that
            focal loss is not swamped by all that is no object (arXiv:1708.02002, section 4.1).
    """

    def __init__(
        self,
        backbone: Joiner,
        transformer: Transformer,
        num_classes: int,
        num_queries: int,
        aux_loss: bool = True,
        packed: bool = False,
        focal: bool = False,
    ) -> None:
        super().__init__()
        width = transformer.d_model
        self.num_classes = num_classes
        self.num_queries = num_queries
        self.aux_loss = aux_loss
        self.packed = packed
        self.focal = focal
        self.transformer = transformer
        self.class_embed = nn.Linear(width, num_classes + 1)
        if focal:
            nn.init.constant_(self.class_embed.bias, -math.log(99))
        self.bbox_embed = MLP((width, width, width, 4))
        self.query_embed = nn.Embedding(num_queries, width)
        self.input_proj = nn.Conv2d(backbone.num_channels, width, kernel_size=1)
        self.backbone = backbone

    def forward(self, images: Images) -> dict[str, Any]:
        """Detect objects.

        Args:
            images: a NestedTensor; a list of (3, H, W) tensors, which may differ in size; a pair of (B, 3, H, W)
                images and a (B, H, W) mask with True = padding (or None); or (B, 3, H, W) without padding.

        Returns:
            {"pred_logits": (B, Q, num_classes + 1), the last for "no object";
             "pred_boxes": (B, Q, 4), (center x, center y, width, height) as fractions of the unpadded image;
             "aux_outputs": the same two for each earlier decoder layer, first to last, if aux_loss}
        """
        tensors, mask, nested = _tensors_and_mask(images)
        features, mask, position = self.backbone(tensors, mask)
        source = self.input_proj(features).flatten(2).transpose(1, 2).contiguous()
        queries = self.transformer(
            source,
            position.flatten(1, 2),
            self.query_embed.weight,
            key_padding_mask=None if mask is None else mask.flatten(1),
            all_layers=self.aux_loss,
            packing=self._packing(nested, tensors, mask, features),
        )
        with _full_precision(queries.device):
            queries = queries.to(self.class_embed.weight.dtype)
            # unbind, not indexing: its backward is one stack rather than one zero-filled tensor per layer.
            boxes, logits = (t.unbind(0) for t in self._heads(queries))
        outputs: dict[str, Any] = {"pred_logits": logits[-1], "pred_boxes": boxes[-1]}
        if self.aux_loss:
            outputs["aux_outputs"] = [
                {"pred_logits": logits_of_layer, "pred_boxes": boxes_of_layer}
                for logits_of_layer, boxes_of_layer in zip(logits[:-1], boxes[:-1])
            ]
        return outputs

    def with_packing(self, images: NestedTensor) -> NestedTensor:
        """The batch for a captured step: with a packing in place of sizes on the host, if packed, and never with sizes.

        Its tensors have one of few shapes for each padded size. It is made on the host, page-locked where there is a GPU; one
        that the batch has already stays.
        """
        packing = images.packing if self.packed and images.padded else None
        if packing is None and self.packed and images.padded and images.sizes is not None:
            height, width = images.tensors.shape[-2:]
            sizes = images.sizes, (height, width), self.backbone.map_size(height, width)
            packing = Packing.of_images(*sizes, capacity=Packing.capacity(*sizes))
            packing = packing.pin_memory() if torch.cuda.is_available() else packing
        return replace(images, sizes=None, packing=packing)

    def _heads(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes (..., 4) and logits of classes."""
        boxes, classes = self.bbox_embed, self.class_embed
        found = None
        if type(boxes) is MLP:
            found = fused_heads(queries, tuple(boxes.layers), classes, boxes, sigmoid=True)
        return (boxes(queries).sigmoid(), classes(queries)) if found is None else found

    def _packing(
        self, nested: NestedTensor | None, images: Tensor, mask: Tensor | None, features: Tensor
    ) -> Packing | None:
        if not self.packed:
            return None
        packing, sizes = (None, None) if nested is None else (nested.packing, nested.sizes)
        if not PACKING(images, mask is not None, packing is not None or sizes is not None):
            return None
        if packing is not None or sizes is None:
            return packing
        height, width = images.shape[-2:]
        map_height, map_width = features.shape[-2:]
        return Packing.of_images(sizes, (height, width), (map_height, map_width), features.device)


def _full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """No autocast: the heads are tiny, and a box in bf16 is up to 3 pixels off in an image of 1,333."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def _tensors_and_mask(images: Images) -> tuple[Tensor, Tensor | None, NestedTensor | None]:
    """The (B, 3, H, W) images, their mask (None where it is known that nothing is padded), and the batch that knows more."""
    mask: Tensor | None
    nested: NestedTensor | None = None
    if isinstance(images, Tensor):
        tensors, mask = images, None
    elif isinstance(images, tuple) and len(images) == 2 and isinstance(images[0], Tensor) and images[0].ndim == 4:
        tensors, mask = images
    else:
        nested = images if isinstance(images, NestedTensor) else nested_tensor_from_list(images)  # type: ignore[arg-type]
        tensors, mask = nested.tensors, nested.mask if nested.padded else None
    if tensors.ndim != 4 or tensors.shape[1] != 3:
        raise ValueError(f"got images of shape {tuple(tensors.shape)}; expected (B, 3, H, W)")
    if not tensors.is_floating_point():
        raise ValueError(f"got {tensors.dtype} images; expected floats, normalised as the weights were trained")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (tensors.shape[0], *tensors.shape[2:])):
        raise ValueError(
            f"got a {mask.dtype} mask of shape {tuple(mask.shape)}; expected bool "
            f"{(tensors.shape[0], *tensors.shape[2:])}, True on padding"
        )
    return tensors, mask, nested
