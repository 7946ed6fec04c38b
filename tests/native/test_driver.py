"""What launches by CUDA's driver ask of it is what Triton's own launcher does, byte by byte."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from detr_fast.kernels import driver

pytestmark = pytest.mark.offline


@pytest.mark.parametrize("overlapping", [False, True])
def test_the_driver_is_asked_for_what_tritons_launcher_asks_for(overlapping, compiled_host, tmp_path):
    if isinstance(compiled_host, str) or shutil.which("gcc") is None:
        pytest.skip("needs a C and a C++ compiler")
    told = subprocess.run(
        [sys.executable, "-m", "tests.native.launch_both", str(tmp_path), *["overlapping"] * overlapping],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert told.returncode == 0, told.stderr
    found = dict(line.split(" ", 1) for line in told.stdout.splitlines())
    assert found["driver"] == found["triton"]
    assert ("overlaps 1" in found["driver"]) == overlapping
    # Grid and block, shared, stream, function, parameters.
    assert len(found["driver"].split()) == 6 + 2 + 2 + 2 + 2 * overlapping + 11


def test_a_machine_without_libcuda_has_no_functions(monkeypatch):
    monkeypatch.setattr(driver, "library", lambda: None)
    assert driver.functions() is None


def test_numbers_that_do_not_fit_are_an_error():
    entry = driver.Entry(1, 32, 0, False, ("<i", None, "<f"))
    assert len(entry.parameters([1, None, 0.5])) == 4 * driver.SLOT
    for wrong in ([1 << 31, None, 0.5], [1, None, 1e60]):
        with pytest.raises((driver.struct.error, OverflowError)):
            entry.parameters(wrong)
