"""Kernels for GPUs that are not there: every variant compiles, within its budget, and is exactly what a call launches."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from collections import Counter

import pytest
import torch
from detr_fast.kernels import launch, layer_norm, offline, rows
from detr_fast.kernels.analysis import analyse, disassemble, innermost_loops
from detr_fast.kernels.catalog import CATALOG, TARGETS, Budget, Entry, entries, entry
from detr_fast.kernels.offline import compile_catalog, compile_variant, occupancy, older_compiler, over_budget

offline_only = pytest.mark.offline


# Targets that Triton writes the same program for, or nearly: how much shared memory there is differs, and the assembler.
ALIKE = ("sm_80", "sm_86", "sm_89"), ("sm_100",), ("sm_120",), ("gfx90a", "gfx942")


def sample(index: int, targets: tuple[str, ...]) -> dict[str, list[Entry]]:
    """One variant of each kernel, by turns, on one of the targets, by turns."""
    chosen: dict[str, list[Entry]] = {target: [] for target in targets}
    kernels = dict.fromkeys(one.variant.name for one in CATALOG)
    for turn, kernel in enumerate(kernels):
        target = targets[turn % len(targets)]
        variants = [one for one in CATALOG if one.variant.name == kernel and one.is_for(target)]
        chosen[target] += variants[index % len(variants) :][:1] if variants else []
    return chosen


# Every variant on sm_90; each kernel once on every other kind of target, and there another variant on each, so that
# together they cover what differs between targets (types, layouts, tile sizes) without compiling all of everything.
COVER = {"sm_90": [one for one in CATALOG if one.is_for("sm_90")]}
for index, targets in enumerate(ALIKE):
    COVER |= sample(index, targets)
assert set(COVER) == set(TARGETS)
for target in ("sm_100", "sm_120"):
    COVER[target] += [one for one in CATALOG if one.targets == ("sm_100", "sm_120") and one not in COVER[target]]


@offline_only
@pytest.mark.parametrize("target", COVER)
def test_variants_compile_within_their_budgets(target):
    problems = []
    for one, compiled in zip(COVER[target], compile_catalog(COVER[target], [target], workers=1)):
        assert compiled.name == one.name
        problems += [compiled.error] if compiled.error else over_budget(one, compiled)
    assert problems == []


@offline_only
def test_variants_compile_in_several_processes_in_order():
    chosen = [entry("layer_norm_sum_partials_c256_bf16"), entry("layer_norm_forward_c256_bf16")]
    results = list(compile_catalog(chosen, ["sm_90", "gfx942"], workers=2))
    assert [(one.target, one.name) for one in results] == [(t, one.name) for t in ("sm_90", "gfx942") for one in chosen]
    assert all(one.binary and one.assembly and one.error is None for one in results)


@offline_only
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize(("kernel", "most", "streams"), [("forward", 14, 2), ("backward", 19, 3)])
def test_layer_norm_at_256_columns_is_bound_by_memory(target, kernel, most, streams):
    one = entry(f"layer_norm_{kernel}_c256_bf16")
    architecture = int(target.removeprefix("sm_"))
    binary, _, resources = compile_variant(one.variant, target)
    loop = analyse(binary, architecture, one.elements / one.variant.num_warps)
    assert loop.instructions_per_element <= most
    assert loop.dram_headroom(architecture, bytes_per_element=2 * streams) >= 2.3
    # All of x, dy, y and dx moves 16 bytes at a time (a lane's 8 elements), and what is in flight hides DRAM's latency.
    wide = {"LDG": 0, "STG": 0}
    for opcode, count in loop.opcodes.items():
        if opcode.startswith(("LDG", "STG")) and ".128" in opcode:
            wide[opcode[:3]] += count
    lanes = one.elements // one.variant.num_warps // 32 // 8
    parameters = 2 if kernel == "forward" else 0  # the backward loads them before its loop
    assert wide == {"LDG": lanes * (streams - 1) + parameters, "STG": lanes}
    warps = resources.occupancy * 64  # that many fit on a multiprocessor of both
    assert warps * one.elements / one.variant.num_warps * 2 * (streams - 1) >= 18 * 1024


# An encoder layer's, 8 x 850 tokens: parameter gradients' partial sums, both blocks' and one's, and a bias gradient's rows.
@offline_only
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize(
    ("shapes", "dtype", "programs", "rounds"),
    [
        ([(567, 768), (107, 2048)], torch.float32, 176, 1),
        ([(567, 768)], torch.float32, 96, 1),
        ([(6800, 768)], torch.bfloat16, 48, 4),
    ],
)
def test_sums_over_rows_take_many_programs_few_rounds_of_wide_loads(target, shapes, dtype, programs, rounds):
    forms = tuple((dtype, *shape, shape[1], torch.bfloat16) for shape in shapes)
    plan = rows._plan_sums(forms, 1, 0)
    assert plan.grid == (programs, 1)
    constants = plan.variant.constants
    at_once = constants["LANES"] * 16 // dtype.itemsize // constants["BLOCK_C"]
    assert math.ceil(shapes[0][0] / at_once / constants["LOADS"]) == rounds
    binary, _, resources = compile_variant(plan.variant, target)
    assert resources.spills == 0
    for loop in innermost_loops(disassemble(binary)):
        loads = [one.opcode for one in loop if one.opcode.startswith("LDG")]
        assert len(loads) == constants["LOADS"]
        assert all(".128" in opcode for opcode in loads)
        first = next(place for place, one in enumerate(loop) if one.opcode.startswith("FADD"))
        waiting = [one for one in loop[first:] if one.opcode.startswith("LDG")]  # until the first loads have come
        # Triton 3.6 begins to add with 4 to 6 of these loads on their way.
        assert len(waiting) <= 0.75 * len(loads) if older_compiler() else len(waiting) < len(loads) / 2


@offline_only
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("name", ["linear_forward_k256_relu_bf16", "linear_norm_forward_c256_bf16"])
def test_products_are_bound_by_the_tensor_cores(target, name):
    one = entry(name)
    binary, _, _ = compile_variant(one.variant, target)
    loop = analyse(binary, int(target.removeprefix("sm_")), one.elements / one.variant.num_warps)
    assert loop.bound == "tensor"
    assert loop.cycles["issue"] <= 0.6 * loop.cycles["tensor"]


@offline_only
@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("linear_forward_k256_relu_bf16", 1075),
        ("linear_backward_k256_relu_bf16", 960),
        ("linear_norm_forward_c256_bf16", 1950),
    ],
)
def test_what_surrounds_a_product_takes_few_instructions(name, most):
    """With Philox's last rounds twice, for halves of its words, 1,384; with bits one by one 1,080; with calls that no threads share 2,296."""
    binary, _, _ = compile_variant(entry(name).variant, "sm_90")
    assert older_compiler() or len(disassemble(binary)) <= most


