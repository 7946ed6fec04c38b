from __future__ import annotations

import itertools
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from detr_fast import dispatch, native
from detr_fast.dispatch import Call, Situation
from detr_fast.nn import layer_cases
from detr_fast.ops import regimes, tuning_cases
from detr_fast.ops.add_layer_norm import ADD_LAYER_NORM
from detr_fast.ops.attention import ATTENTION
from detr_fast.ops.feed_forward import FEED_FORWARD
from detr_fast.ops.layer_norm import LAYER_NORM
from detr_fast.ops.linear_add_layer_norm import LINEAR_ADD_LAYER_NORM
from detr_fast.ops.qkv_projection import QKV_PROJECTION
from detr_fast.ops.regimes import NEVER, Regime


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DETR_FAST_CACHE", str(tmp_path))
    regimes.known.cache_clear()
    yield tmp_path
    regimes.known.cache_clear()
    dispatch.forget_decisions()


def call(architecture="sm_90", regime="eager", needs_grad=True):
    situation = Situation(regime, True, None, False, None)
    return Call(torch.device("cuda"), architecture, torch.bfloat16, torch.Tensor, needs_grad, situation)


def test_what_the_user_measured_decides_and_survives_a_restart():
    regimes.save([Regime("layer_norm", "sm_90", 1 << 20, 4096, "H100")])
    regimes.known.cache_clear()
    assert regimes.advice("layer_norm", call(), 1 << 20) is None
    assert "1 MiB" in regimes.advice("layer_norm", call(), (1 << 20) - 1)
    assert regimes.advice("layer_norm", call(regime="captured"), 4096) is None
    assert regimes.note("layer_norm", call()) == "measured on H100"


def test_the_nearest_architecture_counts_and_is_called_unmeasured(unmeasured):
    regimes.save(
        [
            Regime("layer_norm", "sm_80", 1, 1, ""),
            Regime("layer_norm", "sm_120", 2, 2, ""),
            Regime("layer_norm", "gfx942", 3, 3, ""),
        ]
    )
    assert regimes.find("layer_norm", "sm_90").architecture == "sm_80"
    assert regimes.find("layer_norm", "gfx90a").architecture == "gfx942"
    assert "unmeasured on this GPU" in regimes.note("layer_norm", call("sm_90"))


def test_without_any_measurement_small_calls_stay_eager_unless_launches_are_free(unmeasured):
    assert "run detr-fast tune" in regimes.advice("layer_norm", call(), 1 << 20)
    assert regimes.advice("layer_norm", call(), 64 << 20) is None
    assert regimes.advice("layer_norm", call(regime="captured"), 1) is None


@pytest.mark.parametrize("content", ["", "{", '[{"op": 1}]', "[3]"])
def test_an_unreadable_cache_counts_as_empty(cache, content):
    (cache / "regimes.json").write_text(content)
    assert regimes.known() == regimes.SHIPPED


def test_above_a_measured_ceiling_the_host_takes_over_unless_a_graph_is_captured():
    regimes.save([Regime("linear_assignment", "sm_90", 0, 0, "H100", eager_maximum=1000, unit=regimes.SCANS)])
    assert regimes.advice("linear_assignment", call(), 1000) is None
    assert regimes.advice("linear_assignment", call(), 1001) == (
        "above 1,000 row scans PyTorch is faster (measured on sm_90: H100)"
    )
    assert "the host is faster" in regimes.advice("linear_assignment", call(), 1001, "the host")
    assert regimes.advice("linear_assignment", call(regime="captured"), 1001) is None


def test_in_a_graph_there_is_a_ceiling_of_its_own():
    regimes.save([Regime("attention_atomics", "sm_90", 0, 100, "H100", captured_maximum=1000)])
    found = [regimes.advice("attention_atomics", call(regime="captured"), size) for size in (99, 100, 1000, 1001)]
    assert [reason is None for reason in found] == [False, True, True, False]
    assert found[3] == "above 0.976562 KiB of input PyTorch is faster in a CUDA graph (measured on sm_90: H100)"
    assert regimes.advice("attention_atomics", call(), 1001) is None


