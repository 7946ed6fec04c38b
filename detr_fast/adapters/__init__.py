"""Which modules of which library `accelerate` can switch to ours: one file a library."""

from __future__ import annotations

import importlib

from torch.nn import Module

from detr_fast.adapters.base import Adapter

# In the order in which they are asked. An adapter for a package is imported where a model has a class of that package.
_ADAPTERS = {
    "detr_fast.adapters.hugging_face_swin.HuggingFaceSwin": "transformers",
    "detr_fast.adapters.hugging_face_rotary.HuggingFaceRotary": "transformers",
    "detr_fast.adapters.hugging_face.HuggingFaceAttention": "transformers",
    "detr_fast.adapters.hugging_face_layers.HuggingFaceLayers": "transformers",
    "detr_fast.adapters.hugging_face_sampling.HuggingFaceSampling": "transformers",
    "detr_fast.adapters.table_transformer.TableTransformer": "transformers",
    "detr_fast.adapters.activations.Activations": "transformers",
    "detr_fast.adapters.sine_positions.SinePositions": "transformers",
    "detr_fast.adapters.hugging_face_loss.HuggingFaceLoss": "transformers",
    "detr_fast.adapters.rms_norms.RMSNorms": None,
    "detr_fast.adapters.rms_layers.RMSNormLayers": None,
    "detr_fast.adapters.frozen_resnet.FrozenResNets": None,
    "detr_fast.adapters.timm.Timm": "timm",
    "detr_fast.adapters.timm_blocks.TimmBlocks": "timm",
    "detr_fast.adapters.torchvision.Torchvision": "torchvision",
    "detr_fast.adapters.feed_forward.FeedForwardBlocks": None,
    "detr_fast.adapters.gated_blocks.GatedBlocks": None,
    "detr_fast.adapters.original_detr.OriginalDetr": None,
    "detr_fast.adapters.original_deformable.OriginalDeformable": None,
    "detr_fast.adapters.torch_nn.TorchNN": None,
}


def adapters_for(model: Module) -> tuple[list[type[Adapter]], dict[str, str]]:
    """The adapters that the classes in a model call for, and why those of a package can't be had, by package."""
    packages = {base.__module__.partition(".")[0] for module in model.modules() for base in type(module).__mro__}
    adapters, missing = [], {}
    for path, package in _ADAPTERS.items():
        if package is None or package in packages:
            where, _, name = path.rpartition(".")
            try:
                adapters.append(getattr(importlib.import_module(where), name))
            except (ImportError, AttributeError) as error:
                if package is None:
                    raise
                missing[package] = f"this version of {package} lacks what its adapter needs ({error}): use a newer one"
    return adapters, missing
