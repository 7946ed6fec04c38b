"""A transformer layer as one program and one node of autograd's, where all of its parts run on kernels.

`whole` asks the dispatcher about the layer. Where that says yes, every part takes its kernel, and in a plain eager step the
layer's host program does what the parts would (see `ops.host_program`): the same launches on the same tensors, to the bit.
Wherever somebody looks (modes, hooks, profilers, `explain`, counters), in a CUDA graph, and the first time a signature is seen,
the parts run themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from inspect import ismethod
from typing import Any
from weakref import WeakMethod, ref

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from detr_fast import dispatch, native
from detr_fast.kernels import launch
from detr_fast.nn.bare import is_bare
from detr_fast.nn.casts import casts_of
from detr_fast.nn.fusion import following_norm, leave_ahead, norms_ahead, take_ahead, taken_ahead
from detr_fast.nn.layer_contents import NORMS, Contents, Describe, contents_of, read, torch_nn
from detr_fast.nn.memory import Projected, given_share, share_of
from detr_fast.nn.normalization import LayerNorm
from detr_fast.ops import boundary, host_native
from detr_fast.ops.attention_call import tf32
from detr_fast.ops.dropout import given_seed, reserve
from detr_fast.ops.host_program import Again, HostProgram, ProgramNode, record, signature_of
from detr_fast.ops.host_recorder import Unrepeatable
from detr_fast.ops.layers import LayerOp
from detr_fast.ops.products import exact_fp32
from detr_fast.situation import layer_regime

MAX_BYTES = (
    16 << 20
)  # of the layer's input; with more, the GPU takes longer than Python in any case: on an H200 some 2 ms

Memory = tuple[Any, Tensor, Tensor | None]  # the attention that reads an encoder's memory, that, and its keys' source


def whole(
    op: LayerOp,
    layer: nn.Module,
    function: Callable[..., Tensor],
    tensors: Sequence[Tensor | None],
    settings: tuple[Any, ...] = (),
    memory: Memory | None = None,
    describe: Describe = torch_nn,
) -> Tensor:
    """function(*tensors, *settings), the layer's parts one by one, or what comes to the same.

    The first tensor is the layer's input. settings: hashable. describe: what the layer computes from. Raises as the parts do.
    """
    x = tensors[0]
    assert x is not None
    if torch.compiler.is_compiling() or op.is_small(x.nbytes, x.device):
        return function(*tensors, *settings)
    contents = contents_of(layer, op, describe)
    if contents is None:
        return function(*tensors, *settings)
    call = _call_of(layer, function, tensors, settings, memory, contents) if _unseen(x) else None
    if call is not None and (program := contents.program(call)) is not None:  # where there is one, the choice was made
        return _run(program, call)
    if op.kernel(x, contents.hidden, layer.training) is None:
        return function(*tensors, *settings)
    if call is not None and (program := _program(op, call)) is not None:
        return _run(program, call)
    with layer_regime():
        return function(*tensors, *settings)


def _unseen(x: Tensor) -> bool:
    """Whether nobody looks at ops, launches or what is saved, and launches cost what they cost."""
    if (
        not boundary.is_memory(x)
        or boundary.seen()
        or dispatch._recorders
        or _has_any_global_hook()
        or torch.is_anomaly_enabled()
        or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        or (launch.watched() and not dispatch.INTERPRETING)
    ):
        return False
    if x.is_cuda and (torch.cuda.is_current_stream_capturing() or x.get_device() != torch.cuda.current_device()):
        return False
    return 0 < x.numel() * x.itemsize <= MAX_BYTES


@dataclass(frozen=True)
class _Computation:
    """A layer's outputs, by its parts, of its arguments and of what its neighbours have for it.

    norm: what follows on it. own: how many are its own arguments; behind them come its input's norm, where that was taken already,
    and what is left to project with of its `attention`'s memory, which holds keys and values for it.
    """

    layer: nn.Module
    norm: nn.Module | None
    function: Callable[..., Tensor]
    settings: tuple[Any, ...]
    own: int
    attention: nn.Module | None

    def __call__(self, *arguments: Any) -> list[Tensor]:
        given, n, rest = arguments[: self.own], arguments[self.own], arguments[self.own + 1 :]
        share = None if self.attention is None else (self.attention, Projected(rest[0], rest[1], [*rest[2:]]))
        with norms_ahead([] if self.norm is None else [(self.layer, self.norm)]), given_share(share):
            if n is not None:
                leave_ahead(given[0], self.layer._modules["norm1"], n)
            y = self.function(*given, *self.settings)
            return [y] if self.norm is None else [y, take_ahead()]


@dataclass(frozen=True)
class _Call:
    """A layer's call: what computes it of which tensors, and what a program of it depends on besides the layer's contents.

    parameters: the layer's and behind them the following norm's.
    """

    compute: _Computation
    arguments: list[Tensor | None]
    parameters: list[Tensor | None]
    following: list[Tensor | None]
    autocast: torch.dtype | None
    drops: bool
    contents: Contents
    stamp: int  # of what a program is made under, for the table in C++

    @cached_property
    def key(self) -> tuple[Any, ...] | None:
        """All that a program depends on, but for the looks of the layer's own parameters; None where none can be."""
        x: Any = self.arguments[0]
        known = signature_of([*self.arguments, *self.following], x.get_device())
        if known is None:
            return None
        compute = self.compute
        return (
            *known,
            x.get_device(),
            compute.settings,
            None if compute.norm is None else _settings_of(compute.norm),
            compute.attention is not None,
            len(self.arguments),
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.are_deterministic_algorithms_enabled(),
            self.autocast,
            (exact_fp32(), tf32()) if x.dtype == torch.float32 else None,
            frozenset(dispatch._requested.items()),
        )

    @property
    def looks(self) -> tuple[Any, ...]:
        """What C++ makes such a key of, PyTorch's state and the parameters' looks included."""
        compute, norm = self.compute, self.compute.norm
        followed = () if norm is None else (type(norm) is LayerNorm, norm.eps, norm.normalized_shape)
        settings = (compute.settings, followed, compute.attention is not None, len(self.arguments))
        return (*self.arguments, *self.parameters, *settings)


