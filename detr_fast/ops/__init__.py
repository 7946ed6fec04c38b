"""Operations: one file each, with its contract, its eager reference and its implementations."""

from __future__ import annotations

from detr_fast import dispatch, native
from detr_fast.ops import host_native
from detr_fast.ops.add_layer_norm import add_layer_norm
from detr_fast.ops.add_rms_norm import add_rms_norm
from detr_fast.ops.attention import attention, attention_with_weights, scaled_dot_product_attention
from detr_fast.ops.attention_varlen import attention_varlen
from detr_fast.ops.cast_together import cast_together
from detr_fast.ops.channel_affine import channel_affine
from detr_fast.ops.deformable_attention import deformable_attention, deformable_attention_from_offsets
from detr_fast.ops.detection_losses import detection_losses
from detr_fast.ops.feed_forward import feed_forward, feed_forward_add_layer_norm
from detr_fast.ops.gated_activation import gated_activation
from detr_fast.ops.layer_norm import layer_norm
from detr_fast.ops.linear_add_layer_norm import linear_add_layer_norm
from detr_fast.ops.linear_assignment import linear_assignment
from detr_fast.ops.linear_cross_entropy import linear_cross_entropy
from detr_fast.ops.linear_probabilities import linear_softmax, linear_softmax_topk
from detr_fast.ops.matching_cost import matching_cost
from detr_fast.ops.optimizer_step import optimizer_step
from detr_fast.ops.pointwise_affine import pointwise_affine
from detr_fast.ops.prediction_heads import prediction_heads
from detr_fast.ops.qkv_projection import qkv_projection
from detr_fast.ops.resnet_stem import resnet_stem
from detr_fast.ops.rms_norm import rms_norm
from detr_fast.ops.rotary_embedding import rotary_embedding
from detr_fast.ops.sine_positions import sine_positions

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "attention_with_weights",
    "scaled_dot_product_attention",
    "attention_varlen",
    "cast_together",
    "channel_affine",
    "deformable_attention",
    "deformable_attention_from_offsets",
    "detection_losses",
    "feed_forward",
    "feed_forward_add_layer_norm",
    "gated_activation",
    "layer_norm",
    "linear_add_layer_norm",
    "linear_assignment",
    "linear_cross_entropy",
    "linear_softmax",
    "linear_softmax_topk",
    "matching_cost",
    "optimizer_step",
    "pointwise_affine",
    "prediction_heads",
    "qkv_projection",
    "resnet_stem",
    "rms_norm",
    "rotary_embedding",
    "sine_positions",
]

dispatch.read_environment()
host_native.register()
native.read_environment()
