from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from detr_fast import dispatch
from detr_fast.dispatch import Call, Situation
from detr_fast.ops import linear_assignment, regimes, tuning, tuning_cases
from detr_fast.ops.feed_forward import FEED_FORWARD
from detr_fast.ops.linear_add_layer_norm import LINEAR_ADD_LAYER_NORM
from detr_fast.ops.qkv_projection import QKV_PROJECTION
from detr_fast.ops.regimes import NEVER, Regime
from detr_fast.ops.tuning import Timing, ceiling, threshold


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DETR_FAST_CACHE", str(tmp_path))
    regimes.known.cache_clear()
    yield tmp_path
    regimes.known.cache_clear()
    dispatch.forget_decisions()


def call(architecture="sm_90", regime="eager"):
    situation = Situation(regime, True, None, False, None)
    return Call(torch.device("cuda"), architecture, torch.bfloat16, torch.Tensor, True, situation)


def test_what_the_user_measured_decides_and_survives_a_restart():
    regimes.save([Regime("layer_norm", "sm_90", 1 << 20, 4096, "H100")])
    regimes.known.cache_clear()
    assert regimes.advice("layer_norm", call(), 1 << 20) is None
    assert "1 MiB" in regimes.advice("layer_norm", call(), (1 << 20) - 1)
    assert regimes.advice("layer_norm", call(regime="captured"), 4096) is None
    assert regimes.note("layer_norm", call()) is None


def test_the_nearest_architecture_counts_and_is_called_unmeasured():
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


def test_without_any_measurement_small_calls_stay_eager_unless_launches_are_free():
    assert "run detr-fast tune" in regimes.advice("layer_norm", call(), 1 << 20)
    assert regimes.advice("layer_norm", call(), 64 << 20) is None
    assert regimes.advice("layer_norm", call(regime="captured"), 1) is None


@pytest.mark.parametrize("content", ["", "{", '[{"op": 1}]', "[3]"])
def test_an_unreadable_cache_counts_as_empty(cache, content):
    (cache / "regimes.json").write_text(content)
    assert regimes.known() == regimes.SHIPPED


def test_the_threshold_is_where_the_kernel_wins_from_there_on():
    timings = [Timing(1, 1.0, 0.5), Timing(2, 1.0, 1.5), Timing(4, 1.0, 0.9), Timing(8, 1.0, 0.5)]
    assert threshold(timings) == 4
    assert threshold([Timing(8, 1.0, 1.1)]) == NEVER
    assert threshold([Timing(4, 1.0, 0.5), Timing(8, 1.0, 0.5, right=False)]) == NEVER


def test_the_ceiling_is_up_to_where_the_kernel_wins():
    timings = [Timing(1, 1.0, 0.5), Timing(2, 1.0, 0.9), Timing(4, 1.0, 1.5), Timing(8, 1.0, 0.5)]
    assert ceiling(timings) == 2
    assert ceiling(timings[:2]) == NEVER
    assert ceiling([Timing(1, 1.0, 0.5, right=False)]) == 0


def test_above_a_measured_ceiling_the_host_takes_over_unless_a_graph_is_captured():
    regimes.save([Regime("linear_assignment", "sm_90", 0, 0, "H100", eager_maximum=1000, unit=regimes.SCANS)])
    assert regimes.advice("linear_assignment", call(), 1000) is None
    assert regimes.advice("linear_assignment", call(), 1001) == (
        "above 1,000 row scans the host is faster (measured on sm_90)"
    )
    assert regimes.advice("linear_assignment", call(regime="captured"), 1001) is None


def test_tune_on_a_cpu_measures_from_where_on_assignment_is_worth_threads(cache, monkeypatch, capsys):
    from detr_fast.cli.tune import tune

    monkeypatch.setattr(tuning, "_interleaved", lambda step, *_, **__: step() and (1.0, 0.5))
    tune()
    (entry,) = [r for r in regimes.known() if r not in regimes.SHIPPED]
    assert (entry.op, entry.architecture, entry.eager_minimum) == ("linear_assignment", "cpu", 24 * 20**2 * 100)
    assert "48 × (20, 100) on the CPU: scipy 1.0000 ms, threads 0.5000 ms (2.00×)" in capsys.readouterr().out
    monkeypatch.setattr(sys.modules["detr_fast.ops.linear_assignment"], "_threads", lambda: 2)
    chosen = []
    with dispatch.recording(lambda op, decision: chosen.append(decision.implementation.name)):
        linear_assignment(torch.rand(24, 20, 100))
    assert chosen == ["threads"]


def test_bench_times_what_begins_with_a_name_and_writes_nothing(cache, monkeypatch, capsys):
    from detr_fast.cli.bench import bench
    from detr_fast.engine.errors import EngineError

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(tuning, "_interleaved", lambda step, *_, **__: step() and (1.0, 0.5))
    bench(["linear_assign"])
    told = capsys.readouterr().out
    assert "only assignment on this CPU" in told
    assert "24 × (50, 300) on the CPU: scipy 1.0000 ms, threads 0.5000 ms (2.00×)" in told
    assert regimes.known() == regimes.SHIPPED
    with pytest.raises(
        EngineError, match="named attention: there is linear_assignment on the CPU; PyTorch sees no GPU"
    ):
        bench(["attention"])