def _call_of(
    layer: nn.Module,
    function: Callable[..., Tensor],
    tensors: Sequence[Tensor | None],
    settings: tuple[Any, ...],
    memory: Memory | None,
    contents: Contents,
) -> _Call | None:
    """None where no program can be of such tensors."""
    x: Any = tensors[0]
    parameters = contents.parameters
    normed, norm = taken_ahead(layer._modules.get("norm1"), x), following_norm(layer)
    arguments = [*tensors, normed]
    following: list[Tensor | None] = []
    if norm is not None:
        if type(norm) not in NORMS or norm.weight is None:
            return None
        following = [norm.weight, norm.bias]
        if any(p is not None and p.grad_fn is not None for p in following):
            return None
        parameters = parameters + following
    attention = share = None
    if memory is not None:
        with layer_regime():
            share = share_of(*memory)
        if share is not None:
            attention = memory[0]
            arguments += [share.weight, share.bias, *share.packs]
            unread = (attention.in_proj_weight, attention.in_proj_bias)  # the share has what remains of them
            parameters = [None if p is not None and any(p is one for one in unread) else p for p in parameters]
    parameters = casts_of(parameters)
    kind = x.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    compute = _Computation(layer, norm, function, settings, len(tensors), attention)
    host = native.host  # once: another thread may have it left out
    stamp = -1 if host is None else host.stamp()
    return _Call(compute, arguments, parameters, following, autocast, contents.drops, contents, stamp)


class _Remembered:
    """A computation as a node remembers it: a layer may keep what it gave, and shall be freed all the same."""

    def __init__(self, compute: _Computation) -> None:
        self._settings = compute.settings, compute.own
        modules = (compute.layer, compute.norm, compute.attention)
        self._modules = [None if one is None else ref(one) for one in modules]
        self._function: Any = WeakMethod(compute.function) if ismethod(compute.function) else lambda: compute.function

    def get(self) -> _Computation:
        """Raises RuntimeError where the layer is gone."""
        modules: Any = [None if one is None else one() for one in self._modules]
        function = self._function()
        if function is None or any(one is None and known is not None for one, known in zip(modules, self._modules)):
            raise RuntimeError(
                "a layer was freed between its forward and a backward with create_graph=True, which computes the layer again: "
                "keep it until that backward is done"
            )
        layer, norm, attention = modules
        return _Computation(layer, norm, function, *self._settings, attention)


