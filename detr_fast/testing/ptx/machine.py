"""One program of the grid while it runs: memory accesses with all checks, and what warps do. Generated code calls it `m`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from detr_fast.testing.ptx import warps
from detr_fast.testing.ptx.faults import Fault, OutsideMemory, Race, Uninitialised
from detr_fast.testing.ptx.memory import POISON, granules
from detr_fast.testing.ptx.shadow import Shadow
from detr_fast.testing.ptx.threads import Array, Mask, Threads
from detr_fast.testing.ptx.translator import DTYPES


class Machine(Threads):
    """A mask names the threads that take part in an access; None: all."""

    # ---- global memory

    def load_global(
        self,
        site: int,
        base: Array,
        offset: int,
        kind: str,
        wide: str,
        count: int,
        mask: Mask,
        old: tuple[Array, ...] | None,
    ) -> tuple[Array, ...]:
        threads, addresses = self._active(base, offset, mask)
        size = DTYPES[kind].itemsize * count
        rows = np.zeros((threads.size, count), kind)
        for lanes, region, offsets in self._regions(site, threads, addresses, size):
            rows[lanes] = region.view(kind, count)[offsets // size]
            self._read(site, self.memory.shadow(region), offsets, size, self.memory.granule, threads[lanes], region.low)
        return self._results(rows, wide, threads, mask, old)

    def store_global(
        self, site: int, base: Array, offset: int, kind: str, values: tuple[Array, ...], mask: Mask
    ) -> None:
        threads, addresses = self._active(base, offset, mask)
        size = DTYPES[kind].itemsize * len(values)
        rows = np.stack([value[threads] for value in values], 1) if threads.size else np.zeros((0, len(values)), kind)
        for lanes, region, offsets in self._regions(site, threads, addresses, size):
            self._write(
                site,
                self.memory.shadow(region),
                region.view(kind, len(values)),
                offsets,
                rows[lanes],
                self.memory.granule,
                threads[lanes],
                region.low,
                region.identical,
            )

    def _regions(self, site: int, threads: Array, addresses: Array, size: int) -> Iterator[tuple[Any, Any, Array]]:
        """Accesses by tensor: which of them, the tensor, and offsets from its view's start. Checks range and alignment."""
        if not threads.size:
            return
        wrong = addresses & np.uint64(size - 1)
        if wrong.any():
            self._misaligned(site, threads, addresses, size, int((wrong != 0).argmax()))
        region = self.memory.find(int(addresses.min()), int(addresses.max()) + size)
        if region is not None:
            yield slice(None), region, (addresses - np.uint64(region.low)).astype(np.int64)
            return
        rest = np.arange(threads.size)
        while rest.size:
            address = int(addresses[rest[0]])
            region = self.memory.find(address, address + size)
            if region is None:
                raise OutsideMemory(
                    f"{self._where(site, threads[rest[0]])} touches {size} bytes at {address:#x}, "
                    f"{self.memory.nearest(address)}"
                )
            inside = (addresses[rest] >= region.start) & (addresses[rest] + np.uint64(size) <= region.end)
            lanes, rest = rest[inside], rest[~inside]
            yield lanes, region, (addresses[lanes] - np.uint64(region.low)).astype(np.int64)

    def atomic(
        self,
        site: int,
        space: str,
        base: Array,
        offset: int,
        operation: str,
        kind: str,
        operands: tuple[Array, ...],
        mask: Mask,
        old: Array | None,
    ) -> Array:
        """Thread after thread, as far as several hit one place. Returns what was there before."""
        threads, addresses = self._active(base, offset, mask)
        if space != "global":
            raise Fault(f"{self._describe(site)}: atomics in shared memory are not known to the emulator")
        size, granule = DTYPES[kind].itemsize, self.memory.granule
        before = np.zeros(threads.size, kind)
        values = [operand[threads] for operand in operands]
        for lanes, region, offsets in self._regions(site, threads, addresses, size):
            shadow, view = self.memory.shadow(region), region.view(kind, 1)
            names, touched = np.repeat(threads[lanes], size // granule), granules(offsets, size, granule)
            conflict = shadow.read(touched, names, site, self.number, atomic=True)
            unchanged = np.zeros(touched.shape, bool)
            conflict = conflict or shadow.write(touched, names, site, self.number, unchanged, atomic=True)
            if conflict is not None:
                self._race(site, conflict, threads[lanes], offsets, size // granule, region.low)
            for lane, index in zip(np.arange(threads.size)[lanes], offsets // size):
                before[lane] = view[index, 0]
                view[index, 0] = _updated(operation, view[index, 0], [value[lane] for value in values])
        result = np.zeros(self.threads, kind) if old is None else old.copy()
        result[threads] = before
        return result

    # ---- shared memory

    def load_shared(
        self,
        site: int,
        base: Array,
        offset: int,
        kind: str,
        wide: str,
        count: int,
        mask: Mask,
        old: tuple[Array, ...] | None,
    ) -> tuple[Array, ...]:
        threads, addresses = self._active(base, offset, mask)
        size = DTYPES[kind].itemsize * count
        rows = self._shared_rows(site, threads, addresses, size, kind, count)
        return self._results(rows, wide, threads, mask, old)

    def _shared_rows(self, site: int, threads: Array, addresses: Array, size: int, kind: str, count: int) -> Array:
        shared = self.shared
        offsets = self._shared_offsets(site, threads, addresses, size)
        touched = granules(offsets, size, shared.granule)
        each = size // shared.granule
        if shared.pending[touched].any():
            index = int(shared.pending[touched].argmax()) // each
            raise Uninitialised(
                f"{self._where(site, threads[index])} reads shared memory at {int(offsets[index])}, whose asynchronous copy "
                "has not been waited for"
            )
        if not shared.written[touched].all():
            index = int(shared.written[touched].argmin()) // each
            raise Uninitialised(
                f"{self._where(site, threads[index])} reads shared memory at {int(offsets[index])}, which nothing has written"
            )
        self._read(site, shared.shadow, offsets, size, shared.granule, threads, 0)
        return shared.view(kind, count)[offsets // size]

    def store_shared(
        self, site: int, base: Array, offset: int, kind: str, values: tuple[Array, ...], mask: Mask
    ) -> None:
        threads, addresses = self._active(base, offset, mask)
        size = DTYPES[kind].itemsize * len(values)
        shared = self.shared
        offsets = self._shared_offsets(site, threads, addresses, size)
        if not threads.size:
            return
        touched = granules(offsets, size, shared.granule)
        if shared.pending[touched].any():
            index = int(shared.pending[touched].argmax()) // (size // shared.granule)
            raise Race(
                f"{self._where(site, threads[index])} writes shared memory at {int(offsets[index])}, where an asynchronous "
                "copy is under way"
            )
        rows = np.stack([value[threads] for value in values], 1)
        self._write(site, shared.shadow, shared.view(kind, len(values)), offsets, rows, shared.granule, threads, 0)
        shared.written[touched] = True

    def _shared_offsets(self, site: int, threads: Array, addresses: Array, size: int) -> Array:
        offsets = addresses.astype(np.int64) - self.shared.base
        if not offsets.size:
            return offsets
        if (offsets & (size - 1)).any():
            self._misaligned(site, threads, addresses, size, int(((offsets & (size - 1)) != 0).argmax()))
        if offsets.min() < 0 or offsets.max() + size > self.shared.size:
            index = int(((offsets < 0) | (offsets + size > self.shared.size)).argmax())
            raise OutsideMemory(
                f"{self._where(site, threads[index])} touches {size} bytes at {int(offsets[index])} of shared memory, "
                f"which has {self.shared.size}"
            )
        return offsets

    def load_matrix(
        self, site: int, base: Array, offset: int, matrices: int, transposed: bool, active: Mask
    ) -> tuple[Array, ...]:
        self._whole_warps(site, active)
        running = np.ones(self.threads, bool) if active is None else active
        rows = warps.matrix_rows((base + np.uint32(offset))[running], matrices)
        # The warp reads as one: each row in the name of the thread that names it.
        threads = warps.matrix_rows(self.lanes[running], matrices).ravel()
        read = self._shared_rows(site, threads, rows.ravel(), 16, "u2", 8).reshape(*rows.shape, 8)
        registers = warps.matrix_registers(read, transposed)
        if active is None:
            return registers
        results = tuple(np.zeros(self.threads, np.uint32) for _ in registers)
        for result, register in zip(results, registers):
            result[running] = register
        return results

    # ---- asynchronous copies

    def copy_async(
        self,
        site: int,
        to: Array,
        offset: int,
        source: Array,
        from_offset: int,
        size: int,
        read: Array | None,
        mask: Mask,
    ) -> None:
        threads, addresses = self._active(to, offset, mask)
        if not threads.size:
            return
        shared = self.shared
        offsets = self._shared_offsets(site, threads, addresses, size)
        rows = np.zeros((threads.size, size), np.uint8)
        wanted = np.full(threads.size, size) if read is None else read[threads].astype(np.int64)
        if ((wanted != 0) & (wanted != size)).any():
            raise Fault(
                f"{self._where(site, threads[0])} copies part of {size} bytes, which the emulator does not know"
            )
        copying = np.flatnonzero(wanted)
        _, sources = self._active(source, from_offset, mask)
        for lanes, region, starts in self._regions(site, threads[copying], sources[copying], size):
            rows[copying[lanes]] = region.view("u1", size)[starts // size]
            self._read(
                site, self.memory.shadow(region), starts, size, self.memory.granule, threads[copying[lanes]], region.low
            )
        touched = granules(offsets, size, shared.granule)
        # From now until the wait nobody may read or write it: the copy may land at any moment.
        if shared.pending[touched].any():
            raise Race(f"{self._where(site, threads[0])} copies to where another copy is under way")
        poison = np.full_like(rows, POISON)
        self._write(site, shared.shadow, shared.view("u1", size), offsets, poison, shared.granule, threads, 0)
        shared.pending[touched] = True
        self.open_copies.append((site, offsets, size, rows, threads, touched))

    def commit_group(self, site: int, active: Mask) -> None:
        self._all_threads(site, active)
        self.groups.append(self.open_copies)
        self.open_copies = []

    def wait_group(self, site: int, most: int, active: Mask) -> None:
        """All but the `most` latest groups land: visible to the thread that copied; to others after a barrier."""
        self._all_threads(site, active)
        landing, self.groups = self.groups[: len(self.groups) - most], self.groups[max(0, len(self.groups) - most) :]
        shared = self.shared
        for origin, offsets, size, rows, threads, touched in (copy for group in landing for copy in group):
            shared.pending[touched] = False
            self._write(origin, shared.shadow, shared.view("u1", size), offsets, rows, shared.granule, threads, 0)
            shared.written[touched] = True

    def _all_threads(self, site: int, active: Mask) -> None:
        if active is not None:
            raise Fault(f"{self._describe(site)} in some threads only, which the emulator does not know")

    # ---- whole warps

    def mma(
        self, site: int, kind: str, a: tuple[Array, ...], b: tuple[Array, ...], c: tuple[Array, ...], active: Mask
    ) -> tuple[Array, ...]:
        self._whole_warps(site, active)
        return warps.multiply(kind, a, b, c)

    def shuffle(self, site: int, mode: str, a: Array, b: Array, c: Array, active: Mask) -> Array:
        self._whole_warps(site, active)
        return a[warps.shuffle_source(mode, b, c)]

    def reduce_warp(self, site: int, function: Any, a: Array, active: Mask) -> Array:
        self._whole_warps(site, active)
        return np.repeat(function.reduce(a.reshape(-1, 32), axis=1).astype(a.dtype), 32)

    def vote(self, site: int, mode: str, p: Array, active: Mask) -> Array:
        self._whole_warps(site, active)
        by_warp = p.reshape(-1, 32)
        if mode == "ballot":
            return np.repeat((by_warp.astype(np.uint32) << np.arange(32, dtype=np.uint32)).sum(1).astype(np.uint32), 32)
        return np.repeat(by_warp.any(1) if mode == "any" else by_warp.all(1), 32)

    # ---- what accesses have in common

    def _active(self, base: Array, offset: int, mask: Mask) -> tuple[Array, Array]:
        """Threads that access, and their addresses."""
        addresses = base + base.dtype.type(offset & ((1 << 8 * base.itemsize) - 1)) if offset else base
        if mask is None or mask.all():
            return self.lanes, addresses
        threads = np.flatnonzero(mask).astype(np.int16)
        return threads, addresses[threads]

    def _results(
        self, rows: Array, wide: str, threads: Array, mask: Mask, old: tuple[Array, ...] | None
    ) -> tuple[Array, ...]:
        columns = np.ascontiguousarray(rows.T).astype(wide, copy=False)
        if threads.size == self.threads:
            return tuple(columns)
        results = []
        for index, column in enumerate(columns):
            before = None if old is None else old[index]
            result = np.zeros(self.threads, wide) if before is None else before.astype(wide)
            result[threads] = column
            results.append(result)
        return tuple(results)

    def _read(
        self,
        site: int,
        shadow: Shadow,
        offsets: Array,
        size: int,
        granule: int,
        threads: Array,
        low: int,
        atomic: bool = False,
    ) -> None:
        touched, each = granules(offsets, size, granule), size // granule
        names = threads if each == 1 else np.repeat(threads, each)
        conflict = shadow.read(touched, names, site, self.number, atomic)
        if conflict is not None:
            self._race(site, conflict, threads, offsets, each, low)

    def _write(
        self,
        site: int,
        shadow: Shadow,
        view: Array,
        offsets: Array,
        rows: Array,
        granule: int,
        threads: Array,
        low: int,
        identical: bool = False,
    ) -> None:
        size = rows.shape[1] * rows.itemsize
        touched, each = granules(offsets, size, granule), size // granule
        names = threads if each == 1 else np.repeat(threads, each)
        index = offsets // size
        unchanged = (
            (view[index].view(np.uint8) == np.ascontiguousarray(rows).view(np.uint8)).reshape(-1, granule).all(1)
        )
        conflict = shadow.write(touched, names, site, self.number, unchanged, identical)
        if conflict is not None:
            self._race(site, conflict, threads, offsets, each, low)
        view[index] = rows
        lost = (view[index] != rows).any(1)
        if lost.any() and not _rounded_alike(view[index[lost]], rows[lost]):
            first = int(lost.argmax())
            raise Race(
                f"{self._where(site, threads[first])} and another thread write different values to "
                f"{self._spot(int(offsets[first]), low)} in the same instruction"
            )


def _rounded_alike(one: Array, other: Array) -> bool:
    """Whether 32-bit words, as fp32, differ by rounding alone.

    All threads that hold a sum of butterfly shuffles may store it; where a product was fused into the first addition, each
    has rounded another one of the two products. Which one stays is undefined, and no error. A sum that cancels differs by what
    its terms are rounded to, so the largest word of the instruction is the measure. Words that would be subnormal are integers.
    """
    if one.dtype != np.uint32:
        return False
    a, b = one.view(np.float32), other.view(np.float32)
    finite = np.isfinite(a) & np.isfinite(b)
    with np.errstate(all="ignore"):
        bound = 2.0**-22 * np.abs(a[finite]).max(initial=0)
        rounded = finite & (np.maximum(np.abs(a), np.abs(b)) >= np.finfo(np.float32).tiny) & (np.abs(a - b) <= bound)
        alike = rounded | (one == other) | (a == b) | (np.isnan(a) & np.isnan(b))
    return bool(alike.all())


def _updated(operation: str, old: Any, values: list[Any]) -> Any:
    """What an atomic operation leaves: cas compares with the first value and stores the second."""
    if operation == "cas":
        return values[1] if old == values[0] else old
    if operation == "exch":
        return values[0]
    function = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or}
    return function.get(operation, np.bitwise_xor)(old, values[0])
