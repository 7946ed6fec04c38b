"""What `tune` measures of the ops whose kernels compete with cuBLAS, with PyTorch's attention and with its row-wise ops.

Sizes are DETR's: 256 channels, 8 heads, 2,048 hidden channels, images of 850 tokens; forward and backward in bf16 (but for
the losses), without dropout, so that results can be compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from detr_fast.ops.add_layer_norm import add_layer_norm
from detr_fast.ops.attention import attention
from detr_fast.ops.detection_losses import detection_losses
from detr_fast.ops.feed_forward import feed_forward_add_layer_norm
from detr_fast.ops.linear_add_layer_norm import linear_add_layer_norm
from detr_fast.ops.linear_cross_entropy import linear_cross_entropy
from detr_fast.ops.products import MEASURED_HIDDEN, MEASURED_WIDTH
from detr_fast.ops.qkv_projection import qkv_projection

Step = Callable[[], tuple[Tensor, ...]]
WIDTH, HIDDEN, TOKENS, QUERIES, HEADS = MEASURED_WIDTH, MEASURED_HIDDEN, 850, 100, 8
ROWS = (TOKENS, 4 * TOKENS, 16 * TOKENS, 64 * TOKENS)


@dataclass(frozen=True)
class Group:
    """Cases of one `Regime`.

    Attributes:
        regime: the name that the op's `advice` looks up.
        op, other, ours: the op, and the implementation beside which the kernel is measured, by that name.
        cases: a text, the size as `advice` counts it, and what makes the step on a device.
    """

    regime: str
    op: str
    other: str
    cases: tuple[tuple[str, int, Callable[[torch.device], Step]], ...]
    ours: str = "triton"


def _draw(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(shape, device=device).to(torch.bfloat16).requires_grad_()


def _weight(device: torch.device, rows: int, columns: int) -> Tensor:
    return (columns**-0.5 * torch.randn(rows, columns, device=device)).to(torch.bfloat16).requires_grad_()


def _step(function: Callable[..., Tensor], *leaves: Tensor) -> Step:
    """The result and the gradients of all leaves."""
    dy = torch.randn_like(function(*leaves))

    def step() -> tuple[Tensor, ...]:
        y = function(*leaves)
        return (y, *torch.autograd.grad(y, leaves, dy))

    return step


def add_layer_norm_step(device: torch.device, rows: int) -> Step:
    x, residual = (_draw(device, rows, WIDTH) for _ in range(2))
    return _step(add_layer_norm, x, residual, *_norm(device))


def attention_step(device: torch.device, batch: int, queries: int, tokens: int, padded: bool) -> Step:
    padding = torch.arange(tokens, device=device).expand(batch, -1) >= tokens * 3 // 4 if padded else None
    q, k, v = (_draw(device, batch, length, HEADS, WIDTH // HEADS) for length in (queries, tokens, tokens))
    return _step(lambda q, k, v: attention(q, k, v, key_padding_mask=padding), q, k, v)


def feed_forward_step(device: torch.device, rows: int, hidden: int = HIDDEN) -> Step:
    weights = (
        _weight(device, hidden, WIDTH),
        _draw(device, hidden),
        _weight(device, WIDTH, hidden),
        _draw(device, WIDTH),
    )
    return _step(feed_forward_add_layer_norm, _draw(device, rows, WIDTH), *weights, *_norm(device))


def linear_add_layer_norm_step(device: torch.device, rows: int) -> Step:
    x, residual = (_draw(device, rows, WIDTH) for _ in range(2))
    weights = (_weight(device, WIDTH, WIDTH), _draw(device, WIDTH))
    return _step(linear_add_layer_norm, x, *weights, residual, *_norm(device))


def qkv_projection_step(device: torch.device, rows: int) -> Step:
    x, position = (_draw(device, rows, WIDTH) for _ in range(2))
    return _step(qkv_projection, x, _weight(device, 3 * WIDTH, WIDTH), _draw(device, 3 * WIDTH), position)


def linear_cross_entropy_step(device: torch.device, rows: int, classes: int) -> Step:
    target = torch.randint(classes, (rows,), device=device)
    leaves = (_draw(device, rows, WIDTH), _weight(device, classes, WIDTH), _draw(device, classes))
    return _step(lambda x, weight, bias: linear_cross_entropy(x, weight, bias, target), *leaves)


def detection_losses_step(device: torch.device, images: int) -> Step:
    """Six decoder layers, 100 queries, 92 classes, 20 boxes an image; fp32, as the losses see them."""
    logits = torch.randn(6, images, 100, 92, device=device).requires_grad_()
    boxes = (torch.rand(6, images, 100, 4, device=device) * 0.5 + 0.2).requires_grad_()
    query = torch.rand(6, images, 100, device=device).argsort(-1)[..., :20]
    labels, true_boxes = torch.randint(91, (images, 20), device=device), torch.rand(images, 20, 4, device=device) + 0.1
    counts, broken = (
        labels.new_full((images,), 20),
        torch.zeros_like(query[..., :1].expand(-1, -1, 100), dtype=torch.bool),
    )
    rest = (query, labels, true_boxes, counts, broken, counts)
    return _step(lambda logits, boxes: detection_losses(logits, boxes, *rest)[0], logits, boxes)


def _norm(device: torch.device) -> tuple[Tensor, Tensor]:
    return _draw(device, WIDTH), _draw(device, WIDTH)


def _by_rows(op: str, make: Callable[[torch.device, int], Step]) -> Group:
    cases = ((f"({rows}, {WIDTH})", rows * WIDTH * 2, partial(_call, make, rows)) for rows in ROWS)
    return Group(op, op, "eager", tuple(cases))


def _call(make: Callable[..., Step], size: object, device: torch.device) -> Step:
    return make(device, *size) if isinstance(size, tuple) else make(device, size)


def _attention(regime: str, padded: bool, queries: int = TOKENS, other: str = "sdpa", ours: str = "triton") -> Group:
    cases = (
        (
            f"({batch}, {queries}, {TOKENS})",
            batch * (queries + 2 * TOKENS) * WIDTH * 2,
            partial(_call, attention_step, (batch, queries, TOKENS, padded)),
        )
        for batch in (1, 4, 16, 64)
    )
    return Group(regime, "attention", other, tuple(cases), ours)


GROUPS = (
    Group(
        "detection_losses",
        "detection_losses",
        "eager",
        tuple(
            (f"6 × {images} × (100, 92)", 6 * images * 100 * 92 * 4, partial(_call, detection_losses_step, images))
            for images in (1, 4, 16)
        ),
    ),
    _by_rows("add_layer_norm", add_layer_norm_step),
    _attention("attention_masked", padded=True),
    _attention("attention", padded=False),
    _attention("attention_atomics", True, other="triton", ours="triton_atomics"),
    _attention("attention_atomics_few_queries", True, QUERIES, other="triton", ours="triton_atomics"),
    _by_rows("feed_forward", feed_forward_step),
    _by_rows("linear_add_layer_norm", linear_add_layer_norm_step),
    _by_rows("qkv_projection", qkv_projection_step),
    Group(
        "linear_cross_entropy",
        "linear_cross_entropy",
        "eager",
        tuple(
            (f"({rows}, {classes})", rows * classes * 2, partial(_call, linear_cross_entropy_step, (rows, classes)))
            for rows, classes in ((1024, 4096), (2048, 8192), (4096, 16384), (4096, 32768))
        ),
    ),
)
