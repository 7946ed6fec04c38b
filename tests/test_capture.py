"""What a capture that fails leaves behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.hardware import DEVICE, NEEDS_GPU
from detr_fast import capture as module
from detr_fast.capture import beside_the_default_stream, capture
from tests.stub_cuda import stubs


class Generator:
    """As torch's: while its capture did not end it draws nothing outside of one."""

    def __init__(self):
        self.state, self.offset = "capturing", 8

    def clone_state(self):
        return "as before"

    def graphsafe_set_state(self, state):
        self.state = state

    def get_offset(self):
        assert self.state != "capturing"
        return self.offset

    def set_offset(self, offset):
        assert offset % 4 == 0
        self.offset = offset


@pytest.fixture
def generator(monkeypatch):
    for name, value in stubs().items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "default_generators", (Generator(),))
    monkeypatch.setattr(module, "_failed", [])
    return torch.cuda.default_generators[0]


def test_a_capture_that_fails_tells_its_first_error_and_lets_generators_draw_again(generator, monkeypatch):
    class Ending:
        """As torch.cuda.graph, whose end fails, too."""

        def __init__(self, *_, **__):
            pass

        def __enter__(self):
            pass

        def __exit__(self, kind, error, trace):
            if error is not None:
                raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(torch.cuda, "graph", Ending)
    graph = object()
    with pytest.raises(ValueError, match="the first"), capture(graph):
        raise ValueError("the first")
    assert generator.state == "as before"
    assert generator.offset >= 8 + 2**40  # graphs captured before draw from 8 on
    assert module._failed == [graph]  # PyTorch's allocator goes on asking it


def test_a_capture_that_goes_well_changes_nothing(generator):
    graph, x = torch.cuda.CUDAGraph(), torch.ones(2)
    with capture(graph):
        y = x + 1.0
    assert (generator.state, generator.offset) == ("capturing", 8)
    assert module._failed == []
    x.fill_(4.0)
    graph.replay()
    assert y.tolist() == [5.0, 5.0]


@pytest.mark.gpu
@pytest.mark.skipif(NEEDS_GPU[1].args[0], reason="a capture needs a GPU")
def test_on_a_gpu_dropout_and_captures_go_on_after_one_that_failed():
    x = torch.randn(64, 64, device=DEVICE)
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
        assert not torch.equal(drawn, torch.rand(64, 64, device=DEVICE))  # nor what an older graph drew
