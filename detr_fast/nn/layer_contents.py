"""What a transformer layer computes from, read once: its parameters, and all else that its parts read of themselves."""

from __future__ import annotations

from operator import is_
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from detr_fast import native
from detr_fast.kernels.rows import MAX_PLANS
from detr_fast.nn.bare import HOOKS, is_bare
from detr_fast.nn.blocks import activation_name
from detr_fast.nn.multihead_attention import MultiheadAttention
from detr_fast.nn.normalization import LayerNorm
from detr_fast.ops.host_program import HostProgram
from detr_fast.ops.layers import LayerOp

NORMS = (LayerNorm, nn.LayerNorm)
_LINEARS = (nn.Linear, NonDynamicallyQuantizableLinear)


class Call(Protocol):
    """What tells a layer's calls apart (see `whole_layer`)."""

    @property
    def key(self) -> tuple[Any, ...] | None:
        """All that a program depends on, but for the looks of the layer's own parameters; None where none can be."""

    @property
    def looks(self) -> tuple[Any, ...]:
        """What C++ makes such a key of, the parameters' looks included."""

    @property
    def parameters(self) -> list[Tensor | None]:
        """The layer's and behind them the following norm's."""

    @property
    def stamp(self) -> int:
        """Of what a program is made under, for the table in C++."""


class Contents:
    """What a layer computes from: parameters, and all else that its parts read of themselves.

    Read once; `hold` says whether all of that is still what it was.
    """

    def __init__(self, op: LayerOp) -> None:
        self.parameters: list[Tensor | None] = []
        self.settings: list[Any] = []
        self.hidden = 0
        self.drops = False
        self._programs: dict[Any, HostProgram] = {}
        # The same, found in C++ where that is in use.
        self._known = None if native.host is None else native.host.Decisions(MAX_PLANS)
        self._state: list[Any] = []
        self.op, self._generation = op, op.generation
        self._parts: list[nn.Module] = []
        self._kinds: list[type] = []
        self._places: list[tuple[dict[str, Any], str]] = []  # of what may have become another object
        self._hooks: list[tuple[dict[str, Any], str]] = []
        self._found: list[Any] = []

    def watch(self, part: Any, *names: str, drop: str | None = None) -> None:
        """Take a part's parameters and these settings of its, and dropout's probability under the name `drop`."""
        state = part.__dict__
        self._parts.append(part)
        self.parameters += part._parameters.values()
        self.settings += [state[name] for name in names]
        if drop is not None:
            p = state[drop] if state["training"] else 0.0
            self.settings.append(p)
            self.drops = self.drops or p > 0.0
            names = (*names, drop)
        self._hooks += [(state, name) for name in HOOKS]
        self.keep(state, part, *names)

    def keep(self, state: dict[str, Any], part: nn.Module, *names: str) -> None:
        """Remember what is found in a part's state."""
        self._places += [(state, name) for name in ("training", "forward", *names)]
        self._places += [(children, name) for children in (part._modules, part._parameters) for name in children]

    def close(self) -> Contents:
        self._kinds = list(map(type, self._parts))
        self._found = [state.get(name) for state, name in self._places]
        return self

    def hold(self, layer: nn.Module) -> bool:
        return self._generation is self.op.generation and type(layer) is self.settings[0] and self._unchanged()

    def _unchanged(self) -> bool:
        if native.host is not None:
            unchanged = native.host.unchanged
            return bool(unchanged(self._places, self._found, self._parts, self._kinds, self._hooks))
        return (
            all(map(is_, self._found, [state.get(name) for state, name in self._places]))
            and list(map(type, self._parts)) == self._kinds
            and not any(state[name] for state, name in self._hooks)
        )

    def computes_as(self, other: Contents) -> bool:
        """Whether the same is computed, of other parameters perhaps."""
        return self.settings == other.settings and self._kinds == other._kinds

    def program(self, call: Call) -> HostProgram | None:
        """That of such a call before, on parameters that look like its."""
        found: HostProgram | None
        if self._known is not None and (found := self._known.get(*call.looks)) is not None:
            return found
        if call.key is None:  # of what is more than memory
            return None
        state = [None if p is None else _look(p) for p in call.parameters]
        if state != self._state:
            self._state = state
            self._programs.clear()
        return self._programs.get(call.key)

    def remember(self, call: Call, program: HostProgram) -> None:
        if len(self._programs) >= MAX_PLANS:
            self._programs.clear()
        self._programs[call.key] = program
        if self._known is not None:
            self._known.put(program, call.stamp, *call.looks)


def _look(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.requires_grad, tensor.dtype, tensor.get_device(), tensor.shape, tensor.stride()


_known: WeakKeyDictionary[nn.Module, Contents] = WeakKeyDictionary()


def contents_of(layer: nn.Module, op: LayerOp) -> Contents | None:
    """None where a part is not what is expected, or may not be taken apart."""
    found = _known.get(layer)
    if found is not None and found.hold(layer):
        return found
    found = read(layer, op)
    if found is not None:
        _known[layer] = found
    return found


def read(layer: nn.Module, op: LayerOp) -> Contents | None:
    found, own = Contents(op), layer.__dict__
    switches = ("training", "norm_first", "normalize_before", "pre_norm")
    found.settings = [type(layer), *map(own.get, switches)]
    found.keep(own, layer, *switches, "activation")
    if (activation := own.get("activation")) is not None:
        if (known := activation_name(activation)) is None:
            return None
        found.settings.append(known)
    part: Any
    for name, part in layer._modules.items():
        kind = type(part)
        if part is None or not is_bare(part):
            return None
        if kind is nn.Dropout:
            found.watch(part, drop="p")
        elif kind in NORMS:
            if part.weight is None:  # nothing says how many columns it takes
                return None
            found.watch(part, "eps", "normalized_shape")
        elif kind is MultiheadAttention:
            projection = part._modules["out_proj"]
            if type(projection) not in _LINEARS or not is_bare(projection):
                return None
            found.watch(part, "num_heads", "batch_first", "add_zero_attn", drop="dropout")
            found.watch(projection)
        elif kind in _LINEARS:
            found.watch(part)
            found.hidden = part.out_features if name == "linear1" else found.hidden
        elif (known := activation_name(part)) is not None:
            found.watch(part)
            found.keep(part.__dict__, part, "approximate")
            found.settings.append(known)
        else:
            return None
    return found.close()
