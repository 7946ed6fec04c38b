from __future__ import annotations

import pytest
import torch
from detr_fast.kernels.rotary import Turn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.hardware import DEVICE, sized
from detr_fast import dispatch, ops
from detr_fast.dispatch import BackendError, use_backend
from detr_fast.ops.rotary_embedding import ROTARY_EMBEDDING, eager
from detr_fast.testing import assert_as_accurate_as_eager, count
from detr_fast.testing.interpreter import checked_interpreter

interpreter = pytest.mark.interpreter
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OP = torch.ops.detr_fast.rotary_embedding.default


@pytest.fixture
def triton():
    with checked_interpreter(), use_backend(rotary_embedding="triton"):
        yield


def make_case(shape=(2, 5, 4, 16), k_heads=2, rotated=16, device="cpu"):
    """q and k as projections give them, seen with heads first and back; angles of each sequence, which fill no circle."""
    batch, tokens, _, columns = shape
    q = torch.randn(shape, device=device)
    k = torch.randn(batch, k_heads, tokens, columns, device=device).transpose(1, 2)
    return q, k, *(torch.randn(batch, tokens, rotated, device=device) for _ in range(2))


def llama(q, k, cos, sin):
    """As transformers' Llama computes it, in (B, H, L, E)."""

    def turned(x):
        a, b = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
        return x * cos[:, None] + torch.cat((-b, a), dim=-1) * sin[:, None]

    return tuple(turned(x.transpose(1, 2)).transpose(1, 2) for x in (q, k))


def gptj(q, k, cos, sin):
    """As transformers' GPT-J does, which is given one number a pair."""
    cos, sin = (torch.repeat_interleave(t[:, :, None], 2, 3) for t in (cos, sin))

    def turned(x):
        return x * cos + torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2) * sin

    return turned(q), turned(k)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_eager_is_to_the_bit_what_models_compute(dtype):
    q, k, cos, sin = (t.to(dtype) for t in make_case())
    for found, expected in zip(ops.rotary_embedding(q, k, cos, sin), llama(q, k, cos, sin)):
        assert torch.equal(found, expected)
    half = cos[..., :8], sin[..., :8]
    found = ops.rotary_embedding(q, k, *half, interleaved=True, per_pair=True)
    assert all(map(torch.equal, found, gptj(q, k, *half)))


def test_a_turn_by_an_angle_keeps_lengths_and_only_distances_count():
    q, k, *_ = make_case((1, 1, 1, 16), 1)
    places = torch.arange(9.0).double()[:, None] * 10000.0 ** (-torch.arange(8.0).double() / 8)
    for kind in (False, True):
        q_turned, k_turned = (
            ops.rotary_embedding(
                x.double().expand(1, 9, 1, 16), None, places.cos(), places.sin(), interleaved=kind, per_pair=True
            )[0][0, :, 0]
            for x in (q, k)
        )
        torch.testing.assert_close(q_turned.norm(dim=-1), q.double().norm().expand(9))
        scores = q_turned @ k_turned.mT
        for distance in range(-8, 9):
            diagonal = scores.diagonal(distance)
            torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))


@interpreter
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shared", [False, True])
def test_the_kernel_is_as_accurate_as_eager(triton, dtype, shared):
    q, k, cos, sin = make_case((2, 5, 4, 24), rotated=16)
    angles = (cos[0], sin[0]) if shared else (cos, sin)
    assert_as_accurate_as_eager(
        lambda q, k: ops.rotary_embedding(q, k, *angles),
        reference=lambda q, k: eager(q, k, *(t if t.ndim == 3 else t[None] for t in angles), Turn()),
        inputs=(q, k),
        dtype=dtype,
    )


@interpreter
@pytest.mark.parametrize(("dtype", "wanted"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)])
def test_results_come_in_the_dtype_that_a_library_wants_and_gradients_in_that_of_q_and_k(triton, dtype, wanted):
    q, k, cos, sin = make_case()
    settings = (cos, sin, Turn(), wanted)
    assert_as_accurate_as_eager(
        lambda q, k: ROTARY_EMBEDDING(q, k, *settings),
        reference=lambda q, k: eager(q, k, *settings[:-1], torch.float64 if q.dtype == torch.float64 else wanted),
        inputs=(q, k),
        dtype=dtype,
    )


@interpreter
def test_results_lie_as_q_and_k_do_and_nothing_but_angles_is_kept(triton):
    q, k, cos, sin = make_case()
    q.requires_grad_(), k.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        q_turned, k_turned = ops.rotary_embedding(q, k, cos, sin)
    assert {t.data_ptr() for t in kept} == {cos.data_ptr(), sin.data_ptr()}
    assert q_turned.is_contiguous()
    assert k_turned.transpose(1, 2).is_contiguous()
    dq, dk = torch.autograd.grad(
        (q_turned, k_turned), (q, k), (torch.randn(4, 5, 2, 16).transpose(0, 2), torch.ones_like(k))
    )
    assert dq.is_contiguous()
    assert dk.transpose(1, 2).is_contiguous()


