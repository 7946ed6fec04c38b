"""A PTX kernel as one Python function: `run(m)` executes one program of the grid on the machine m.

Each register is a local variable that holds an array of one element a thread, in the numpy type that most of its uses
want; other uses view it. No array is ever changed in place. Each basic block is an `if pc == …` in a loop; A is None while
all threads are in the block, else their mask: then what other blocks read is merged at the block's end, and `m` decides which threads go on.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from detr_fast.testing.ptx import arithmetic
from detr_fast.testing.ptx.accesses import emit
from detr_fast.testing.ptx.faults import Unsupported
from detr_fast.testing.ptx.parser import Instruction, Kernel, Operand, parse

SHARED_BASE = 1024  # address of a program's shared memory: not 0, so that offsets taken for addresses are seen
END = -1  # the block after `ret`
DTYPES = {
    kind: np.dtype("bool" if kind == "?" else kind)
    for kind in ["?", "u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8"]
}
_NUMBER = re.compile(r"-?(0[xX][0-9a-fA-F]+|\d+)U?$")


@dataclass(frozen=True)
class Program:
    """A translated kernel. granule_shared, granule_global: the fewest bytes that one of its accesses takes."""

    kernel: Kernel
    run: Callable[[Any], None]
    source: str
    granule_shared: int
    granule_global: int


@lru_cache(maxsize=256)
def translate(text: str) -> Program:
    """Translate PTX; raises `Unsupported`, naming the instruction, where something in it is not known."""
    kernel = parse(text)
    blocks = _blocks(kernel)
    first = _emit_blocks(kernel, blocks, {})
    homes = {register: votes.most_common(1)[0][0] for register, votes in first.votes.items()}
    emitter = _emit_blocks(kernel, blocks, homes)
    source = _function(emitter, blocks)
    names: dict[str, Any] = {**vars(arithmetic), **emitter.constants}
    names |= {kind: dtype for kind, dtype in DTYPES.items() if kind != "?"}
    exec(compile(source, f"<ptx {kernel.name}>", "exec"), names)
    return Program(kernel, names["run"], source, _granule(kernel, "shared"), _granule(kernel, "global"))


_BARRIERS = ("bar.sync", "barrier.sync", "barrier.sync.aligned")


@dataclass
class Block:
    """Instructions start … end - 1, without what ends it."""

    start: int
    end: int
    leader: int
    last: Instruction | None = None  # bra, brx, ret or bar.sync
    following: int = END
    target: int = END
    targets: tuple[int, ...] = ()  # of brx, and the number that chooses among them
    choice: str = ""


def _blocks(kernel: Kernel) -> list[Block]:
    code = kernel.instructions
    leaders = {0, *kernel.labels.values()}
    leaders |= {i + 1 for i, one in enumerate(code) if _ends_block(one)}
    starts = sorted(i for i in leaders if i < len(code))
    number = {start: k for k, start in enumerate(starts)}
    blocks = []
    for start, end in zip(starts, [*starts[1:], len(code)]):
        last = code[end - 1]
        block = Block(start, end, start, following=number.get(end, END))
        if _ends_block(last):
            block.end, block.last = end - 1, last
            if last.parts[0] == "bra":
                block.target = number.get(kernel.labels[str(last.operands[0])], END)
            elif last.parts[0] == "brx":
                labels = kernel.tables[str(last.operands[1])]
                block.targets = tuple(number.get(kernel.labels[label], END) for label in labels)
        blocks.append(block)
    return blocks


def _ends_block(one: Instruction) -> bool:
    return one.parts[0] in ("bra", "brx", "ret", "exit") or one.opcode in _BARRIERS


@dataclass
class Emitter:
    """Turns operands into expressions and results into assignments; counts in which type each register is used."""

    kernel: Kernel
    homes: dict[str, str]
    votes: defaultdict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    constants: dict[str, Any] = field(default_factory=dict)
    hoisted: dict[str, str] = field(default_factory=dict)
    lines: list[list[str]] = field(default_factory=list)
    read_first: list[set[str]] = field(default_factory=list)  # by block: registers read before the block writes them
    written: list[set[str]] = field(default_factory=list)
    guard: str | None = None
    site: str = ""

    def block(self) -> None:
        self.lines.append([])
        self.read_first.append(set())
        self.written.append(set())

    def instruction(self, index: int, one: Instruction) -> None:
        self.site = str(index)
        self.guard = None
        if one.guard is not None:
            self.guard = self.read(one.guard, "?")
            self.guard = f"~{self.guard}" if one.negated else self.guard
        emit(self, one)

    def line(self, text: str) -> None:
        self.lines[-1].append(text)

    def condition(self) -> str:
        return "A" if self.guard is None else f"({self.guard} if A is None else {self.guard} & A)"

    def size(self, register: Operand) -> int:
        """Bytes of a register; 1 for a predicate."""
        kind = self.kernel.register_class(str(register))
        if kind is None:
            raise ValueError(f"{register} is no register")
        return 1 if kind == "pred" else int(kind[1:]) // 8

    def read(self, operand: Operand, kind: str) -> str:
        return self._value(operand, kind, scalar=True)

    def array(self, operand: Operand, kind: str) -> str:
        return self._value(operand, kind, scalar=False)

    def write(self, register: Operand, kind: str, expression: str) -> None:
        if register == "_":
            self.line(expression)
            return
        name, home = self._register(str(register))
        old = self.read(register, kind) if self.guard is not None and home != "?" else name
        if self.guard is not None and home == "?":
            self._uses(str(register))
        expression = self._fitted(str(register), kind, expression)
        if self.guard is not None:
            old = name if home != "?" else old
            expression = f"np.where({self.guard}, {expression}, {old})"
        self.written[-1].add(str(register))
        self.line(f"{name} = {expression}")

    def write_all(self, registers: tuple[Operand, ...], kind: str, expression: str) -> None:
        """Assign a tuple of arrays; the expression itself heeds the guard."""
        temporaries = [f"t{i}" for i in range(len(registers))]
        self.line(f"{', '.join(temporaries)}, = {expression}")
        for register, value in zip(registers, temporaries):
            if register != "_":
                name, _ = self._register(str(register))
                self.line(f"{name} = {self._fitted(str(register), kind, value)}")
                self.written[-1].add(str(register))

    def parameter(self, name: str, kind: str, offset: int = 0) -> str:
        return self._hoist(f"P_{name}_{offset}_{kind}", f"m.parameter({name!r}, {kind!r}, {offset})")

    def _fitted(self, register: str, kind: str, expression: str) -> str:
        """The expression of type `kind` in the register's home type; votes for its own."""
        _, home = self._register(register)
        if home == "?":
            return expression
        if int(kind[1]) != self.size(register):
            kind_word = f"{kind[0] if kind[0] != 'f' else 'u'}{self.size(register)}"
            expression, kind = f"{expression}.astype({kind_word})", kind_word
        self.votes[register][kind] += 1
        return expression if kind == home else f"{expression}.view({home})"

    def _register(self, register: str) -> tuple[str, str]:
        kind = self.kernel.register_class(register)
        if kind is None:
            raise ValueError(f"{register} is no register")
        name = "R" + register.replace("%", "").replace("$", "_")
        return name, "?" if kind == "pred" else self.homes.get(register, f"u{self.size(register)}")

    def _uses(self, register: str) -> None:
        if register not in self.written[-1]:
            self.read_first[-1].add(register)

    def _value(self, operand: Operand, kind: str, scalar: bool) -> str:
        if not isinstance(operand, str):
            raise ValueError(f"one operand expected, not {operand}")
        negated = operand.startswith("!")
        operand = operand.lstrip("!")
        if self.kernel.register_class(operand) is not None:
            return f"(~{self._read_register(operand, kind)})" if negated else self._read_register(operand, kind)
        if operand.startswith("%"):
            return self._special(operand[1:], kind)
        return self._constant(operand, kind, scalar)

    def _read_register(self, register: str, kind: str) -> str:
        self._uses(register)
        name, home = self._register(register)
        if home == "?":
            return name
        size = self.size(register)
        if int(kind[1]) == size:
            self.votes[register][kind] += 1
            return name if kind == home else f"{name}.view({kind})"
        self.votes[register][f"u{size}"] += 1
        value = name if home == f"u{size}" else f"{name}.view(u{size})"
        word = f"u{kind[1]}"
        return f"{value}.astype({word})" if word == kind else f"{value}.astype({word}).view({kind})"

    def _special(self, name: str, kind: str) -> str:
        register, _, axis = name.partition(".")
        if register not in ("tid", "ntid", "ctaid", "nctaid", "laneid", "warpid") or kind[0] == "f":
            raise KeyError(f"%{name}")
        value = self._hoist(f"S_{register}_{axis or 'x'}", f"m.special({register!r}, {axis or 'x'!r})")
        return value if kind == "u4" else f"{value}.astype({kind})"

    def _constant(self, text: str, kind: str, scalar: bool) -> str:
        bits = _bits(text, kind, self.kernel.shared)
        size = DTYPES[kind].itemsize
        value = np.array([bits & ((1 << 8 * size) - 1)], np.uint64).astype(f"u{size}")
        value = value.astype(bool) if kind == "?" else value.view(kind)
        name = f"{'k' if scalar else 'v'}_{kind[0].replace('?', 'b')}{size}_{bits & ((1 << 64) - 1):x}"
        self.constants[name] = value[0] if scalar else np.repeat(value, self.kernel.threads)
        return name

    def _hoist(self, name: str, expression: str) -> str:
        self.hoisted[name] = expression
        return name


