"""The gate of a gated feed-forward block, activation(gate) * up: the contract, its eager reference, its Triton kernel."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from detr_fast import dispatch
from detr_fast.dispatch import Call, Implementation, Op, Situation, TritonImplementation
from detr_fast.kernels import gated as kernels
from detr_fast.kernels.gated import Gate
from detr_fast.kernels.launch import compile_launches
from detr_fast.ops import regimes
from detr_fast.ops.boundary import SEVERAL_DEVICES, define, double_backward, on_one_device, wants_grad
from detr_fast.ops.feed_forward_autograd import ACTIVATIONS
from detr_fast.ops.layouts import Layouts, aligned, key, layouts, rehearsed


def gated_activation(
    gate: Tensor,
    up: Tensor | None = None,
    activation: str = "silu",
    gate_last: bool = False,
    *,
    neighbours: bool = False,
    limit: float | None = None,
    plus_one: bool = False,
) -> Tensor:
    """activation(gate) * up: what lies between the projections of SwiGLU (silu), GEGLU (gelu, gelu_tanh) and ReGLU (relu).

    Shapes: gate and up (..., F), or without up both as the halves of one tensor, (..., 2 F), of which the gate is the first
    and with `gate_last` the second, or with `neighbours` as every other column, the gate first. Returns (..., F) in gate's dtype, which up
    has; the kernel computes in fp32 and rounds once, where PyTorch also rounds activation(gate). activation: as `feed_forward` has them.
    limit: the gate is at most that, before its activation, and up between it and its negative, as in DeepSeek V4. plus_one: up + 1, behind
    the limit, in place of up: gpt-oss has quick_gelu, neighbours, a limit of 7 and this. What is not within the limit gets no gradient.
    Raises ValueError for another activation, a limit that is not above 0, or shapes that do not fit; BackendError as `use_backend` says.
    Source: Shazeer, 2020, arXiv:2002.05202; OpenAI, 2025, arXiv:2508.10925.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"got activation {activation!r}; expected one of {', '.join(ACTIVATIONS)}")
    if limit is not None and not limit > 0:
        raise ValueError(f"got a limit of {limit}; expected one above 0, or None")
    kind = Gate(activation, gate_last, neighbours, None if limit is None else float(limit), plus_one)
    if (reason := _misfit(gate, up, kind)) is not None:
        raise ValueError(reason)
    if not (dispatch.intervening or gate.is_cuda):
        return _eager(gate, up, kind)
    return GATED_ACTIVATION(gate, up, kind)


def _misfit(gate: Tensor, up: Tensor | None, kind: Gate) -> str | None:
    if kind.gate_last and kind.neighbours:
        return "got gate_last and neighbours; expected one of them, as of neighbours the gate is the first"
    if up is None:
        if gate.ndim == 0 or gate.shape[-1] % 2:
            return f"got {tuple(gate.shape)} for gate and up; expected (..., 2 F), or two tensors"
        return None
    one = "gate_last" if kind.gate_last else "neighbours" if kind.neighbours else None
    if gate.ndim == 0 or gate.shape != up.shape or one is not None:
        last = "" if one is None else f" and {one}, which is of both in one tensor"
        return (
            f"got gate {tuple(gate.shape)} and up {tuple(up.shape)}{last}; expected two tensors (..., F) of one shape"
        )
    return None


@dataclass(frozen=True)
class GatedCall(Call):
    rows: int
    columns: int  # of the result
    up_dtype: torch.dtype | None
    kind: Gate
    wanted: tuple[bool, bool]  # which of gate and up need a gradient
    misfit: str | None  # what of shapes and devices does not fit
    layouts: Layouts  # of both

    def shapes(self) -> str:
        kind = self.kind
        halves = "" if self.up_dtype is not None else " of neighbours" if kind.neighbours else " of halves"
        limit = "" if kind.limit is None else f" up to {kind.limit:g}"
        return (
            f"({self.rows}, {self.columns}) {kind.activation}{limit}{halves} {str(self.dtype).removeprefix('torch.')}"
        )


