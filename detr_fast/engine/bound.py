"""What of a model and its optimizer a captured graph is bound to, besides the shapes of what it is called with."""

from __future__ import annotations

import warnings
from collections.abc import Hashable
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from detr_fast.nn.bare import HOOKS

# Of all modules of the process, as profilers register them.
_GLOBAL_HOOKS = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
)
_OFTEN_ZERO = ("p", "dropout", "drop_prob")  # the integer, where there is none
_NUMBERS = (int, float, type(None))  # and no lists, one for each layer: these have no hash
MAX_KNOWN = 64  # settings of earlier calls
_OPTIMIZER_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")


class Bound:
    """Called, it gives something else where a graph of the model may no longer compute what a call of the model would.

    Looked at are the classes of all parts and those classes' forwards, modes and fractional settings (a dropout's `p`, say), forwards of their own, which part is in
    which place, hooks on parts and on parameters, which parameters are trained, and where parameters and buffers lie.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._readings = 0
        self._kinds: tuple[type, ...] = ()
        self._read()
        self._last: tuple[Any, ...] = ()
        self._known: set[tuple[Any, ...]] = set()
        self._news = 0

    def _read(self) -> None:
        """Look where everything is kept, once for each set of parts."""
        self._readings += 1
        self._parts = list(self._model.modules())
        self._children = [part._modules for part in self._parts]  # empty lists of modules grow, too
        self._states = [vars(part) for part in self._parts]
        self._in_place = self._found_in_place()
        self._hooks: list[Any] = [getattr(part, name) for part in self._parts for name in HOOKS]
        self._hooks += [vars(nn.modules.module)[name] for name in _GLOBAL_HOOKS]
        self._parameters = [part._parameters for part in self._parts]
        self._buffers = [part._buffers for part in self._parts]
        self._read_settings()

    def _read_settings(self) -> None:
        self._sizes = list(map(len, self._states))  # a setting of a class may become one of a part
        self._settings = [
            (state, name)
            for state in self._states
            for name, value in state.items()
            if type(value) is float or (name in _OFTEN_ZERO and isinstance(value, _NUMBERS))
        ]

    def _found_in_place(self) -> list[Any]:
        found: list[Any] = list(chain.from_iterable([children.values() for children in self._children]))
        return found + [state.get("forward") for state in self._states]

    def _forwards(self, kinds: tuple[type, ...]) -> tuple[Any, ...]:
        """What stands as `forward` in all classes that the parts' inherit from: one may be patched after the class was made."""
        if kinds != self._kinds:
            self._kinds = kinds
            classes = dict.fromkeys(chain.from_iterable([kind.__mro__ for kind in dict.fromkeys(kinds)]))
            self._classes = [vars(one) for one in classes if issubclass(one, nn.Module) and one is not nn.Module]
        return tuple([one.get("forward") for one in self._classes])

    def __call__(self) -> Hashable:
        found = self._found_in_place()
        if len(found) != len(self._in_place) or not all(map(is_, found, self._in_place)):
            self._read()
        kinds, modes = tuple(map(type, self._parts)), tuple([part.training for part in self._parts])
        if list(map(len, self._states)) != self._sizes:
            self._read_settings()
        settings = tuple([state.get(name) for state, name in self._settings])
        self._look_for_changes(settings)
        # By their numbers, which no two hooks of a process have.
        hooks = list(map(tuple, filter(None, self._hooks)))
        trained = []
        lies = []
        try:
            for parameter in chain.from_iterable([kept.values() for kept in self._parameters]):
                if parameter is not None:
                    lies.append(parameter.data_ptr())
                    trained.append(parameter.requires_grad)
                    if parameter._backward_hooks:
                        hooks.append(tuple(parameter._backward_hooks))
                    if parameter._post_accumulate_grad_hooks:
                        hooks.append(tuple(parameter._post_accumulate_grad_hooks))
            buffers = chain.from_iterable([kept.values() for kept in self._buffers])
            lies += [buffer.data_ptr() for buffer in buffers if buffer is not None]
        except (ValueError, RuntimeError):  # lazy modules' lie nowhere until their first call, some subclasses' never
            lies = []
        return self._readings, kinds, self._forwards(kinds), modes, settings, tuple(hooks), tuple(trained), tuple(lies)

    def _look_for_changes(self, settings: tuple[Any, ...]) -> None:
        """Tell of settings that are new at each call."""
        last, self._last = self._last, settings
        try:
            self._news = 0 if settings == last or settings in self._known else self._news + 1
        except (TypeError, ValueError, RuntimeError):  # no numbers any more
            self._news = 0
        if not self._news:
            return
        if len(self._known) >= MAX_KNOWN:
            self._known.clear()
        self._known.add(settings)
        if self._news != 5:  # the first ones, and four that differ from all before
            return
        changed = {
            f"{type(part).__name__}.{name}"
            for was, now, (state, name) in zip(last, settings, self._settings)
            for part in self._parts
            if was != now and vars(part) is state
        }
        warnings.warn(
            f"detr-fast: {' and '.join(sorted(changed)) or 'settings of the model'} changed in four calls one behind the other, and a CUDA graph holds "
            "such settings: these calls run eagerly. Results stay right, only slower. A buffer that is written in place may change in a graph.",
            RuntimeWarning,
            stacklevel=6,
        )


def held_by(optimizer: torch.optim.Optimizer) -> tuple[list[Any], list[tuple[tuple[str, str], ...]]]:
    """What of an optimizer a graph holds: its state and that of each parameter, which loading replaces and steps add to; its settings
    that are no tensors, and its hooks.
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
    return [optimizer.state, *optimizer.state.values()], [(("hooks", repr(hooks)),), *settings]
