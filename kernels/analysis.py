"""Static analysis of NVIDIA machine code: instructions per pipe of a kernel's inner loop, cycles per element, the bound.

The innermost loop is counted (the longest where there are several; the whole kernel where there is none) and each warp
instruction divided by its pipe's rate per multiprocessor and clock. The busiest pipe is the bound. All figures are
static: they say what the pipes need at least, not what latency or memory add.
Rates: CUDA C++ Programming Guide, "Arithmetic Instructions"; tensor cores from NVIDIA's architecture white papers.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .launch import require_triton

# Lanes a clock and multiprocessor; `shared` in bytes, `tensor` in dense fp16 FLOPs.
RATES: dict[int, dict[str, float]] = {
    80: {"issue": 128, "fp32": 64, "integer": 64, "special": 16, "half": 128, "shared": 128, "tensor": 2048},
    86: {"issue": 128, "fp32": 128, "integer": 64, "special": 16, "half": 128, "shared": 128, "tensor": 1024},
    89: {"issue": 128, "fp32": 128, "integer": 64, "special": 16, "half": 128, "shared": 128, "tensor": 1024},
    90: {"issue": 128, "fp32": 128, "integer": 64, "special": 16, "half": 128, "shared": 128, "tensor": 4096},
}
# DRAM bytes a clock and multiprocessor: A100 80 GB, RTX 3090, RTX 4090, H100 SXM, at boost clock.
DRAM: dict[int, float] = {80: 13.4, 86: 6.7, 89: 3.1, 90: 14.5}

_PIPES = (
    ("special", r"MUFU|F2[FI]\b|I2F|FRND|POPC|FLO|BREV"),
    ("shared", r"SHFL|LD[SGL]|ST[SGL]|LDSM|STSM|ATOM|RED|LDGSTS|LDC"),
    ("tensor", r"[HBI]MMA|HGMMA"),
    ("half", r"HADD2|HMUL2|HFMA2"),
    ("fp32", r"FADD|FMUL|FFMA|IMAD"),
    (
        "control",
        r"BRA|EXIT|BAR|BSYNC|BSSY|WARPSYNC|NOP|DEPBAR|RET|CALL|YIELD|MEMBAR|ERRBAR|U[A-Z0-9]+|R2UR|S2R|S2UR|CS2R",
    ),
)
_WIDTH = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}


@dataclass(frozen=True)
class Instruction:
    """One SASS instruction: its address, its opcode with modifiers, and where it may branch to."""

    address: int
    opcode: str
    target: int | None = None


@dataclass(frozen=True)
class Analysis:
    """Figures of one inner loop; an element is whatever the caller counts.

    cycles: cycles per element of each pipe, on one multiprocessor. dram_cycles: the time its bytes take, likewise.
    """

    instructions_per_element: float
    cycles: dict[str, float]
    opcodes: Counter[str]

    @property
    def bound(self) -> str:
        """The busiest pipe."""
        return max(self.cycles, key=lambda pipe: self.cycles[pipe])

    @property
    def cycles_per_element(self) -> float:
        return self.cycles[self.bound]

    def dram_headroom(self, arch: int, bytes_per_element: float) -> float:
        """DRAM time over the busiest pipe's time: above 1, memory is the bound, as it should be for a norm."""
        return bytes_per_element / DRAM[arch] / self.cycles_per_element


def analyse(cubin: bytes, arch: int, elements_per_warp: float) -> Analysis:
    """Analyse the inner loop of a cubin for sm_`arch`, of which one warp's iteration covers `elements_per_warp`."""
    if arch not in RATES:
        raise ValueError(f"no pipe rates for sm_{arch}: choose one of {', '.join(f'sm_{a}' for a in RATES)}")
    return analyse_loop(inner_loop(disassemble(cubin)), arch, elements_per_warp)


