"""What `layer_spills` enumerates: the features that calls of each kernel have, and which of them a call may have together."""

from __future__ import annotations

from collections.abc import Callable
from math import gcd

import torch
from detr_fast.kernels import gated

from benchmarks.spills import Case, Options

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
    pairs = pairs_of(case)
    unit = gcd(2 * pairs if case["interleaved"] else pairs, case["columns"], 16 // case["dtype"].itemsize)
    return pairs > 0 and unit % case["run"] == 0


def pairs_of(case: Case) -> int:
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


def pressure(case: Case) -> int:
    """How likely registers are short."""
    columns = case.get("columns", 16)
    named = ("dropout", "hidden_dropout", "keep", "sum", "bias", "dsum", "position", "smoothed")
    odd = columns & (columns - 1) > 0
    return 2 * (case.get("runs") is False) + odd + sum(bool(case.get(name)) for name in named)