def test_what_lost_at_all_sizes_is_said_so():
    regimes.save([Regime("layer_norm", "sm_90", NEVER, 0, "H100")])
    assert regimes.advice("layer_norm", call(), 1 << 40) == "at all sizes PyTorch is faster (measured on sm_90: H100)"


def test_calls_without_gradients_have_measurements_of_their_own_where_there_are():
    regimes.save(
        [Regime("layer_norm", "sm_90", 100, 100, "both"), Regime("layer_norm_inference", "sm_90", 9, 9, "forward")]
    )
    assert regimes.advice("layer_norm", call(needs_grad=False), 9) is None
    assert "(measured on sm_90: both)" in regimes.advice("layer_norm", call(), 9)
    regimes.save([Regime("matching_cost", "sm_90", 7, 7, "neither")])
    assert regimes.note("matching_cost", call(needs_grad=False)) == "measured on neither"


def test_another_architectures_measurement_without_gradients_does_not_outrank_this_ones(unmeasured):
    regimes.save([Regime("layer_norm", "sm_90", 1, 1, "here"), Regime("layer_norm_inference", "sm_80", 2, 2, "there")])
    assert regimes.note("layer_norm", call(needs_grad=False)) == "measured on here"


@pytest.mark.parametrize("op", ["encoder_layer", "qkv_projection", "attention_masked", "detection_losses"])
def test_what_was_launched_as_here_counts_and_in_a_graph_the_latest(op, monkeypatch):
    monkeypatch.setattr(native, "host", None)
    assert regimes.find(op, "sm_90").host == "python"
    assert regimes.find(op, "sm_90", captured=True).host == "c++"
    assert regimes.find("rotary_embedding", "sm_90") is None  # there is no other
    assert regimes.find("rotary_embedding", "sm_90", captured=True).host == "c++"
    with monkeypatch.context() as there:
        there.setattr(native, "host", SimpleNamespace(forget=lambda: None))
        assert regimes.find(op, "sm_90").host == "c++"
        assert regimes.find(op, "sm_90", captured=True).host == "c++"
        regimes.save([Regime(op, "sm_90", 5, 5, "the user's own, launched from Python")])
        assert regimes.find(op, "sm_90").eager_minimum == 5


MEASURED = sorted((Path(regimes.__file__).parent / "measured").glob("*.json"))


@pytest.mark.parametrize("path", MEASURED, ids=lambda path: path.stem)
def test_what_is_shipped_of_a_gpu_is_well_formed_and_counts(path):
    entries = regimes.read(path)
    assert entries
    architecture, _, host = path.stem.partition("-")
    own = [r for r in entries if r.architecture == architecture]
    assert {r.architecture for r in entries} <= {architecture, "cpu"}
    assert not host or {r.host for r in own} == {host}
    assert len({r.op for r in own}) == len(own)
    assert set(own) <= set(regimes.SHIPPED)
    groups = (*tuning_cases.GROUPS, *layer_cases.GROUPS)
    asked = {name for group in groups for name in group.ours.values()} | {"linear_assignment", regimes.OVERLAP}
    for entry in own:
        assert entry.op in asked
        assert 0 <= entry.eager_minimum <= entry.eager_maximum
        assert 0 <= entry.captured_minimum <= entry.captured_maximum
        assert re.match(r".+, torch \d+\.\d+\S*, \w+ \d{4}$", entry.source)
    (of_a_cpu,) = (r for r in regimes.SHIPPED if r.architecture == "cpu")  # not this file's machine's
    assert of_a_cpu.source.startswith("two cores")


