"""Casts of many tensors in one launch beside PyTorch's copies, to the bit: values, sizes, places in memory, layouts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from detr_fast.kernels import cast_together as kernels
from detr_fast.kernels import offline
from detr_fast.kernels.cast_together import CAST, COLUMNS, CastTable, cast_together, may_cast, table_size

from detr_fast.testing.ptx import emulated_gpu

interpreted = pytest.mark.interpreter(int32_limit=1 << 16)
CHUNK, HALVES = CAST.chunk, [torch.bfloat16, torch.float16]
LAST = torch.channels_last


def off_16_bytes(tensor):
    """The same numbers from an address on that is no multiple of 16."""
    memory = tensor.new_empty(tensor.numel() + 1)
    return memory[1:].copy_(tensor.flatten()).view(tensor.shape)


def bits(tensor):
    """Of all NaNs the same."""
    return torch.where(tensor.isnan(), torch.nan, tensor).view(torch.int16 if tensor.itemsize == 2 else torch.int32)


def assert_cast(sources, targets):
    """Targets, which hold NaN, become what PyTorch's copy makes of the sources."""
    assert all(map(may_cast, sources, targets))
    for target in targets:
        target.fill_(torch.nan)
    before = [x.clone() for x in sources]
    table = CastTable(sources, targets)
    assert table.chunks.numel() <= table_size(sources)
    table.fill()
    cast_together(table)
    for x, y, was in zip(sources, targets, before, strict=True):
        assert torch.equal(bits(y), bits(torch.empty_like(y).copy_(x)))
        assert torch.equal(bits(x), bits(was))


def to(dtype, sources):
    return [torch.empty_like(x, dtype=dtype) for x in sources]


# Nothing, one element, less than a run, whole runs and some more, a chunk, more than a chunk; several at once, of several dimensions.
SIZES = [
    [(1,)],
    [(3,), (0,), (5, 7)],
    [(64,), (CHUNK,)],
    [(CHUNK + 5,), (2, 3, 4, 5)],
    [(2 * CHUNK + 1024,), ()],
    [(0,)],
]


@interpreted
@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_numbers_round_as_in_pytorchs_copy_and_back(interpreter, sizes, half):
    sources = [torch.randn(size) * 10.0 ** torch.randint(-9, 6, size) for size in sizes]
    targets = to(half, sources)
    assert_cast(sources, targets)
    assert_cast(targets, to(torch.float32, targets))
    assert interpreter.counts().get("cast_kernel", 0) == 2 * any(x.numel() for x in sources)


def numbers(half):
    """Every 16-bit number; and of fp32 what lies half-way between two, beside that, and what is special."""
    halves = torch.arange(1 << 16).to(torch.uint16).view(half)
    wide, following = halves[::5].float(), (halves[::5].view(torch.int16) + 1).view(half).float()
    middle = wide / 2 + following / 2
    smallest = torch.finfo(torch.float32).smallest_normal
    special = [torch.inf, torch.nan, 0.0, smallest, smallest / 7, 3.4e38, 65519.9, 65520.0, 2.0**-25, 3 * 2.0**-25]
    special = torch.tensor(special)
    return halves, [middle, middle.nextafter(wide), middle.nextafter(following), special, -special]


@interpreted
@pytest.mark.parametrize("half", HALVES)
def test_every_16_bit_number_comes_through_and_what_lies_between_two_goes_to_the_even_one(interpreter, half):
    halves, wide = numbers(half)
    if half is torch.bfloat16:  # of which Triton's interpreter has no subnormal ones
        halves, *wide = (t[~(t.abs() < torch.finfo(half).smallest_normal)] for t in (halves, *wide))
    assert_cast([halves[::3].contiguous()], [torch.empty_like(halves[::3], dtype=torch.float32)])
    assert_cast(wide, to(half, wide))


@pytest.mark.offline
@pytest.mark.parametrize("half", HALVES)
def test_a_gpus_instructions_do_so_of_subnormal_numbers_too(half):
    halves, wide = numbers(half)
    with emulated_gpu():
        assert_cast([halves[::7].contiguous()], [torch.empty_like(halves[::7], dtype=torch.float32)])
        assert_cast(wide, to(half, wide))


@interpreted
@pytest.mark.parametrize("elsewhere", [("source",), ("target",), ("source", "target")])
def test_tensors_that_begin_off_16_bytes_are_read_one_by_one(interpreter, elsewhere):
    sources = [torch.randn(n) for n in (70, 40, CHUNK + 9)]
    targets = to(torch.bfloat16, sources)
    if "source" in elsewhere:
        sources[1] = off_16_bytes(sources[1])
    if "target" in elsewhere:
        targets[2] = off_16_bytes(targets[2])
    assert_cast(sources, targets)


# Of 1x1, 3x3, 7x7 and other kernels: numbers of channels that are whole runs or not, more rows than a program's, than a tile's, or fewer.
WEIGHTS = [
    [(8, 16, 3, 3)],
    [(40, 64, 3, 3)],
    [(5, 3, 7, 7), (3, 24, 1, 1), (7,)],
    [(2, 300, 1, 2), (33, 40, 5, 4)],
    [(3, 1, 3, 3), (0, 8, 3, 3), (4, 8, 1, 1)],
]


