from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from detr_fast.kernels import launch
from detr_fast.kernels import layer_norm as kernels

from benchmarks.hardware import DEVICE, sized
from detr_fast import dispatch, ops
from detr_fast.dispatch import BackendError, use_backend
from detr_fast.ops.layer_norm import LAYER_NORM
from detr_fast.testing import assert_as_accurate_as_eager

interpreter = pytest.mark.interpreter


@pytest.fixture
def triton():
    with use_backend(layer_norm="triton"):
        yield


def parameters(columns, dtype=torch.float32):
    return torch.randn(columns, dtype=dtype) + 1, torch.randn(columns, dtype=dtype)


@interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [0, 1, 37])  # none, one, no multiple of a tile
def test_layer_norm_is_as_accurate_as_eager(triton, rows, dtype):
    assert_as_accurate_as_eager(
        lambda x, w, b: ops.layer_norm(x, (96,), w, b),
        reference=lambda x, w, b: F.layer_norm(x, (96,), w, b),
        inputs=[torch.randn(rows, 96) * 50 + 1000, *parameters(96)],
        dtype=dtype,
    )


@interpreter
@pytest.mark.parametrize("given", ["neither", "weight", "bias"])
def test_weight_and_bias_may_be_left_out(triton, given):
    weight, bias = parameters(20)
    inputs = [torch.randn(5, 20), weight if given == "weight" else None, bias if given == "bias" else None]
    assert_as_accurate_as_eager(
        lambda x, w, b: ops.layer_norm(x, (20,), w, b),
        reference=lambda x, w, b: F.layer_norm(x, (20,), w, b),
        inputs=inputs,
        dtype=torch.float32,
    )


@interpreter
def test_several_normalised_dimensions_and_odd_layouts_work(triton):
    weight, bias = torch.randn(3, 10), torch.randn(3, 10)
    assert_as_accurate_as_eager(
        lambda x, w, b: ops.layer_norm(x.transpose(0, 1), (3, 10), w, b),
        reference=lambda x, w, b: F.layer_norm(x.transpose(0, 1), (3, 10), w, b),
        inputs=[torch.randn(4, 5, 3, 10), weight, bias],
        dtype=torch.float32,
        upstream=lambda y: torch.randn(1, 1, 3, 10).expand(y.shape),
    )


@interpreter
def test_the_double_backward_is_right(triton):
    x, (w, b) = torch.randn(3, 6, requires_grad=True), parameters(6)
    w.requires_grad_(), b.requires_grad_()

    def penalty(function):
        (g,) = torch.autograd.grad(function(x, (6,), w, b).square().sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), (x, w, b))

    for ours, expected in zip(penalty(ops.layer_norm), penalty(F.layer_norm)):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@interpreter
@pytest.mark.parametrize("given", ["both", "neither"])
def test_opcheck_accepts_both_ops(given):
    x = torch.randn(5, 24, requires_grad=True)
    w, b = (p.requires_grad_() for p in parameters(24)) if given == "both" else (None, None)
    torch.library.opcheck(torch.ops.detr_fast.layer_norm.default, (x, w, b, 1e-5, torch.float32))
    _, mean, rstd = torch.ops.detr_fast.layer_norm(x.detach(), w, b, 1e-5, torch.float32)
    wanted = [True, given == "both", given == "both"]
    arguments = (torch.randn(5, 24), x, w, b, mean.detach(), rstd.detach(), 1e-5, wanted)
    torch.library.opcheck(torch.ops.detr_fast.layer_norm_backward.default, arguments)


@interpreter
def test_a_compiled_model_has_no_graph_break_and_equal_gradients(triton):
    x, (w, b) = torch.randn(4, 16, requires_grad=True), parameters(16)
    compiled = torch.compile(lambda x: ops.layer_norm(x * 2, (16,), w, b) + 1, fullgraph=True, backend="aot_eager")
    y, expected = compiled(x), F.layer_norm(x * 2, (16,), w, b) + 1
    torch.testing.assert_close(y, expected)
    weights = torch.randn(4, 16)
    for ours, theirs in zip(
        torch.autograd.grad((y * weights).sum(), x), torch.autograd.grad((expected * weights).sum(), x)
    ):
        torch.testing.assert_close(ours, theirs)


