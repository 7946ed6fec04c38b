"""Options of calls in pairs, beyond the catalog's: the compiler takes their programs, as the interpreter takes any."""

from __future__ import annotations

import random
from itertools import combinations, islice, product

import pytest
import torch
from detr_fast.kernels import launch
from detr_fast.kernels.catalog import CATALOG
from detr_fast.kernels.offline import compile_variant, older_compiler

from benchmarks.layer_spills import KERNELS
from benchmarks.spills import cover
from detr_fast import ops, use_backend
from detr_fast.testing import count

BF16, FP32, INT64 = torch.bfloat16, torch.float32, torch.int64
NO_YES = (False, True)
WIDTHS = (256, 100)  # whole runs of 16 bytes, or not


def new(*shape, dtype=BF16, grad=True):
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad and dtype.is_floating_point)


def norm(columns, bias, dtype=BF16):
    return new(columns, dtype=dtype), new(columns, dtype=dtype) if bias else None


def feed_forward(columns, activation, biases, drops, behind, norm_bias):
    """behind: the residual, LayerNorm, or that and its sum; or nothing."""
    hidden = 2 * columns
    bias = [new(n) if biases else None for n in (hidden, columns)]
    tensors = new(70, columns), new(hidden, columns), bias[0], new(columns, hidden), bias[1]
    p, output_p = drops
    if behind in ("nothing", "residual"):
        residual = new(70, columns) if behind == "residual" else None
        return ops.feed_forward(*tensors, activation, p, residual, output_p)
    settings = activation, p, output_p, None if behind == "norm" else new(70, columns), behind == "sum"
    return ops.feed_forward_add_layer_norm(*tensors, *norm(columns, norm_bias), 1e-5, *settings)


def linear_add_layer_norm(columns, width, bias, norm_bias, dropout_p, return_sum):
    product = new(70, width), new(columns, width), new(columns) if bias else None
    behind = new(70, columns), *norm(columns, norm_bias)
    return ops.linear_add_layer_norm(*product, *behind, dropout_p=dropout_p, return_sum=return_sum)


def add_layer_norm(columns, residual, bias, dropout_p, return_sum):
    tensors = new(70, columns), new(70, columns, dtype=residual), *norm(columns, bias, residual)
    return ops.add_layer_norm(*tensors, dropout_p=dropout_p, return_sum=return_sum)


def layer_norm(columns, weight, bias):
    parameters = [new(columns) if there else None for there in (weight, bias)]
    return ops.layer_norm(new(70, columns), (columns,), *parameters)


def add_rms_norm(columns, residual, weight, dropout_p, return_sum):
    tensors = new(70, columns), new(70, columns, dtype=residual), new(columns, dtype=residual) if weight else None
    return ops.add_rms_norm(*tensors, dropout_p=dropout_p, return_sum=return_sum)


def rms_norm(columns, weight):
    return ops.rms_norm(new(70, columns), (columns,), new(columns) if weight else None)


def qkv_projection(columns, bias, position):
    bias = new(3 * 128) if bias else None
    position, positioned = (None, 0) if position == 0 else (new(1, columns), position)
    return ops.qkv_projection(new(70, columns), new(3 * 128, columns), bias, position, positioned)


def linear_cross_entropy(columns, weighted, label_smoothing, learns):
    classes, options = 10 * columns, {"label_smoothing": label_smoothing}
    tensors = (new(*shape, grad=learns) for shape in ((70, columns), (classes, columns)))
    weight = new(classes, dtype=FP32, grad=False) if weighted else None
    return ops.linear_cross_entropy(*tensors, None, new(70, dtype=INT64), class_weight=weight, **options)


def channel_affine(columns, residual):
    image, scales = (2, columns, 4, 4), [new(columns, dtype=FP32, grad=False) for _ in range(3)]
    more = {"nothing": (), "plain": (new(*image),), "scaled": (new(*image), scales[2])}[residual]
    return ops.channel_affine(new(*image), *scales[:2], *more)


def pointwise_affine(columns, width, residual):
    tensors, scales = (new(2, width, 4, 4), new(columns, width, 1, 1)), [new(columns, dtype=FP32, grad=False)] * 3
    image = new(2, columns, 4, 4)
    more = {"nothing": (), "plain": (image,), "scaled": (image, scales[2])}[residual]
    return ops.pointwise_affine(*tensors, *scales[:2], *more)


