"""Many tensors in another dtype at once, as autocast's weights: the contract, PyTorch's copies, the Triton kernel."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import make_channels_last_strides_for, make_contiguous_strides_for
from torch.nn.parameter import is_lazy

from detr_fast import capture, dispatch
from detr_fast.dispatch import NEVER, Call, Implementation, Op, Situation, TritonImplementation
from detr_fast.kernels import cast_together as kernels
from detr_fast.kernels.launch import empty_strided
from detr_fast.ops import regimes
from detr_fast.ops.boundary import SEVERAL_DEVICES, define, on_one_device, wants_grad
from detr_fast.ops.products import is_batch


def cast_together(tensors: Sequence[Tensor], dtype: torch.dtype, channels_last: bool = False) -> list[Tensor]:
    """Each tensor in `dtype`, contiguous, or, of four dimensions, (N, C, h, w), channels last where asked for.

    By few launches, as is the backward, which gives gradients as the tensors lie: contiguous, or channels last. Where it was measured to be
    faster, in captures of ours that have memory set aside (see `room_for_casts`), casts from fp32 to 16 bits and back are one launch of ours;
    in all other cases torch._foreach_copy_, and a copy for each tensor whose layout changes. Values are the same bits.
    tensors: of any shape, of one dtype and on one device where they are to be cast by our kernel.
    Raises BackendError as `use_backend` says. Source: torch._foreach_copy_.
    """
    if not tensors:
        return []
    last = [channels_last and t.ndim == 4 for t in tensors]
    if wants_grad(*tensors):
        return list(_Cast.apply(_cast, dtype, last, *tensors))
    return _cast(list(tensors), dtype, last)


def is_one_launch(tensors: Sequence[Tensor], dtype: torch.dtype, channels_last: bool = False) -> bool:
    """Whether in a capture of ours `cast_together` casts them by one launch, which more of them at once make only longer."""
    if not tensors or not capture.recording():
        return False
    return _kernel(Casts(list(tensors), dtype, [channels_last and t.ndim == 4 for t in tensors])) is not None


def room_for_casts(parameters: Iterable[Tensor], gradients: bool) -> int:
    """How many int64 to `set_aside` for a capture in which each parameter is cast once, and with `gradients` its gradient back. Those of
    lazy modules, which have no size before their first call, take none.
    """
    return kernels.table_size([p for p in parameters if not is_lazy(p)]) * (1 + gradients)


class _Cast(torch.autograd.Function):
    """`cast` of tensors of which some may not be trained."""

    @staticmethod
    def forward(ctx: Any, cast: Any, dtype: torch.dtype, last: list[bool], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        trained = ctx.needs_input_grad[3:]
        ctx.cast, ctx.dtype = cast, next((t.dtype for t, wanted in zip(tensors, trained) if wanted), dtype)
        ctx.last = [t.ndim == 4 and not t.is_contiguous() for t in tensors]
        found = cast(list(tensors), dtype, last)
        ctx.mark_non_differentiable(*(y for y, wanted in zip(found, trained) if not wanted))
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        # As their parameters lie in memory, else autograd would copy them once more.
        there = [i for i, gradient in enumerate(gradients) if gradient is not None]
        found: list[Tensor | None] = [None] * len(gradients)
        if there:
            cast = ctx.cast([gradients[i] for i in there], ctx.dtype, [ctx.last[i] for i in there])
            for i, gradient in zip(there, cast):
                found[i] = gradient
        return None, None, None, *found


def _cast(tensors: list[Tensor], dtype: torch.dtype, last: list[bool]) -> list[Tensor]:
    if wants_grad(*tensors) or is_batch(*tensors):
        return [tensor.to(dtype) for tensor in tensors]
    casts = Casts(tensors, dtype, last)
    kernel = _kernel(casts)
    return _copies(casts) if kernel is None else kernel.run(tensors[0], casts)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Casts:
    """What a decision is about."""

    tensors: list[Tensor]
    dtype: torch.dtype
    last: list[bool]  # whether each one is to lie channels last


def _kernel(casts: Casts) -> Implementation | None:
    """Ours where it is chosen. Outside of captures that is by name only, and nothing is looked at."""
    if torch.compiler.is_compiling() or not (capture.recording() or CAST_TOGETHER.requested):
        return None
    return CAST_TOGETHER.kernel(casts.tensors[0], casts)


def _copies(casts: Casts) -> list[Tensor]:
    """In one launch, but for what is to be laid otherwise."""
    made, sources, targets = [], [], []
    for tensor, last in zip(casts.tensors, casts.last):
        layout = torch.channels_last if last else torch.contiguous_format
        copy = torch.empty(tensor.shape, dtype=casts.dtype, device=tensor.device, memory_format=layout)
        made.append(copy)
        if copy.is_contiguous() and tensor.is_contiguous():  # of a 1×1 convolution, in either format
            sources.append(tensor.view(-1))
            targets.append(copy.view(-1))
        else:
            copy.copy_(tensor)
    if targets:
        torch._foreach_copy_(targets, sources)
    return made


@dataclass(frozen=True)
class CastTogetherCall(Call):
    target: torch.dtype
    tensors: int
    size: int  # bytes of so many fp32 numbers
    room: bool  # for a table, beside a graph's memory
    reason: str | None

    def shapes(self) -> str:
        names = (str(dtype).removeprefix("torch.") for dtype in (self.dtype, self.target))
        return f"{' to '.join(names)}, {self.tensors} tensors of {self.size / 2**20:.3g} MiB"


def _signature(first: Tensor, casts: Casts) -> tuple[Any, ...]:
    kind = dispatch.tensor_type(casts.tensors)
    settings = kind, first.device, first.dtype, casts.dtype, len(casts.tensors), _size(casts)
    return *settings, _reason(first, casts), capture.recording(), _has_room(casts)


def _size(casts: Casts) -> int:
    return 4 * sum(t.numel() for t in casts.tensors)


def _has_room(casts: Casts) -> bool:
    return capture.recording() and capture.left_aside("cast_together") >= kernels.table_size(casts.tensors)


def _reason(first: Tensor, casts: Casts) -> str | None:
    """What is against casting these by the kernel."""
    dtypes = {t.dtype for t in casts.tensors}
    if len(dtypes) > 1:
        return f"tensors of several dtypes ({', '.join(sorted(str(dtype).removeprefix('torch.') for dtype in dtypes))})"
    if not on_one_device(*casts.tensors):
        return SEVERAL_DEVICES
    if {first.dtype, casts.dtype} not in _PAIRS:
        return f"{first.dtype} to {casts.dtype}: it casts from fp32 to 16 bits and back"
    return None


_PAIRS = ({torch.float32, torch.bfloat16}, {torch.float32, torch.float16})


def _describe(first: Tensor, casts: Casts, situation: Situation) -> CastTogetherCall:
    return CastTogetherCall(
        device=first.device,
        architecture=dispatch.architecture(first.device),
        dtype=first.dtype,
        tensor_type=dispatch.tensor_type(casts.tensors),
        needs_grad=False,
        situation=situation,
        target=casts.dtype,
        tensors=len(casts.tensors),
        size=_size(casts),
        room=_has_room(casts),
        reason=_reason(first, casts),
    )


class TritonCastTogether(TritonImplementation):
    def why_not(self, call: CastTogetherCall) -> str | None:
        if call.reason is None and call.situation.regime == "captured":
            return capture.why_no_table(call.room)
        return call.reason

    def advice(self, call: CastTogetherCall) -> str | None:
        if call.situation.regime != "captured":
            return "outside of CUDA graphs the tensors' addresses would be copied to the GPU at each call"
        if regimes.unmeasured("cast_together", call):
            return "not measured on this GPU: run detr-fast tune"
        return regimes.advice("cast_together", call, call.size)

    def least(self, architecture: str | None, *kind: Any) -> int:
        return NEVER

    def note(self, call: CastTogetherCall) -> str | None:
        return regimes.note("cast_together", call)

    def compiled_key(self, call: CastTogetherCall) -> Any:
        return call.device, call.dtype, call.target

    def prepare(self, call: CastTogetherCall) -> None:
        kernels.compile_casts(call.dtype, call.target, call.device)

    def run(self, first: Tensor, casts: Casts) -> list[Tensor]:
        # By what is written in Python: what C++ would run is recorded in a call of its own.
        return _cast_together.python(casts.tensors, casts.dtype, casts.last)  # type: ignore[no-any-return]


class EagerCastTogether(Implementation):
    name = "eager"

    def run(self, first: Tensor, casts: Casts) -> list[Tensor]:
        return _copies(casts)


CAST_TOGETHER = Op(
    "cast_together",
    signature=_signature,
    describe=_describe,
    implementations=(TritonCastTogether(), EagerCastTogether()),
)


def _run(tensors: list[Tensor], dtype: torch.dtype, last: list[bool]) -> list[Tensor]:
    found = [empty_strided(tuple(t.shape), _strides(t, one), dtype, t.device) for t, one in zip(tensors, last)]
    taken = [i for i, (x, y) in enumerate(zip(tensors, found)) if kernels.may_cast(x, y)]
    for i in {*range(len(tensors))} - {*taken}:  # such as a transposed one
        found[i].copy_(tensors[i])
    if not taken:
        return found
    recorded = capture.recording() and dispatch.capturing(tensors[0].device.type)
    pairs = [tensors[i] for i in taken], [found[i] for i in taken]
    table = kernels.CastTable(*pairs, partial(capture.take_aside, "cast_together") if recorded else None)
    if recorded:
        capture.behind_the_capture(table.fill)  # a graph's tensors stay where they are
    else:
        table.fill()
    kernels.cast_together(table)
    return found


def _fake(tensors: list[Tensor], dtype: torch.dtype, last: list[bool]) -> list[Tensor]:
    return [
        torch.empty_strided(t.shape, _strides(t, one), dtype=dtype, device=t.device) for t, one in zip(tensors, last)
    ]


def _strides(tensor: Tensor, last: bool) -> tuple[int, ...]:
    make = make_channels_last_strides_for if last else make_contiguous_strides_for
    return make(tensor.shape)  # type: ignore[no-any-return, operator]


def _autograd(tensors: list[Tensor], dtype: torch.dtype, last: list[bool]) -> list[Tensor]:
    if wants_grad(*tensors):
        return list(_Cast.apply(_cast_together.below, dtype, last, *tensors))
    return _cast_together.below(tensors, dtype, last)  # type: ignore[no-any-return]


_cast_together = define(
    "cast_together(Tensor[] tensors, ScalarType dtype, bool[] channels_last) -> Tensor[]",
    run=_run,
    fake=_fake,
    autograd=_autograd,
)
