"""`detr-fast demo`: the main job on data made on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    quick: Annotated[bool, typer.Option("--quick", help="About a minute in all: too short to detect well.")] = False,
    out: Annotated[Path, typer.Option("--out", help="The run folder; an earlier demo's files are replaced.")] = Path(
        "runs/demo"
    ),
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = "auto",
    seed: Annotated[int, typer.Option("--seed", help="Of pictures, weights and order.")] = 0,
) -> None:
    """Generate pictures of shapes, train a small DETR on them, evaluate it and draw what it finds.

    Needs no download and no GPU: about six minutes on two CPU cores.
    """
    import dataclasses
    import os
    import shlex
    import shutil
    import sys

    from rich.console import Console
    from rich.table import Table

    from detr_fast.cli.explain import summarize_choices
    from detr_fast.cli.progress import ProgressReporter, progress_bar, speed
    from detr_fast.engine.demo import compare_with_torch, demo_config, make_scenes, scene_counts
    from detr_fast.engine.trainer import train

    console = Console(width=None if os.isatty(1) else 120, markup=False)  # a [bracket] in a path is no style
    config = dataclasses.replace(demo_config(out, quick=quick, seed=seed), device=device)  # type: ignore[arg-type]
    with progress_bar(console, "pictures") as progress:
        make_scenes(config, quick, progress)
    console.print(f"pictures and annotations in {config.data}", highlight=False, soft_wrap=True)
    with ProgressReporter(console) as reporter:
        result = train(config, overwrite=True, reporter=reporter)
    with console.status("measuring beside plain torch.nn layers"):
        where = next(result.model.parameters()).device
        comparison = compare_with_torch(result.config, where, rounds=2 if quick else 4)
        choices = summarize_choices(result.model, result.config, where)

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("AP, AP50", f"{result.metrics['AP']:.3f}, {result.metrics['AP50']:.3f} on the validation images")
    minutes, seconds = divmod(round(result.seconds), 60)
    table.add_row(
        "training", f"{result.steps} steps in {minutes} min {seconds:02d} s, {speed(result.images_per_second)}"
    )
    table.add_row("speed", str(comparison))
    for number, line in enumerate(choices):
        table.add_row("what ran" if number == 0 else "", line)
    run = result.run
    table.add_row("look at", f"{run.predictions}, {run.curves}")
    command = "detr-fast" if shutil.which("detr-fast") else shlex.quote(os.path.relpath(sys.argv[0]))  # of `make demo`
    paths = [shlex.quote(str(path)) for path in (run.path, f"{config.data}/images")]
    table.add_row("next", f"{command} predict {' '.join(paths)} --out predictions")
    console.print()
    console.print(table, highlight=False)
    if quick:
        full = demo_config(out)
        steps = full.epochs * (scene_counts(quick=False)[0] // full.batch_size)
        console.print(f"This was the short look, of {result.steps} steps; without --quick it takes {steps:,}.")
