"""Where a DETR-R50 training step's time goes, and what a layer launches: facts for the report, and pictures.

python -m benchmarks.step_profile FOLDER

Writes to FOLDER trace.json.gz and profile.svg (three captured steps one after another: when the GPU works, and when it waits),
and to its measurements.jsonl: versions and clocks, what copies and matrix products reach here, the milliseconds of each part
of a step, how busy the GPU is, and how many kernels an encoder and a decoder layer take, by whom.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn as torch_nn

from benchmarks.hardware import DEVICE, REHEARSAL, sized
from benchmarks.test_step import BATCH, Pair, make_pair
from benchmarks.timing import compiled, first_line, record
from detr_fast import nn, use_backend

WIDTH, ROW, TOP = 1100, 14, 46  # of the picture, in pixels
OURS = re.compile("^[a-z0-9_]+_kernel$")
COLORS = {True: "#0b5fa5", False: "#9a9a9a"}  # of our kernels, and of PyTorch's and its libraries'
STEPS = sized(3, 1)
Span = tuple[str, float, float]  # a kernel's name, its start and its end in µs


def machine() -> dict[str, Any]:
    import triton

    told = {"torch": torch.__version__, "CUDA": torch.version.cuda, "triton": triton.__version__}
    told |= {"Python": platform.python_version(), "GPU": torch.cuda.get_device_name()}
    if shutil.which("nvidia-smi"):
        asked = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,temperature.gpu,power.draw,power.limit"
        command = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"]
        found = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip().split(", ")
        told |= {
            f"{name}, idle" if name == "clocks.sm" else name: value for name, value in zip(asked.split(","), found)
        }
    return told


def ceilings() -> dict[str, float]:
    """GB/s of a large copy, bytes read and written; TFLOP/s of a large bf16 product of random matrices."""
    size, side = sized((1 << 30, 8192), (1 << 10, 16))
    source, target = (torch.empty(size, dtype=torch.int8, device=DEVICE) for _ in range(2))
    a, b = (torch.randn(side, side, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    return {
        "copy, GB/s": 2 * size / _milliseconds(lambda: target.copy_(source)) / 1e6,
        "bf16 product, TFLOP/s": 2 * side**3 / _milliseconds(lambda: a @ b) / 1e9,
    }


def _milliseconds(call: Callable[[], object]) -> float:
    times = []
    for _ in range(sized(12, 2)):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return max(statistics.median(times), 1e-9)


def parts(pair: Pair) -> dict[str, float]:
    """The GPU's milliseconds in each part of a captured step, by events that are in its graph.

    Launched kernel by kernel, it would be the host's time: a queue of some thousand launches fills, and then waits for it.
    """
    model, captured = pair.ours, pair.captured_step(capture=True)
    run = pair.step_of(captured)
    events: list[tuple[str, Any]] = []

    def mark(name: str) -> Callable[..., None]:
        def now(*_: Any) -> None:
            event = torch.cuda.Event(enable_timing=True, external=True)
            event.record()
            events.append((name, event))

        return now

    optimizer, criterion = captured.optimizer, captured.criterion
    assert isinstance(criterion, torch.nn.Module)
    handles = [
        model.register_forward_pre_hook(mark("the step before")),
        model.backbone.register_forward_hook(mark("backbone")),
        model.transformer.encoder.register_forward_hook(mark("encoder")),
        model.transformer.decoder.register_forward_hook(mark("decoder")),
        model.register_forward_hook(mark("heads")),
        criterion.register_forward_hook(mark("matcher and losses")),
        optimizer.register_step_pre_hook(mark("backward and clipping")),
        optimizer.register_step_post_hook(mark("optimizer")),
    ]
    measured: dict[str, list[float]] = {}
    try:
        for number in range(sized(12, 4)):
            if not captured.graphs:
                events.clear()  # those of the last call before replays are the graph's
            run()
            torch.cuda.synchronize()
            if number > 2:
                for (_, start), (name, end) in pairwise(events):
                    measured.setdefault(name, []).append(start.elapsed_time(end))
    finally:
        for handle in handles:
            handle.remove()
    return {name: statistics.median(times) for name, times in measured.items()}


def profile(run: Callable[[], object], folder: Path) -> dict[str, float]:
    """Of some steps in a row: the GPU's busy time, all the time, and kernels; the trace and the picture go to `folder`."""
    for _ in range(sized(5, 1)):
        run()
    alone = _wall(run)
    with torch.profiler.profile(activities=_activities()) as profiler:
        watched = _wall(run)
    profiler.export_chrome_trace(str(folder / "trace.json.gz"))
    spans = kernels_of(profiler)
    (folder / "profile.svg").write_text(picture(spans))
    busy, total = busy_time(spans)
    return {
        "GPU busy, % (wanted: 95)": 100 * busy / max(total, 1e-9),
        "% of the time without a profiler, which may slow kernels": 100 * busy / STEPS / 1e3 / alone,
        "ms a step": alone,
        "under the profiler": watched,
        "kernels a step": len(spans) / STEPS,
    }


