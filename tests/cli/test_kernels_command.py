from __future__ import annotations

import errno
import json

import pytest
import typer
from detr_fast.kernels import offline
from typer.testing import CliRunner

from detr_fast.cli import main
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
    def failing(*_):
        raise ValueError("no such instruction")

    monkeypatch.setattr(offline, "compile_variant", failing)
    result = run("--target", "sm_90", "--out", str(tmp_path / "new"))
    assert result.exit_code == 1
    assert f"Error: {one_variant.name} does not compile for sm_90: no such instruction" in result.stderr
    assert "error" in json.loads((tmp_path / "new" / "index.json").read_text())[0]


def test_a_cache_that_cannot_be_written_is_the_machines_fault_and_no_kernels(
    one_variant, monkeypatch, tmp_path, capsys
):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(SystemExit) as end:
        main(["kernels", "--target", "sm_90"])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"Error: {tmp_path / 'file'}")
    assert line.endswith("; check the path, its permissions and the disk")


def test_a_disk_that_is_full_is_told_with_the_folder_of_the_cache(one_variant, monkeypatch):
    def failing(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(offline, "compile_variant", failing)
    monkeypatch.setenv("TRITON_CACHE_DIR", "/some/cache")
    with pytest.raises(OSError, match="No space left on device: '/some/cache'"):
        run("--target", "sm_90")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--target", "sm_12"], "unknown target 'sm_12': choose from sm_80"), (["--op", "conv"], "no op 'conv'")],
)
def test_what_is_not_there_is_refused_in_one_line(arguments, message):
    with pytest.raises(EngineError, match=message):
        run(*arguments)