def test_an_h100_needs_no_tuning_and_explain_names_what_was_measured(monkeypatch):
    from detr_fast.explanation import explaining
    from detr_fast.ops.add_layer_norm import add_layer_norm

    monkeypatch.setattr(dispatch, "architecture", lambda device: "sm_90")
    dispatch.forget_decisions()
    with FakeTensorMode(), explaining() as records:
        for rows in (1, 1 << 20):
            x = torch.empty(rows, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            add_layer_norm(x, x, x[0], x[0])
    few, many = map(str, records)
    assert re.search(
        r"-> eager  \[not triton: below .* PyTorch is faster \(measured on sm_90: NVIDIA H\w+, torch ", few
    )
    assert re.search(r"-> triton \(measured on NVIDIA H\w+, torch ", many)


def test_measurements_are_added_to_those_that_there_are():
    regimes.save([Regime("layer_norm", "sm_90", 1, 1, "old"), Regime("layer_norm", "sm_80", 2, 2, "A100")])
    regimes.save([Regime("layer_norm", "sm_90", 3, 3, "new")])
    own = [r for r in regimes.known() if r not in regimes.SHIPPED]
    assert [(r.architecture, r.source) for r in own] == [("sm_90", "new"), ("sm_80", "A100")]


PRODUCTS = {one.name: one for one in (FEED_FORWARD, LINEAR_ADD_LAYER_NORM, QKV_PROJECTION)}
DETR_ROWS = (100, 850, 2 * 850, 16 * 850)


def product(op, rows, width=256, hidden=2048, dtype=torch.bfloat16):
    """A call of the op, as a layer's kernels are asked for: what it takes on a GPU, and why not the kernel."""

    def draw(*shape):
        return torch.empty(shape, device="cuda", dtype=dtype)

    x, square, row = draw(rows, width), draw(width, width), draw(width)
    calls = {
        "linear_add_layer_norm": (x, square, row, x, row, row, 1e-5, 0.1, False),
        "qkv_projection": (x, draw(3 * width, width), draw(3 * width), None, 0),
        "feed_forward": (
            *(x, draw(hidden, width), draw(hidden), draw(width, hidden), row, row, row),
            *(1e-5, "relu", 0.1, 0.1, None, False),
        ),
    }
    kernel = PRODUCTS[op].kernel(*calls[op])
    return "parts" if kernel is None else kernel.name, PRODUCTS[op]._decision(*calls[op]).reasons.get("triton", "")


@pytest.fixture
def on_sm_90(monkeypatch, unmeasured):
    monkeypatch.setattr(dispatch, "architecture", lambda device: "sm_90")
    dispatch.forget_decisions()
    with FakeTensorMode():
        yield


@pytest.mark.parametrize("rows", DETR_ROWS)
@pytest.mark.parametrize("op", PRODUCTS)
def test_a_product_is_never_chosen_unmeasured_not_even_by_another_architectures_measurement(on_sm_90, op, rows):
    assert product(op, rows)[0] == "parts"
    regimes.save([Regime(op, architecture, 0, 0, "") for architecture in ("sm_80", "sm_100")])
    assert product(op, rows) == (
        "parts",
        "a matrix product against cuBLAS stays eager until measured: run detr-fast tune",
    )


@pytest.mark.parametrize("op", PRODUCTS)
def test_a_product_is_chosen_from_the_number_of_rows_on_at_which_it_was_measured_to_win(on_sm_90, op):
    regimes.save([Regime(op, "sm_90", 850 * 256 * 2, 0, "H100")])
    assert [product(op, rows)[0] for rows in DETR_ROWS] == ["parts", "triton", "triton", "triton"]
    assert "PyTorch is faster (measured on sm_90: H100)" in product(op, 100)[1]
    regimes.save([Regime(op, "sm_90", NEVER, NEVER, "measured to lose")])
    assert {product(op, rows)[0] for rows in DETR_ROWS} == {"parts"}


@pytest.mark.parametrize("op", PRODUCTS)
def test_autocast_counts_a_products_size_in_the_dtype_that_was_measured(on_sm_90, op):
    regimes.save([Regime(op, "sm_90", 850 * 256 * 2, 0, "H100")])
    torch.set_autocast_enabled("cuda", True)  # `torch.autocast` wants a GPU
    try:
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        assert [product(op, rows, dtype=torch.float32)[0] for rows in (849, 850)] == ["parts", "triton"]
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.set_autocast_dtype("cuda", torch.float16)


@pytest.mark.parametrize("op", PRODUCTS)
def test_a_product_is_chosen_for_nothing_wider_nor_in_other_dtypes_than_measured(on_sm_90, op):
    regimes.save([Regime(op, "sm_90", 0, 0, "H100")])
    assert product(op, 850)[0] == product(op, 850, dtype=torch.float16)[0] == "triton"
    assert product(op, 850, width=1024)[0] == "parts"
    assert "cuBLAS" in product(op, 850, dtype=torch.float32)[1]
    if op == "feed_forward":
        assert product(op, 850, hidden=4096) == (
            "parts",
            "4096 hidden units: measured, and chosen, up to 2048; ask for it by name",
        )


def test_the_feed_forwards_that_trade_time_for_memory_are_never_chosen(on_sm_90):
    regimes.save([Regime("feed_forward", "sm_90", 0, 0, "H100")])
    for one in FEED_FORWARD.implementations[1:3]:
        assert one.name in ("triton_recompute", "triton_one_kernel")
        assert "by name" in one.advice(None)


def calls_on_a_gpu(size, trained):
    """One of each op that leaves early, of `size` rows, images or both; trained: of tensors that want a gradient."""

    def draw(*shape):
        return torch.empty(shape, device="cuda", dtype=torch.bfloat16, requires_grad=trained)

    x, square, row = draw(size, 256), draw(256, 256), draw(256)
    yield LAYER_NORM, (x, (256,), row, row, 1e-5)
    yield ADD_LAYER_NORM, (x, x, row, row, 1e-5, 0.1, False)
    yield LINEAR_ADD_LAYER_NORM, (x, square, row, x, row, row, 1e-5, 0.1, False)
    yield QKV_PROJECTION, (x, draw(768, 256), draw(768), None, 0)
    hidden = (draw(2048, 256), draw(2048), draw(256, 2048), row, row, row)
    yield FEED_FORWARD, (x, *hidden, 1e-5, "relu", 0.1, 0.1, None, False)
    for queries, dim, dropout_p in ((850, 32, 0.0), (850, 32, 0.1), (100, 32, 0.0), (850, 64, 0.0)):
        q, k = (draw(-(-size // 850), n, 256 // dim, dim) for n in (queries, 850))
        for padding in (None, torch.empty(k.shape[:2], dtype=torch.bool, device="cuda")):
            yield ATTENTION, (q, k, k, padding, None, False, dropout_p, None, False, False, None)


@pytest.mark.parametrize("measured", [[], [0, 0, NEVER], [1 << 20, 1 << 24, NEVER], [NEVER, NEVER, 1 << 22]], ids=str)
@pytest.mark.parametrize(("gradients", "trained"), [(True, True), (True, False), (False, True)])
def test_what_leaves_before_a_key_is_built_would_have_been_left_to_pytorch_anyway(
    on_sm_90, measured, gradients, trained
):
    names = [op.name for op in (LAYER_NORM, ADD_LAYER_NORM, *PRODUCTS.values())]
    names += [
        f"attention{mask}{size}" for mask in ("", "_masked") for size in ("", "_dropout", "_few_queries", "_wide")
    ]
    minima = zip(names, itertools.cycle(measured))
    regimes.save(
        [Regime(name, "sm_90", least, 0, "H100") for name, least in minima if least < NEVER or "att" not in name]
    )
    without = [regimes.inference(name) for name in ("layer_norm", "attention_masked", "attention_dropout")]
    regimes.save([Regime(name, "sm_90", 1 << 16, 0, "H100") for name in without if measured])
    left = kept = 0
    for rows in (1, 850, 4 * 850, 64 * 850, 512 * 850):
        for op, arguments in calls_on_a_gpu(rows, trained):
            with torch.set_grad_enabled(gradients):
                chosen = op._decision(*arguments).implementation
                early = op._leaves(arguments)
                assert not early or chosen is op.choose(*arguments)
                left, kept = left + early, kept + (not early and chosen.name == "triton")
                with dispatch.recording(lambda *_: None):  # who wants to know hears why
                    assert not op._leaves(arguments)
    assert left > 2
    assert kept > 2 or not measured
