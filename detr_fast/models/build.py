"""Models and criteria from a configuration that fits in a JSON file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from detr_fast.models.backbone import RESNETS, Backbone, ConvBackbone, Joiner, ResNetBackbone
from detr_fast.models.criterion import SetCriterion, loss_weights
from detr_fast.models.detr import Detr
from detr_fast.models.matcher import HungarianMatcher
from detr_fast.models.position import build_position_embedding
from detr_fast.models.transformer import Transformer


@dataclass(frozen=True)
class ModelConfig:
    """Everything that the model's shape depends on; the defaults are the original's DETR-R50 for COCO.

    Attributes:
        backbone: "resnet18", "resnet34", "resnet50", "resnet101", or "conv", the small one that trains from scratch.
        num_classes: number of label values, "no object" not counted.
        num_queries: the largest number of objects that an image can get.
        d_model, heads, encoder_layers, decoder_layers, feedforward, dropout, pre_norm: the transformer's.
        dilation: DC5, only for resnet50 and resnet101.
        position: "sine" or "learned".
        position_temperature: of "sine": the longest wavelength over the shortest. The original's 10,000 gives a map of
            a few cells neighbours that hardly differ; 20 suits those (as in arXiv:2201.12329).
        aux_loss: every decoder layer is trained on its own predictions.
        packed: the encoder skips padding where the images' sizes are known on the host; see Detr.
        focal: class scores are sigmoids, trained with focal loss, rather than a softmax with "no object".
        backbone_norm: of the ResNets: "frozen", with trained weights, or "batch", to train them from scratch.
        backbone_width, backbone_stride: of "conv": the first stage's channels, and pixels per feature (8, 16 or 32).
    """

    backbone: str = "resnet50"
    num_classes: int = 91
    num_queries: int = 100
    d_model: int = 256
    heads: int = 8
    encoder_layers: int = 6
    decoder_layers: int = 6
    feedforward: int = 2048
    dropout: float = 0.1
    pre_norm: bool = False
    dilation: bool = False
    position: str = "sine"
    position_temperature: float = 10_000.0
    aux_loss: bool = True
    packed: bool = False
    focal: bool = False
    backbone_norm: str = "frozen"
    backbone_width: int = 32
    backbone_stride: int = 16

    def __post_init__(self) -> None:
        if self.backbone not in (*RESNETS, "conv"):
            raise ValueError(f"got backbone {self.backbone!r}; expected one of {', '.join((*RESNETS, 'conv'))}")
        if self.d_model % self.heads:
            raise ValueError(f"d_model {self.d_model} is no multiple of {self.heads} heads")
        if self.d_model % 4:
            raise ValueError(f"d_model {self.d_model} is no multiple of 4 (a sine and a cosine for rows and columns)")
        if not self.position_temperature >= 1:
            raise ValueError(f"got position_temperature {self.position_temperature}; expected at least 1")
        for name in ("num_classes", "num_queries", "decoder_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"got {name} {getattr(self, name)}; expected at least 1")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """Read what to_dict wrote.

        Raises:
            ValueError: an entry that this version doesn't know, or a value out of range.
        """
        unknown = set(values) - {field.name for field in fields(cls)}
        if unknown:
            raise ValueError(f"got unknown model settings {sorted(unknown)}; was the file written by a newer version?")
        return cls(**values)


def build_model(config: ModelConfig, weights_backbone: str | Path | None = None) -> Detr:
    """A model with random weights, but for the backbone's where `weights_backbone` names some (see ResNetBackbone)."""
    backbone: Backbone
    if config.backbone == "conv":
        if weights_backbone is not None:
            raise ValueError(f"the conv backbone trains from scratch; got weights_backbone={str(weights_backbone)!r}")
        backbone = ConvBackbone(config.backbone_width, config.backbone_stride)
    else:
        backbone = ResNetBackbone(config.backbone, config.dilation, weights_backbone, config.backbone_norm)
    transformer = Transformer(
        config.d_model,
        config.heads,
        config.encoder_layers,
        config.decoder_layers,
        config.feedforward,
        config.dropout,
        config.pre_norm,
    )
    joiner = Joiner(backbone, build_position_embedding(config.position, config.d_model, config.position_temperature))
    return Detr(
        joiner, transformer, config.num_classes, config.num_queries, config.aux_loss, config.packed, config.focal
    )


def build_criterion(
    config: ModelConfig, eos_coef: float = 0.1, focal: bool | None = None, class_weight: float = 1.0
) -> SetCriterion:
    """The original's criterion and weights for this model; `class_weight` weighs the classification loss.

    focal: classify by focal loss; where None, as the model's configuration says.
    """
    focal = config.focal if focal is None else focal
    return SetCriterion(
        config.num_classes,
        HungarianMatcher(focal=focal),
        loss_weights(config.decoder_layers, aux_loss=config.aux_loss, ce=class_weight),
        eos_coef,
        focal=focal,
    )


def _original(
    backbone: str,
    dilation: bool,
    num_classes: int,
    weights: str | Path | None,
    weights_backbone: str | Path | None,
) -> Detr:
    model = build_model(ModelConfig(backbone=backbone, dilation=dilation, num_classes=num_classes), weights_backbone)
    if weights is not None:
        from detr_fast.models.convert import load_weights

        load_weights(model, weights)
    return model


def detr_resnet50(
    num_classes: int = 91, weights: str | Path | None = None, weights_backbone: str | Path | None = None
) -> Detr:
    """DETR-R50 of the paper.

    Args:
        num_classes: number of label values, "no object" not counted; 91 for COCO's own ids.
        weights: a checkpoint file or folder, see convert.load_weights.
        weights_backbone: ImageNet weights for the backbone, see ResNetBackbone.
    """
    return _original("resnet50", False, num_classes, weights, weights_backbone)


def detr_resnet101(
    num_classes: int = 91, weights: str | Path | None = None, weights_backbone: str | Path | None = None
) -> Detr:
    """DETR-R101 of the paper; see detr_resnet50."""
    return _original("resnet101", False, num_classes, weights, weights_backbone)


def detr_resnet50_dc5(
    num_classes: int = 91, weights: str | Path | None = None, weights_backbone: str | Path | None = None
) -> Detr:
    """DETR-DC5-R50 of the paper: features at stride 16; see detr_resnet50."""
    return _original("resnet50", True, num_classes, weights, weights_backbone)


def detr_resnet101_dc5(
    num_classes: int = 91, weights: str | Path | None = None, weights_backbone: str | Path | None = None
) -> Detr:
    """DETR-DC5-R101 of the paper: features at stride 16; see detr_resnet50."""
    return _original("resnet101", True, num_classes, weights, weights_backbone)
