"""What the machine code of attention's inner loops costs, in cycles per score element of the busiest pipe: see docs/attention.md."""

from __future__ import annotations

import pytest
import torch
from detr_fast.kernels import analysis
from detr_fast.kernels.attention import forward_variant
from detr_fast.kernels.attention_backward import keys_variant
from detr_fast.kernels.attention_catalog import GENERATIONS
from detr_fast.kernels.attention_problem import Form, Problem
from detr_fast.kernels.offline import compile_variant, older_compiler

from tests.attention_variants import VARIANTS


def check_loops(variant, target, most, older=1.29):
    """The last loops: before them, with a key padding mask, there is the one that lists or copies it.

    older: by how much an older compiler's may take more (in a backward on sm_90; 1.2 without dropout).
    """
    binary, _, resources = compile_variant(variant, target)
    assert older_compiler() or resources.spills == 0
    loops = analysis.innermost_loops(analysis.disassemble(binary))[-len(most) :]
    assert len(loops) == len(most)
    elements = variant.constants["BLOCK_M"] * variant.constants["BLOCK_N"] / variant.num_warps
    for loop, cycles in zip(loops, most):
        found = analysis.analyse_loop(loop, int(target[3:]), elements)
        assert found.cycles["tensor"] > 0.03
        # Few waits: where an accumulator crosses from one pipelined loop to another, each tensor core instruction waits.
        assert found.opcodes["WARPGROUP.DEPBAR.LE"] <= 5
        assert found.cycles_per_element <= cycles * (older if older_compiler() else 1)


# bf16 with a key padding mask, reached: (whole blocks of visible keys, the last block), or the one loop over queries.
@pytest.mark.offline
@pytest.mark.parametrize(
    ("target", "dim", "kernel", "most"),
    [
        ("sm_80", 32, "forward", (0.067, 0.073)),
        ("sm_80", 32, "queries", (0.094, 0.094)),
        ("sm_80", 32, "keys", (0.126,)),
        ("sm_80", 32, "atomics", (0.162,)),
        ("sm_80", 128, "queries", (0.376, 0.376)),
        ("sm_80", 128, "keys", (0.501,)),
        ("sm_90", 32, "forward", (0.067, 0.067)),
        ("sm_90", 32, "queries", (0.063, 0.063)),
        ("sm_90", 32, "keys", (0.074,)),
        ("sm_90", 32, "atomics", (0.097,)),
        ("sm_90", 64, "forward", (0.065, 0.081)),
        ("sm_90", 64, "queries", (0.094, 0.094)),
        ("sm_90", 64, "keys", (0.126,)),
        ("sm_90", 128, "forward", (0.126, 0.153)),
        ("sm_90", 128, "queries", (0.188, 0.188)),
        ("sm_90", 128, "keys", (0.251,)),
        ("sm_80", 64, "weights", (0.083,)),
    ],
)
def test_attentions_inner_loops_take_as_few_cycles_as_documented(target, dim, kernel, most):
    form = Form(torch.bfloat16, dim, dim, padding=True, generation=GENERATIONS.get(target, ""))
    check_loops(VARIANTS[kernel](form), target, most)


# In one stage 2.19 and 2.17.
@pytest.mark.offline
@pytest.mark.parametrize(("target", "dim", "most"), [("sm_80", 200, 1.22), ("sm_90", 256, 1.21)])
def test_keys_of_over_128_columns_are_read_ahead(target, dim, most):
    mask = {"mask": torch.float32, "mask_vector": 4}
    form = Form(torch.bfloat16, dim, dim, padding=True, **mask, generation=GENERATIONS[target])
    check_loops(keys_variant(form), target, (most,))


# bf16 with a float mask, no padding.
@pytest.mark.offline
@pytest.mark.parametrize(
    ("target", "kernel", "most"),
    [
        ("sm_80", "forward", 0.114),
        ("sm_90", "forward", 0.105),
        ("sm_80", "queries", 0.112),
        ("sm_90", "keys", 0.169),
        ("sm_80", "mask", 0.113),
        ("sm_90", "mask", 0.110),
    ],
)
def test_a_float_mask_costs_as_few_cycles_as_documented(target, kernel, most):
    form = Form(torch.bfloat16, 32, 32, mask=torch.bfloat16, mask_vector=8)
    check_loops(VARIANTS[kernel](form), target, (most,))


@pytest.mark.parametrize(
    ("batch", "tokens", "rows"),
    [(2, 1050, 64), (2, 850, 64), (4, 1050, 128), (8, 850, 128), (4, 1000, 128), (1, 4200, 128), (16, 850, 128)],
)
def test_dropouts_queries_have_the_tiles_that_multiprocessors_share_evenly(batch, tokens, rows):
    """2 and, of few tiles, 1 on the busiest of 132 with 128 rows, or 3 and 2 with 64; 3, 4, 2, 2 and 7, or 5, 7, 4, 4 and 14."""
    q = torch.empty(batch, tokens, 8, 32, dtype=torch.bfloat16, device="meta")
    options = {"seed": torch.empty(1, dtype=torch.int64, device="meta"), "generation": "hopper"}
    assert Problem(q, q, q, dropout_p=0.1, **options).form().config("queries").rows == rows
    assert Problem(q, q, q, generation="hopper").form().uneven is False


