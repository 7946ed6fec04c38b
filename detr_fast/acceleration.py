"""`accelerate(model)`: switch the modules of an existing model to ours, in place; `restore(model)`: and back.

Only classes are switched: parameters, buffers, hooks, optimizers, wrappers and references stay what they are. What was
switched carries a mark with its original class, which copies and pickles keep.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch.nn import Module

from detr_fast.adapters import adapters_for
from detr_fast.adapters.base import MARK, Adapter, Mark, public_name, why_class_is_taken, why_not_bypass
from detr_fast.explanation import Explanation, explain

PACKS = "_detr_fast_packs"  # marks modules that `accelerate` told to pack

Selection = str | type[Module] | Iterable[str | type[Module]] | None


@dataclass(frozen=True)
class Switched:
    """One module whose class was switched: its name in the model, its original class, what it is now."""

    name: str
    original: str
    now: str


@dataclass(frozen=True)
class Left:
    """One module that was left alone, and why."""

    name: str
    kind: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name or '(the model)'} ({self.kind}): {self.reason}"


@dataclass(repr=False)
class Report:
    """What `accelerate` or `restore` did; prints as a summary, and shows as one in a notebook.

    switched: the modules whose class was switched. left: those left alone, with the reason. already: how many were
    switched before. own: how many were built from detr_fast.nn. explanation: what runs on which implementation, where example inputs were given.
    """

    model: str
    action: str = "switched"
    switched: list[Switched] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)
    already: int = 0
    own: int = 0
    explanation: Explanation | None = None

    def __str__(self) -> str:
        before = f", {self.already} were before" if self.already else ""
        lines = [f"{self.model}: {len(self.switched)} modules {self.action}{before}, {len(self.left)} left alone"]
        nothing = not self.switched and not self.left and not self.already and self.action == "switched"
        if nothing and self.own:
            lines.append(
                f"  {self.own} are of detr_fast.nn, which needs no switching; nothing else that is known was found, or selected"
            )
        elif nothing:
            lines.append(
                "  nothing that is known was found, or selected: torch.nn's transformer parts, and the layers of the libraries in docs/accelerate.md; "
                "build yours from detr_fast.nn"
            )
        kinds = Counter((one.original, one.now) for one in self.switched)
        lines += [f"  {count} × {original} -> {now}" for (original, now), count in kinds.items()]
        reasons: dict[tuple[str, str], list[str]] = {}
        for one in self.left:
            reasons.setdefault((one.kind, one.reason), []).append(one.name or "(the model)")
        for (kind, reason), names in reasons.items():
            others = f" and {len(names) - 1} more" if len(names) > 1 else ""
            lines.append(f"  left alone: {names[0]}{others} ({kind}): {reason}")
        if self.explanation is not None:
            lines.append(str(self.explanation))
        return "\n".join(lines)

    __repr__ = __str__

    def as_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        explained = None if self.explanation is None else self.explanation.as_dicts()
        modules = {name: [vars(one) for one in getattr(self, name)] for name in ("switched", "left")}
        return {
            "model": self.model,
            "action": self.action,
            **modules,
            "already": self.already,
            "own": self.own,
            "explanation": explained,
        }


def accelerate(
    model: Module,
    *,
    only: Selection = None,
    skip: Selection = None,
    packed: bool = False,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
) -> Report:
    """Switch the class of each module that we can run faster, in place, and say what was switched and what not.

    Known are torch.nn's LayerNorm, RMSNorm, MultiheadAttention and Transformer classes, Hugging Face transformers' attention, deformable too,
    layers, feed-forward blocks, RMSNorms and detection losses, the original DETR repository's layers, Deformable DETR's MSDeformAttn, and the attention, blocks, feed-forward blocks and norms
    of timm's and torchvision's vision transformers. The model computes what it did, within rounding; parameters, buffers,
    hooks, optimizers, wrappers such as DDP and references to modules stay valid.
    Modules whose forward is someone else's, that are parametrised, quantised, or sharded by FSDP2, and layers with
    wrapped (LoRA) or hooked parts are left alone. Calling it again switches what is new.

    only, skip: which modules, as names or glob patterns ("encoder", "*.norm1", each with all below it) or classes.
    packed: a detector of ours (`detr_fast.models.Detr`) also skips padding, where it gets its images as a list or a
    NestedTensor with their sizes; the report says so where no module can.
    example_inputs: positional (a sequence) or keyword (a mapping) arguments of one call, for the report's explanation.

    Raises TypeError for a model that is no torch.nn.Module, ValueError where a pattern or class matches nothing, and what the
    model raises for the example inputs; the model is then as it was.
    """
    _check(model)
    wanted = _selected(model, only, "only", everything=True)
    skipped = _selected(model, skip, "skip", everything=False)
    before = _marks(model)
    report = Report(type(model).__name__)
    try:
        adapters, missing = adapters_for(model)
        report.left += [Left("", package, reason) for package, reason in missing.items()]
        for name, module in model.named_modules():
            chosen = module in wanted and module not in skipped
            if MARK in module.__dict__:
                reason = module.__dict__[MARK].adapter.again(module) if chosen else None
                if reason is None:
                    report.already += 1
                else:
                    report.left.append(Left(name, public_name(type(module)), reason))
            elif chosen:
                report.own += type(module).__module__.startswith("detr_fast.nn.")
                _consider(name, module, adapters, report)
        if packed:
            _pack(model, wanted - skipped, report)
        if example_inputs is not None:
            report.explanation = _explained(model, example_inputs)
    except BaseException:
        _return_to(before, model)
        raise
    return report


def restore(model: Module) -> Report:
    """Undo `accelerate`: every module that it switched has its original class again. Modules built from `detr_fast.nn` stay.

    A module that someone else has changed since, its class or its forward on the instance, is left as it is, with that reason.

    Raises TypeError for a model that is no torch.nn.Module.
    """
    _check(model)
    report = Report(type(model).__name__, "restored")
    for name, module in model.named_modules():
        if MARK in module.__dict__:
            _restore(name, module, report)
        if PACKS in module.__dict__:
            _unpack(name, module, report)
    return report


@contextmanager
def accelerated(model: Module, **options: Any) -> Iterator[Report]:
    """`accelerate(model, **options)` while the block runs; what the block began with is there again afterwards."""
    _check(model)
    before = _marks(model)
    try:
        yield accelerate(model, **options)
    finally:
        _return_to(before, model)


def _marks(model: Module) -> set[tuple[Module, str]]:
    """What `accelerate` has changed so far: modules and which mark they carry."""
    return {(module, mark) for module in model.modules() for mark in (MARK, PACKS) if mark in module.__dict__}


def _return_to(before: set[tuple[Module, str]], model: Module) -> None:
    """Undo what was changed since."""
    for module, mark in _marks(model) - before:
        undo = _restore if mark == MARK else _unpack
        undo("", module, Report(type(model).__name__))
    for module, mark in before:  # modules may share what an adapter has just put back, as a configuration
        if mark == MARK and MARK in module.__dict__:
            module.__dict__[MARK].adapter.switched(module)


def _consider(name: str, module: Module, adapters: Sequence[type[Adapter]], report: Report) -> None:
    for adapter in adapters:
        answer = adapter.consider(module)
        if answer is None:
            continue
        kind = type(module)
        if not isinstance(answer, str) and (reason := why_not_bypass(module, answer)) is not None:
            answer = reason
        if isinstance(answer, str):
            report.left.append(Left(name, public_name(kind), answer))
        else:
            module.__dict__[MARK] = Mark(kind, adapter)  # first: a signal in between leaves what can be restored
            module.__class__ = answer
            adapter.switched(module)
            report.switched.append(Switched(name, public_name(kind), adapter.describe(answer)))
        return


def _restore(name: str, module: Module, report: Report) -> None:
    mark: Mark = module.__dict__[MARK]
    now = public_name(type(module))
    reason = why_class_is_taken(module)
    if reason is None and "forward" in module.__dict__ and type(module) is not mark.original:
        reason = "its forward was replaced on the instance since, and may call ours: undo that, then restore again"
    if reason is not None:
        report.left.append(Left(name, now, reason))
        return
    module.__class__ = mark.original
    del module.__dict__[MARK]
    mark.adapter.restored(module)
    report.switched.append(Switched(name, now, public_name(mark.original)))


def _pack(model: Module, chosen: set[Module], report: Report) -> None:
    from detr_fast.models.detr import Detr  # not needed otherwise

    able = [(name, m) for name, m in model.named_modules() if m in chosen and isinstance(m, Detr)]
    if not able:
        reason = "packed=True needs images' sizes on the host, which only detr_fast.models.Detr takes"
        report.left.append(Left("", public_name(type(model)), reason))
    for name, module in able:
        if not module.packed:
            module.packed = True
            module.__dict__[PACKS] = True
            report.switched.append(Switched(name, "padded tokens", "packed tokens"))


def _unpack(name: str, module: Module, report: Report) -> None:
    del module.__dict__[PACKS]
    module.packed = False  # type: ignore[assignment]
    report.switched.append(Switched(name, "packed tokens", "padded tokens"))


def _explained(model: Module, example_inputs: Sequence[Any] | Mapping[str, Any]) -> Explanation:
    if isinstance(example_inputs, Mapping):
        return explain(model, quiet=True, **example_inputs)
    if not isinstance(example_inputs, (list, tuple)):
        raise TypeError(
            "example_inputs must be a tuple of positional or a dict of keyword arguments; got "
            f"{type(example_inputs).__name__}. Write example_inputs=(x,) for one argument."
        )
    return explain(model, *example_inputs, quiet=True)


def _selected(model: Module, selection: Selection, argument: str, *, everything: bool) -> set[Module]:
    """The modules that a selection means, by any of their names, each with all below it."""
    if selection is None:
        return set(model.modules()) if everything else set()
    one = isinstance(selection, (str, type)) or not isinstance(selection, Iterable)
    parts: list[Any] = [selection] if one else list(selection)  # type: ignore[arg-type]
    names = list(model.named_modules(remove_duplicate=False))
    found: set[Module] = set()
    for part in parts:
        roots = [module for name, module in names if _matches(part, name, module, argument)]
        if not roots:
            what = repr(part) if isinstance(part, str) else part.__name__
            raise ValueError(
                f"{argument}: {what} matches none of the model's modules; names are as in model.named_modules(), "
                "with * and ? as wildcards"
            )
        for root in roots:
            if root not in found:
                found.update(root.modules())
    return found


def _matches(part: Any, name: str, module: Module, argument: str) -> bool:
    if isinstance(part, str):
        return fnmatchcase(name, part)
    if isinstance(part, type):
        return isinstance(module, part)
    raise TypeError(f"{argument} takes names, glob patterns and classes; got {part!r}")


def _check(model: Any) -> None:
    if not isinstance(model, Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
