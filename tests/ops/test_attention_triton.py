from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from detr_fast.kernels.attention_problem import Problem
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.hardware import DEVICE, sized
from detr_fast import dispatch, ops
from detr_fast.dispatch import BackendError, use_backend
from detr_fast.ops.attention import EagerAttention
from detr_fast.ops.attention_call import weights_dtype
from detr_fast.testing import assert_as_accurate_as_eager
from tests.attention_inputs import end_padding, qkv

interpreter = pytest.mark.interpreter


@pytest.fixture
def triton():
    with use_backend(attention="triton"):
        yield


@interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_attention_is_as_accurate_as_eager(triton, dtype):
    padding, mask = end_padding(), torch.rand(5, 7) > 0.3
    assert_as_accurate_as_eager(
        lambda q, k, v: ops.attention(q, k, v, key_padding_mask=padding, attn_mask=mask, is_causal=True),
        reference=lambda q, k, v: EagerAttention().run(q, k, v, padding, mask, True, 0.0, None),
        inputs=qkv(),
        dtype=dtype,
    )


@pytest.mark.parametrize("fill", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "backend", ["eager", *(pytest.param(b, marks=interpreter) for b in ("triton", "triton_atomics"))]
)
def test_what_a_float_mask_holds_for_padded_keys_reaches_neither_results_nor_gradients(backend, fill):
    q, k, v = qkv(requires_grad=True)
    padding, clean = end_padding(), torch.randn(5, 7)
    found = []
    for mask in (clean, clean.masked_fill(padding, fill)):
        inputs = (q, k, v) if backend == "triton_atomics" else (q, k, v, mask.requires_grad_())
        with use_backend(attention=backend):
            y = ops.attention(q, k, v, key_padding_mask=padding, attn_mask=mask)
            _, weights = ops.attention_with_weights(q, k, v, key_padding_mask=padding, attn_mask=mask.detach())
        found.append((y, weights, *torch.autograd.grad(y.square().sum(), inputs)))
    for ours, truth in zip(found[1], found[0]):
        torch.testing.assert_close(ours, truth)


def trained(given, write):
    y = ops.attention(*given)
    write(y)
    y.sum().backward()


@interpreter
@pytest.mark.parametrize("sequence_first", [False, True])
def test_a_result_that_is_written_in_place_never_has_wrong_gradients(triton, sequence_first):
    q, k, v = qkv(requires_grad=True)
    given = [t.transpose(0, 1).contiguous().transpose(0, 1) if sequence_first else t for t in (q, k, v)]
    for write in (lambda y: y.add_(1), lambda y: y.__setitem__(0, 0.0), lambda y: y[:, 0].mul_(2)):
        with pytest.raises(RuntimeError, match=r"modified by an inplace operation|is being modified inplace"):
            trained(given, write)
        plain = ops.attention(*(t.detach() for t in given))
        expected = plain.clone()
        write(expected), write(plain)  # without gradients, anything may be done
        assert torch.equal(plain, expected)


@interpreter
def test_the_log_sum_exp_is_the_natural_one_and_has_a_gradient(triton):
    q, k, v = qkv(requires_grad=True)
    out, lse = ops.attention(q, k, v, return_lse=True)
    with use_backend(attention="eager"):
        expected = ops.attention(q, k, v, return_lse=True)
    torch.testing.assert_close((out, lse), expected)
    for ours, theirs in zip(*(torch.autograd.grad(r, (q, k), (out, lse)) for r in ((out, lse), expected))):
        torch.testing.assert_close(ours, theirs)


@interpreter
def test_grouped_heads_in_torchs_own_layout_work(triton):
    q, (k, v) = torch.randn(1, 4, 5, 8), (torch.randn(1, 2, 7, 8) for _ in range(2))
    ours = ops.scaled_dot_product_attention(q, k, v, scale=0.2, enable_gqa=True)
    torch.testing.assert_close(ours, F.scaled_dot_product_attention(q, k, v, scale=0.2, enable_gqa=True))


@interpreter
def test_the_double_backward_is_right_also_with_dropout(triton):
    q, k, v = qkv(requires_grad=True)

    def penalty():
        torch.manual_seed(3)
        out = ops.attention(q, k, v, dropout_p=0.5, key_padding_mask=end_padding())
        gradients = torch.autograd.grad(out.square().sum(), (q, k, v), create_graph=True)
        return sum(g.square().sum() for g in gradients)

    # By central differences of the first backward, which is proven elsewhere.
    found = torch.autograd.grad(penalty(), (q, k, v))
    directions = [torch.randn_like(t) for t in (q, k, v)]
    values, step = [], 1e-2
    for move in (step, -2 * step):
        with torch.no_grad():
            for tensor, direction in zip((q, k, v), directions):
                tensor += move * direction
        values.append(penalty().item())
    slope = sum((g * d).sum().item() for g, d in zip(found, directions))
    assert slope == pytest.approx((values[0] - values[1]) / (2 * step), rel=2e-2)


