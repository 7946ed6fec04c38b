"""What all adapters share: the interface, the reasons that hold for any module, and classes made on the fly."""

from __future__ import annotations

import ast
import dis
import hashlib
import inspect
import textwrap
from abc import ABC, ABCMeta, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

import torch
from torch.nn import Module
from torch.nn.utils import parametrize

from detr_fast.nn.bare import has_hooks, is_sharded
from detr_fast.nn.replacements import as_class

MARK = "_detr_fast_switched"  # in a switched module's __dict__


class Adapter(ABC):
    """How one library's modules are switched to ours and back. Adapters are classes without instances."""

    @classmethod
    @abstractmethod
    def consider(cls, module: Module) -> type[Module] | str | None:
        """The class that the module is switched to, the reason to leave it alone, or None: not this adapter's concern."""

    @classmethod
    def describe(cls, replacement: type[Module]) -> str:
        """What a switched module runs, for the report."""
        return public_name(replacement)

    @classmethod
    def switched(cls, module: Module) -> None:
        """What there is to do besides switching the class."""
        return None

    @classmethod
    def again(cls, module: Module) -> str | None:
        """The same for a module that was switched before and may have been set otherwise since; why it is to stay so."""
        return None

    @classmethod
    def restored(cls, module: Module) -> None:
        """The same, undone."""
        return None


@dataclass(frozen=True)
class Mark:
    """What a switched module carries, in copies and pickles too: how to switch it back."""

    original: type[Module]
    adapter: type[Adapter]


class Scriptable(Module):
    """Of what our classes are mixed into: TorchScript, which compiles no dispatcher, gets the class that there was before."""

    def __prepare_scriptable__(self) -> Module:
        mark = self.__dict__.get(MARK)
        return self if mark is None else as_class(self, mark.original)

    @classmethod
    def attributes_for(cls, original: type[Module]) -> dict[str, Any]:
        """What a class has that is joined with this one: what is found in the original's code, where no compiler traces."""
        return {}


def public_name(kind: type) -> str:
    """A class as its users call it: torch.nn.LayerNorm, transformers.DetrSelfAttention."""
    parts = kind.__module__.split(".")
    package = ".".join(parts[:2] if parts[0] in ("torch", "detr_fast") else parts[:1])
    return f"{package}.{kind.__name__}"


def kind_of(module: Module) -> type[Module]:
    """A module's class; where FSDP2 has put one of its own before it, the one behind."""
    kind = type(module)
    return kind.__mro__[2] if is_sharded(module) else kind


def why_class_is_taken(module: Module) -> str | None:
    """Why the module's class is not ours to switch: someone else has replaced it."""
    if any(base.__name__ == "FSDPModule" for base in type(module).__mro__):
        return "fully_shard (FSDP2) has replaced its class: accelerate the model before it is sharded"
    if parametrize.is_parametrized(module):
        names = ", ".join(module.parametrizations)  # type: ignore[union-attr,arg-type]
        return f"{names} is parametrised (torch.nn.utils.parametrize)"
    return None


def why_not_switch(module: Module) -> str | None:
    """A reason to leave a module alone whatever its class is."""
    if (reason := why_class_is_taken(module)) is not None:
        return reason
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    return None


def why_not_fuse(module: Module, expected: dict[str, tuple[type[Module], ...]]) -> str | None:
    """A reason why a module's children can't be computed other than by calling them.

    expected: the classes that a child may be of, exactly, by its name; a child that is absent or None does not count.
    """
    for name, classes in expected.items():
        child = module._modules.get(name)
        if child is None:
            continue
        if (reason := why_not_switch(child)) is not None:
            return f"{name}: {reason}"
        if type(child) not in classes:
            return (
                f"{name} is a {public_name(type(child))} where {public_name(classes[0])} is expected: "
                "wrapped (LoRA), quantised and custom parts are run as they are"
            )
        if has_hooks(child):
            return f"{name} has hooks, which must see its calls"
    return None


