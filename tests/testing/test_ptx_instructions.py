"""Single instructions in the emulator give what the PTX ISA says, on numbers where they are easily got wrong."""

from __future__ import annotations

import math
import struct

import pytest
import torch

from detr_fast.testing.ptx import Deadlock, OutsideMemory, Race, emulated_gpu
from detr_fast.testing.ptx.driver import run_grid
from detr_fast.testing.ptx.translator import translate

pytestmark = pytest.mark.offline

HEAD = """
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel(.param .u64 .ptr .global a, .param .u64 .ptr .global b, .param .u64 .ptr .global c)
.reqntid {threads}
{{
    .reg .pred %p<4>;
    .reg .b16 %h<8>;
    .reg .b32 %r<40>;
    .reg .b64 %d<20>;
    ld.param.b64 %d1, [a];
    ld.param.b64 %d2, [b];
    ld.param.b64 %d3, [c];
    mov.u32 %r1, %tid.x;
    mul.wide.u32 %d4, %r1, 4;
    add.s64 %d5, %d1, %d4;
    add.s64 %d6, %d2, %d4;
    add.s64 %d7, %d3, %d4;
    ld.global.b32 %r2, [%d5];
    ld.global.b32 %r3, [%d6];
"""
TAIL = """
    st.global.b32 [%d7], %r4;
    ret;
}}
"""


def run(body: str, a: list[int], b: list[int]) -> list[int]:
    """%r4 of each thread after `body`, which finds the thread's a and b in %r2 and %r3."""
    size = -(-len(a) // 32) * 32
    words = [
        torch.tensor([_signed(v) for v in (*values, *[0] * (size - len(a)))], dtype=torch.int32) for values in (a, b)
    ]
    result = torch.zeros(size, dtype=torch.int32)
    program = translate((HEAD + "{body}" + TAIL).format(threads=size, body=body))
    arguments = [(name, "*i32", tensor) for name, tensor in zip("abc", (*words, result))]
    with emulated_gpu(limit=10_000) as gpu:
        run_grid(program, (1, 1, 1), arguments, 1024, gpu)
    return [v & 0xFFFFFFFF for v in result.tolist()[: len(a)]]


def _signed(value: int) -> int:
    return value - (1 << 32) if value >= 1 << 31 else value


def bits(value: float) -> int:
    return struct.unpack("<I", struct.pack("<f", value))[0]


ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("body", "a", "b", "expected"),
    [
        ("mul.hi.u32 %r4, %r2, %r3;", ONES, ONES, 0xFFFFFFFE),
        ("mul.hi.s32 %r4, %r2, %r3;", ONES, 5, ONES),
        ("div.s32 %r4, %r2, %r3;", -7 & ONES, 2, -3 & ONES),
        ("rem.s32 %r4, %r2, %r3;", -7 & ONES, 2, -1 & ONES),
        ("shr.s32 %r4, %r2, %r3;", 0x80000000, 40, ONES),
        ("shr.u32 %r4, %r2, %r3;", 0x80000000, 32, 0),
        ("shl.b32 %r4, %r2, %r3;", 3, 31, 0x80000000),
        ("bfe.s32 %r4, %r2, 4, 4;", 0xF8, 0, 0xFFFFFFFF),
        ("bfe.u32 %r4, %r2, 28, 8;", 0xA0000000, 0, 0xA),
        ("bfi.b32 %r4, %r2, %r3, 8, 4;", 0xFF, 0, 0xF00),
        ("lop3.b32 %r4, %r2, %r3, 15, 0x6a;", 0b1100, 0b1010, 0b1100 & 0b1010 ^ 15),
        ("prmt.b32 %r4, %r2, %r3, 0x9543;", 0x80112233, 0x44556677, 0x22667780 & 0x00FFFFFF),
        ("shf.l.wrap.b32 %r4, %r2, %r3, 36;", 0xA0000000, 1, 0x1A),
        ("shf.r.clamp.b32 %r4, %r2, %r3, 40;", 0, 0x12345678, 0x12345678),
        # -2 and 1 in halves, beside -1 and NaN: under it and not
        ("set.lt.u32.f16x2 %r4, %r2, %r3;", 0xC0003C00, 0xBC007E00, 0xFFFF0000),
        (
            "setp.eq.u32 %p3, 0, 0; setp.lt.xor.f16x2 %p1|%p2, %r2, %r3, %p3; selp.b32 %r5, 1, 0, %p1; selp.b32 %r6, 2, 0, %p2;"
            " or.b32 %r4, %r5, %r6;",
            0xC0003C00,
            0xBC007E00,
            1,
        ),
        ("popc.b32 %r4, %r2;", 0xF000000F, 0, 8),
        ("clz.b32 %r4, %r2;", 0x00010000, 0, 15),
        ("brev.b32 %r4, %r2;", 0x00000003, 0, 0xC0000000),
        ("fma.rn.f32 %r4, %r2, %r2, %r3;", bits(1 + 2.0**-12), bits(-1.0), bits(2.0**-11 + 2.0**-24)),
        ("add.ftz.f32 %r4, %r2, %r3;", bits(2.0**-126 * 1.5), bits(-(2.0**-126)), 0),
        ("max.f32 %r4, %r2, %r3;", bits(math.nan), bits(3.0), bits(3.0)),
        ("max.f32 %r4, %r2, %r3;", bits(-0.0), bits(0.0), bits(0.0)),
        ("min.f32 %r4, %r2, %r3;", bits(0.0), bits(-0.0), bits(-0.0)),
        ("ex2.approx.ftz.f32 %r4, %r2;", bits(-126.5), 0, 0),
        ("cvt.rni.s32.f32 %r4, %r2;", bits(2.5), 0, 2),
        ("cvt.rzi.s32.f32 %r4, %r2;", bits(-3e9), 0, 0x80000000),
        ("cvt.rzi.u32.f32 %r4, %r2;", bits(math.nan), 0, 0),
        ("cvt.rn.bf16x2.f32 %r4, %r2, %r3;", bits(1 + 2.0**-8), bits(1 + 3 * 2.0**-8), 0x3F803F82),
        ("cvt.rn.f16x2.f32 %r4, %r2, %r3;", bits(65520.0), bits(1.0), 0x7C003C00),
        ("cvt.rna.tf32.f32 %r4, %r2;", bits(1 + 2.0**-11), 0, bits(1 + 2.0**-10)),
        ("cvt.s32.s8 %r4, %r2;", 0x80, 0, 0xFFFFFF80),
        ("fma.rn.bf16x2 %r4, %r2, %r3, %r2;", 0x3F80C000, 0x40004000, 0x4040C0C0),
        ("setp.ne.f32 %p1, %r2, %r3; selp.b32 %r4, 1, 0, %p1;", bits(math.nan), bits(1.0), 0),
        ("setp.neu.f32 %p1, %r2, %r3; selp.b32 %r4, 1, 0, %p1;", bits(math.nan), bits(1.0), 1),
        (
            "mov.b32 {{%h1, %h2}}, %r2; mov.b32 %r4, {{%h2, %h1}};".replace("{{", "{").replace("}}", "}"),
            0x12345678,
            0,
            0x56781234,
        ),
    ],
)
def test_an_instruction_gives(body, a, b, expected):
    assert [f"{value:#x}" for value in run(body, [a], [b])] == [f"{expected:#x}"]


