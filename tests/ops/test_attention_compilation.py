"""What attention compiles beforehand, and what becomes of a call whose kernel does not compile."""

from __future__ import annotations

import pytest
import torch
from detr_fast.kernels import attention as kernels
from detr_fast.kernels import launch

from detr_fast import ops
from detr_fast.dispatch import BackendError, use_backend
from detr_fast.explanation import explaining
from detr_fast.ops import attention_autograd, attention_triton
from detr_fast.ops.attention import ATTENTION
from detr_fast.ops.attention_triton import TritonAttention
from tests.attention_inputs import end_padding, qkv


@pytest.mark.interpreter
def test_a_failing_compilation_is_seen_before_the_forward_runs(monkeypatch):
    def fail(*_):
        raise RuntimeError("no registers left")

    ATTENTION.forget()
    monkeypatch.setattr(attention_triton, "compile_variant", fail)
    with use_backend(attention="triton"), pytest.raises(BackendError, match="no registers left"):
        ops.attention(*qkv())
    ATTENTION.forget()


@pytest.mark.parametrize(("dropout_p", "stand_in"), [(0.0, "sdpa"), (0.5, "eager")])
def test_what_stands_in_for_a_kernel_that_fails_to_compile_drops_the_same(monkeypatch, dropout_p, stand_in):
    def fail(*_):
        raise RuntimeError("no registers left")

    for name in ("refusal", "advice"):
        monkeypatch.setattr(TritonAttention, name, lambda *_: None)
    monkeypatch.setattr(TritonAttention, "prepare", fail)
    ATTENTION.forget()
    with pytest.warns(RuntimeWarning, match="no registers left"), explaining() as records:
        ops.attention(*qkv(), dropout_p=dropout_p)
    assert records[0].chosen == stand_in
    ATTENTION.forget()


def test_what_is_compiled_beforehand_is_what_the_call_launches(monkeypatch):
    compiled, launched = [], []
    monkeypatch.setattr(attention_triton, "compile_variant", lambda variant, device: compiled.append(variant))
    monkeypatch.setattr(launch, "observers", [lambda one: launched.append(one.variant)])
    ATTENTION.forget()
    for dtype, dim, options in (
        (torch.bfloat16, 32, {"key_padding_mask": end_padding(), "dropout_p": 0.1}),
        (torch.float16, 20, {"attn_mask": torch.rand(5, 7) > 0.5, "is_causal": True}),
        (torch.float32, 16, {"attn_mask": torch.randn(1, 1, 5, 7)}),
    ):
        options = {k: t.to("meta") if isinstance(t, torch.Tensor) else t for k, t in options.items()}
        q, k, v = qkv(dim=dim, dtype=dtype, device="meta", requires_grad=True)
        compiled.clear(), launched.clear()
        with use_backend(attention="triton"):
            out = ops.attention(q, k, v, **options)
        assert out.shape == q.shape
        copies = 2 if dim == 20 else 0  # in each pass
        assert len(compiled) == 3 + copies
        problem = attention_autograd.attention_problem(
            q, k, v, options.get("key_padding_mask"), options.get("attn_mask"),
            torch.zeros(1, dtype=torch.int64, device="meta") if "dropout_p" in options else None,
            (options.get("is_causal", False), options.get("dropout_p", 0.0), 1.0, 0, False),
        )  # fmt: skip
        out, lse = kernels.attention_forward(problem)
        attention_autograd.backward_kernels.attention_backward(problem, out, lse, out)
        assert launched[-3 - copies :] == compiled
    ATTENTION.forget()


def test_both_backwards_are_compiled_beforehand_where_a_gradient_of_the_log_sum_exp_may_arrive(monkeypatch):
    compiled, launched = [], []
    monkeypatch.setattr(attention_triton, "compile_variant", lambda variant, device: compiled.append(variant))
    monkeypatch.setattr(launch, "observers", [lambda one: launched.append(one.variant)])
    ATTENTION.forget()
    q, k, v = qkv(dim=16, device="meta", requires_grad=True)
    with use_backend(attention="triton"):
        ops.attention(q, k, v, return_lse=True)
    problem = attention_autograd.attention_problem(q, k, v, None, None, None, (False, 0.0, 1.0, 0, False))
    out, lse = kernels.attention_forward(problem)
    for dlse in (None, lse):
        attention_autograd.backward_kernels.attention_backward(problem, out, lse, out, dlse)
    assert len(compiled) == 4
    assert set(launched) == set(compiled)
    ATTENTION.forget()