def overriding(module: Module, base: type[Module]) -> type[Module] | None:
    """The class between the module's and `base` that has a forward of its own."""
    for one in type(module).__mro__:
        if one is base:
            return None
        if "forward" in one.__dict__:
            return one
    return None


def why_not_bypass(module: Module, replacement: type[Module]) -> str | None:
    """A reason why the module's forward can't be replaced: a method that it calls, and its replacement's does not, is another than its class had."""
    kind = type(module)
    defining = next((i for i, one in enumerate(kind.__mro__) if "forward" in vars(one)), 0)
    called_still = _names_within(replacement.forward)
    seen: set[str] = set()
    waiting = [kind.forward] if replacement.forward is not kind.forward else []
    while waiting:
        for name in sorted(_names_within(waiting.pop()) - called_still - seen):
            seen.add(name)
            place = next((i for i, one in enumerate(kind.__mro__) if name in vars(one)), None)
            if place is None or (owner := kind.__mro__[place]) is Module:
                continue
            method = inspect.unwrap(getattr(vars(owner)[name], "__func__", vars(owner)[name]))
            if not inspect.isfunction(method):
                continue
            if name in module.__dict__:
                return f"its {name} was replaced on the instance, and its forward calls it"
            if place < defining or method.__module__ != owner.__module__:
                return f"{name} of {owner.__name__} is another than the forward of {kind.__mro__[defining].__name__} was written for"
            waiting.append(method)
    return None


def _names_within(function: Any) -> frozenset[str]:
    """What `names_used` gives, functions inside of the function included; nothing where there is no code."""
    found: set[str] = set()
    waiting = [getattr(inspect.unwrap(function), "__code__", None)]
    while waiting:
        if isinstance(code := waiting.pop(), CodeType):
            found.update(code.co_names)
            waiting += code.co_consts
    return frozenset(found)


def names_used(function: Any) -> frozenset[str]:
    """The globals and attributes that a function's code reads: whether it is still the function that we know."""
    return frozenset(inspect.unwrap(function).__code__.co_names)


def names(text: str) -> frozenset[str]:
    """The same, written down."""
    return frozenset(text.split())


