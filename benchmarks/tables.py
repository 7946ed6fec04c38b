"""Times as tables: of a training step, of what a layer launches, and of every case, those of one kind together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

HOW = {"wall": "launched eagerly", "graph": "in a CUDA graph", "gpu": "the GPU alone"}  # what is timed
STEP = "DETR-R50 training step"
LOSSES = tuple(f"transformers' {name} loss" for name in ("DETR", "RT-DETR", "D-FINE", "LW-DETR", "Grounding DINO"))
PEAKS = "peak memory of a training step, beside the model's own"
LAUNCHES = "kernels in one "
OURS = ("auto", "triton", "chunked", "uncaptured", "copy")  # and what begins so: no alternative
LEGEND = (
    "Milliseconds, medians; the fastest in bold. **In a CUDA graph**: calls that one graph replays, with a warm L2 cache. "
    "**Launched eagerly**: calls one after the other, at small sizes the host's time. **The GPU alone**: one call with a cold L2 "
    "cache. **MiB**: the most memory that a call takes beyond what was there before it, what it returns and keeps for backward "
    "included. `auto` is what users get; `triton`, `triton_atomics`, … are kernels asked for by name; `copy` moves as many bytes as "
    "the operation must, and computes nothing."
)


def times_of(entry: Mapping[str, Any], kind: str) -> dict[str, float]:
    return {name: peer[kind] for name, peer in entry["peers"].items() if kind in peer}


def kind(case: str) -> str:
    """A case's name without its sizes: "attention, heads of 32, padding, inference"."""
    name, _, rest = case.partition(" (")
    sizes, _, how = rest.partition(")")
    if name == "attention":
        if sizes.count(",") < 4:
            return "attention that returns its weights"
        name += ", heads of 32" if sizes.endswith(", 32") else ", larger heads"
    for word in ("DETR's losses", "DETR's focal losses", "matcher and criterion", STEP, *LOSSES):
        if name.startswith(word):
            name, how = word, ", forward and backward" if "backward" in case else ""
    if name in ("encoder layer", "decoder layer"):
        how = ""
    how = ", " + how.partition(", ")[2] if ", " in how else how.removeprefix(" bf16")
    return (name + how).replace(", forward and backward", "").replace(", forward", ", inference")


def number(value: float) -> str:
    """Three digits, the last of which may be 0."""
    return f"{value:#.3g}".rstrip(".") if value < 999.5 else f"{value:.0f}"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = ["", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def training_step(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of each peer its time, its rate and its memory, fastest first."""
    step = next((e for e in entries if "peers" in e and e["case"].startswith(STEP)), None)
    if step is None:
        return []
    peaks: Mapping[str, float] = next((e[PEAKS] for e in entries if PEAKS in e), {})
    names = {
        "auto": "detr-fast, as it is run: a CUDA graph",
        "auto, packed": "the same, padding left out of the encoder",
        "uncaptured": "detr-fast, launched eagerly",
        "auto, Hugging Face's": "Hugging Face's, accelerated, in a CUDA graph",
        "auto, Hugging Face's, uncaptured": "Hugging Face's, accelerated, launched eagerly",
        "huggingface": "Hugging Face's, eager",
        "torch.compile": "Hugging Face's, torch.compile",
    }
    rows = []
    for name, ms in sorted(times_of(step, "wall").items(), key=lambda item: item[1]):
        peak = peaks.get(f"{name}, GiB")
        rate = f"{step['images'] / ms * 1e3:.0f}" if step.get("images") else ""
        rows.append((names.get(name, name), number(ms), rate, "" if peak is None else f"{peak:.2f}"))
    title = step["case"].replace("DETR", "a DETR", 1)
    columns = (title, "ms", "images a second", "peak memory beside the model's own, GiB")
    return table(columns, rows)


def launches(facts: Iterable[Mapping[str, Any]]) -> list[str]:
    """Kernels of a layer, forward + backward, by whom."""
    found: dict[str, dict[str, str]] = {}
    for fact in facts:
        for title, value in fact.items():
            if title.startswith(LAUNCHES):
                layer, _, whose = title.removeprefix(LAUNCHES).partition(" layer in training, forward + backward, ")
                found.setdefault(whose, {})[layer] = value
    layers = sorted({layer for one in found.values() for layer in one}, reverse=True)
    rows = [(whose, *(one.get(layer, "") for layer in layers)) for whose, one in found.items()]
    columns = ("kernels in one layer in training, forward + backward", *(f"{layer} layer" for layer in layers))
    return table(columns, rows) if rows else []


def all_times(cases: Iterable[Mapping[str, Any]]) -> list[str]:
    """Every case, below the name of its kind: a row for each way of timing, a column for each peer."""
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for entry in cases:
        if any(times_of(entry, way) for way in HOW):
            kinds.setdefault(kind(entry["case"]), []).append(entry)
    lines = ["", "## All times", "", LEGEND] if kinds else []
    for name, entries in kinds.items():
        peers = list(dict.fromkeys(peer for entry in entries for way in HOW for peer in times_of(entry, way)))
        peers.sort(key=lambda peer: (not peer.startswith(OURS), peer == "copy", peer != "auto"))
        rows = [row for entry, label in zip(entries, labels(entries)) for row in _rows(entry, label, peers)]
        lines += ["", f"### {name}", *table(("case", "timed", *peers), rows)]
    return lines


def labels(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """What tells the cases of one kind apart: their sizes and, where that differs, what is said behind them."""
    parts = []
    for entry in entries:
        _, found, rest = entry["case"].partition(" (")
        sizes, _, how = rest.partition(")")
        parts.append((f"({sizes})", how) if found else (entry["case"], ""))
    same = len({how for _, how in parts}) == 1
    return [sizes if same else sizes + how for sizes, how in parts]


def _rows(entry: Mapping[str, Any], label: str, peers: Sequence[str]) -> list[list[str]]:
    rows = []
    for way in ("graph", "wall", "gpu"):
        times = times_of(entry, way)
        if not times:
            continue
        least = min((ms for name, ms in times.items() if name != "copy"), default=0.0)
        shown = {name: f"**{number(ms)}**" if ms == least else number(ms) for name, ms in times.items()}
        title = HOW[way]
        if way == "gpu" and entry.get("moves"):
            own = next((times[name] for name in ("triton", "auto") if name in times), 0.0)
            title += f" ({entry['moves'] / own / 1e6:.0f} GB/s)" if own else ""
        auto = entry["peers"].get("auto", {})
        if way == "wall" and "auto" in shown and "host" in auto:
            without = f"; from Python {number(auto['wall from Python'])}" if "wall from Python" in auto else ""
            shown["auto"] += f" ({auto['host']}{without})"
        rows.append([label, title, *(shown.get(peer, "") for peer in peers)])
    if not entry.get("is_graph", not entry.get("in_graphs", True)):  # a graph's own memory is not in it
        memory = times_of(entry, "MiB")
        rows.append([label, "MiB", *(f"{memory[peer]:.0f}" if peer in memory else "" for peer in peers)])
    return rows
