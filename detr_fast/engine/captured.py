"""A training step that never waits for the host, in one CUDA graph per shape; and inference likewise. Of DETR, or of any model.

Forward, losses, backward, clipping, optimizer, scaler and moving average are one graph. What changes from step to step
lies in tensors: inputs, learning rates, the step's number, the scaler's factor, and the generator's state, so that
dropout is new on each replay.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from detr_fast import dispatch
from detr_fast.capture import set_aside
from detr_fast.engine.bound import Bound, held_by
from detr_fast.engine.ema import ExponentialMovingAverage
from detr_fast.engine.graphs import GraphedFunction
from detr_fast.engine.metrics import DeviceMetrics
from detr_fast.explanation import Record
from detr_fast.models.criterion import SetCriterion
from detr_fast.models.detr import Detr
from detr_fast.models.structures import NestedTensor
from detr_fast.ops.cast_together import room_for_casts
from detr_fast.ops.optimizer_rules import tensors_of
from detr_fast.ops.optimizer_step import optimizer_step, room_for_update


class CapturedStep:
    """One training step: `step(inputs, targets)` returns the losses as device tensors, which hold until the next step.

    `inputs` is what the model is called with: a tuple of arguments, a dictionary of arguments by name, or one argument. The
    first two steps of each shape run eagerly; they train like all others. So they do again where a part of the model or of the criterion, its class, its mode or
    a setting of it (a number, say; see `Settings`), which parameters are trained, or the memory of parameters and buffers has changed, where hooks came or went, and where the optimizer's
    state was loaded or its settings changed. Of a hook, a graph repeats the operations on tensors; its own Python runs in eager steps and
    captures alone. A forward that changes settings itself, as a count of its calls, leaves steps eager, as a warning says. Schedulers go on writing learning rates to the optimizer's groups; one that writes other settings at each step leaves
    all steps eager, as a warning says. `reason` is None, or says why all steps run eagerly; `str()` says how steps run. `update` says what clipping and
    the optimizer last ran on, as they were captured or ran eagerly, and why (see `ops.optimizer_step`); on kernels of ours gradients stay unclipped.

    Args:
        model: in train mode; on one device.
        criterion: takes the model's outputs and the targets: DETR's gives losses and their weighted sum; any other function
            gives the loss to minimise, a tensor without dimensions, under the model's autocast.
        optimizer: with a `capturable` setting where steps are to be captured, such as AdamW(fused=True).
        clip_norm: the gradients' largest norm; 0 for no clipping.
        ema: follows `averaged` after each step.
        averaged: the bare model, where `model` is a wrapper.
        scaler: of fp16 gradients.
        metrics: adds up each step's losses, and their sum as "loss".
        autocast: makes the context of the forward, for example `accelerator.autocast`.
        taken: steps that were taken before, by which the moving average's decay goes.
        capture: False runs all steps eagerly.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: SetCriterion | Callable[[Any, Any], Tensor],
        optimizer: torch.optim.Optimizer,
        *,
        clip_norm: float = 0.0,
        ema: ExponentialMovingAverage | None = None,
        averaged: nn.Module | None = None,
        scaler: torch.amp.GradScaler | None = None,
        metrics: DeviceMetrics | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        taken: int = 0,
        capture: bool = True,
    ) -> None:
        self.model = model
        self.criterion = criterion
        self.optimizer = optimizer
        self.clip_norm = clip_norm
        self.ema = ema
        self.averaged = averaged or model
        self.scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self.metrics = metrics
        self.autocast = autocast
        self.taken = taken
        device = next(model.parameters()).device
        reason = why_no_graph(model, optimizer, self.scaler) if capture else "capture=False"
        self._number: Tensor | None = None
        self._rates: list[Tensor] = []  # of the optimizer's groups, where steps are captured
        self._held = self._holds()
        self._changes = 0  # of what is held, in as many steps one behind the other
        if reason is None:
            _warn_of_padding(self.averaged)
            self._number = torch.tensor(taken, device=device)
            self._rates = self._rates_of_groups(device)
        why = "a gradient scaler unscales gradients" if self.scaler is not None else "steps run eagerly"
        self.update = Record("the optimizer", "optimizer_step", type(optimizer).__name__, "eager", {"triton": why})
        self._step = GraphedFunction(
            self._run,
            device,
            reason=reason,
            before=self._forget_gradients,
            around=self._capturable,
            bound=self._bound(),
        )

    @property
    def reason(self) -> str | None:
        """Why steps run eagerly; None where they are captured."""
        return self._step.reason

    @property
    def graphs(self) -> int:
        """How many shapes are captured."""
        return self._step.graphs

    def __str__(self) -> str:
        return f"the training step: {self._step}"

    def __call__(self, inputs: Any, targets: Any = None) -> dict[str, Tensor]:
        self.taken += 1
        if self.reason is None:
            self._look_at_the_optimizer()
        for group, rate in zip(self.optimizer.param_groups, self._rates):
            lr = group["lr"]
            rate.copy_(lr, non_blocking=True) if isinstance(lr, Tensor) else rate.fill_(lr)
        if isinstance(inputs, Mapping):
            inputs = dict(inputs)  # of any class: a graph finds tensors in dictionaries
        return self._step(inputs if self.reason else _for_a_graph(self.averaged, inputs), targets)

    def _run(self, inputs: Any, targets: Any) -> dict[str, Tensor]:
        total, losses = self._losses(inputs, targets)
        # On this thread: one of autograd's own for the GPU is woken first, and finds nothing in its core's caches.
        with torch.autograd.set_multithreading_enabled(False):
            (total if self.scaler is None else self.scaler.scale(total)).backward()
        self._update()
        number: int | Tensor = self.taken
        if self._number is not None:
            number = self._number.add_(1)
        if self.ema is not None:
            self.ema.update(self.averaged, number)
        results = {"loss": total.detach()} | {name: value.detach() for name, value in losses.items()}
        if self.metrics is not None:
            self.metrics.add(results)
        return results

    def _update(self) -> None:
        """Clip gradients and let the optimizer take its step."""
        if self.scaler is None:
            self._take_step()
            return
        if self.clip_norm:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def _take_step(self) -> None:
        def note(op: str, decision: Any) -> None:
            if op == "optimizer_step":  # and not another thread's
                told.append((decision.shapes, decision.implementation.name, decision.reasons, decision.note))

        told: list[tuple[Any, ...]] = []
        parameters = list(self.model.parameters())
        with dispatch.recording(note) if self.reason is None else nullcontext():
            optimizer_step(self.optimizer, parameters, self.clip_norm)
        if self.reason is None:
            reason = None if told else tensors_of(self.optimizer, parameters, self.clip_norm).reason
            last = told[-1] if told else (type(self.optimizer).__name__, "eager", {"triton": reason}, None)
            self.update = Record("the optimizer", "optimizer_step", *last)

    def _losses(self, inputs: Any, targets: Any) -> tuple[Tensor, Mapping[str, Tensor]]:
        """What is minimised, and its parts by name."""
        with self.autocast():
            outputs = _called(self.model, inputs)
            if not isinstance(self.criterion, SetCriterion):
                return self.criterion(outputs, targets), {}
        losses = self.criterion(outputs, targets)
        return self.criterion.weighted_sum(losses), losses

    def _look_at_the_optimizer(self) -> None:
        """Drop graphs that hold moments or settings which the optimizer has no more."""
        held = self._holds()
        kept = len(held[0]) >= len(self._held[0]) and all(map(is_, held[0], self._held[0]))
        if kept and held[1] == self._held[1]:
            self._held, self._changes = held, 0
            return
        changed = {name for was, now in zip(self._held[1], held[1]) for name, _ in set(was) ^ set(now)} or {"state"}
        self._held = held
        self._step.bound = self._bound()
        self._step.forget()
        self._rates = self._rates_of_groups(self._step.device)  # groups may have been added
        self._changes += 1
        if self._changes == 4:  # one step more than what is set up in the first ones
            warnings.warn(
                f"detr-fast: the optimizer's {' and '.join(sorted(changed))} changed in four steps one behind the other, and a "
                "CUDA graph holds the optimizer's state and all settings but learning rates: such steps run eagerly. Results stay right, only slower. "
                "A scheduler that changes betas, such as OneCycleLR, takes cycle_momentum=False.",
                RuntimeWarning,
                stacklevel=3,
            )

    def _holds(self) -> tuple[list[Any], list[tuple[tuple[str, str], ...]]]:
        state, settings = held_by(self.optimizer)
        others = [self.model, self.criterion, self.averaged, self.ema, self.scaler, self.metrics, self.autocast]
        own = [("clip_norm", repr(self.clip_norm)), ("moving average's decay", repr(getattr(self.ema, "decay", None)))]
        if self.scaler is not None:
            scaler = self.scaler
            factors = scaler.get_growth_factor(), scaler.get_backoff_factor(), scaler.get_growth_interval()
            own.append(("scaler's factors", repr(factors)))
        return [*others, *state], [*settings, tuple(own)]

    def _bound(self) -> Bound:
        watched = isinstance(self.criterion, nn.Module)
        return Bound(nn.ModuleList([self.model, self.criterion]) if watched else self.model)  # type: ignore[list-item]

    def _rates_of_groups(self, device: torch.device) -> list[Tensor]:
        return [torch.zeros((), device=device) for _ in self.optimizer.param_groups]

    def _forget_gradients(self) -> None:
        # In a graph, backward then writes gradients anew on each replay, and adds to none.
        self.optimizer.zero_grad(set_to_none=True)

    @contextmanager
    def _capturable(self) -> Iterator[None]:
        """The optimizer as a graph wants it: learning rates as tensors, its checks told so, and large parameters first.

        It takes some 36 tensors a launch. Of weights and biases by turns, those are too few elements for all of a GPU: seven
        launches of AdamW took an H200 0.67 ms, where reading and writing takes 0.28. Everything is put back afterwards.
        """
        groups = self.optimizer.param_groups
        before = [(group["lr"], group["capturable"], group["params"]) for group in groups]
        for group, rate in zip(groups, self._rates):
            group["capturable"] = True
            group["params"] = sorted(group["params"], key=Tensor.numel, reverse=True)
            group["lr"] = rate  # of a tensor, too, in whose place a schedule may put another one
        try:
            casts = room_for_casts(self.model.parameters(), gradients=True)
            with set_aside(self._step.device, optimizer_step=room_for_update(self.optimizer), cast_together=casts):
                yield
        finally:
            for group, (lr, capturable, parameters) in zip(groups, before):
                group["lr"], group["capturable"], group["params"] = lr, capturable, parameters


