"""The gate of a gated feed-forward block, activation(gate) * up: the contract, its eager reference, its Triton kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from detr_fast import dispatch
from detr_fast.dispatch import Call, Implementation, Op, Situation, TritonImplementation
from detr_fast.kernels import gated as kernels
from detr_fast.kernels.launch import compile_launches
from detr_fast.ops import regimes
from detr_fast.ops.boundary import SEVERAL_DEVICES, define, double_backward, on_one_device, wants_grad
from detr_fast.ops.feed_forward_autograd import ACTIVATIONS
from detr_fast.ops.layouts import Layouts, aligned, key, layouts, rehearsed


def gated_activation(
    gate: Tensor, up: Tensor | None = None, activation: str = "silu", gate_last: bool = False
) -> Tensor:
    """activation(gate) * up: what lies between the projections of SwiGLU (silu), GEGLU (gelu, gelu_tanh) and ReGLU (relu).

    Shapes: gate and up (..., F), or without up both as the halves of one tensor, (..., 2 F), of which the gate is the first
    and with `gate_last` the second. Returns (..., F) in gate's dtype, which up has; the kernel computes in fp32 and rounds
    once, where PyTorch also rounds activation(gate). activation: as `feed_forward` has them.
    Raises ValueError for another activation or shapes that do not fit; BackendError as `use_backend` says.
    Source: Shazeer, 2020, arXiv:2002.05202.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"got activation {activation!r}; expected one of {', '.join(ACTIVATIONS)}")
    if (reason := _misfit(gate, up, gate_last)) is not None:
        raise ValueError(reason)
    if not (dispatch.intervening or gate.is_cuda):
        return _eager(gate, up, activation, gate_last)
    return GATED_ACTIVATION(gate, up, activation, gate_last)


def _misfit(gate: Tensor, up: Tensor | None, gate_last: bool) -> str | None:
    if up is None:
        if gate.ndim == 0 or gate.shape[-1] % 2:
            return f"got {tuple(gate.shape)} for gate and up; expected (..., 2 F), or two tensors"
        return None
    if gate.ndim == 0 or gate.shape != up.shape or gate_last:
        last = " and gate_last, which is of the halves of one" if gate_last else ""
        return (
            f"got gate {tuple(gate.shape)} and up {tuple(up.shape)}{last}; expected two tensors (..., F) of one shape"
        )
    return None


@dataclass(frozen=True)
class GatedCall(Call):
    rows: int
    columns: int  # of the result
    up_dtype: torch.dtype | None
    activation: str
    gate_last: bool
    wanted: tuple[bool, bool]  # which of gate and up need a gradient
    misfit: str | None  # what of shapes and devices does not fit
    layouts: Layouts  # of both

    def shapes(self) -> str:
        halves = " of halves" if self.up_dtype is None else ""
        return f"({self.rows}, {self.columns}) {self.activation}{halves} {str(self.dtype).removeprefix('torch.')}"


def _signature(gate: Tensor, up: Tensor | None, activation: str, gate_last: bool) -> tuple[Any, ...]:
    return key(gate), key(up), activation, gate_last


def _describe(gate: Tensor, up: Tensor | None, activation: str, gate_last: bool, *, situation: Situation) -> GatedCall:
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
        activation=activation,
        gate_last=gate_last,
        wanted=(wants_grad(gate), wants_grad(up)),
        misfit=_misfit(gate, up, gate_last) or (None if on_one_device(gate, up) else SEVERAL_DEVICES),
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
        form = call.up_dtype is None, call.gate_last
        return call.device, call.columns, call.dtype, call.activation, form, call.wanted, aligned(call.layouts)

    def prepare(self, call: GatedCall) -> None:
        compile_launches(lambda: self.rehearse(call), call.device)

    def rehearse(self, call: GatedCall) -> None:
        """Forward, and backward where a gradient is needed, of such a call on meta tensors."""
        gate, up = rehearsed(call.layouts)
        y = _run_forward(gate, up, call.activation, call.gate_last)
        if call.needs_grad:
            _run_backward(y, gate, up, call.activation, call.gate_last, call.wanted)

    def run(self, gate: Tensor, up: Tensor | None, activation: str, gate_last: bool) -> Tensor:
        y: Tensor = _forward(gate, up, activation, gate_last)
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


