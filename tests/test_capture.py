"""What a capture that fails leaves behind."""

from __future__ import annotations

import gc
import weakref
from typing import ClassVar

import pytest
import torch
from torch import nn

from benchmarks.hardware import DEVICE, NEEDS_GPU
from detr_fast import capture as module
from detr_fast.capture import beside_the_default_stream, capture
from tests.stub_cuda import stubs


class Ending:
    """As torch.cuda.graph, the end of whose capture fails, too, where something did in it."""

    begun: ClassVar[list] = []

    def __init__(self, graph, **options):
        self.begun.append((graph, options["stream"]))

    def __enter__(self):
        pass

    def __exit__(self, kind, error, trace):
        if error is not None:
            raise RuntimeError("operation failed due to a previous error during capture")


@pytest.fixture
def emulated(monkeypatch):
    for name, value in stubs().items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(module, "_failed", [])


def test_after_a_capture_that_fails_another_ends_for_the_generators_and_the_first_error_is_told(emulated, monkeypatch):
    monkeypatch.setattr(torch.cuda, "graph", Ending)
    monkeypatch.setattr(Ending, "begun", [])
    graph = object()
    with pytest.raises(ValueError, match="the first"), capture(graph):
        raise ValueError("the first")
    assert [one is graph for one, _ in Ending.begun] == [True, False]
    assert Ending.begun[0][1] is Ending.begun[1][1]  # on the same stream
    assert module._failed == [graph]  # PyTorch's allocator goes on asking it


def test_where_cuda_is_broken_the_first_error_is_told_all_the_same(emulated, monkeypatch):
    class Broken(Ending):
        def __exit__(self, kind, error, trace):
            raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "graph", Broken)
    graph = object()
    with pytest.raises(ValueError, match="the first"), capture(graph):
        raise ValueError("the first")
    assert module._failed[0] is graph
    assert len(module._failed) == 2  # the allocator goes on asking the other one, too


def test_a_capture_that_goes_well_changes_nothing(emulated):
    graph, x = torch.cuda.CUDAGraph(), torch.ones(2)
    with capture(graph):
        y = x + 1.0
    assert module._failed == []
    x.fill_(4.0)
    graph.replay()
    assert y.tolist() == [5.0, 5.0]


@pytest.mark.gpu
@pytest.mark.skipif(NEEDS_GPU[1].args[0], reason="a capture needs a GPU")
def test_on_a_gpu_dropout_and_captures_go_on_after_one_that_failed():
    x = torch.randn(64, 64, device=DEVICE)
    x @ x  # cuBLAS can't begin in a capture
    before = torch.cuda.CUDAGraph()
    with beside_the_default_stream(), capture(before):
        drawn = torch.rand(64, 64, device=DEVICE)

    def waiting():
        with capture(torch.cuda.CUDAGraph()):
            nn.functional.dropout(x @ x, 0.5)
            torch.cuda.synchronize()

    if DEVICE.type == "cuda":
        with pytest.raises(RuntimeError):
            waiting()
    nn.functional.dropout(x, 0.5)
    with beside_the_default_stream():
        again = torch.cuda.CUDAGraph()
        with capture(again):
            y = nn.functional.dropout(x @ x, 0.5)
        again.replay()
        first = y.clone()
        again.replay()
    torch.cuda.synchronize()
    assert y.isfinite().all()
    if DEVICE.type == "cuda":
        assert not torch.equal(first, y)  # each replay draws anew
        before.replay()
        older = drawn.clone()
        before.replay()
        assert not torch.equal(drawn, older)
        for graph, found in ((before, drawn), (again, y)):  # seeds go on reaching graphs, older ones too
            results = []
            for _ in range(2):
                torch.manual_seed(3)
                graph.replay()
                results.append(found.clone())
            assert torch.equal(*results)


def test_what_is_to_come_behind_a_capture_comes_when_it_has_ended_and_lives_as_long_as_the_graph(emulated):
    done, graph, kept = [], torch.cuda.CUDAGraph(), nn.Linear(1, 1)
    reference, number = weakref.ref(kept), len(module._failed)
    assert not module.recording()

    def action(kept=kept):
        done.append(module.recording())

    with capture(graph):
        assert module.recording()
        module.behind_the_capture(action)
        del kept, action
        assert not done
    assert done == [False]
    gc.collect()
    assert reference() is not None
    del graph
    gc.collect()
    assert reference() is None
    assert len(module._failed) == number


def test_behind_a_capture_that_fails_nothing_comes_and_the_next_one_begins_anew(emulated):
    done = []

    def capture_and_fail():
        with capture(torch.cuda.CUDAGraph()):
            module.behind_the_capture(lambda: done.append("wrong"))
            raise ValueError("the first")

    with pytest.raises(ValueError, match="the first"):
        capture_and_fail()
    assert not module.recording()
    with capture(torch.cuda.CUDAGraph()):
        module.behind_the_capture(lambda: done.append("right"))
    assert done == ["right"]
