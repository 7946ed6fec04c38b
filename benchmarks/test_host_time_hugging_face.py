"""What layers of Hugging Face's DETR and Table Transformer cost the host, without a GPU: accelerated beside transformers' own (see `test_host_time`).

python -m pytest benchmarks/test_host_time_hugging_face.py -s
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

import detr_fast
from benchmarks.test_host_time import ROWS, WIDTH, P, _report, stub_gpu  # noqa: F401 (a fixture)
from detr_fast import use_backend

transformers = pytest.importorskip("transformers")


def config() -> Any:
    sizes = {
        f"{kind}_{name}": n for kind in ("encoder", "decoder") for name, n in (("ffn_dim", 64), ("attention_heads", 2))
    }
    dropouts = dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), P)
    found = transformers.DetrConfig(
        d_model=WIDTH, use_timm_backbone=False, **sizes, **dropouts
    )  # Table Transformer's, too
    found._attn_implementation = "sdpa"
    return found


@pytest.mark.parametrize("way", ["one program", "its parts"])
@pytest.mark.parametrize(
    "name", [f"{model}{kind}Layer" for model in ("Detr", "TableTransformer") for kind in ("Encoder", "Decoder")]
)
def test_host_time_of_a_layer(name: str, way: str, stub_gpu: None, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    """A layer in training, with dropout, key padding and positions that want no gradients."""
    from transformers.masking_utils import bidirectional_mask_function

    from detr_fast.adapters import hugging_face, table_transformer

    models, table = transformers.models, name.startswith("Table")
    classes = models.table_transformer.modeling_table_transformer if table else models.detr.modeling_detr
    mask = table_transformer.mask if table else hugging_face.mask
    made = [getattr(classes, name)(config()).train() for _ in range(2)]
    detr_fast.accelerate(made[0])
    x, memory = (torch.randn(1, ROWS, WIDTH, requires_grad=True) for _ in range(2))
    position, queries, dy = torch.randn(3, 1, ROWS, WIDTH)
    visible = torch.tensor([[1] * (ROWS - 1) + [0]])
    padded = mask(1, ROWS, ROWS, mask_function=bidirectional_mask_function, attention_mask=visible)
    encodes = "Encoder" in name
    arguments = (x, padded, position) if encodes else (x, None, position, queries, memory, padded)

    def step(layer: torch.nn.Module) -> Any:
        leaves = [x, *([] if encodes else [memory]), *layer.parameters()]
        op = "encoder_layer" if encodes else "decoder_layer"

        def run() -> object:
            with use_backend(**{op: "eager"}) if way == "its parts" and layer is made[0] else nullcontext():
                y = layer(*arguments)
                return torch.autograd.grad(y[0] if table else y, leaves, dy)

        return run

    _report(f"{name}, {way}", step(made[0]), step(made[1]), capsys)
