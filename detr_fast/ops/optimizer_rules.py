"""What of an optimizer's step the Triton kernels take, and the tensors that they read: all else is left to PyTorch, for a reason in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import optimizer as torch_optimizer

from detr_fast.kernels.adam import Settings
from detr_fast.situation import capturing

KINDS = (torch.optim.AdamW, torch.optim.Adam)  # and no subclasses, whose step may be another
_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
_GLOBAL_HOOKS = ("_global_optimizer_pre_hooks", "_global_optimizer_post_hooks")


@dataclass
class Tensors:
    """Of a step: all parameters that have gradients; where `reason` is None, what belongs to each of them, in the same order.

    clipped: what the norm is of. max_norm: 0 for no clipping. reason: why it is left to PyTorch.
    """

    optimizer: torch.optim.Optimizer
    clipped: Sequence[Tensor]
    max_norm: float
    parameters: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)
    first_moments: list[Tensor] = field(default_factory=list)
    second_moments: list[Tensor] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)
    rates: list[Tensor] = field(default_factory=list)
    settings: list[Settings] = field(default_factory=list)
    reason: str | None = None

    @property
    def first(self) -> Tensor:
        return self.parameters[0]

    @property
    def size(self) -> int:
        """Bytes of the parameters."""
        return sum(p.nbytes for p in self.parameters)


def tensors_of(optimizer: torch.optim.Optimizer, clipped: Sequence[Tensor], max_norm: float) -> Tensors:
    """What a step reads and writes, or why that is left to PyTorch.

    Moments and steps that are not there yet are made as the optimizer makes them.
    """
    found = Tensors(optimizer, clipped, max_norm)
    every = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    found.parameters, found.gradients = every, [p.grad for p in every]
    found.reason = next(_reasons(optimizer, every, clipped, max_norm), None)
    if found.reason is None:
        found.parameters, found.gradients = [], []
        for group in optimizer.param_groups:
            _add(found, optimizer, group)
        found.reason = next(_of_states(found), None)
    return found


def _reasons(
    optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], clipped: Sequence[Tensor], max_norm: float
) -> Iterator[str]:
    """All that is known without looking at moments."""
    if not parameters:
        yield "no parameter has a gradient"
    yield from _of_the_optimizer(optimizer)
    if max_norm and {id(p) for p in clipped if p.grad is not None} != {id(p) for p in parameters}:
        yield "the parameters whose gradients are clipped are not those that the optimizer holds"
    yield from _of_gradients(optimizer, parameters)


def _of_the_optimizer(optimizer: Any) -> Iterator[str]:
    name = type(optimizer).__name__
    if type(optimizer) not in KINDS:
        yield f"{name} is neither torch.optim.AdamW nor torch.optim.Adam, but of another class"
    step = vars(optimizer).get("step")  # a scheduler's, that counts calls, does nothing else
    if step is not None and not getattr(step, "_wrapped_by_lr_sched", False):
        yield f"the {name} has a step of its own"
    if any(getattr(optimizer, hooks, None) for hooks in _HOOKS) or any(
        getattr(torch_optimizer, hooks, None) for hooks in _GLOBAL_HOOKS
    ):
        yield f"the {name} has hooks, which may look at clipped gradients"
    if any(getattr(optimizer, scaled, None) is not None for scaled in ("grad_scale", "found_inf")):
        yield f"a gradient scaler has the {name} unscale gradients"
    for group in optimizer.param_groups:
        for setting in ("amsgrad", "differentiable"):
            if group[setting]:
                yield f"the {name} has {setting}=True"
        if any(isinstance(group[setting], Tensor) for setting in ("eps", "weight_decay")) or any(
            isinstance(beta, Tensor) for beta in group["betas"]
        ):
            yield f"the {name} has settings other than the learning rate that are tensors"


def _of_gradients(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> Iterator[str]:
    first = parameters[0]
    for p in parameters:
        gradient = p.grad
        assert gradient is not None
        if gradient.layout != torch.strided or p.layout != torch.strided:
            yield "some gradients or parameters are sparse"
        elif p.device != first.device or gradient.device != first.device:
            yield "the parameters lie on several devices"
        elif p.dtype != first.dtype or gradient.dtype != first.dtype:
            yield f"parameters and gradients are of several dtypes ({first.dtype}, {gradient.dtype})"
    if capturing(first.device.type) and any(not optimizer.state.get(p) for p in parameters):
        yield "some parameters have no moments yet, which are not to be made in a CUDA graph"
    for group in optimizer.param_groups:
        rate = group["lr"]
        if isinstance(rate, Tensor) and (
            rate.numel() != 1 or rate.dtype != torch.float32 or rate.device != first.device
        ):
            yield f"a learning rate is a tensor of {rate.dtype} on {rate.device}; it takes numbers, or fp32 on {first.device}"


def _add(found: Tensors, optimizer: Any, group: dict[str, Any]) -> None:
    before = len(found.parameters)
    lists: tuple[list[Tensor], ...]
    lists = found.parameters, found.gradients, found.first_moments, found.second_moments, [], found.steps
    optimizer._init_group(group, *lists)
    count = len(found.parameters) - before
    if not count:
        return
    rate, decay = group["lr"], float(group["weight_decay"])
    if not isinstance(rate, Tensor):
        rate = torch.full((), rate, dtype=torch.float32, device=found.first.device)
    decoupled = group.get("decoupled_weight_decay", isinstance(optimizer, torch.optim.AdamW))
    rest = (decay, 0.0) if decoupled else (0.0, decay)
    beta1, beta2 = map(float, group["betas"])
    settings = Settings(beta1, beta2, float(group["eps"]), *rest, -1.0 if group["maximize"] else 1.0)
    found.rates += [rate] * count
    found.settings += [settings] * count


def _of_states(found: Tensors) -> Iterator[str]:
    device = found.first.device
    each = zip(found.parameters, found.gradients, found.first_moments, found.second_moments, found.steps)
    for p, *others, step in each:
        if step.device != device or step.dtype != torch.float32:
            yield "steps are counted on the host, or not in fp32: give the optimizer fused=True or capturable=True"
        elif any(t.dtype != p.dtype or t.device != device for t in others):
            yield "moments are of another dtype or on another device than their parameters"
        elif any(t.shape != p.shape or t.stride() != p.stride() for t in others) or not _dense(p):
            yield "a parameter, its gradient and its moments are not laid out alike and without gaps"


def _dense(tensor: Tensor) -> bool:
    return tensor.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(tensor)
