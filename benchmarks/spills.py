"""What `attention_spills` and `layer_spills` share: cases of a kernel's features together, and compiling their programs into a file."""

from __future__ import annotations

import csv
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations, product
from pathlib import Path
from typing import Any

from detr_fast.kernels.attention_catalog import GENERATIONS
from detr_fast.kernels.launch import Variant
from detr_fast.kernels.offline import compile_variant

Case = dict[str, Any]  # the value of each feature
Options = dict[str, tuple[Any, ...]]  # the values that each feature may have


def cover(
    options: Options,
    dice: random.Random,
    is_reached: Callable[[Case], bool] = lambda case: True,
    pressure: Callable[[Case], int] = lambda case: 0,
    together: int = 2,
) -> Iterator[Case]:
    """Cases that hold every two values of two features (or so many, together) that a call may have, at least once.

    Of random ones those that cover most that is missing, and of these those under most pressure.
    """
    together = min(together, len(options))
    single = {name: [(name, value) for value in values] for name, values in options.items()}
    missing = {one for names in combinations(single, together) for one in product(*(single[name] for name in names))}
    in_vain = 0
    while missing and in_vain < 60:
        order = sorted(missing, key=repr)  # of a set it is another in each process
        drawn: list[Case] = []
        while len(drawn) < 60:
            case = {name: dice.choice(values) for name, values in options.items()}
            case |= dict(dice.choice(order)) if dice.random() < 0.7 else {}
            if is_reached(case):
                drawn.append(case)
        best = max(drawn, key=lambda one: (len(_covered(one, missing, together)), pressure(one)))
        found = _covered(best, missing, together)
        in_vain = 0 if found else in_vain + 1
        missing -= found
        if found:
            yield best


def _covered(case: Case, missing: set[Any], together: int) -> set[Any]:
    return missing.intersection(combinations(case.items(), together))


@dataclass(frozen=True)
class Kernels:
    """Kernels by name, for a generation of GPUs (see `launch.generation`).

    options: of a kernel's features. is_reached: whether a call may have these together. variant_of: their program. pressure: how
    likely registers are short. together: how many features of a kernel are covered together, where not two.
    """

    names: tuple[str, ...]
    options: Callable[[str, str], Options]
    is_reached: Callable[[str, Case], bool]
    variant_of: Callable[[str, Case, str], Variant]
    pressure: Callable[[Case], int]
    together: Mapping[str, int] = field(default_factory=dict)

    def programs(self, targets: list[str]) -> Iterator[tuple[str, str, Variant]]:
        """(name, target, variant), kernels and targets by turns."""
        sources = [(kernel, target, self._cases(kernel, target)) for kernel in self.names for target in targets]
        seen: set[tuple[Variant, str]] = set()
        while sources:
            for source in list(sources):
                kernel, target, cases = source
                case = next(cases, None)
                if case is None:
                    sources.remove(source)
                    continue
                variant = self.variant_of(kernel, case, GENERATIONS[target])
                if (variant, target) not in seen:
                    seen.add((variant, target))
                    features = " ".join(f"{name}={value}".replace("torch.", "") for name, value in case.items())
                    yield f"{kernel} {features}", target, variant

    def _cases(self, kernel: str, target: str) -> Iterator[Case]:
        generation = GENERATIONS[target]
        dice = random.Random(f"{kernel} {generation}")
        reached = partial(self.is_reached, kernel)
        return cover(self.options(kernel, generation), dice, reached, self.pressure, self.together.get(kernel, 2))


def main(kernels: Kernels, targets: str, file: str) -> None:
    """Compile the kernels' programs for the targets (`sm_80,sm_90`) that the file does not list yet, and list them there."""
    path = Path(file)
    known = {tuple(row[:2]) for row in csv.reader(path.open())} if path.exists() else set()
    with path.open("a", buffering=1) as lines, tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        for name, target, variant in kernels.programs(targets.split(",")):
            if (name, target) not in known:
                resources = compile_variant(variant, target)[2]
                csv.writer(lines).writerow((name, target, resources.registers, resources.spills))
                if resources.spills:
                    print(f"{target} {name}: {resources.spills} bytes a thread", flush=True)
            shutil.rmtree(cache, ignore_errors=True)
