"""What of a model and its optimizer a captured graph is bound to, besides the shapes of what it is called with."""

from __future__ import annotations

import warnings
from collections.abc import Hashable
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from detr_fast import native
from detr_fast.engine.settings import Settings
from detr_fast.nn.bare import HOOKS

# Of all modules of the process, as profilers register them.
_GLOBAL_HOOKS = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
)
MAX_KNOWN = 4096  # of what there was at earlier calls
_OPTIMIZER_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")


class Bound:
    """Called, it gives another number where a graph of the model may no longer compute what a call of the model would.

    Looked at are the classes of all parts and those classes' forwards, modes, settings and forwards of their own (see `Settings`), which part is in
    which place, hooks on parts and on parameters, which parameters are trained, and where parameters and buffers lie, of how many elements. Where the host's C++ part is
    in use it looks first whether all objects are still those of the last call, which takes a third of the time.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._readings = 0
        self._kinds: tuple[type, ...] = ()
        self._known: dict[Hashable, int] = {}
        self._number = self._numbers = 0
        self._last: tuple[list[Any], ...] | None = None  # what is the same as long as nothing changes
        self._changing = 0  # calls one behind the other that changed something themselves
        self._read()

    def _read(self) -> None:
        """Look where everything is kept, once for each set of parts."""
        self._readings += 1
        self._parts = list(self._model.modules())
        # Views, which see what comes and goes; empty lists of modules grow, too.
        self._children = [part._modules.values() for part in self._parts]
        self._parameters = [part._parameters.values() for part in self._parts]
        self._buffers = [part._buffers.values() for part in self._parts]
        self._in_place = list(chain.from_iterable(self._children))
        self._hooks: list[Any] = [getattr(part, name) for part in self._parts for name in HOOKS]
        self._hooks += [vars(nn.modules.module)[name] for name in _GLOBAL_HOOKS]
        self._settings = Settings(self._parts)

    def _forwards(self, kinds: tuple[type, ...]) -> tuple[Any, ...]:
        """What stands as `forward` in all classes that the parts' inherit from: one may be patched after the class was made."""
        if kinds != self._kinds:
            self._kinds = kinds
            classes = dict.fromkeys(chain.from_iterable([kind.__mro__ for kind in dict.fromkeys(kinds)]))
            self._classes = [vars(one) for one in classes if issubclass(one, nn.Module) and one is not nn.Module]
        return tuple([one.get("forward") for one in self._classes])

    def left(self, before: Hashable) -> bool:
        """Whether an eager call changed nothing itself, as a replay would not; `before` is what there was. Tells of calls that all do."""
        if self(told=True) == before:
            self._changing = 0
            return True
        self._changing += 1
        if self._changing == 4:  # the first may set something up
            warnings.warn(
                f"detr-fast: four calls one behind the other changed {self._settings} themselves, which replays of a CUDA graph would not: such "
                "calls run eagerly. Results stay right, only slower. What a forward counts may lie in a buffer that is written in place.",
                RuntimeWarning,
                stacklevel=5,
            )
        return False

    def __call__(self, *, told: bool = False) -> int:
        """told: what is new to be no news; `left` tells of it."""
        host = native.host
        if host is not None and self._last is not None and self._are_objects_the_same(host):
            self._settings.stayed(told)
            return self._number
        found = self._found(told)
        if found not in self._known:
            if len(self._known) >= MAX_KNOWN:  # as of a model that lies elsewhere at each call
                self._known.clear()
            self._numbers += 1
            self._known[found] = self._numbers
        self._number = self._known[found]
        self._last = self._objects() if host is not None and found[-1] else None  # not of what lies nowhere
        return self._number

    def _are_objects_the_same(self, host: Any) -> bool:
        assert self._last is not None
        *lists, forwards = self._last
        try:
            return (
                host.untouched(*lists)
                and self._settings.lists_stayed()
                and self._forwards(self._kinds) == tuple(forwards)
            )
        except (TypeError, ValueError, RuntimeError):  # of a tensor that lies nowhere any more, or an array
            return False

    def _objects(self) -> tuple[list[Any], ...] | None:
        """For `host.untouched`: all that is looked at, as objects; and the classes' forwards. None where tensors have hooks, which it takes none to have."""
        held = [kept for part in self._parts for kept in (part._modules, part._parameters, part._buffers)]
        dicts = [*self._settings.states, *held, *self._hooks]
        entries = [list(chain.from_iterable(one.items())) for one in dicts]
        tensors = [one for one in chain(*self._parameters, *self._buffers) if one is not None]
        if any(one._backward_hooks or one._post_accumulate_grad_hooks for one in tensors):
            return None
        facts = [fact for one in tensors for fact in (one.data_ptr(), one.numel(), int(one.requires_grad))]
        return dicts, entries, self._parts, list(self._kinds), tensors, facts, list(self._forwards(self._kinds))

    def _found(self, told: bool) -> tuple[Any, ...]:
        """All that is looked at, by value."""
        found = list(chain.from_iterable(self._children))
        if len(found) != len(self._in_place) or not all(map(is_, found, self._in_place)):
            self._read()
        kinds, modes = tuple(map(type, self._parts)), tuple([part.training for part in self._parts])
        # By their numbers, which no two hooks of a process have.
        hooks = list(map(tuple, filter(None, self._hooks)))
        parameters = [one for one in chain.from_iterable(self._parameters) if one is not None]
        buffers = [one for one in chain.from_iterable(self._buffers) if one is not None]
        hooks += [tuple(held) for one in parameters if (held := one._backward_hooks)]
        hooks += [tuple(held) for one in parameters if (held := one._post_accumulate_grad_hooks)]
        trained = [one.requires_grad for one in parameters]
        try:
            lies = [(one.data_ptr(), one.numel()) for one in parameters + buffers]  # a slice lies where the whole lay
        except (ValueError, RuntimeError):  # lazy modules' lie nowhere until their first call, some subclasses' never
            lies = []
        number = self._settings(told)
        return self._readings, kinds, self._forwards(kinds), modes, number, tuple(hooks), tuple(trained), tuple(lies)


def held_by(optimizer: torch.optim.Optimizer) -> tuple[list[Any], list[tuple[tuple[str, str], ...]]]:
    """What of an optimizer a graph holds: its state and that of each parameter, which loading replaces and steps add to; its settings
    that are no tensors, its hooks, and which parameters it has.
    """
    hooks = [tuple(getattr(optimizer, name, ())) for name in _OPTIMIZER_HOOKS]
    settings = [
        tuple(
            (name, repr(value))
            for name, value in group.items()
            if name not in ("params", "lr", "capturable") and not isinstance(value, Tensor)
        )
        for group in optimizer.param_groups
    ]
    trained = tuple(("params", f"{id(group['params'])} {len(group['params'])}") for group in optimizer.param_groups)
    return [optimizer.state, *optimizer.state.values()], [(("hooks", repr(hooks)),), trained, *settings]
