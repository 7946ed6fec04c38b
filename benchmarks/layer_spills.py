"""Compile what calls of all other ops than attention reach in 16 bits, over pairs of features, and list what spills; needs no GPU.

    python -m benchmarks.layer_spills sm_80,sm_90 spills.csv    # some 2 s a program and core; goes on where the file ends

As `attention_spills`. Rows that are read one element at a time or fill no power of two, and dropout, which take registers, come first.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

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

from benchmarks.layer_features import SPACE, TOGETHER, is_reached, pairs_of, pressure
from benchmarks.spills import Case, Kernels, Options, main


def _terms(case: Case) -> tuple[torch.dtype, torch.dtype, torch.dtype, torch.dtype]:
    """The dtypes of x, of the residual, of their sum, and of the norm's parameters and result."""
    half, kind = case["dtype"], case["residual"]
    x = torch.float32 if kind == "fp32 x" else half
    residual = torch.float32 if kind == "fp32" else half
    total = torch.promote_types(x, residual)
    return x, residual, total, torch.float32 if case["autocast"] else total


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
    dy, dx = torch.float32 if case["dy"] == "fp32" else case["dtype"], case["dtype"]
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
    x, dtype = case["dtype"], torch.float32 if case["autocast"] else case["dtype"]
    weight, bias = (dtype if case[name] else None for name in ("weight", "bias"))
    return layer_norm.forward_variant(case["columns"], x, weight, bias, dtype, _run(case, x, dtype), case["centred"])


def _layer_norm_backward(case: Case) -> Variant:
    x, dtype = case["dtype"], torch.float32 if case["autocast"] else case["dtype"]
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
    table = torch.float32 if case["angles"] == "fp32" else case["dtype"]
    turn = rotary.Turn(case["interleaved"], case["per_pair"], case["back"])
    shape = pairs_of(case), case["columns"], case["heads"]
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
    read = tuple(torch.float32 if case[name] == "fp32" else dtype for name in ("location", "weight", "reference"))
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
    "casts": lambda case: cast_together.cast_variant(*(torch.float32, case["dtype"])[:: -1 if case["widens"] else 1]),
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


KERNELS = Kernels(tuple(SPACE), options, is_reached, variant_of, pressure, TOGETHER)

if __name__ == "__main__":
    main(KERNELS, *sys.argv[1:3])
