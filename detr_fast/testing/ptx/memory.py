"""Global memory (the tensors of a launch) and a program's shared memory, with range, alignment and race checks."""

from __future__ import annotations

import ctypes
from collections.abc import Container
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from detr_fast.testing.ptx.shadow import Clock, Shadow
from detr_fast.testing.ptx.translator import SHARED_BASE

Array = np.ndarray
POISON = 0xFF  # every byte of unwritten shared memory: NaN in each floating type


@dataclass
class Region:
    """Bytes start … end - 1 of one tensor, seen from `low`, a multiple of 16."""

    name: str
    start: int
    end: int
    identical: bool = False  # several programs may write the same values
    views: dict[tuple[str, int], Array] = field(default_factory=dict)
    shadow: Shadow | None = None

    @property
    def low(self) -> int:
        return self.start & ~15

    def view(self, kind: str, count: int) -> Array:
        """The memory as (…, count) elements; the caller has checked that it touches the tensor only."""
        found = self.views.get((kind, count))
        if found is None:
            size = (self.end - self.low + 15) & ~15
            raw = (ctypes.c_uint8 * size).from_address(self.low)
            found = self.views[kind, count] = np.frombuffer(memoryview(raw), kind).reshape(-1, count)
        return found


class GlobalMemory:
    """The tensors of one launch by address. Tensors that overlap (views of one storage) share a region."""

    def __init__(
        self, tensors: dict[str, Tensor], granule: int, clock: Clock, identical: Container[str] = frozenset()
    ) -> None:
        self.granule, self.clock = granule, clock
        regions = [_region(name, tensor, name in identical) for name, tensor in tensors.items() if tensor.numel()]
        self.regions = _merged(regions)
        self.lows = np.array([region.start for region in self.regions], np.uint64)

    def find(self, lowest: int, highest: int) -> Region | None:
        """The tensor that holds bytes lowest … highest - 1, None where not one does."""
        index = int(np.searchsorted(self.lows, np.uint64(lowest), "right")) - 1
        if index >= 0 and highest <= self.regions[index].end:
            return self.regions[index]
        return None

    def shadow(self, region: Region) -> Shadow:
        if region.shadow is None:
            count = (region.end - region.low + 15) // 16 * 16 // self.granule
            region.shadow = Shadow(count, self.clock, across_programs=True)
        return region.shadow

    def nearest(self, address: int) -> str:
        """Where an address lies from the nearest tensor, for a message."""
        if not self.regions:
            return "there are no tensors"
        region = min(self.regions, key=lambda r: max(r.start - address, address - r.end + 1))
        if address < region.start:
            return f"{region.start - address} bytes before {region.name}"
        return f"{address - region.start} bytes from the start of {region.name}, which has {region.end - region.start}"


class SharedMemory:
    """One program's. written: which granules hold something; pending: which wait for an asynchronous copy."""

    def __init__(self, size: int, granule: int, clock: Clock) -> None:
        self.size, self.granule = size, granule
        padded = (size + 15) & ~15
        self.data = np.full(padded, POISON, np.uint8)
        self.written = np.zeros(padded // granule, bool)
        self.pending = np.zeros(padded // granule, bool)
        self.shadow = Shadow(padded // granule, clock, across_programs=False)

    def view(self, kind: str, count: int) -> Array:
        return self.data.view(kind).reshape(-1, count)

    @property
    def base(self) -> int:
        return SHARED_BASE


def granules(offsets: Array, size: int, granule: int) -> Array:
    """Numbers of the granules that accesses of `size` bytes at `offsets` touch: (accesses × granules an access)."""
    first = offsets // granule
    count = size // granule
    return first if count == 1 else (first[:, None] + np.arange(count)).ravel()


def _region(name: str, tensor: Tensor, identical: bool) -> Region:
    span = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride())) + 1
    return Region(name, tensor.data_ptr(), tensor.data_ptr() + span * tensor.element_size(), identical)


def _merged(regions: list[Region]) -> list[Region]:
    merged: list[Region] = []
    for region in sorted(regions, key=lambda r: r.start):
        if merged and region.start < merged[-1].end:
            last = merged[-1]
            if region.name not in last.name.split(" and "):
                last.name += f" and {region.name}"
            last.end, last.identical = max(last.end, region.end), last.identical and region.identical
        else:
            merged.append(region)
    return merged
