from __future__ import annotations

import pytest
from detr_fast.kernels import analysis
from detr_fast.kernels.attention_catalog import catalog_entries
from detr_fast.kernels.offline import compile_variant, older_compiler


# Cycles per score element in 16 bits at a head dimension of 32, reached: (whole blocks of visible keys, the last block).
@pytest.mark.offline
@pytest.mark.parametrize(
    ("target", "kernel", "most"),
    [
        ("sm_80", "forward", (0.067, 0.076)),
        ("sm_90", "forward", (0.067, 0.074)),
        ("sm_80", "queries", (0.094, 0.094)),
        ("sm_90", "queries", (0.074, 0.075)),
        ("sm_80", "keys", (0.126,)),
        ("sm_90", "keys", (0.082,)),
    ],
)
def test_attentions_inner_loops_take_as_few_cycles_as_documented(target, kernel, most):
    one = next(one for one in catalog_entries() if one.name == f"attention_{kernel}_hd32_bf16_padding")
    binary, _, _ = compile_variant(one.variant, target)
    code = analysis.disassemble(binary)
    loops = analysis.innermost_loops(code)[-len(most) :]  # before them, where there is one: the list of keys
    assert len(loops) == len(most)
    for loop, cycles in zip(loops, most):
        found = analysis.analyse_loop(loop, int(target[3:]), one.elements / one.variant.num_warps)
        assert found.cycles["tensor"] > 0.03
        # Two products, two waits: where an accumulator crosses from one pipelined loop to another, each instruction waits.
        assert found.opcodes["WARPGROUP.DEPBAR.LE"] <= 4
        assert found.cycles_per_element <= cycles * (1.2 if older_compiler() else 1)
