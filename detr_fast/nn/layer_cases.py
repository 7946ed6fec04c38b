"""What `tune` measures of whole layers: all parts on kernels, by one program of the host's, beside a choice for each part.

In training, with dropout and padding, at DETR's sizes (see `ops.tuning_cases`).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from detr_fast.nn.transformer import TransformerDecoderLayer, TransformerEncoderLayer
from detr_fast.ops import tuning_cases
from detr_fast.ops.tuning_cases import DROPOUT, QUERIES, TOKENS, Case, Group, Step, call_step, draw, step_of

# Of two results in bf16: each is up to 0.04 from an fp64 layer's, where a ReLU or a norm turns a rounding into more.
TOLERANCE = 0.1


def encoder_layer_step(
    device: torch.device, images: int, tokens: int, dropout_p: float = 0.0, gradients: bool = True
) -> Step:
    layer = _made(TransformerEncoderLayer, device, dropout_p)
    x, padding = draw(device, images, tokens, tuning_cases.WIDTH), _padding(device, images, tokens)
    return step_of(lambda x, *_: layer(x, src_key_padding_mask=padding), (x, *layer.parameters()), gradients)


def decoder_layer_step(
    device: torch.device, images: int, tokens: int, dropout_p: float = 0.0, gradients: bool = True
) -> Step:
    layer = _made(TransformerDecoderLayer, device, dropout_p)
    x, memory = (draw(device, images, n, tuning_cases.WIDTH) for n in (QUERIES, tokens))
    padding = _padding(device, images, tokens)
    return step_of(
        lambda x, memory, *_: layer(x, memory, memory_key_padding_mask=padding),
        (x, memory, *layer.parameters()),
        gradients,
    )


def _made(kind: type[torch.nn.Module], device: torch.device, dropout_p: float) -> torch.nn.Module:
    sizes = tuning_cases.WIDTH, tuning_cases.HEADS, tuning_cases.HIDDEN
    return kind(*sizes, dropout=dropout_p, batch_first=True, device=device, dtype=torch.bfloat16)


def _padding(device: torch.device, images: int, tokens: int) -> torch.Tensor:
    return torch.arange(tokens, device=device).expand(images, -1) >= tokens * 3 // 4


def _groups() -> Iterator[Group]:
    for op, make, lengths in (
        ("encoder_layer", encoder_layer_step, None),
        ("decoder_layer", decoder_layer_step, QUERIES),
    ):
        cases = []
        for images, tokens in ((1, TOKENS), (2, TOKENS), (4, TOKENS), (16, TOKENS)):
            size = images * (lengths or tokens) * tuning_cases.WIDTH * 2
            timed = partial(call_step, make, (images, tokens, DROPOUT))
            cases.append(Case(f"({images}, {tokens})", size, timed, checked=partial(call_step, make, (images, tokens))))
        yield Group(op, tuple(cases), tolerance=TOLERANCE)


GROUPS = tuple(_groups())
