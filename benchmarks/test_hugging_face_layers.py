"""Hugging Face's DETR layers as `accelerate` changes them, beside what they were, forward and backward.

python -m pytest benchmarks/test_hugging_face_layers.py          # needs a GPU and transformers
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import detr_fast
from benchmarks.hardware import DEVICE, NEEDS_GPU, sized
from benchmarks.timing import Claim, compare, compiled

pytestmark = NEEDS_GPU

IMAGES, QUERIES, TOKENS, WIDTH = sized((4, 100, 1050, 256), (2, 4, 6, 64))


@pytest.mark.parametrize("kind", ["Encoder", "Decoder"])
def test_layer(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    from detr_fast.adapters.hugging_face import mask

    try:
        from transformers.masking_utils import bidirectional_mask_function
    except ImportError:
        pytest.skip("this transformers makes masks otherwise")
    sizes = sized(
        {}, {f"{k}_{name}": n for k in ("encoder", "decoder") for name, n in (("ffn_dim", 64), ("attention_heads", 2))}
    )
    encodes = kind == "Encoder"
    length = TOKENS if encodes else QUERIES
    options: dict[str, Any] = {"device": DEVICE, "dtype": torch.bfloat16}
    x, memory = (torch.randn(IMAGES, n, WIDTH, **options, requires_grad=True) for n in (length, TOKENS))
    positions, queries = (torch.randn(IMAGES, n, WIDTH, **options) for n in (TOKENS, QUERIES))
    dy = torch.randn_like(x)
    ends = torch.linspace(TOKENS, TOKENS * 2 // 3, IMAGES, device=DEVICE)
    visible = (torch.arange(TOKENS, device=DEVICE) < ends[:, None]).long()
    padded = mask(IMAGES, length, TOKENS, mask_function=bidirectional_mask_function, attention_mask=visible)

    def made(dropout: float) -> nn.Module:
        dropouts = dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), dropout)
        backbone = transformers.ResNetConfig(out_features=["stage4"])  # else some versions look for one on the network
        config = transformers.DetrConfig(
            d_model=WIDTH, use_timm_backbone=False, backbone_config=backbone, **sizes, **dropouts
        )
        config._attn_implementation = "sdpa"
        torch.manual_seed(0)
        layer: nn.Module = getattr(transformers.models.detr.modeling_detr, f"Detr{kind}Layer")(config)
        return layer.to(**options).train()

    def step(layer: Any, double: bool = False) -> Callable[[], list[Tensor]]:
        given = [
            t.detach().double().requires_grad_(t.requires_grad) if double else t
            for t in (x, memory, positions, queries)
        ]
        a, b, at, asked = given
        arguments = (a, padded, at) if encodes else (a, None, at, asked, b, padded)
        leaves = [a, *([] if encodes else [b]), *layer.parameters()]

        def run() -> list[Tensor]:
            y = layer(*arguments)
            y = y if isinstance(y, Tensor) else y[0]
            return [y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))]

        return run

    def accelerated(layer: nn.Module) -> nn.Module:
        detr_fast.accelerate(layer)
        return layer

    original = made(0.0)
    changes: dict[str, Callable[[nn.Module], Any]] = {
        "auto": accelerated,
        "huggingface": lambda layer: layer,
        "torch.compile": compiled,
    }
    compare(
        f"Hugging Face's DETR {kind.lower()} layer ({IMAGES}, {length}{'' if encodes else f', {TOKENS}'}, padded) bf16",
        {name: step(change(made(0.1))) for name, change in changes.items()},
        eager=step(original),
        truth=step(copy.deepcopy(original).double(), double=True),
        checks={name: step(change(made(0.0))) for name, change in changes.items()},
        claims=[Claim("Hugging Face's DETR layers: over themselves, forward and backward", ("huggingface",), 1.0)],
    )