@interpreter
def test_a_mask_over_frozen_inputs_has_a_gradient_that_can_be_differentiated():
    q, k, v = (torch.randn(1, 3, 1, 4) for _ in range(3))
    mask = torch.randn(3, 3, requires_grad=True)
    found = []
    for backend in ("triton", "eager"):
        with use_backend(attention=backend):
            y = ops.attention(q, k, v, attn_mask=mask)
        (first,) = torch.autograd.grad(y.square().sum(), mask, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), mask)[0])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@interpreter
@pytest.mark.parametrize("is_causal", [False, True])
def test_the_double_backward_is_as_accurate_as_eagers(triton, is_causal):
    padding = end_padding()

    def gradients_of(attend):
        def gradients(q, k, v, mask, dout):
            with torch.enable_grad():
                leaves = [t if t.requires_grad else t.detach().requires_grad_() for t in (q, k, v, mask)]
                return torch.autograd.grad(attend(*leaves), leaves, dout, create_graph=True)

        return gradients

    def kernel(q, k, v, mask):
        return ops.attention(q, k, v, key_padding_mask=padding, attn_mask=mask, is_causal=is_causal)

    def eager(q, k, v, mask):
        return EagerAttention().run(q, k, v, padding, mask, is_causal, 0.0, None)

    inputs = (*qkv(heads=2), torch.randn(2, 1, 7), torch.randn(1, 5, 2, 8))
    assert_as_accurate_as_eager(gradients_of(kernel), reference=gradients_of(eager), inputs=inputs, dtype=torch.float32)


@interpreter
def test_opcheck_accepts_all_ops():
    q, k, v = qkv(requires_grad=True)
    seed = torch.tensor([7])
    options = (False, 0.5, 0.3, 2, False)
    masks = (end_padding(), torch.randn(5, 7, requires_grad=True), seed)
    torch.library.opcheck(torch.ops.detr_fast.attention.default, (q, k, v, *masks, *options, False))
    with torch.no_grad():
        out, lse = torch.ops.detr_fast.attention(q, k, v, *masks, *options, False)
    arguments = (torch.randn_like(out), None, q, k, v, *masks, out, lse, True, *options, False)
    torch.library.opcheck(torch.ops.detr_fast.attention_backward.default, arguments)
    for averaged, dtype in ((True, torch.float32), (False, torch.float16)):
        arguments = (q, k, *masks, lse, averaged, dtype, *options)
        torch.library.opcheck(torch.ops.detr_fast.attention_weights.default, arguments)


@interpreter
def test_a_compiled_model_has_no_graph_break_and_equal_gradients(triton):
    q, k, v = qkv(requires_grad=True)
    padding = end_padding()

    def function(q):
        out, weights = ops.attention_with_weights(q * 2, k, v, key_padding_mask=padding)
        return out + ops.attention(q, k, v) + weights.square().sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(*(torch.autograd.grad(f(q).square().sum(), (q, k, v)) for f in (compiled, function))):
        torch.testing.assert_close(ours, theirs)


@interpreter
def test_autocast_casts_as_sdpa_does(triton):
    q, k, v = qkv(requires_grad=True)
    mask = torch.randn(5, 7)
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.attention(q, k, v, attn_mask=mask)
        _, weights = ops.attention_with_weights(q, k, v, attn_mask=mask)
    assert out.dtype == weights.dtype == torch.bfloat16
    (gradient,) = torch.autograd.grad(out.float().sum(), q)
    assert gradient.dtype == torch.float32


@interpreter
def test_checkpointing_recomputes_with_the_same_dropout(triton):
    from torch.utils.checkpoint import checkpoint

    q, k, v = qkv(requires_grad=True)
    results = []
    for run in (lambda f, *a: f(*a), lambda f, *a: checkpoint(f, *a, use_reentrant=False)):
        torch.manual_seed(1)
        out = run(lambda q, k, v: ops.attention(q, k, v, dropout_p=0.5), q, k, v)
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    assert all(torch.equal(a, b) for a, b in zip(*results))
    assert not torch.equal(results[0][0], ops.attention(q, k, v))


