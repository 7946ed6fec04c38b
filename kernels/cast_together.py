# mypy: allow-incomplete-defs
"""Many tensors of one dtype in another, by one launch: fp32 in 16 bits and back, rounded to nearest even.

A program takes a chunk of a tensor, whose place a table in the GPU's memory says (see `tensor_table`). Most tensors are copied as they lie.
Weights of convolutions, (N, C, h, w), also change places: from contiguous, (N * C, P) with P = h * w positions, to channels last, which is
(N, P, C), in 16 bits, and back where they become fp32. There a program takes tiles of rows and positions, reads a tile in the one order and
writes it in the other, so that neighbouring threads read and write neighbouring elements on both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from math import prod

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .configs import CAST
from .entry import Budget, Entry
from .launch import Variant, compile_variant, empty_strided, jit, launch, leads_to, pointer, tl
from .overlap import wait_for_previous
from .tensor_table import TensorTable, addresses, distances, pieces

# Rows of the table are whole 64 bytes: where a chunk begins in x and in y, its kind and its elements; of tiles its rows in place of
# elements, the first one's number in its image of C, C, P, and the chunk's positions, at most `CAST.positions`.
COLUMNS = 8
RUNS, ELEMENTS, TILES, ODD_TILES = range(
    4
)  # kinds: read and written in runs of 16 bytes of 16-bit elements, or one by one
RUN = 8
MAX_TURNED = 1 << 31  # elements of a tensor that changes places: offsets inside it are 32 bits wide


@jit
def cast_kernel(
    chunks_ptr,
    x_ptr,
    y_ptr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    POSITIONS: tl.constexpr,
    TO_LAST: tl.constexpr,
    RUN: tl.constexpr,
):
    """y = x in y's dtype; TO_LAST: tiles are read as they lie contiguous, and written channels last."""
    wait_for_previous()
    row = chunks_ptr + tl.program_id(0).to(tl.int64) * 8
    x_ptr += tl.load(row)
    y_ptr += tl.load(row + 1)
    kind, count = tl.load(row + 2).to(tl.int32), tl.load(row + 3).to(tl.int32)
    if kind == 0:
        _cast_block(x_ptr, y_ptr, count, BLOCK, RUN)
    elif kind == 1:
        _cast_block(x_ptr, y_ptr, count, BLOCK, 1)
    elif kind == 2:
        _cast_tiles(x_ptr, y_ptr, row, count, TILE, POSITIONS, TO_LAST, RUN)
    else:
        _cast_tiles(x_ptr, y_ptr, row, count, TILE, POSITIONS, TO_LAST, 1)


@jit
def _cast_block(x_ptr, y_ptr, count, BLOCK: tl.constexpr, RUN: tl.constexpr):
    place = tl.arange(0, BLOCK)
    for start in range(0, count, BLOCK):
        # The same for all of a run, so that the compiler reads and writes it at once.
        inside = place // RUN < (count - start + RUN - 1) // RUN
        x_place, y_place = x_ptr + (start + place), y_ptr + (start + place)
        if RUN > 1:
            x_place, y_place = tl.multiple_of(x_place, 16), tl.multiple_of(y_place, 16)
        tl.store(y_place, tl.load(x_place, mask=inside, other=0.0).to(y_ptr.dtype.element_ty), mask=inside)


