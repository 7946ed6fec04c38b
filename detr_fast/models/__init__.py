"""DETR: backbone, transformer, matcher, criterion, post-processing and weight conversion; Seq2Seq for text from anything."""

from __future__ import annotations

from detr_fast.models.build import (
    ModelConfig,
    build_criterion,
    build_model,
    detr_resnet50,
    detr_resnet50_dc5,
    detr_resnet101,
    detr_resnet101_dc5,
)
from detr_fast.models.criterion import SetCriterion
from detr_fast.models.detr import Detr
from detr_fast.models.matcher import HungarianMatcher
from detr_fast.models.postprocess import PostProcess
from detr_fast.models.seq2seq import ImageSource, Seq2Seq, TextSource
from detr_fast.models.structures import NestedTensor, TargetError, Targets, nested_tensor_from_list

__all__ = [
    "Detr",
    "detr_resnet50",
    "detr_resnet101",
    "detr_resnet50_dc5",
    "detr_resnet101_dc5",
    "ModelConfig",
    "build_model",
    "build_criterion",
    "HungarianMatcher",
    "SetCriterion",
    "PostProcess",
    "NestedTensor",
    "nested_tensor_from_list",
    "Targets",
    "TargetError",
    "Seq2Seq",
    "TextSource",
    "ImageSource",
]