class CapturedInference:
    """The model without gradients, from a CUDA graph per shape: `inference(…)` takes what it does; outputs hold until the next call.

    Args:
        model: is put into eval mode.
        autocast: makes the context of the forward.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        capture: bool = True,
    ) -> None:
        self.model = model.eval()
        self.autocast = autocast
        held = next(chain(model.parameters(), model.buffers()), None)
        self._is_anywhere = held is None  # it computes where its inputs lie
        device = torch.device("cpu") if held is None else held.device
        reason = why_no_graph(model) if capture else "capture=False"
        if reason is None:
            _warn_of_padding(model)
        self._forward = GraphedFunction(self._run, device, reason=reason, around=self._with_room, bound=Bound(model))

    @property
    def reason(self) -> str | None:
        """Why the forward runs eagerly; None where it is captured."""
        return self._forward.reason

    @property
    def graphs(self) -> int:
        """How many shapes are captured."""
        return self._forward.graphs

    def __str__(self) -> str:
        return f"inference: {self._forward}"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.reason is None:
            args = tuple(_for_a_graph(self.model, one) for one in args)
        return self._run(args, kwargs) if self._is_anywhere else self._forward(args, kwargs)

    def _with_room(self) -> AbstractContextManager[None]:
        casts = room_for_casts(self.model.parameters(), gradients=False)
        return set_aside(self._forward.device, cast_together=casts)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with torch.no_grad(), self.autocast():
            return self.model(*args, **kwargs)


def _called(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def _for_a_graph(model: nn.Module, inputs: Any) -> Any:
    """Without each image's size, which would tell apart batches of one shape; what packing takes of it lies in tensors."""
    if not isinstance(inputs, NestedTensor):
        return inputs
    bare = _unwrapped(model)
    return bare.with_packing(inputs) if isinstance(bare, Detr) else replace(inputs, sizes=None)


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside wrappers that are known to hand on what they are called with; `_orig_mod` is torch.compile's."""
    handing_on = isinstance(model, (DistributedDataParallel, nn.DataParallel, AveragedModel))
    inner = model.module if handing_on else getattr(model, "_orig_mod", None)
    return _unwrapped(inner) if isinstance(inner, nn.Module) else model