@offline_only
def test_the_mean_of_any_number_of_columns_is_divided_exactly_on_gpus():
    _, assembly, _ = compile_variant(entry("layer_norm_forward_c768_fp16_autocast").variant, "sm_90")
    assert "div.rn.f32" in assembly
    assert "div.full" not in assembly  # Triton's plain division, which the interpreter takes for an exact one


@offline_only
def test_a_failing_compilation_names_kernel_target_and_remedy(monkeypatch):
    one = entry("layer_norm_forward_c256_bf16")
    broken = dataclasses.replace(one.variant, constants={**one.variant.constants, "BLOCK_C": 100})
    monkeypatch.setattr(offline, "entry", lambda name: dataclasses.replace(one, variant=broken))
    (result,) = compile_catalog([one], ["sm_90"], workers=1)
    assert result.resources is None
    assert "layer_norm_forward_c256_bf16 does not compile for sm_90" in result.error
    assert "power of 2" in result.error
    assert "mend the kernel" in result.error


@offline_only
def test_a_variant_over_its_budget_is_told_with_the_remedy(monkeypatch):
    monkeypatch.setattr(offline, "older_compiler", lambda: False)
    one = dataclasses.replace(entry("layer_norm_forward_c256_bf16"), budget=Budget(8, 0, 8, 0))
    (result,) = compile_catalog([one], ["sm_90"], workers=1)
    registers, shared = over_budget(one, result)
    assert registers.startswith("layer_norm_forward_c256_bf16 for sm_90 uses ")
    assert "registers a thread, over its budget of 8: give it fewer rows a tile" in registers
    assert "bytes of shared memory" in shared


def _calls():
    """Calls with awkward arguments: rows, strides and addresses of 1, of multiples of 16 and of neither."""
    for columns, count, dtype in [(256, 16, torch.bfloat16), (1, 1, torch.float32), (96, 7, torch.float16)]:
        for offset in (0, 1):
            x = torch.zeros(count * columns + offset, dtype=dtype)[offset:].view(count, columns)
            yield x, torch.zeros(columns), torch.zeros(columns)
            yield x, None, None
    yield torch.zeros(1, 64).expand(5, 64), torch.zeros(64), None


@offline_only
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_what_a_call_launches_is_specialised_on_nothing_but_the_variant(target, monkeypatch):
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    launched = []
    for module in (layer_norm, rows):
        monkeypatch.setattr(module, "launch", lambda variant, grid, *arguments: launched.append((variant, arguments)))
    for x, weight, bias in _calls():
        _, mean, rstd = layer_norm.layer_norm_forward(x, weight, bias, 1e-5)
        affine = weight is not None, bias is not None
        layer_norm.layer_norm_backward(x, x, weight, mean, rstd, with_dw=affine[0], with_db=affine[1])
    assert len(launched) > 20
    for variant, arguments in launched:
        backend = make_backend(GPUTarget(*TARGETS[target]))
        bind = create_function_from_signature(variant.kernel.signature, variant.kernel.params, backend)
        bound, specialization, options = bind(*arguments, **variant.constants, **variant.options())
        signature = variant.signature()
        assert {name: kind for name, (kind, _) in zip(bound, specialization)} == signature
        constants = {name: value for name, value in bound.items() if signature[name] == "constexpr"}
        assert constants == variant.all_constants()
        assert all(special is None for kind, special in specialization if kind != "constexpr")
        assert options == variant.options()