def _wall(run: Callable[[], object]) -> float:
    """Milliseconds of one of some steps in a row."""
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(STEPS):
        run()
    torch.cuda.synchronize()
    return (time.perf_counter() - begun) / STEPS * 1e3


def _activities() -> list[torch.profiler.ProfilerActivity]:
    kinds = torch.profiler.ProfilerActivity
    return [kinds.CPU] if REHEARSAL else [kinds.CPU, kinds.CUDA]


def kernels_of(profiler: torch.profiler.profile) -> list[Span]:
    """What ran on the GPU; not the names that the program gave to stretches of time, which are listed there, too."""
    return [
        (event.name, float(event.time_range.start), float(event.time_range.end))
        for event in profiler.events() or []
        if event.device_type == torch.autograd.DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]


LAYERS: dict[str, dict[str, str]] = {  # by whom, and with which implementations asked for
    "eager torch.nn": {},
    "torch.compile": {},
    "auto": {},
    "fewest": {"attention": "triton", "linear_add_layer_norm": "triton", "feed_forward": "triton_one_kernel"},
}


def launches(kind: str, backends: Mapping[str, str], name: str) -> str:
    """Kernels of one layer in training, forward and backward: `13 + 29`."""
    source = nn if name in ("auto", "fewest") else torch_nn
    settings: dict[str, Any] = {"batch_first": True, "device": DEVICE, "dtype": torch.bfloat16}
    layer = getattr(source, f"Transformer{kind.capitalize()}Layer")(*sized((256, 8, 2048), (32, 2, 48)), **settings)
    lengths = {"encoder": (850,), "decoder": (100, 850)}[kind]
    inputs = [
        torch.randn(2, sized(n, 6), sized(256, 32), device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        for n in lengths
    ]
    called = compiled(layer) if name == "torch.compile" else layer
    with use_backend(**backends):
        for _ in range(sized(2, 1)):  # compiles
            y = called(*inputs)
            y.backward(torch.ones_like(y))
        torch.cuda.synchronize()
        forward, y = _counted(lambda: called(*inputs))
        dy = torch.ones_like(y)
        for tensor in (*inputs, *layer.parameters()):
            tensor.grad = None  # or each gradient would be added to the last one, by a kernel of its own
        backward, _ = _counted(lambda: y.backward(dy))
    return f"{forward} + {backward}"


def _counted(call: Callable[[], Any]) -> tuple[int, Any]:
    with torch.profiler.profile(activities=_activities()) as profiler:
        result = call()
        torch.cuda.synchronize()
    return len(kernels_of(profiler)), result


def busy_time(spans: Iterable[Span]) -> tuple[float, float]:
    """Microseconds in which at least one kernel ran, and from the first's start to the last's end."""
    ordered = sorted((start, end) for _, start, end in spans)
    if not ordered:
        return 0.0, 0.0
    busy, reached = 0.0, ordered[0][0]
    for start, end in ordered:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return busy, reached - ordered[0][0]


def picture(spans: Sequence[Span], steps: int = STEPS) -> str:
    """A timeline as SVG: one row for each kernel, the longest in all first; where all rows are blank the GPU waits."""
    totals: dict[str, float] = {}
    for name, start, end in spans:
        totals[name] = totals.get(name, 0.0) + end - start
    first = min((start for _, start, _ in spans), default=0.0)
    total = max(1e-9, max((end for *_, end in spans), default=1.0) - first)
    scale, busy = WIDTH / total, busy_time(spans)[0]
    rows = {name: index for index, name in enumerate(sorted(totals, key=lambda name: -totals[name])[:40])}
    boxes = "".join(_box(name, rows, (start - first) * scale, (end - start) * scale) for name, start, end in spans)
    labels = "".join(
        f'<text x="{WIDTH + 12}" y="{TOP + index * ROW + 10}" fill="{COLORS[bool(OURS.match(name))]}">'
        f"{totals[name] / steps / 1e3:.3f}  {_escaped(short(name))}</text>"
        for name, index in rows.items()
    )
    height = TOP + len(rows) * ROW + 6
    every = max(1, round(total / 1e3 / 16))
    ticks = "".join(
        f'<path d="M{ms * 1e3 * scale:.1f} {TOP - 4}V{height - 4}" stroke="#e4e4e4"/>'
        f'<text x="{ms * 1e3 * scale + 2:.1f}" y="{TOP - 6}" fill="#666666">{ms} ms</text>'
        for ms in range(0, int(total / 1e3) + 1, every)
        if ms * 1e3 * scale < WIDTH - 40
    )
    title = (
        f"{steps} captured training steps one after the other: {total / 1e3:.2f} ms, in {100 * busy / total:.1f} % of which a kernel runs. "
        "One row for each kernel, of all the 40 that take longest."
    )
    legend = "".join(
        f'<rect x="{x}" y="20" width="9" height="9" fill="{COLORS[ours]}"/><text x="{x + 14}" y="28">{text}</text>'
        for x, ours, text in ((0, True, "detr-fast's kernels"), (150, False, "PyTorch's, cuDNN's and cuBLAS's"))
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH + 560}" height="{height}" font-family="monospace" font-size="10">'
        f'<rect width="100%" height="100%" fill="#ffffff"/><text x="0" y="12" font-size="12" font-weight="bold">{title}</text>'
        f'{legend}<text x="{WIDTH + 12}" y="{TOP - 6}">ms a step, kernel</text>{ticks}{boxes}{labels}</svg>\n'
    )


