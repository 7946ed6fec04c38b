from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from benchmarks.hardware import DEVICE, sized
from detr_fast import dispatch, ops, use_backend
from detr_fast.dispatch import BackendError
from detr_fast.testing import assert_as_accurate_as_eager, count
from detr_fast.testing.interpreter import checked_interpreter

interpreter = pytest.mark.interpreter
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMS = {"two": (False, False), "gate first": (True, False), "gate last": (True, True)}


@pytest.fixture
def triton():
    with checked_interpreter(), use_backend(gated_activation="triton"):
        yield


def given(form="two", shape=(3, 2, 40), activation="silu", device="cpu"):
    """The arguments: gate and up, or both in one."""
    gate, up = (torch.randn(shape, device=device) for _ in range(2))
    joined, last = FORMS[form]
    return [torch.cat([gate, up], -1) if joined else gate, None if joined else up, activation, last]


def eager(gate, up, activation, last):
    if up is None:
        gate, up = gate.chunk(2, -1)[:: -1 if last else 1]
    return {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}[activation](gate) * up


def leaves_of(arguments):
    return [t.requires_grad_() for t in arguments[:2] if t is not None]


@interpreter
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_it_is_as_accurate_as_eager(triton, form, dtype):
    assert_as_accurate_as_eager(ops.gated_activation, reference=eager, inputs=given(form), dtype=dtype)


@interpreter
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpt_osss_gate_is_as_accurate_as_eager(triton, dtype):
    def ours(both):
        return ops.gated_activation(both, None, "quick_gelu", neighbours=True, limit=2.0, plus_one=True)

    def theirs(both):
        gate, up = both[..., ::2], both[..., 1::2]
        gate, up = torch.where(gate < 2, gate, 2.0), torch.where(up.abs() < 2, up, 2.0 * up.sign())
        return (up + 1) * (gate * torch.sigmoid(gate * 1.702))

    assert_as_accurate_as_eager(ours, reference=theirs, inputs=[torch.randn(3, 2, 80) * 2], dtype=dtype)
    both = torch.randn(3, 80)
    with use_backend(gated_activation="eager"):
        torch.testing.assert_close(ours(both), theirs(both))


@interpreter
@pytest.mark.parametrize("form", FORMS)
def test_nothing_but_what_was_given_is_kept_and_the_gradient_of_halves_is_one_tensor(triton, form):
    arguments, kept = given(form), []
    leaves = leaves_of(arguments)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = ops.gated_activation(*arguments)
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in leaves}
    for leaf, gradient in zip(leaves, torch.autograd.grad(y.sum(), leaves)):
        assert gradient.shape == leaf.shape
        assert gradient.is_contiguous()


def test_a_gpu_takes_one_launch_each_way_and_moves_as_many_bytes_as_there_are():
    with FakeTensorMode():
        for form in FORMS:
            arguments = given(form, (4096, 5504), device="cuda")
            counts = count(lambda arguments=arguments: ops.gated_activation(*arguments))
            assert counts.launches == {"gated_kernel": 1}
            arguments = given(form, (4096, 5504), device="meta")
            leaves = leaves_of(arguments)

            def step(arguments=arguments, leaves=leaves):
                with use_backend("triton"):
                    y = ops.gated_activation(*arguments)
                return torch.autograd.grad(y, leaves, torch.empty_like(y))

            assert count(step).launches == {"gated_kernel": 1, "gated_backward_kernel": 1}


