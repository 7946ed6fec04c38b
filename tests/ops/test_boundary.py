from __future__ import annotations

from functools import partial

import pytest
import torch

from benchmarks.hardware import DEVICE, sized
from detr_fast import ops, use_backend
from detr_fast.dispatch import forget_decisions
from detr_fast.ops.layer_norm_autograd import forward
from tests.seen import Seen

pytestmark = pytest.mark.interpreter


@pytest.fixture(autouse=True)
def triton():
    with use_backend("triton"):
        yield


def leaves():
    return [torch.randn(*shape, requires_grad=True) for shape in ((3, 8), (8,), (8,))]


def layer_norm(x, weight, bias):
    return ops.layer_norm(x, (8,), weight, bias)


def test_a_dispatch_mode_sees_forward_and_backward_as_ops():
    inputs = leaves()
    with Seen() as seen:
        torch.autograd.grad(layer_norm(*inputs).sum(), inputs)
    ours = [name for name in seen.names if name.startswith("detr_fast::")]
    assert ours == ["detr_fast::layer_norm", "detr_fast::layer_norm_backward"]


def test_a_mode_that_is_entered_before_the_backward_alone_sees_that():
    inputs = leaves()
    loss = layer_norm(*inputs).sum()
    with Seen() as seen:
        torch.autograd.grad(loss, inputs)
    assert "detr_fast::layer_norm_backward" in seen.names


def test_a_profiler_sees_the_ops_by_name():
    inputs = leaves()
    with torch.profiler.profile() as profile:
        layer_norm(*inputs).sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert {"detr_fast::layer_norm", "detr_fast::layer_norm_backward"} <= names


def test_nobody_looking_takes_no_way_through_the_dispatcher_and_gives_the_same(monkeypatch):
    inputs = leaves()
    with Seen():  # the long way
        y = layer_norm(*inputs)
        expected = [y, *torch.autograd.grad(y.square().sum(), inputs)]

    def refuse(*args):
        raise AssertionError("went through the dispatcher")

    monkeypatch.setattr(forward, "_op", refuse)
    y = layer_norm(*inputs)
    found = [y, *torch.autograd.grad(y.square().sum(), inputs)]
    assert all(torch.equal(one, other) for one, other in zip(found, expected))
    assert not y.is_leaf
    with torch.no_grad():
        assert not layer_norm(*inputs).requires_grad
    with torch.inference_mode():
        assert layer_norm(*inputs).is_inference()


def test_a_batch_of_gradients_at_once_is_taken_by_pytorchs_transform():
    inputs = leaves()
    y = layer_norm(*inputs)
    upstream = torch.randn(2, *y.shape)
    single = [torch.autograd.grad(y, inputs, one, retain_graph=True) for one in upstream]
    batched = torch.autograd.grad(y, inputs, upstream, is_grads_batched=True)
    for ours, theirs in zip(batched, zip(*single)):
        assert torch.allclose(ours, torch.stack(theirs), atol=1e-6)


def test_a_function_mode_sees_the_op():
    class Watching(torch.overrides.TorchFunctionMode):
        def __init__(self):
            super().__init__()
            self.names = []

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watching() as mode:
        layer_norm(*leaves())
    assert any("detr_fast.layer_norm" in name for name in mode.names)


def test_a_subclass_or_a_fake_tensor_goes_through_the_dispatcher():
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode()
    fake = mode.from_tensor(torch.randn(3, 8))  # used outside its mode
    assert forward._shortcut((fake,)) is None
    assert forward._shortcut((torch.randn(3, 8, device="meta"),)) is None
    assert forward._shortcut(tuple(leaves())) is not None


def test_whichever_gradient_is_batched_or_negated_is_seen():
    x, residual, weight = torch.randn(3, 8, requires_grad=True), torch.randn(3, 8, requires_grad=True), torch.ones(8)
    _, total = ops.add_layer_norm(x, residual, weight, return_sum=True)  # dy is zeros of our own here
    upstream = torch.randn(2, 3, 8)
    (batched,) = torch.autograd.grad(total, x, upstream, is_grads_batched=True)
    assert torch.equal(batched, upstream)
    negated = torch._neg_view(residual.detach())
    with torch.no_grad():
        assert torch.equal(ops.add_layer_norm(x, negated, weight), ops.add_layer_norm(x, -residual, weight))


def test_a_profiler_of_all_threads_sees_the_ops_too():
    config = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    with torch.profiler.profile(experimental_config=config) as profile:
        layer_norm(*leaves())
    assert "detr_fast::layer_norm" in {event.key for event in profile.key_averages()}


KEYS = sized(600, 20)
CALLED_AGAIN = {
    "layer_norm": (lambda x, w, b: ops.layer_norm(x, (256,), w, b), [(sized(300, 3), 256), (256,), (256,)]),
    "attention": (
        lambda q, k, v: ops.attention(q, k, v, key_padding_mask=torch.arange(KEYS, device=DEVICE)[None] > KEYS - 9),
        [
            (1, 70, 2, 32),
            *[(1, KEYS, 2, 32)] * 2,
        ],  # so few queries that programs share their keys, by way of scratch memory
    ),
    "add_layer_norm": (partial(ops.add_layer_norm, dropout_p=0.1), [*[(sized(300, 3), 256)] * 2, (256,), (256,)]),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", CALLED_AGAIN)
def test_a_gpu_repeats_to_the_bit_what_it_did_with_the_same_tensors_and_with_others(name):
    function, shapes = CALLED_AGAIN[name]

    def step(leaves):
        torch.manual_seed(0)
        y = function(*leaves)
        return [y, *torch.autograd.grad(y, leaves, torch.ones_like(y))]

    sets = [[torch.randn(s, device=DEVICE, dtype=torch.float16, requires_grad=True) for s in shapes] for _ in range(2)]
    worked_out = []
    for leaves in sets:
        forget_decisions()
        worked_out.append(step(leaves))
    for leaves, expected in [*zip(sets, worked_out)] * 4:
        for garbage in expected:  # in the memory that is allocated next
            torch.full_like(garbage, torch.nan)
        assert all(torch.equal(one, other) for one, other in zip(step(leaves), expected))
