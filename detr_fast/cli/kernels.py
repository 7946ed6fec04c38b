"""`detr-fast kernels`: compile the kernels for any GPU, without one, and list what each program uses."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

COLUMNS = (
    "target",
    "name",
    "registers",
    "spills",
    "shared_memory",
    "warps",
    "occupancy",
    "instructions_per_element",
    "bound",
)
TITLES = ("target", "kernel", "registers", "spills", "shared", "warps", "occupancy", "instr./element", "bound by")


def kernels(
    target: Annotated[
        list[str] | None,
        typer.Option(help="GPU architecture, such as sm_90 or gfx942; may be given several times. Default: all."),
    ] = None,
    op: Annotated[str | None, typer.Option(help="Only this op's kernels, such as layer_norm.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for machine code (.cubin, .hsaco), assembly (.ptx, .amdgcn) and index.json."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the index as JSON.")] = False,
) -> None:
    """Compile every kernel that ships, with no GPU needed: registers, spills, shared memory, occupancy and bound.

    Ends with status 1 where a kernel does not compile.
    """
    import json

    from detr_fast.engine.errors import EngineError
    from detr_fast.kernels.catalog import TARGETS, entries
    from detr_fast.kernels.offline import compile_catalog, describe, over_budget

    try:
        chosen = entries(op)
        results = compile_catalog(chosen, target or list(TARGETS))
    except (ValueError, ImportError, RuntimeError) as error:
        raise EngineError(str(error)) from None
    by_name = {one.name: one for one in chosen}
    if not as_json:  # spills and shared memory in bytes
        print(_line(dict(zip(COLUMNS, TITLES))))
    index = []
    for compiled in results:
        record = describe(by_name[compiled.name], compiled)
        index.append(record)
        if compiled.error is not None:
            typer.echo(f"Error: {compiled.error}", err=True)
            continue
        for exceeded in over_budget(by_name[compiled.name], compiled):
            typer.echo(f"Warning: {exceeded}", err=True)
        if not as_json:
            print(_line(record))
        if out is not None:
            _write(out, compiled.name, compiled.target, compiled.binary, compiled.assembly)
    text = json.dumps(index, indent=1)
    if as_json:
        print(text)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "index.json").write_text(text)
    if any("error" in record for record in index):
        raise typer.Exit(1)


def _write(out: Path, name: str, target: str, binary: bytes, assembly: str) -> None:
    folder = out / target
    folder.mkdir(parents=True, exist_ok=True)
    code, text = ("cubin", "ptx") if target.startswith("sm_") else ("hsaco", "amdgcn")
    (folder / f"{name}.{code}").write_bytes(binary)
    (folder / f"{name}.{text}").write_text(assembly)


def _line(record: Mapping[str, object]) -> str:
    """One row of the table: the kernel to the left, figures to the right; a variant over its budget says so."""
    cells = [str(record.get(column, "")) for column in COLUMNS]
    numbers = "".join(f"{cell:>{len(title) + 2}}" for cell, title in zip(cells[2:], TITLES[2:]))
    return f"{cells[0]:7} {cells[1]:44}{numbers}" + ("  OVER BUDGET" if record.get("over_budget") else "")
