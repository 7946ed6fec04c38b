"""The emulator sees what a GPU would punish: each test is a small kernel with one mistake, or a real one without a barrier."""

from __future__ import annotations

from contextlib import contextmanager
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from detr_fast.kernels import attention_copies, layer_norm
from detr_fast.kernels.attention_problem import memory_for

from detr_fast.testing.ptx import Fault, MisalignedAccess, OutsideMemory, Race, Uninitialised, Unsupported, emulated_gpu
from detr_fast.testing.ptx.machine import Machine, _rounded_alike
from detr_fast.testing.ptx.translator import translate

pytestmark = pytest.mark.offline


@triton.jit(do_not_specialize=["n"])
def copy_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offset, tl.load(x_ptr + offset, mask=offset < n), mask=offset < n)


@triton.jit
def doubling_kernel(x_ptr, MULTIPLE: tl.constexpr):
    place = tl.multiple_of(x_ptr + tl.arange(0, 512), MULTIPLE)
    tl.store(place, 2 * tl.load(place))


def test_a_copy_is_exact_and_its_launch_noted():
    x, y = torch.randn(100), torch.zeros(100)
    with emulated_gpu() as gpu:
        copy_kernel[(2,)](x, y, 100, 64)
    assert torch.equal(x, y)
    assert gpu.launches == [("copy_kernel", (2, 1, 1))]


def test_an_access_one_past_the_end_names_the_tensor_and_the_line():
    x, y = torch.randn(101), torch.zeros(100)
    with (
        emulated_gpu(),
        pytest.raises(
            OutsideMemory, match=r"thread 36 .*st\.global.*test_ptx\.py:\d+.*400 bytes from the start of y_ptr"
        ),
    ):
        copy_kernel[(2,)](x, y, 101, 64)


def test_a_false_multiple_of_is_seen_where_it_makes_a_vector_access():
    x = torch.randn(513)[1:]
    expected = 2 * x
    with emulated_gpu():
        doubling_kernel[(1,)](x, 4)
        assert torch.equal(x, expected)
        with pytest.raises(MisalignedAccess, match=r"16 bytes at 0x.*no multiple of 16"):
            doubling_kernel[(1,)](x, 16)


@triton.jit
def reversed_kernel(x_ptr, scratch_ptr, y_ptr, BLOCK: tl.constexpr, BARRIER: tl.constexpr):
    column = tl.arange(0, BLOCK)
    tl.store(scratch_ptr + column, tl.load(x_ptr + column))
    if BARRIER:
        tl.debug_barrier()
    tl.store(y_ptr + column, tl.load(scratch_ptr + (BLOCK - 1 - column)))


def test_global_memory_read_back_in_another_thread_needs_a_barrier():
    x, y = torch.randn(256), torch.zeros(256)
    with emulated_gpu():
        reversed_kernel[(1,)](x, torch.zeros(256), y, 256, True)
        assert torch.equal(y, x.flip(0))
        with pytest.raises(Race, match=r"read after write of 1020 bytes from the start of scratch_ptr.*no barrier"):
            reversed_kernel[(1,)](x, torch.zeros(256), y, 256, False)


def test_programs_that_write_one_scratch_race_unless_it_is_declared_and_the_values_are_the_same():
    x, y = torch.randn(256), torch.zeros(256)
    with emulated_gpu(), pytest.raises(Race, match="by another program"):
        reversed_kernel[(2,)](x, torch.zeros(256), y, 256, True)
    with emulated_gpu(identical_writes=["scratch_ptr", "y_ptr"]):
        reversed_kernel[(2,)](x, torch.zeros(256), y, 256, True)
    with emulated_gpu(identical_writes=["y_ptr"]), pytest.raises(Race, match="scratch_ptr"):
        numbered_kernel[(2,)](y, 256)


@triton.jit
def numbered_kernel(scratch_ptr, BLOCK: tl.constexpr):
    tl.store(scratch_ptr + tl.arange(0, BLOCK), tl.program_id(0).to(tl.float32))


@triton.jit
def counter_kernel(count_ptr, sum_ptr, x_ptr, BLOCK: tl.constexpr):
    tl.atomic_add(count_ptr, 1)
    tl.atomic_add(sum_ptr + tl.arange(0, BLOCK) % 4, tl.load(x_ptr + tl.arange(0, BLOCK)))


def test_atomics_of_several_programs_add_up_and_do_not_race():
    count, total, x = torch.zeros(1, dtype=torch.int32), torch.zeros(4), torch.randn(128)
    with emulated_gpu():
        counter_kernel[(3,)](count, total, x, 128)
    assert count.item() == 3
    torch.testing.assert_close(total, 3 * x.view(32, 4).sum(0))


@triton.jit
def endless_kernel(x_ptr, y_ptr):
    while tl.load(x_ptr) >= 0:
        tl.store(y_ptr, 1)


def test_a_loop_that_never_ends_is_cut_off():
    with emulated_gpu(limit=10_000), pytest.raises(Fault, match="more than 10000 instructions"):
        endless_kernel[(1,)](torch.zeros(1), torch.zeros(1))


