from __future__ import annotations

import dataclasses

import pytest
import torch
from torch._subclasses import FakeTensorMode

from benchmarks.hardware import DEVICE, sized
from detr_fast import ops
from detr_fast.dispatch import BackendError, use_backend
from detr_fast.explanation import explaining
from detr_fast.situation import situation
from detr_fast.testing import assert_as_accurate_as_eager, counting
from tests.attention_inputs import ends
from tests.attention_inputs import sequences as problem

BACKENDS = ("sdpa", "eager")
interpreter = pytest.mark.interpreter


def one_by_one(q, k, v, lengths_q, lengths_k, is_causal=False):
    """Each sequence on its own, by the definition."""
    pieces = []
    for own_q, own_k, own_v in zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k)):
        scores = torch.einsum("lhe,she->hls", own_q, own_k) / q.shape[-1] ** 0.5
        if is_causal:
            scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
        pieces.append(torch.einsum("hls,she->lhe", scores.softmax(-1), own_v))
    return torch.cat(pieces)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("lengths", [((5, 1, 9), (5, 1, 9)), ((3, 4), (7, 2)), ((6,), (6,))])
def test_every_sequence_attends_only_to_its_own_keys(backend, lengths, is_causal):
    q, k, v, *rest = problem(*lengths)
    with use_backend(attention_varlen=backend):
        y = ops.attention_varlen(q, k, v, *rest, is_causal=is_causal)
    expected = one_by_one(q, k, v, *map(list, lengths), is_causal)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    for ours, reference in zip(torch.autograd.grad(y, (q, k, v), dy), torch.autograd.grad(expected, (q, k, v), dy)):
        torch.testing.assert_close(ours, reference)


ALL_BACKENDS = (*BACKENDS, pytest.param("triton", marks=interpreter))


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_fewer_key_heads_serve_groups_of_query_heads(backend):
    q, k, v, *rest = problem((5, 3), (4, 6), heads=4, key_heads=2, dtype=torch.float32)
    with use_backend(attention_varlen=backend):
        y = ops.attention_varlen(q, k, v, *rest, enable_gqa=True)
    expected = one_by_one(q, *(t.repeat_interleave(2, 1) for t in (k, v)), [5, 3], [4, 6])
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    for ours, reference in zip(torch.autograd.grad(y, (q, k, v), dy), torch.autograd.grad(expected, (q, k, v), dy)):
        torch.testing.assert_close(ours, reference)


@pytest.mark.parametrize("backend", ALL_BACKENDS[1:])
@pytest.mark.parametrize("surplus", [0, 3])
def test_the_log_sum_exp_is_that_of_the_padded_batch_and_differentiable(backend, surplus):
    q, k, v, *rest = problem((5, 2, 3), (4, 6, 0), surplus, dtype=torch.float32)
    with use_backend(attention_varlen=backend):
        _, lse = ops.attention_varlen(q, k, v, *rest, return_lse=True)
    assert lse.shape == (3, 2, 5)
    assert torch.equal(lse.isfinite().sum((1, 2)), torch.tensor([10, 4, 0]))
    assert bool((lse.isfinite() | (lse == -torch.inf)).all())
    scores = [torch.einsum("lhe,she->hls", q[a:b], k[c:d]) / 8**0.5 for a, b, c, d in ((0, 5, 0, 4), (5, 7, 4, 10))]
    expected = torch.cat([one.logsumexp(-1).flatten() for one in scores])
    found = lse[lse.isfinite()]
    torch.testing.assert_close(found, expected)
    dlse = torch.randn_like(found)
    ours = torch.autograd.grad(found, (q, k), dlse)
    for mine, theirs in zip(ours, torch.autograd.grad(expected, (q, k), dlse)):
        torch.testing.assert_close(mine, theirs)


def test_the_log_sum_exp_is_asked_of_an_implementation_that_has_it():
    with explaining() as records:
        _, lse = ops.attention_varlen(*problem((3, 2), (3, 2)), return_lse=True)
    assert records[0].chosen == "eager"
    assert "does not return the log-sum-exp" in records[0].reasons["sdpa"]
    _, lse = ops.attention_varlen(*problem((), (), surplus=2), return_lse=True)
    assert lse.shape == (0, 2, 0)