@interpreter
@pytest.mark.parametrize("with_k", [True, False])
@pytest.mark.parametrize("compiled", [True, False])
def test_results_are_written_to_as_those_of_any_operation(triton, with_k, compiled):
    first, second, cos, sin = make_case()  # the second lies with heads first

    def written(q, k):
        results = [y for y in ops.rotary_embedding(q, k if with_k else None, cos, sin) if y is not None]
        for y in results:
            y.mul_(2)
            y.transpose(1, 2)[:, :, :1].add_(1)
        return sum(y.square().sum() for y in results)

    for q, k in ((first, second), (second, first)):
        found = []
        for backend in ("triton", "eager"):
            leaves = [t.detach().requires_grad_() for t in (q, k)[: 1 + with_k]]
            with use_backend(rotary_embedding=backend):
                function = torch.compile(written, backend="aot_eager") if compiled else written
                found.append(torch.autograd.grad(function(leaves[0], leaves[-1]), leaves))
        for ours, theirs in zip(*found):
            torch.testing.assert_close(ours, theirs)


@interpreter
@pytest.mark.parametrize("heads", [1, 2])
def test_single_tokens_and_heads_may_lie_at_any_distance(triton, heads):
    """What a stride along one element says is never read, not even as an alignment."""
    _, k, cos, sin = make_case((1, 1, heads, 16), heads)
    rows = torch.randn(40).bfloat16()
    q = rows.as_strided((1, 1, heads, 16), (33, 17, 17 if heads == 1 else 16, 1))
    found, _ = ops.rotary_embedding(q, k, cos, sin, interleaved=True)
    expected, _ = eager(q, k, cos, sin, Turn(interleaved=True))
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


@interpreter
def test_gradients_go_to_whoever_needs_them_whichever_result_is_used(triton):
    for learns in ((True, False), (False, True), (True, True)):
        for used in ((0,), (1,), (0, 1)):
            case = make_case()
            found = []
            for backend in ("triton", "eager"):
                leaves = [t.detach().requires_grad_(one) for t, one in zip(case, learns)]
                with use_backend(rotary_embedding=backend):
                    results = ops.rotary_embedding(*leaves, *case[2:])
                total = sum((results[i] * (i + 1.5)).square().sum() for i in used)
                sources = [t for t in leaves if t.requires_grad]
                assert total.requires_grad == any(learns[i] for i in used)
                found.append(torch.autograd.grad(total, sources, allow_unused=True) if total.requires_grad else ())
            for ours, theirs in zip(*found, strict=True):
                torch.testing.assert_close(ours, torch.zeros_like(ours) if theirs is None else theirs)


@interpreter
@pytest.mark.parametrize("interleaved", [False, True])
def test_double_and_triple_backward_are_right(triton, interleaved):
    case = make_case()

    def penalties(backend):
        q, k = (t.detach().clone().requires_grad_() for t in case[:2])
        with use_backend(rotary_embedding=backend):
            results = ops.rotary_embedding(q, k, *case[2:], interleaved=interleaved)
            total = sum(y.pow(4).sum() for y in results)
            first = torch.autograd.grad(total, (q, k), create_graph=True)
            second = torch.autograd.grad(sum(g.square().sum() for g in first), (q, k), create_graph=True)
            return torch.autograd.grad(sum(g.sum() for g in second), (q, k))

    torch.testing.assert_close(penalties("triton"), penalties("eager"))


@interpreter
@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("with_k", [False, True])
def test_opcheck_accepts_the_op(with_k, back):
    q, k, cos, sin = make_case()
    q.requires_grad_(), k.requires_grad_()
    for dtype in (None, torch.bfloat16):
        torch.library.opcheck(
            OP, (q, k if with_k else None, cos, sin, back, False, back, 0, False, [False, with_k], dtype)
        )


@interpreter
def test_a_compiled_model_has_no_graph_break_and_equal_gradients(triton):
    q, k, cos, sin = make_case()
    q.requires_grad_(), k.requires_grad_()

    def step(q, k):
        return sum(y.square().sum() for y in ops.rotary_embedding(q, k, cos, sin))

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    found, expected = (torch.autograd.grad(run(q, k), (q, k)) for run in (compiled, step))
    torch.testing.assert_close(found, expected)


