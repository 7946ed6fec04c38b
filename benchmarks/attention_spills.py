"""Compile what calls of attention reach in 16 bits, over pairs of its features, and list what spills; needs no GPU.

    python -m benchmarks.attention_spills sm_80,sm_90 spills.csv    # some 2 s a program and core; goes on where the file ends

A line of the file is the program, the target, registers and bytes spilled a thread. Those with many features and head dimensions that
fill no power of two, which are short of registers, come first. tests/kernels/test_options.py compiles a few of all ops' programs in each run.
"""

from __future__ import annotations

import sys

import torch
from detr_fast.kernels.attention import forward_variant
from detr_fast.kernels.attention_backward import keys_variant, mask_variant, queries_variant
from detr_fast.kernels.attention_backward_atomics import rows_variant
from detr_fast.kernels.attention_copies import copy_variant
from detr_fast.kernels.attention_problem import Form
from detr_fast.kernels.attention_split import combine_variant
from detr_fast.kernels.attention_weights import weights_variant
from detr_fast.kernels.launch import Variant

from benchmarks.spills import Case, Kernels, Options, main

DTYPES = torch.bfloat16, torch.float16
DIMS = (8, 16, 24, 32, 40, 48, 64, 96, 128)  # with atomics up to 64
ATOMIC_DIMS = DIMS[:7]
# A mask's dtype (None: q's) and the elements that are loaded at once.
BOOL, FP32 = torch.bool, torch.float32
BOOLS = (BOOL, 1), (BOOL, 4), (BOOL, 16)
FLOATS = (None, 1), (None, 2), (None, 8), (FP32, 1), (FP32, 2), (FP32, 4)
SWITCH = (False, True)
COMMON: Options = {
    "dtype": DTYPES,
    "dim": DIMS,
    "value_dim": ("same", "less", "more"),
    "keys": ("plain", "padding", "packed"),
    "mask": ((), *BOOLS, *FLOATS),
    "causal": SWITCH,
    "dropout": SWITCH,
    "again": SWITCH,  # whether the mask's batch elements come again
}
SPACE: dict[str, Options] = {
    "keys": COMMON,
    "keys with atomics": COMMON | {"dim": ATOMIC_DIMS},
    "mask": COMMON | {"mask": FLOATS, "shared": ("no", "rows", "columns", "both")},
    "forward": COMMON | {"split": SWITCH, "short": SWITCH},  # short: a window of few queries
    "queries": COMMON | {"dlse": SWITCH, "exact": SWITCH, "split": SWITCH, "short": SWITCH},
    "weights": COMMON
    | {"value_dim": ("same",), "keys": ("plain", "padding"), "averaged": SWITCH, "fp32": SWITCH, "run": (1, 2, 4, 8)},
    "rows": {"dtype": DTYPES, "dim": ATOMIC_DIMS, "value_dim": COMMON["value_dim"], "packed": SWITCH, "dlse": SWITCH},
    "combine": {"dtype": DTYPES, "dim": DIMS, "packed": SWITCH, "lse": SWITCH},
    "copy": {"dtype": DTYPES, "block": (16, 32, 64, 128), "count": (1, 2, 3, 4, 5)},
}
FEW = ("forward", "queries", "keys", "keys with atomics")  # have other tiles on sm_90 where queries or keys are few


def is_reached(kernel: str, case: Case) -> bool:
    """Whether a call may have these features together."""
    if (case.get("again") or case.get("short")) and not case["mask"]:
        return False
    if case.get("again") and case["keys"] == "packed":
        return False
    if kernel == "queries" and case["exact"]:
        return bool(case["mask"]) and case["mask"][0] is not BOOL and not case["split"]
    if kernel == "mask" and case["shared"] in ("columns", "both"):
        return case["mask"][1] == 1
    return not (kernel == "weights" and case["fp32"] and case["run"] > 4) and not (
        case.get("few") is False and case.get("split")
    )


def variant_of(kernel: str, case: Case, generation: str) -> Variant:
    dtype = case["dtype"]
    if kernel == "copy":
        return copy_variant(dtype, case["count"], case["block"])
    dim, dims = case["dim"], ATOMIC_DIMS if kernel in ("keys with atomics", "rows") else DIMS
    place = dims.index(dim)
    other = {"same": place, "less": max(place - 1, 0), "more": min(place + 2, len(dims) - 1)}
    form = Form(
        dtype, dim, dims[other[case.get("value_dim", "same")]], packed=_is(case, "packed"), generation=generation
    )
    if kernel == "combine":
        return combine_variant(form, dim, case["lse"])
    if kernel == "rows":
        return rows_variant(form, case["dlse"])
    mask, run = case["mask"] or (None, 1)
    if case.get("shared") in ("columns", "both"):  # no neighbours
        run = 0
    form = Form(
        dtype,
        dim,
        form.value_dim,
        padding=case["keys"] == "padding",
        mask=(mask or dtype) if case["mask"] else None,
        causal=case["causal"],
        dropout=case["dropout"],
        packed=form.packed,
        mask_vector=run,
        few_queries=case.get("few", False),
        few_keys=case.get("few", False),
        generation=generation,
        periodic=case["again"],
        short=case.get("short", False),
    )
    if kernel == "forward":
        return forward_variant(form, case["split"])
    if kernel == "queries":
        return queries_variant(form, case["dlse"], case["split"], case["exact"])
    if kernel == "mask":
        return mask_variant(form, case["shared"] in ("rows", "both"), case["shared"] in ("columns", "both"))
    if kernel == "weights":
        return weights_variant(form, case["averaged"], FP32 if case["fp32"] else dtype, case["run"])
    return keys_variant(form, kernel == "keys with atomics")


def _is(case: Case, name: str) -> bool:
    return bool(case.get(name)) or case.get("keys") == name


def pressure(case: Case) -> int:
    """How likely registers are short."""
    odd = case.get("dim") in (24, 40, 48, 96)
    different = case.get("value_dim", "same") != "same"
    named = (bool(case.get(name)) for name in ("mask", "causal", "dropout"))
    return sum((odd, different, case.get("keys", "plain") != "plain", *named))


def options(kernel: str, generation: str) -> Options:
    return SPACE[kernel] | ({"few": SWITCH} if generation == "hopper" and kernel in FEW else {})


if __name__ == "__main__":
    main(Kernels(tuple(SPACE), options, is_reached, variant_of, pressure), *sys.argv[1:3])
