from __future__ import annotations

import json

import pytest
import typer
from typer.testing import CliRunner

from detr_fast.cli.kernels import kernels
from detr_fast.engine.errors import EngineError

pytestmark = pytest.mark.offline

app = typer.Typer()
app.command()(kernels)


@pytest.fixture
def one_variant(monkeypatch):
    """The smallest catalog that goes all the way."""
    from detr_fast.kernels import catalog

    chosen = (catalog.entry("layer_norm_sum_partials_c256_bf16"),)
    monkeypatch.setattr(catalog, "entries", lambda op=None: chosen)
    return chosen[0]


def run(*arguments):
    return CliRunner().invoke(app, arguments, catch_exceptions=False)


def test_machine_code_assembly_and_index_are_written(one_variant, tmp_path):
    result = run("--target", "sm_90", "--target", "gfx942", "--out", str(tmp_path), "--json")
    assert result.exit_code == 0, result.output
    index = json.loads(result.stdout)
    assert json.loads((tmp_path / "index.json").read_text()) == index
    for record, code, assembly in zip(index, ("cubin", "hsaco"), ("ptx", "amdgcn")):
        assert record["name"] == one_variant.name
        assert record["constants"] == one_variant.variant.constants
        assert record["registers"] > 8
        assert (record["spills"], record["warps"], record["stages"], record["over_budget"]) == (0, 8, 1, [])
        assert 0 < record["occupancy"] <= 1
        folder = tmp_path / record["target"]
        assert (folder / f"{one_variant.name}.{code}").read_bytes()[:4] == b"\x7fELF"
        assert one_variant.variant.name in (folder / f"{one_variant.name}.{assembly}").read_text()
    assert index[0]["bound"]


def test_a_kernel_over_its_budget_is_named_with_its_target_and_remedy(one_variant, monkeypatch):
    from detr_fast.kernels import offline

    monkeypatch.setattr(
        offline, "over_budget", lambda one, compiled: [f"{one.name} for {compiled.target} uses too much"]
    )
    result = run("--target", "sm_90")
    assert f"Warning: {one_variant.name} for sm_90 uses too much" in result.stderr
    assert result.exit_code == 0


def test_the_table_has_one_line_a_variant_and_target(one_variant):
    lines = run("--target", "sm_90", "--target", "sm_80").stdout.splitlines()
    assert lines[0].split()[:3] == ["target", "kernel", "registers"]
    assert [line.split()[:2] for line in lines[1:]] == [["sm_90", one_variant.name], ["sm_80", one_variant.name]]


def test_a_failing_compilation_is_an_error_line_and_status_1(one_variant, monkeypatch, tmp_path):
    from detr_fast.kernels import offline

    def failing(*_):
        raise ValueError("no such instruction")

    monkeypatch.setattr(offline, "compile_variant", failing)
    result = run("--target", "sm_90", "--out", str(tmp_path / "new"))
    assert result.exit_code == 1
    assert f"Error: {one_variant.name} does not compile for sm_90: no such instruction" in result.stderr
    assert "error" in json.loads((tmp_path / "new" / "index.json").read_text())[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--target", "sm_12"], "unknown target 'sm_12': choose from sm_80"), (["--op", "conv"], "no op 'conv'")],
)
def test_what_is_not_there_is_refused_in_one_line(arguments, message):
    with pytest.raises(EngineError, match=message):
        run(*arguments)