def test_threads_that_part_meet_again():
    body = """
    mov.b32 %r4, 7;
    setp.lt.u32 %p1, %r1, 5;
    @%p1 bra small;
    add.s32 %r4, %r1, 100;
    bra done;
small:
    add.s32 %r4, %r4, %r1;
done:
    shfl.sync.bfly.b32 %r4, %r4, 1, 31, -1;
    """
    values = [7 + i if i < 5 else 100 + i for i in range(32)]
    assert run(body, [0] * 32, [0] * 32) == [values[i ^ 1] for i in range(32)]


def test_a_loop_runs_as_often_as_each_thread_wants():
    body = "mov.b32 %r4, 0;\nagain:\nadd.s32 %r4, %r4, %r2;\nsetp.lt.s32 %p1, %r4, 10;\n@%p1 bra again;"
    assert run(body, [1, 3, 4, 10] * 8, [0] * 32) == [10, 12, 12, 10] * 8


def test_part_of_a_warp_may_not_shuffle_with_the_rest():
    body = "setp.lt.u32 %p1, %r1, 5;\n@%p1 bra done;\nshfl.sync.bfly.b32 %r4, %r2, 1, 31, -1;\ndone:"
    with pytest.raises(Deadlock, match="part of warp 0 reaches 'shfl"):
        run(body, [0] * 32, [0] * 32)


@pytest.mark.parametrize("barrier", ["", "bar.warp.sync -1;"])
def test_shared_memory_read_in_another_thread_of_the_warp_needs_the_warps_barrier(barrier):
    body = f"""
    mov.b32 %r5, global_smem;
    shl.b32 %r6, %r1, 2;
    add.s32 %r7, %r5, %r6;
    st.shared.b32 [%r7], %r1;
    {barrier}
    xor.b32 %r8, %r6, 124;
    add.s32 %r9, %r5, %r8;
    ld.shared.b32 %r4, [%r9];
    """
    if barrier:
        assert run(body, [0] * 32, [0] * 32) == list(range(31, -1, -1))
    else:
        with pytest.raises(Race, match="read after write of shared memory at 124, by thread 31"):
            run(body, [0] * 32, [0] * 32)


def test_threads_that_store_different_values_to_one_place_race_and_of_the_same_value_do_not():
    store = "mov.b32 %r5, global_smem;\nst.shared.b32 [%r5], {value};\nbar.sync 0;\nld.shared.b32 %r4, [%r5];"
    assert run(store.format(value="%r2"), [7] * 64, [0] * 64) == [7] * 64
    with pytest.raises(Race, match="write different values to shared memory at 0 in the same instruction"):
        run(store.format(value="%r1"), [7] * 64, [0] * 64)


def test_an_access_behind_the_end_of_shared_memory_is_seen():
    with pytest.raises(OutsideMemory, match="4 bytes at 1024 of shared memory, which has 1024"):
        run("mov.b32 %r5, global_smem;\nst.shared.b32 [%r5+1024], %r1;\nmov.b32 %r4, 0;", [0] * 32, [0] * 32)