@triton.jit
def product_kernel(a_ptr, b_ptr, c_ptr, SIZE: tl.constexpr, STEPS: tl.constexpr):
    index = tl.arange(0, SIZE)
    square = index[:, None] * SIZE + index[None, :]
    total = tl.zeros((SIZE, SIZE), tl.float32)
    for step in tl.range(0, STEPS, num_stages=3):
        place = step * SIZE * SIZE + square
        total += tl.dot(tl.load(a_ptr + place), tl.load(b_ptr + place))
    tl.store(c_ptr + square, total)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_pipelined_matrix_products_are_those_of_the_rounded_operands(dtype):
    a, b = torch.randn(2, 4, 32, 32).to(dtype)
    c = torch.empty(32, 32)
    with emulated_gpu():
        product_kernel[(1,)](a, b, c, 32, 4)
    exact = (a.double() @ b.double()).sum(0)
    tolerance = 0.06 if dtype == torch.float32 else 1e-4  # the tensor core's operands are tf32
    torch.testing.assert_close(c.double(), exact, rtol=0, atol=tolerance)


@contextmanager
def leaving_out(method: str, kernel: str, index: int | None, sites: list[int]):
    """Inside, the machine skips the instruction at the index-th place that calls `method`; sites: all such places, as met."""
    original = getattr(Machine, method)

    def step(machine, site, *rest):
        if machine.program.kernel.name == kernel:
            if site not in sites:
                sites.append(site)
            if index is not None and site == index:
                return (rest[1], rest[0]) if method == "barrier" else None
        return original(machine, site, *rest)

    with mock.patch.object(Machine, method, step), emulated_gpu():
        yield


def outcomes(call, method: str, kernel: str) -> dict[int, str]:
    """By place: what happens without that one barrier: the fault's name, "wrong" or "unnoticed"."""
    sites: list[int] = []
    with leaving_out(method, kernel, None, sites):
        expected = call()
    found = {}
    for site in tuple(sites):
        try:
            with leaving_out(method, kernel, site, sites):
                results = call()
            same = all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(expected, results))
            found[site] = "unnoticed" if same else "wrong"
        except Fault as fault:
            found[site] = type(fault).__name__
    return found


def norm_backward():
    x, dy = torch.randn(2, 20, 512).to(torch.bfloat16)  # of two warps
    weight, mean, rstd = torch.randn(512).to(torch.bfloat16), x.float().mean(1), x.float().std(1).reciprocal()
    return layer_norm.layer_norm_backward(dy, x, weight, mean, rstd)


def test_without_any_one_of_its_barriers_layer_norms_backward_races():
    torch.manual_seed(0)
    tensors = torch.get_rng_state()

    def call():
        torch.set_rng_state(tensors)
        return norm_backward()

    found = outcomes(call, "barrier", "layer_norm_backward_kernel")
    assert len(found) >= 8
    assert set(found.values()) == {"Race"}


def pipelined():
    a, b = torch.ones(2, 4, 64, 64).to(torch.float16)
    c = torch.empty(64, 64)
    product_kernel[(1,)](a, b, c, 64, 4)
    return (c,)


def test_without_a_wait_for_an_asynchronous_copy_a_pipelined_product_reads_too_early():
    found = outcomes(pipelined, "wait_group", "product_kernel")
    assert "Uninitialised" in found.values()


def test_without_the_barriers_in_its_loop_a_pipelined_product_races():
    """Those in front of it lie between copies into different buffers: nothing there can go wrong."""
    found = outcomes(pipelined, "barrier", "product_kernel")
    assert list(found.values()).count("Race") >= 2
    assert "wrong" not in found.values()


UNKNOWN = """
.visible .entry kernel() .reqntid 32
{
    .reg .b32 %r<3>;
    wgmma.fence.sync.aligned;
    ret;
}
"""


def test_an_unknown_instruction_is_named():
    with pytest.raises(Unsupported, match=r"wgmma\.fence\.sync\.aligned"):
        translate(UNKNOWN)


def test_of_several_branches_a_program_takes_the_one_of_its_number():
    pairs = [(t, memory_for(t)) for t in (torch.randn(1, 3, 2, columns) for columns in range(5, 10))]
    with emulated_gpu() as gpu:
        attention_copies._launch(pairs)
    assert gpu.launches == [("attention_copy_kernel", (2, 5, 1))]
    for source, copy in pairs:
        assert torch.equal(copy, F.pad(source, (0, copy.shape[3] - source.shape[3])))


def test_shared_memory_that_nothing_wrote_is_not_read():
    body = UNKNOWN.replace("wgmma.fence.sync.aligned;", "ld.shared.b32 %r1, [global_smem+4];")
    program = translate(".extern .shared .align 16 .b8 global_smem[];" + body)
    from detr_fast.testing.ptx.driver import run_grid

    with emulated_gpu() as gpu, pytest.raises(Uninitialised, match="nothing has written"):
        run_grid(program, (1, 1, 1), [], 64, gpu)


def test_threads_may_store_sums_that_differ_by_rounding_and_nothing_else():
    def words(*values):
        return np.array(values, np.float32).view(np.uint32)

    assert _rounded_alike(words(1e6, 0.5), words(1e6 + 0.0625, 0.5))
    assert _rounded_alike(words(1.0, 1e-9), words(1.0, -1e-9))  # sums that cancel
    assert not _rounded_alike(words(1e6, 0.5), words(1e6, 0.0))
    assert not _rounded_alike(np.array([7], np.uint32), np.array([12], np.uint32))