def test_what_cannot_be_measured_is_told_and_the_rest_is_measured(monkeypatch):
    def fails(*_):
        raise dispatch.BackendError("triton: out of registers\nand more")

    monkeypatch.setattr(tuning, "tune_group", lambda group, *_: Regime(group.regime, "sm_90", 0, 0, ""))
    for name in ("tune_layer_norm", "tune_linear_assignment"):
        monkeypatch.setattr(tuning, name, fails)
    for name in ("tune_matching_cost", "tune_threads"):
        monkeypatch.setattr(tuning, name, lambda *_: Regime("other", "sm_90", 0, 0, ""))
    told: list[str] = []
    measured = [regime.op for regime in tuning.tune(torch.device("cuda"), told.append)]
    assert measured == ["other", *(group.regime for group in tuning_cases.GROUPS), "other"]
    reason = "which stays as it was: BackendError: triton: out of registers"
    assert told == [f"FAILED layer_norm, {reason}", f"FAILED linear_assignment, {reason}"]


def test_tune_measures_whatever_the_dispatcher_asks_to_be_measured(monkeypatch):
    monkeypatch.setattr(tuning, "_against", lambda other, op, *_, **__: Regime(op, "sm_90", 0, 0, ""))
    for name in ("tune_linear_assignment", "tune_threads"):
        monkeypatch.setattr(tuning, name, lambda *_: Regime("linear_assignment", "sm_90", 0, 0, ""))
    for name in ("layer_norm_step", "matching_cost_step"):
        monkeypatch.setattr(tuning, name, lambda *_: None)
    monkeypatch.setattr(
        tuning, "tune_group", lambda group, *_: Regime(group.regime, "sm_90", 0, 0, "") if group.cases else None
    )
    measured = {regime.op for regime in tuning.tune(torch.device("cuda"))}
    asked = set()
    for file in Path(regimes.__file__).parent.glob("*.py"):
        asked |= set(re.findall(r'regimes\.(?:advice|note)\("(\w+)"', file.read_text()))
        asked |= set(re.findall(r'^    op = "(\w+)"', file.read_text(), re.MULTILINE))
    unmeasured = {"attention_varlen"}  # taken wherever it can be: the alternative is many launches
    assert asked - unmeasured <= measured
    assert {"attention", "attention_masked", "attention_atomics", "attention_atomics_few_queries"} <= measured


def test_measurements_are_added_to_those_that_there_are():
    regimes.save([Regime("layer_norm", "sm_90", 1, 1, "old"), Regime("layer_norm", "sm_80", 2, 2, "A100")])
    regimes.save([Regime("layer_norm", "sm_90", 3, 3, "new")])
    own = [r for r in regimes.known() if r not in regimes.SHIPPED]
    assert [(r.architecture, r.source) for r in own] == [("sm_90", "new"), ("sm_80", "A100")]


@pytest.mark.parametrize("group", tuning_cases.GROUPS, ids=lambda group: group.regime)
def test_a_case_counts_its_size_as_the_dispatcher_does(group, monkeypatch):
    _, size, make = group.cases[0]
    seen = []
    monkeypatch.setattr(dispatch, "architecture", lambda device: "sm_90")
    dispatch.forget_decisions()
    monkeypatch.setattr(regimes, "find", lambda op, _: Regime(op, "sm_90", 0, 0, ""))
    monkeypatch.setattr(regimes, "advice", lambda op, call, found, *_: seen.append((op, found)))
    with FakeTensorMode():
        make(torch.device("cuda"))  # calls the op once
    assert (group.regime, size) in seen


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
def on_sm_90(monkeypatch):
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
    assert "PyTorch is faster (measured on sm_90)" in product(op, 100)[1]
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


@pytest.mark.interpreter(int32_limit=1 << 16)  # a tile of rows as wide as the cases
@pytest.mark.parametrize(
    ("op", "alternative", "step"),
    [
        ("layer_norm", "eager", lambda device: tuning.layer_norm_step(device, 3, 256)),
        ("matching_cost", "eager", lambda device: tuning.matching_cost_step(device, 1, 3, 9)),
        ("linear_assignment", "threads", lambda device: tuning.assignment_step(device, 2, 3, 9)),
        ("add_layer_norm", "eager", lambda device: tuning_cases.add_layer_norm_step(device, 3)),
        ("attention", "sdpa", lambda device: tuning_cases.attention_step(device, 1, 4, 5, True)),
        ("attention", "sdpa", lambda device: tuning_cases.attention_step(device, 1, 5, 5, False)),
        ("feed_forward", "eager", lambda device: tuning_cases.feed_forward_step(device, 5, 64)),
        ("linear_add_layer_norm", "eager", lambda device: tuning_cases.linear_add_layer_norm_step(device, 5)),
        ("qkv_projection", "eager", lambda device: tuning_cases.qkv_projection_step(device, 5)),
        ("linear_cross_entropy", "eager", lambda device: tuning_cases.linear_cross_entropy_step(device, 5, 7)),
    ],
)
def test_what_tune_times_is_checked_first(op, alternative, step, monkeypatch):
    run = step(torch.device("cpu"))
    assert tuning.agree(run, op, alternative, "triton")
    wrong = iter(range(2))
    assert not tuning.agree(lambda: (torch.full((3,), next(wrong)),), op, alternative, "triton")