def _signature(gate: Tensor, up: Tensor | None, kind: Gate) -> tuple[Any, ...]:
    return key(gate), key(up), kind


def _describe(gate: Tensor, up: Tensor | None, kind: Gate, *, situation: Situation) -> GatedCall:
    width = gate.shape[-1] if gate.ndim else 0
    return GatedCall(
        device=gate.device,
        architecture=dispatch.architecture(gate.device),
        dtype=gate.dtype,
        tensor_type=dispatch.tensor_type((gate, up)),
        needs_grad=wants_grad(gate, up),
        situation=situation,
        rows=gate.shape[:-1].numel(),
        columns=width if up is not None else width // 2,
        up_dtype=None if up is None else up.dtype,
        kind=kind,
        wanted=(wants_grad(gate), wants_grad(up)),
        misfit=_misfit(gate, up, kind) or (None if on_one_device(gate, up) else SEVERAL_DEVICES),
        layouts=layouts(situation, gate, up),
    )


class TritonGatedActivation(TritonImplementation):
    def why_not(self, call: GatedCall) -> str | None:
        if call.misfit is not None:
            return call.misfit
        if call.up_dtype not in (None, call.dtype):
            return f"a gate of {call.dtype} beside {call.up_dtype}: it takes one dtype for both"
        if not 1 <= call.columns <= kernels.MAX_COLUMNS:
            return f"{call.columns} hidden units: it takes 1 to {kernels.MAX_COLUMNS}"
        return None

    def advice(self, call: GatedCall) -> str | None:
        if call.situation.regime == "compiled":
            return "under torch.compile Inductor fuses it by itself"
        return regimes.advice("gated_activation", call, 2 * call.rows * call.columns * call.dtype.itemsize)

    def least(self, architecture: str | None, *kind: Any) -> int:
        return regimes.least("gated_activation", architecture)

    def note(self, call: GatedCall) -> str | None:
        return regimes.note("gated_activation", call)

    def compiled_key(self, call: GatedCall) -> Any:
        one = call.up_dtype is None
        return call.device, call.columns, call.dtype, call.kind, one, call.wanted, aligned(call.layouts)

    def prepare(self, call: GatedCall) -> None:
        compile_launches(lambda: self.rehearse(call), call.device)

    def rehearse(self, call: GatedCall) -> None:
        """Forward, and backward where a gradient is needed, of such a call on meta tensors."""
        gate, up = rehearsed(call.layouts)
        y = _run_forward(gate, up, *call.kind)
        if call.needs_grad:
            _run_backward(y, gate, up, *call.kind, call.wanted)

    def run(self, gate: Tensor, up: Tensor | None, kind: Gate) -> Tensor:
        y: Tensor = _forward(gate, up, *kind)
        return y


class EagerGatedActivation(Implementation):
    """PyTorch's activation, and its product."""

    name = "eager"

    def run(self, *arguments: Any) -> Tensor:
        return _eager(*arguments)


def _bytes_of(gate: Tensor, up: Tensor | None, *_: Any) -> int:
    """Of both."""
    return gate.nbytes if up is None else 2 * gate.nbytes


GATED_ACTIVATION = Op(
    "gated_activation",
    signature=_signature,
    describe=_describe,
    implementations=(TritonGatedActivation(), EagerGatedActivation()),
    work=_bytes_of,
)


def _eager(gate: Tensor, up: Tensor | None, kind: Gate) -> Tensor:
    if up is None:
        gate, up = both_of(gate, kind)
    if kind.limit is not None:
        # At the limit it gives no gradient, as torch 2.14's clamp; 2.11's gives one.
        gate, up = F.hardtanh(gate, -math.inf, kind.limit), F.hardtanh(up, -kind.limit, kind.limit)
    return ACTIVATIONS[kind.activation](gate) * (up + 1 if kind.plus_one else up)


