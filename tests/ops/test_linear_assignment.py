from __future__ import annotations

import itertools
import os
import sys
import threading

import pytest
import torch
from detr_fast.kernels import assignment as kernels
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.hardware import DEVICE, sized
from detr_fast import dispatch, ops
from detr_fast.dispatch import BackendError, use_backend
from detr_fast.testing import count
from tests.forked import status_of

pytest.importorskip("scipy")

interpreter = pytest.mark.interpreter
HOST = ["scipy", "threads"]


def least_total(cost):
    """By trying every assignment of rows to columns."""
    rows, columns = cost.shape
    if rows > columns:
        return least_total(cost.T)
    return min(sum(cost[r, c].item() for r, c in enumerate(p)) for p in itertools.permutations(range(columns), rows))


def assert_least_total(cost, query):
    rows = torch.nonzero(query >= 0)[:, 0]
    assert len(rows) == min(cost.shape)
    assert len(query[rows].unique()) == len(rows)
    assert cost[rows, query[rows]].sum().item() == pytest.approx(least_total(cost), rel=1e-5)


@pytest.mark.parametrize("backend", HOST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 4), (3, 5), (5, 5), (6, 3)])
def test_the_assignment_has_the_least_total_cost_of_all(backend, shape, dtype):
    cost = torch.randn(2, 3, *shape).to(dtype)
    with use_backend(linear_assignment=backend):
        query = ops.linear_assignment(cost)
    assert query.shape == (2, 3, shape[0])
    for one, columns in zip(cost.flatten(0, 1).double(), query.flatten(0, 1)):
        assert_least_total(one, columns)


@interpreter
@pytest.mark.parametrize("shape", [(3, 5), (6, 3)])
def test_the_kernel_agrees_with_scipy(shape):
    cost, counts = torch.randn(2, 3, *shape), torch.tensor([shape[0], 2, 0])
    with use_backend(linear_assignment="triton"):
        query = ops.linear_assignment(cost.transpose(2, 3).contiguous().transpose(2, 3), counts)
    assert torch.equal(query, ops.linear_assignment(cost, counts))


@pytest.mark.parametrize("backend", HOST)
def test_rows_behind_an_images_count_take_no_part(backend):
    with use_backend(linear_assignment=backend):
        query = ops.linear_assignment(torch.rand(4, 2, 4, 6), torch.tensor([2, 0]))
    assert (query[:, 0, :2] >= 0).all()
    assert (query[:, 0, 2:] == -1).all()
    assert (query[:, 1] == -1).all()


@pytest.mark.parametrize("backend", HOST)
@pytest.mark.parametrize("shape", [(2, 0, 5), (0, 3, 5), (2, 3, 0), (0, 2, 3, 5)])
def test_empty_problems_have_empty_solutions(backend, shape):
    with use_backend(linear_assignment=backend):
        assert torch.equal(ops.linear_assignment(torch.zeros(shape)), torch.full(shape[:-1], -1))


@pytest.mark.parametrize("backend", HOST)
def test_a_batch_without_images_has_counts_of_none(backend):
    with use_backend(linear_assignment=backend):
        cost, counts = torch.zeros(2, 0, 3, 5), torch.zeros(0, dtype=torch.int64)
        assert ops.linear_assignment(cost, counts).shape == (2, 0, 3)


@pytest.mark.parametrize("backend", HOST)
def test_costs_that_are_no_numbers_come_last(backend):
    cost = torch.randn(1, 3, 6)
    cost[0, :, :2], cost[0, :, 2] = float("nan"), float("inf")
    cost[0, 1, 4] = float("-inf")
    with use_backend(linear_assignment=backend):
        query = ops.linear_assignment(cost)[0]
    assert sorted(query.tolist()) == [3, 4, 5]
    assert query[1] == 4


@pytest.mark.parametrize("backend", [*HOST, pytest.param("triton", marks=interpreter)])
@pytest.mark.parametrize("turned", [False, True])
def test_beside_pairs_that_have_to_be_infinite_the_others_have_the_least_total(backend, turned):
    cost = torch.randn(6, 4, 5)
    cost[..., 2:], cost[..., 3] = torch.inf, torch.nan  # two of four rows get a number
    cost = cost.transpose(1, 2) if turned else cost
    with use_backend(linear_assignment=backend):
        query = ops.linear_assignment(cost)
    for one, columns in zip(cost.double().nan_to_num(100, 100), query):
        assert_least_total(one, columns)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_has_threads_of_its_own(monkeypatch):
    module = sys.modules["detr_fast.ops.linear_assignment"]
    monkeypatch.setattr(module, "_threads", lambda: 2)
    both = threading.Barrier(2)
    list(module._pool(2).map(lambda _: both.wait(), range(2)))  # now there are as many as there can be
    child = os.fork()
    if child == 0:
        try:
            with use_backend(linear_assignment="threads"):
                ops.linear_assignment(torch.rand(4, 3, 5))
            os._exit(0)
        finally:
            os._exit(1)
    assert status_of(child, 10.0) == 0


