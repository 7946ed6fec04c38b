"""Launches that may start before those ahead of them end: no kernel touches memory before it has waited for what it reads."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from detr_fast.kernels import driver, launch, overlap
from detr_fast.kernels.catalog import CATALOG
from detr_fast.kernels.offline import compile_variant

from benchmarks.hardware import DEVICE, sized
from detr_fast import ops, use_backend
from detr_fast.capture import beside_the_default_stream, capture
from detr_fast.ops import tuning

KERNELS = {one.variant.name: one for one in reversed(CATALOG) if one.is_for("sm_90")}
SUMS_BY_ATOMICS = "attention_backward_rows_kernel"  # its example's: they differ from call to call
# Of the same body, and each example runs six times, which takes the interpreter three minutes for all.
REPLAYED = sized([n for n in KERNELS if n != SUMS_BY_ATOMICS], ["attention_forward_kernel", "sum_partials_kernel"])
MEMORY = re.compile(r"^\s*(?:@\S+\s+)?(?:ld|st|atom|red|cp|tma|prefetch)\.(?!param|shared)\S*", re.MULTILINE)
WAIT, LET = driver.WAIT, "griddepcontrol.launch_dependents"


def test_every_kernel_waits_first():
    found = []
    for file in Path(launch.__file__).parent.glob("*.py"):
        for function in ast.parse(file.read_text()).body:
            if isinstance(function, ast.FunctionDef) and function.name.endswith("_kernel"):
                body = function.body[1:] if ast.get_docstring(function) else function.body
                found.append((function.name, ast.unparse(body[0])))
    assert len(found) > 30
    assert [name for name, first in found if first != "wait_for_previous()"] == []


@pytest.mark.offline
@pytest.mark.parametrize("name", KERNELS)
def test_compiled_code_waits_before_it_touches_memory(name):
    _, assembly, _ = compile_variant(KERNELS[name].variant, "sm_90")
    body = assembly[assembly.index(".entry") :]
    first = MEMORY.search(body)
    assert first is not None
    assert body.count(WAIT) == 1
    assert body.index(WAIT) < body.index(LET) < first.start(), first.group()
    assert "bra" not in body[: body.index(WAIT)]  # no program gets past it


@pytest.mark.offline
def test_gpus_that_cannot_overlap_have_nothing_to_wait_for():
    one = KERNELS["layer_norm_forward_kernel"].variant
    assert all("griddepcontrol" not in compile_variant(one, target)[1] for target in ("sm_80", "gfx90a"))
    able = [
        name for name in ("sm_89", "sm_90", "sm_100", "sm_120", "sm90", "sm80", "gfx942", "") if overlap.is_able(name)
    ]
    assert able == ["sm_90", "sm_100", "sm_120", "sm90"]


@pytest.mark.parametrize("overlapping", [False, True])
def test_a_program_is_launched_as_its_device_is_said_to(overlapping, monkeypatch):
    run = SimpleNamespace(launch_pdl=not overlapping)
    kernel = SimpleNamespace(run=run, asm={"ptx": WAIT}, function=1, packed_metadata=(), metadata=SimpleNamespace())
    launch.Program(kernel, (), (), overlapping)
    assert run.launch_pdl is overlapping


@pytest.mark.parametrize("asm", [{"ptx": "ret;"}, {}])
def test_a_kernel_that_is_not_seen_to_wait_does_not_overlap(asm):
    kernel = SimpleNamespace(run=SimpleNamespace(launch_pdl=True), asm=asm)
    driver.overlap(kernel, True)
    assert kernel.run.launch_pdl is False


def test_a_launcher_that_cannot_overlap_is_left_alone():
    kernel = SimpleNamespace(run=SimpleNamespace(), asm={"ptx": WAIT})
    driver.overlap(kernel, True)
    assert vars(kernel.run) == {}


@pytest.mark.gpu
@pytest.mark.parametrize("name", REPLAYED)
def test_overlapping_launches_change_no_bit_of_any_replay(name):
    with beside_the_default_stream():
        assert_overlapping_changes_nothing(KERNELS[name].example(DEVICE))


@pytest.mark.gpu
def test_overlapping_launches_wait_for_other_streams_and_for_what_is_not_ours():
    with beside_the_default_stream():
        rows, columns = sized((4096, 1024), (5, 32))
        x, factor = torch.randn(rows, columns, device=DEVICE), torch.randn(columns, columns, device=DEVICE)
        side = torch.cuda.Stream()

        def call():
            here = torch.cuda.current_stream()
            one = ops.layer_norm(x, (columns,))
            side.wait_stream(here)
            with torch.cuda.stream(side):
                other = ops.layer_norm(one * 2, (columns,))
            product = ops.layer_norm(one @ factor, (columns,))
            here.wait_stream(side)
            return one, other, product, ops.add_layer_norm(other, product)

        with use_backend(layer_norm="triton", add_layer_norm="triton"):
            assert_overlapping_changes_nothing(call)


def assert_overlapping_changes_nothing(call):
    """To the bit, in replays of a graph of some calls."""
    graphs, results = [], []
    for yes in (False, True):
        with tuning.overlapping_launches(yes):
            call()
            graphs.append(torch.cuda.CUDAGraph())
            with capture(graphs[-1]):
                results.append([t for _ in range(sized(4, 1)) for t in call()])
    graphs[0].replay()
    for _ in range(sized(25, 1)):
        graphs[1].replay()
        assert all(torch.equal(one.nan_to_num(), other.nan_to_num()) for one, other in zip(*results))
