"""The choice of the backward that adds dq up by atomics, and that the forward's choice is the backward's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from detr_fast.kernels import launch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.hardware import DEVICE, sized
from detr_fast import dispatch, ops
from detr_fast.dispatch import BackendError, use_backend
from detr_fast.explanation import explaining
from detr_fast.ops import regimes
from detr_fast.ops.attention import ATTENTION, EagerAttention
from detr_fast.ops.attention_packed import run_packed
from detr_fast.ops.regimes import NEVER, Regime
from detr_fast.testing import assert_as_accurate_as_eager
from tests.attention_inputs import qkv

interpreter = pytest.mark.interpreter
ROWS = "attention_backward_rows_kernel"  # launched by this backward alone


@pytest.fixture
def atomics():
    with use_backend(attention="triton_atomics"):
        yield


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


PADDING = torch.arange(7)[None] >= 5


@interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_as_accurate_as_eager(atomics, interpreter, dtype):
    mask = torch.rand(5, 7) > 0.3
    assert_as_accurate_as_eager(
        lambda q, k, v: ops.attention(q, k, v, key_padding_mask=PADDING, attn_mask=mask, is_causal=True),
        reference=lambda q, k, v: EagerAttention().run(q, k, v, PADDING, mask, True, 0.0, None),
        inputs=qkv(),
        dtype=dtype,
    )
    assert interpreter.counts()[ROWS] > 0


@interpreter
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_padding_in_front_hides_no_key_behind_a_visible_one_that_a_causal_row_does_not_see(atomics, dtype):
    padding = torch.arange(32)[None] < 8
    q, k, v = qkv(queries=32, keys=32, dim=16)
    k[:, -1] *= 20  # a score that no row but the last has in its log-sum-exp
    assert_as_accurate_as_eager(
        lambda q, k, v: ops.attention(q, k, v, key_padding_mask=padding, is_causal=True),
        reference=lambda q, k, v: EagerAttention().run(q, k, v, padding, None, True, 0.0, None),
        inputs=[q, k, v],
        dtype=dtype,
    )


@interpreter
@pytest.mark.parametrize("backends", [("triton_atomics", "triton"), ("triton", "triton_atomics")])
def test_the_choice_made_in_forward_is_kept_for_backward(interpreter, backends):
    q, k, v = qkv(requires_grad=True)
    with use_backend(attention=backends[0]):
        out = ops.attention(q, k, v)
    with use_backend(attention=backends[1]):
        out.sum().backward()
    assert interpreter.counts()[ROWS] == (backends[0] == "triton_atomics")


@interpreter
def test_packed_projections_and_the_log_sum_exp_get_the_gradients_of_the_deterministic_backward(interpreter):
    pack = torch.randn(2, 5, 3, 1, 8, requires_grad=True)
    results = []
    for backend in ("triton_atomics", "triton"):
        torch.manual_seed(3)
        with use_backend(attention=backend):
            parts = pack.unbind(2)
            y = run_packed(ATTENTION.choose(*parts, None, None, False, 0.3, None), [pack], None, None, False, 0.3)
            lse = ops.attention(*parts, return_lse=True)[1]
        results.append(torch.autograd.grad(y.square().sum() + lse.square().sum(), pack))
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)
    assert interpreter.counts()[ROWS] == 2


@interpreter
def test_the_double_backward_is_eagers(atomics):
    q, k, v = qkv(requires_grad=True)
    results = []
    for backend in ("triton_atomics", "eager"):
        with use_backend(attention=backend):
            out = ops.attention(q, k, v, key_padding_mask=PADDING)
            first = torch.autograd.grad(out.square().sum(), (q, k, v), create_graph=True)
            results.append(torch.autograd.grad(sum(g.square().sum() for g in first), (q, k, v)))
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)


@interpreter
def test_opcheck_accepts_its_ops_and_a_compiled_model_has_no_graph_break(atomics):
    q, k, v = qkv(requires_grad=True)
    options = (PADDING, None, torch.tensor([7]), False, 0.5, 0.3, 2, False)
    torch.library.opcheck(torch.ops.detr_fast.attention.default, (q, k, v, *options, True))
    with torch.no_grad():
        out, lse = torch.ops.detr_fast.attention(q, k, v, *options, True)
    arguments = (torch.randn_like(out), None, q, k, v, *options[:3], out, lse, False, *options[3:], True)
    torch.library.opcheck(torch.ops.detr_fast.attention_backward.default, arguments)

    def function(q):
        return ops.attention(q * 2, k, v, key_padding_mask=PADDING)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(*(torch.autograd.grad(f(q).square().sum(), (q, k, v)) for f in (compiled, function))):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("return_lse", [False, True])
def test_what_is_compiled_beforehand_is_what_the_call_launches(monkeypatch, dtype, return_lse):
    from detr_fast.ops import attention_autograd, attention_triton

    compiled, launched = [], []
    monkeypatch.setattr(attention_triton, "compile_variant", lambda variant, device: compiled.append(variant))
    monkeypatch.setattr(launch, "observers", [lambda one: launched.append(one.variant)])
    ATTENTION.forget()
    q, k, v = qkv(dim=32, dtype=dtype, device="meta", requires_grad=True)
    with use_backend(attention="triton_atomics"):
        ops.attention(q, k, v, key_padding_mask=PADDING.to("meta"), dropout_p=0.1, return_lse=return_lse)
    problem = attention_autograd.attention_problem(
        q, k, v, PADDING.to("meta"), None, torch.zeros(1, dtype=torch.int64, device="meta"), (False, 0.1, 1.0, 0, False)
    )
    out, lse = attention_autograd.kernels.attention_forward(problem)
    for dlse in (None, lse) if return_lse else (None,):
        attention_autograd.run_backward(problem, out, lse, out, dlse, atomics=True)
    assert set(launched) == set(compiled)
    assert len(compiled) == (3 if dtype == torch.float32 else 4) + return_lse
    ATTENTION.forget()


def refused(reason, masked=False, **options):
    with FakeTensorMode(), use_backend(attention="triton_atomics"):
        q, k, v = qkv(device="cuda", requires_grad=True, **options)
        mask = torch.randn(5, 7, device="cuda", requires_grad=True) if masked else None
        with pytest.raises(BackendError, match=reason):
            ops.attention(q, k, v, attn_mask=mask)


def test_what_it_cannot_take_is_refused_in_words():
    refused("head dimensions 65 and 65: it takes 1 to 64", dim=65)
    refused("the gradient of attn_mask would take", masked=True)


def test_deterministic_algorithms_forbid_it_by_name_and_by_auto(deterministic, monkeypatch):
    refused("use_deterministic_algorithms")
    record = chosen_on_a_gpu(monkeypatch)
    assert record.implementation.name == "triton"
    assert "use_deterministic_algorithms" in record.reasons["triton_atomics"]


def measured(minimum):
    names = ("attention_masked", "attention_masked_few_queries")
    faster = tuple(Regime(name, "sm_90", 0, 0, "") for name in (*names, "attention_masked_wide"))
    return faster + tuple(Regime(f"{name}_atomics", "sm_90", minimum, minimum, "") for name in names)


def elsewhere(architecture):
    """As measured to be faster, with atomics on another GPU only."""
    return tuple(replace(one, architecture=architecture) if one.op.endswith("_atomics") else one for one in measured(0))


def test_another_gpus_measurements_do_not_count_for_it(monkeypatch):
    atomics = next(one for one in ATTENTION.implementations if one.name == "triton_atomics")
    monkeypatch.setattr(regimes, "known", lambda: elsewhere("sm_100"))
    assert atomics.least("sm_90") == NEVER
    assert atomics.least("sm_100") == 0


def chosen_on_a_gpu(monkeypatch, known=None, queries=850, dtype=torch.bfloat16, dim=32, grad=True):
    """What auto decides, with these measurements."""
    monkeypatch.setattr(regimes, "known", lambda: measured(0) if known is None else known)
    ATTENTION.forget()
    found = []
    with FakeTensorMode(), dispatch.recording(lambda op, decision: found.append(decision)):
        q, k, v = qkv(64, queries, 850, 8, dim, device="cuda", dtype=dtype, requires_grad=grad)
        ops.attention(q, k, v, key_padding_mask=torch.zeros(64, 850, dtype=torch.bool, device="cuda"))
    ATTENTION.forget()
    return found[0]


def test_heads_that_pytorch_would_pad_go_by_the_measurements_of_narrow_ones(monkeypatch):
    known = Regime("attention_masked", "sm_90", 0, 0, ""), Regime("attention_masked_wide", "sm_90", NEVER, NEVER, "")
    taken = {dim: chosen_on_a_gpu(monkeypatch, known, dim=dim).implementation.name for dim in (33, 36, 64)}
    assert taken.pop(64) != "triton"
    assert taken == {33: "triton", 36: "triton"}


@pytest.mark.parametrize("queries", [100, 850])
def test_auto_takes_it_where_it_was_measured_to_be_faster_and_says_so(monkeypatch, queries):
    record = chosen_on_a_gpu(monkeypatch, queries=queries)
    assert record.implementation.name == "triton_atomics"
    assert record.note == "its backward, by atomics, was measured to be faster than triton's deterministic one"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"known": ()}, "unmeasured against triton's deterministic backward: run detr-fast tune"),
        ({"known": elsewhere("sm_100")}, "unmeasured against triton's deterministic backward: run detr-fast tune"),
        ({"known": measured(NEVER)}, "triton's deterministic backward is faster"),
        ({"known": (*measured(0)[:4], measured(NEVER)[4]), "queries": 100}, "deterministic backward is faster"),
        ({"grad": False}, "without gradients it is triton's"),
        ({"dtype": torch.float32}, "measured in 16 bits only"),
        ({"dim": 128}, "head dimensions 128 and 128: it takes 1 to 64"),
        ({"dim": 64}, "unmeasured against triton's deterministic backward"),
    ],
)
def test_auto_takes_the_deterministic_backward_elsewhere_and_says_why(monkeypatch, options, reason):
    record = chosen_on_a_gpu(monkeypatch, **options)
    assert record.implementation.name == "triton"
    assert reason in record.reasons["triton_atomics"]


@interpreter
def test_explain_names_it(atomics):
    with explaining() as records:
        ops.attention(*qkv())
    assert records[0].chosen == "triton_atomics"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("queries", "dim"), [(333, 32), (100, 32), (333, 64), (100, 64)])
@pytest.mark.parametrize("masked", [None, "padding", "bool"])
def test_on_a_gpu_it_is_as_accurate_as_eager(atomics, dtype, queries, dim, masked):
    queries, keys = sized(queries, 35), sized(333, 35)
    padding = torch.rand(2, keys, device=DEVICE) > 0.7 if masked == "padding" else None
    mask = torch.rand(queries, keys, device=DEVICE) > 0.3 if masked == "bool" else None
    lengths = (queries, keys, keys)
    assert_as_accurate_as_eager(
        lambda q, k, v: ops.attention(q, k, v, key_padding_mask=padding, attn_mask=mask, is_causal=masked is None),
        reference=lambda q, k, v: EagerAttention().run(q, k, v, padding, mask, masked is None, 0.0, None),
        inputs=[torch.randn(2, n, sized(3, 1), dim, device=DEVICE) for n in lengths],
        dtype=dtype,
    )


def test_a_probability_that_is_none_is_no_call_that_was_decided_before():
    """PyTorch refuses it, whatever was chosen for its like; and those are not left to PyTorch from then on."""
    ATTENTION.forget()
    chosen = []
    with FakeTensorMode():
        q = torch.empty(64, 850, 8, 32, device="cuda", dtype=torch.bfloat16)
        mask = torch.empty(64, 1, 850, 850, device="cuda", dtype=torch.bool)
        for p in (1.5, 0.1, 1.5):
            chosen.append(ATTENTION.choose(q, q, q, None, mask, False, p, None).name)
    ATTENTION.forget()
    assert chosen == ["sdpa", "triton", "sdpa"]
