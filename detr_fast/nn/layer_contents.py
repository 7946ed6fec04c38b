"""What a transformer layer computes from, read once: its parameters, and all else that its parts read of themselves."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import eq
from typing import Any, Protocol
from weakref import WeakKeyDictionary, ref

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from detr_fast import native
from detr_fast.nn.bare import HOOKS, is_bare
from detr_fast.nn.blocks import activation_name
from detr_fast.nn.multihead_attention import MultiheadAttention
from detr_fast.nn.normalization import LayerNorm
from detr_fast.ops.host_program import HostProgram
from detr_fast.ops.layers import MAX_PROGRAMS, LayerOp
from detr_fast.situation import PLAIN_TENSORS

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


# What enters a layer's contents, and whether each of its parts is what is expected, and may be taken apart.
Describe = Callable[["Contents", nn.Module], bool]


class Contents:
    """What a layer computes from: parameters, and all else that its parts read of themselves.

    Read once; `hold` says whether all of that is still what it was. Parts and parameters are none of its own to keep: where one is
    replaced and its memory is freed, no more is known.
    """

    def __init__(self, op: LayerOp, describe: Describe) -> None:
        self.describe = describe
        self._parameters: list[Callable[[], Tensor | None]] = []
        self.names: list[str] = []  # of the parameters, as the layer's state_dict has them
        self.settings: list[Any] = []
        self.hidden = 0
        self.drops = False
        self._programs: dict[Any, HostProgram] = {}
        # The same, found in C++ where that is in use.
        host = native.host  # once: another thread may have it left out
        self._known = None if host is None else host.Decisions(MAX_PROGRAMS)
        self._state: list[Any] = []
        self.op, self._generation = op, op.generation
        self._parts: list[ref[nn.Module]] = []
        self._kinds: list[type] = []
        self._places: list[tuple[dict[str, Any], str]] = []  # of what may have become another object
        self._hooks: list[tuple[dict[str, Any], str]] = []
        self._found: list[int] = []  # what it was, by its id
        self._kept: list[Any] = []  # so that no id is given twice
        self._code: list[tuple[Any, Any]] = []  # of classes

    def watch(self, part: Any, path: str, *names: str, drops: tuple[str, ...] = ()) -> None:
        """Take the parameters of the part at this path, whose hooks would see its calls, and of its settings what `note` takes."""
        self._parts.append(ref(part))
        self._parameters += [_nothing if p is None else ref(p) for p in part._parameters.values()]
        self.names += [f"{path}.{name}" for name in part._parameters]
        self._hooks += [(part.__dict__, name) for name in HOOKS]
        self.note(part, *names, drops=drops)

    def note(self, part: Any, *names: str, drops: tuple[str, ...] = ()) -> None:
        """Take these settings of a part, and under the names `drops` probabilities of dropout."""
        state = part.__dict__
        self.settings += [state[name] for name in names]
        for name in drops:
            p = state[name] if state["training"] else 0.0
            self.settings.append(p)
            self.drops = self.drops or p > 0.0
        self.keep(part, *names, *drops)

    def keep(self, part: nn.Module, *names: str) -> None:
        """Remember what is found in a part's state."""
        self.place(part.__dict__, "training", "forward", *names)
        for children in (part._modules, part._parameters):
            self.place(children, *children)

    def place(self, state: Any, *names: str) -> None:
        """Remember what is found in a dictionary."""
        self._places += [(state, name) for name in names]

    def expect(self, kind: Any) -> None:
        """Remember a class's forward, of a library's code that somebody may replace."""
        self._code.append((kind, kind.forward))

    def close(self) -> Contents:
        """All is read. Programs take parameters by their place, and a parameter that was registered again has another one."""
        self._kinds = self._kinds_now()
        self.settings += [tuple(self.names), tuple(self._kinds)]
        found = [state.get(name) for state, name in self._places]
        self._found = list(map(id, found))
        forget = partial(_forget, ref(self))
        self._kept = [ref(one, forget) if isinstance(one, (Tensor, nn.Module)) else one for one in found]
        return self

    def _kinds_now(self) -> list[type]:
        return [type(part()) for part in self._parts]

    @property
    def parameters(self) -> list[Tensor | None]:
        return [parameter() for parameter in self._parameters]

    def hold(self, layer: nn.Module) -> bool:
        return (
            type(layer) is self.settings[0]
            and all(kind.forward is forward for kind, forward in self._code)
            and self._unchanged()
            and self._generation is self.op.generation
        )

    def _unchanged(self) -> bool:
        if (host := native.host) is not None:
            return bool(host.unchanged(self._places, self._found, self._parts, self._kinds, self._hooks))
        return (
            all(map(eq, self._found, [id(state.get(name)) for state, name in self._places]))
            and self._kinds_now() == self._kinds
            and not any(state[name] for state, name in self._hooks)
        )

    def computes_as(self, other: Contents) -> bool:
        """Whether the same is computed, of other parameters perhaps."""
        return self.settings == other.settings

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
        if len(self._programs) >= MAX_PROGRAMS:
            self._programs.clear()
        self._programs[call.key] = program
        if self._known is not None:
            self._known.put(program, call.stamp, *call.looks)


