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
from detr_fast.ops.host_program import HostProgram
from detr_fast.ops.products import MEASURED_HIDDEN, MEASURED_WIDTH

MAX_PROGRAMS = 256  # shapes that vary for ever must not fill the memory


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
    """A kind of layer, with the programs recorded of it by signature: None before, and why not where there can be none."""

    def __init__(self, name: str) -> None:
        parts = (TritonLayer(name), LayerParts())
        super().__init__(name, signature=_signature, describe=_describe, implementations=parts, work=regimes.bytes_of)
        self.programs: OrderedDict[Any, HostProgram | str | None] = OrderedDict()
        self.generation = object()  # another one when programs are forgotten

    def forget(self) -> None:
        super().forget()
        self.programs.clear()
        self.generation = object()

    def known(self, key: Any) -> HostProgram | str | bool | None:
        """What was kept for a call, and is now the last to go; False where it was never seen."""
        if key not in self.programs:
            return False
        self.programs.move_to_end(key)
        return self.programs[key]

    def keep(self, key: Any, program: HostProgram | str | None) -> None:
        """In place of what was called least recently, where there are too many."""
        self.programs[key] = program
        while len(self.programs) > MAX_PROGRAMS:
            self.programs.popitem(last=False)


ENCODER_LAYER = LayerOp("encoder_layer")
DECODER_LAYER = LayerOp("decoder_layer")
