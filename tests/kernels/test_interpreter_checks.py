"""The harness itself: each kind of mistake, made on purpose, is seen."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import triton.language as tl
from detr_fast.kernels import launch
from detr_fast.kernels.launch import Variant, pointer

from detr_fast.testing import interpreter as interpreter_module
from detr_fast.testing.interpreter import checked_interpreter

pytestmark = pytest.mark.interpreter


@launch.jit
def copy_kernel(source_ptr, target_ptr, count: tl.int32, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target_ptr + index, tl.load(source_ptr + index, mask=index < count), mask=index < count)


@launch.jit
def last_program_kernel(target_ptr):
    tl.store(target_ptr, tl.program_id(0))


@launch.jit
def count_kernel(target_ptr, index: tl.int32):
    tl.atomic_add(target_ptr + index, 1)


def copy(source, count, size):
    target = launch.empty((size,), source.dtype, source.device)
    variant = Variant(copy_kernel, (pointer(source.dtype), pointer(target.dtype), "i32"), {"BLOCK": 8})
    launch.launch(variant, (-(-count // 8),), source, target, count)
    return target


def test_a_kernel_that_stays_inside_its_tensors_passes(interpreter):
    assert torch.equal(copy(torch.arange(20.0), 20, 20), torch.arange(20.0))
    assert interpreter.counts() == {"copy_kernel": 1}


def test_a_read_past_the_end_is_seen(interpreter):
    with pytest.raises(
        Exception, match=r"copy_kernel loads 1 elements outside .* 80 bytes from the start of source_ptr"
    ):
        copy(torch.arange(32.0)[:20], 21, 21)


def test_a_write_past_the_end_is_seen(interpreter):
    with pytest.raises(Exception, match="stores 2 elements outside"):
        copy(torch.arange(20.0), 20, 18)


def test_a_read_between_the_rows_of_a_view_is_seen(interpreter):
    with pytest.raises(Exception, match="loads 3 elements outside"):
        copy(torch.arange(32.0).view(4, 8)[:, :5], 16, 16)


def test_an_atomic_outside_is_seen(interpreter):
    counter = torch.zeros(3, dtype=torch.int32)
    variant = Variant(count_kernel, (pointer(torch.int32), "i32"), {})
    launch.launch(variant, (2,), counter, 2)
    assert counter.tolist() == [0, 0, 2]
    with pytest.raises(Exception, match="atomically updates 1 elements outside"):
        launch.launch(variant, (1,), counter, 3)


def test_an_output_never_written_is_nan(interpreter):
    assert copy(torch.zeros(5), 5, 6).isnan().tolist() == [False] * 5 + [True]


@launch.jit
def hint_kernel(source_ptr, start: tl.int32, stride: tl.int32):
    pointers = source_ptr + start + tl.arange(0, 2)[:, None] * stride + tl.arange(0, 8)[None, :]
    tl.load(tl.multiple_of(pointers, (1, 16)))


@pytest.mark.parametrize(
    ("start", "stride", "holds"),
    [(0, 16, True), (8, 24, True), (0, 0, True), (1, 16, False), (8, 20, False), (4, 16, False)],
)
def test_an_alignment_that_does_not_hold_is_seen(interpreter, start, stride, holds):
    variant = Variant(hint_kernel, (pointer(torch.float16), "i32", "i32"), {})
    arguments = torch.zeros(64, dtype=torch.float16), start, stride
    if holds:
        launch.launch(variant, (1,), *arguments)
    else:
        with pytest.raises(Exception, match="hint_kernel states multiples of 16, and has "):
            launch.launch(variant, (1,), *arguments)


def test_offsets_that_would_overflow_on_a_large_tensor_are_seen_on_a_small_one():
    with (
        checked_interpreter(int32_limit=30),
        pytest.raises(Exception, match=r"32-bit arithmetic reached 31 \(limit 30\)"),
    ):
        copy(torch.zeros(32), 32, 32)


@pytest.mark.interpreter(None)
def test_programs_run_in_a_shuffled_order_that_the_seed_decides():
    def last(seed):
        target = torch.zeros(1, dtype=torch.int32)
        with checked_interpreter(seed=seed):
            launch.launch(Variant(last_program_kernel, (pointer(torch.int32),), {}), (8,), target)
        return target.item()

    found = [last(seed) for seed in range(6)]
    assert len(set(found)) > 1
    assert found == [last(seed) for seed in range(6)]


def test_bf16_is_rounded_to_nearest_even(interpreter):
    source = torch.tensor([1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1.999, float("nan"), -float("inf"), 3e-39])
    target = launch.empty((7,), torch.bfloat16, source.device)
    variant = Variant(round_kernel, (pointer(source.dtype), pointer(target.dtype)), {})
    launch.launch(variant, (7,), source, target)
    torch.testing.assert_close(target, source.bfloat16(), rtol=0, atol=0, equal_nan=True)


@launch.jit
def round_kernel(source_ptr, target_ptr):
    index = tl.program_id(0)
    tl.store(target_ptr + index, tl.load(source_ptr + index).to(tl.bfloat16))


@pytest.mark.interpreter(None)
def test_everything_is_as_before_outside_the_block():
    from triton.runtime import interpreter as module

    replaced = (module, module.InterpreterBuilder, module.interpreter_builder, tl.core.tensor, tl.core.block_type, tl)
    before = [dict(vars(one)) for one in replaced]
    with checked_interpreter():
        assert all(dict(vars(one)) != then for one, then in zip(replaced, before))
    assert [dict(vars(one)) for one in replaced] == before
    assert launch.observers == []
    assert not launch.empty((3,), torch.bool, torch.device("cpu")).is_floating_point()


@launch.jit
def normalised(values):
    return values - tl.sum(values, axis=0) / 8


@launch.jit
def many_types_kernel(source_ptr, target_ptr, places_ptr, rows: tl.int32, BLOCK: tl.constexpr):
    row, columns = tl.program_id(0), tl.arange(0, BLOCK)
    tile = row * BLOCK + columns[None, :] + tl.zeros((2, 1), tl.int32)
    values = tl.load(source_ptr + tile, mask=tile < rows * BLOCK - 3, other=2.5)
    largest, place = tl.max(values, axis=1, return_indices=True)
    tl.store(places_ptr + row * 2 + tl.arange(0, 2), place.to(tl.int64) << 40 | (row - 1))
    product = tl.dot(tl.trans(values).to(tl.float16), values.to(tl.float16))
    column = normalised(tl.exp2(tl.sum(product, axis=0) - tl.max(largest, axis=0))).to(tl.bfloat16)
    tl.store(target_ptr + row * BLOCK + columns, column.to(tl.float32) * (row & 1 | 2))


@pytest.mark.interpreter(None)
def test_what_is_left_out_of_tritons_interpreter_changes_no_bit(monkeypatch):
    def outputs():
        target, places = torch.zeros(3, 16), torch.zeros(3, 2, dtype=torch.int64)
        types = pointer(torch.float32), pointer(target.dtype), pointer(places.dtype), "i32"
        variant = Variant(many_types_kernel, types, {"BLOCK": 16})
        with checked_interpreter():
            launch.launch(variant, (3,), torch.linspace(-1, 1, 48).sin(), target, places, 3)
        return target, places

    target, places = outputs()
    assert target.isfinite().all()
    monkeypatch.setattr(interpreter_module, "quick_interpreter", nullcontext)
    torch.testing.assert_close((target, places), outputs(), rtol=0, atol=0)
