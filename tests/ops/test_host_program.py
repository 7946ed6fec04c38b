from __future__ import annotations

import struct

import pytest
import torch
from detr_fast.kernels import launch

from detr_fast import ops, use_backend
from detr_fast.ops.host_program import record
from detr_fast.ops.host_recorder import Unrepeatable


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: [x * torch.rand_like(x)], "something else each time"),
        (lambda x: [x * x.sum().item()], "something else each time"),
        (lambda x: [x * OUTSIDE], "comes from outside"),
    ],
    ids=["random", "value", "outside"],
)
def test_what_can_not_be_done_again_is_refused(function, reason):
    with pytest.raises(Unrepeatable, match=reason):
        record(function, [torch.randn(3, requires_grad=True)], [], None)


OUTSIDE = torch.randn(3)


def test_a_program_does_on_other_tensors_what_was_recorded():
    def function(x):
        return [(x @ weight.t()).view(2, 3, 2).softmax(-1).flatten(0, 1).chunk(2)[0] * 3]

    weight = torch.randn(2, 5, requires_grad=True)
    program = record(function, [torch.randn(6, 5, requires_grad=True)], [weight], None)
    x = torch.randn(6, 5, requires_grad=True)
    kept, (found_y,) = program.forward(None, 0, [x, weight])
    y = function(x)[0]
    assert torch.equal(found_y, y)
    dy = torch.randn_like(y)
    found = program.backward(0, kept, (dy,))
    assert all(map(torch.equal, found, torch.autograd.grad(y, (x, weight), dy)))


def test_views_of_inputs_are_taken_again_and_the_inputs_themselves_are_kept():
    weight = torch.randn(4, 5, requires_grad=True)
    program = record(lambda x: [x @ weight.t()], [torch.randn(3, 5, requires_grad=True)], [weight], None)
    kept, _ = program.forward(None, 0, [torch.randn(3, 5, requires_grad=True), weight])
    assert any(one is weight for one in kept)


def as_passed(argument):
    """A kernel takes numbers in fp32."""
    return struct.unpack("<f", struct.pack("<f", argument))[0] if isinstance(argument, float) else argument


def launches_of(stub, run):
    """Grids and numbers of what is launched, and how many addresses each launch gets."""
    before = len(stub.launched)
    run()
    seen = []
    for grid, arguments in stub.launched[before:]:
        addresses = [a for a in arguments if isinstance(a, torch.Tensor) or (type(a) is int and a > 1 << 40)]
        numbers = [a for a in arguments if not isinstance(a, torch.Tensor) and not (type(a) is int and a > 1 << 40)]
        seen.append((grid, [as_passed(one) for one in numbers], len(addresses)))
    return seen


@pytest.mark.offline
def test_compiled_programs_launch_the_same_with_addresses_in_the_tensors_places(stub_gpu, monkeypatch):
    from detr_fast import implementation
    from detr_fast.ops import boundary

    for module in (implementation, boundary):
        monkeypatch.setattr(module, "INTERPRETING", True)
    x, residual = (torch.randn(5, 64, requires_grad=True) for _ in range(2))
    weight, bias = (torch.randn(64, requires_grad=True) for _ in range(2))
    seed, dy = torch.ones(1, dtype=torch.int64), torch.randn(5, 64)

    def function(x, residual):
        return [ops.add_layer_norm(x, residual, weight, bias, dropout_p=0.1)]

    with use_backend("triton"):
        program = record(function, [x, residual], [weight, bias], seed)

        def parts():
            torch.autograd.grad(function(x, residual)[0], (x, residual, weight, bias), dy)

        def again():
            kept, _ = program.forward(seed, 1, [x, residual, weight, bias])  # the first offset
            program.backward(1, kept, (dy,))

        expected, found = launches_of(stub_gpu, parts), launches_of(stub_gpu, again)
    assert len(expected) == 3
    assert found == expected
    assert program.draws == 1
    launch.forget_programs()


@pytest.mark.offline
def test_inputs_in_one_storage_are_found_wherever_they_lie(stub_gpu, monkeypatch):
    """As flattened parameters are, whose distances differ from layer to layer."""
    from detr_fast import implementation
    from detr_fast.ops import boundary

    for module in (implementation, boundary):
        monkeypatch.setattr(module, "INTERPRETING", True)

    def flat(gap):
        memory = torch.randn(5 * 64 + 2 * (64 + gap))
        weight, bias = memory[320 + gap :][: 2 * (64 + gap)].view(2, -1)[:, :64].unbind(0)
        return [memory[:320].view(5, 64), weight, bias]

    with use_backend("triton"):
        program = record(lambda x: [ops.layer_norm(x, (64,), *given[1:])], (given := flat(0))[:1], given[1:], None)
        for inputs in (given, flat(32)):
            before = len(stub_gpu.launched)
            program.forward(None, 0, inputs)
            (_, arguments), *_ = stub_gpu.launched[before:]
            assert {t.data_ptr() for t in inputs} <= set(arguments)
    launch.forget_programs()


def test_inputs_that_overlap_are_not_recorded():
    x = torch.randn(8)
    assert record(lambda x, y: [x[:4] + y], [x[:6], x[2:6]], [], None) is None


def test_no_graph_outlives_its_recording():
    """A parameter's node that is kept alive belongs to the stream of then, and no CUDA graph can be captured on another."""

    def node():
        return weight.view_as(weight).grad_fn.next_functions[0][0]

    def function(x):
        node().metadata["recorded"] = True
        return [(x @ weight.t()).softmax(-1).tanh()]

    weight = torch.randn(4, 5, requires_grad=True)
    program = record(function, [torch.randn(3, 5, requires_grad=True)], [weight], None)
    assert program is not None
    assert "recorded" not in node().metadata
