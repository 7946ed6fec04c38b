from __future__ import annotations

import ast
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def python(code: str, **options) -> str:
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **options)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """A copy of the files that make the package: building in the checkout would leave build/ behind."""
    import shutil

    source = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    (source / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "test_faq.py", source / "tests")
    for name in ("detr_fast", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    return source


@pytest.fixture(scope="module")
def wheel(sources, tmp_path_factory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, sources]
    built = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "absent from the `packages` configuration" not in built.stderr + built.stdout
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_is_pure_python_and_holds_the_kernels_as_detr_fast_kernels(wheel):
    names = wheel.namelist()
    assert wheel.filename.endswith("-py3-none-any.whl")
    assert "detr_fast/kernels/layer_norm.py" in names
    assert {name.split("/")[0] for name in names} == {
        "detr_fast",
        Path(wheel.filename).name.rpartition("-py3")[0] + ".dist-info",
    }
    assert {"detr_fast/py.typed", "detr_fast/__main__.py", "detr_fast/ops/measured/sm_90.json"} <= set(names)
    assert any(name.endswith("dist-info/licenses/LICENSE") for name in names)


def test_the_source_distribution_holds_what_a_wheel_is_built_from(sources, tmp_path):
    import tarfile

    python(f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})", cwd=sources)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"setup.py", "pyproject.toml", "LICENSE", "detr_fast/py.typed", "kernels/layer_norm.py"} <= names
    assert "detr_fast/ops/measured/sm_90.json" in names
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "docs"))]


def test_the_wheel_imports_and_runs_where_triton_is_missing(wheel, tmp_path):
    wheel.extractall(tmp_path)
    code = (
        "import sys; sys.modules['triton'] = None; sys.modules['triton.language'] = None\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "import detr_fast, torch\n"
        f"assert detr_fast.__file__.startswith({str(tmp_path)!r})\n"
        "print(detr_fast.explain(detr_fast.nn.LayerNorm(4), torch.ones(2, 4), quiet=True))"
    )
    out = python(code, cwd=tmp_path)
    assert "layer_norm (2, 4) float32 -> eager" in out
    assert "triton is not installed" in out


def test_transformers_detr_imports_from_the_checkouts_root():
    # transformers imports a top-level package called `kernels` when it finds one; ours must not be taken for it.
    python("from transformers import DetrConfig, DetrForObjectDetection", cwd=ROOT)


def test_importing_the_package_or_its_kernels_registers_and_compiles_nothing():
    code = (
        "import sys, detr_fast, detr_fast.kernels\n"
        "print([m for m in sys.modules if m == 'torch' or m.startswith('detr_fast.ops')])"
    )
    assert python(code) == "[]"


def test_asking_for_help_needs_no_torch():
    code = (
        "import sys\nfrom detr_fast.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit as end: assert not end.code\n"
        "assert 'torch' not in sys.modules"
    )
    assert "demo" in python(code)


def test_what_the_training_rooms_import_is_declared_and_named_where_it_is_missing():
    from detr_fast.cli.errors import EXTRA_PACKAGES

    imported = set()
    for room in ("cli", "engine", "data", "models"):
        for file in (ROOT / "detr_fast" / room).glob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Import):
                    imported |= {alias.name for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module:
                    imported.add(node.module)
    foreign = {name.partition(".")[0] for name in imported} - sys.stdlib_module_names - {"detr_fast"}
    assert foreign <= {*EXTRA_PACKAGES, "torch", "typer", "rich"}
    declared = re.findall(r'^    "([\w-]+)>=', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    known_as = {"PIL": "pillow", "yaml": "pyyaml"}
    assert {known_as.get(name, name) for name in EXTRA_PACKAGES} <= set(declared)
