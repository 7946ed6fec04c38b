"""attn_mask of packed sequences: by position within a sequence, as of the padded batch."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.hardware import DEVICE, sized
from detr_fast import ops
from detr_fast.dispatch import BackendError, use_backend
from detr_fast.explanation import explaining
from detr_fast.testing import assert_as_accurate_as_eager
from tests.attention_inputs import ends, sequences

interpreter = pytest.mark.interpreter
LENGTHS = (5, 1, 16), (19, 8, 24)  # the longest keys allow masks to be read in runs, which the others' end within


def one_by_one(q, k, v, mask, is_causal=False):
    """Each sequence on its own, by the definition; mask broadcasts to (B, H, max_q, max_k)."""
    pieces = []
    mask = mask.expand(len(LENGTHS[0]), q.shape[1], 16, 24)
    for i, (own_q, own_k, own_v) in enumerate(zip(*map(torch.split, (q, k, v), (*LENGTHS, LENGTHS[1])))):
        scores = torch.einsum("lhe,she->hls", own_q, own_k) / q.shape[-1] ** 0.5
        own = mask[i, :, : len(own_q), : len(own_k)]
        scores = scores.masked_fill(~own, -math.inf) if own.dtype == torch.bool else scores + own
        if is_causal:
            scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -math.inf)
        hidden = scores == -math.inf
        weights = scores.masked_fill(hidden.all(-1, keepdim=True), 0.0).softmax(-1).masked_fill(hidden, 0.0)
        pieces.append(torch.einsum("hls,she->lhe", weights, own_v))
    return torch.cat(pieces)


# Of the mask, and whether attention is causal besides.
FORMS = [
    ((16, 24), True),
    ((2, 16, 24), False),
    ((3, 1, 16, 24), True),
    ((2, 16, 1), False),
    ((1, 24), False),
    ((3, 2, 1, 1), True),
]


@pytest.mark.parametrize("backend", ["eager", pytest.param("triton", marks=interpreter)])
@pytest.mark.parametrize(("shape", "is_causal"), FORMS, ids=str)
def test_a_float_mask_is_added_by_position_and_gets_its_gradient(backend, shape, is_causal):
    q, k, v, *rest = sequences(*LENGTHS, dtype=torch.float32)
    mask = torch.randn(shape, requires_grad=True)
    with use_backend(attention_varlen=backend):
        y = ops.attention_varlen(q, k, v, *rest, attn_mask=mask, is_causal=is_causal)
    expected = one_by_one(q, k, v, mask, is_causal)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    inputs = (q, k, v, mask)
    for ours, truth in zip(torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected, inputs, dy)):
        torch.testing.assert_close(ours, truth, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("fill", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("backend", "learned"),
    [
        ("eager", True),
        pytest.param("triton", True, marks=interpreter),
        pytest.param("triton_atomics", False, marks=interpreter),
    ],
)
def test_what_a_float_mask_holds_behind_a_sequence_reaches_neither_results_nor_gradients(backend, learned, fill):
    lengths = (3, 4), (5, 8)  # the first sequence's keys end within a run of the mask's row
    q, k, v, *rest = sequences(*lengths, dim=8, value_dim=8, dtype=torch.float32)
    clean = torch.randn(2, 1, 4, 8)
    dirty = clean.clone()
    dirty[0, :, 3:], dirty[0, :, :, 5:] = fill, fill
    found = []
    for mask in (clean, dirty):
        inputs = (q, k, v, mask.requires_grad_()) if learned else (q, k, v)
        with use_backend(attention_varlen=backend):
            y, lse = ops.attention_varlen(q, k, v, *rest, attn_mask=mask, return_lse=True)
        found.append((y, lse, *torch.autograd.grad(y.square().sum(), inputs)))
    for ours, truth in zip(found[1], found[0]):
        torch.testing.assert_close(ours, truth)
    if learned:
        assert not found[1][-1][0, :, 3:].any()
        assert not found[1][-1][0, :, :, 5:].any()


@pytest.mark.parametrize("backend", ["eager", pytest.param("triton", marks=interpreter)])
def test_a_bool_mask_says_what_may_be_attended_to(backend):
    q, k, v, *rest = sequences(*LENGTHS, dtype=torch.float32)
    mask = torch.rand(2, 16, 24) > 0.4
    mask[0, 3] = False  # a query of each sequence that is long enough sees nothing
    with use_backend(attention_varlen=backend):
        y = ops.attention_varlen(q, k, v, *rest, attn_mask=mask)
    expected = one_by_one(q, k, v, mask)
    torch.testing.assert_close(y, expected)
    assert not y[3, 0].any()
    dy = torch.randn_like(y)
    for ours, truth in zip(torch.autograd.grad(y, (q, k, v), dy), torch.autograd.grad(expected, (q, k, v), dy)):
        torch.testing.assert_close(ours, truth, atol=1e-5, rtol=1e-4)


@interpreter
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_with_a_mask_the_kernel_is_as_accurate_as_eager(dtype):
    q, k, v, *rest = sequences(*LENGTHS, surplus=3)
    mask = torch.randn(2, 16, 24, dtype=torch.float64, requires_grad=True)

    def call(backend):
        def run(q, k, v, mask):
            with use_backend(attention_varlen=backend):
                return ops.attention_varlen(q, k, v, *rest, attn_mask=mask)

        return run

    assert_as_accurate_as_eager(call("triton"), reference=call("eager"), inputs=(q, k, v, mask), dtype=dtype)


@interpreter
def test_few_queries_share_their_keys_under_a_mask():
    q, k, v, *rest = sequences((3,), (200,), heads=1, dtype=torch.float32)
    mask = torch.randn(3, 200, requires_grad=True)
    found = []
    for backend in ("triton", "eager"):
        with use_backend(attention_varlen=backend):
            y, lse = ops.attention_varlen(q, k, v, *rest, attn_mask=mask, return_lse=True)
        found.append((y, lse, *torch.autograd.grad(y.square().sum(), (q, k, v, mask))))
    for ours, truth in zip(*found):
        torch.testing.assert_close(ours, truth, atol=1e-5, rtol=1e-4)


@interpreter
def test_under_a_mask_the_padded_form_is_the_kernels_twin_in_dropout_and_in_the_double_backward():
    q, k, v, *rest = sequences((9, 3), (19, 8), surplus=2, dtype=torch.float32)
    mask = torch.randn(2, 9, 19, requires_grad=True)
    results = []
    for backend in ("triton", "eager"):
        torch.manual_seed(5)
        with use_backend(attention_varlen=backend):
            y = ops.attention_varlen(q, k, v, *rest, attn_mask=mask, dropout_p=0.4)
        first = torch.autograd.grad(y.square().sum(), (q, k, v, mask), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), (q, k, v, mask))
        results.append((y, *first, *second))
    for ours, twin in zip(*results):
        torch.testing.assert_close(ours, twin, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("backend", ["eager", pytest.param("triton", marks=interpreter)])
@pytest.mark.parametrize("lengths", [((3, 2), (4, 0)), ((0,), (0,)), ((), ())], ids=str)
def test_a_mask_for_no_keys_gets_a_gradient_of_zeros_where_none_are(backend, lengths):
    q, k, v, *rest = sequences(*lengths, surplus=2, dtype=torch.float32)
    mask = torch.randn(rest[2], rest[3], requires_grad=True)
    with use_backend(attention_varlen=backend):
        y = ops.attention_varlen(q, k, v, *rest, attn_mask=mask)
    (gradient,) = torch.autograd.grad(y.square().sum(), mask)
    assert gradient.shape == mask.shape
    assert bool(gradient.isfinite().all())


@interpreter
def test_opcheck_accepts_the_masks_ops():
    q, k, v, *rest = sequences((4, 3), (5, 2), surplus=2, dtype=torch.float32)
    mask = torch.randn(4, 5, requires_grad=True)
    packed = (q, k, v, *rest, mask, torch.tensor([7]), True, 0.5, 0.3, 2, False, False)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")  # the rest is checked without a mask
    torch.library.opcheck(torch.ops.detr_fast.attention_varlen.default, packed, test_utils=checks)
    with torch.no_grad():
        out, lse = torch.ops.detr_fast.attention_varlen(*packed)
    backward = (torch.randn_like(out), None, out, lse, True, *packed)
    torch.library.opcheck(torch.ops.detr_fast.attention_varlen_backward.default, backward, test_utils=checks)


def test_a_mask_that_does_not_broadcast_is_refused_with_what_was_expected():
    for mask in (torch.zeros(4, 5), torch.zeros(3, 3, 4), torch.zeros(3, 4, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"broadcast to \(B, H, max_q, max_k\) = \(2, 2, 3, 4\)"):
            ops.attention_varlen(*sequences((3, 2), (4, 1)), attn_mask=mask)


def test_one_sequence_after_the_other_takes_no_mask_and_says_why():
    arguments = sequences((3, 2), (4, 1))
    with explaining() as records:
        ops.attention_varlen(*arguments, attn_mask=torch.zeros(3, 4, dtype=torch.float64))
    assert records[0].chosen == "eager"
    assert "float64 attn_mask" in records[0].shapes
    with use_backend(attention_varlen="sdpa"), pytest.raises(BackendError, match="by position in a padded batch"):
        ops.attention_varlen(*arguments, attn_mask=torch.zeros(3, 4, dtype=torch.float64))


def test_with_a_mask_it_compiles_without_a_graph_break():
    q, k, v, *rest = sequences((3, 2), (4, 1), dtype=torch.float32)
    mask = torch.randn(3, 4)

    def call(q):
        return ops.attention_varlen(q, k, v, *rest, attn_mask=mask)

    torch.testing.assert_close(torch.compile(call, fullgraph=True, backend="aot_eager")(q), call(q))


@pytest.mark.gpu
def test_on_a_gpu_the_kernel_with_a_mask_is_as_accurate_as_eager():
    lengths = sized((333, 1, 0, 850), (33, 1, 0, 70))
    q, k, v, *_ = sequences(lengths, lengths, surplus=sized(70, 7), heads=sized(8, 1), dim=32, value_dim=32)
    ends_of, longest = ends(*lengths).to(DEVICE), max(lengths)
    mask = torch.randn(q.shape[1], longest, longest, dtype=torch.float64)

    def call(backend):
        def run(q, k, v, mask):
            with use_backend(attention_varlen=backend):
                return ops.attention_varlen(q, k, v, ends_of, ends_of, longest, longest, attn_mask=mask)

        return run

    tensors = [t.detach().to(DEVICE) for t in (q, k, v, mask)]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert_as_accurate_as_eager(call("triton"), reference=call("eager"), inputs=tensors, dtype=dtype)