@interpreter
def test_the_double_backward_through_the_log_sum_exp_is_refused_with_the_remedy():
    q, k, v, *rest = problem((5, 2), (4, 6), dtype=torch.float32)
    with use_backend(attention_varlen="triton"):
        y, lse = ops.attention_varlen(q, k, v, *rest, return_lse=True)
    first = torch.autograd.grad(y.sum() + lse[lse.isfinite()].square().sum(), q, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="attention_varlen='eager'"):
        first.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_surplus_tokens_are_not_read_and_give_zeros(backend):
    q, k, v, *rest = problem((4, 3), (5, 2), surplus=3)
    with torch.no_grad():
        for tensor, used in ((q, 7), (k, 7), (v, 7)):
            tensor[used:] = torch.nan
    with use_backend(attention_varlen=backend):
        y = ops.attention_varlen(q, k, v, *rest)
    assert bool(y.isfinite().all())
    assert not y[7:].any()
    torch.testing.assert_close(y[:7], one_by_one(q[:7], k[:7], v[:7], [4, 3], [5, 2]))
    for gradient in torch.autograd.grad(y.sum(), (q, k, v)):
        assert not gradient[7:].any()
        assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [((3, 2), (4, 0)), ((0, 2), (3, 1)), ((0,), (0,)), ((), ()), ((2,), (0,))])
def test_empty_sequences_give_nothing_and_queries_without_keys_give_zeros(backend, lengths):
    q, k, v, *rest = problem(*lengths)
    with use_backend(attention_varlen=backend):
        y = ops.attention_varlen(q, k, v, *rest)
    assert y.shape == (sum(lengths[0]), 2, 6)
    assert bool(y.isfinite().all())
    if lengths == ((3, 2), (4, 0)):
        assert not y[3:].any()
        assert y[:3].any()
    assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(y.sum(), (q, k, v)))


def test_auto_reads_the_lengths_on_a_cpu_and_never_those_on_a_gpu():
    with explaining() as records:
        ops.attention_varlen(*problem((3, 2), (3, 2)))
    assert records[0].chosen == "sdpa"
    with FakeTensorMode(), explaining() as records:
        q, k, v = (torch.empty(10, 2, 8, device="cuda") for _ in range(3))
        lengths = torch.empty(3, dtype=torch.int32, device="cuda")
        y = ops.attention_varlen(q, k, v, lengths, lengths, 6, 6)
    assert y.shape == (10, 2, 8)
    assert records[0].chosen == "triton"
    with FakeTensorMode(), explaining() as records:
        q, lengths = (
            torch.empty(n, device="cuda", dtype=t) for n, t in (((10, 2, 8), torch.float64), (3, torch.int32))
        )
        ops.attention_varlen(q, q, q, lengths, lengths, 6, 6)
    assert records[0].chosen == "eager"
    assert "would make the host wait" in records[0].reasons["sdpa"]


def test_it_compiles_without_a_graph_break():
    q, k, v, *rest = problem((3, 2), (4, 1), dtype=torch.float32)
    compiled = torch.compile(ops.attention_varlen, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v, *rest), ops.attention_varlen(q, k, v, *rest))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(1, 5, 2, 8)}, "without a batch"),
        ({1: torch.zeros(5, 2, 9)}, "the same E"),
        ({1: torch.zeros(5, 1, 8), 2: torch.zeros(5, 1, 8)}, "the same H"),
        ({3: torch.tensor([0, 3, 5])}, "must be int32"),
        ({3: ends(3, 1, 1)}, "of 3 sequences and cu_seqlens_k of 2"),
        ({3: ends(3, 9)}, "end at 5 tokens or before"),
        ({4: torch.tensor([0, 4, 3], dtype=torch.int32)}, "never fall"),
        ({5: 2}, "max_q is 2, but a sequence has 3 tokens"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_was_expected(change, message):
    arguments = list(problem((3, 2), (4, 1), value_dim=8))
    for position, value in change.items():
        arguments[position] = value
    with pytest.raises(ValueError, match=message):
        ops.attention_varlen(*arguments)


def test_lengths_on_a_gpu_refuse_the_implementation_that_reads_them():
    with FakeTensorMode(), use_backend(attention_varlen="sdpa"):
        q = torch.empty(10, 2, 8, device="cuda")
        lengths = torch.empty(3, dtype=torch.int32, device="cuda")
        with pytest.raises(BackendError, match="would make the host wait"):
            ops.attention_varlen(q, q, q, lengths, lengths, 6, 6)


@interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_causal", [False, True])
def test_the_kernel_is_as_accurate_as_eager(dtype, is_causal):
    q, k, v, *rest = problem((5, 1, 9), (3, 8, 2), surplus=4)

    def call(backend):
        def run(*qkv):
            with use_backend(attention_varlen=backend):
                return ops.attention_varlen(*qkv, *rest, is_causal=is_causal)

        return run

    assert_as_accurate_as_eager(call("triton"), reference=call("eager"), inputs=(q, k, v), dtype=dtype)


@interpreter
def test_the_padded_form_is_the_kernels_twin_in_dropout_and_in_the_double_backward():
    q, k, v, *rest = problem((20, 3), (35, 18), surplus=2, dtype=torch.float32)
    results = []
    for backend in ("triton", "eager"):
        torch.manual_seed(5)
        with use_backend(attention_varlen=backend):
            y = ops.attention_varlen(q, k, v, *rest, dropout_p=0.4)
        first = torch.autograd.grad(y.square().sum(), (q, k, v), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), (q, k, v))
        results.append((y, *first, *second))
    for ours, twin in zip(*results):
        torch.testing.assert_close(ours, twin, atol=1e-4, rtol=1e-3)


