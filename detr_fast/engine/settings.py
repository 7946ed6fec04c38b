"""What modules hold besides parts, parameters and buffers, as numbers: a captured graph holds it, and sees no change."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Sequence
from enum import Enum
from operator import itemgetter
from typing import Any

import torch
from torch import nn

_PLAIN = (int, float, complex, str, type(None), Enum, torch.dtype, torch.device)
_OF_ALL_MODULES = frozenset(vars(nn.Module()))  # `Bound` looks at these by themselves
_HELD = ("forward", "config")  # are looked for by identity
MAX_KNOWN = 64  # settings of earlier calls


class Settings:
    """Called, it gives a number: another one where a setting is another, and the same for settings that came before.

    Settings are all that the modules, and the `config`s in them, hold under names of their own: numbers, strings, None, enumerations,
    dtypes, devices, and tuples, lists and dictionaries of such by value; forwards by identity; all else, say tensors, by its class alone. `str()` names what changed last.
    """

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        self._parts = parts
        self._known: dict[Hashable, int] = {}
        self._number = self._numbers = 0
        self._held: list[tuple[dict[str, Any], str, Any]] = []
        self._replaced = 0
        self._new = 0  # in as many calls one behind the other
        self._now: dict[tuple[int, str], Any] = {}
        self._changed: set[str] = set()
        self._look()

    def __str__(self) -> str:
        return " and ".join(sorted(self._changed)) or "settings of the model"

    def __call__(self, told: bool = False) -> int:
        """told: something new is not to count as such."""
        if not self._are_as_before():
            self._look(told)
        elif not told:
            self._new = 0
        return self._number

    def stayed(self, told: bool) -> None:
        """All objects in `states` are those of the last call, and `lists_stayed`."""
        if not told:
            self._new = 0

    def lists_stayed(self) -> bool:
        """Whether lists and dictionaries, which may be written in place, hold what they held."""
        return all(now == before for now, before in self._lists)

    def _are_as_before(self) -> bool:
        if list(map(len, self.states)) != self._sizes:
            return False
        try:
            # Compared by identity first, in C: what is still the same object costs a few nanoseconds.
            return (
                [take(state) for take, state in self._take] == self._values
                and [type(state[name]) for state, name in self._others] == self._kinds
                and all(state[name] is one for state, name, one in self._held)
            )
        except (KeyError, TypeError, ValueError, RuntimeError):  # of what is gone, or is an array now
            return False

    def _look(self, told: bool = True) -> None:
        """Find all settings, and the number of what they are."""
        states = list(map(vars, self._parts))
        held = [(state, name, state[name]) for state in states for name in _HELD if name in state]
        same = len(held) == len(self._held) and all(one is other for (*_, one), (*_, other) in zip(held, self._held))
        self._replaced += not same
        self._held = held
        configs = {id(one): one for _, name, one in held if name == "config" and hasattr(one, "__dict__")}
        owners = [*self._parts, *configs.values()]
        self.states = list(map(vars, owners))
        self._sizes = list(map(len, self.states))
        self._take, self._values, self._others, self._lists = [], [], [], []
        now: dict[tuple[int, str], Any] = {}
        for place, state in enumerate(self.states):
            own = [name for name in state if name not in _OF_ALL_MODULES]
            if plain := [name for name in own if _is_plain(state[name])]:
                self._take.append((itemgetter(*plain), state))
                self._values.append(_copied(self._take[-1][0](state)))
            self._lists += [(state[name], _copied(state[name])) for name in plain if _holds_a_list(state[name])]
            self._others += [(state, name) for name in own if name not in plain]
            now |= {(place, name): _hashable(state[name]) if name in plain else type(state[name]) for name in own}
        self._kinds = [type(state[name]) for state, name in self._others]
        before, self._now = self._now, now
        differing = {key for key in {*before, *now} if key not in before or key not in now or before[key] != now[key]}
        self._changed = {f"{type(owners[place]).__name__}.{name}" for place, name in differing if place < len(owners)}
        self._find_number((self._replaced, *now.items()), told)

    def _find_number(self, key: Hashable, told: bool) -> None:
        """Tell of settings that are new at each call."""
        if key in self._known:
            self._number = self._known[key]
            self._new *= told
            return
        if len(self._known) >= MAX_KNOWN:
            self._known.clear()
        self._numbers = self._known[key] = self._number = self._numbers + 1
        self._new += not told
        if self._new == 4 and not told:
            warnings.warn(
                f"detr-fast: {self} changed in four calls one behind the other, and a CUDA graph holds such settings: these calls run eagerly. "
                "Results stay right, only slower. A buffer that is written in place may change in a graph.",
                RuntimeWarning,
                stacklevel=8,
            )


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):  # of a criterion's weights, say; an empty one may be to hold tensors
        return bool(value) and all(map(_is_plain, value)) and all(map(_is_plain, value.values()))
    return isinstance(value, _PLAIN) or (isinstance(value, (tuple, list)) and all(map(_is_plain, value)))


def _holds_a_list(value: Any) -> bool:
    return isinstance(value, (list, dict)) or (isinstance(value, tuple) and any(map(_holds_a_list, value)))


def _copied(value: Any) -> Any:
    """The same, but for lists and dictionaries, which may be written in place."""
    if isinstance(value, list):
        return [_copied(one) for one in value]
    if isinstance(value, dict):
        return {name: _copied(one) for name, one in value.items()}
    return tuple(map(_copied, value)) if type(value) is tuple else value


def _hashable(value: Any) -> Hashable:
    if isinstance(value, dict):
        return tuple((name, _hashable(one)) for name, one in value.items())
    return tuple(map(_hashable, value)) if isinstance(value, (tuple, list)) else value
