"""What `make gpu` does with the example call of every catalog entry, beside tests and benchmarks.

python benchmarks/kernel_calls.py once               # one call of each kernel: what a sanitizer watches
python benchmarks/kernel_calls.py graphs             # no host synchronisation, and the same results from a CUDA graph
python benchmarks/kernel_calls.py profile FOLDER     # trace.json.gz, and profile.svg: when the GPU works and when it waits
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from detr_fast.kernels.catalog import CATALOG, Entry
from torch import Tensor

DEVICE = torch.device("cuda")
WIDTH, ROW = 1200, 14  # of the picture, in pixels


def examples(by: Callable[[Entry], object]) -> list[Entry]:
    """The first entry of each `by`: of each kernel, or of each distinct example."""
    first: dict[object, Entry] = {}
    for one in CATALOG:
        first.setdefault(by(one), one)
    return list(first.values())


def once() -> int:
    for one in examples(lambda one: one.variant.name):
        one.example(DEVICE)()
        torch.cuda.synchronize()
        print(f"{one.name}: ran", flush=True)
    return 0


def graphs() -> int:
    """Status 1 where a call waits for the host, can't be captured, or gives other results when replayed."""
    failed = 0
    for one in examples(lambda one: one.example):
        try:
            problem = _captured(one)
        except Exception as error:  # each example is judged alone
            problem = (
                f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
            )
        failed += problem is not None
        print(f"{one.name}: ok" if problem is None else f"FAILED {one.name}: {problem}", flush=True)
    return 1 if failed else 0


def _captured(one: Entry) -> str | None:
    call = one.example(DEVICE)
    expected = [t.clone() for t in call()]  # compiles, too
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()
    graph.replay()
    graph.replay()
    torch.cuda.synchronize()
    wrong = sum(not _agree(a, b) for a, b in zip(outputs, expected))
    return f"{wrong} of {len(expected)} outputs differ when replayed" if wrong else None


def _agree(found: Tensor, expected: Tensor) -> bool:
    """Equal, up to the order of atomic additions."""
    if found.is_meta or not found.is_floating_point():
        return found.is_meta or torch.equal(found, expected)
    return torch.allclose(found.float(), expected.float(), rtol=2e-2, atol=1e-2, equal_nan=True)


def profile(folder: Path) -> int:
    step = training_step()
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        step()
        torch.cuda.synchronize()
    profiler.export_chrome_trace(str(folder / "trace.json.gz"))
    spans = [
        (event.name, float(event.time_range.start), float(event.time_range.end))
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    (folder / "profile.svg").write_text(picture(spans))
    busy, total = busy_time(spans)
    print(f"{len(spans)} kernels in one step of DETR's transformer; the GPU works {busy:.0f} of {total:.0f} µs")
    return 0


def training_step() -> Callable[[], None]:
    """Forward, backward and optimizer of DETR's transformer (6 + 6 layers) on 2 × 850 tokens and 100 queries, in bf16."""
    from detr_fast import nn

    model = nn.Transformer(256, 8, 6, 6, 2048, 0.1, batch_first=True, device=DEVICE, dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    source, queries = (torch.randn(2, length, 256, device=DEVICE, dtype=torch.bfloat16) for length in (850, 100))

    def step() -> None:
        out = model(source, queries)
        out.backward(torch.ones_like(out))
        optimizer.step()
        optimizer.zero_grad()

    return step


def busy_time(spans: Iterable[tuple[str, float, float]]) -> tuple[float, float]:
    """Microseconds in which at least one kernel ran, and from the first's start to the last's end."""
    ordered = sorted((start, end) for _, start, end in spans)
    if not ordered:
        return 0.0, 0.0
    busy, reached = 0.0, ordered[0][0]
    for start, end in ordered:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return busy, reached - ordered[0][0]


def picture(spans: list[tuple[str, float, float]]) -> str:
    """A timeline as SVG: one row per kind of kernel, the longest in all first; blanks are where the GPU waits."""
    totals: dict[str, float] = {}
    for name, start, end in spans:
        totals[name] = totals.get(name, 0.0) + end - start
    first = min((start for _, start, _ in spans), default=0.0)
    scale = WIDTH / max(1e-9, max((end for *_, end in spans), default=1.0) - first)
    rows = {name: index for index, name in enumerate(sorted(totals, key=lambda name: -totals[name])[:40])}
    boxes = "".join(_box(name, rows, (start - first) * scale, (end - start) * scale) for name, start, end in spans)
    labels = "".join(
        f'<text x="{WIDTH + 8}" y="{index * ROW + 11}">{_escaped(name[:80])} {totals[name]:.0f} µs</text>'
        for name, index in rows.items()
    )
    size = f'width="{WIDTH + 640}" height="{len(rows) * ROW + 4}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="monospace" font-size="10">{boxes}{labels}</svg>\n'
    )


def _box(name: str, rows: Mapping[str, int], x: float, width: float) -> str:
    if name not in rows:
        return ""
    return f'<rect x="{x:.2f}" y="{rows[name] * ROW}" width="{max(width, 0.3):.2f}" height="{ROW - 2}" fill="#4477aa"/>'


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def main(arguments: list[str]) -> int:
    torch.manual_seed(0)
    if arguments[:1] == ["once"]:
        return once()
    if arguments[:1] == ["graphs"]:
        return graphs()
    if arguments[:1] == ["profile"] and len(arguments) == 2:
        return profile(Path(arguments[1]))
    print(__doc__)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