def short(name: str) -> str:
    """A kernel's name without what C++ puts around it, and cut."""
    name = re.sub(r"^void |at::native::|\(anonymous namespace\)::", "", name)
    return name if len(name) <= 76 else name[:75] + "…"


def _box(name: str, rows: Mapping[str, int], x: float, width: float) -> str:
    if name not in rows:
        return ""
    color = COLORS[bool(OURS.match(name))]
    place = f'x="{x:.2f}" y="{TOP + rows[name] * ROW}" width="{max(width, 0.3):.2f}" height="{ROW - 2}"'
    return f'<rect {place} fill="{color}"/>'


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def main(folder: Path) -> int:
    """Each fact on its own: one that fails is told, and the others go on. Status 1 if any failed."""
    os.environ["DETR_FAST_RESULTS"] = str(folder)
    torch.manual_seed(0)
    title = f"DETR-R50 training step, {BATCH} × 800×1066, bf16"
    facts: dict[str, Callable[[], Any]] = {
        "machine": machine,
        "ceilings": ceilings,
        f"{title}, captured": lambda: profile(make_pair().step("auto"), folder),
        f"{title}, the GPU's ms": lambda: parts(make_pair()),
    }
    for kind in ("encoder", "decoder"):
        for name, backends in LAYERS.items():
            fact = partial(launches, kind, backends, name)
            facts[f"kernels in one {kind} layer in training, forward + backward, {name}"] = fact
    failed = 0
    for name, told in facts.items():
        try:
            record({name: told()})
            print(f"{name}: ok", flush=True)
        except Exception as error:
            failed += 1
            print(f"FAILED {name}: {first_line(error)}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
