"""What `tune` measures: each op's kernel beside what `auto` would take in its place, at DETR's sizes.

256 channels, 8 heads, 2,048 hidden channels, images of 850 tokens, 100 queries; bf16 but for the matcher and the losses.
Blocks whose parts would run one by one are measured beside those parts, with the kernels that `auto` takes for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from detr_fast.dispatch import TritonImplementation
from detr_fast.ops import cast_cases, optimizer_cases, pointwise_cases
from detr_fast.ops.add_layer_norm import add_layer_norm
from detr_fast.ops.add_rms_norm import add_rms_norm
from detr_fast.ops.attention import attention
from detr_fast.ops.attention_varlen import attention_varlen
from detr_fast.ops.deformable_attention import deformable_attention, deformable_attention_from_offsets
from detr_fast.ops.detection_losses import detection_losses
from detr_fast.ops.feed_forward import FEED_FORWARD
from detr_fast.ops.gated_activation import gated_activation
from detr_fast.ops.layer_norm import layer_norm
from detr_fast.ops.linear_add_layer_norm import LINEAR_ADD_LAYER_NORM
from detr_fast.ops.linear_cross_entropy import linear_cross_entropy
from detr_fast.ops.matching_cost import matching_cost
from detr_fast.ops.prediction_heads import prediction_heads
from detr_fast.ops.products import MEASURED_HIDDEN, MEASURED_WIDTH
from detr_fast.ops.qkv_projection import QKV_PROJECTION
from detr_fast.ops.rms_norm import rms_norm
from detr_fast.ops.rotary_embedding import rotary_embedding
from detr_fast.ops.tuning_groups import Case, Group, Step, call_step, draw, draw_weight, step_of

WIDTH, HIDDEN, TOKENS, QUERIES, HEADS = MEASURED_WIDTH, MEASURED_HIDDEN, 850, 100, 8
ROWS = (QUERIES, 4 * QUERIES, TOKENS, 4 * TOKENS, 16 * TOKENS, 64 * TOKENS)
MANY = 256 * TOKENS  # where memory's speed outweighs the host's even of one small kernel
DROPOUT = 0.1


def layer_norm_step(device: torch.device, rows: int, gradients: bool = True) -> Step:
    leaves = (draw(device, rows, WIDTH), *_norm(device))
    return step_of(lambda x, weight, bias: layer_norm(x, (WIDTH,), weight, bias), leaves, gradients)


def add_layer_norm_step(device: torch.device, rows: int, gradients: bool = True) -> Step:
    x, residual = (draw(device, rows, WIDTH) for _ in range(2))
    return step_of(add_layer_norm, (x, residual, *_norm(device)), gradients)


def rms_norm_step(device: torch.device, rows: int, gradients: bool = True) -> Step:
    leaves = (draw(device, rows, WIDTH), draw(device, WIDTH))
    return step_of(lambda x, weight: rms_norm(x, (WIDTH,), weight), leaves, gradients)


def gated_activation_step(device: torch.device, rows: int, gradients: bool = True) -> Step:
    gate, up = (draw(device, rows, HIDDEN) for _ in range(2))
    return step_of(gated_activation, (gate, up), gradients)


def add_rms_norm_step(device: torch.device, rows: int, gradients: bool = True) -> Step:
    x, residual = (draw(device, rows, WIDTH) for _ in range(2))
    return step_of(add_rms_norm, (x, residual, draw(device, WIDTH)), gradients)


def attention_step(
    device: torch.device,
    batch: int,
    queries: int,
    tokens: int,
    heads: int,
    padded: bool,
    dropout_p: float = 0.0,
    gradients: bool = True,
) -> Step:
    padding = torch.arange(tokens, device=device).expand(batch, -1) >= tokens * 3 // 4 if padded else None
    leaves = [draw(device, batch, length, heads, WIDTH // heads) for length in (queries, tokens, tokens)]
    return step_of(lambda q, k, v: attention(q, k, v, key_padding_mask=padding, dropout_p=dropout_p), leaves, gradients)


def feed_forward_step(device: torch.device, rows: int, gradients: bool = True) -> Step:
    weights = (
        draw_weight(device, HIDDEN, WIDTH),
        draw(device, HIDDEN),
        draw_weight(device, WIDTH, HIDDEN),
        draw(device, WIDTH),
    )

    def block(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        arguments = (x, w1, b1, w2, b2, weight, bias, 1e-5, "relu", 0.0, 0.0, None, False)
        if (kernel := FEED_FORWARD.kernel(*arguments)) is not None:
            return kernel.run(*arguments)
        return add_layer_norm(F.linear(F.linear(x, w1, b1).relu(), w2, b2), x, weight, bias)

    return step_of(block, (draw(device, rows, WIDTH), *weights, *_norm(device)), gradients)


def linear_add_layer_norm_step(device: torch.device, rows: int, gradients: bool = True) -> Step:
    def block(x: Tensor, w: Tensor, b: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        arguments = (x, w, b, residual, weight, bias, 1e-5, 0.0, False)
        if (kernel := LINEAR_ADD_LAYER_NORM.kernel(*arguments)) is not None:
            return kernel.run(*arguments)
        return add_layer_norm(F.linear(x, w, b), residual, weight, bias)

    x, residual = (draw(device, rows, WIDTH) for _ in range(2))
    leaves = (x, draw_weight(device, WIDTH, WIDTH), draw(device, WIDTH), residual, *_norm(device))
    return step_of(block, leaves, gradients)


def qkv_projection_step(device: torch.device, rows: int, gradients: bool = True) -> Step:
    """Beside two products, of which attention would read queries and keys, and values: nothing joins them."""
    x, position = (draw(device, rows, WIDTH) for _ in range(2))
    weight, bias = draw_weight(device, 3 * WIDTH, WIDTH), draw(device, 3 * WIDTH)
    parts = [2 * WIDTH, WIDTH]
    dy = torch.randn(rows, 3 * WIDTH, device=device).to(torch.bfloat16)
    halves = [half.contiguous() for half in dy.split(parts, -1)]

    def step() -> tuple[Tensor, ...]:
        arguments = (x, weight, bias, position, parts[0])
        kernel = QKV_PROJECTION.choose(*arguments)
        fused = isinstance(kernel, TritonImplementation)
        if fused:
            results = [kernel.run(*arguments)]
        else:
            results = [F.linear(*of) for of in zip((x + position, x), weight.split(parts), bias.split(parts))]
        found = results[0].split(parts, -1) if fused else results
        if not gradients:
            return tuple(found)
        return (*found, *torch.autograd.grad(results, (x, weight, bias, position), [dy] if fused else halves))

    return step if gradients else torch.no_grad()(step)


def linear_cross_entropy_step(device: torch.device, rows: int, classes: int, gradients: bool = True) -> Step:
    target = torch.randint(classes, (rows,), device=device)
    leaves = (draw(device, rows, WIDTH), draw_weight(device, classes, WIDTH), draw(device, classes))
    return step_of(lambda x, weight, bias: linear_cross_entropy(x, weight, bias, target), leaves, gradients)


def matching_cost_step(device: torch.device, images: int, targets: int, queries: int, gradients: bool = False) -> Step:
    """Six decoder layers, 92 classes; there is no gradient."""
    logits, boxes = torch.randn(6, images, queries, 92, device=device), torch.rand(6, images, queries, 4, device=device)
    labels = torch.randint(91, (images, targets), device=device)
    true_boxes, counts = torch.rand(images, targets, 4, device=device), labels.new_full((images,), targets)
    return lambda: matching_cost(logits, boxes, labels, true_boxes, counts)


def detection_losses_step(device: torch.device, images: int, gradients: bool = True) -> Step:
    """Six decoder layers, 100 queries, 92 classes, 20 boxes an image; fp32, as the losses see them."""
    logits = torch.randn(6, images, QUERIES, 92, device=device).requires_grad_()
    boxes = (torch.rand(6, images, QUERIES, 4, device=device) * 0.5 + 0.2).requires_grad_()
    query = torch.rand(6, images, QUERIES, device=device).argsort(-1)[..., :20]
    labels, true_boxes = torch.randint(91, (images, 20), device=device), torch.rand(images, 20, 4, device=device) + 0.1
    counts, broken = (
        labels.new_full((images,), 20),
        torch.zeros_like(query[..., :1].expand(-1, -1, QUERIES), dtype=torch.bool),
    )
    rest = (query, labels, true_boxes, counts, broken, counts)
    return step_of(lambda logits, boxes: detection_losses(logits, boxes, *rest)[0], (logits, boxes), gradients)


def prediction_heads_step(device: torch.device, rows: int, gradients: bool = True) -> Step:
    """Boxes and 92 classes; fp32."""

    def heads(x: Tensor, *layers: Tensor) -> tuple[Tensor, ...]:
        boxes, classes = prediction_heads(x, layers[:3], layers[3:6], *layers[6:], sigmoid=True)
        assert classes is not None
        return boxes, classes

    shapes = (WIDTH, WIDTH), (WIDTH, WIDTH), (4, WIDTH), (WIDTH,), (WIDTH,), (4,), (92, WIDTH), (92,)
    drawn = (WIDTH**-0.5 * torch.randn(shape, device=device) for shape in shapes)
    x = torch.randn(rows, WIDTH, device=device)
    return step_of(heads, [t.requires_grad_() for t in (x, *drawn)], gradients)


def _prediction_heads() -> Iterator[Group]:
    cases = tuple(
        Case(f"({rows}, {WIDTH})", rows * WIDTH * 4, partial(call_step, prediction_heads_step, (rows,)))
        for rows in (6 * images * QUERIES for images in (1, 4, 16))  # of six decoder layers
    )
    group = Group("prediction_heads", cases, tolerance=1e-5)
    return iter((group, replace(group, gradients=False)))


# An image of 800 x 1066 at strides of 8 to 64, as Deformable DETR's four levels.
PYRAMID = ((100, 134), (50, 67), (25, 34), (13, 17))
PIXELS = sum(height * width for height, width in PYRAMID)


def deformable_attention_step(device: torch.device, images: int, queries: int, gradients: bool = True) -> Step:
    """Four points of each level of PYRAMID, near the query's own place, as offsets begin."""
    value = draw(device, images, PIXELS, HEADS, WIDTH // HEADS)
    weights = torch.rand(images, queries, HEADS, 4, 4, device=device).to(torch.bfloat16).requires_grad_()
    near = torch.rand(images, queries, 1, 1, 1, 2, device=device)
    locations = (near + 0.05 * torch.randn(images, queries, HEADS, 4, 4, 2, device=device)).requires_grad_()
    leaves = (value, locations, weights)
    return step_of(lambda value, *rest: deformable_attention(value, PYRAMID, *rest), leaves, gradients)


def from_offsets_step(device: torch.device, images: int, queries: int, gradients: bool = True) -> Step:
    """The same from boxes, as decoders have them, offsets and logits."""
    value, logits = draw(device, images, PIXELS, HEADS, WIDTH // HEADS), draw(device, images, queries, HEADS, 4, 4)
    offsets = draw(device, images, queries, HEADS, 4, 4, 2)
    boxes = (0.2 + 0.3 * torch.rand(images, queries, 1, 4, device=device)).requires_grad_()
    leaves = (value, boxes, offsets, logits)
    return step_of(lambda value, *rest: deformable_attention_from_offsets(value, PYRAMID, *rest), leaves, gradients)


def _deformable_attention() -> Iterator[Group]:
    for make, name in ((deformable_attention_step, ""), (from_offsets_step, "deformable_attention_from_offsets")):
        cases = []
        for images, queries in ((1, 300), (4, 300), (16, 300), (1, PIXELS)):
            size = images * queries * WIDTH * 16 * 2
            step = partial(call_step, make, (images, queries))
            cases.append(Case(f"({images}, {queries}) of {PIXELS}", size, step))
        group = Group("deformable_attention", tuple(cases), name)
        yield from (group, replace(group, gradients=False))


def _norm(device: torch.device) -> tuple[Tensor, Tensor]:
    return draw(device, WIDTH), draw(device, WIDTH)


def rotary_embedding_step(device: torch.device, rows: int, gradients: bool = True) -> Step:
    """Queries and keys as projections give them, and angles as transformers makes them."""
    q, k = (draw(device, 1, rows, HEADS, WIDTH // HEADS) for _ in range(2))
    angles = torch.rand(rows, WIDTH // HEADS // 2, device=device).repeat(1, 2)
    cos, sin = angles.cos().to(torch.bfloat16), angles.sin().to(torch.bfloat16)
    return step_of(lambda q, k: rotary_embedding(q, k, cos, sin), (q, k), gradients)


def _rotary_embedding() -> Iterator[Group]:
    cases = tuple(
        Case(
            f"2 × ({rows}, {HEADS}, {WIDTH // HEADS})",
            4 * rows * WIDTH,
            partial(call_step, rotary_embedding_step, (rows,)),
        )
        for rows in (*ROWS, MANY)
    )
    group = Group("rotary_embedding", cases)
    return iter((group, replace(group, gradients=False)))


def _by_rows(op: str, make: Callable[..., Step], *more: int, width: int = WIDTH, tensors: int = 1) -> Iterator[Group]:
    """tensors: how many (rows, width) count as the op's input."""
    cases = tuple(
        Case(f"({rows}, {width})", rows * width * 2 * tensors, partial(call_step, make, (rows,)))
        for rows in (*ROWS, *more)
    )
    group = Group(op, cases)
    return iter((group, replace(group, gradients=False)))


SQUARE = ((1, QUERIES, QUERIES), *((images, TOKENS, TOKENS) for images in (1, 4, 16, 64)))  # images, queries, keys
FEW = tuple((images, QUERIES, TOKENS) for images in (1, 4, 16, 64))


def _attention(sizes: Sequence[tuple[int, int, int]], masked: bool, dropout: bool = False, heads: int = HEADS) -> Group:
    """Attention as `attention_triton.measured_as` names it: heads of 32 channels, or fewer, larger ones."""
    few = "few_queries" if sizes is FEW else ""
    parts = ("attention", "masked" * masked, "dropout" * dropout, "wide" * (heads < HEADS), few)
    cases = []
    for images, queries, keys in sizes:
        size = images, queries, keys, heads, masked
        step = partial(call_step, attention_step, (*size, DROPOUT * dropout))
        checked = partial(call_step, attention_step, size) if dropout else None
        bytes_read = images * (queries + 2 * keys) * WIDTH * 2
        cases.append(Case(f"({images}, {queries}, {keys})", bytes_read, step, "sdpa", checked))
    return Group("attention", tuple(cases), "_".join(filter(None, parts)))


def _attentions() -> Iterator[Group]:
    for masked in (True, False):
        for dropout in (True, False):
            forms = [
                _attention(SQUARE, masked, dropout),
                _attention(FEW, masked, dropout),
                _attention(SQUARE[1:4], masked, dropout, heads=HEADS // 2),
            ]
            yield from (replace(form, atomics=True) for form in forms)
            if not dropout:
                yield from (replace(form, gradients=False) for form in forms)


def packed_attention_step(
    device: torch.device, images: int, queries: int, dropout_p: float = 0.0, gradients: bool = True
) -> Step:
    """Images of TOKENS tokens, three in four of them there, attended to by all of them or by `queries` for each."""
    tokens = [TOKENS * 3 // 4] * images
    ends_k = torch.tensor([0, *tokens], device=device).cumsum(0).to(torch.int32)
    ends_q = torch.arange(images + 1, device=device, dtype=torch.int32) * queries if queries else ends_k
    longest = queries or max(tokens)
    leaves = [draw(device, n, HEADS, WIDTH // HEADS) for n in (longest * images, sum(tokens), sum(tokens))]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention_varlen(q, k, v, ends_q, ends_k, longest, max(tokens), dropout_p=dropout_p)

    return step_of(attend, leaves, gradients)


def _packed_attention() -> Group:
    """The backward by atomics beside the deterministic one: nothing else packed takes as few launches."""
    cases = []
    for images, queries in ((1, 0), (4, QUERIES), (4, 0), (16, 0)):
        keys = images * (TOKENS * 3 // 4)
        step = partial(call_step, packed_attention_step, (images, queries, DROPOUT))
        checked = partial(call_step, packed_attention_step, (images, queries))
        size = ((images * queries or keys) + 2 * keys) * WIDTH * 2
        cases.append(Case(f"{images} × ({queries or keys // images}, {keys // images})", size, step, "triton", checked))
    name = "attention_varlen_atomics"
    return Group("attention_varlen", tuple(cases), name, kernel="triton_atomics")


def _optimizer_step() -> Group:
    cases = []
    for layers in (1, 6, 32):  # of DETR's encoder, which 41.5 million parameters would be 32 of
        size = layers, WIDTH, HIDDEN
        made = [partial(call_step, step, size) for step in (optimizer_cases.timed_step, optimizer_cases.checked_step)]
        cases.append(Case(f"AdamW of {layers} layers", optimizer_cases.bytes_of(*size), made[0], checked=made[1]))
    return Group("optimizer_step", tuple(cases), tolerance=1e-4, repeats=False)


def pointwise_affine_step(device: torch.device, size: pointwise_cases.Size, gradients: bool = True) -> Step:
    leaves, scale, shift = pointwise_cases.inputs(device, size)
    return step_of(partial(pointwise_cases.run, scale, shift), leaves, gradients)


def _pointwise_affine() -> Iterator[Group]:
    """Where eager rounds once more, one gradient in a thousand stops at a ReLU that lets the other through: 3 % of the norm."""
    for name in dict.fromkeys(size.regime for size in pointwise_cases.SIZES):
        sizes = [size for size in pointwise_cases.SIZES if size.regime == name]
        cases = (Case(str(s), s.nbytes, partial(call_step, pointwise_affine_step, (s,))) for s in sizes)
        group = Group("pointwise_affine", tuple(cases), name, tolerance=6e-2)
        yield from (
            group,
            replace(group, gradients=False),
        )  # frozen blocks, and nodes that do their own backward, want none


def _cast_together() -> Group:
    cases = []
    for layers in (1, 6, 24):
        size = layers, WIDTH, HIDDEN
        step = partial(call_step, cast_cases.cast_step, size)
        cases.append(Case(f"weights of {layers} layers", 4 * cast_cases.elements_of(*size), step))
    return Group("cast_together", tuple(cases), tolerance=0.0, graphs_only=True)


GROUPS = (
    *_by_rows("layer_norm", layer_norm_step, MANY),
    Group(
        "matching_cost",
        tuple(
            Case(
                f"6 × {images} × (20, 100)",
                6 * images * 20 * 100 * 4,
                partial(call_step, matching_cost_step, (images, 20, 100)),
            )
            for images in (1, 4, 16, 64)
        ),
    ),
    Group(
        "detection_losses",
        tuple(
            Case(
                f"6 × {images} × (100, 92)",
                6 * images * 100 * 92 * 4,
                partial(call_step, detection_losses_step, (images,)),
            )
            for images in (1, 4, 16)
        ),
    ),
    *_by_rows("add_layer_norm", add_layer_norm_step, MANY),
    *_by_rows("rms_norm", rms_norm_step, MANY),
    *_by_rows("add_rms_norm", add_rms_norm_step, MANY),
    *_rotary_embedding(),
    *_by_rows("gated_activation", gated_activation_step, width=HIDDEN, tensors=2),
    *_deformable_attention(),
    *_attentions(),
    _packed_attention(),
    _optimizer_step(),
    _cast_together(),
    *_by_rows("feed_forward", feed_forward_step),
    *_by_rows("linear_add_layer_norm", linear_add_layer_norm_step),
    *_by_rows("qkv_projection", qkv_projection_step),
    *_pointwise_affine(),
    *_prediction_heads(),
    Group(  # up to as many logits as are kept whole: where there are more the kernel is taken anyway
        "linear_cross_entropy",
        tuple(
            Case(f"{size}", 2 * size[0] * size[1], partial(call_step, linear_cross_entropy_step, size))
            for size in ((1024, 4096), (2048, 8192), (4096, 16000))
        ),
    ),
)
