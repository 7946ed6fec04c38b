"""Compile what calls of attention reach in 16 bits, over pairs of its features, and list what spills; needs no GPU.

    python -m benchmarks.attention_spills sm_80,sm_90 spills.csv    # some 2 s a program and core; goes on where the file ends

A line of the file is the program, the target, registers and bytes spilled a thread. Those with many features and head dimensions that
fill no power of two, which are short of registers, come first. tests/kernels/test_options.py compiles a few of all ops' programs in each run.
"""

from __future__ import annotations

import csv
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from detr_fast.kernels.attention import forward_variant
from detr_fast.kernels.attention_backward import keys_variant, mask_variant, queries_variant
from detr_fast.kernels.attention_backward_atomics import rows_variant
from detr_fast.kernels.attention_catalog import GENERATIONS
from detr_fast.kernels.attention_copies import copy_variant
from detr_fast.kernels.attention_problem import Form
from detr_fast.kernels.attention_split import combine_variant
from detr_fast.kernels.attention_weights import weights_variant
from detr_fast.kernels.launch import Variant
from detr_fast.kernels.offline import compile_variant

Case = dict[str, Any]

DTYPES = torch.bfloat16, torch.float16
DIMS = (8, 16, 24, 32, 40, 48, 64, 96, 128)  # with atomics up to 64
ATOMIC_DIMS = DIMS[:7]
# A mask's dtype (None: q's) and the elements that are loaded at once.
BOOL, FP32 = torch.bool, torch.float32
BOOLS = (BOOL, 1), (BOOL, 4), (BOOL, 16)
FLOATS = (None, 1), (None, 2), (None, 8), (FP32, 1), (FP32, 2), (FP32, 4)
SWITCH = (False, True)
COMMON: dict[str, tuple[Any, ...]] = {
    "dtype": DTYPES,
    "dim": DIMS,
    "value_dim": ("same", "less", "more"),
    "keys": ("plain", "padding", "packed"),
    "mask": ((), *BOOLS, *FLOATS),
    "causal": SWITCH,
    "dropout": SWITCH,
}
SPACE: dict[str, dict[str, tuple[Any, ...]]] = {
    "keys": COMMON,
    "keys with atomics": COMMON | {"dim": ATOMIC_DIMS},
    "mask": COMMON | {"mask": FLOATS, "shared": ("no", "rows", "columns", "both")},
    "forward": COMMON | {"split": SWITCH},
    "queries": COMMON | {"dlse": SWITCH, "exact": SWITCH, "split": SWITCH},
    "weights": COMMON
    | {"value_dim": ("same",), "keys": ("plain", "padding"), "averaged": SWITCH, "fp32": SWITCH, "run": (1, 2, 4, 8)},
    "rows": {"dtype": DTYPES, "dim": ATOMIC_DIMS, "value_dim": COMMON["value_dim"], "packed": SWITCH, "dlse": SWITCH},
    "combine": {"dtype": DTYPES, "dim": DIMS, "packed": SWITCH, "lse": SWITCH},
    "copy": {"dtype": DTYPES, "block": (16, 32, 64, 128), "count": (1, 2, 3, 4, 5)},
}
FEW = ("forward", "queries", "keys", "keys with atomics")  # have other tiles on sm_90 where queries or keys are few


def is_reached(kernel: str, case: Case) -> bool:
    """Whether a call may have these features together."""
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


def cover(kernel: str, generation: str) -> Iterator[Case]:
    """Cases that hold every two values of two features that a call may have together, at least once."""
    options = SPACE[kernel] | ({"few": SWITCH} if generation == "hopper" and kernel in FEW else {})
    dice = random.Random(f"{kernel} {generation}")
    missing = {((a, v), (b, w)) for a, b in combinations(options, 2) for v in options[a] for w in options[b]}
    in_vain = 0
    while missing and in_vain < 60:
        order = sorted(missing, key=repr)  # of a set it is another in each process
        drawn: list[Case] = []
        while len(drawn) < 60:
            case = {name: dice.choice(values) for name, values in options.items()}
            case |= dict(dice.choice(order)) if dice.random() < 0.7 else {}
            if is_reached(kernel, case):
                drawn.append(case)
        best = max(drawn, key=lambda one: (len(missing.intersection(combinations(one.items(), 2))), pressure(one)))
        found = missing.intersection(combinations(best.items(), 2))
        in_vain = 0 if found else in_vain + 1
        missing -= found
        if found:
            yield best


def programs(targets: list[str]) -> Iterator[tuple[str, str, Variant]]:
    """(name, target, variant), kernels and targets by turns."""
    sources = [(kernel, target, cover(kernel, GENERATIONS[target])) for kernel in SPACE for target in targets]
    seen: set[tuple[Variant, str]] = set()
    while sources:
        for source in list(sources):
            kernel, target, cases = source
            case = next(cases, None)
            if case is None:
                sources.remove(source)
                continue
            variant = variant_of(kernel, case, GENERATIONS[target])
            if (variant, target) not in seen:
                seen.add((variant, target))
                features = " ".join(f"{name}={value}".replace("torch.", "") for name, value in case.items())
                yield f"{kernel} {features}", target, variant


def main(targets: list[str], path: Path) -> None:
    known = {tuple(row[:2]) for row in csv.reader(path.open())} if path.exists() else set()
    with path.open("a", buffering=1) as file, tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        for name, target, variant in programs(targets):
            if (name, target) not in known:
                resources = compile_variant(variant, target)[2]
                csv.writer(file).writerow((name, target, resources.registers, resources.spills))
                if resources.spills:
                    print(f"{target} {name}: {resources.spills} bytes a thread")
            shutil.rmtree(cache, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1].split(","), Path(sys.argv[2]))
