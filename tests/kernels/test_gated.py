"""activation(gate) * up, of two tensors or of one tensor's halves, and both gradients."""

from __future__ import annotations

import pytest
import torch
from detr_fast.kernels import gated, offline
from detr_fast.kernels.analysis import analyse
from detr_fast.kernels.gated import Gate
from detr_fast.kernels.rows import tile_elements
from hypothesis import strategies as st

from detr_fast.ops.feed_forward_autograd import ACTIVATIONS
from detr_fast.testing import assert_as_accurate_as_eager
from detr_fast.testing.cases import generated, sizes
from detr_fast.testing.interpreter import checked_interpreter

interpreted = pytest.mark.interpreter
bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32


class KernelGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, *kind):
        ctx.save_for_backward(gate, up)
        ctx.kind = Gate(*kind)
        return gated.gated_forward(gate, up, ctx.kind)

    @staticmethod
    def backward(ctx, dy):
        wanted = dict(zip(("with_dgate", "with_dup"), ctx.needs_input_grad))
        return *gated.gated_backward(dy, *ctx.saved_tensors, ctx.kind, **wanted), *(None,) * len(ctx.kind)


def eager(gate, up, activation, gate_last=False, neighbours=False, limit=None, plus_one=False):
    if up is None and neighbours:
        gate, up = gate.unflatten(-1, (-1, 2)).unbind(-1)
    elif up is None:
        gate, up = gate.chunk(2, dim=-1)
        gate, up = (up, gate) if gate_last else (gate, up)
    if limit is not None:
        gate, up = torch.where(gate >= limit, limit, gate), torch.where(up.abs() >= limit, up.sign() * limit, up)
    return ACTIVATIONS[activation](gate) * (up + 1 if plus_one else up)


# No rows, one element, a cut tile behind full ones, rows of several blocks, whole ones, and elements read one by one.
@interpreted
@pytest.mark.parametrize(
    ("shape", "joined", "activation", "dtype"),
    [
        ((0, 8), False, "silu", bf16),
        ((0, 8), True, "silu", bf16),
        ((1, 1), False, "gelu", fp32),
        ((1, 1), True, "silu", fp16),
        ((3, 2, 700), False, "silu", bf16),
        ((5, 1000), False, "gelu", bf16),
        ((3, 1001), False, "gelu_tanh", fp16),
        ((2, 2048), False, "relu", fp32),
        ((2, 2, 1096), True, "silu", bf16),
        ((3, 2048), True, "gelu_tanh", fp16),
        ((70, 64), True, "gelu", fp32),
        ((300, 16), True, "silu", fp32),
        ((41, 24), True, "quick_gelu", bf16),
        ((37, 101), True, "relu", bf16),
        ((3, 1, 1030), True, "gelu", fp32),
    ],
)
def test_it_is_as_accurate_as_eager(interpreter, shape, joined, activation, dtype):
    gate, up = (torch.randn(shape) * 3 for _ in range(2))
    given = [torch.cat([gate, up], -1), None] if joined else [gate, up]
    for gate_last in (False, True) if joined else (False,):
        values = [*given, *Gate(activation, gate_last)]
        assert_as_accurate_as_eager(KernelGate.apply, reference=eager, inputs=values, dtype=dtype)


@interpreted
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
def test_large_values_are_as_accurate_as_eager(interpreter, activation):
    gate, up = (torch.rand(4, 256) * 2 - 1 for _ in range(2))
    for dtype, factor in ((bf16, 1e15), (fp16, 200.0), (fp32, 300.0)):
        values = [gate * factor, up, *Gate(activation)]
        assert_as_accurate_as_eager(KernelGate.apply, reference=eager, inputs=values, dtype=dtype)


@interpreted
def test_the_gate_is_not_rounded_by_itself(interpreter):
    gate, up = torch.tensor([[300.0]], dtype=fp16), torch.tensor([[1 / 3]], dtype=fp16)
    exact = (300 * torch.sigmoid(torch.tensor(300.0)) * up.float()).half()
    assert torch.equal(gated.gated_forward(gate, up, Gate("silu")), exact)
    assert gated.gated_forward(gate * 200, up, Gate("relu")).isfinite().all()  # 60,000 / 3


@interpreted
@pytest.mark.parametrize("joined", [False, True])
def test_halves_of_wider_rows_and_rows_of_gradients_in_any_order_are_read_where_they_lie(interpreter, joined):
    wide = torch.randn(6, 160)
    given = [wide[:, 8:136], None] if joined else [wide[:, 8:72], wide[:, 72:136]]
    transposed = torch.randn(64, 6).t()
    for upstream in (lambda y: transposed, lambda y: torch.randn(()).expand(y.shape)):
        values = [*given, *Gate("silu", joined)]
        assert_as_accurate_as_eager(KernelGate.apply, reference=eager, inputs=values, dtype=fp32, upstream=upstream)


@interpreted
@pytest.mark.parametrize("gate_last", [False, True])
def test_halves_of_windows_that_overlap_are_read_where_they_lie(interpreter, gate_last):
    series = torch.randn(5 * 64, requires_grad=True)
    windows, dy = series.unfold(0, 128, 64), torch.randn(4, 64)
    with checked_interpreter():
        ours = KernelGate.apply(windows, None, *Gate("silu", gate_last))
        (gradient,) = torch.autograd.grad(ours, series, dy)
    theirs = eager(windows, None, "silu", gate_last)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradient, *torch.autograd.grad(theirs, series, dy))


