"""Programs beyond the catalog's that spilled registers once: of rows that are read one element at a time, or fill no block."""

from __future__ import annotations

import pytest
import torch
from detr_fast.kernels import (
    add_layer_norm,
    cross_entropy,
    deformable_attention,
    layer_norm,
    linear,
    linear_norm,
    rows,
    wide_rows,
)
from detr_fast.kernels.add_layer_norm_backward import BackwardForm, backward_variant
from detr_fast.kernels.analysis import analyse
from detr_fast.kernels.offline import compile_variant, older_compiler
from detr_fast.kernels.product_tiles import Form

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
GELU = Form(BF16, "gelu", True, 1, "ieee")
# Behind them: the bytes a thread that spilled.
VARIANTS = {
    "gelu": ("sm_90", linear.forward_variant(GELU, BF16, True, True, False)),  # 8
    "gelu_backward": ("sm_80", linear.backward_variant(GELU, True, False)),  # 88
    "linear_norm": (
        "sm_90",
        linear_norm.forward_variant(Form(FP16, "none", False, 1, "ieee"), 200, False, (*(FP16,) * 7, None), True),
    ),  # 64
    "add_layer_norm": (
        "sm_90",
        add_layer_norm.forward_variant(2048, BF16, FP32, FP32, None, FP32, True, True, 1),
    ),  # 8
    "add_layer_norm_backward": (
        "sm_80",
        backward_variant(8192, BackwardForm((FP32, None, BF16, FP32, FP32, BF16, FP32), False, True, True), 1),
    ),  # 72
    "add_layer_norm_backward_of_a_float32_x": (
        "sm_80",
        backward_variant(6000, BackwardForm((FP32, None, FP32, BF16, None, FP32, None), False, True, True), 8),
    ),  # 56
    "residual_norm_backward_of_40": (
        "sm_100",
        backward_variant(40, BackwardForm((FP16, FP16, FP16, None, FP16, FP16, FP16), True, True, True, True), 1),
    ),  # 8
    "wide_rows_backward": (
        "sm_80",
        wide_rows.backward_variant((FP32, None, FP32, FP16, None, FP32, None), False, 8),
    ),  # 8
    "wide_rows_backward_of_rms_norm": (
        "sm_90",
        wide_rows.backward_variant((FP32, None, FP32, BF16, None, FP32, None), False, 8, False),
    ),  # 16
    "residual_norm_backward": (
        "sm_90",
        backward_variant(20, BackwardForm((BF16, BF16, BF16, None, BF16, BF16, BF16), True, True, True, True), 1),
    ),  # 8
    "add_layer_norm_backward_of_8192": (
        "sm_90",
        backward_variant(8192, BackwardForm((BF16, None, BF16, BF16, BF16, BF16, BF16), True, True, True), 8),
    ),  # 24
    "add_layer_norm_backward_without_runs": (
        "sm_80",
        backward_variant(8191, BackwardForm((BF16, None, BF16, BF16, BF16, BF16, BF16), True, True, True), 1),
    ),  # 88
    "add_layer_norm_backward_of_a_sum_without_runs": (
        "sm_90",
        backward_variant(6001, BackwardForm((FP32, BF16, BF16, None, FP32, BF16, BF16), True, True, True), 1),
    ),  # 120
    "add_layer_norm_backward_without_runs_or_residual": (
        "sm_90",
        backward_variant(6001, BackwardForm((FP16, None, FP16, FP16, FP16, FP16, None), True, True, True), 1),
    ),  # 16
    "add_layer_norm_backward_of_a_sum_without_residual": (
        "sm_90",
        backward_variant(6001, BackwardForm((FP16, FP16, FP16, None, FP16, FP16, None), True, True, True), 1),
    ),  # 56
    "add_layer_norm_of_24": (
        "sm_80",
        add_layer_norm.forward_variant(24, BF16, BF16, None, FP32, BF16, True, True, 8),
    ),  # 24
    "layer_norm_backward_autocast": (
        "sm_80",
        layer_norm.backward_variant(2048, FP32, FP16, FP16, True, False, True, 8),
    ),  # 8
    "add_layer_norm_backward_of_a_float32_residual": (
        "sm_80",
        backward_variant(6000, BackwardForm((FP32, None, BF16, FP32, FP32, BF16, FP32), True, True, True), 8),
    ),  # 32
    "cross_entropy": ("sm_90", cross_entropy.cross_entropy_variant(4000, BF16, True, False, True)),  # 8
    "wide_rows_parameters": (
        "sm_90",
        wide_rows.parameters_variant((FP32, BF16, FP32), False, True, True, 8),
    ),  # 8
    "wide_rows_parameters_of_rms_norm": (
        "sm_80",
        wide_rows.parameters_variant((FP32, FP16, FP32), True, True, False, 8, False),
    ),  # 8
    "cross_entropy_one_by_one": ("sm_90", cross_entropy.cross_entropy_variant(50257, FP16, True, False, True)),  # 8
    "layer_norm_one_by_one": ("sm_90", layer_norm.forward_variant(768, FP16, FP16, FP16, FP16, 1)),  # 16
    "partial_sums": ("sm_90", rows.sum_partials_variant(256, BF16, BF16)),  # 8
    "add_rms_norm_of_20_autocast": (
        "sm_90",
        add_layer_norm.forward_variant(20, FP16, FP16, FP32, None, FP32, False, False, 1, False),
    ),  # 80
    "add_rms_norm_of_20_of_a_float32_residual": (
        "sm_80",
        add_layer_norm.forward_variant(20, FP16, FP32, FP32, None, FP32, False, False, 1, False),
    ),  # 24
    "add_rms_norm_of_20_with_its_sum": (
        "sm_90",
        add_layer_norm.forward_variant(20, BF16, BF16, FP32, None, FP32, True, False, 1, False),
    ),  # 8
    "add_rms_norm_of_20_with_dropout": (
        "sm_90",
        add_layer_norm.forward_variant(20, BF16, BF16, FP32, None, FP32, False, True, 1, False),
    ),  # 16
    "deformable_attention_one_by_one": (
        "sm_90",
        deformable_attention.forward_variant(
            4, 8, (BF16, BF16, FP32, BF16), 1, False, deformable_attention.Form(4, FP32)
        ),
    ),  # 8
    "layer_norm_backward": ("sm_80", layer_norm.backward_variant(4104, BF16, BF16, BF16, True, True, True, 1)),  # 16
}


@pytest.mark.offline
@pytest.mark.parametrize("name", VARIANTS)
def test_nothing_spills_in_16_bits_that_once_did(name):
    target, variant = VARIANTS[name]
    _, _, resources = compile_variant(variant, target)
    assert older_compiler() or resources.spills == 0


@pytest.mark.offline
def test_a_row_read_one_element_at_a_time_takes_one_address_a_tensor():
    variant = layer_norm.backward_variant(8191, BF16, BF16, BF16, True, True, True, 1)
    binary, _, _ = compile_variant(variant, "sm_90")
    loop = analyse(binary, 90, 8192 / variant.num_warps)
    assert (
        older_compiler() or loop.instructions_per_element < 29
    )  # 31 where half of the elements have an address of their own
