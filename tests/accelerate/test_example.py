"""The example that the documentation points to."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "accelerate_hugging_face_detr.py"


def test_a_hugging_face_detr_is_accelerated_in_three_lines_with_a_report(monkeypatch, capsys):
    pytest.importorskip("transformers")
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE)])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    printed = capsys.readouterr().out
    assert "DetrForObjectDetection: 31 modules switched, 0 left alone" in printed
    assert "1 × transformers.DetrSinePositionEmbedding -> detr_fast.ops.sine_positions" in printed
    assert "1 × transformers.DetrForObjectDetection -> its loss on detr_fast.ops" in printed
    assert "4 × transformers.ResNetBottleNeckLayer -> detr_fast.ops.channel_affine (FrozenResidualBlock)" in printed
    assert "4 × transformers.DetrSelfAttention -> detr_fast.ops.attention" in printed
    assert "model.encoder.layers.1.self_attn: attention B 2 H 4 35×35 hd 16 float32 key_padding_mask" in printed
    assert "in all: " in printed
    assert "largest difference of a box coordinate" in printed