def rotary_embedding(channels, rotated, per_pair, interleaved, sorts, angles, keys, k_grad):
    q, k = new(2, 5, 4, channels), new(2, 5, 1, channels, grad=k_grad) if keys else None
    width = channels if rotated == "all" else channels // 4
    cos, sin = (new(5, width // 2 if per_pair else width, dtype=angles, grad=False) for _ in range(2))
    kinds = {"interleaved": interleaved, "per_pair": per_pair, "sorts": sorts and interleaved and per_pair}
    return ops.rotary_embedding(q, k, cos, sin, **kinds)


def gated_activation(columns, activation, form, learns):
    if form == "two":
        return ops.gated_activation(*(new(70, columns, grad=one) for one in learns), activation)
    rest = {"neighbours": True, "limit": 7.0, "plus_one": True} if form == "neighbours" else {}
    return ops.gated_activation(new(70, 2 * columns), None, activation, form == "gate last", **rest)


def prediction_heads(columns, outputs, classes, middle, sigmoid, learns):
    shapes = [(columns, columns), *[(columns, columns)] * middle, (outputs, columns)]
    layers = [[new(*shape[:n], dtype=FP32, grad=learns[1]) for shape in shapes] for n in (2, 1)]
    beside = [new(*shape, dtype=FP32, grad=learns[1]) for shape in ((classes, columns), (classes,))] if classes else []
    x = new(70, columns, dtype=FP32, grad=learns[0])
    return ops.prediction_heads(x, *layers, *beside, sigmoid=sigmoid)


def matching_cost(focal, dtype):
    targets = new(2, 3, dtype=INT64), new(2, 3, 4, dtype=FP32, grad=False), new(2, dtype=INT64)
    return ops.matching_cost(new(2, 9, 5, dtype=dtype), new(2, 9, 4, dtype=FP32), *targets, focal=focal)


def deformable_attention(levels, channels, value, location, weight, learns):
    shapes, k = [(3, 4)] * levels, 2 * levels
    given = (2, 12 * levels, 2, channels), (2, 9, 2, k, 2), (2, 9, 2, k)
    kinds = zip(given, (value, location, weight), learns)
    values, locations, weights = (new(*shape, dtype=dtype, grad=grad) for shape, dtype, grad in kinds)
    return ops.deformable_attention(values, shapes, locations, weights, [2] * levels)


def deformable_attention_from_offsets(levels, channels, value, location, reference, coordinates, learns, known):
    shapes, k = [(3, 4)] * levels, 2 * levels
    given = (2, 12 * levels, 2, channels), (2, 9, levels, coordinates), (2, 9, 2, k, 2), (2, 9, 2, k)
    kinds = zip(given, (value, reference, location, value), learns)
    values, *rest = (new(*shape, dtype=dtype, grad=grad) for shape, dtype, grad in kinds)
    sizes = shapes if known else new(levels, 2, dtype=INT64)
    return ops.deformable_attention_from_offsets(values, sizes, *rest, [2] * levels)


def detection_losses(focal, dtype, boxes):
    targets = (
        new(1, 2, 3, dtype=INT64),
        new(2, 3, dtype=INT64),
        new(2, 3, 4, dtype=FP32, grad=False),
        new(2, dtype=INT64),
    )
    others = new(1, 2, 9, dtype=torch.bool), new(1, dtype=INT64)
    predicted = new(1, 2, 9, 5, dtype=dtype), new(1, 2, 9, 4, dtype=FP32, grad=boxes)
    return ops.detection_losses(*predicted, *targets, *others, focal=focal)[0]


FEED_FORWARD = {
    "columns": WIDTHS,
    "activation": ("relu", "gelu", "gelu_tanh", "silu"),
    "biases": NO_YES,
    "drops": ((0.0, 0.0), (0.1, 0.0), (0.0, 0.1), (0.1, 0.1)),
    "behind": ("nothing", "residual", "norm", "residual norm", "sum"),
    "norm_bias": NO_YES,
}
CALLS = (
    (feed_forward, "triton", FEED_FORWARD),
    (feed_forward, "triton_recompute", FEED_FORWARD),
    (feed_forward, "triton_one_kernel", FEED_FORWARD | {"columns": (256, 104)}),
    (
        linear_add_layer_norm,
        "triton",
        {
            "columns": WIDTHS,
            "width": (128, 1024, 50),
            "bias": NO_YES,
            "norm_bias": NO_YES,
            "dropout_p": (0.0, 0.1),
            "return_sum": NO_YES,
        },
    ),
    (
        add_layer_norm,
        "triton",
        {
            "columns": (*WIDTHS, 9000),
            "residual": (BF16, FP32),
            "bias": NO_YES,
            "dropout_p": (0.0, 0.1),
            "return_sum": NO_YES,
        },
    ),
    (layer_norm, "triton", {"columns": (*WIDTHS, 9000), "weight": NO_YES, "bias": NO_YES}),
    (
        add_rms_norm,
        "triton",
        {
            "columns": (*WIDTHS, 9000),
            "residual": (BF16, FP32),
            "weight": NO_YES,
            "dropout_p": (0.0, 0.1),
            "return_sum": NO_YES,
        },
    ),
    (rms_norm, "triton", {"columns": (*WIDTHS, 9000), "weight": NO_YES}),
    (qkv_projection, "triton", {"columns": WIDTHS, "bias": NO_YES, "position": (0, 256, 384)}),
    (
        linear_cross_entropy,
        "triton",
        {"columns": WIDTHS, "weighted": NO_YES, "label_smoothing": (0.0, 0.1), "learns": NO_YES},
    ),
    (channel_affine, "triton", {"columns": WIDTHS, "residual": ("nothing", "plain", "scaled")}),
    (
        pointwise_affine,
        "triton",
        {"columns": (64, *WIDTHS), "width": (64, 256, 50), "residual": ("nothing", "plain", "scaled")},
    ),
    (
        deformable_attention,
        "triton",
        {
            "levels": (1, 3, 4, 6),
            "channels": (8, 16, 30, 32, 64, 128, 256),
            "value": (BF16, FP32),
            "location": (BF16, FP32),
            "weight": (BF16, FP32),
            "learns": tuple(product(NO_YES, repeat=3)),
        },
    ),
    (
        deformable_attention_from_offsets,
        "triton",
        {
            "levels": (1, 3, 4, 6),
            "channels": (8, 16, 30, 32, 64, 128, 256),
            "value": (BF16, FP32),
            "location": (BF16, FP32),
            "reference": (BF16, FP32),
            "coordinates": (2, 4),
            "learns": tuple(product(NO_YES, repeat=4)),
            "known": NO_YES,
        },
    ),
    (
        rotary_embedding,
        "triton",
        {
            "channels": (64, 80, 24, 256),
            "rotated": ("all", "a quarter"),
            "per_pair": NO_YES,
            "interleaved": NO_YES,
            "sorts": NO_YES,
            "angles": (BF16, FP32),
            "keys": NO_YES,
            "k_grad": NO_YES,
        },
    ),
    (matching_cost, "triton", {"focal": NO_YES, "dtype": (BF16, FP32)}),
    (detection_losses, "triton", {"focal": NO_YES, "dtype": (BF16, FP32), "boxes": NO_YES}),
    (
        gated_activation,
        "triton",
        {
            "columns": (1024, *WIDTHS),
            "activation": ("relu", "gelu", "gelu_tanh", "silu", "quick_gelu"),
            "form": ("two", "gate first", "gate last", "neighbours"),
            "learns": ((True, True), (True, False), (False, True)),
        },
    ),
    (feed_forward, "triton", FEED_FORWARD | {"activation": ("quick_gelu",)}),
    (
        prediction_heads,
        "triton",
        {
            "columns": (*WIDTHS, 37),
            "outputs": (4, 1, 200),
            "classes": (92, 0, 2),
            "middle": NO_YES,
            "sigmoid": NO_YES,
            "learns": ((True, True), (True, False), (False, True)),
        },
    ),
)
PROGRAMS = 64  # half a second each


def launched(call, backend, case):
    """Forward and backward, which launch nothing on meta tensors, and are told to observers."""
    with use_backend(**{call.__name__.removesuffix("_from_offsets"): backend}):
        results = call(**case)
        results = [
            t for t in (results if isinstance(results, tuple) else (results,)) if t is not None and t.requires_grad
        ]
        if results:
            torch.autograd.backward(results, [torch.empty_like(t) for t in results])


def reached():
    """All programs of the options' cases, each once, in order."""
    seen, dice = {}, random.Random(0)
    launch.observers.append(lambda one: seen.setdefault(one.variant))
    try:
        for call, backend, options in CALLS:
            for case in cover(options, dice):
                count(lambda call=call, backend=backend, case=case: launched(call, backend, case))
    finally:
        launch.observers.pop()
    return list(seen)


def form(variant):
    """What of a program are switches: which arguments are there, and constants that are no sizes."""
    there = [(str(index), kind is not None) for index, kind in enumerate(variant.types)]
    switches = [(name, value) for name, value in variant.constants.items() if isinstance(value, bool | str)]
    return {(variant.name, *pair) for pair in combinations(there + switches, 2)}


def sample(programs):
    """Of programs beyond the catalog's those whose switches are pairs that are new, by their share of all of their kernel's."""
    known = set().union(*(form(one.variant) for one in CATALOG))
    pairs = {}
    for one in programs:
        pairs.setdefault(one.name, set()).update(form(one))
    chosen = []
    while len(chosen) < PROGRAMS:
        best = max(programs, key=lambda one: len(form(one) - known) / len(pairs[one.name]))
        known |= form(best)
        chosen.append(best)
    return chosen


@pytest.mark.offline
def test_programs_of_options_in_pairs_compile_and_spill_nothing():
    failed = []
    for variant in sample(reached()):
        try:
            _, _, resources = compile_variant(variant, "sm_90")
        except Exception as error:
            failed.append((variant, error))
        else:
            if resources.spills and not older_compiler():
                failed.append((variant, f"{resources.spills} bytes a thread spill"))
    assert failed == []


def test_the_script_that_looks_for_spills_knows_the_kernels_of_all_ops_but_attention():
    first = islice(KERNELS.programs(["sm_90"]), len(KERNELS.names))
    found = {variant.name for _, _, variant in first}
    missing = {one.variant.name for one in CATALOG if not one.op.startswith("attention")} - found
    assert missing == set()
