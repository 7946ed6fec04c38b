"""linear_cross_entropy's calls: what runs for them, what that launches, and what wrong ones are told. Results: test_linear_cross_entropy.py."""

from __future__ import annotations

import pytest
import torch
from detr_fast.kernels import product_tiles as kernels
from detr_fast.kernels.cross_entropy import cross_entropy_variant
from detr_fast.kernels.offline import compile_variant
from torch._subclasses.fake_tensor import FakeTensorMode

from detr_fast import dispatch, ops
from detr_fast.dispatch import use_backend
from detr_fast.ops import regimes
from detr_fast.ops.regimes import NEVER, Regime
from detr_fast.testing.counters import count
from tests.ops.test_linear_cross_entropy import inputs, interpreter, module


@pytest.mark.offline
@pytest.mark.parametrize("classes", [136, 32000])
@pytest.mark.parametrize(("weighted", "smoothed"), [(False, True), (True, False), (True, True)])
def test_what_the_catalog_leaves_out_compiles_without_spills(classes, weighted, smoothed):
    variant = cross_entropy_variant(classes, torch.bfloat16, weighted, True, smoothed)
    assert compile_variant(variant, "sm_90")[2].spills == 0


@pytest.mark.parametrize(("dtype", "blocks"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_a_block_takes_three_products_and_one_kernel_and_no_logits_are_kept(dtype, blocks):
    rows, features, classes = 8192, 64, 32000  # 256 MiB of logits are 2,048 rows in fp32
    x, weight = (torch.empty(n, features, device="meta", dtype=dtype, requires_grad=True) for n in (rows, classes))
    target = torch.empty(rows, device="meta", dtype=torch.int64)

    def step(x, weight, target):
        ops.linear_cross_entropy(x, weight, None, target).backward()

    with use_backend(linear_cross_entropy="triton"):
        ours = count(step, x, weight, target)
    assert ours.launches["cross_entropy_kernel"] == blocks
    products = {name: n for name, n in ours.launches.items() if "mm" in name}
    assert sum(products.values()) == 3 * blocks, products
    # From 16 bits, and added there.
    in_fp32 = [ours.launches[f"aten.{name}"] for name in ("mm.dtype", "addmm.dtype_out")]
    added = blocks - 1 if kernels.adds_without_memory() else 0  # on a GPU always
    assert in_fp32 == ([0, 0] if dtype == torch.float32 else [blocks - added, added])
    logits, both_gradients = 4 * rows * classes, 4 * (rows + classes) * features
    assert ours.saved_bytes <= both_gradients + 8 * rows + 64 < logits / 20


@pytest.mark.parametrize("without", ["ROCm", "an older PyTorch"])
def test_where_pytorch_has_no_product_from_16_bits_into_fp32_operands_are_converted(without, monkeypatch):
    if without == "ROCm":
        monkeypatch.setattr(torch.version, "hip", "7.0")
    else:
        monkeypatch.setattr(kernels, "_MM_OVERLOADS", ["default", "out"])
    kernels.sums_16_bits_in_fp32.cache_clear()
    a, b = (torch.empty(8, 4, device="meta", dtype=torch.float16) for _ in range(2))
    try:
        counted = count(lambda: kernels.plus_product(None, a.mT, b))
        assert not counted.launches["aten.mm.dtype"]
        assert counted.launches["aten.addmm_.default"] == 1
        assert kernels.plus_product(None, a.mT, b).dtype == torch.float32
    finally:
        kernels.sums_16_bits_in_fp32.cache_clear()


def test_what_the_kernel_does_not_take_is_told_with_the_reason():
    x, weight, bias, target = (t.to("meta") for t in inputs())
    with use_backend(linear_cross_entropy="triton"), pytest.raises(dispatch.BackendError, match="reduction 'none'"):
        ops.linear_cross_entropy(x.requires_grad_(), weight, bias, target, reduction="none")
    with use_backend(linear_cross_entropy="triton"), pytest.raises(dispatch.BackendError, match="give them one"):
        ops.linear_cross_entropy(x.half(), weight, bias, target)


def test_auto_materialises_small_logits_and_cuts_large_ones(monkeypatch):
    chosen = []
    monkeypatch.setattr(module, "WHOLE_ELEMENTS", 100)
    with dispatch.recording(lambda op, decision: chosen.append((decision.implementation.name, decision.reasons))):
        for rows in (7, 8):
            ops.linear_cross_entropy(*inputs(rows=rows))
    assert chosen[0][0] == "eager"
    assert "logits fit" in chosen[0][1]["chunked"]
    assert chosen[1][0] == "chunked"


@pytest.mark.parametrize("measured", [False, True])
def test_on_a_gpu_auto_takes_the_kernel_where_logits_are_not_kept_even_if_whole_ones_were_measured_faster(
    measured, monkeypatch
):
    entry = Regime("linear_cross_entropy", "sm_90", NEVER, NEVER, "") if measured else None
    monkeypatch.setattr(regimes, "find", lambda *_: entry)
    monkeypatch.setattr(dispatch, "architecture", lambda device: "sm_90")
    dispatch.forget_decisions()
    with FakeTensorMode():
        x, weight = (torch.empty(n, 8, device="cuda", dtype=torch.bfloat16).requires_grad_() for n in (4096, 32000))
        target = torch.empty(4096, device="cuda", dtype=torch.int64)
        chosen = [
            module.LINEAR_CROSS_ENTROPY.choose(x[:n], weight, None, target[:n], None, -100, reduction, 0.0).name
            for n, reduction in ((8, "mean"), (4096, "mean"), (4096, "none"))
        ]
    assert chosen == ["eager", "triton", "chunked"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(13, 5)}, r"x \(\.\.\., E\) and weight \(V, E\).*\(17, 6\) and \(13, 5\)"),
        ({"bias": torch.zeros(2)}, r"bias must be \(V,\) = \(13,\); got \(2,\)"),
        ({"target": torch.zeros(3, dtype=torch.int64)}, r"target must be .*\(17,\); got \(3,\)"),
        ({"class_weight": torch.zeros(3)}, r"class_weight must be \(V,\) = \(13,\); got \(3,\)"),
        ({"reduction": "avg"}, r"got reduction 'avg'; expected 'mean', 'sum' or 'none'"),
        ({"label_smoothing": 2.0}, r"label_smoothing must lie in \[0, 1\]; got 2\.0"),
    ],
)
def test_wrong_arguments_are_told_what_was_expected(change, message):
    x, weight, bias, target = inputs()
    with pytest.raises(ValueError, match=message):
        ops.linear_cross_entropy(**{"x": x, "weight": weight, "bias": bias, "target": target, **change})


@interpreter
@pytest.mark.parametrize("backend", ["triton", "chunked", "eager"])
def test_integers_of_any_width_are_targets_and_nothing_else_is(backend):
    x, weight, bias, target = inputs()
    with use_backend(linear_cross_entropy=backend):
        expected = ops.linear_cross_entropy(x, weight, bias, target)
        assert torch.equal(ops.linear_cross_entropy(x, weight, bias, target.int()), expected)
        with pytest.raises(TypeError, match=r"got target of torch.float32; expected integers"):
            ops.linear_cross_entropy(x, weight, bias, target.float())
