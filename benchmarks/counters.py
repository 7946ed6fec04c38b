"""Launches, bytes and host synchronisations of torch.nn and of detr-fast, at DETR's sizes, counted without a GPU.

    python benchmarks/counters.py      # about 20 s; updates counters.json where a number is better, and docs/counters.md

A number worse than in counters.json is an error. Two 800×1066 images give 2 × 850 tokens of 256 channels at stride 32.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from detr_fast import nn, ops, use_backend
from detr_fast.testing import Counts, count
from detr_fast.testing.ratchet import Ratchet

HERE = Path(__file__).resolve().parent
COMMAND = "python benchmarks/counters.py"
RATCHET = Ratchet(HERE / "counters.json", COMMAND)
EAGER = HERE / "counters_torch_nn.json"
TABLE = HERE.parent / "docs" / "counters.md"
VERSION = ".".join(torch.__version__.split(".")[:2])

B, L, Q, C = 2, 850, 100, 256
BF16 = torch.bfloat16


def on_meta(*shape: int, dtype: torch.dtype = BF16, grad: bool = True) -> Any:
    return torch.empty(*shape, device="meta", dtype=dtype, requires_grad=grad)


def padding(length: int = L) -> torch.Tensor:
    return torch.empty(B, length, device="meta", dtype=torch.bool)


def step(module: torch.nn.Module, *inputs: Any, **keywords: Any) -> Counts:
    """Forward and backward; inputs and parameters do not count as kept for backward."""

    class Step(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, *inputs: Any, **keywords: Any) -> None:
            out = self.module(*inputs, **keywords)
            out = out[0] if isinstance(out, tuple) else out
            torch.autograd.backward(out, torch.empty_like(out))

    return count(Step(), *inputs, **keywords)


def layer_norm(library: Any) -> Counts:
    return step(library.LayerNorm(C, device="meta", dtype=BF16), on_meta(B, L, C))


def attention(library: Any) -> Counts:
    module = library.MultiheadAttention(C, 8, dropout=0.1, batch_first=True, device="meta", dtype=BF16)
    x = on_meta(B, L, C)
    return step(module, x, x, x, key_padding_mask=padding(), need_weights=False)


def attention_atomics(library: Any) -> Counts:
    with use_backend(**({"attention": "triton_atomics"} if library is nn else {})):
        return attention(library)


def encoder_layer(library: Any, **options: Any) -> Counts:
    layer = library.TransformerEncoderLayer(C, 8, 2048, 0.1, batch_first=True, device="meta", dtype=BF16, **options)
    return step(layer, on_meta(B, L, C), src_key_padding_mask=padding())


def decoder_layer(library: Any, **options: Any) -> Counts:
    layer = library.TransformerDecoderLayer(C, 8, 2048, 0.1, batch_first=True, device="meta", dtype=BF16, **options)
    return step(layer, on_meta(B, Q, C), on_meta(B, L, C), memory_key_padding_mask=padding())


def transformer(library: Any, **options: Any) -> Counts:
    model = library.Transformer(C, 8, 6, 6, 2048, 0.1, batch_first=True, device="meta", dtype=BF16, **options)
    masks = {"src_key_padding_mask": padding(), "memory_key_padding_mask": padding()}
    return step(model, on_meta(B, L, C), on_meta(B, Q, C), **masks)


def detr(library: Any) -> Counts:
    """DETR-R50's forward and backward in bf16, losses left out."""
    from detr_fast.models import detr_resnet50

    model = _device_free(detr_resnet50).to(BF16)

    class Outputs(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, images: Any) -> torch.Tensor:
            out = self.model(images)
            every = [out, *out["aux_outputs"]]
            return torch.cat([torch.cat([one["pred_logits"], one["pred_boxes"]], -1) for one in every])

    images = on_meta(B, 3, 800, 1066, grad=False)
    return step(Outputs(), (images, torch.empty(B, 800, 1066, device="meta", dtype=torch.bool)))


def detr_losses(library: Any) -> Counts:
    """Matching and losses of six decoder layers on a GPU."""
    with FakeTensorMode():
        return count(_losses("cuda"))


def detr_losses_step(library: Any) -> Counts:
    """The same with its backward, for which fake tensors want a driver."""
    losses = _losses("meta", grad=True)
    return count(lambda: losses().backward())