@interpreter
def test_opcheck_accepts_the_kernels_ops():
    q, k, v, *rest = problem((4, 3), (5, 2), surplus=2, dtype=torch.float32)
    packed = (q, k, v, *rest, None, torch.tensor([7]), True, 0.5, 0.3, 2, False, False)
    torch.library.opcheck(torch.ops.detr_fast.attention_varlen.default, packed)
    with torch.no_grad():
        out, lse = torch.ops.detr_fast.attention_varlen(*packed)
    torch.library.opcheck(
        torch.ops.detr_fast.attention_varlen_backward.default, (torch.randn_like(out), None, out, lse, False, *packed)
    )


@interpreter
def test_one_launch_forward_two_backward_and_only_the_output_is_kept():
    q, k, v, *rest = problem((20, 30), (20, 30), value_dim=8, dtype=torch.float32)
    with counting((q, k, v)) as counts, use_backend(attention_varlen="triton"):
        y = ops.attention_varlen(q, k, v, *rest)
    assert counts.total_launches == 1
    dy = torch.randn_like(y)
    with counting() as backward, use_backend(attention_varlen="triton"):
        torch.autograd.grad(y, (q, k, v), dy)
    assert backward.total_launches == 2
    assert counts.saved_bytes == y.numel() * 4 + 2 * 2 * 30 * 4 + 2 * 3 * 4  # the log-sum-exp, and both ends


@interpreter
def test_autocast_casts_as_sdpa_does():
    q, k, v, *rest = problem((4, 3), (5, 2), dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16), use_backend(attention_varlen="triton"):
        y = ops.attention_varlen(q, k, v, *rest)
    assert y.dtype == torch.bfloat16
    assert torch.autograd.grad(y.float().sum(), q)[0].dtype == torch.float32