def _eager(gate: Tensor, up: Tensor | None, activation: str, gate_last: bool) -> Tensor:
    if up is None:
        gate, up = gate.chunk(2, dim=-1)
        if gate_last:
            gate, up = up, gate
    return ACTIVATIONS[activation](gate) * up


# ---------------------------------------------------------------------------------------------------------------------
# Registration: forward and backward are ops of their own.


def _run_forward(gate: Tensor, up: Tensor | None, activation: str, gate_last: bool) -> Tensor:
    return kernels.gated_forward(gate, up, activation=activation, gate_last=gate_last)


def _fake_forward(gate: Tensor, up: Tensor | None, activation: str, gate_last: bool) -> Tensor:
    columns = gate.shape[-1] if up is not None else gate.shape[-1] // 2
    return gate.new_empty((*gate.shape[:-1], columns))


def _run_backward(
    dy: Tensor, gate: Tensor, up: Tensor | None, activation: str, gate_last: bool, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    kinds = {"with_dgate": wanted[0], "with_dup": wanted[1]}
    found = kernels.gated_backward(dy, gate, up, activation=activation, gate_last=gate_last, **kinds)
    dgate, dup = (gate.new_empty(0) if one is None else one for one in found)
    return dgate, dup


def _fake_backward(
    dy: Tensor, gate: Tensor, up: Tensor | None, activation: str, gate_last: bool, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    there = wanted[0] or up is None, wanted[1] and up is not None
    dgate, dup = (gate.new_empty(gate.shape if one else 0) for one in there)
    return dgate, dup


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor | None, activation: str, gate_last: bool) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.settings = activation, gate_last
        y: Tensor = _forward.below(gate, up, activation, gate_last)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        wanted = list(ctx.needs_input_grad[:2])
        found = _backward(dy, *ctx.saved_tensors, *ctx.settings, wanted)
        return (*(one if want else None for one, want in zip(found, wanted)), None, None)


class _Backward(torch.autograd.Function):
    """The first backward; its own backward (double backward) recomputes eagerly."""

    @staticmethod
    def forward(
        ctx: Any, dy: Tensor, gate: Tensor, up: Tensor | None, activation: str, gate_last: bool, wanted: list[bool]
    ) -> Any:
        ctx.save_for_backward(dy, gate, up)
        ctx.settings, ctx.wanted = (activation, gate_last), wanted
        ctx.set_materialize_grads(False)
        return _backward.below(dy, gate, up, activation, gate_last, wanted)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> Any:
        dy, *inputs = ctx.saved_tensors

        def reference(gate: Tensor, up: Tensor | None) -> Tensor:
            return _eager(gate, up, *ctx.settings)

        d_dy, d_inputs = double_backward(reference, inputs, dy, ctx.wanted, upstream)
        return (d_dy, *d_inputs, None, None, None)


def _autograd_forward(gate: Tensor, up: Tensor | None, activation: str, gate_last: bool) -> Any:
    if wants_grad(gate, up):
        return _Forward.apply(gate, up, activation, gate_last)
    return _forward.below(gate, up, activation, gate_last)


def _autograd_backward(dy: Tensor, gate: Tensor, up: Tensor | None, *rest: Any) -> Any:
    if wants_grad(dy, gate, up):
        return _Backward.apply(dy, gate, up, *rest)
    return _backward.below(dy, gate, up, *rest)


_forward = define(
    "gated_activation(Tensor gate, Tensor? up, str activation, bool gate_last) -> Tensor",
    run=_run_forward,
    fake=_fake_forward,
    autograd=_autograd_forward,
)
_backward = define(
    "gated_activation_backward(Tensor dy, Tensor gate, Tensor? up, str activation, bool gate_last, bool[2] wanted) -> "
    "(Tensor, Tensor)",
    run=_run_backward,
    fake=_fake_backward,
    autograd=_autograd_backward,
)
