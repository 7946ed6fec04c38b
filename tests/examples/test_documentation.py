"""Code on documentation pages runs."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_block_of_the_transformer_page_runs_in_order():
    page = (ROOT / "docs" / "transformer.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 5
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "docs/transformer.md", "exec"), namespace)


def test_links_of_the_transformer_page_lead_somewhere():
    page = ROOT / "docs" / "transformer.md"
    links = re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8"))
    assert links
    assert not [link for link in links if not (page.parent / link).exists()]
