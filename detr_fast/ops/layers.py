"""Whole transformer layers: whether all parts of one are to run on kernels, and the host programs of those that do.

An op by itself may not be worth its launch; a layer, whose host time is a program's (`host_program`), is measured as a whole.
Where it was measured to be faster than its parts left to themselves, that binds all of them.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from detr_fast import dispatch
from detr_fast.dispatch import Call, Implementation, Op, Situation, TritonImplementation
from detr_fast.implementation import NEVER
from detr_fast.ops import regimes
from detr_fast.ops.boundary import wants_grad
from detr_fast.ops.host_program import LATER, HostProgram
from detr_fast.ops.products import MEASURED_HIDDEN, MEASURED_WIDTH

MAX_PROGRAMS = 256  # shapes that vary for ever must not fill the memory
PRICE = 16  # calls of a program save the host about as much time as its recording took
ALLOWANCE = 32 * PRICE  # what recordings may cost beyond what calls have saved


@dataclass(frozen=True)
class LayerCall(Call):
    """requests: what was asked for by name, of which ops."""

    shape: tuple[int, ...]
    hidden: int
    training: bool
    requests: frozenset[tuple[str, str]]

    @property
    def computed_dtype(self) -> torch.dtype:
        """Of the products: x's, or autocast's."""
        return self.situation.autocast or self.dtype

    def shapes(self) -> str:
        return f"{self.shape} hidden {self.hidden} {str(self.dtype).removeprefix('torch.')}"


def _signature(x: Tensor, hidden: int, training: bool) -> tuple[Any, ...]:
    given = (type(x), x.shape, x.dtype, x.device, x.requires_grad)
    return (*given, hidden, training, frozenset(dispatch._requested.items()))


def _describe(x: Tensor, hidden: int, training: bool, *, situation: Situation) -> LayerCall:
    return LayerCall(
        device=x.device,
        architecture=dispatch.architecture(x.device),
        dtype=x.dtype,
        tensor_type=dispatch.tensor_type((x,)),
        needs_grad=wants_grad(x),
        situation=situation,
        shape=tuple(x.shape),
        hidden=hidden,
        training=training,
        requests=frozenset(dispatch._requested.items()),
    )


class TritonLayer(TritonImplementation):
    """Every part on its kernel; launched eagerly, by one program and as one node of autograd's."""

    def __init__(self, op: str) -> None:
        self.op = op

    def advice(self, call: LayerCall) -> str | None:
        if call.situation.regime == "compiled":
            return "under torch.compile cuBLAS and Inductor's own fusion do this"
        if not call.training:
            return "layers were measured in training: without, their parts are chosen one by one"
        if any(name != "auto" for _, name in call.requests):
            return "something was asked for by name: its parts are chosen one by one"
        if call.computed_dtype == torch.float32:
            return "float32 products: cuBLAS does them (under autocast, or in 16 bits, kernels can be chosen)"
        if not self._measured(call.architecture):
            return "a layer's parts are chosen one by one until it is measured as a whole: run detr-fast tune"
        if call.shape[-1] > MEASURED_WIDTH or call.hidden > MEASURED_HIDDEN:
            return f"{call.shape[-1]} columns, {call.hidden} hidden units: measured up to {MEASURED_WIDTH} and {MEASURED_HIDDEN}"
        size = torch.Size(call.shape).numel() * call.computed_dtype.itemsize
        return regimes.advice(self.op, call, size, "a choice for each part")

    def least(self, architecture: str | None, *kind: Any) -> int:
        return regimes.least(self.op, architecture) if self._measured(architecture) else NEVER

    def _measured(self, architecture: str | None) -> bool:
        """Whether on this very architecture, as for products."""
        entry = regimes.find(self.op, architecture)
        return entry is not None and entry.architecture == architecture

    def note(self, call: LayerCall) -> str | None:
        return "all of its parts on kernels; where a plain step can be repeated, one program and one node of autograd's"

    def run(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("layers are run by nn.whole_layer")


class LayerParts(Implementation):
    """Each part as the dispatcher chooses for it."""

    name = "eager"

    def run(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("parts are run by whoever asked")


class LayerOp(Op):
    """A kind of layer, with the programs recorded of it by signature: before, how often it was met, and why not where there can be none.

    What calls of programs save pays for recordings. Where that and the allowance are spent, as where shapes vary for ever, only a
    call that has been met more than PRICE times is recorded; before, any that is met again.
    """

    def __init__(self, name: str) -> None:
        parts = (TritonLayer(name), LayerParts())
        super().__init__(name, signature=_signature, describe=_describe, implementations=parts, work=regimes.bytes_of)
        self.programs: OrderedDict[Any, HostProgram | str | int] = OrderedDict()
        self.left = ALLOWANCE
        self.generation = object()  # another one when programs are forgotten

    def forget(self) -> None:
        super().forget()
        self.programs.clear()
        self.left = ALLOWANCE
        self.generation = object()

    def known(self, key: Any) -> HostProgram | str | None:
        """What was recorded of a call, or why that can't be, and is now the last to go; None before."""
        found = self.programs.get(key)
        if found is None or isinstance(found, int):
            return None
        self.programs.move_to_end(key)
        return found

    def is_due(self, key: Any) -> bool:
        """Whether a call that has no program, and is met once more, is to be recorded now."""
        before = self.programs.get(key, 0)
        if not isinstance(before, int):  # another thread has just recorded it
            return False
        self.keep(key, before + 1)  # under 0 after `wait`
        return before > 0 and (self.left >= PRICE or before >= PRICE)

    def wait(self, key: Any) -> None:
        """There was too little memory to record a call: it is due again after LATER more."""
        self.left = max(self.left - PRICE, 0)
        self.keep(key, -LATER)

    def saved(self) -> None:
        """A program was called."""
        self.left = min(self.left + 1, ALLOWANCE)

    def keep(self, key: Any, program: HostProgram | str | int) -> None:
        """In place of what was called least recently, where there are too many; int: how often it was met, from -LATER on if there was too little memory."""
        if not isinstance(program, int):
            self.left = max(self.left - PRICE, 0)
        self.programs[key] = program
        self.programs.move_to_end(key)
        while len(self.programs) > MAX_PROGRAMS:
            self.programs.popitem(last=False)


ENCODER_LAYER = LayerOp("encoder_layer")
DECODER_LAYER = LayerOp("decoder_layer")