@jit
def _cast_tiles(
    x_ptr,
    y_ptr,
    row,
    rows,
    TILE: tl.constexpr,
    POSITIONS: tl.constexpr,
    TO_LAST: tl.constexpr,
    RUN: tl.constexpr,
):
    first, channels = tl.load(row + 4).to(tl.int32), tl.load(row + 5).to(tl.int32)
    positions, width = tl.load(row + 6).to(tl.int32), tl.load(row + 7).to(tl.int32)
    position = tl.arange(0, POSITIONS)[None, :]
    place = tl.arange(0, TILE)[:, None]
    for start in range(0, rows, TILE):
        number = start + place
        inside = (place // RUN < (rows - start + RUN - 1) // RUN) & (position < width)
        contiguous = number * positions + position
        number += first
        last = number // channels * (channels * (positions - 1)) + number + position * channels
        x_place, y_place = x_ptr + (contiguous if TO_LAST else last), y_ptr + (last if TO_LAST else contiguous)
        if RUN > 1 and TO_LAST:
            y_place = tl.max_contiguous(tl.multiple_of(y_place, (16, 1)), (RUN, 1))
        elif RUN > 1:
            x_place = tl.max_contiguous(tl.multiple_of(x_place, (16, 1)), (RUN, 1))
        tl.store(y_place, tl.load(x_place, mask=inside, other=0.0).to(y_ptr.dtype.element_ty), mask=inside)


class CastTable(TensorTable):
    """Where sources, of one dtype, and their targets, of another, lie, in the GPU's memory, for `cast_together`; each pair `may_cast`.

    Nothing is copied before `fill`. Addresses must stay: the tensors are not kept alive. allocate: gives so many int64, at most `table_size`.
    """

    def __init__(
        self,
        sources: Sequence[Tensor],
        targets: Sequence[Tensor],
        allocate: Callable[[int], Tensor] | None = None,
    ) -> None:
        pairs = [(x, y) for x, y in zip(sources, targets) if x.numel()]
        self.bases = [(pairs[0] if pairs else (sources[0], targets[0]))[i].detach() for i in range(2)]
        # Bookkeeping on the host, whatever the default device, which counters and emulated graphs are not to see.
        with _disable_current_modes(), torch.device("cpu"):
            host = _chunks(pairs, self.bases)
        super().__init__(host.flatten(), self.bases[0].device, allocate)
        self.chunks = self.memory.view(host.shape)
        leads_to(self.chunks, [t for pair in pairs for t in pair])


def may_cast(source: Tensor, target: Tensor) -> bool:
    """Whether the kernel reads and writes tensors of one shape that lie so: alike and without gaps, or to be turned."""
    return _lie_alike(source, target) or _is_turned(source, target)


def table_size(tensors: Sequence[Tensor]) -> int:
    """How many int64 the table of casts of these, or back to these, takes at most."""
    return COLUMNS * sum(max(-(-t.numel() // CAST.chunk) + 1, _tiles_of(t.shape)) for t in tensors)


def _lie_alike(source: Tensor, target: Tensor) -> bool:
    if source.is_contiguous() and target.is_contiguous():
        return True
    return _is_channels_last(source) and _is_channels_last(target)


def _is_turned(source: Tensor, target: Tensor) -> bool:
    wide, narrow = (source, target) if source.itemsize > target.itemsize else (target, source)
    return wide.is_contiguous() and _is_channels_last(narrow) and wide.numel() < MAX_TURNED


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)


def _tiles_of(shape: Sequence[int]) -> int:
    """Chunks of a tensor that may have to be turned."""
    n, c, *kernel = shape if len(shape) == 4 else (0, 0)
    if prod(kernel) == 1:  # it lies alike either way
        return 0
    return -(-n * c // CAST.rows) * -(-prod(kernel) // CAST.positions)


def _chunks(pairs: Sequence[tuple[Tensor, Tensor]], bases: Sequence[Tensor]) -> Tensor:
    """The table, (chunks, 8): what takes longest comes first."""
    turned = [pair for pair in pairs if not _lie_alike(*pair)]
    plain = [pair for pair in pairs if _lie_alike(*pair)]
    return torch.cat([_turned_chunks(turned, bases), *_plain_chunks(plain, bases)])


def _places(pairs: Sequence[tuple[Tensor, Tensor]], bases: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(pairs, 2): where sources and targets begin, from the bases on; and (pairs,): whether both do at a multiple of 16 bytes."""
    kinds = list(zip(*pairs)) or [(), ()]
    aligned = torch.stack([addresses(tensors) % 16 == 0 for tensors in kinds]).all(0)
    return torch.stack([distances(tensors, base) for tensors, base in zip(kinds, bases)], 1), aligned


def _plain_chunks(pairs: Sequence[tuple[Tensor, Tensor]], bases: Sequence[Tensor]) -> list[Tensor]:
    """Of runs of 16 bytes, and of what can't be read so: the last few elements, and tensors that start elsewhere."""
    begins, aligned = _places(pairs, bases)
    sizes = torch.tensor([x.numel() for x, _ in pairs], dtype=torch.int64)
    whole = torch.where(aligned, sizes // RUN * RUN, 0)
    found = []
    for kind, first, counts in ((RUNS, torch.zeros_like(sizes), whole), (ELEMENTS, whole, sizes - whole)):
        tensor, start = pieces(counts, CAST.chunk)
        rows = torch.zeros(len(tensor), COLUMNS, dtype=torch.int64)
        rows[:, :2] = begins[tensor] + (first[tensor] + start)[:, None]
        rows[:, 2], rows[:, 3] = kind, (counts[tensor] - start).clamp(max=CAST.chunk)
        found.append(rows)
    return found


def _turned_chunks(pairs: Sequence[tuple[Tensor, Tensor]], bases: Sequence[Tensor]) -> Tensor:
    """By rows, and by positions where they are more than a tile has."""
    begins, aligned = _places(pairs, bases)
    shapes = [(x.shape[0] * x.shape[1], x.shape[1], x.shape[2] * x.shape[3]) for x, _ in pairs]
    counts, channels, positions = torch.tensor(shapes, dtype=torch.int64).view(-1, 3).unbind(1)
    tensor, first = pieces(counts, CAST.rows)
    own, block = pieces(positions[tensor], CAST.positions)
    tensor, first = tensor[own], first[own]
    c, p = channels[tensor], positions[tensor]
    contiguous = first * p + block  # and from the image's first row on:
    last = first // c * c * p + block * c
    rows = torch.zeros(len(tensor), COLUMNS, dtype=torch.int64)
    to_last = bases[1].itemsize < bases[0].itemsize
    rows[:, :2] = begins[tensor] + torch.stack([contiguous, last] if to_last else [last, contiguous], 1)
    rows[:, 2] = torch.where(aligned[tensor] & (c % RUN == 0), TILES, ODD_TILES)
    rows[:, 3] = (counts[tensor] - first).clamp(max=CAST.rows)
    rows[:, 4], rows[:, 5], rows[:, 6] = first % c, c, p
    rows[:, 7] = (p - block).clamp(max=CAST.positions)
    return rows


def cast_together(table: CastTable) -> None:
    """Write each source's elements to its target, in the target's dtype."""
    x, y = table.bases
    launch(cast_variant(x.dtype, y.dtype), (len(table.chunks),), table.chunks, x, y)


def compile_casts(source: torch.dtype, target: torch.dtype, device: torch.device) -> None:
    """Compile what `cast_together` launches from one dtype to the other."""
    compile_variant(cast_variant(source, target), device)


@cache
def cast_variant(source: torch.dtype, target: torch.dtype) -> Variant:
    """The program from one dtype to another of another width."""
    types = tuple(map(pointer, (torch.int64, source, target)))
    constants = {"BLOCK": CAST.block, "TILE": CAST.tile, "POSITIONS": CAST.positions}
    constants |= {"TO_LAST": target.itemsize < source.itemsize, "RUN": RUN}
    return Variant(cast_kernel, types, constants, CAST.num_warps)


def catalog_entries() -> Iterator[Entry]:
    fp32, bf16 = torch.float32, torch.bfloat16
    for name, source, target in (("to_bf16", fp32, bf16), ("to_fp32", bf16, fp32)):
        variant, example = cast_variant(source, target), partial(_example, source, target)
        yield Entry("cast_together", f"cast_{name}", variant, CAST.block, Budget(64, 4096, 64, 4096), example)


def _example(source: torch.dtype, target: torch.dtype, device: torch.device) -> Callable[[], tuple[Tensor, ...]]:
    """More than a chunk, what ends within a run, what begins off 16 bytes, and 3x3 and 5x5 kernels of even and odd numbers of channels."""
    to_last = target.itemsize < source.itemsize
    plain = [torch.randn(n + 1, device=device).to(source)[n == 40 :][:n] for n in (CAST.chunk + 24, 71, 40)]
    turned = [torch.randn(shape, device=device).to(source) for shape in ((9, 8, 3, 3), (3, 3, 5, 5))]
    formats = torch.contiguous_format, torch.channels_last
    xs = plain + [t.contiguous(memory_format=formats[not to_last]) for t in turned]
    strides = [t.contiguous(memory_format=formats[to_last and t.ndim == 4]).stride() for t in xs]
    ys = [empty_strided(x.shape, stride, target, device) for x, stride in zip(xs, strides)]
    table = CastTable(xs, ys)
    table.fill()

    def call() -> tuple[Tensor, ...]:
        cast_together(table)
        return *xs, *ys  # all that the table leads to is kept alive

    return call
