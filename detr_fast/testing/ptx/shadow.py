"""Who touched each piece of memory last, and whether a barrier lies between: the race detector.

Time is a counter of the launch that every barrier advances, a program's (bar.sync) and a warp's (bar.warp.sync). Two
accesses to one granule, at least one a write, race

* in different warps, unless a bar.sync lies between;
* in different threads of one warp, unless a bar.sync or bar.warp.sync does;
* in different programs of a launch, always.

A write of the value that is there already is told apart. Within a program it is no race with another write: Triton stores
replicated data several times. Between programs it is none where the caller has declared such writes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Array = np.ndarray
NOBODY = -1
MANY = -2
NEVER = -1


@dataclass
class Clock:
    """now: advanced by every barrier. barrier: when the last bar.sync was. program: when this program started."""

    now: int = 0
    barrier: int = 0
    program: int = 0

    def start_program(self) -> None:
        self.now += 1
        self.barrier = self.program = self.now

    def start_phase(self) -> None:
        self.now += 1
        self.barrier = self.now


@dataclass(frozen=True)
class Conflict:
    """index: of the first access in conflict, among those given. other: thread, or NOBODY where several or of another program.

    site: of the other access. kind: what the two did.
    """

    index: int
    kind: str
    other: int
    site: int
    other_program: bool


class Shadow:
    """The history of `count` granules: last write, and the readers since the last barrier."""

    def __init__(self, count: int, clock: Clock, across_programs: bool) -> None:
        self.clock = clock
        self.across_programs = across_programs
        self.write_time = np.full(count, NEVER, np.int32)
        self.writer = np.full(count, NOBODY, np.int16)
        self.write_site = np.zeros(count, np.int32)
        self.atomic = np.zeros(count, bool)
        self.read_time = np.full(count, NEVER, np.int32)
        self.reader = np.full(count, NOBODY, np.int16)  # thread, MANY
        self.reading_warp = np.full(count, NOBODY, np.int16)  # warp, MANY
        self.read_site = np.zeros(count, np.int32)
        self.reading_program = np.full(count if across_programs else 0, NOBODY, np.int32)
        self.last_write = NEVER

    def read(self, granules: Array, threads: Array, site: int, program: int, atomic: bool = False) -> Conflict | None:
        """Note reads; the first conflict with an earlier write, if there is one."""
        conflict = None
        if self.last_write >= (0 if self.across_programs else self.clock.barrier):
            conflict = self._against_writes(granules, threads, "read", atomic)
        if not atomic:
            self._note_readers(granules, threads, site, program)
        return conflict

    def write(
        self,
        granules: Array,
        threads: Array,
        site: int,
        program: int,
        same: Array,
        declared: bool = False,
        atomic: bool = False,
    ) -> Conflict | None:
        """Note writes; the first conflict, if there is one.

        same: which of them leave the value that was there. declared: whether several programs may write the same value.
        """
        conflict = None
        if self.last_write >= (0 if self.across_programs else self.clock.barrier):
            conflict = self._against_writes(granules, threads, "write", atomic, same, declared)
        conflict = conflict or self._against_readers(granules, threads, program, same & declared)
        self.write_time[granules] = self.last_write = self.clock.now
        self.writer[granules] = threads
        self.write_site[granules] = site
        self.atomic[granules] = atomic
        return conflict

    def _against_writes(
        self,
        granules: Array,
        threads: Array,
        verb: str,
        atomic: bool,
        same: Array | None = None,
        declared: bool = False,
    ) -> Conflict | None:
        clock, time = self.clock, self.write_time[granules]
        earlier = (time < clock.program) & (time != NEVER)
        writer = self.writer[granules]
        foreign = (time >= clock.barrier) & (writer >> 5 != threads >> 5)
        foreign |= (time == clock.now) & (writer != threads)
        if same is not None:
            foreign &= ~same
            earlier &= ~(same & declared)
        wrong = foreign | earlier if self.across_programs else foreign
        if atomic:
            wrong &= ~self.atomic[granules]
        if not wrong.any():
            return None
        index = int(wrong.argmax())
        site, elsewhere = int(self.write_site[granules[index]]), bool(earlier[index])
        return Conflict(index, f"{verb} after write", NOBODY if elsewhere else int(writer[index]), site, elsewhere)

    def _against_readers(self, granules: Array, threads: Array, program: int, allowed: Array) -> Conflict | None:
        clock, time = self.clock, self.read_time[granules]
        current = time >= clock.barrier
        elsewhere = np.zeros(granules.shape, bool)
        if self.across_programs:
            reading = self.reading_program[granules]
            elsewhere = (reading != NOBODY) & (reading != program) & ~allowed
        elif not current.any():
            return None
        wrong = current & (self.reading_warp[granules] != threads >> 5)
        wrong |= (time == clock.now) & (self.reader[granules] != threads)
        wrong |= elsewhere
        if not wrong.any():
            return None
        index = int(wrong.argmax())
        granule = granules[index]
        other = int(self.reader[granule])
        foreign = bool(elsewhere[index]) and not bool(current[index])
        other = NOBODY if foreign or other == MANY else other
        return Conflict(index, "write after read", other, int(self.read_site[granule]), foreign)

    def _note_readers(self, granules: Array, threads: Array, site: int, program: int) -> None:
        clock, time = self.clock, self.read_time[granules]
        _note(self.reading_warp, granules, (threads >> 5).astype(np.int16), time >= clock.barrier)
        _note(self.reader, granules, threads, time == clock.now)
        self.read_time[granules] = clock.now
        self.read_site[granules] = site
        if self.across_programs:
            before = self.reading_program[granules]
            self.reading_program[granules] = np.where((before == NOBODY) | (before == program), program, MANY)


def _note(who: Array, granules: Array, names: Array, current: Array) -> None:
    """who[granules] = names, or MANY where another name is there already (and still counts), or twice in `granules`."""
    before = who[granules]
    names = np.where(current & (before != names), MANY, names)
    who[granules] = names
    lost = who[granules] != names
    if lost.any():
        who[granules[lost]] = MANY
