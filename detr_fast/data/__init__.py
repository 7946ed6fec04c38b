"""COCO-format data sets: reading, augmentation, batching, evaluation, and the embedded scenes."""

from __future__ import annotations

from detr_fast.data.batching import Batch, GroupedBatchSampler, build_loader, collate
from detr_fast.data.coco import CocoDetection, CocoFolder, SplitFiles
from detr_fast.data.coco_eval import CocoEvaluator
from detr_fast.data.errors import DataError
from detr_fast.data.scenes import generate_scenes
from detr_fast.data.transforms import TransformConfig, eval_transforms, train_transforms

__all__ = [
    "Batch",
    "CocoDetection",
    "CocoEvaluator",
    "CocoFolder",
    "DataError",
    "GroupedBatchSampler",
    "SplitFiles",
    "TransformConfig",
    "build_loader",
    "collate",
    "eval_transforms",
    "generate_scenes",
    "train_transforms",
]
