"""Compile what calls of all other ops than attention reach in 16 bits, over pairs of features, and list what spills; needs no GPU.

    python -m benchmarks.layer_spills sm_80,sm_90 spills.csv    # some 2 s a program and core; goes on where the file ends

As `attention_spills`. Rows that are read one element at a time or fill no power of two, and dropout, which take registers, come first.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from math import gcd

import torch
from detr_fast.kernels import (
    adam,
    add_layer_norm,
    assignment,
    cast_together,
    channel_affine,
    cross_entropy,
    deformable_attention,
    detection_losses,
    feed_forward,
    gated,
    layer_norm,
    linear,
    linear_norm,
    matching_cost,
    mlp,
    pointwise,
    rotary,
    sine_positions,
    stem,
    wide_rows,
)
from detr_fast.kernels.add_layer_norm_backward import BackwardForm
from detr_fast.kernels.add_layer_norm_backward import backward_variant as add_backward_variant
from detr_fast.kernels.detection_losses_backward import backward_variant as losses_backward_variant
from detr_fast.kernels.launch import Variant
from detr_fast.kernels.product_tiles import Form
from detr_fast.kernels.rows import sum_partials_variant

from benchmarks.spills import Case, Kernels, Options, main

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
HALVES, DTYPES, SWITCH = (BF16, FP16), (BF16, FP16, FP32), (False, True)
ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu")
TILED = (16, 20, 24, 40, 64, 96, 100, 128, 200, 256)  # columns, up to a tile's
COLUMNS = (*TILED, 300, 512, 768, 1000, 1024, 1500, 2048, 3072, 4096, 6000, 8192)
# What surrounds a norm: the dtypes of x and the residual; parameters are in the sum's dtype, or fp32 under autocast, as y then is.
NORM: Options = {
    "dtype": HALVES,
    "residual": ("same", "fp32"),
    "autocast": SWITCH,
    "weight": SWITCH,
    "bias": SWITCH,
    "dropout": SWITCH,
    "sum": SWITCH,
    "runs": SWITCH,
}
CENTRED: Options = {"centred": SWITCH}  # LayerNorm; else RMSNorm, which has no bias
ADDED = NORM | CENTRED | {"residual": ("same", "fp32", "fp32 x"), "columns": COLUMNS}
BACK: Options = {"dsum": SWITCH, "dx": SWITCH, "dresidual": SWITCH}
ENDS = NORM | {"columns": TILED, "keep": SWITCH, "linear_bias": SWITCH}
PRODUCT: Options = {
    "dtype": HALVES,
    "activation": ACTIVATIONS,
    "even": SWITCH,
    "runs": SWITCH,
    "bias": SWITCH,
    "dropout": SWITCH,
    "keep": SWITCH,
}
GATE: Options = {"dtype": HALVES, "activation": (*ACTIVATIONS, "quick_gelu"), "runs": SWITCH}
GATE |= {"form": ("flat", gated.TWO, gated.GATE_FIRST, gated.GATE_LAST, gated.NEIGHBOURS), "columns": COLUMNS}
PIXELS: Options = {"dtype": HALVES, "columns": (64, 200), "terms": (64, 256), "even": SWITCH, "runs": SWITCH}
HEADS: Options = {"columns": (*TILED, 300, 512), "outputs": (1, 4, 70, 200), "classes": (0, 2, 92), "middle": SWITCH}
PREDICTIONS: Options = {"dtype": DTYPES, "boxes": DTYPES, "focal": SWITCH}
SAMPLES: Options = {"dtype": HALVES, "location": ("same", "fp32"), "weight": ("same", "fp32"), "levels": (1, 3, 4, 6)}
SAMPLES |= {"channels": (8, 20, 24, 32, 48, 64, 100, 128, 256), "runs": SWITCH}
SAMPLES |= {"coordinates": (0, 2, 4), "reference": ("same", "fp32"), "sizes": SWITCH}  # sizes: on the device
SPACE: dict[str, Options] = {
    "linear": PRODUCT | {"activation": ("none", *ACTIVATIONS), "position": SWITCH},
    "linear backward": PRODUCT | {"dbias": SWITCH},
    "linear norm": ENDS | {"even": SWITCH, "few": SWITCH},
    "linear norm's end": ENDS,
    "residual norm backward": {n: NORM[n] for n in ("dtype", "residual", "autocast", "dropout", "runs")}
    | {"columns": TILED, "dsum": SWITCH},
    "dropped backward": {"dtype": HALVES, "columns": COLUMNS, "dy": ("same", "fp32"), "runs": SWITCH},
    "feed forward": {name: values for name, values in ENDS.items() if name not in ("runs", "columns")}
    | {"activation": ACTIVATIONS, "width": (8, 24, 64, 96, 200, 256), "columns": (16, 24, 64, 96, 200, 256)}
    | {"hidden": (40, 512), "few": SWITCH, "hidden_dropout": SWITCH, "hidden_bias": SWITCH, "adds": SWITCH},
    "cross entropy": {"dtype": HALVES, "classes": (2, 100, 128, 200, 500, 512, 1000, 2000, 4000, 8000, 32000, 50257)}
    | {"weighted": SWITCH, "learns": SWITCH, "smoothed": SWITCH},
    "deformable attention": SAMPLES | {"few": SWITCH},
    "deformable attention backward": SAMPLES
    | {"dvalue": SWITCH, "dlocation": SWITCH, "dweight": SWITCH}
    | {"dreference": SWITCH},
    "detection losses": PREDICTIONS,
    "detection losses' sum": {"focal": SWITCH},
    "detection losses backward": PREDICTIONS | {"dlogits": SWITCH, "dboxes": SWITCH},
    "matching cost": PREDICTIONS,
    "squares": {"dtype": DTYPES, "runs": SWITCH},
    "scalars": {"clips": SWITCH},
    "update": {"dtype": DTYPES, "clips": SWITCH, "runs": SWITCH},
    "casts": {"dtype": HALVES, "widens": SWITCH},
    "assignment": {"queries": (20, 50, 100, 200, 400, 900)},
    "channel affine": {"dtype": HALVES, "columns": COLUMNS, "residual": ("none", "plain", "scaled"), "runs": SWITCH},
    "channel affine backward": {"dtype": HALVES, "columns": COLUMNS, "scaled": SWITCH, "runs": SWITCH}
    | {"dx": SWITCH, "dresidual": SWITCH},
    "pointwise": PIXELS | {"residual": ("none", "plain", "scaled")},
    "pointwise backward": PIXELS | {"added": SWITCH, "masked": SWITCH, "scaled": SWITCH},
    "heads": HEADS | {"sigmoid": SWITCH},
    "heads backward": HEADS | {"sigmoid": SWITCH, "dx": SWITCH},
    "heads' weights": HEADS,
    "gated": GATE,
    "gated backward": GATE | {"dgate": SWITCH, "dup": SWITCH},
    "pixel blocks": {"image": DTYPES, "dtype": HALVES},
    "affine pool": {"dtype": HALVES, "channels": (16, 32, 64, 128, 256, 512, 1024)},
    "sine positions": {"features": (2, 18, 64, 128, 1536), "normalize": SWITCH, "dtype": DTYPES},
    "rotary embedding": {"dtype": DTYPES, "angles": ("same", "fp32"), "columns": (6, 20, 24, 64, 80, 96, 128, 192, 256)}
    | {"quarter": SWITCH, "heads": (1, 2, 4), "run": (1, 2, 4, 8), "keys": SWITCH}
    | {"interleaved": SWITCH, "per_pair": SWITCH, "back": SWITCH},
    "layer norm": {n: NORM[n] for n in ("dtype", "autocast", "weight", "bias", "runs")}
    | CENTRED
    | {"columns": COLUMNS},
    "layer norm backward": {n: NORM[n] for n in ("dtype", "autocast", "weight", "runs")}
    | CENTRED
    | {"columns": COLUMNS, "dx": SWITCH, "dw": SWITCH, "db": SWITCH},
    "add layer norm": ADDED,
    "add layer norm backward": ADDED | BACK | {"dw": SWITCH, "db": SWITCH},
    "partial sums": {"columns": (20, 256, 300, 2048, 6000), "total": DTYPES, "count": (1, 2)},
    "wide rows": {name: values for name, values in ADDED.items() if name != "columns"} | {"alone": SWITCH},
    "wide rows backward": {name: values for name, values in ADDED.items() if name != "columns"} | BACK,
    "wide rows' parameters": {n: ADDED[n] for n in ("dtype", "residual", "autocast", "dropout", "sum", "runs")}
    | CENTRED
    | {"dw": SWITCH, "db": SWITCH},
}

TOGETHER = dict.fromkeys(("linear", "linear backward"), 3)  # the others' features in pairs


def is_reached(kernel: str, case: Case) -> bool:
    """Whether a call may have these features together."""
    width = case.get("columns") or case.get("channels") or 8
    if case.get("runs") and width % 8:
        return False
    if "sum" in case and kernel.endswith("backward") and not case["sum"] and case.get("dsum"):
        return False
    if not case.get("centred", True) and (case.get("bias") or case.get("db")):
        return False
    rule = RULES.get(kernel)
    return rule is None or rule(case)


def _is_product(case: Case) -> bool:
    """cuBLAS takes products that end in a bias, or a bias and ReLU."""
    if case["activation"] == "none":
        return case["position"] and not (case["dropout"] or case["keep"])
    return not case["position"] and (case["activation"] != "relu" or case["dropout"])


def _is_end(case: Case) -> bool:
    """Without a norm the sum is all there is, and no autocast matters; a norm behind a product has a weight."""
    if case["weight"]:
        return case["autocast"] or case["residual"] == "same"
    return case["sum"] and not (case["autocast"] or case["bias"] or case["keep"])


def _is_block(case: Case) -> bool:
    if case["adds"]:
        return _is_end(case)
    behind = ("weight", "bias", "sum", "keep", "dropout", "autocast")
    return case["residual"] == "same" and not any(case[name] for name in behind)


def _gives_gradients(case: Case) -> bool:
    """Some, and the weight's where there is one."""
    return any(case.get(name) for name in ("dx", "dresidual", "dw", "db")) and (case["weight"] or not case["dw"])


