"""Programs in C++ up to the driver's door, and through it: launches are Python's own, on addresses."""

from __future__ import annotations

import pytest
import torch

from benchmarks.test_host_time import CASES
from detr_fast import dispatch, implementation, nn, ops, use_backend
from detr_fast.ops import boundary, host_native
from tests.ops.test_host_program import launches_of

pytestmark = pytest.mark.offline


@pytest.fixture
def on_stub(stub_gpu, host, monkeypatch):
    for module in (implementation, boundary):
        monkeypatch.setattr(module, "INTERPRETING", True)
    with use_backend("triton"):
        yield stub_gpu
    dispatch.forget_decisions()


def pointers_of(stub, tensors, run):
    """Of each launch, which of the tensors, by index, each pointer is to the start of (-1 for memory of the op's own)."""
    before = len(stub.launched)
    run()
    starts = {t.data_ptr(): index for index, t in enumerate(tensors)}
    found = []
    for _, arguments in stub.launched[before:]:
        addresses = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]
        found.append([starts.get(a, -1) for a in addresses if type(a) is int and a > 1 << 40])
    return found


@pytest.mark.parametrize("name", CASES)
def test_an_op_launches_what_python_launches_on_the_same_tensors(name, on_stub):
    function, _, shapes = CASES[name]
    leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]
    dy = torch.zeros_like(function(*leaves))

    def step():
        y = function(*leaves)
        torch.autograd.grad(y, leaves, dy)
        return y

    def python():
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):  # which C++ leaves to Python
            step()

    expected, pointers = launches_of(on_stub, python), pointers_of(on_stub, [*leaves, dy], python)
    for _ in range(2):
        step()
    names, ahead = [], [step().grad_fn]
    while ahead:
        node = ahead.pop()
        if node is not None:
            names.append(node.name())
            ahead += [one for one, _ in node.next_functions]
    assert "OpProgramBackward" in names, host_native.unrepeatable
    assert launches_of(on_stub, step) == expected
    assert pointers_of(on_stub, [*leaves, dy], step) == pointers
    assert any(index >= 0 for one in pointers for index in one)


def test_a_program_of_one_tensor_given_twice_serves_no_other_call(on_stub):
    x, y, z = (torch.randn(1, 4, 2, 32) for _ in range(3))
    for _ in range(3):
        ops.attention(x, x, z)  # known by one address
    for _ in range(3):
        (forward, *_) = pointers_of(on_stub, [x, y, z], lambda: ops.attention(x, y, z))
        assert {0, 1, 2} <= set(forward)


def test_a_layer_launches_what_its_parts_launch(on_stub):
    layer = nn.TransformerEncoderLayer(64, 2, 64, 0.1, batch_first=True)
    x, padding = torch.randn(1, 4, 64, requires_grad=True), torch.tensor([[False] * 3 + [True]])
    leaves = [x, *layer.parameters()]

    def step():
        y = layer(x, src_key_padding_mask=padding)
        torch.autograd.grad(y, leaves, torch.zeros_like(y))
        return y

    expected = launches_of(on_stub, step)
    for _ in range(2):
        step()
    assert step().grad_fn.name() == "ProgramNodeBackward"
    assert launches_of(on_stub, step) == expected


def test_addresses_are_those_of_the_tensors(on_stub):
    x, weight, bias = (torch.randn(*shape) for shape in ((4, 64), (64,), (64,)))
    with torch.no_grad():
        for _ in range(3):
            y = ops.layer_norm(x, (64,), weight, bias)
    _, arguments = on_stub.launched[-1]
    addresses = [a for a in arguments if type(a) is int]
    for tensor in (x, weight, bias, y):
        assert tensor.data_ptr() in addresses
