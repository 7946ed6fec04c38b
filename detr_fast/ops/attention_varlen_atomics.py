"""Attention over packed sequences whose backward adds dq up by atomics: when it takes a call, and when it was measured faster."""

from __future__ import annotations

from detr_fast.ops import regimes
from detr_fast.ops.attention_atomics import NO_ATOMICS_FOR_MASKS, NOT_DETERMINISTIC, TritonAtomicsAttention
from detr_fast.ops.attention_triton import noted
from detr_fast.ops.attention_varlen_call import VarlenCall
from detr_fast.ops.attention_varlen_triton import TritonVarlen

TIMED_DIM = 32  # the head dimension of what `tune` times, all of it with dropout


class TritonAtomicsVarlen(TritonVarlen):
    """The forward is the same; the backward passes over the scores once, and is not deterministic."""

    name = TritonAtomicsAttention.name
    max_head_dim = TritonAtomicsAttention.max_head_dim
    atomics = True

    def why_not(self, call: VarlenCall) -> str | None:
        if call.situation.deterministic:
            return NOT_DETERMINISTIC
        return NO_ATOMICS_FOR_MASKS if call.mask_grad else super().why_not(call)

    def advice(self, call: VarlenCall) -> str | None:
        if not call.needs_grad:
            return "without gradients it is triton's"
        if untimed := _untimed(call):
            return f"never timed {untimed}: ask for it by name"
        if regimes.unmeasured("attention_varlen_atomics", call):
            return "unmeasured against triton's deterministic backward: run detr-fast tune"
        return regimes.advice("attention_varlen_atomics", call, input_bytes(call), "triton's deterministic backward")

    def note(self, call: VarlenCall) -> str | None:
        return noted(regimes.note("attention_varlen_atomics", call), call) if call.needs_grad else super().note(call)


def _untimed(call: VarlenCall) -> str | None:
    """What sets a call apart from all that `tune` times."""
    differences = {
        "in more than 16 bits": call.dtype.itemsize > 2,
        f"at head dimensions over {TIMED_DIM}": max(call.head_dim, call.value_dim) > TIMED_DIM,
        "without dropout": not call.dropout,
        "with an attn_mask": call.attn_mask is not None,
        "in causal order": call.is_causal,
        "with key heads that queries share": call.key_heads != call.heads,
        "with the log-sum-exp": call.return_lse,
    }
    return ", ".join(name for name, present in differences.items() if present) or None


def input_bytes(call: VarlenCall) -> int:
    """Bytes of q, k and v."""
    elements = (call.queries * call.heads + 2 * call.keys * call.key_heads) * call.head_dim
    return elements * call.dtype.itemsize