@interpreter
def test_only_inputs_that_need_a_gradient_get_one(triton, monkeypatch):
    asked = {}
    original = kernels.layer_norm_backward
    monkeypatch.setattr(kernels, "layer_norm_backward", lambda *a, **k: asked.update(k) or original(*a, **k))
    x, (w, b) = torch.randn(3, 8, requires_grad=True), parameters(8)
    ops.layer_norm(x, (8,), w, b).sum().backward()
    assert (asked["with_dx"], asked["with_dw"], asked["with_db"]) == (True, False, False)


@interpreter
def test_without_gradients_nothing_is_recorded(triton):
    with torch.no_grad():
        assert ops.layer_norm(torch.randn(2, 8, requires_grad=True), (8,)).grad_fn is None
    with torch.inference_mode():
        assert ops.layer_norm(torch.randn(2, 8), (8,)).shape == (2, 8)


@interpreter
def test_vmap_and_forward_mode_say_that_they_are_only_eager(triton):
    with pytest.raises(BackendError, match=r"torch\.func transforms"):
        torch.vmap(lambda x: ops.layer_norm(x, (4,)))(torch.randn(2, 3, 4))


@interpreter
def test_a_failing_compilation_is_seen_before_the_forward_runs(monkeypatch):
    LAYER_NORM.forget()

    def fail(*_, **__):
        raise RuntimeError("no registers left")

    monkeypatch.setattr(launch, "compile_variant", fail)
    with use_backend(layer_norm="triton"), pytest.raises(BackendError, match="no registers left"):
        ops.layer_norm(torch.randn(2, 8), (8,))
    LAYER_NORM.forget()


def test_fake_cuda_tensors_trace_forward_without_a_gpu():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), use_backend(layer_norm="triton"):
        x = torch.empty(7, 33, device="cuda", dtype=torch.bfloat16)
        y = ops.layer_norm(x, (33,))
    assert (y.shape, y.dtype, y.device.type) == ((7, 33), torch.bfloat16, "cuda")


def test_auto_on_a_gpu_is_careful_where_nothing_was_measured(unmeasured):
    from torch._subclasses.fake_tensor import FakeTensorMode

    chosen = {}

    def note(op, decision):
        chosen[decision.shapes] = (decision.implementation.name, decision.note, decision.reasons)

    with FakeTensorMode(), dispatch.recording(note):
        for rows in (100, 1_000_000):
            ops.layer_norm(torch.empty(rows, 256, device="cuda"), (256,))
    assert chosen["(100, 256) float32"][0] == "eager"
    assert "detr-fast tune" in chosen["(100, 256) float32"][2]["triton"]
    assert chosen["(1000000, 256) float32"][:2] == ("triton", "unmeasured on this GPU: run detr-fast tune")


@pytest.mark.parametrize(
    ("shape", "normalized", "dtype", "reason"),
    [
        ((1, 1 << 25), (1 << 25,), torch.float32, "33554432 normalised elements: it takes 1 to 16777216"),
        ((2, 4), (4,), torch.float64, "float64 inputs: it takes bfloat16, float16, float32"),
        ((2, 4), (5,), torch.float32, "do not fit each other"),
    ],
)
def test_what_the_kernel_cannot_take_is_refused_in_words(shape, normalized, dtype, reason):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), use_backend(layer_norm="triton"), pytest.raises(BackendError, match=reason):
        ops.layer_norm(torch.empty(shape, device="cuda", dtype=dtype), normalized)


def test_calling_the_raw_op_on_cpu_tensors_explains_itself():
    if dispatch.INTERPRETING:
        pytest.skip("the interpreter does take CPU tensors")
    with pytest.raises(RuntimeError, match=r"got CPU tensors.*TRITON_INTERPRET=1"):
        torch.ops.detr_fast.layer_norm(torch.randn(2, 4), None, None, 1e-5, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [1, 100, 256, 1024, 8192])
def test_on_a_gpu_layer_norm_is_as_accurate_as_eager(triton, columns, dtype):
    inputs = [t.to(DEVICE) for t in (torch.randn(sized(1037, 5), columns), *parameters(columns))]
    assert_as_accurate_as_eager(
        lambda x, w, b: ops.layer_norm(x, (columns,), w, b),
        reference=lambda x, w, b: F.layer_norm(x, (columns,), w, b),
        inputs=inputs,
        dtype=dtype,
    )


@pytest.mark.gpu
def test_on_a_gpu_layer_norm_is_captured_in_a_cuda_graph(triton):
    x = torch.randn(300, 256, device=DEVICE)
    ops.layer_norm(x, (256,))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.layer_norm(x, (256,))
    x.copy_(torch.randn_like(x))
    graph.replay()
    torch.testing.assert_close(y, F.layer_norm(x, (256,)))