def _has_reference(case: Case) -> bool:
    """Or what is said of one is the first of all options."""
    return case["coordinates"] > 0 or (case["reference"] == "same" and not case.get("dreference"))


def _has_run(case: Case) -> bool:
    """Whether halves, or neighbours, are whole runs, of 16 bytes at most."""
    pairs = _pairs(case)
    unit = gcd(2 * pairs if case["interleaved"] else pairs, case["columns"], 16 // case["dtype"].itemsize)
    return pairs > 0 and unit % case["run"] == 0


def _pairs(case: Case) -> int:
    columns: int = case["columns"]
    return columns // (8 if case["quarter"] else 2)


RULES: dict[str, Callable[[Case], bool]] = {
    "linear": _is_product,
    "linear backward": lambda case: case["bias"] or not case["dbias"],
    "linear norm": _is_end,
    "linear norm's end": _is_end,
    "residual norm backward": lambda case: case["autocast"] or case["residual"] == "same",
    "feed forward": _is_block,
    "deformable attention": _has_reference,
    "deformable attention backward": lambda case: (
        _has_reference(case) and any(case[n] for n in ("dvalue", "dlocation", "dweight", "dreference"))
    ),
    "detection losses backward": lambda case: case["dlogits"] or case["dboxes"],
    "channel affine backward": lambda case: case["dresidual"] or (case["dx"] and not case["scaled"]),
    "rotary embedding": _has_run,
    "gated backward": lambda case: (
        case["dgate"] or case["dup"] if case["form"] in ("flat", gated.TWO) else case["dgate"] and not case["dup"]
    ),
    "layer norm backward": _gives_gradients,
    "add layer norm backward": _gives_gradients,
    # Alone it is a LayerNorm's.
    "wide rows": lambda case: not case["alone"] or not (case["sum"] or case["dropout"] or case["residual"] != "same"),
    "wide rows backward": lambda case: case["dx"] or case["dresidual"],
    "wide rows' parameters": lambda case: case["dw"] or case["db"],
}


def _terms(case: Case) -> tuple[torch.dtype, torch.dtype, torch.dtype, torch.dtype]:
    """The dtypes of x, of the residual, of their sum, and of the norm's parameters and result."""
    half, kind = case["dtype"], case["residual"]
    x = FP32 if kind == "fp32 x" else half
    residual = FP32 if kind == "fp32" else half
    total = torch.promote_types(x, residual)
    return x, residual, total, FP32 if case["autocast"] else total


def _end(case: Case) -> tuple[torch.dtype | None, ...]:
    """The dtypes of bias, residual, norm weight and bias, y, the sum, xhat and y rounded, as under autocast."""
    _, residual, total, dtype = _terms(case)
    normed = dtype if case["weight"] else None
    return (
        case["dtype"] if case["linear_bias"] else None,
        residual,
        normed,
        dtype if case["bias"] else None,
        normed,
        total if case["sum"] else None,
        dtype if case["keep"] else None,
        case["dtype"] if normed == torch.float32 != case["dtype"] else None,
    )


def _run(case: Case, *dtypes: torch.dtype | None) -> int:
    return 16 // min(dtype.itemsize for dtype in dtypes if dtype is not None) if case["runs"] else 1


def _form(case: Case, activation: str) -> Form:
    return Form(case["dtype"], activation, case["even"], _run(case, case["dtype"]), "ieee")


def _linear(case: Case) -> Variant:
    activation, dtype = case["activation"], case["dtype"]
    active = case["keep"] and activation == "relu" and case["dropout"]
    pre = case["keep"] and activation != "relu"
    bias = dtype if case["bias"] else None
    return linear.forward_variant(_form(case, activation), bias, case["dropout"], pre, case["position"], active)


def _linear_backward(case: Case) -> Variant:
    known = case["keep"] and case["activation"] == "relu"
    bias = case["dtype"] if case["bias"] and not case["keep"] else None
    return linear.backward_variant(
        _form(case, case["activation"]),
        case["dropout"] and not known,
        case["dbias"],
        case["keep"],
        bias,
        known and case["dropout"],
    )


def _linear_norm(case: Case) -> Variant:
    return linear_norm.forward_variant(_form(case, "none"), case["columns"], case["few"], _end(case), case["dropout"])


def _finish(case: Case) -> Variant:
    return linear_norm.finish_variant(case["columns"], _run(case, case["dtype"]), _end(case), case["dropout"])


def _residual_norm_backward(case: Case) -> Variant:
    x, residual, total, dtype = _terms(case)
    dx = x if case["dropout"] or x != residual else None
    dtypes = (dtype, total if case["dsum"] else None, dtype, None, dtype, dx, residual)
    form = BackwardForm(dtypes, True, True, case["dropout"], True)
    return add_backward_variant(case["columns"], form, _run(case, *dtypes[:4], *dtypes[5:]))


def _dropped_backward(case: Case) -> Variant:
    dy, dx = FP32 if case["dy"] == "fp32" else case["dtype"], case["dtype"]
    form = BackwardForm((dy, None, None, None, None, dx, None), False, False, True, True)
    return add_backward_variant(case["columns"], form, _run(case, dy, dx))


def _feed_forward(case: Case) -> Variant:
    dtype, adds = case["dtype"], case["adds"]
    behind = _end(case) if adds else (dtype if case["linear_bias"] else None, None, None, None, dtype, None, None)
    dtypes = (dtype if case["hidden_bias"] else None, *behind)
    widths = case["width"], case["hidden"], case["columns"]
    drops = case["hidden_dropout"], case["dropout"]
    return feed_forward.forward_variant(dtype, case["activation"], widths, case["few"], dtypes, drops, 8, "ieee")


def _layer_norm(case: Case) -> Variant:
    x, dtype = case["dtype"], FP32 if case["autocast"] else case["dtype"]
    weight, bias = (dtype if case[name] else None for name in ("weight", "bias"))
    return layer_norm.forward_variant(case["columns"], x, weight, bias, dtype, _run(case, x, dtype), case["centred"])


def _layer_norm_backward(case: Case) -> Variant:
    x, dtype = case["dtype"], FP32 if case["autocast"] else case["dtype"]
    wanted = case["dx"], case["dw"], case["db"]
    return layer_norm.backward_variant(
        case["columns"], dtype, x, dtype if case["weight"] else None, *wanted, _run(case, x, dtype), case["centred"]
    )


def _add_layer_norm(case: Case) -> Variant:
    x, residual, _, dtype = _terms(case)
    weight, bias = (dtype if case[name] else None for name in ("weight", "bias"))
    settings = case["sum"], case["dropout"], _run(case, x, residual, dtype), case["centred"]
    return add_layer_norm.forward_variant(case["columns"], x, residual, weight, bias, dtype, *settings)


def _backward_dtypes(case: Case) -> tuple[torch.dtype | None, ...]:
    """Of dy, dsum, x, residual, weight, dx and dresidual: from the sum, where the forward returned it."""
    x, residual, total, dtype = _terms(case)
    read: tuple[torch.dtype | None, ...] = (total, None) if case["sum"] else (x, residual)
    shared = not case["dropout"] and x == residual and case["dresidual"]
    written = x if case["dx"] and not shared else None, residual if case["dresidual"] else None
    dsum = total if case["dsum"] else None
    return (dtype, dsum, *read, dtype if case["weight"] else None, *written)


def _add_layer_norm_backward(case: Case) -> Variant:
    dtypes = _backward_dtypes(case)
    form = BackwardForm(dtypes, case["dw"], case["db"], case["dropout"], centred=case["centred"])
    return add_backward_variant(case["columns"], form, _run(case, *dtypes[:4], *dtypes[5:]))


def _wide_rows(case: Case) -> Variant:
    x, residual, total, dtype = _terms(case)
    weight, bias = (dtype if case[name] else None for name in ("weight", "bias"))
    dtypes = (x, None if case["alone"] else residual, weight, bias, dtype, total if case["sum"] else None)
    return wide_rows.forward_variant(dtypes, case["dropout"], _run(case, *dtypes), case["centred"])


def _wide_rows_backward(case: Case) -> Variant:
    dtypes = _backward_dtypes(case)
    return wide_rows.backward_variant(dtypes, case["dropout"], _run(case, *dtypes), case["centred"])


def _wide_parameters(case: Case) -> Variant:
    x, residual, total, dtype = _terms(case)
    read: tuple[torch.dtype | None, ...] = (dtype, total, None) if case["sum"] else (dtype, x, residual)
    dropped = case["dropout"] and not case["sum"]
    return wide_rows.parameters_variant(read, dropped, case["dw"], case["db"], _run(case, *read), case["centred"])


def _channel_affine(case: Case) -> Variant:
    there = case["residual"] != "none", case["residual"] == "scaled"
    return channel_affine.forward_variant(case["columns"], case["dtype"], *there, _run(case, case["dtype"]))


def _channel_affine_backward(case: Case) -> Variant:
    columns, dtype, given = case["columns"], case["dtype"], (case["scaled"], case["dx"], case["dresidual"])
    return channel_affine.backward_variant(columns, dtype, dtype, *given, _run(case, dtype))


def _pointwise(case: Case) -> Variant:
    form, there = _form(case, "none"), (case["residual"] != "none", case["residual"] == "scaled")
    return pointwise.forward_variant(form, case["columns"], case["terms"], *there)


def _pointwise_backward(case: Case) -> Variant:
    form, there = _form(case, "none"), (case["added"], case["masked"], case["scaled"])
    return pointwise.backward_variant(form, case["terms"], case["columns"], *there)


def _rotary(case: Case) -> Variant:
    dtypes = (case["dtype"],) * (2 if case["keys"] else 1)
    table = FP32 if case["angles"] == "fp32" else case["dtype"]
    turn = rotary.Turn(case["interleaved"], case["per_pair"], case["back"])
    shape = _pairs(case), case["columns"], case["heads"]
    return rotary.variant_for(dtypes, (table, table), *shape, case["run"], turn)


def _gated(case: Case) -> Variant:
    flat, wanted = case["form"] == "flat", (case["dgate"], case["dup"]) if "dup" in case else None
    form = gated.TWO if flat else case["form"]
    # Of neighbours as in gpt-oss, which needs more registers than without a limit.
    kind = gated.Gate(case["activation"], limit=7.0, plus_one=True)
    kind = kind if form == gated.NEIGHBOURS else gated.Gate(case["activation"])
    return gated.variant_of(case["columns"], case["dtype"], kind, form, flat, _run(case, case["dtype"]), wanted)


def _heads(case: Case) -> mlp.Form:
    return mlp.form_of(*(case[n] for n in ("columns", "columns", "outputs", "classes", "middle")), "split")


def _deformable(case: Case) -> tuple[int, int, tuple[torch.dtype, ...], deformable_attention.Form]:
    dtype, coordinates = case["dtype"], case["coordinates"]
    read = tuple(FP32 if case[name] == "fp32" else dtype for name in ("location", "weight", "reference"))
    form = deformable_attention.Form(coordinates, read[2] if coordinates else None, case["sizes"])
    return case["levels"], case["channels"], (dtype, *read[:2]), form


def _deformable_forward(case: Case) -> Variant:
    levels, channels, read, form = _deformable(case)
    dtypes = *read, case["dtype"]
    return deformable_attention.forward_variant(levels, channels, dtypes, _run(case, case["dtype"]), case["few"], form)


def _deformable_backward(case: Case) -> Variant:
    levels, channels, read, form = _deformable(case)
    wanted = case["dvalue"], case["dlocation"], case["dweight"], case["dreference"]
    dtypes, run = (case["dtype"], *read), _run(case, case["dtype"])
    return deformable_attention.backward_variant(levels, channels, dtypes, wanted, run, form)


BUILDERS: dict[str, Callable[[Case], Variant]] = {
    "linear": _linear,
    "linear backward": _linear_backward,
    "linear norm": _linear_norm,
    "linear norm's end": _finish,
    "residual norm backward": _residual_norm_backward,
    "dropped backward": _dropped_backward,
    "feed forward": _feed_forward,
    "cross entropy": lambda case: cross_entropy.cross_entropy_variant(
        *(case[n] for n in ("classes", "dtype", "weighted", "learns", "smoothed"))
    ),
    "deformable attention": _deformable_forward,
    "deformable attention backward": _deformable_backward,
    "detection losses": lambda case: detection_losses.forward_variant(*case.values()),
    "detection losses' sum": lambda case: detection_losses.sum_variant(case["focal"]),
    "detection losses backward": lambda case: losses_backward_variant(*case.values()),
    "matching cost": lambda case: matching_cost.matching_cost_variant(*case.values()),
    "heads": lambda case: mlp.forward_variant(_heads(case), case["sigmoid"]),
    "heads backward": lambda case: mlp.backward_variant(_heads(case), case["sigmoid"], case["dx"]),
    "heads' weights": lambda case: mlp.weights_variant(_heads(case)),
    "squares": lambda case: adam.squares_variant(case["dtype"], _run(case, case["dtype"])),
    "scalars": lambda case: adam.scalars_variant(case["clips"]),
    "update": lambda case: adam.update_variant(case["dtype"], case["clips"], _run(case, case["dtype"])),
    "casts": lambda case: cast_together.cast_variant(*(FP32, case["dtype"])[:: -1 if case["widens"] else 1]),
    "assignment": lambda case: assignment.assignment_variant(case["queries"]),
    "channel affine": _channel_affine,
    "channel affine backward": _channel_affine_backward,
    "pointwise": _pointwise,
    "pointwise backward": _pointwise_backward,
    "gated": _gated,
    "gated backward": _gated,
    "pixel blocks": lambda case: stem.blocks_variant(case["image"], case["dtype"]),
    "affine pool": lambda case: stem.pool_variant(case["channels"], case["dtype"]),
    "sine positions": lambda case: sine_positions.sine_positions_variant(*case.values()),
    "rotary embedding": _rotary,
    "layer norm": _layer_norm,
    "layer norm backward": _layer_norm_backward,
    "add layer norm": _add_layer_norm,
    "add layer norm backward": _add_layer_norm_backward,
    "partial sums": lambda case: sum_partials_variant(case["columns"], *(case["total"],) * case["count"]),
    "wide rows": _wide_rows,
    "wide rows backward": _wide_rows_backward,
    "wide rows' parameters": _wide_parameters,
}


def variant_of(kernel: str, case: Case, generation: str) -> Variant:
    """The program, which is all generations'."""
    return BUILDERS[kernel](case)


def options(kernel: str, generation: str) -> Options:
    return SPACE[kernel]


def pressure(case: Case) -> int:
    """How likely registers are short."""
    columns = case.get("columns", 16)
    named = ("dropout", "hidden_dropout", "keep", "sum", "bias", "dsum", "position", "smoothed")
    odd = columns & (columns - 1) > 0
    return 2 * (case.get("runs") is False) + odd + sum(bool(case.get(name)) for name in named)


KERNELS = Kernels(tuple(SPACE), options, is_reached, variant_of, pressure, TOGETHER)

if __name__ == "__main__":
    main(KERNELS, *sys.argv[1:3])
