"""PTX text as data: a kernel's parameters, registers and instructions, with the source line of each.

Understands what Triton prints (one entry, registers in numbered classes, inline assembly in braces with registers of its
own), and no more. Source: NVIDIA's PTX ISA, https://docs.nvidia.com/cuda/parallel-thread-execution.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from detr_fast.testing.ptx.faults import Unsupported

Operand = str | tuple[str, ...]  # a register, number or symbol as written; several in braces

_ENTRY = re.compile(r"\.entry\s+(\w+)\s*\(([^)]*)\)([^{]*)\{")
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(.*)", re.S)
_LOC = re.compile(r"\s*\.loc\s+(\d+)\s+(\d+)")
_FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"([^"]*)"(?:\s*"([^"]*)")?', re.M)
_LABEL = re.compile(r"([$\w]+)\s*:(?!:)")
_SHARED = re.compile(r"\.shared\s+\.align\s+\d+\s+\.b8\s+(\w+)\s*\[")


@dataclass(frozen=True)
class Instruction:
    """One statement: `@%p1 ld.global.v2.b32 {%r1, %r2}, [%rd1+8]` has guard %p1 and two operands.

    line: in the PTX text, from 1. source: file and line of the Triton source, as far as known.
    """

    opcode: str
    operands: tuple[Operand, ...]
    guard: str | None
    negated: bool
    text: str
    line: int
    source: str

    @property
    def parts(self) -> list[str]:
        return self.opcode.split(".")


@dataclass
class Kernel:
    """One entry of a PTX module.

    parameters: name and type ("u64", "f32", …), in order. labels: index of the instruction that each stands before.
    tables: the labels that a branch by a number chooses among, by the name of their list.
    registers: class of each register by its name, or by its prefix for numbered ones. shared: names of shared memory.
    """

    name: str
    threads: int
    parameters: list[tuple[str, str]]
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    tables: dict[str, tuple[str, ...]] = field(default_factory=dict)
    registers: dict[str, str] = field(default_factory=dict)
    shared: tuple[str, ...] = ()

    def register_class(self, name: str) -> str | None:
        """pred, b16, b32, …; None where it is no register."""
        found = self.registers.get(name)
        if found is None and (prefix := name.rstrip("0123456789")) != name:
            found = self.registers.get(prefix)
            if found is not None:
                self.registers[name] = found
        return found


def parse(text: str) -> Kernel:
    """The one entry of a PTX module; raises `Unsupported` where there is none."""
    text = re.sub(r"/\*.*?\*/", lambda match: "\n" * match[0].count("\n"), text, flags=re.S)
    text = re.sub(r"//[^\n]*", "", text)
    found = _ENTRY.search(text)
    if found is None:
        raise Unsupported("no .entry in this PTX: the emulator runs what Triton compiles for NVIDIA GPUs")
    threads = re.search(r"\.(?:req|max)ntid\s+(\d+)", found[3])
    if threads is None:
        raise Unsupported(f"{found[1]} states no number of threads (.reqntid)")
    parameters = []
    for declaration in filter(None, map(str.strip, found[2].split(","))):
        words = declaration.split()
        parameters.append((words[-1], words[1].lstrip(".")))
    kernel = Kernel(found[1], int(threads[1]), parameters, shared=tuple(_SHARED.findall(text)))
    files = {number: (name or folder).rsplit("/", 1)[-1] for number, folder, name in _FILE.findall(text)}
    _read_body(kernel, text[found.end() :], text.count("\n", 0, found.end()) + 1, files)
    return kernel


def _read_body(kernel: Kernel, body: str, line: int, files: dict[str, str]) -> None:
    scopes: list[dict[str, str]] = [{}]
    opened, label = 0, ""
    for statement, number, source in _statements(body, line, files):
        if statement == "{":
            opened += 1
            scopes.append({})
        elif statement == "}":
            scopes.pop()
            if not scopes:
                return
        elif statement.endswith(":"):
            label = statement[:-1]
            kernel.labels[label] = len(kernel.instructions)
        elif statement.startswith(".branchtargets"):
            kernel.tables[label] = tuple(map(str.strip, statement.removeprefix(".branchtargets").split(",")))
        elif declared := _REGISTERS.match(statement):
            for name in map(str.strip, declared[2].split(",")):
                if "<" in name:
                    kernel.registers[name[: name.index("<")]] = declared[1]
                else:  # of an inline assembly, whose names come again and again
                    unique = f"{name}_{opened}_"
                    scopes[-1][name] = unique
                    kernel.registers[unique] = declared[1]
        elif not statement.startswith("."):
            kernel.instructions.append(_instruction(statement, number, source, scopes))


def _statements(body: str, line: int, files: dict[str, str]) -> Iterator[tuple[str, int, str]]:
    """Statements without semicolon, labels with their colon and lone braces; each with its line and Triton's."""
    source, pending, start = "", "", line
    for offset, text in enumerate(body.split("\n")):
        if located := _LOC.match(text):
            source = f"{files.get(located[1], 'source')}:{located[2]}"
            continue
        if not pending:
            start = line + offset
        pending = f"{pending} {text}".strip()
        while pending:
            if pending[0] in "{}":
                piece, pending = pending[0], pending[1:]
            elif label := _LABEL.match(pending):
                piece, pending = f"{label[1]}:", pending[label.end() :]
            elif ";" in pending:
                piece, _, pending = pending.partition(";")
            else:
                break
            pending = pending.strip()
            if piece.strip():
                yield piece.strip(), start, source


def _instruction(statement: str, line: int, source: str, scopes: list[dict[str, str]]) -> Instruction:
    names = {name: unique for scope in scopes for name, unique in scope.items()}
    text = " ".join(statement.split())
    guard, negated, rest = None, False, text
    if rest.startswith("@"):
        guard, rest = rest[1:].split(None, 1)
        negated, guard = guard.startswith("!"), guard.lstrip("!")
        guard = names.get(guard, guard)
    opcode, _, rest = rest.partition(" ")
    return Instruction(opcode, tuple(_operands(rest, names)), guard, negated, text, line, source)


def _operands(text: str, names: dict[str, str]) -> Iterator[Operand]:
    for piece in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,{}\[\]]+", text):
        piece = piece.strip()
        if not piece:
            continue
        if piece[0] == "{":
            yield tuple(_renamed(part, names) for part in piece[1:-1].split(","))
        elif piece[0] == "[":
            yield "[" + _renamed(piece[1:-1], names) + "]"
        else:
            yield _renamed(piece, names)


def _renamed(name: str, names: dict[str, str]) -> str:
    name = name.replace(" ", "")
    return re.sub(r"[%$\w]+", lambda match: names.get(match[0], match[0]), name) if names else name


def address(operand: Operand) -> tuple[str, int]:
    """Base and byte offset of `[%rd1+8]`."""
    if not isinstance(operand, str) or operand[:1] != "[":
        raise Unsupported(f"expected an address, received {operand!r}")
    base, sign, offset = operand[1:-1].partition("+")
    if not sign and "-" in base[1:]:
        base, sign, offset = base.partition("-")
        return base, -int(offset, 0)
    return base, int(offset, 0) if sign else 0
