"""Clipping and the step of Adam or AdamW, over all parameters at once: the contract, PyTorch's own, the Triton kernels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from detr_fast import capture, dispatch
from detr_fast.dispatch import NEVER, Call, Implementation, Op, Situation, TritonImplementation
from detr_fast.kernels import adam as kernels
from detr_fast.ops import regimes
from detr_fast.ops.boundary import define
from detr_fast.ops.optimizer_rules import KINDS, Tensors, tensors_of


def optimizer_step(optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor] = (), max_norm: float = 0.0) -> None:
    """`clip_grad_norm_(parameters, max_norm)`, unless max_norm is 0, and `optimizer.step()`.

    Where it was measured to be faster, in CUDA graphs above all, Adam and AdamW of torch.optim run on three launches of ours, whatever the
    number of tensors, and in all other cases on PyTorch's own operations. Ours update parameters, moments and steps as `fused=True` does, to fp32's
    rounding, and leave gradients as they were, unclipped. `optimizer_rules` has what they don't take, such as hooks, AMSGrad, sparse
    gradients, or `parameters` that are not the optimizer's. parameters: tensors of any shape, (C,), (N, C), ….
    Raises what the optimizer and clip_grad_norm_ raise, and BackendError as `use_backend` says.
    Sources: torch.optim.AdamW; torch.nn.utils.clip_grad_norm_.
    """
    parameters = list(parameters)
    with torch.no_grad():
        known = _tensors(optimizer, parameters, max_norm)
        if known is not None and (kernel := OPTIMIZER_STEP.kernel(known.first, known)) is not None:
            kernel.run(known.first, known)
            return
    _eager(optimizer, parameters, max_norm)


def room_for_update(optimizer: torch.optim.Optimizer) -> int:
    """How many int64 to `set_aside` for a capture of one step of the optimizer's, which is left to PyTorch where there is no room."""
    if type(optimizer) not in KINDS:
        return 0
    return kernels.table_size([p for group in optimizer.param_groups for p in group["params"]])


def _tensors(optimizer: torch.optim.Optimizer, parameters: list[Tensor], max_norm: float) -> Tensors | None:
    """What a decision is about, or None where it is known to be PyTorch's: looking at all tensors takes a millisecond."""
    given = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not given or torch.compiler.is_compiling():
        return None
    size, device = sum(p.nbytes for p in given), given[0].device
    if not dispatch.intervening and (device.type != "cuda" or OPTIMIZER_STEP.is_small(size, device)):
        return None
    return tensors_of(optimizer, parameters, max_norm)


def _eager(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], max_norm: float) -> None:
    if max_norm:
        nn.utils.clip_grad_norm_(parameters, max_norm)
    optimizer.step()


@dataclass(frozen=True)
class OptimizerStepCall(Call):
    optimizer: str
    tensors: int
    size: int
    clips: bool
    room: bool  # for tables, beside a graph's memory
    reason: str | None

    def shapes(self) -> str:
        clipping = " with clipping" if self.clips else ""
        return f"{self.optimizer}{clipping}, {self.tensors} tensors of {self.size / 2**20:.3g} MiB"


def _signature(first: Tensor, known: Tensors) -> tuple[Any, ...]:
    kinds = dispatch.tensor_type((*known.parameters, *known.gradients))
    sizes = len(known.parameters), known.size, bool(known.max_norm)
    return (
        kinds,
        first.device,
        first.dtype,
        type(known.optimizer),
        *sizes,
        known.reason,
        capture.recording(),
        _has_room(known),
    )


def _has_room(known: Tensors) -> bool:
    return capture.recording() and capture.left_aside("optimizer_step") >= kernels.table_size(known.parameters)


def _describe(first: Tensor, known: Tensors, situation: Situation) -> OptimizerStepCall:
    return OptimizerStepCall(
        device=first.device,
        architecture=dispatch.architecture(first.device),
        dtype=first.dtype,
        tensor_type=dispatch.tensor_type((*known.parameters, *known.gradients)),
        needs_grad=False,
        situation=situation,
        optimizer=type(known.optimizer).__name__,
        tensors=len(known.parameters),
        size=known.size,
        clips=bool(known.max_norm),
        room=_has_room(known),
        reason=known.reason,
    )


class TritonOptimizerStep(TritonImplementation):
    def why_not(self, call: OptimizerStepCall) -> str | None:
        if call.reason is None and call.situation.regime == "captured":
            return capture.why_no_table(call.room)
        return call.reason

    def advice(self, call: OptimizerStepCall) -> str | None:
        if regimes.find("optimizer_step", call.architecture) is None:
            return "not measured on any GPU yet: run detr-fast tune"
        return regimes.advice("optimizer_step", call, call.size)

    def least(self, architecture: str | None, *kind: Any) -> int:
        if regimes.find("optimizer_step", architecture) is None:
            return NEVER
        return regimes.least("optimizer_step", architecture)

    def note(self, call: OptimizerStepCall) -> str | None:
        return regimes.note("optimizer_step", call)

    def compiled_key(self, call: OptimizerStepCall) -> Any:
        return call.device, call.dtype, call.clips

    def prepare(self, call: OptimizerStepCall) -> None:
        kernels.compile_adam(call.dtype, call.clips, call.device)

    def run(self, first: Tensor, known: Tensors) -> None:
        settings = [number for one in known.settings for number in one]
        _optimizer_step.python(  # what C++ would run is recorded in a call of its own, which would be a step more
            known.parameters,
            known.gradients,
            known.first_moments,
            known.second_moments,
            known.steps,
            known.rates,
            settings,
            known.max_norm,
        )
        known.optimizer._opt_called = True  # type: ignore[attr-defined]  # which schedulers look at


class EagerOptimizerStep(Implementation):
    name = "eager"

    def run(self, first: Tensor, known: Tensors) -> None:
        _eager(known.optimizer, known.clipped, known.max_norm)


OPTIMIZER_STEP = Op(
    "optimizer_step",
    signature=_signature,
    describe=_describe,
    implementations=(TritonOptimizerStep(), EagerOptimizerStep()),
)


def _run(
    parameters: list[Tensor],
    gradients: list[Tensor],
    first_moments: list[Tensor],
    second_moments: list[Tensor],
    steps: list[Tensor],
    rates: list[Tensor],
    settings: list[float],
    max_norm: float,
) -> None:
    """settings: six of each parameter, as `kernels.adam.Settings` has them."""
    each = [kernels.Settings(*settings[i : i + 6]) for i in range(0, len(settings), 6)]
    kinds = parameters, gradients, first_moments, second_moments, steps, rates
    recorded = capture.recording() and dispatch.capturing(parameters[0].device.type)
    tables = kernels.AdamTables(*kinds, each, partial(capture.take_aside, "optimizer_step") if recorded else None)
    if recorded:
        capture.behind_the_capture(tables.fill)  # a graph's tensors stay where they are
    else:
        tables.fill()
    kernels.adam_step(tables, max_norm)
    for written in (parameters, first_moments, second_moments, steps):
        torch.autograd.graph.increment_version(written)


def _fake(*_: Any) -> None:
    return None


def _autograd(*arguments: Any) -> Any:
    return _optimizer_step.below(*arguments)


_optimizer_step = define(
    "optimizer_step(Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] first_moments, Tensor(c!)[] second_moments, "
    "Tensor(d!)[] steps, Tensor[] rates, float[] settings, float max_norm) -> ()",
    run=_run,
    fake=_fake,
    autograd=_autograd,
)