def both_of(both: Tensor, kind: Gate) -> tuple[Tensor, Tensor]:
    """The gate and the other that are in one tensor, (..., 2 F)."""
    if kind.neighbours:
        return both[..., ::2], both[..., 1::2]
    first, second = both.chunk(2, dim=-1)
    return (second, first) if kind.gate_last else (first, second)


# ---------------------------------------------------------------------------------------------------------------------
# Registration: forward and backward are ops of their own.


def _run_forward(gate: Tensor, up: Tensor | None, *kind: Any) -> Tensor:
    return kernels.gated_forward(gate, up, Gate(*kind))


def _fake_forward(gate: Tensor, up: Tensor | None, *kind: Any) -> Tensor:
    columns = gate.shape[-1] if up is not None else gate.shape[-1] // 2
    return gate.new_empty((*gate.shape[:-1], columns))


def _run_backward(dy: Tensor, gate: Tensor, up: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    *kind, wanted = rest
    found = kernels.gated_backward(dy, gate, up, Gate(*kind), with_dgate=wanted[0], with_dup=wanted[1])
    dgate, dup = (gate.new_empty(0) if one is None else one for one in found)
    return dgate, dup


def _fake_backward(dy: Tensor, gate: Tensor, up: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    wanted = rest[-1]
    there = wanted[0] or up is None, wanted[1] and up is not None
    dgate, dup = (gate.new_empty(gate.shape if one else 0) for one in there)
    return dgate, dup


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor | None, *kind: Any) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.settings = kind
        y: Tensor = _forward.below(gate, up, *kind)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        wanted = list(ctx.needs_input_grad[:2])
        found = _backward(dy, *ctx.saved_tensors, *ctx.settings, wanted)
        return (*(one if want else None for one, want in zip(found, wanted)), *(None,) * len(ctx.settings))


class _Backward(torch.autograd.Function):
    """The first backward; its own backward (double backward) recomputes eagerly."""

    @staticmethod
    def forward(ctx: Any, dy: Tensor, gate: Tensor, up: Tensor | None, *rest: Any) -> Any:
        ctx.save_for_backward(dy, gate, up)
        *kind, ctx.wanted = rest
        ctx.kind = Gate(*kind)
        ctx.set_materialize_grads(False)
        return _backward.below(dy, gate, up, *rest)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> Any:
        dy, *inputs = ctx.saved_tensors

        def reference(gate: Tensor, up: Tensor | None) -> Tensor:
            return _eager(gate, up, ctx.kind)

        d_dy, d_inputs = double_backward(reference, inputs, dy, ctx.wanted, upstream)
        return (d_dy, *d_inputs, *(None,) * len(ctx.kind), None)


def _autograd_forward(gate: Tensor, up: Tensor | None, *kind: Any) -> Any:
    if wants_grad(gate, up):
        return _Forward.apply(gate, up, *kind)
    return _forward.below(gate, up, *kind)


def _autograd_backward(dy: Tensor, gate: Tensor, up: Tensor | None, *rest: Any) -> Any:
    if wants_grad(dy, gate, up):
        return _Backward.apply(dy, gate, up, *rest)
    return _backward.below(dy, gate, up, *rest)


_KIND = "str activation, bool gate_last, bool neighbours, float? limit, bool plus_one"
_forward = define(
    f"gated_activation(Tensor gate, Tensor? up, {_KIND}) -> Tensor",
    run=_run_forward,
    fake=_fake_forward,
    autograd=_autograd_forward,
)
_backward = define(
    f"gated_activation_backward(Tensor dy, Tensor gate, Tensor? up, {_KIND}, bool[2] wanted) -> (Tensor, Tensor)",
    run=_run_backward,
    fake=_fake_backward,
    autograd=_autograd_backward,
)