def test_under_a_compiler_inductor_fuses_it():
    counts = []

    def counting(graph, inputs):
        counts.append([str(node.target) for node in graph.graph.nodes])
        return graph

    with FakeTensorMode():
        arguments = make_case(device="cuda")
        torch.compile(ops.rotary_embedding, fullgraph=True, backend=counting)(*arguments)
    assert counts
    assert not any("detr_fast" in target for target in counts[0])


@interpreter
def test_autocast_changes_nothing(triton):
    q, k, cos, sin = make_case()
    expected = ops.rotary_embedding(q, k.bfloat16(), cos, sin)
    with torch.autocast("cpu", torch.bfloat16):
        found = ops.rotary_embedding(q, k.bfloat16(), cos, sin)
    assert [t.dtype for t in found] == [torch.float32, torch.bfloat16]
    assert all(map(torch.equal, found, expected))


def test_a_gpu_takes_one_launch_each_way_for_queries_and_keys():
    q, k, cos, sin = (t.bfloat16() for t in make_case((8, 512, 12, 64), 12, 64, "meta"))
    q.requires_grad_(), k.requires_grad_()

    def step():
        results = ops.rotary_embedding(q, k, cos, sin)
        torch.autograd.backward(results, [torch.empty_like(y) for y in results])

    with use_backend(rotary_embedding="triton"):
        counts = count(step)
    assert counts.launches == {"rotary_embedding_kernel": 2}
    assert counts.bytes_moved == 2 * (4 * q.nbytes + 2 * cos.nbytes)


def test_what_no_kernel_takes_is_left_to_eager_with_a_reason(unmeasured):
    reasons = []
    with FakeTensorMode(), dispatch.recording(lambda op, decision: reasons.append(decision.reasons.get("triton"))):
        q, k, cos, sin = make_case(device="cuda")
        ops.rotary_embedding(q, k, cos.requires_grad_(), sin)
        ops.rotary_embedding(q, k.double(), cos.detach(), sin)
        ops.rotary_embedding(torch.empty(1, 5, 4, 258, device="cuda"), None, cos[:1].detach(), sin[:1])
        ops.rotary_embedding(q, k, cos.detach(), sin)
    assert reasons == [
        "cos or sin needs a gradient: only eager gives one",
        "keys or angles of torch.float64: it takes float32, bfloat16 and float16",
        "head_dim 258 is over 256",
        "below 32 MiB of input it stays eager until measured: run detr-fast tune",
    ]


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, cos, sin: (q[0], k, cos, sin),
        lambda q, k, cos, sin: (q, k[:1], cos, sin),
        lambda q, k, cos, sin: (q, k[..., :8], cos, sin),
        lambda q, k, cos, sin: (q, k, cos[:, 1:], sin[:, 1:]),
        lambda q, k, cos, sin: (q, k, cos, sin[..., :8]),
        lambda q, k, cos, sin: (q, k, cos[..., :7], sin[..., :7]),
        lambda q, k, cos, sin: (q[..., :8], k[..., :8], cos, sin),
        lambda q, k, cos, sin: (q, k, cos[[0, 1, 1]], sin[[0, 1, 1]]),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change):
    with pytest.raises(ValueError, match=r"got q \(.*expected q \(B, L, H, E\), k \(B, L, Hk, E\) or None"):
        ops.rotary_embedding(*change(*make_case()))


@pytest.mark.parametrize("wrong", [{"interleaved": False}, {"per_pair": False}, {"first": 1}])
def test_halves_of_what_is_not_sorted_are_refused(wrong):
    q, k, cos, sin = make_case(rotated=8)
    start = wrong.get("first", 0)
    kinds = {"interleaved": True, "per_pair": True, "sorts": True, **wrong}
    with pytest.raises(ValueError, match=r"got sorts=True with .*; expected it with True, True and 0"):
        ops.rotary_embedding(q[..., :16], k, cos[:, start:], sin[:, start:], **kinds)


@interpreter
def test_what_was_asked_for_by_name_and_cannot_be_is_an_error(triton):
    with pytest.raises(BackendError, match="float64 inputs: it takes bfloat16, float16, float32"):
        ops.rotary_embedding(*(t.double() for t in make_case()))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("columns", "rotated"), [(64, 64), (80, 32), (128, 128), (20, 20), (256, 64)])
@pytest.mark.parametrize("interleaved", [False, True])
def test_on_a_gpu_it_is_as_accurate_as_eager(columns, rotated, interleaved, dtype):
    q, k, cos, sin = make_case((2, sized(1031, 37), 6, columns), 2, rotated, DEVICE)
    with use_backend(rotary_embedding="triton"):
        assert_as_accurate_as_eager(
            lambda q, k: ops.rotary_embedding(q, k, cos, sin, interleaved=interleaved),
            reference=lambda q, k: eager(q, k, cos, sin, Turn(interleaved)),
            inputs=(q, k),
            dtype=dtype,
        )
