"""A transformer layer as one program and one node of autograd's, where all of its parts run on kernels.

`whole` asks the dispatcher about the layer. Where that says yes, every part takes its kernel, and in a plain eager step the
layer's host program does what the parts would (see `ops.host_program`): the same launches on the same tensors, to the bit.
Wherever somebody looks (modes, hooks, profilers, `explain`, counters), in a CUDA graph, and the first time a signature is seen,
the parts run themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.modules.module import _has_any_global_hook

from detr_fast import dispatch
from detr_fast.kernels import launch
from detr_fast.nn.bare import is_bare
from detr_fast.nn.blocks import activation_name
from detr_fast.nn.fusion import following_norm, leave_ahead, norms_ahead, take_ahead, taken_ahead
from detr_fast.nn.memory import Projected, given_share, share_of
from detr_fast.nn.multihead_attention import MultiheadAttention
from detr_fast.nn.normalization import LayerNorm
from detr_fast.ops import boundary
from detr_fast.ops.attention_call import tf32
from detr_fast.ops.dropout import given_seed, reserve
from detr_fast.ops.host_program import HostProgram, ProgramNode, record, signature_of
from detr_fast.ops.host_recorder import Unrepeatable
from detr_fast.ops.layers import LayerOp
from detr_fast.ops.products import exact_fp32
from detr_fast.situation import layer_regime

MAX_BYTES = 8 << 20  # of the layer's input; with more, the GPU takes longer than the host in any case
_LINEARS = (nn.Linear, NonDynamicallyQuantizableLinear)
_NORMS = (LayerNorm, nn.LayerNorm)

Memory = tuple[Any, Tensor, Tensor | None]  # the attention that reads an encoder's memory, that, and its keys' source


def whole(
    op: LayerOp,
    layer: nn.Module,
    function: Callable[..., Tensor],
    tensors: Sequence[Tensor | None],
    settings: tuple[Any, ...] = (),
    memory: Memory | None = None,
) -> Tensor:
    """function(*tensors, *settings), the layer's parts one by one, or what comes to the same.

    The first tensor is the layer's input. settings: hashable. Raises as the parts do.
    """
    x = tensors[0]
    assert x is not None
    if torch.compiler.is_compiling() or op.is_small(x.nbytes, x.device):
        return function(*tensors, *settings)
    contents = _contents(layer)
    if contents is None or op.kernel(x, contents.hidden, layer.training) is None:
        return function(*tensors, *settings)
    if _unseen(x):
        found = _by_program(op, layer, function, tensors, settings, memory, contents)
        if found is not None:
            return found
    with layer_regime():
        return function(*tensors, *settings)


class _Contents(NamedTuple):
    """What a layer computes from: parameters, and all else that its parts read of themselves."""

    parameters: list[Tensor | None]
    settings: list[Any]
    hidden: int
    drops: bool


def _contents(layer: nn.Module) -> _Contents | None:
    """None where a part is not what is expected, or may not be taken apart."""
    own = layer.__dict__
    settings: list[Any] = [type(layer), *map(own.get, ("training", "norm_first", "normalize_before", "pre_norm"))]
    if (activation := own.get("activation")) is not None:
        if (name := activation_name(activation)) is None:
            return None
        settings.append(name)
    parameters: list[Tensor | None] = []
    drops, hidden = False, 0
    part: Any
    for name, part in layer._modules.items():
        kind = type(part)
        if part is None or not is_bare(part):
            return None
        state = part.__dict__
        if kind is nn.Dropout:
            p = state["p"] if state["training"] else 0.0
            settings.append(p)
            drops = drops or p > 0.0
            continue
        parameters += part._parameters.values()
        if kind in _NORMS:
            settings.append(state["eps"])
        elif kind is MultiheadAttention:
            projection = part._modules["out_proj"]
            if type(projection) not in _LINEARS or not is_bare(projection):
                return None
            parameters += projection._parameters.values()
            p = state["dropout"] if state["training"] else 0.0
            settings += (p, state["num_heads"], state["batch_first"], state["add_zero_attn"])
            drops = drops or p > 0.0
        elif kind in _LINEARS:
            hidden = part.out_features if name == "linear1" else hidden
        elif (activated := activation_name(part)) is not None:
            settings.append(activated)
        else:
            return None
    return _Contents(parameters, settings, hidden, drops)


def _unseen(x: Tensor) -> bool:
    """Whether nobody looks at ops, launches or what is saved, and launches cost what they cost."""
    if (
        boundary.seen()
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


def _by_program(
    op: LayerOp,
    layer: nn.Module,
    function: Callable[..., Tensor],
    tensors: Sequence[Tensor | None],
    settings: tuple[Any, ...],
    memory: Memory | None,
    contents: _Contents,
) -> Tensor | None:
    x = tensors[0]
    assert x is not None
    parameters = contents.parameters
    normed, norm = taken_ahead(layer._modules["norm1"], x), following_norm(layer)
    if norm is not None:
        if type(norm) not in _NORMS:
            return None
        parameters += norm._parameters.values()
    share, packs = None, []
    if memory is not None:
        with layer_regime():
            share = share_of(*memory)
    if share is not None and memory is not None:
        packs = share.packs
        unread = (memory[0].in_proj_weight, memory[0].in_proj_bias)  # the share has what remains of them
        parameters = [None if p is not None and any(p is one for one in unread) else p for p in parameters]
    arguments = [*tensors, normed, *(() if share is None else (share.weight, share.bias, *packs))]
    inputs = [*arguments, *parameters]
    known = signature_of(inputs, x.get_device())
    if known is None:
        return None
    kind = x.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    state = (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        autocast,
    )
    precision = (exact_fp32(), tf32()) if x.dtype == torch.float32 else None
    requests = frozenset(dispatch._requested.items())
    beside = (norm is not None and norm.eps, len(arguments), len(packs), contents.drops, precision, requests)
    key = (*known, *contents.settings, *settings, *beside, *state)

    attention = None if share is None or memory is None else memory[0]
    compute = _Computation(layer, norm, function, settings, len(tensors), attention)
    program = op.programs.get(key)
    if not isinstance(program, HostProgram):
        program = _recorded(op, key, compute, arguments, parameters, contents.drops, x.device)
        if program is None:
            return None
    seed, first = reserve(x.device, program.draws) if program.draws else (None, 0)
    if not program.differentiable:
        _, outputs = program.forward(seed, first, inputs)
    else:
        again = partial(_again, compute, parameters)
        outputs = ProgramNode.apply(program, again, seed, first, len(arguments), *inputs)
    if norm is not None:
        leave_ahead(outputs[0], norm, outputs[1])
    elif normed is not None:
        take_ahead()
    return outputs[0]


def _recorded(
    op: LayerOp,
    key: Any,
    compute: _Computation,
    arguments: list[Tensor | None],
    parameters: list[Tensor | None],
    drops: bool,
    device: torch.device,
) -> HostProgram | None:
    """The program of a layer that is seen again (a stack's second, say); None where there is none, or not yet."""
    if op.programs.get(key, False) is False:  # to record takes longer than to run: not what is seen once
        op.keep(key, None)
        return None
    if isinstance(op.programs[key], str) or any(p is not None and p._backward_hooks for p in parameters):
        return None
    try:
        with layer_regime():
            program = record(compute, arguments, parameters, reserve(device, 0)[0] if drops else None)
    except Unrepeatable as error:
        op.keep(key, str(error))
        return None
    if program is not None:
        op.keep(key, program)
    return program


class _Both(nn.Module):
    """A layer, and the norm that follows on it, under names that `functional_call` can give other parameters to."""

    def __init__(self, compute: _Computation) -> None:
        super().__init__()
        self.layer, self.norm, self.compute = compute.layer, compute.norm, compute

    def forward(self, *arguments: Tensor | None) -> list[Tensor]:
        return self.compute(*arguments)


def _again(
    compute: _Computation,
    parameters: list[Tensor | None],
    seed: Tensor | None,
    offset: int,
    *inputs: Tensor | None,
) -> list[Tensor]:
    """The layer's outputs by its parts, with other tensors as its parameters and the dropout of before."""
    both, count = _Both(compute), len(inputs) - len(parameters)
    places = {id(p): given for p, given in zip(parameters, inputs[count:]) if p is not None and given is not None}
    others = {name: places[id(p)] for name, p in both.named_parameters() if id(p) in places}
    with layer_regime(), given_seed(seed, offset):
        return list(torch.func.functional_call(both, others, inputs[:count]))