def _bits(text: str, kind: str, shared: tuple[str, ...]) -> int:
    """The bit pattern that a literal or a name of shared memory has as `kind`."""
    if text in shared:
        return SHARED_BASE
    if text[:2] in ("0f", "0F") and len(text) == 10:
        bits = int(text[2:], 16)
        if kind == "f8":
            return int(np.uint32(bits).view(np.float32).astype(np.float64).view(np.uint64))
        return bits
    if text[:2] in ("0d", "0D") and len(text) == 18:
        return int(text[2:], 16)
    if not _NUMBER.match(text):
        raise KeyError(text)
    number = int(text.rstrip("U"), 0)
    if kind[0] == "f":
        return int(np.array([number], kind).view(f"u{kind[1]}")[0])
    return number


def _emit_blocks(kernel: Kernel, blocks: list[Block], homes: dict[str, str]) -> Emitter:
    emitter = Emitter(kernel, homes)
    for block in blocks:
        emitter.block()
        for index in range(block.start, block.end):
            emitter.instruction(index, kernel.instructions[index])
        if block.last is not None and block.last.guard is not None:
            emitter.read(block.last.guard, "?")
        if block.targets and block.last is not None:
            block.choice = emitter.read(block.last.operands[0], "u4")
    return emitter


def _function(emitter: Emitter, blocks: list[Block]) -> str:
    exposed = set().union(*emitter.read_first)
    lines = ["def run(m):", "    A, pc = None, 0"]
    lines += [f"    {name} = {expression}" for name, expression in emitter.hoisted.items()]
    for register in sorted(exposed):
        name, home = emitter._register(register)
        lines.append(f"    {name} = m.unset({home!r})")
    lines.append("    while pc >= 0:")
    for number, block in enumerate(blocks):
        lines.append(f"        if pc == {number}:")
        body = [f"m.spend({block.end - block.start + 1})"]
        merged = sorted(emitter.written[number] & exposed)
        names = ", ".join(emitter._register(register)[0] for register in merged)
        if merged:
            body.append(f"if A is not None: before = ({names},)")
        body += emitter.lines[number]
        if merged:
            body.append(f"if A is not None: {names}, = m.merge(A, before, ({names},))")
        body += _ending(emitter, block)
        lines += [f"            {line}" for line in body]
    return "\n".join(lines) + "\n"


