"""Packed attention whose backward adds dq up by atomics: when it is chosen, and that it computes the same."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.hardware import DEVICE, sized
from detr_fast import dispatch, ops
from detr_fast.dispatch import BackendError, use_backend
from detr_fast.explanation import explaining
from detr_fast.ops import regimes
from detr_fast.ops.regimes import NEVER, Regime
from detr_fast.testing import assert_as_accurate_as_eager, counting
from tests.attention_inputs import ends, sequences

interpreter = pytest.mark.interpreter


def step(backend, rest, **options):
    def run(*qkv):
        with use_backend(attention_varlen=backend):
            return ops.attention_varlen(*qkv, *rest, **options)

    return run


@interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_it_is_as_accurate_as_eager(dtype):
    q, k, v, *rest = sequences((5, 1, 70), (3, 80, 2), surplus=4, dim=16, value_dim=8)
    assert_as_accurate_as_eager(
        step("triton_atomics", rest), reference=step("eager", rest), inputs=(q, k, v), dtype=dtype
    )


@interpreter
def test_its_backward_is_two_launches_in_fp32_and_takes_in_what_arrives_for_the_log_sum_exp():
    q, k, v, *rest = sequences((20, 30), (20, 30), surplus=2, value_dim=8, dtype=torch.float32)
    found = []
    for backend in ("triton_atomics", "triton"):
        y, lse = step(backend, rest, return_lse=True)(q, k, v)
        dy, dlse = torch.ones_like(y), torch.ones_like(lse).masked_fill(~lse.isfinite(), 0.0)
        with counting() as counts:
            found.append(torch.autograd.grad((y, lse), (q, k, v), (dy, dlse)))
        launched = [name for name in counts.launches if name.startswith("attention")]
        assert len(launched) == 2
        assert ("attention_backward_rows_kernel" in launched) == (backend == "triton_atomics")
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)


@interpreter
def test_what_it_can_not_take_is_refused_with_what_to_use():
    q, k, v, *rest = sequences((3, 2), (4, 1), dtype=torch.float32)
    mask = torch.randn(3, 4, requires_grad=True)
    with pytest.raises(BackendError, match="fourth launch: use triton"):
        step("triton_atomics", rest, attn_mask=mask)(q, k, v)
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(BackendError, match="forbids: use triton"):
            step("triton_atomics", rest)(q, k, v)
    finally:
        torch.use_deterministic_algorithms(False)


def chosen(monkeypatch, entries, dtype=torch.bfloat16, gradients=True, dim=32, key_heads=8, masked=False, **options):
    """What `auto` takes on an H100 with these measurements, and why not the backward with atomics; with dropout by default."""
    monkeypatch.setattr(dispatch, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(regimes, "known", lambda: entries)
    dispatch.forget_decisions()
    with FakeTensorMode(), explaining() as records:
        q = torch.empty(4000, 8, dim, device="cuda", dtype=dtype, requires_grad=gradients)
        k = q[:, :key_heads]
        lengths = torch.empty(5, device="cuda", dtype=torch.int32)
        options = {"dropout_p": 0.1, "enable_gqa": key_heads < 8, **options}
        if masked:
            options["attn_mask"] = torch.empty(1000, 1000, device="cuda")
        ops.attention_varlen(q, k, k, lengths, lengths, 1000, 1000, **options)
    dispatch.forget_decisions()
    return records[0].chosen, records[0].reasons.get("triton_atomics")


def test_auto_takes_it_where_it_was_measured_to_be_faster_on_this_architecture_and_nowhere_else(monkeypatch):
    faster = Regime("attention_varlen_atomics", "sm_90", 0, 0, "a test")
    assert chosen(monkeypatch, (faster,)) == ("triton_atomics", None)
    assert "without gradients" in chosen(monkeypatch, (faster,), gradients=False)[1]
    name, reason = chosen(monkeypatch, ())
    assert name == "triton"
    assert "unmeasured against triton's deterministic backward" in reason
    elsewhere = Regime("attention_varlen_atomics", "sm_80", 0, 0, "a test")
    assert chosen(monkeypatch, (elsewhere,)) == ("triton", reason)
    slower = Regime("attention_varlen_atomics", "sm_90", NEVER, NEVER, "a test")
    assert "triton's deterministic backward is faster" in chosen(monkeypatch, (slower,))[1]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ({"dtype": torch.float32}, "in more than 16 bits"),
        ({"dim": 64}, "at head dimensions over 32"),
        ({"dropout_p": 0.0}, "without dropout"),
        ({"masked": True}, "with an attn_mask"),
        ({"is_causal": True}, "in causal order"),
        ({"key_heads": 2}, "with key heads that queries share"),
        ({"return_lse": True}, "with the log-sum-exp"),
        ({"dropout_p": 0.0, "is_causal": True}, "without dropout, in causal order"),
    ],
    ids=str,
)
def test_auto_leaves_to_the_deterministic_backward_what_was_never_timed_and_says_what_that_is(monkeypatch, call, said):
    faster = Regime("attention_varlen_atomics", "sm_90", 0, 0, "a test")
    assert chosen(monkeypatch, (faster,), **call) == ("triton", f"never timed {said}: ask for it by name")


@pytest.mark.gpu
def test_on_a_gpu_it_is_as_accurate_as_eager():
    lengths = sized((333, 1, 0, 850), (33, 1, 0, 70))
    q, k, v, *_ = sequences(lengths, lengths, surplus=sized(70, 7), heads=sized(8, 1), dim=32, value_dim=32)
    rest = (ends(*lengths).to(DEVICE), ends(*lengths).to(DEVICE), max(lengths), max(lengths))
    tensors = [t.detach().to(DEVICE) for t in (q, k, v)]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert_as_accurate_as_eager(
            step("triton_atomics", rest), reference=step("eager", rest), inputs=tensors, dtype=dtype
        )
