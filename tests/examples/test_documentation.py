"""Code on documentation pages runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_every_block_of_the_transformer_page_runs_in_order():
    page = (ROOT / "docs" / "transformer.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 5
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "docs/transformer.md", "exec"), namespace)


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text(encoding="utf-8"))
    assert not [link for link in links if not ((ROOT / page).parent / link).exists()]


def test_the_readme_lists_every_op_and_no_implementation_that_there_is_not():
    import detr_fast.ops
    from detr_fast.dispatch import _ops

    listed = {}
    for names, implementations in re.findall(
        r"^\| (`ops\..*?) \| (.*?) \|", (ROOT / "README.md").read_text(), re.MULTILINE
    ):
        listed |= dict.fromkeys(re.findall(r"`ops\.(\w+)`", names), implementations.split(", "))
    public = {name: op for name, op in _ops.items() if hasattr(detr_fast.ops, name)}  # models bring some of their own
    assert listed.keys() == public.keys()
    for name, op in public.items():
        assert set(listed[name]) <= {i.name for i in op.implementations}, name


def test_every_command_that_the_pages_show_has_the_options_that_they_show():
    from typer.main import get_command

    from detr_fast.cli import app

    commands = get_command(app).commands
    shown = 0
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for name, rest in re.findall(r"detr-fast ([a-z-]+)([^\n`#]*)", text):
            if name not in commands:
                continue
            known = {
                option for parameter in commands[name].params for option in (*parameter.opts, *parameter.secondary_opts)
            }
            assert not [o for o in re.findall(r"(?<= )--[a-z-]+", rest) if o not in known], (page.name, name, rest)
            shown += 1
    assert shown > 10