def _ending(emitter: Emitter, block: Block) -> list[str]:
    last, following, target = block.last, block.following, block.target
    site = block.end
    if last is None:
        return _goto(following)
    if last.parts[0] in ("bar", "barrier"):
        if last.guard is not None or len(last.operands) > 2:
            raise Unsupported(f"a predicated barrier: '{last.text}'")
        count = int(str(last.operands[1]), 0) if len(last.operands) > 1 else emitter.kernel.threads
        if count != emitter.kernel.threads:
            raise Unsupported(f"'{last.text}' is a barrier of {count} of {emitter.kernel.threads} threads")
        return [f"pc, A = m.barrier({site}, A, {following})"]
    if block.targets:
        if last.guard is not None:
            raise Unsupported(f"a predicated choice: '{last.text}'")
        return [f"pc, A = m.choose(A, {block.choice}, {block.targets})"]
    if last.parts[0] in ("ret", "exit"):
        target = END
    if last.guard is None:
        return _goto(target)
    name, _ = emitter._register(last.guard)
    taken = f"~{name}" if last.negated else name
    yes, no = (following, target) if last.negated else (target, following)
    return [
        "if A is None:",
        f"    if {name}.all(): pc = {yes}",
        f"    elif not {name}.any(): pc = {no}",
        f"    else: pc, A = m.branch(A, {taken}, {target}, {following})",
        f"else: pc, A = m.branch(A, {taken}, {target}, {following})",
    ]


def _goto(target: int) -> list[str]:
    return [f"if A is None: pc = {target}", f"else: pc, A = m.branch(A, A, {target}, {target})"]


def _granule(kernel: Kernel, space: str) -> int:
    """Bytes that each access to shared or global memory takes a multiple of."""
    sizes = {16}
    for one in kernel.instructions:
        parts = one.parts
        if parts[0] in ("ld", "st", "atom", "red") and any(part.split("::")[0] == space for part in parts):
            count = next((int(part[1:]) for part in parts if re.fullmatch(r"v\d", part)), 1)
            sizes.add(min(16, count * int(re.sub(r"\D", "", parts[-1])) // 8))
        elif one.opcode.startswith(("cp.async.ca.", "cp.async.cg.")):
            sizes.add(int(str(one.operands[2]), 0))
    return min(sizes)
