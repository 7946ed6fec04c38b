"""Operations: one file each, with its contract, its eager reference and its implementations."""

from __future__ import annotations

from detr_fast import dispatch
from detr_fast.ops.attention import attention as attention
from detr_fast.ops.attention import attention_with_weights as attention_with_weights
from detr_fast.ops.attention import scaled_dot_product_attention as scaled_dot_product_attention
from detr_fast.ops.layer_norm import layer_norm as layer_norm
from detr_fast.ops.linear_assignment import linear_assignment as linear_assignment
from detr_fast.ops.matching_cost import matching_cost as matching_cost

dispatch.read_environment()