_nothing = type(None)


def _forget(contents: ref[Contents], gone: Any) -> None:
    """A part or a parameter is no more, whose id another object may get: hold nothing, and let go of what the part had."""
    if (found := contents()) is not None:
        found._generation = None
        found._places, found._hooks = [], []


def _look(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.requires_grad, tensor.dtype, tensor.get_device(), tensor.shape, tensor.stride()


_known: WeakKeyDictionary[nn.Module, Contents] = WeakKeyDictionary()


def contents_of(layer: nn.Module, op: LayerOp, describe: Describe) -> Contents | None:
    """None where a part is not what is expected, or may not be taken apart (see `read`)."""
    found = _known.get(layer)
    if found is not None and found.hold(layer):
        return found
    found = read(layer, op, describe)
    # Parameters that were computed (`functional_call`) keep all alive that they were computed of, and have no program.
    if found is None or any(p is not None and p.grad_fn is not None for p in found.parameters):
        _known.pop(layer, None)
    else:
        _known[layer] = found
    return found


def read(layer: nn.Module, op: LayerOp, describe: Describe) -> Contents | None:
    """None where a part is not what is expected, or a parameter is no plain tensor: quantised or distributed, it takes only what its class knows."""
    found = Contents(op, describe)
    found.settings.append(type(layer))
    plain = describe(found, layer) and all(p is None or type(p) in PLAIN_TENSORS for p in found.parameters)
    return found.close() if plain else None


def torch_nn(found: Contents, layer: nn.Module) -> bool:
    """A layer whose parts are called as torch.nn's are; whether each is what is expected."""
    switches = ("training", "norm_first", "normalize_before", "pre_norm")
    found.settings += map(layer.__dict__.get, switches)
    found.keep(layer, *switches, "activation")
    if (activation := layer.__dict__.get("activation")) is not None:
        if (known := activation_name(activation)) is None:
            return False
        found.settings.append(known)
    part: Any
    for name, part in layer._modules.items():
        kind = type(part)
        if part is None or not is_bare(part):
            return False
        if kind is nn.Dropout:
            found.watch(part, name, drops=("p",))
        elif kind in NORMS:
            if part.weight is None:  # nothing says how many columns it takes
                return False
            found.watch(part, name, "eps", "normalized_shape")
        elif kind is MultiheadAttention:
            projection = part._modules["out_proj"]
            if type(projection) not in _LINEARS or not is_bare(projection):
                return False
            found.watch(part, name, "num_heads", "batch_first", "add_zero_attn", drops=("dropout",))
            found.watch(projection, f"{name}.out_proj")
        elif kind in _LINEARS:
            found.watch(part, name)
            found.hidden = part.out_features if name == "linear1" else found.hidden
        elif (known := activation_name(part)) is not None:
            found.watch(part, name)
            found.keep(part, "approximate")
            found.settings.append(known)
        else:
            return False
    return True