def _settings_of(norm: Any) -> tuple[Any, ...]:
    return type(norm), norm.eps, norm.normalized_shape


def _run(program: HostProgram, call: _Call) -> Tensor:
    x: Any = call.arguments[0]
    call.contents.op.saved()
    seed, first = reserve(x.device, program.draws) if program.draws else (None, 0)
    inputs = [*call.arguments, *call.parameters]
    if not program.backwards:
        _, outputs = program.forward(seed, first, inputs)
    else:
        norm = call.compute.norm
        before = call.contents, None if norm is None else _settings_of(norm), dispatch._requested
        again = partial(_again, _Remembered(call.compute), before, x.device.type, call.autocast)
        if (made := host_native.layer_program(program, inputs, seed)) is not None:
            outputs = made.run(
                first, Again(program, again, call.parameters), *inputs, *([seed] if program.draws else [])
            )
        else:
            outputs = ProgramNode.apply(program, again, seed, first, len(call.arguments), *inputs)
    norm = call.compute.norm
    if norm is not None:
        leave_ahead(outputs[0], norm, outputs[1])
    elif call.arguments[call.compute.own] is not None:
        take_ahead()
    return outputs[0]


def _program(op: LayerOp, call: _Call) -> HostProgram | None:
    """The program of a layer that is seen again (a stack's second, say; see `LayerOp`); None where there is none, or not yet."""
    x: Any = call.arguments[0]
    looks = None if call.key is None else signature_of(call.parameters, x.get_device())
    # Of parameters that were computed (`functional_call`), what they were computed of may be among them.
    if looks is None or any(p is not None and p.grad_fn is not None for p in call.contents.parameters):
        return None
    assert call.key is not None
    key = (call.key, *call.contents.settings, *looks)
    program = op.known(key)
    if program is None and op.is_due(key) and not any(p is not None and p._backward_hooks for p in call.parameters):
        seed = reserve(x.device, 0)[0] if call.drops else None
        try:
            with layer_regime():
                program = record(call.compute, call.arguments, call.parameters, seed)
        except torch.OutOfMemoryError:  # recording keeps all that a step makes
            op.wait(key)
        except Unrepeatable as error:
            program = str(error)
        if program is not None:
            op.keep(key, program)
    if not isinstance(program, HostProgram):
        return None
    call.contents.remember(call, program)
    return program


class _Both(nn.Module):
    """A layer, and the norm that follows on it, under names that `functional_call` can give other parameters to."""

    def __init__(self, compute: _Computation) -> None:
        super().__init__()
        self.layer, self.norm, self.compute = compute.layer, compute.norm, compute

    def forward(self, *arguments: Tensor | None) -> list[Tensor]:
        return self.compute(*arguments)


Before = tuple[Contents, tuple[Any, ...] | None, dict[str, str]]  # a layer, the norm behind it and what was asked for


def _again(
    remembered: _Remembered,
    before: Before,
    kind: str,
    autocast: torch.dtype | None,
    seed: Tensor | None,
    offset: int,
    *inputs: Any,
) -> list[Tensor]:
    """The layer's outputs by its parts, with other tensors as its parameters and the dropout of before.

    Raises RuntimeError where the layer is no longer what it was, or is gone.
    """
    compute = remembered.get()
    (contents, norm_settings, requests), norm = before, compute.norm
    now = read(compute.layer, contents.op, contents.describe)
    if (
        now is None
        or not now.computes_as(contents)
        or (norm is not None and (not is_bare(norm) or _settings_of(norm) != norm_settings))
    ):
        raise RuntimeError(
            f"{type(compute.layer).__name__} changed between its forward and a backward with create_graph=True, which computes "
            "the layer again and needs it as it was (training or eval, dropout, eps, its parts and their hooks): "
            "change it behind that backward"
        )
    both = _Both(compute)
    following = [] if norm is None else ["norm.weight", "norm.bias"]
    names = [*(f"layer.{name}" for name in contents.names), *following]
    count = len(inputs) - len(names)
    others = {name: one for name, one in zip(names, inputs[count:]) if one is not None}
    casting = torch.autocast(kind, autocast, enabled=autocast is not None)
    requested = dispatch.use_backend(**{"*": "auto"} | requests)
    with layer_regime(), given_seed(seed, offset), casting, requested:
        return list(torch.func.functional_call(both, others, inputs[:count]))
