"""Code on documentation pages runs, and what the pages say is so."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from textwrap import dedent

import pytest
import torch

ROOT = Path(__file__).parents[2]


PAGES = ("README.md", "CONTRIBUTING.md", *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")))

# What a page's first block takes as given.
GIVEN = {
    "docs/accelerate.md": """
        import torch

        class MyAttention(torch.nn.Module):
            pass

        class Detector(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.encoder = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
                self.mine = MyAttention()

            def forward(self, pixel_values, pixel_mask):
                return self.encoder(pixel_values, src_key_padding_mask=pixel_mask)

        model, images, mask = Detector(), torch.rand(2, 3, 16), torch.zeros(2, 3, dtype=torch.bool)
    """,
    "docs/emulator.md": """
        import torch

        from tests.testing.test_ptx import copy_kernel

        x, y, grid = torch.randn(300), torch.zeros(300), (2,)
    """,
    "docs/layers.md": """
        import torch

        from detr_fast import nn

        encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        model, batch = (lambda x: encoder(x).sum()), torch.rand(1, 3, 16)
    """,
    "docs/training-step.md": """
        import torch

        from detr_fast.data.batching import Batch
        from detr_fast.models.build import ModelConfig, build_criterion, build_model
        from detr_fast.models.structures import Targets, nested_tensor_from_list

        config = ModelConfig(backbone="conv", backbone_width=4, backbone_stride=32, num_classes=3, num_queries=4,
                             d_model=16, heads=2, encoder_layers=1, decoder_layers=1, feedforward=16)
        model, criterion = build_model(config), build_criterion(config)
        boxes = {"labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}
        loader = [Batch(nested_tensor_from_list([torch.rand(3, 64, 64)]), Targets.from_list([boxes], 2), [])]

        class scheduler:
            step = staticmethod(lambda: None)
    """,
}
# Likewise of the first block that asks for kernels: small, as the interpreter takes its time.
GIVEN_FOR_KERNELS = GIVEN | {
    "README.md": """
        import torch

        import detr_fast

        model, source, target = detr_fast.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), torch.rand(1, 3, 16), None
    """
}


def blocks_of(page: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def asks_for_kernels(block: str) -> bool:
    return '"triton"' in block


@pytest.fixture
def folder_of_data(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working directory holds what a page's blocks call my-data and photos."""
    from detr_fast.data import generate_scenes

    if any('"my-data"' in block for block in blocks_of(page)):
        generate_scenes(tmp_path / "my-data", train=8, val=2, size=40)
        (tmp_path / "photos").symlink_to(tmp_path / "my-data" / "images")
        monkeypatch.chdir(tmp_path)


def run_blocks(page: str, with_kernels: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """Run a page's blocks in order; comments that are lines of their own are what the line before them prints."""
    namespace: dict[str, object] = {"__name__": "page"}
    exec(dedent((GIVEN_FOR_KERNELS if with_kernels else GIVEN).get(page, "")), namespace)
    for block in blocks_of(page):
        if asks_for_kernels(block) != with_kernels:
            continue
        exec(compile(block, page, "exec"), namespace)
        printed = capsys.readouterr().out
        assert not [line for line in re.findall(r"^# (.*)$", block, re.MULTILINE) if line not in printed]


@pytest.mark.parametrize("page", [page for page in PAGES if not all(map(asks_for_kernels, blocks_of(page)))])
def test_every_block_of_a_page_runs_and_prints_what_it_says(page, capsys, folder_of_data):
    run_blocks(page, False, capsys)


@pytest.mark.interpreter
@pytest.mark.parametrize("page", [page for page in PAGES if any(map(asks_for_kernels, blocks_of(page)))])
def test_every_block_that_asks_for_kernels_runs(page, capsys):
    run_blocks(page, True, capsys)


def test_the_readmes_counts_are_those_of_the_pages_that_a_test_keeps():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    layers = (ROOT / "docs" / "layers.md").read_text(encoding="utf-8")
    step = (ROOT / "docs" / "training-step.md").read_text(encoding="utf-8")
    eager, ours = (
        [
            float(value.removesuffix(" %"))
            for value in re.search(rf"^\| .*\| {name} \| (.*) \|$", layers, re.MULTILINE)[1].split(" | ")
        ]
        for name in ("eager torch.nn", "`triton_recompute`")
    )
    assert f"{ours[0] + ours[1]:.0f} launches instead of torch.nn's {eager[0] + eager[1]:.0f}" in readme
    assert 0.24 < ours[2] / eager[2] < 0.26
    waits = re.search(r"^\| the original's .* \| (\d+):", step, re.MULTILINE)[1]
    assert f"0 times instead of {waits}" in readme


def prose_of(path: Path) -> str:
    return re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors_of(path: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", prose_of(path), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    dead = []
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", prose_of(ROOT / page)):
        file = (ROOT / page).parent / target if target else ROOT / page
        if not file.exists() or (anchor and anchor not in anchors_of(file)):
            dead.append(f"{target}#{anchor}")
    assert not dead


def test_the_readme_lists_every_op_and_no_implementation_that_there_is_not():
    import detr_fast.ops
    from detr_fast.dispatch import _ops

    listed = {}
    for names, implementations in re.findall(
        r"^\| (`ops\..*?) \| (.*?) \|", (ROOT / "README.md").read_text(), re.MULTILINE
    ):
        listed |= dict.fromkeys(re.findall(r"`ops\.(\w+)`", names), implementations.split(", "))
    public = {name: op for name, op in _ops.items() if name in detr_fast.ops.__all__}  # models bring some of their own
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


def test_every_page_is_listed_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    assert not [p.name for p in (ROOT / "docs").glob("*.md") if p.name != "README.md" and f"]({p.name})" not in index]


def test_every_public_op_says_its_shapes_its_errors_and_its_source():
    import detr_fast.ops

    silent = {}
    public = [n for n, f in vars(detr_fast.ops).items() if inspect.isfunction(f) and not n.startswith("_")]
    assert len(public) > 10
    for name in public:
        text = getattr(detr_fast.ops, name).__doc__ or ""
        said = {
            "shapes": re.search(r"\([\w…., ·+]*[A-Z]\w*\b.*?\)|Shapes|As `|same signature", text),
            "errors": re.search(r"Raises|errors", text),
            "source": re.search(r"arXiv:|[Ss]ources?|torch\.nn\.functional|F\.\w+\(|As `", text),
        }
        silent[name] = [what for what, found in said.items() if not found]
    assert not {name: missing for name, missing in silent.items() if missing}


def test_completion_offers_what_users_need_and_nothing_else():
    import detr_fast

    offered = {name for name in dir(detr_fast) if not name.startswith("__")}
    assert offered == {*detr_fast.__all__, *detr_fast._ROOMS}
    assert all(getattr(detr_fast, name) is not None for name in offered)


@pytest.mark.parametrize("room", ["detr_fast", *(f"detr_fast.{r}" for r in ("nn", "ops", "models", "data", "testing"))])
def test_every_public_name_is_there_documented_and_typed(room):
    module = importlib.import_module(room)
    public = {name: getattr(module, name) for name in module.__all__}
    ours = {n: v for n, v in public.items() if getattr(v, "__module__", "").startswith("detr_fast.")}
    assert len(ours) > 4
    assert not [name for name, value in ours.items() if not vars(value).get("__doc__", value.__doc__)]
    functions = {n: v for n, v in ours.items() if inspect.isfunction(v)}
    for name, value in ours.items():
        methods = vars(value).items() if inspect.isclass(value) else ()
        special = (
            {"__call__"} if hasattr(torch.nn, name) else {"__call__", "__init__"}
        )  # torch.nn's signatures are torch's
        functions |= {
            f"{name}.{n}": m for n, m in methods if inspect.isfunction(m) and (not n.startswith("_") or n in special)
        }
    untyped = {}
    for name, function in functions.items():
        named = {"return", *inspect.signature(function).parameters} - {"self"}
        untyped[name] = named - function.__annotations__.keys()
    assert not {name: missing for name, missing in untyped.items() if missing}