@interpreter
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_and_their_gradients_are_as_accurate_as_eager(triton, dtype, average):
    padding, mask = end_padding(), torch.randn(5, 7)

    def eager(q, k, v, mask):
        weights = "mean" if average else "heads"
        return EagerAttention().run(q, k, v, padding, mask, False, 0.0, None, False, False, weights)

    assert_as_accurate_as_eager(
        lambda q, k, v, mask: ops.attention_with_weights(
            q, k, v, key_padding_mask=padding, attn_mask=mask, average=average
        ),
        reference=eager,
        inputs=[*qkv(heads=2), mask],
        dtype=dtype,
    )


@interpreter
def test_weights_their_gradients_and_second_ones_are_the_twins_with_dropout():
    q, k, v = qkv(2, heads=2, requires_grad=True)
    dweights = torch.randn(2, 5, 7)
    results = []
    for backend in ("triton", "eager"):
        torch.manual_seed(5)
        with use_backend(attention=backend):
            out, weights = ops.attention_with_weights(q, k, v, dropout_p=0.4, average=True)
            first = torch.autograd.grad(weights, (q, k), dweights, create_graph=True)
            second = torch.autograd.grad(sum(g.square().sum() for g in first), (q, k))
        results.append((out, weights, *first, *second))
    for ours, twin in zip(*results):
        torch.testing.assert_close(ours, twin, atol=1e-5, rtol=1e-4)


@interpreter
def test_weights_cost_one_more_launch_and_keep_nothing_of_their_size(triton):
    from detr_fast.testing import counting

    q, k, v = qkv(queries=40, keys=50, requires_grad=True)
    with counting((q, k, v)) as counts:
        ops.attention_with_weights(q, k, v, average=True)
    assert counts.saved_bytes == 40 * 8 * 4 + 40 * 4  # the output and the log-sum-exp
    assert counts.total_launches == 2


@interpreter
def test_nothing_of_the_scores_size_is_kept_for_backward(triton):
    from detr_fast.testing import counting

    q, k, v = qkv(queries=40, keys=50, requires_grad=True)
    with counting((q, k, v)) as counts:
        ops.attention(q, k, v)
    assert counts.saved_bytes == 40 * 8 * 4 + 40 * 4  # the output and the log-sum-exp
    assert counts.total_launches == 1


@interpreter
def test_without_gradients_nothing_is_recorded(triton):
    q, k, v = qkv(requires_grad=True)
    with torch.no_grad():
        assert ops.attention(q, k, v).grad_fn is None


@interpreter
@pytest.mark.parametrize("batch_heads", [(1, 1), (2, 3)])
def test_the_eager_implementation_is_the_kernels_twin_in_dropout(batch_heads):
    batch, heads = batch_heads
    q, k, v = qkv(batch, 20, 35, heads, 16, requires_grad=True)
    dout = torch.randn(batch, 20, heads, 16)
    padding = end_padding(batch, 35)
    results = []
    for backend in ("triton", "eager"):
        torch.manual_seed(11)
        with use_backend(attention=backend):
            out = [ops.attention(q, k, v, key_padding_mask=padding, dropout_p=0.3) for _ in range(2)]
        assert not torch.equal(*out)
        results.append([*out, *torch.autograd.grad(out[1], (q, k, v), dout)])
    for ours, twin in zip(*results):
        torch.testing.assert_close(ours, twin, atol=2e-5, rtol=1e-4)


def test_masks_whose_offsets_inside_a_tile_would_not_fit_32_bits_are_copied():
    # 1,024 padding flags are read at once, and up to 128 rows and columns of a mask.
    q, k, v = (torch.empty(1, length, 1, 16, device="meta") for length in (200, 2000, 2000))
    for stride in (1, 1 << 20, 1 << 22, 1 << 24):
        padding = torch.empty_strided((1, 2000), (1, stride), dtype=torch.bool, device="meta")
        assert 1023 * Problem(q, k, v, padding).padding.stride(1) < 1 << 31
    for row, column in ((2000, 1), (1 << 24, 1), (1 << 23, 1 << 24), (1 << 24, 1 << 24)):
        mask = torch.empty_strided((200, 2000), (row, column), device="meta")
        assert 127 * sum(Problem(q, k, v, mask=mask).mask.stride()[2:]) < 1 << 31


def test_fake_cuda_tensors_trace_forward_without_a_gpu():
    with FakeTensorMode(), use_backend(attention="triton"):
        q, k, v = (t.transpose(0, 1) for t in qkv(7, 3, 7, device="cuda", dtype=torch.bfloat16))
        out = ops.attention(q, k[:3], v[:3])
        _, weights = ops.attention_with_weights(q, k[:3], v[:3], average=True)
    assert (weights.shape, weights.dtype) == ((3, 7, 7), torch.bfloat16)
    assert (out.shape, out.dtype, out.device.type) == ((3, 7, 1, 8), torch.bfloat16, "cuda")
    assert out.transpose(0, 1).is_contiguous()