@interpreted
@pytest.mark.parametrize("shapes", WEIGHTS, ids=str)
def test_weights_become_channels_last_in_16_bits_and_contiguous_in_fp32(interpreter, shapes):
    sources = [torch.randn(shape) for shape in shapes]
    targets = [x.contiguous(memory_format=LAST if x.ndim == 4 else torch.contiguous_format).half() for x in sources]
    assert_cast(sources, targets)
    assert_cast(targets, to(torch.float32, sources))
    assert interpreter.counts()["cast_kernel"] == 2


@interpreted
def test_weights_that_lie_channels_last_already_are_copied_as_they_lie(interpreter):
    sources = [torch.randn(6, 16, 3, 3).contiguous(memory_format=LAST), torch.randn(5)]
    targets = to(torch.bfloat16, sources)
    assert_cast(sources, targets)
    assert_cast(targets, to(torch.float32, targets))


@interpreted
def test_weights_off_16_bytes_are_turned_one_by_one(interpreter):
    sources = [off_16_bytes(torch.randn(20, 16, 3, 3)), torch.randn(4, 8, 3, 3)]
    assert_cast(sources, [x.bfloat16().contiguous(memory_format=LAST) for x in sources])


def test_what_lies_otherwise_is_not_taken():
    wide, half = torch.randn(4, 8, 3, 3), torch.randn(4, 8, 3, 3).half()
    last = half.contiguous(memory_format=LAST)
    assert may_cast(wide, half)
    assert may_cast(wide, last)
    assert may_cast(last, wide)
    assert not may_cast(wide.contiguous(memory_format=LAST), half)
    assert not may_cast(half, wide.contiguous(memory_format=LAST))
    assert not may_cast(torch.randn(6, 4).t(), torch.randn(4, 6).half())
    assert not may_cast(torch.randn(6, 4)[:, :2], torch.randn(6, 2).half())
    assert not may_cast(torch.randn(1).expand(3), torch.randn(3).half())
    huge = torch.empty(1 << 16, 1 << 12, 3, 3, device="meta")
    assert may_cast(huge, huge.half())
    assert not may_cast(huge, huge.half().contiguous(memory_format=LAST))


def many():
    """Thousands of tensors, of which two begin off 16 bytes."""
    found = [(torch.zeros(n), torch.zeros(n).half()) for n in (1 + i % 40 for i in range(3000))] + [
        (off_16_bytes(torch.zeros(13)), torch.zeros(13).half()),
        (torch.zeros(14), off_16_bytes(torch.zeros(14).half())),
    ]
    return found, CHUNK


def one():
    """Of more elements than 32 bits count; nothing is read."""
    chunk = 1 << 28
    return [(torch.zeros(1).expand(40 * chunk + 7), torch.zeros(1).half().expand(40 * chunk + 7))], chunk


@pytest.mark.parametrize("widens", [False, True])
@pytest.mark.parametrize("tensors", [many, one])
def test_chunks_of_thousands_of_tensors_and_of_one_beyond_32_bits_are_each_element_once(tensors, widens, monkeypatch):
    pairs, chunk = tensors()
    pairs = [pair[::-1] for pair in pairs] if widens else pairs
    monkeypatch.setattr(kernels, "CAST", replace(CAST, chunk=chunk))
    monkeypatch.setattr(kernels, "_lie_alike", lambda *_: True)
    rows = kernels._chunks(pairs, pairs[0])
    for side in range(2):
        size, base = pairs[0][side].itemsize, pairs[0][side].data_ptr()
        found = sorted((base + size * row[side], base + size * (row[side] + row[3])) for row in rows.tolist())
        for begin, end in sorted(
            (t.data_ptr(), t.data_ptr() + size * t.numel()) for t in (pair[side] for pair in pairs)
        ):
            while begin < end:
                assert found[0][0] == begin
                begin = found.pop(0)[1]
            assert begin == end
        assert not found
    assert rows.shape[1] == COLUMNS
    assert rows[:, 3].max() <= chunk
    runs = rows[rows[:, 2] == kernels.RUNS]
    assert (runs[:, 3] % 8 == 0).all()
    assert ((runs[:, 0] * pairs[0][0].itemsize + pairs[0][0].data_ptr()) % 16 == 0).all()


@interpreted
def test_what_lies_outside_of_a_tables_tensors_is_seen_by_the_interpreters_checks(interpreter):
    sources = [torch.randn(40), torch.randn(4, 8, 3, 3)]
    targets = [torch.empty(40).half(), torch.empty(4, 8, 3, 3).half().contiguous(memory_format=LAST)]
    for row in range(2):
        table = CastTable(sources, targets)
        table.fill()
        table.chunks[row, 0] += 400
        with pytest.raises(Exception, match="outside its tensors"):
            cast_together(table)


@pytest.mark.offline
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.float16, torch.float32)], ids=str)
def test_runs_are_read_and_written_by_16_bytes_and_tiles_on_the_16_bit_side(target, dtypes):
    _, assembly, resources = offline.compile_variant(kernels.cast_variant(*dtypes), target)
    wide, narrow = ("ld", "st") if dtypes[0].itemsize == 4 else ("st", "ld")
    assert assembly.count(f"{wide}.global.v4") == 4  # 16 elements a thread
    assert assembly.count(f"{narrow}.global.v4") == 2 + 1  # and 8 of a tile
    assert resources.spills == 0
