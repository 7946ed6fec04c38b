"""Attention whose backward adds dq up by atomics: when it takes a call, and when it was measured to be the faster one."""

from __future__ import annotations

from detr_fast.dispatch import NEVER
from detr_fast.ops import regimes
from detr_fast.ops.attention_call import AttentionCall
from detr_fast.ops.attention_triton import TritonAttention, input_bytes, measured_as, names_of, noted

NOT_DETERMINISTIC = "dq is added up in any order, which torch.use_deterministic_algorithms(True) forbids: use triton"
NO_ATOMICS_FOR_MASKS = "the gradient of attn_mask would take the backward's fourth launch: use triton"


def measured_with_atomics(name: str) -> str:
    """Its measurements' name, of those of `attention_triton.measured_as`."""
    return f"{name}_atomics"


class TritonAtomicsAttention(TritonAttention):
    """The forward is the same; the backward passes over the scores once, and is not deterministic."""

    name = "triton_atomics"
    max_head_dim = 64  # at 128 its main launch takes 95.5 µs on an H200, and both of the deterministic backward 72.6
    atomics = True

    def why_not(self, call: AttentionCall) -> str | None:
        if call.situation.deterministic:
            return NOT_DETERMINISTIC
        if call.mask_grad:
            return NO_ATOMICS_FOR_MASKS
        return super().why_not(call)

    def advice(self, call: AttentionCall) -> str | None:
        if not call.needs_grad:
            return "without gradients it is triton's"
        if call.situation.regime == "layer":
            return "whole layers were measured with triton's deterministic backward"
        if call.dtype.itemsize > 2:
            return "measured in 16 bits only: ask for it by name"
        name = measured_with_atomics(measured_as(call))
        if regimes.unmeasured(name, call):
            return "unmeasured against triton's deterministic backward: run detr-fast tune"
        return regimes.advice(name, call, input_bytes(call), "PyTorch or triton's deterministic backward")

    def least(self, architecture: str | None, gradients: bool | None = None, *kind: bool) -> int:
        entries = (regimes.find(measured_with_atomics(name), architecture) for name in names_of(kind))
        own = (entry.eager_minimum for entry in entries if entry is not None and entry.architecture == architecture)
        return min(own, default=NEVER)

    def note(self, call: AttentionCall) -> str | None:
        if not call.needs_grad:
            return super().note(call)
        name = measured_with_atomics(measured_as(call))
        if regimes.unmeasured(name, call):
            return noted(regimes.note(name, call), call)
        return noted("its backward, by atomics, was measured to be faster than triton's deterministic one", call)