def linear_cross_entropy(library: Any) -> Counts:
    """A language model's head: 4,096 tokens of 512 channels, 32,000 words."""

    class Head(torch.nn.Module):
        def forward(self, x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            return ops.linear_cross_entropy(x, weight, None, target)

    return step(Head(), on_meta(4096, 512), on_meta(32000, 512), torch.empty(4096, device="meta", dtype=torch.int64))


def prediction_heads(library: Any) -> Counts:
    """DETR's heads in fp32: boxes and classes of six decoder layers' queries."""

    shapes = (6, B, Q, C), (C, C), (C, C), (4, C), (C,), (C,), (4,), (92, C), (92,)
    x, *layers = (on_meta(*shape, dtype=torch.float32) for shape in shapes)

    def heads() -> None:
        found = ops.prediction_heads(x, layers[:3], layers[3:6], *layers[6:], sigmoid=True)
        results = [t for t in found if t is not None]
        torch.autograd.backward(results, [torch.empty_like(t) for t in results])

    return count(heads)


def swiglu(library: Any, joined: bool = False) -> Counts:
    """The block of a language model of 7 billion parameters, 4,096 tokens; joined: gate and up are one projection."""

    class Block(torch.nn.Module):
        def __init__(self, width: int, hidden: int) -> None:
            super().__init__()
            options = {"bias": False, "device": "meta", "dtype": BF16}
            sizes = (2 * hidden,) if joined else (hidden, hidden)
            self.projections = torch.nn.ModuleList(library.Linear(width, size, **options) for size in sizes)
            self.down = library.Linear(hidden, width, **options)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(ops.gated_activation(*(projection(x) for projection in self.projections)))

    return step(Block(4096, 11_008), on_meta(4096, 4096))


def rotary_embedding(library: Any) -> Counts:
    """Queries and keys of 12 heads of 64, 8 sequences of 512 tokens."""
    q, k = (on_meta(8, 512, 12, 64) for _ in range(2))
    cos, sin = (on_meta(512, 64, grad=False) for _ in range(2))

    def turn() -> None:
        results = [t for t in ops.rotary_embedding(q, k, cos, sin) if t is not None]
        torch.autograd.backward(results, [torch.empty_like(t) for t in results])

    return count(turn)


def _losses(device: str, grad: bool = False) -> Callable[[], torch.Tensor]:
    from detr_fast.models.build import ModelConfig, build_criterion
    from detr_fast.models.structures import Targets

    criterion = build_criterion(ModelConfig(num_classes=91))
    with torch.device(device):
        layers = [
            {
                "pred_logits": torch.empty(B, Q, 92, requires_grad=grad),
                "pred_boxes": torch.empty(B, Q, 4, requires_grad=grad),
            }
            for _ in range(6)
        ]
        targets = Targets(
            torch.empty(B, 20, 4), torch.empty(B, 20, dtype=torch.int64), torch.empty(B, dtype=torch.int64)
        )
    outputs = {**layers[-1], "aux_outputs": layers[:-1]}
    return lambda: criterion.weighted_sum(criterion(outputs, targets))


def _device_free(build: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    with torch.device("meta"):
        return build()


CASES: dict[str, Callable[[Any], Counts]] = {
    "LayerNorm": layer_norm,
    "MultiheadAttention, key padding": attention,
    "MultiheadAttention, dq added up by atomics": attention_atomics,
    "TransformerEncoderLayer": encoder_layer,
    "TransformerEncoderLayer, pre-norm": partial(encoder_layer, norm_first=True),
    "TransformerDecoderLayer": decoder_layer,
    "TransformerDecoderLayer, pre-norm": partial(decoder_layer, norm_first=True),
    "Transformer, 6 + 6 layers": transformer,
    "Transformer, 6 + 6 layers, pre-norm": partial(transformer, norm_first=True),
    "DETR-R50, forward and backward": detr,
    "DETR losses, forward": detr_losses,
    "DETR losses, forward and backward": detr_losses_step,
    "Linear and cross-entropy, 4,096 × 32,000": linear_cross_entropy,
    "DETR's heads, fp32": prediction_heads,
    "SwiGLU, 4,096 tokens of 4,096 × 11,008": swiglu,
    "SwiGLU, gate and up in one projection": partial(swiglu, joined=True),
    "Rotary embedding, 2 × (8, 512, 12, 64)": rotary_embedding,
}


def numbers(counts: Counts) -> dict[str, int]:
    return {
        "launches": counts.total_launches,
        "bytes moved": counts.bytes_moved,
        "bytes kept for backward": counts.saved_bytes,
        "host synchronisations": counts.total_synchronisations,
    }


def measure(library: Any) -> dict[str, dict[str, int]]:
    """All cases with `library`'s modules: detr_fast.nn with every op on its kernels, or torch.nn.

    For torch.nn, DETR's own modules run PyTorch's operations, and the host matches.
    """
    eager = dict.fromkeys(("matching_cost", "detection_losses", "linear_cross_entropy", "rotary_embedding"), "eager")
    eager |= {"gated_activation": "eager", "prediction_heads": "eager", "linear_assignment": "threads"}
    with use_backend("triton") if library is nn else use_backend(**eager):
        return {name: numbers(case(library)) for name, case in CASES.items()}


def table(ours: dict[str, dict[str, int]], theirs: dict[str, dict[str, int]]) -> str:
    """docs/counters.md: torch.nn beside detr-fast."""
    lines = [
        "# What a step costs, in numbers that hold anywhere",
        "",
        f"Forward and backward (the losses: forward) in bf16 with dropout 0.1, {B} images of 800×1066: {L} tokens each, "
        f"{Q} queries, {C} channels,",
        f"8 heads; attention takes padding masks. Counted without a GPU on torch {VERSION} by `{COMMAND}`, which writes this page:",
        "nothing here is a timing. *Launches*: kernels and PyTorch operations, views left out. *MB moved*: all operands and",
        "results of each. *MB kept*: saved for backward besides parameters and inputs. *Syncs*: waits of the host for the GPU.",
        "torch.nn (its losses: assignment on the host) → detr-fast with every op on its kernels.",
        "",
        "| | launches | MB moved | MB kept | syncs |",
        "|---|---|---|---|---|",
    ]
    for case, mine in ours.items():
        pairs = [(theirs[case][measure], mine[measure]) for measure in mine]
        cells = [
            f"{_readable(before, measure)} → {_readable(after, measure)}"
            for measure, (before, after) in zip(mine, pairs)
        ]
        lines.append(f"| {case} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _readable(value: int, measure: str) -> str:
    return f"{value / 1e6:,.1f}" if measure.startswith("bytes") else f"{value:,}"


def main() -> int:
    ours = measure(nn)
    try:
        changed = RATCHET.check(ours)
    except AssertionError as error:
        print(error)
        return 1
    theirs = measure(torch.nn)
    EAGER.write_text(json.dumps({"torch": VERSION, "cases": theirs}, indent=1) + "\n")
    TABLE.write_text(table(ours, theirs))
    print(f"{'updated' if changed else 'nothing better than in'} {RATCHET.path.name}; wrote {TABLE.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
