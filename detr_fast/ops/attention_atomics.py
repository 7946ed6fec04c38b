"""Attention whose backward adds dq up by atomics: when it takes a call, and when it was measured to be the faster one."""

from __future__ import annotations

from detr_fast.ops import regimes
from detr_fast.ops.attention_call import AttentionCall
from detr_fast.ops.attention_triton import NARROW, TritonAttention, few_queries, input_bytes, measured_as


def _regime(call: AttentionCall) -> str:
    """Two measurements: where queries are few, so are the sums to be cleared and converted, and programs that share them many."""
    return "attention_atomics_few_queries" if few_queries(call) else "attention_atomics"


class TritonAtomicsAttention(TritonAttention):
    """The forward is the same; the backward passes over the scores once, and is not deterministic."""

    name = "triton_atomics"
    max_head_dim = 128  # from there on the deterministic backward takes as few cycles
    atomics = True

    def why_not(self, call: AttentionCall) -> str | None:
        if call.situation.deterministic:
            return "dq is added up in any order, which torch.use_deterministic_algorithms(True) forbids: use triton"
        if call.mask_grad:
            return "the gradient of attn_mask would take the backward's fourth launch: use triton"
        return super().why_not(call)

    def advice(self, call: AttentionCall) -> str | None:
        if not call.needs_grad:
            return "without gradients it is triton's"
        if call.situation.regime == "layer":
            return "whole layers were measured with triton's deterministic backward"
        if (against := super().advice(call)) is not None:
            return against
        if call.dtype.itemsize > 2 or max(call.head_dim, call.value_dim) > NARROW:
            return f"measured in 16 bits at head dimensions up to {NARROW} only: ask for it by name"
        if regimes.find(_regime(call), call.architecture) is None:
            return "unmeasured against triton's deterministic backward: run detr-fast tune"
        return regimes.advice(_regime(call), call, input_bytes(call), "triton's deterministic backward")

    def note(self, call: AttentionCall) -> str | None:
        if not call.needs_grad:
            return super().note(call)
        for name in (measured_as(call), _regime(call)):
            if regimes.unmeasured(name, call):
                return regimes.note(name, call)
        return "its backward, by atomics, was measured to be faster than triton's deterministic one"
