from __future__ import annotations

import pytest
from detr_fast.kernels.analysis import analyse, inner_loop, parse_sass

LISTING = """
.text.kernel:
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_1:
        /*0010*/                   LDG.E.128 R4, [R2.64] ;
.L_x_0:
        /*0020*/                   FFMA R1, R1, R2, R3 ;
        /*0030*/              @!P0 MUFU.EX2 R1, R1 ;
        /*0040*/                   HMMA.16816.F32 R4, R8, R10, R4 ;
        /*0050*/               @P1 BRA `(.L_x_0) ;
        /*0060*/                   IADD3 R1, R1, 0x1, RZ ;
        /*0070*/              @!P2 BRA `(.L_x_1) ;
        /*0080*/               @P2 BRA `(.L_x_2) ;
        /*0090*/                   SHFL.BFLY PT, R5, R4, 0x10, 0x1f ;
.L_x_2:
        /*00a0*/                   EXIT ;
.L_x_3:
        /*00b0*/                   BRA `(.L_x_3);
        /*00c0*/                   NOP;
"""


def test_the_innermost_loop_is_found():
    loop = inner_loop(parse_sass(LISTING))
    assert [one.opcode for one in loop] == ["FFMA", "MUFU.EX2", "HMMA.16816.F32", "BRA"]


def test_without_loops_the_whole_kernel_counts_up_to_its_last_exit():
    straight = "\n".join(line for line in LISTING.splitlines() if "L_x_0) " not in line and "L_x_1) " not in line)
    found = inner_loop(parse_sass(straight))
    assert found[0].opcode == "S2R"
    assert found[-1].opcode == "EXIT"


def test_each_pipe_is_charged_at_its_rate(monkeypatch):
    from detr_fast.kernels import analysis

    monkeypatch.setattr(analysis, "disassemble", lambda cubin: parse_sass(LISTING))
    found = analyse(b"", 80, elements_per_warp=32)
    assert found.instructions_per_element == 4.0
    # 4 warp instructions of 4 a clock; a multiply-add of 64 lanes a clock; an exponential of 16; 4,096 FLOPs of 2,048.
    expected = {"issue": 1.0, "fp32": 0.5, "special": 2.0, "tensor": 2.0}
    assert {pipe: cycles * 32 for pipe, cycles in found.cycles.items()} == expected
    assert found.bound == "special"
    assert found.cycles_per_element == 2.0 / 32
    assert found.dram_headroom(80, bytes_per_element=13.4) == pytest.approx(16.0)


@pytest.mark.parametrize(
    ("opcode", "pipe", "units"),
    [
        ("SHFL.BFLY", "shared", 128),
        ("LDG.E.128", "shared", 512),
        ("LDG.E.U16", "shared", 64),
        ("STS.64", "shared", 256),
        ("IMAD.WIDE.U32", "fp32", 32),
        ("LOP3.LUT", "integer", 32),
        ("F2FP.BF16.PACK_AB", "integer", 32),
        ("F2F.F16.F32", "special", 32),
        ("MUFU.RSQ", "special", 32),
        ("UIADD3", "control", 32),
        ("BAR.SYNC.DEFER_BLOCKING", "control", 32),
        ("HADD2.F32", "half", 32),
        ("HGMMA.64x128x16.F32", "tensor", 65536),
        ("HMMA.1688.F32", "tensor", 2048),
    ],
)
def test_opcodes_go_to_their_pipes(opcode, pipe, units):
    from detr_fast.kernels.analysis import _cost

    assert _cost(opcode) == (pipe, units)


def test_an_architecture_without_rates_is_refused():
    with pytest.raises(ValueError, match="no pipe rates for sm_75: choose one of sm_80"):
        analyse(b"", 75, 1.0)