def _warn_of_padding(model: nn.Module) -> None:
    """Where a detector that would skip padding lies inside a model of which it is not known what it does with its batches."""
    bare = _unwrapped(model)
    if not isinstance(bare, Detr) and any(isinstance(part, Detr) and part.packed for part in bare.modules()):
        warnings.warn(
            "detr-fast: a Detr has packed=True but is captured with padding: batches are packed before a graph runs, which "
            f"is not done for a model inside {type(bare).__name__}. Results stay right, only slower. Capture the Detr "
            "itself, or call with its with_packing(images).",
            RuntimeWarning,
            stacklevel=3,
        )


def why_no_graph(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> str | None:
    """The reason why a model's step, or its forward without an optimizer, can't be captured in a CUDA graph, or None."""
    devices = {one.device for one in model.parameters()} or {one.device for one in model.buffers()}
    if not devices:
        return "the model has no parameters or buffers, which would say where it computes"
    if len(devices) != 1:
        return f"the parameters lie on {len(devices)} devices; a CUDA graph takes one"
    (device,) = devices
    if device.type != "cuda":
        return f"the parameters are on {device.type}, and CUDA graphs need a GPU"
    if optimizer is None:
        return None
    if isinstance(model, DistributedDataParallel) or (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    ):
        return "training runs in several processes, whose exchange of gradients is not captured"
    if any("capturable" not in group for group in optimizer.param_groups):
        return f"{type(optimizer).__name__} has no 'capturable' setting; use torch.optim.AdamW(..., fused=True)"
    if scaler is not None and not getattr(optimizer, "_step_supports_amp_scaling", False):
        return "a gradient scaler looks at the gradients on the host unless the optimizer has fused=True"
    return None
