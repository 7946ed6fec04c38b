"""The threads of one program of the grid while it runs: who is where, what special registers hold, how places are named."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NoReturn

import numpy as np

from detr_fast.testing.ptx.faults import Deadlock, Endless, MisalignedAccess, Race
from detr_fast.testing.ptx.memory import GlobalMemory, SharedMemory
from detr_fast.testing.ptx.shadow import NOBODY, Clock, Conflict
from detr_fast.testing.ptx.translator import DTYPES, END, Program

Array = np.ndarray
Mask = Array | None


class Threads:
    """Threads of one program in lockstep, block by block; where they part, those furthest behind in the program run first."""

    def __init__(
        self,
        program: Program,
        memory: GlobalMemory,
        clock: Clock,
        parameters: dict[str, int],
        place: tuple[int, int, int],
        grid: tuple[int, int, int],
        shared: int,
        limit: int,
    ) -> None:
        self.program, self.memory, self.clock = program, memory, clock
        self.parameters, self.place, self.grid = parameters, place, grid
        self.number = (place[2] * grid[1] + place[1]) * grid[0] + place[0]
        self.threads = program.kernel.threads
        self.lanes = np.arange(self.threads, dtype=np.int16)
        self.shared = SharedMemory(shared, program.granule_shared, clock)
        self.left = self.limit = limit
        self.waiting: dict[int, Array] = {}  # by block: threads that are to go on there
        self.at_barrier: dict[int, Array] = {}
        self.alive = np.ones(self.threads, bool)
        self.open_copies: list[tuple[Any, ...]] = []
        self.groups: list[list[tuple[Any, ...]]] = []
        clock.start_program()

    def run(self) -> None:
        with np.errstate(all="ignore"):
            self.program.run(self)

    # ---- values

    def unset(self, kind: str) -> Array:
        return (
            np.full(self.threads, 1, bool) if kind == "?" else np.full(4096, 0xFF, np.uint8).view(kind)[: self.threads]
        )

    def parameter(self, name: str, kind: str, offset: int) -> Array:
        dtype = DTYPES[kind]
        bits = (
            (np.array([self.parameters[name]], np.uint64) >> np.uint64(8 * offset))
            .astype(f"u{dtype.itemsize}")
            .view(dtype)
        )
        return np.repeat(bits, self.threads)

    def special(self, register: str, axis: str) -> Array:
        index = "xyz".index(axis)
        if register in ("laneid", "warpid"):
            return (self.lanes & 31 if register == "laneid" else self.lanes >> 5).astype(np.uint32)
        if register == "tid":
            return self.lanes.astype(np.uint32) * np.uint32(index == 0)
        sizes = {"ntid": (self.threads, 1, 1), "ctaid": self.place, "nctaid": self.grid}
        return np.full(self.threads, sizes[register][index], np.uint32)

    # ---- control flow

    def spend(self, instructions: int) -> None:
        self.left -= instructions
        if self.left < 0:
            raise Endless(f"{self._name()} ran more than {self.limit} instructions: a loop that never ends?")

    @staticmethod
    def merge(active: Array, before: tuple[Array, ...], after: tuple[Array, ...]) -> Iterator[Array]:
        return (np.where(active, new, old) for new, old in zip(after, before))

    def branch(self, active: Mask, taken: Array, target: int, following: int) -> tuple[int, Mask]:
        """The active threads part: those of `taken` go to `target`. Returns the block that runs next, and who runs it."""
        active = self.alive if active is None else active
        for block, mask in ((target, active & taken), (following, active & ~taken)):
            self._send(block, mask)
        return self._next()

    def choose(self, active: Mask, choice: Array, targets: tuple[int, ...]) -> tuple[int, Mask]:
        """As `branch`: each active thread goes to the target that its number chooses."""
        active = self.alive if active is None else active
        for number, target in enumerate(targets):
            self._send(target, active & (choice == number))
        return self._next()

    def barrier(self, site: int, active: Mask, following: int) -> tuple[int, Mask]:
        if active is not None and not np.array_equal(active, self.alive):
            self.at_barrier[site] = self.at_barrier.get(site, False) | active
            arrived = np.logical_or.reduce(list(self.at_barrier.values()))
            self._send(following, active)
            if not np.array_equal(arrived, self.alive):
                return self._next()
            self.at_barrier.clear()
        self.clock.start_phase()
        return (following, active) if not self.waiting else self._next()

    def _send(self, block: int, mask: Array) -> None:
        if not mask.any():
            return
        if block == END:
            self.alive = self.alive & ~mask
        else:
            self.waiting[block] = self.waiting[block] | mask if block in self.waiting else mask

    def _next(self) -> tuple[int, Mask]:
        stopped = np.logical_or.reduce(list(self.at_barrier.values())) if self.at_barrier else None
        ready = {b: m for b, m in self.waiting.items() if stopped is None or not (m & stopped).any()}
        if not ready:
            if not self.waiting:
                return END, None
            sites = ", ".join(self._describe(site) for site in self.at_barrier)
            raise Deadlock(f"{self._name()}: threads wait at {sites}, which the others never reach")
        block = min(ready)
        mask = self.waiting.pop(block)
        return block, None if mask.all() else mask

    def warp_barrier(self, site: int, active: Mask) -> None:
        self._whole_warps(site, active)
        self.clock.now += 1

    def _whole_warps(self, site: int, active: Mask) -> None:
        if active is None:
            return
        by_warp = active.reshape(-1, 32)
        parted = by_warp.any(1) & ~by_warp.all(1)
        if parted.any():
            raise Deadlock(f"{self._name()}: part of warp {int(parted.argmax())} reaches {self._describe(site)}")

    # ---- messages

    def _race(self, site: int, conflict: Conflict, threads: Array, offsets: Array, each: int, low: int) -> NoReturn:
        index = conflict.index // each
        other = "another program" if conflict.other_program else "other threads"
        if conflict.other != NOBODY:
            other = f"thread {conflict.other} (warp {conflict.other >> 5})"
        needed = "in the same launch" if conflict.other_program else "with no barrier between"
        raise Race(
            f"{self._where(site, threads[index])}: {conflict.kind} of {self._spot(int(offsets[index]), low)}, by {other} at "
            f"{self._describe(conflict.site)}, {needed}"
        )

    def _spot(self, offset: int, low: int) -> str:
        return f"shared memory at {offset}" if low == 0 else self.memory.nearest(low + offset)

    def _misaligned(self, site: int, threads: Array, addresses: Array, size: int, index: int) -> NoReturn:
        raise MisalignedAccess(
            f"{self._where(site, threads[index])} touches {size} bytes at {int(addresses[index]):#x}, which is no multiple of {size}"
        )

    def _describe(self, site: int) -> str:
        one = self.program.kernel.instructions[site]
        source = f", {one.source}" if one.source else ""
        return f"'{one.text}' (PTX line {one.line}{source})"

    def _name(self) -> str:
        return f"{self.program.kernel.name}, program {self.place}"

    def _where(self, site: int, thread: Any) -> str:
        return f"{self._name()}, thread {int(thread)} (warp {int(thread) >> 5}), {self._describe(site)}"