EXAMPLES = list({one.example: one for one in CATALOG}.values())


def launched_by(example, device):
    """What an entry's example launches, and its outputs."""
    seen = []
    launch.observers.append(seen.append)
    try:
        outputs = example(torch.device(device))()
    finally:
        launch.observers.remove(seen.append)
    return seen, outputs


@pytest.mark.parametrize("one", CATALOG, ids=lambda one: one.name)
def test_an_entrys_example_launches_exactly_its_variant(one):
    launched = [seen.variant for seen in launched_by(one.example, "meta")[0]]
    assert one.variant in launched, f"{one.name} is in the catalog, but its example launches {launched}"


@pytest.mark.interpreter
@pytest.mark.parametrize("example", [one.example for one in EXAMPLES], ids=[one.name for one in EXAMPLES])
def test_examples_run_in_the_interpreter_and_write_finite_outputs(example, interpreter):
    counted, shapes = launched_by(example, "meta")
    if (programs := sum(math.prod(one.grid) for one in counted)) > 300:
        pytest.skip(f"{programs} programs are too many for the interpreter; the kernel's own tests run smaller ones")
    launched, outputs = launched_by(example, "cpu")
    assert len(launched) == len(counted)
    assert outputs
    for output, shape in zip(outputs, shapes):
        assert (output.shape, output.dtype) == (shape.shape, shape.dtype)
        assert not output.is_floating_point() or output.isfinite().all()


def test_the_catalog_is_lean():
    """Each entry is compiled for eight targets, in CI too: replace one before adding another."""
    assert len(CATALOG) <= 89, Counter(one.op for one in CATALOG)


def test_names_are_unique_and_targets_known():
    names = [one.name for one in CATALOG]
    assert len(set(names)) == len(names)
    assert {one.op for one in entries("layer_norm")} == {"layer_norm"}
    assert entries() == CATALOG
    with pytest.raises(ValueError, match=r"no op 'conv' in the kernel catalog: choose one of .*layer_norm"):
        entries("conv")
    with pytest.raises(ValueError, match="unknown target 'sm_12': choose from sm_80, "):
        compile_catalog(CATALOG, ["sm_90", "sm_12"])


@pytest.mark.interpreter
def test_compiling_under_the_interpreter_is_refused_with_the_remedy():
    with pytest.raises(RuntimeError, match="unset it"):
        compile_catalog(CATALOG, ["sm_90"])


# By NVIDIA's occupancy calculator, and 512 registers a lane and scheduler on AMD's.
@pytest.mark.parametrize(
    ("target", "registers", "shared", "warps", "expected"),
    [
        ("sm_80", 32, 0, 4, 1.0),
        ("sm_80", 168, 2048, 4, 12 / 64),
        ("sm_80", 72, 0, 1, 28 / 64),
        ("sm_86", 40, 0, 1, 16 / 48),  # at most 16 programs
        ("sm_90", 255, 8192, 8, 8 / 64),
        ("sm_90", 32, 100 << 10, 4, 8 / 64),  # shared memory holds two
        ("gfx942", 128, 0, 4, 16 / 32),
        ("gfx942", 32, 33 << 10, 4, 4 / 32),
    ],
)
def test_occupancy_is_the_calculators(target, registers, shared, warps, expected):
    assert occupancy(target, registers, shared, warps) == pytest.approx(expected, abs=1e-3)


def test_kernels_import_without_triton_and_say_so_when_used():
    code = """
import sys
sys.modules["triton"] = None
import torch
from detr_fast.kernels import catalog, launch, layer_norm, offline
x = torch.zeros(2, 8)
assert len(catalog.CATALOG) > 10
for use in (
    lambda: layer_norm.layer_norm_forward(x, None, None, 1e-5),
    lambda: launch.compile_launches(lambda: layer_norm.layer_norm_forward(x.to("meta"), None, None, 1e-5), x.device),
    lambda: offline.compile_catalog(catalog.CATALOG, ["sm_90"]),
):
    try:
        use()
    except ImportError as error:
        assert "install triton >= 3.6" in str(error), error
    else:
        raise AssertionError("no error")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_observers_see_each_launch_and_an_empty_grid_is_none(monkeypatch):
    seen = []
    monkeypatch.setattr(launch, "observers", [seen.append])
    one = entry("layer_norm_forward_c256_bf16")
    launch.launch(one.variant, (0,), torch.zeros(0))
    assert seen == []
    stub = dataclasses.replace(one.variant, kernel={(3,): lambda *arguments, **constants: None})
    launch.launch(stub, (3,), *(torch.zeros(1, dtype=dtype) for _, dtype in stub.dtypes))
    assert [record.grid for record in seen] == [(3,)]