# bf16 with a mask whose rows start anywhere, as those of 49 columns, no padding.
@pytest.mark.offline
@pytest.mark.parametrize(
    ("target", "kernel", "mask", "most"),
    [
        ("sm_90", "forward", torch.bfloat16, 0.152),
        ("sm_90", "forward", torch.float32, 0.140),
        ("sm_80", "queries", torch.bfloat16, 0.143),
        ("sm_90", "keys", torch.bfloat16, 0.182),
        ("sm_90", "keys", torch.bool, 0.183),
        ("sm_80", "atomics", torch.bfloat16, 0.255),
        ("sm_80", "atomics", torch.bool, 0.336),
        ("sm_90", "mask", torch.bfloat16, 0.125),
    ],
)
def test_a_mask_that_is_loaded_one_by_one_costs_as_few_cycles_as_documented(target, kernel, mask, most):
    form = Form(torch.bfloat16, 32, 32, mask=mask, generation=GENERATIONS[target])
    check_loops(VARIANTS[kernel](form), target, (most,))


# bf16 with a float32 bias: of a window of 8 x 8, half of a tile of 128 queries would be of none.
@pytest.mark.offline
@pytest.mark.parametrize(("target", "kernel", "most"), [("sm_90", "forward", 0.120), ("sm_80", "queries", 0.143)])
def test_a_window_of_64_tokens_fills_its_tiles(target, kernel, most):
    tokens = torch.empty(2, 64, 4, 32, device="meta", dtype=torch.bfloat16)
    bias = torch.empty(4, 64, 64, device="meta")
    variant = VARIANTS[kernel](Problem(tokens, tokens, tokens, mask=bias, generation=GENERATIONS[target]).form())
    assert variant.constants["BLOCK_M"] == 64
    check_loops(variant, target, (most,))


# bf16 at a head dimension of 64, with dropout and a key padding mask.
@pytest.mark.offline
@pytest.mark.parametrize(
    ("target", "mask", "run", "most"),
    [("sm_80", torch.float32, 1, 0.260), ("sm_90", torch.bfloat16, 8, 0.188)],
)
def test_a_masks_gradient_with_padding_costs_as_few_cycles_as_documented(target, mask, run, most):
    generation = GENERATIONS[target]
    form = Form(torch.bfloat16, 64, 64, padding=True, dropout=True, mask=mask, mask_vector=run, generation=generation)
    check_loops(VARIANTS["mask"](form), target, (most,))


# bf16 at a head dimension of 64, with a mask in runs.
@pytest.mark.offline
@pytest.mark.parametrize(
    ("target", "kernel", "mask", "run", "dropout", "most"),
    [
        ("sm_80", "mask", torch.bfloat16, 8, False, 0.146),
        ("sm_80", "mask", torch.float32, 2, True, 0.204),
        ("sm_80", "forward", torch.float32, 2, False, 0.149),
        ("sm_90", "queries", torch.bfloat16, 8, False, 0.118),
        ("sm_90", "queries", torch.float32, 4, True, 0.158),
    ],
)
def test_a_mask_in_runs_at_64_costs_as_few_cycles_as_documented(target, kernel, mask, run, dropout, most):
    generation = GENERATIONS[target]
    form = Form(torch.bfloat16, 64, 64, dropout=dropout, mask=mask, mask_vector=run, generation=generation)
    check_loops(VARIANTS[kernel](form), target, (most,))


# 112 KB in 3 stages.
@pytest.mark.offline
@pytest.mark.parametrize("features", [{}, {"causal": True}, {"dropout": True}])
def test_the_forward_with_a_float32_mask_fits_the_99_kb_that_sm_86_has(features):
    form = Form(torch.bfloat16, 64, 64, mask=torch.float32, mask_vector=4, **features, generation="ampere")
    _, _, resources = compile_variant(forward_variant(form), "sm_86")
    assert resources.shared_memory <= 99 << 10


# bf16 with a bool mask, whose rows are whole runs of so many bytes, no padding. Triton 3.6 takes .137 for .103.
@pytest.mark.offline
@pytest.mark.parametrize(
    ("target", "kernel", "run", "most", "older"),
    [
        ("sm_80", "forward", 16, 0.130, 1.29),
        ("sm_90", "forward", 16, 0.103, 1.33),
        ("sm_90", "forward", 2, 0.124, 1.29),
        ("sm_90", "queries", 16, 0.105, 1.29),
        ("sm_90", "keys", 16, 0.220, 1.29),
    ],
)
def test_a_bool_mask_is_read_in_runs(target, kernel, run, most, older):
    form = Form(torch.bfloat16, 32, 32, mask=torch.bool, mask_vector=run)
    check_loops(VARIANTS[kernel](form), target, (most,), older)


# fp16 with dropout and a key padding mask: (blocks before the first hidden key, blocks with hidden keys).
@pytest.mark.offline
@pytest.mark.parametrize(
    ("target", "kernel", "most"),
    [
        ("sm_80", "forward", (0.081, 0.100)),
        ("sm_90", "forward", (0.075, 0.097)),
        ("sm_80", "queries", (0.094, 0.110)),
        ("sm_90", "queries", (0.084, 0.108)),
        ("sm_80", "keys", (0.126,)),
        ("sm_90", "keys", (0.099,)),
        ("sm_80", "atomics", (0.238,)),
        ("sm_90", "atomics", (0.135,)),
    ],
)
def test_dropout_costs_as_few_cycles_as_documented(target, kernel, most):
    generation = GENERATIONS.get(target, "")
    form = Form(torch.float16, 32, 32, padding=True, dropout=True, generation=generation)
    # There triton 3.6 packs 40 comparisons of a block with hidden keys into a register, and unpacks them: 0.242 for 0.161.
    check_loops(VARIANTS[kernel](form), target, most, 1.51 if (target, kernel) == ("sm_80", "queries") else 1.27)
