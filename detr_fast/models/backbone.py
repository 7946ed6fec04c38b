"""From images to a feature map: torchvision's ResNets with frozen norms, and a small network to train from scratch."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from detr_fast import nn
from detr_fast.models.position import PositionEmbeddingLearned, PositionEmbeddingSine

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101")


class ConvBody(nn.Module):
    """Four stages of conv, batch norm and ReLU, small enough to train from scratch on a CPU within minutes.

    Args:
        width: channels of the first stage; each later one has twice as many.
        stride: 8, 16 or 32; how many pixels one feature stands for, in both directions.
    """

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        if stride not in (8, 16, 32):
            raise ValueError(f"got stride {stride} for the conv backbone; expected 8, 16 or 32")
        channels = [width * 2**stage for stage in range(4)]
        # No residual block at the highest resolution: it would cost as much as all the others together.
        stages: list[nn.Module] = [_conv_norm_relu(3, width, stride // 8)]
        for before, after in pairwise(channels):
            stages.append(nn.Sequential(_conv_norm_relu(before, after, 2), _ConvResidual(after)))
        self.stages = nn.Sequential(*stages)
        self.channels = channels[-1]

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, channels, H / stride, W / stride), rounded up."""
        return self.stages(x)


def _conv_norm_relu(before: int, after: int, stride: int) -> nn.Sequential:
    kernel = max(3, stride + 1)
    return nn.Sequential(
        nn.Conv2d(before, after, kernel, stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(after),
        nn.ReLU(inplace=True),
    )


class _ConvResidual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = _conv_norm_relu(channels, channels, 1)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu(x + self.norm(self.conv(self.first(x))))


class Backbone(nn.Module):
    """A body and what the rest of the model needs to know of it.

    Attributes:
        body: images (B, 3, H, W) -> features (B, num_channels, h, w).
        num_channels: of the features.
        stride: how many pixels one feature stands for, in both directions.
    """

    def __init__(self, body: nn.Module, num_channels: int, stride: int) -> None:
        super().__init__()
        self.body = body
        self.num_channels = num_channels
        self.stride = stride

    def map_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the features of such images, known without computing them."""
        return -(-height // self.stride), -(-width // self.stride)

    def forward(self, images: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """images (B, 3, H, W), mask (B, H, W) -> features (B, C, h, w), the mask at their resolution (B, h, w)."""
        features = self.body(images)
        if mask is None:
            return features, None
        # Nearest neighbour on bytes: bool has no interpolation, and float would copy the mask four times as large.
        small = nn.functional.interpolate(mask[None].view(torch.uint8), size=features.shape[-2:])[0]
        return features, small.view(torch.bool)


class ResNetBackbone(Backbone):
    """ResNet-18, 34, 50 or 101.

    Args:
        name: "resnet18", "resnet34", "resnet50" or "resnet101".
        dilation: stride 16 rather than 32 through a dilated last stage (the DC5 models; not for 18 and 34).
        weights: torchvision's ImageNet weights by name ("IMAGENET1K_V1", "DEFAULT"), a file that holds a torchvision
            ResNet's state_dict, or None for random ones.
        norm: "frozen", as in the original (the stem and the first stage don't train either), needs trained weights
            sooner or later; "batch" trains everything, to start from nothing.
    """

    def __init__(
        self, name: str, dilation: bool = False, weights: str | Path | None = None, norm: str = "frozen"
    ) -> None:
        if name not in RESNETS:
            raise ValueError(f"got backbone {name!r}; expected one of {', '.join(RESNETS)}")
        if norm not in ("frozen", "batch"):
            raise ValueError(f"got norm {norm!r} for the backbone; expected 'frozen' or 'batch'")
        if dilation and name in ("resnet18", "resnet34"):
            raise ValueError(f"{name} has no dilated (DC5) variant; use resnet50 or resnet101, or dilation=False")
        from detr_fast.models.resnet import ResNetBody  # needs torchvision, which the conv backbone does not

        body = ResNetBody(name, dilation, weights, frozen=norm == "frozen")
        super().__init__(body, body.channels, 16 if dilation else 32)
        self.dilation = dilation
        if norm == "frozen":
            for key, parameter in self.body.named_parameters():
                parameter.requires_grad_(key.startswith(("layer2", "layer3", "layer4")))


class ConvBackbone(Backbone):
    """The small backbone of the demo; see ConvBody."""

    def __init__(self, width: int = 32, stride: int = 16) -> None:
        body = ConvBody(width, stride)
        super().__init__(body, body.channels, stride)


class Joiner(nn.Sequential):
    """The backbone and the position embedding, under the original repository's names: backbone.0 and backbone.1."""

    def __init__(self, backbone: Backbone, position: PositionEmbeddingSine | PositionEmbeddingLearned) -> None:
        super().__init__(backbone, position)
        self.num_channels = backbone.num_channels

    def map_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the features of such images."""
        backbone = self[0]
        assert isinstance(backbone, Backbone)
        return backbone.map_size(height, width)

    def forward(  # type: ignore[override]
        self, images: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Returns features (B, C, h, w), mask (B, h, w) or None, positions (B or 1, h, w, d_model)."""
        features, mask = self[0](images, mask)
        return features, mask, self[1](features, mask)