def test_the_cpu_solves_small_batches_at_once_and_large_ones_in_threads(monkeypatch):
    from detr_fast.ops.linear_assignment import LINEAR_ASSIGNMENT

    chosen = []
    monkeypatch.setattr(sys.modules["detr_fast.ops.linear_assignment"], "_threads", lambda: 4)
    with dispatch.recording(lambda op, decision: chosen.append(decision.implementation.name)):
        ops.linear_assignment(torch.rand(48, 20, 100))
        LINEAR_ASSIGNMENT.choose(torch.empty(16, 300, 300), torch.zeros(1, dtype=torch.int64))
    assert chosen == ["scipy", "threads"]


def test_a_gpu_takes_the_kernel_and_never_waits(unmeasured):
    chosen = []
    with (
        FakeTensorMode(),
        dispatch.recording(lambda op, decision: chosen.append((decision.implementation.name, decision.note))),
    ):
        cost, counts = torch.empty(6, 8, 20, 100, device="cuda"), torch.empty(8, dtype=torch.int64, device="cuda")
        assert count(lambda: ops.linear_assignment(cost, counts)).total_synchronisations == 0
    assert chosen[0] == ("triton", "unmeasured on this GPU: run detr-fast tune")


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        ((1, 600, 100), torch.float32, "600 targets and 100 queries: it takes up to 512 and 1000"),
        ((1, 20, 1200), torch.float32, "20 targets and 1200 queries: it takes up to 512 and 1000"),
        ((1, 20, 100), torch.float64, "float64 inputs: it takes float32"),
    ],
)
def test_what_the_kernel_cannot_take_goes_to_the_host_and_is_refused_by_name(shape, dtype, reason):
    with FakeTensorMode():
        cost = torch.empty(shape, device="cuda", dtype=dtype)
        assert ops.linear_assignment(cost).device.type == "cuda"
        with use_backend(linear_assignment="triton"), pytest.raises(BackendError, match=reason):
            ops.linear_assignment(cost)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"costs of shape \(2, 3, 4\) and counts of shape \(3,\)"):
        ops.linear_assignment(torch.zeros(2, 3, 4), torch.zeros(3, dtype=torch.int64))


@interpreter
@pytest.mark.parametrize("backend", [*HOST, "triton"])
def test_other_integers_than_int64_count_the_same_and_other_dtypes_are_refused(interpreter, backend):
    cost, counts = torch.rand(2, 3, 4), torch.tensor([2, 1])
    with use_backend(linear_assignment=backend):
        assert torch.equal(ops.linear_assignment(cost, counts.int()), ops.linear_assignment(cost, counts))
        with pytest.raises(TypeError, match=r"got counts of torch\.float32; expected integers"):
            ops.linear_assignment(cost, counts.float())


def test_meta_tensors_give_shapes():
    assert ops.linear_assignment(torch.empty(6, 2, 5, 9, device="meta")).shape == (6, 2, 5)


def test_assignments_compile_without_a_graph_break():
    cost = torch.randn(2, 3, 5)
    compiled = torch.compile(lambda cost: ops.linear_assignment(cost * 2) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(cost), ops.linear_assignment(cost) + 1)


@interpreter
def test_opcheck_accepts_the_kernel():
    arguments = torch.randn(2, 2, 3, 5, requires_grad=True), torch.tensor([3, 1])
    torch.library.opcheck(torch.ops.detr_fast.linear_assignment.default, arguments)


def test_opcheck_accepts_the_host():
    arguments = torch.randn(2, 2, 3, 5, requires_grad=True), torch.tensor([3, 1]), 2
    torch.library.opcheck(torch.ops.detr_fast.linear_assignment_on_host.default, arguments)


@interpreter
def test_a_failing_compilation_is_seen_before_it_runs(monkeypatch):
    from detr_fast.ops.linear_assignment import LINEAR_ASSIGNMENT

    def fail(*_):
        raise RuntimeError("no registers left")

    LINEAR_ASSIGNMENT.forget()
    monkeypatch.setattr(kernels, "compile_linear_assignment", fail)
    with use_backend(linear_assignment="triton"), pytest.raises(BackendError, match="no registers left"):
        ops.linear_assignment(torch.randn(2, 3, 8))
    LINEAR_ASSIGNMENT.forget()


@pytest.mark.gpu
def test_on_a_gpu_assignments_are_captured_in_a_cuda_graph():
    cost, counts = torch.randn(sized(6, 1), 4, 20, 100, device=DEVICE), torch.tensor([20, 3, 0, 11], device=DEVICE)
    ops.linear_assignment(cost, counts)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        query = ops.linear_assignment(cost, counts)
    cost.copy_(torch.randn_like(cost))
    graph.replay()
    assert torch.equal(query.cpu(), ops.linear_assignment(cost.cpu(), counts.cpu()))
