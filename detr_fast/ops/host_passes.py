"""What is made of recorded instructions before they run: nothing that nobody reads, few allocations, few views, addresses.

Instructions work on registers, places of a list. Each register is written by one instruction, and in place by others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from detr_fast.kernels.launch import Program

ALIGNMENT = 256  # bytes: at least what kernels were compiled for
Addresses = dict[
    tuple[int, int], int
]  # registers of addresses: of so many bytes behind the start of a register's memory


class Instruction(NamedTuple):
    """results: registers that what `call` returns goes to. holds: registers whose memory it reads or writes by address.

    program: the compiled kernel that it launches.
    """

    call: Callable[..., Any]
    arguments: tuple[int, ...]
    results: tuple[int, ...] = ()
    several: bool = False  # it returns a tuple
    view: bool = False
    empty: bool = False  # what it returns holds nothing yet
    allocation: tuple[tuple[int, ...], torch.dtype] | None = None  # the shape and dtype of memory that kernels write
    holds: tuple[int, ...] = ()
    program: Program | None = None

    @property
    def reads(self) -> tuple[int, ...]:
        return self.arguments + self.holds

    @property
    def pure(self) -> bool:
        """Whether it is not needed where its results are not."""
        return self.view or self.empty or self.allocation is not None


def read(instructions: Sequence[Instruction], more: Iterable[int] = ()) -> set[int]:
    return {r for one in instructions for r in one.reads} | set(more)


def taken_again(views: dict[int, Instruction], wanted: set[int]) -> list[Instruction]:
    """Views of the forward's, taken once more for the backward: what is kept is what they are views of."""
    needed: list[Instruction] = []
    for one in reversed(list(dict.fromkeys(views.values()))):
        if not wanted.isdisjoint(one.results):
            needed.append(one)
            wanted |= set(one.reads)
    return needed[::-1]


def needed(instructions: Sequence[Instruction], wanted: set[int]) -> list[Instruction]:
    """Without allocations and views that nothing reads."""
    live, kept = set(wanted), []
    for one in reversed(instructions):
        if one.pure and live.isdisjoint(one.results):
            continue
        kept.append(one)
        live |= set(one.reads)
    return kept[::-1]


def without_views(sections: Sequence[list[Instruction]], constants: list[Any], fixed: set[int]) -> dict[int, int]:
    """Allocate in the shape in which memory is seen later; which registers are then others. fixed: whose shapes must stay."""
    every = [one for section in sections for one in section]
    readers: dict[int, list[Instruction]] = {}
    for one in every:
        for register in one.arguments:
            readers.setdefault(register, []).append(one)
    same: dict[int, int] = {}
    shapes: dict[int, tuple[int, ...]] = {}
    for one in every:
        seen = [] if one.allocation is None or one.results[0] in fixed else readers.get(one.results[0], [])
        wanted = {constants[r.arguments[1]] if r.call is Tensor.view else None for r in seen}
        if len(wanted) == 1 and (shape := wanted.pop()) is not None:
            shapes[one.results[0]] = shape
            same |= {r.results[0]: one.results[0] for r in seen}
    for section in sections:
        kept = []
        for one in section:
            if one.results and one.results[0] in same and one.view:
                continue
            if one.results and one.allocation is not None and (shape := shapes.get(one.results[0])) is not None:
                call = partial(one.call.func, shape, **one.call.keywords)  # type: ignore[attr-defined]
                one = one._replace(call=call, allocation=(shape, one.allocation[1]))
            arguments, holds, results = (
                tuple(same.get(r, r) for r in rs) for rs in (one.arguments, one.holds, one.results)
            )
            kept.append(one._replace(arguments=arguments, holds=holds, results=results))
        section[:] = kept
    return same


def in_one_piece(
    section: list[Instruction],
    sections: Sequence[list[Instruction]],
    registers: set[int],
    new: int,
    addresses: Addresses,
) -> bool:
    """Allocate those `registers` of a section as register `new`, once; only launches use them. False for fewer than two."""
    allocations = [one for one in section if one.allocation is not None and one.results[0] in registers]
    if len(allocations) < 2:
        return False
    places, total = {}, 0
    for one in allocations:
        assert one.allocation is not None
        shape, dtype = one.allocation
        places[one.results[0]] = total
        total += -(-prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
    for (register, distance), address in list(addresses.items()):
        if register in places:
            del addresses[register, distance]
            addresses[new, places[register] + distance] = address
    first = allocations[0].call
    call = partial(first.func, (total,), dtype=torch.uint8, device=first.keywords["device"])  # type: ignore[attr-defined]
    piece = Instruction(call, (), (new,), allocation=((total,), torch.uint8))
    for instructions in sections:
        instructions[:] = [
            one._replace(holds=tuple(dict.fromkeys(new if r in places else r for r in one.holds)))
            for one in instructions
            if one not in allocations
        ]
    section.insert(0, piece)
    return True


def _addresses(distances: tuple[int, ...], tensor: Tensor) -> list[int]:
    start = tensor.data_ptr()
    return [start + distance for distance in distances]


def addressed(instructions: Sequence[Instruction], addresses: Addresses) -> list[Instruction]:
    """With what takes the addresses that the instructions use, behind what makes the memory, or in front of all."""
    used = {r for one in instructions for r in one.arguments}
    wanted: dict[int, list[tuple[int, int]]] = {}
    for (register, distance), address in addresses.items():
        if address in used:
            wanted.setdefault(register, []).append((distance, address))
    taking = {}
    for register, pairs in wanted.items():
        distances, results = zip(*pairs)
        call: Any = Tensor.data_ptr if distances == (0,) else partial(_addresses, distances)
        taking[register] = Instruction(call, (register,), results, distances != (0,))
    made = {r for one in instructions for r in one.results}
    found = [taking.pop(register) for register in list(taking) if register not in made]
    for one in instructions:
        found.append(one)
        found += [taking.pop(register) for register in one.results if register in taking]
    return found


def compiled(
    instructions: Sequence[Instruction], constants: Sequence[Any], given: Sequence[int], wanted: Sequence[int | None]
) -> Callable[..., tuple[Any, ...]]:
    """A Python function that takes the registers `given`, follows the instructions and returns the registers `wanted`.

    Registers become its local variables: a loop over instructions would take the host as long again as what they call.
    """
    last = {r: index for index, one in enumerate(instructions) for r in (*one.reads, *one.results)}
    made = {r for one in instructions for r in one.results}
    variables = made | set(given)
    scope: dict[str, Any] = {}

    def operand(register: int | None) -> str:
        if register is None or register in variables:
            return "None" if register is None else f"r{register}"
        value = constants[register]
        if value is None or type(value) in (int, bool):
            return repr(value)
        scope[f"c{register}"] = value
        return f"c{register}"

    lines = [f"def program({', '.join(map(operand, given))}):"]
    for index, one in enumerate(instructions):
        arguments = ", ".join(map(operand, one.arguments))
        targets = "".join(f"r{r}, " for r in one.results) if one.several else "".join(f"r{r}" for r in one.results)
        scope[f"f{index}"] = one.call
        call = f"{arguments}.data_ptr()" if one.call is Tensor.data_ptr else f"f{index}({arguments})"
        lines.append(f"{targets} = {call}" if targets else call)
        dead = [r for r in {*one.reads, *one.results} if last[r] == index and r in made and r not in wanted]
        lines += [f"r{r} = None" for r in dead]
    lines.append(f"return ({''.join(operand(r) + ', ' for r in wanted)})")
    exec("\n    ".join(lines), scope)
    return scope["program"]  # type: ignore[no-any-return]