@interpreter
@pytest.mark.parametrize("form", FORMS)
def test_the_double_backward_is_right(triton, form):
    arguments = given(form)
    leaves = leaves_of(arguments)

    def penalty(function):
        first = torch.autograd.grad(function(*arguments).pow(3).sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    torch.testing.assert_close(penalty(ops.gated_activation), penalty(eager), rtol=1e-3, atol=1e-3)


@interpreter
@pytest.mark.parametrize("form", FORMS)
def test_opcheck_accepts_both_ops(form):
    arguments = given(form)
    leaves_of(arguments)
    forward, backward = torch.ops.detr_fast.gated_activation, torch.ops.detr_fast.gated_activation_backward
    for rest in ((False, None, False), (form == "gate first", 1.5, True)):
        torch.library.opcheck(forward.default, (*arguments, *rest))
        dy = torch.randn(3, 2, 40).requires_grad_()
        for wanted in [[True, arguments[1] is not None], [False, True]][: 1 + (form == "two")]:
            torch.library.opcheck(backward.default, (dy, *arguments, *rest, wanted))


@interpreter
def test_a_compiled_model_has_no_graph_break_and_equal_gradients(triton):
    arguments = given("gate first")
    (x,) = leaves_of(arguments)

    def step(x):
        return ops.gated_activation(x * 2, *arguments[1:]).square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    found, expected = (torch.autograd.grad(run(x), x)[0] for run in (compiled, step))
    torch.testing.assert_close(found, expected)


@interpreter
def test_vmap_and_forward_mode_are_eager_and_the_kernel_says_so(triton):
    arguments = given()
    with pytest.raises(BackendError, match=r"torch\.func transforms"):
        torch.vmap(ops.gated_activation)(*arguments[:2])
    with use_backend("auto"):
        torch.testing.assert_close(torch.vmap(ops.gated_activation)(*arguments[:2]), eager(*arguments))
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(arguments[0], torch.ones_like(arguments[0]))
            functions = ops.gated_activation, eager
            tangents = [forward_ad.unpack_dual(function(dual, *arguments[1:])).tangent for function in functions]
        torch.testing.assert_close(*tangents)


def test_auto_on_a_gpu_is_careful_where_nothing_was_measured(unmeasured):
    chosen = {}
    with FakeTensorMode(), dispatch.recording(lambda op, one: chosen.update({one.shapes: one})):
        for rows in (100, 4096):
            ops.gated_activation(*given("two", (rows, 1024), device="cuda"))
    small, large = chosen["(100, 1024) silu float32"], chosen["(4096, 1024) silu float32"]
    assert small.implementation.name == "eager"
    assert "below 32 MiB of input it stays eager" in small.reasons["triton"]
    assert large.implementation.name == "triton"
    assert "run detr-fast tune" in large.note


def test_under_torch_compile_auto_leaves_it_to_inductor():
    with FakeTensorMode():
        arguments = given("two", (4096, 1024), device="cuda")
        seen = []

        def backend(graph, _):
            seen.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
            return graph.forward

        torch.compile(ops.gated_activation, backend=backend, fullgraph=True)(*arguments)
    assert [getattr(one, "__name__", "") for one in seen] == ["silu", "mul"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((torch.empty(2, 0), torch.empty(2, 0)), "0 hidden units: it takes 1 to 4194304"),
        ((torch.empty(2, 8, dtype=torch.float64),), "float64 inputs: it takes bfloat16, float16, float32"),
        ((torch.empty(2, 8), torch.empty(2, 8).half()), "a gate of torch.float32 beside torch.float16"),
    ],
)
def test_what_the_kernel_cannot_take_is_refused_in_words(arguments, reason):
    with use_backend(gated_activation="triton"), pytest.raises(BackendError, match=reason), FakeTensorMode() as mode:
        ops.gated_activation(*(mode.from_tensor(t).to("cuda") for t in arguments))


def test_what_does_not_fit_is_said():
    with pytest.raises(ValueError, match=r"got gate \(2, 8\) and up \(2, 4\); expected two tensors \(\.\.\., F\)"):
        ops.gated_activation(torch.empty(2, 8), torch.empty(2, 4))
    with pytest.raises(ValueError, match=r"got \(2, 7\) for gate and up; expected \(\.\.\., 2 F\)"):
        ops.gated_activation(torch.empty(2, 7))
    with pytest.raises(ValueError, match=r"got a limit of -1\.0; expected one above 0, or None"):
        ops.gated_activation(torch.empty(2, 8), limit=-1.0)
    with pytest.raises(ValueError, match="got gate_last and neighbours; expected one of them"):
        ops.gated_activation(torch.empty(2, 8), gate_last=True, neighbours=True)
    with pytest.raises(ValueError, match="gate_last, which is of both in one tensor"):
        ops.gated_activation(torch.empty(2, 8), torch.empty(2, 8), gate_last=True)
    with pytest.raises(ValueError, match="got activation 'swish'; expected one of relu, gelu"):
        ops.gated_activation(torch.empty(2, 8), activation="swish")


@pytest.mark.parametrize("form", FORMS)
def test_on_a_cpu_the_calls_are_torchs_own(form):
    for activation in ("silu", "gelu", "relu"):
        arguments = given(form, activation=activation)
        assert torch.equal(ops.gated_activation(*arguments), eager(*arguments))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 101, 1024, 11008])
@pytest.mark.parametrize("form", FORMS)
def test_on_a_gpu_it_is_as_accurate_as_eager(form, columns, dtype):
    with use_backend(gated_activation="triton"):
        arguments = given(form, (sized(67, 3), columns), "gelu", DEVICE)
        assert_as_accurate_as_eager(ops.gated_activation, reference=eager, inputs=arguments, dtype=dtype)