def times_read(function: Any) -> Counter[str]:
    """How often a function's code reads each global and attribute: a step more of the same kind is another function."""
    steps = dis.get_instructions(inspect.unwrap(function))
    return Counter(s.argval for s in steps if s.opname in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_GLOBAL"))


def reads(function: Any) -> tuple[str, str]:
    """A function's arguments, and what its code reads in the order of first use: one known by both is the one we know."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    if code is None:
        return "", ""
    return " ".join(code.co_varnames[: code.co_argcount]), " ".join(code.co_names)


def fingerprint(function: Any) -> str | None:
    """A digest of what a function's code says, whatever its annotations, docstring, comments and name; None where there is no source.

    It is the same on Python 3.10 to 3.13.
    """
    try:
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function)))).body
    except (OSError, TypeError, ValueError, SyntaxError):  # no source, or more on its lines than the function
        return None
    if not isinstance(definition, ast.FunctionDef):
        return None
    body = definition.body[ast.get_docstring(definition) is not None :]
    return hashlib.sha256(repr(_said([definition.args, *body])).encode()).hexdigest()[:16]


_UNSAID = ("annotation", "type_comment", "ctx", "kind")


def _said(node: Any) -> Any:
    if isinstance(node, list):
        return [_said(one) for one in node]
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = ((name, value) for name, value in ast.iter_fields(node) if name not in _UNSAID and value not in (None, []))
    return [type(node).__name__, *((name, _said(value)) for name, value in fields)]


class Following:
    """A function's own code, `copy`, which finds others under some names of its module: `places`, by what stands there for each.

    Under all other names it finds what its module has: `look`, before a call, takes up what was patched there since, of the replaced
    names, too, and of what the functions call that were found under those. Of Llama's attention that takes 0.4 µs.
    """

    def __init__(self, function: Any, place_of: Callable[[Any], Any], names: Iterable[str]) -> None:
        self._theirs, self._place_of, self._replaced = function.__globals__, place_of, frozenset(names)
        found = {**self._theirs}
        # By the module's name torch.compile of 2.11 would look up globals there, and find theirs.
        del found["__name__"]
        self._found = found
        self._held = {name: found[name] for name in sorted(_names_within(function)) if name in found}
        self._within: dict[
            str, tuple[dict[str, Any], dict[str, Any]]
        ] = {}  # of replaced names, what the function there reads
        for name in self._replaced:
            self._take(name)
        self.copy = FunctionType(
            function.__code__, found, function.__name__, function.__defaults__, function.__closure__
        )
        self.copy.__kwdefaults__ = function.__kwdefaults__

    def look(self) -> None:
        theirs = self._theirs
        for name, held in self._held.items():
            if theirs.get(name) is not held:
                self._take(name)
        for name, (there, read) in self._within.items():
            for one, held in read.items():
                if there.get(one) is not held:
                    self._take(name)
                    break

    @property
    def whole(self) -> bool:
        """Whether something took the place of all that was to be replaced when last looked."""
        return all(self._found[name] is not self._held[name] for name in self._replaced)

    def _take(self, name: str) -> None:
        held = self._held[name] = self._theirs.get(name)
        place = self._place_of(held) if name in self._replaced else None
        self._found[name] = held if place is None else place
        if name in self._replaced and isinstance(held, FunctionType):
            there = held.__globals__
            self._within[name] = there, {one: there[one] for one in _names_within(held) if one in there}


class Followed(Scriptable):
    """A module that runs its class's own code, which finds other functions (see `Following`); a forward that the class gets later is called."""

    _detr_fast_followed: Following
    _detr_fast_forward: Callable[..., Any]
    _detr_fast_original: tuple[type[Module], Any]  # and its forward, whose code that is

    @classmethod
    def as_attributes(cls, original: type[Module], followed: Following) -> dict[str, Any]:
        return {
            "_detr_fast_followed": followed,
            "_detr_fast_forward": followed.copy,
            "_detr_fast_original": (original, original.forward),
        }

    def _detr_fast_patched(self) -> Callable[..., Any] | None:
        original, forward = self._detr_fast_original
        return None if original.forward is forward else original.forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            if (patched := self._detr_fast_patched()) is not None:
                return patched(self, *args, **kwargs)
            self._detr_fast_followed.look()
        return self._detr_fast_forward(*args, **kwargs)


class _Unannounced:
    """Before classes whose __init_subclass__ is to hear of classes that users define, as registries do, not of ours."""

    def __init_subclass__(cls) -> None:
        return None


_JOINED: dict[tuple[type[Module], ...], type[Module]] = {}


def joined(first: type[Module], second: type[Module], original: type[Module]) -> type[Module]:
    """A class that is both, called as `original` is.

    Its instances are pickled by the two classes it is made of, or by the original's own `__reduce__`. A metaclass does not hear of it.
    """

    def reduce(self: Any, protocol: Any) -> Any:
        return (_instance, (first, second, original), *object.__reduce_ex__(self, 2)[2:])

    made = _JOINED.get((first, second, original))
    if made is None:
        body: dict[str, Any] = {"__module__": original.__module__, "__qualname__": original.__qualname__}
        if issubclass(first, Scriptable):
            body |= first.attributes_for(original)
        if original.__reduce__ is object.__reduce__ and original.__reduce_ex__ is object.__reduce_ex__:
            body["__reduce_ex__"] = reduce
        kinds = type(first), type(second)
        kind = kinds[0] if issubclass(kinds[0], kinds[1]) else kinds[1]
        # Past what a user's metaclass does with new classes: register them, or ask for arguments.
        make = ABCMeta.__new__ if issubclass(kind, ABCMeta) else type.__new__
        made = _JOINED[first, second, original] = make(kind, original.__name__, (_Unannounced, first, second), body)
    return made


def _instance(first: type[Module], second: type[Module], original: type[Module]) -> Module:
    made = joined(first, second, original)
    return made.__new__(made)


def joined_of(made: type[Module]) -> type[Module]:
    """The first of the two classes that `joined` was given."""
    return made.__mro__[2]