@pytest.mark.parametrize("keys", [(0, 2), (0, 0)], ids=["of the first sequence", "at all"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_under_autocast_the_dtype_is_the_same_without_keys(backend, keys):
    q, k, v, *rest = problem((4, 3), keys, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16), use_backend(attention_varlen=backend):
        assert ops.attention_varlen(q, k, v, *rest).dtype == torch.bfloat16


@interpreter
def test_the_kernel_compiles_without_a_graph_break():
    q, k, v, *rest = problem((3, 2), (4, 1), dtype=torch.float32)
    with use_backend(attention_varlen="triton"):
        y = torch.compile(ops.attention_varlen, fullgraph=True, backend="aot_eager")(q, k, v, *rest)
        expected = ops.attention_varlen(q, k, v, *rest)
    for ours, theirs in zip(*(torch.autograd.grad(t.square().sum(), (q, k, v)) for t in (y, expected))):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_of_no_sequence_give_zeros(backend):
    q, k, v, *rest = problem((), (), surplus=2)
    with use_backend(attention_varlen=backend):
        y = ops.attention_varlen(q, k, v, *rest)
    assert y.shape == (2, 2, 6)
    assert not y.any()
    assert not any(g.any() for g in torch.autograd.grad(y.sum(), (q, k, v)))


@pytest.mark.parametrize("lengths", [((3, 2), (4, 0)), ((0,), (0,)), ((), ())])
@interpreter
def test_the_kernel_takes_empty_sequences(lengths):
    q, k, v, *rest = problem(*lengths, surplus=2, dtype=torch.float32)
    with use_backend(attention_varlen="triton"):
        y = ops.attention_varlen(q, k, v, *rest)
    assert not y[sum(lengths[0]) :].any()
    assert all(not g[sum(lengths[0]) + 1 :].any() for g in torch.autograd.grad(y.sum(), (q,)))


def test_what_is_compiled_beforehand_is_what_the_call_launches(monkeypatch):
    from detr_fast.kernels import launch

    from detr_fast.ops import attention_varlen_triton
    from detr_fast.ops.attention_varlen import ATTENTION_VARLEN

    compiled, launched = [], []
    monkeypatch.setattr(attention_varlen_triton, "compile_variant", lambda variant, device: compiled.append(variant))
    monkeypatch.setattr(launch, "observers", [lambda one: launched.append(one.variant)])
    ATTENTION_VARLEN.forget()
    q, k, v = (torch.empty(30, 2, 32, device="meta", dtype=torch.float16, requires_grad=True) for _ in range(3))
    ends_of = torch.empty(4, dtype=torch.int32, device="meta")
    with use_backend(attention_varlen="triton"):
        ops.attention_varlen(q, k, v, ends_of, ends_of, 20, 20, dropout_p=0.1)
    seed = torch.zeros(1, dtype=torch.int64, device="meta")
    packed = (q, k, v, ends_of, ends_of, 20, 20, None, seed, False, 0.1, 1.0, 0, False, False)
    out, lse = attention_varlen_triton._run_forward(*packed)
    attention_varlen_triton._run_backward(out, None, out, lse, False, *packed)
    assert len(compiled) == 3
    assert launched == compiled
    ATTENTION_VARLEN.forget()


def test_what_is_compiled_beforehand_is_for_the_calls_gpu(monkeypatch):
    from detr_fast.kernels import launch

    from detr_fast.ops import attention_varlen_triton
    from detr_fast.ops.attention_varlen import ATTENTION_VARLEN

    for module in (launch, attention_varlen_triton):
        monkeypatch.setattr(module, "generation", lambda device: "hopper" if device.type == "cuda" else "")
    call = ATTENTION_VARLEN._describe(*problem((3,), (4,)), None, False, 0.0, None, situation=situation("cpu"))
    calls = (dataclasses.replace(call, device=torch.device(device)) for device in ("cuda", "cpu"))
    assert [attention_varlen_triton._meta_problem(one).form().generation for one in calls] == ["hopper", ""]


@pytest.mark.gpu
def test_on_a_gpu_the_kernel_is_as_accurate_as_eager():
    lengths = sized((333, 1, 0, 850), (33, 1, 0, 70))
    q, k, v, *rest = problem(lengths, lengths, surplus=sized(70, 7), heads=sized(8, 1), dim=32, value_dim=32)
    ends_of = rest[0].to(DEVICE)

    def call(backend):
        def run(*qkv):
            with use_backend(attention_varlen=backend):
                return ops.attention_varlen(*qkv, ends_of, ends_of, max(lengths), max(lengths))

        return run

    tensors = [t.detach().to(DEVICE) for t in (q, k, v)]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert_as_accurate_as_eager(call("triton"), reference=call("eager"), inputs=tensors, dtype=dtype)


@pytest.mark.gpu
def test_on_a_gpu_packed_attention_is_captured_with_lengths_that_change():
    q, k, v, *rest = problem((20, 30), (20, 30), surplus=10, heads=2, dim=32, value_dim=32, dtype=torch.float32)
    q, k, v, lengths = (t.detach().to(DEVICE) for t in (q, k, v, rest[0]))

    def call():
        with use_backend(attention_varlen="triton"):
            return ops.attention_varlen(q, k, v, lengths, lengths, 40, 40)

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    for other in ((20, 30), (40, 3)):
        lengths.copy_(ends(*other))
        graph.replay()
        if DEVICE.type == "cuda":  # nothing is replayed in a rehearsal
            torch.testing.assert_close(out, call())