def test_weights_under_autocast_are_fp32_on_a_gpu_as_torch_nns():
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert weights_dtype(torch.float16, cuda, torch.float16) == torch.float32
    assert weights_dtype(torch.float16, cuda, None) == torch.float16
    assert weights_dtype(torch.float32, cpu, torch.bfloat16) == torch.bfloat16
    assert weights_dtype(torch.float64, cuda, torch.bfloat16) == torch.float64


def test_auto_on_a_gpu_is_careful_where_nothing_was_measured(unmeasured):
    chosen = {}
    with FakeTensorMode(), dispatch.recording(lambda op, d: chosen.setdefault(len(chosen), d)):
        for batch, masked in ((2, True), (64, True), (64, False)):
            q, k, v = qkv(batch, 1000, 1000, 8, 32, device="cuda", dtype=torch.bfloat16)
            padding = torch.zeros(batch, 1000, dtype=torch.bool, device="cuda") if masked else None
            ops.attention(q, k, v, key_padding_mask=padding)
    small, large, plain = chosen.values()
    assert small.implementation.name == "sdpa"
    assert "detr-fast tune" in small.reasons["triton"]
    assert (large.implementation.name, large.note) == ("triton", "unmeasured on this GPU: run detr-fast tune")
    assert plain.implementation.name == "sdpa"
    assert "flash" in plain.reasons["triton"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dim": 257}, "head dimensions 257 and 257: it takes 1 to 256"),
        ({"dtype": torch.float64}, "float64 inputs: it takes bfloat16, float16, float32"),
        ({"key_dtype": torch.float16}, "different dtypes"),
    ],
)
def test_what_the_kernel_cannot_take_is_refused_in_words(change, reason):
    key_dtype = change.pop("key_dtype", None)
    with FakeTensorMode(), use_backend(attention="triton"):
        q, k, v = qkv(device="cuda", **change)
        k = k if key_dtype is None else k.to(key_dtype)
        with pytest.raises(BackendError, match=reason):
            ops.attention(q, k, v)


# bf16 with all, and the others with half of the pairs each: what a test compiles takes some 10 s.
ON_A_GPU = [
    (dtype, dim, masked)
    for row, dim in enumerate([1, 32, 64, 100, 128, 256])
    for column, masked in enumerate([None, "padding", "bool", "float"])
    for dtype in (torch.bfloat16, (torch.float32, torch.float16)[(row + column) % 2])
]


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "dim", "masked"), ON_A_GPU)
def test_on_a_gpu_attention_is_as_accurate_as_eager(triton, dtype, dim, masked):
    length = sized(333, 35)
    padding = mask = None
    if masked == "padding":
        padding = torch.rand(2, length, device=DEVICE) > 0.7
    elif masked is not None:
        mask = torch.randn(length, length, device=DEVICE)
        mask = mask > 0 if masked == "bool" else mask
    assert_as_accurate_as_eager(
        lambda q, k, v: ops.attention(q, k, v, key_padding_mask=padding, attn_mask=mask, is_causal=masked is None),
        reference=lambda q, k, v: EagerAttention().run(q, k, v, padding, mask, masked is None, 0.0, None),
        inputs=[torch.randn(2, length, sized(3, 1), dim, device=DEVICE) for _ in range(3)],
        dtype=dtype,
    )


@pytest.mark.gpu
def test_on_a_gpu_attention_is_captured_in_a_cuda_graph_and_draws_new_dropout(triton):
    q, k, v = qkv(2, 100, 100, sized(2, 1), 32, device=DEVICE)
    ops.attention(q, k, v, dropout_p=0.5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.attention(q, k, v, dropout_p=0.5)
    graph.replay()
    first = out.clone()
    graph.replay()
    assert not torch.equal(first, out)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("average", [True, False])
def test_on_a_gpu_weights_are_as_accurate_as_eager(triton, dtype, average):
    length = sized(333, 35)
    padding = torch.rand(2, length, device=DEVICE) > 0.7
    weights = "mean" if average else "heads"
    assert_as_accurate_as_eager(
        lambda q, k, v: ops.attention_with_weights(q, k, v, key_padding_mask=padding, average=average),
        reference=lambda q, k, v: EagerAttention().run(q, k, v, padding, None, False, 0.0, None, False, False, weights),
        inputs=[torch.randn(2, length, sized(3, 2), 32, device=DEVICE) for _ in range(3)],
        dtype=dtype,
    )
