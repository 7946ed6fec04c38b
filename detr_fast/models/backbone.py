"""From images to a feature map: torchvision's ResNets with frozen norms, and a small network to train from scratch."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from detr_fast import nn
from detr_fast.models.position import PositionEmbeddingLearned, PositionEmbeddingSine

if TYPE_CHECKING:
    from torchvision.models import ResNet

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101")


class FrozenBatchNorm2d(nn.Module):
    """Batch norm with fixed statistics and a fixed affine map: y = x * scale + shift for each channel."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Weights of a real batch norm also count its batches, which nothing here needs.
        state_dict.pop(prefix + "num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """Both (C,)."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return scale, self.bias - self.running_mean * scale

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = (t.view(1, -1, 1, 1) for t in self.scale_and_shift())
        return torch.addcmul(shift, x, scale)


def conv_norm(conv: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
    """norm(conv(x)); a frozen norm is folded into the weights, which saves two passes over the feature map.

    Folding is legal only for a plain convolution that nobody listens to; otherwise both run one by one.
    """
    if type(conv) is not nn.Conv2d or type(norm) is not FrozenBatchNorm2d or _has_hooks(conv) or _has_hooks(norm):
        return norm(conv(x))
    scale, shift = norm.scale_and_shift()
    weight = conv.weight * scale.view(-1, 1, 1, 1)
    return nn.functional.conv2d(x, weight, shift, conv.stride, conv.padding, conv.dilation, conv.groups)


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


class ResNetBody(nn.Module):
    """A torchvision ResNet up to its last feature map, with torchvision's parameter names."""

    def __init__(self, resnet: ResNet) -> None:
        super().__init__()
        for name in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"):
            setattr(self, name, getattr(resnet, name))

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C, H/32, W/32), or /16 with dilation."""
        x = self.maxpool(self.relu(conv_norm(self.conv1, self.bn1, x)))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in stage:
                x = _residual_block(block, x)
        return x


def _residual_block(block: Any, x: Tensor) -> Tensor:
    """torchvision's BasicBlock (two convolutions) or Bottleneck (three)."""
    identity = x if block.downsample is None else conv_norm(block.downsample[0], block.downsample[1], x)
    x = block.relu(conv_norm(block.conv1, block.bn1, x))
    x = conv_norm(block.conv2, block.bn2, x)
    if hasattr(block, "conv3"):
        x = conv_norm(block.conv3, block.bn3, block.relu(x))
    return block.relu(x + identity)


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
    """

    def __init__(self, body: nn.Module, num_channels: int) -> None:
        super().__init__()
        self.body = body
        self.num_channels = num_channels

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
        import torchvision

        resnet = torchvision.models.get_model(
            name,
            weights=None,
            replace_stride_with_dilation=[False, False, dilation],
            norm_layer=FrozenBatchNorm2d if norm == "frozen" else nn.BatchNorm2d,
        )
        if weights is not None:
            resnet.load_state_dict(_resnet_weights(name, weights), strict=norm == "batch")
        super().__init__(ResNetBody(resnet), resnet.fc.in_features)
        self.dilation = dilation
        if norm == "frozen":
            for key, parameter in self.body.named_parameters():
                parameter.requires_grad_(key.startswith(("layer2", "layer3", "layer4")))


def _resnet_weights(name: str, weights: str | Path) -> dict[str, Tensor]:
    import torchvision

    if Path(weights).is_file():
        return torch.load(weights, map_location="cpu", weights_only=True)
    known = torchvision.models.get_model_weights(name)
    if str(weights) not in known.__members__ and weights != "DEFAULT":
        raise ValueError(
            f"got weights_backbone={str(weights)!r}: no such file, and torchvision's {name} knows only "
            f"{', '.join(known.__members__)}"
        )
    return known[str(weights)].get_state_dict(progress=False, check_hash=True)


class ConvBackbone(Backbone):
    """The small backbone of the demo; see ConvBody."""

    def __init__(self, width: int = 32, stride: int = 16) -> None:
        body = ConvBody(width, stride)
        super().__init__(body, body.channels)


class Joiner(nn.Sequential):
    """The backbone and the position embedding, under the original repository's names: backbone.0 and backbone.1."""

    def __init__(self, backbone: Backbone, position: PositionEmbeddingSine | PositionEmbeddingLearned) -> None:
        super().__init__(backbone, position)
        self.num_channels = backbone.num_channels

    def forward(  # type: ignore[override]
        self, images: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Returns features (B, C, h, w), mask (B, h, w) or None, positions (B or 1, h, w, d_model)."""
        features, mask = self[0](images, mask)
        return features, mask, self[1](features, mask)
