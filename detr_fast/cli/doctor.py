"""`detr-fast doctor`: what is wrong with a data set, and a repaired copy of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def doctor(
    data: Annotated[Path, typer.Argument(help="A COCO-format folder.")],
    fix: Annotated[Path | None, typer.Option("--fix", help="Write a repaired copy into this new folder.")] = None,
    page: Annotated[
        Path | None, typer.Option("--page", help="Draw a page of figures and pictures (PNG) into this file.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Figures and findings as JSON.")] = False,
) -> None:
    """Examine a data set before training: every record and every image. Exit status 1 if it has errors."""
    import json

    from rich.console import Console

    from detr_fast.cli.progress import progress_bar
    from detr_fast.data import doctor as examination
    from detr_fast.data.words import counted
    from detr_fast.engine.run_folder import explained

    with progress_bar(Console(stderr=True), "images") as progress:
        report = examination.examine(data, progress)
    print(json.dumps(report.to_dict(), indent=1) if as_json else report.text())
    if page is not None:
        with explained(page, option="--page"):
            report.draw(page)
        typer.echo(f"drew {page}", err=True)
    if fix is not None:
        removed = examination.fix(data, fix)
        for split, counts in removed.items():
            left_out = " and ".join(
                counted(counts[kind], noun) for kind, noun in (("images", "image"), ("boxes", "box"))
            )
            typer.echo(f"{fix}, {split}: left out {left_out}", err=True)
    elif not report.healthy:
        raise typer.Exit(1)
