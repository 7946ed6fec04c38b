"""Which way the host takes, as benchmarks tell it."""

from __future__ import annotations

import pytest
import torch

from benchmarks.hardware import REHEARSAL
from benchmarks.host import from_python, way
from benchmarks.test_host_time import CASES
from detr_fast import dispatch, implementation, native, nn, use_backend
from detr_fast.ops import boundary

offline = pytest.mark.offline


@pytest.fixture
def on_stub(stub_gpu, host, monkeypatch):
    for module in (implementation, boundary):
        monkeypatch.setattr(module, "INTERPRETING", True)
    with use_backend("triton"):
        yield stub_gpu
    dispatch.forget_decisions()


@offline
@pytest.mark.parametrize("gradients", [True, False])
def test_an_op_goes_through_c_once_it_is_recorded_and_from_python_where_that_is_asked_for(on_stub, gradients):
    function, _, shapes = CASES["layer_norm"]
    leaves = [torch.randn(shape, requires_grad=gradients) for shape in shapes]

    def call():
        return [function(*leaves)]

    assert way(call) == "Python"
    call()
    call()
    assert way(call) == "C++"
    module = native.host
    with from_python():
        call()
        assert way(call) == "Python"
    assert native.host is module


@offline
def test_a_whole_layer_is_told_by_its_program_and_the_parts_of_another_by_theirs(on_stub):
    layer = nn.TransformerEncoderLayer(64, 2, 64, 0.1, batch_first=True)
    x = torch.randn(1, 4, 64, requires_grad=True)

    def call():
        return [layer(x)]

    for _ in range(4):
        call()
    assert way(call) == "C++"
    with from_python():
        for _ in range(4):
            call()
        assert way(call) == "Python"


def test_where_none_of_our_ops_runs_there_is_nothing_to_tell():
    x = torch.randn(4, requires_grad=True)
    assert way(lambda: [x * 2]) is None


@pytest.mark.gpu
def test_on_a_gpu_the_hosts_part_compiles(compiled_host):
    """The first test of a run: others wait for it."""
    assert not isinstance(compiled_host, str), compiled_host
    assert REHEARSAL or native.library().exists()