def analyse_loop(loop: Sequence[Instruction], arch: int, elements_per_warp: float) -> Analysis:
    """Analyse one loop of a kernel for sm_`arch`."""
    cycles: defaultdict[str, float] = defaultdict(float, issue=32.0 * len(loop))
    for instruction in loop:
        pipe, amount = _cost(instruction.opcode)
        cycles[pipe] += amount
    rates = RATES[arch]
    return Analysis(
        instructions_per_element=32 * len(loop) / elements_per_warp,
        cycles={pipe: amount / rates[pipe] / elements_per_warp for pipe, amount in cycles.items() if pipe in rates},
        opcodes=Counter(instruction.opcode for instruction in loop),
    )


def disassemble(cubin: bytes) -> list[Instruction]:
    """The instructions of a cubin's kernel, in order, by the nvdisasm that ships with triton."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        text = nvidia_tool("nvdisasm", "-c", str(path))
    return parse_sass(text)


def parse_sass(text: str) -> list[Instruction]:
    """Instructions of nvdisasm's listing; a branch's target is the address that its label stands before."""
    found: list[tuple[int, str, str | None]] = []
    labels: dict[str, int] = {}
    waiting: list[str] = []
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x_\w+):", line):
            waiting.append(label[1])
        elif code := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Za-z0-9_.]+)(.*)", line):
            address = int(code[1], 16)
            labels |= dict.fromkeys(waiting, address)
            waiting.clear()
            branch = re.search(r"`\((\.L_x_\w+)\)", code[3])
            found.append((address, code[2], branch[1] if branch else None))
    return [Instruction(address, opcode, labels.get(target or "")) for address, opcode, target in found]


def inner_loop(instructions: Sequence[Instruction]) -> list[Instruction]:
    """The longest loop that contains no other loop; without loops, all up to the last EXIT."""
    loops = innermost_loops(instructions)
    return max(loops, key=lambda loop: loop[-1].address - loop[0].address) if loops else _body(instructions)


def innermost_loops(instructions: Sequence[Instruction]) -> list[list[Instruction]]:
    """All loops that contain no other loop, in the order of their addresses."""
    body = _body(instructions)
    loops = [
        (one.target, one.address) for one in body if one.opcode == "BRA" and (one.target or 1 << 62) <= one.address
    ]
    innermost = [loop for loop in loops if not any(_inside(other, loop) for other in loops)]
    return [
        [one for one in body if (first or 0) <= one.address <= last]
        for first, last in sorted(innermost, key=lambda loop: loop[1])
    ]


def _body(instructions: Sequence[Instruction]) -> list[Instruction]:
    last_exit = max((i for i, one in enumerate(instructions) if one.opcode == "EXIT"), default=len(instructions) - 1)
    return list(instructions[: last_exit + 1])


def nvidia_tool(name: str, *arguments: str) -> str:
    """Output of a tool in triton's wheel (cuobjdump, nvdisasm)."""
    require_triton()
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(path), *arguments], capture_output=True, text=True, check=True).stdout


def _inside(inner: tuple[int | None, int], outer: tuple[int | None, int]) -> bool:
    return inner != outer and (outer[0] or 0) <= (inner[0] or 0) and inner[1] <= outer[1]


def _cost(opcode: str) -> tuple[str, float]:
    """An instruction's pipe, and how much of that pipe's unit one warp uses."""
    name = opcode.split(".")[0]
    pipe = next((pipe for pipe, names in _PIPES if re.fullmatch(names, name)), "integer")
    if pipe == "tensor":
        return pipe, _tensor_flops(opcode)
    if pipe == "shared":
        width = 4 if name == "SHFL" else max((_WIDTH.get(part, 0) for part in opcode.split(".")[1:]), default=0) or 4
        return pipe, 32.0 * width
    return pipe, 32.0


def _tensor_flops(opcode: str) -> float:
    """2·M·N·K of one warp's share; a warpgroup's instruction is four warps'."""
    if wide := re.search(r"\.(\d+)x(\d+)x(\d+)", opcode):
        m, n, k = map(int, wide.groups())
        return 2.0 * m * n * k / 4
    return {"16816": 4096.0, "1688": 2048.0}.get(opcode.split(".")[1], 4096.0)