@interpreted
@pytest.mark.parametrize("trains", ["gate", "up"])
def test_what_does_not_train_gets_no_gradient(interpreter, trains):
    gate, up = (torch.randn(3, 40, requires_grad=name == trains) for name in ("gate", "up"))
    (ours,) = torch.autograd.grad(KernelGate.apply(gate, up, *Gate("silu")).sum(), gate if trains == "gate" else up)
    (theirs,) = torch.autograd.grad(eager(gate, up, "silu").sum(), gate if trains == "gate" else up)
    torch.testing.assert_close(ours, theirs)


OF_GPT_OSS = Gate("quick_gelu", neighbours=True, limit=7.0, plus_one=True)
OF_DEEPSEEK = Gate("silu", limit=10.0)


@interpreted
@pytest.mark.parametrize(
    ("shape", "kind", "joined", "dtype"),
    [
        ((0, 8), OF_GPT_OSS, True, bf16),
        ((1, 1), OF_GPT_OSS, True, fp32),
        ((3, 2, 700), OF_GPT_OSS, True, bf16),
        ((2, 2048), OF_GPT_OSS, True, fp16),
        ((37, 101), OF_GPT_OSS, True, fp32),
        ((300, 16), OF_GPT_OSS._replace(limit=None), True, bf16),
        ((5, 1000), OF_DEEPSEEK, False, bf16),
        ((3, 1001), OF_DEEPSEEK, False, fp16),
        ((41, 24), OF_DEEPSEEK, True, fp32),
        ((3, 1030), OF_GPT_OSS._replace(neighbours=False), True, bf16),
    ],
)
def test_a_limited_gate_is_as_accurate_as_eager(interpreter, shape, kind, joined, dtype):
    gate, up = (torch.randn(shape) * 8 for _ in range(2))  # a third of which, or so, is beyond the limit
    given = [torch.cat([gate, up], -1), None] if joined else [gate, up]
    assert_as_accurate_as_eager(KernelGate.apply, reference=eager, inputs=[*given, *kind], dtype=dtype)


@interpreted
def test_neighbours_of_wider_rows_are_read_where_they_lie(interpreter):
    wide = torch.randn(6, 200)[:, 8:136]
    values = [wide, None, *OF_GPT_OSS]
    assert_as_accurate_as_eager(KernelGate.apply, reference=eager, inputs=values, dtype=fp32)


@interpreted
def test_at_the_limit_and_beyond_there_is_no_gradient(interpreter):
    gate = torch.tensor([[2.0, 2.1, -9.0, 1.9, 1.0]], requires_grad=True)
    up = torch.tensor([[2.0, -2.0, 1.0, 1.0, -2.1]], requires_grad=True)
    dgate, dup = torch.autograd.grad(KernelGate.apply(gate, up, *Gate("silu", limit=2.0)).sum(), (gate, up))
    assert (dgate == 0).tolist() == [[True, True, False, False, False]]
    assert (dup == 0).tolist() == [[True, True, False, False, True]]


@interpreted
def test_nan_goes_on_through_every_activation(interpreter):
    gate, up, nan = torch.tensor([[float("nan"), 1.0, 0.0]]), torch.ones(1, 3), torch.tensor([[True, False, False]])
    for activation in ACTIVATIONS:
        for limit in (None, 0.5):
            assert torch.equal(gated.gated_forward(gate, up, Gate(activation, limit=limit)).isnan(), nan)


@interpreted
@generated(
    12,
    count=sizes(40, tile=32),
    columns=sizes(1100, tile=1024, least=1),
    activation=st.sampled_from(["silu", "gelu", "gelu_tanh", "relu"]),
    form=st.sampled_from(["two", "gate first", "gate last"]),
)
def test_any_case_is_as_accurate_as_eager(values, count, columns, activation, form):
    given = [values(count, columns), values(count, columns)]
    if values.dtype == fp16:
        given[1] = given[1].clamp(-8, 8)  # whose products have no place in it
    if form != "two":
        given = [torch.cat(given, -1), None]
    with checked_interpreter(seed=values.seed):
        inputs = [*given, *Gate(activation, form == "gate last")]
        assert_as_accurate_as_eager(KernelGate.apply, reference=eager, inputs=inputs, dtype=values.dtype)


@pytest.mark.offline
@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_one_gradient_of_two_compiles_with_every_triton(wanted):
    variant = gated.variant_of(64, bf16, Gate("relu"), gated.TWO, True, 8, wanted)
    assert offline.compile_variant(variant, "sm_80")[2].spills == 0


@pytest.mark.offline
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize(
    ("activation", "wanted", "most", "streams"),
    [("silu", None, 23, 3), ("silu", (True, True), 30, 5), ("gelu_tanh", (True, True), 38, 5)],
)
def test_memory_is_the_bound_in_16_bits(target, activation, wanted, most, streams):
    variant = gated.variant_of(1024, bf16, Gate(activation), gated.TWO, True, 8, wanted)
    architecture = int(target.removeprefix("sm_"))
    binary, _, resources = offline.compile_variant(variant, target)
    code = analyse(binary, architecture, tile_elements(variant) / variant.num_warps)
    assert code.instructions_per_element <= most
    assert code.dram_headroom(architecture, bytes_per_element=2 * streams) >= 2
    assert code.opcodes["LDG.E.128"] + code.opcodes["STG.E.128"] == 2 * streams  # 16 bytes each
    assert resources.spills == 0
