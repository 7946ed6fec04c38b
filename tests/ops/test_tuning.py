"""What `tune` measures, and what it makes of the times."""

from __future__ import annotations

import re
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from detr_fast.kernels import launch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.hardware import DEVICE
from detr_fast import capture, dispatch, ops
from detr_fast.nn import layer_cases
from detr_fast.ops import cast_cases, linear_assignment, optimizer_cases, regimes, tuning, tuning_cases, tuning_groups
from detr_fast.ops.pointwise_affine import measured_as
from detr_fast.ops.regimes import NEVER, Regime
from detr_fast.ops.tuning import Timing, common, interval
from tests.stub_cuda import stubs

EVERYTHING = (*tuning_cases.GROUPS, *layer_cases.GROUPS)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DETR_FAST_CACHE", str(tmp_path))
    regimes.known.cache_clear()
    yield tmp_path
    regimes.known.cache_clear()
    dispatch.forget_decisions()


def of(*factors, wrong=()):
    """Timings at the sizes 1, 2, 4, … at which the kernel is so many times as fast."""
    return [Timing(2**i, factor, 1.0, i not in wrong) for i, factor in enumerate(factors)]


@pytest.mark.parametrize(
    ("timings", "found"),
    [
        (of(1.2, 1.5, 1.1), (0, NEVER)),
        (of(0.7, 0.9, 1.1, 2.0), (4, NEVER)),
        (of(1.1, 1.05, 0.8, 0.7), (0, 2)),
        (of(0.8, 1.3, 0.9), (2, 2)),
        (of(0.5, 0.9), (NEVER, NEVER)),
        (of(), (NEVER, NEVER)),
        (of(1.0, 1.0), (0, NEVER)),  # no slower
    ],
)
def test_the_kernel_is_taken_from_where_and_up_to_where_it_wins(timings, found):
    assert interval(reversed(timings)) == found


def test_a_small_loss_among_gains_turns_nothing_off_but_at_the_ends_it_does():
    assert interval(of(1.3, 0.97, 1.4)) == (0, NEVER)
    assert interval(of(0.97, 1.3, 0.97, 0.97)) == (2, 2)
    assert interval(of(1.01, 0.96, 1.01)) == (0, 1)  # what is lost between is more than either end gains


def test_a_large_loss_or_a_wrong_result_ends_a_run_and_the_run_that_gains_most_counts():
    assert interval(of(1.5, 0.9, 1.2, 1.2)) == (0, 1)
    assert interval(of(1.5, 0.9, 1.3, 1.3)) == (4, NEVER)
    assert interval(of(2.0, 2.0, 2.0, 1.1, wrong=[1])) == (4, NEVER)
    assert interval(of(2.0, wrong=[0])) == (NEVER, NEVER)


def test_of_two_intervals_only_sizes_in_both_count():
    assert common((0, 5), (3, NEVER)) == (3, 5)
    assert common((0, NEVER), (4, 4)) == (4, 4)
    assert common((0, 2), (3, NEVER)) == common((NEVER, NEVER), (0, 7)) == (NEVER, NEVER)


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


def test_tune_names_a_folder_that_it_cannot_write_before_it_measures(tmp_path, monkeypatch):
    from detr_fast.cli.tune import tune
    from detr_fast.engine.errors import ConfigError

    def measured(*_, **__):
        raise AssertionError("measured in vain")

    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DETR_FAST_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(tuning, "tune", measured)
    with pytest.raises(
        ConfigError, match=r"cannot write .*regimes.json: .*; set DETR_FAST_CACHE to a folder that you may"
    ):
        tune()


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

    def measured_group(group, *_):
        return fails() if group.regime == "layer_norm" else [Regime(n, "sm_90", 0, 0, "") for n in group.ours.values()]

    monkeypatch.setattr(tuning, "tune_group", measured_group)
    monkeypatch.setattr(tuning, "tune_overlap", lambda *_: [])
    monkeypatch.setattr(tuning, "tune_linear_assignment", fails)
    monkeypatch.setattr(tuning, "tune_threads", lambda *_: [Regime("other", "cpu", 0, 0, "")])
    for name, value in stubs().items():
        monkeypatch.setattr(torch.cuda, name, value)
    told: list[str] = []
    measured = [regime.op for regime in tuning.tune(torch.device("cuda"), told.append)]
    assert measured == [*(name for group in tuning_cases.GROUPS[1:] for name in group.ours.values()), "other"]
    reason = "which stays as it was: BackendError: triton: out of registers"
    assert told == [f"FAILED layer_norm, {reason}", f"FAILED linear_assignment, {reason}"]


def test_tune_measures_whatever_the_dispatcher_asks_to_be_measured():
    names = [name for group in EVERYTHING for name in group.ours.values()]
    assert len(names) == len(set(names))
    measured = {*names, "linear_assignment"}
    asked = set()
    for file in Path(regimes.__file__).parent.glob("*.py"):
        asked |= set(re.findall(r'regimes\.(?:advice|note)\("(\w+)"', file.read_text()))
        asked |= set(re.findall(r'^    op = "(\w+)"', file.read_text(), re.MULTILINE))
        asked |= set(re.findall(r'LayerOp\("(\w+)"\)', file.read_text()))
    unmeasured = {"attention_varlen"}  # taken wherever it can be: the alternative is many launches
    assert asked - unmeasured <= measured


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("dim", [32, 64])
@pytest.mark.parametrize("queries", [100, 850])
@pytest.mark.parametrize("gradients", [False, True])
def test_every_kind_of_attention_that_is_told_apart_is_measured(
    monkeypatch, masked, dropout_p, dim, queries, gradients
):
    measured = {name for group in tuning_cases.GROUPS for name in group.ours.values()}
    asked = []
    monkeypatch.setattr(dispatch, "architecture", lambda device: "sm_90")
    dispatch.forget_decisions()
    monkeypatch.setattr(regimes, "find", lambda op, *_: Regime(op, "sm_90", 0, 0, ""))
    monkeypatch.setattr(regimes, "advice", lambda op, *_: asked.append(op) or "against")
    with FakeTensorMode():
        lengths = (queries, 850, 850)
        q, k, v = (
            torch.empty(2, n, 4, dim, device="cuda", dtype=torch.bfloat16, requires_grad=gradients) for n in lengths
        )
        padding = torch.zeros(2, 850, device="cuda", dtype=torch.bool) if masked else None
        ops.attention(q, k, v, key_padding_mask=padding, dropout_p=dropout_p)
    assert len(asked) == 1 + gradients  # atomics, too, where there is a backward
    assert set(asked) <= measured


@contextmanager
def where_it_runs(group, monkeypatch):
    """As in a capture of ours, where the group is of what runs there alone."""
    if not group.graphs_only:
        yield
        return
    with monkeypatch.context() as patch, capture.set_aside(torch.device("cpu"), **{group.op: 1 << 20}):
        patch.setattr(capture._thread, "behind", [])
        patch.setattr(dispatch, "situation", lambda kind: dispatch.Situation("captured", True, None, False, None))
        yield


def test_a_kernel_is_timed_beside_what_auto_would_take_without_it(monkeypatch):
    """No kernel is chosen where all are said to lose: what then runs is each case's alternative."""
    monkeypatch.setattr(dispatch, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(regimes, "find", lambda op, *_: Regime(op, "sm_90", NEVER, NEVER, "lost"))
    dispatch.forget_decisions()
    for group in tuning_cases.GROUPS:
        for case in (group.cases[0], group.cases[-1]):
            chosen = {}
            with (
                where_it_runs(group, monkeypatch),
                FakeTensorMode(),
                dispatch.recording(lambda op, d, chosen=chosen: chosen.setdefault(op, d)),
            ):
                case.make(torch.device("cuda"), gradients=False)()
            name = chosen[group.op].implementation.name
            assert name == case.other or (name == "its parts" and case.other == "eager"), group.regime


def test_bottlenecks_are_timed_beside_what_auto_would_take_without_their_kernels(monkeypatch):
    monkeypatch.setattr(dispatch, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(regimes, "find", lambda op, *_: Regime(op, "sm_90", NEVER, NEVER, "lost"))
    monkeypatch.setattr(torch.autograd, "grad", lambda *_: ())  # a fake GPU's backward needs a driver
    dispatch.forget_decisions()
    for case in (case for group in layer_cases.GROUPS if group.op == "bottlenecks" for case in group.cases):
        chosen = {}
        with FakeTensorMode(), dispatch.recording(lambda op, d, chosen=chosen: chosen.setdefault(op, d)):
            case.make(torch.device("cuda"), gradients=True)()
        assert chosen["bottlenecks"].implementation.name == case.other, case.text


def test_products_of_pixels_are_measured_without_gradients_too_as_frozen_blocks_take_them():
    measured = {name for group in EVERYTHING for name in group.ours.values()}
    kinds = [(residual, inside) for residual in (False, True) for inside in (64, 512)]
    assert {regimes.inference(measured_as(residual, n, 4 * n)) for residual, n in kinds} <= measured


@pytest.mark.parametrize("group", EVERYTHING, ids=lambda group: group.regime)
def test_a_case_counts_its_size_as_the_dispatcher_does(group, monkeypatch):
    case = group.cases[0]
    seen = []
    monkeypatch.setattr(dispatch, "architecture", lambda device: "sm_90")
    dispatch.forget_decisions()
    monkeypatch.setattr(regimes, "find", lambda op, *_: Regime(op, "sm_90", 0, 0, ""))
    monkeypatch.setattr(regimes, "advice", lambda op, call, found, *_: seen.append((op, found)))
    monkeypatch.setattr(torch.autograd, "grad", lambda *_: ())  # a fake GPU's backward needs a driver
    with where_it_runs(group, monkeypatch), FakeTensorMode():
        case.make(torch.device("cuda"), gradients=group.gradients)()
    assert (group.regime.removesuffix("_inference"), case.size) in seen


def test_times_in_a_graph_are_those_of_one_of_its_calls(monkeypatch):
    calls, replays = [], []
    for name, value in stubs().items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(tuning, "_milliseconds", lambda run, repeats: replays.append(repeats) or 16.0)
    step, backends = lambda: calls.append(0), ("scipy", "threads")
    assert tuning._interleaved(step, "linear_assignment", backends, captured=True, repeats=8) == (2.0, 2.0)
    assert len(calls) == 2 * (1 + 8)
    assert tuning._interleaved(step, "linear_assignment", backends, repeats=8) == (16.0, 16.0)
    assert set(replays) == {2, 8}


def test_what_is_launched_eagerly_is_timed_without_waking_autograds_thread(monkeypatch):
    woken = []
    step = lambda: woken.append(torch.autograd.is_multithreading_enabled())  # noqa: E731
    tuning._interleaved(step, "linear_assignment", ("scipy", "threads"), repeats=1)
    assert woken == [True] * 6 + [False] * 2 * tuning._ROUNDS  # three calls of each warm up


@pytest.mark.interpreter(int32_limit=1 << 18)  # all gradients of the heads in one row
@pytest.mark.parametrize(
    ("op", "alternative", "step"),
    [
        ("layer_norm", "eager", lambda device: tuning_cases.layer_norm_step(device, 3)),
        ("rms_norm", "eager", lambda device: tuning_cases.rms_norm_step(device, 3)),
        ("add_rms_norm", "eager", lambda device: tuning_cases.add_rms_norm_step(device, 3)),
        ("gated_activation", "eager", lambda device: tuning_cases.gated_activation_step(device, 3)),
        ("matching_cost", "eager", lambda device: tuning_cases.matching_cost_step(device, 1, 3, 9)),
        ("deformable_attention", "eager", lambda device: tuning_cases.deformable_attention_step(device, 1, 2)),
        ("deformable_attention", "eager", lambda device: tuning_cases.from_offsets_step(device, 1, 2)),
        ("linear_assignment", "threads", lambda device: tuning.assignment_step(device, 2, 3, 9)),
        ("add_layer_norm", "eager", lambda device: tuning_cases.add_layer_norm_step(device, 3)),
        ("attention", "sdpa", lambda device: tuning_cases.attention_step(device, 1, 4, 5, 8, True)),
        ("attention", "sdpa", lambda device: tuning_cases.attention_step(device, 1, 5, 5, 4, False)),
        ("feed_forward", "eager", lambda device: tuning_cases.feed_forward_step(device, 5)),
        ("linear_add_layer_norm", "eager", lambda device: tuning_cases.linear_add_layer_norm_step(device, 5)),
        ("qkv_projection", "eager", lambda device: tuning_cases.qkv_projection_step(device, 5)),
        ("optimizer_step", "eager", lambda device: optimizer_cases.checked_step(device, 1, 8, 16)),
        ("cast_together", "eager", lambda device: cast_cases.cast_step(device, 1, 8, 16)),
        ("prediction_heads", "eager", lambda device: tuning_cases.prediction_heads_step(device, 3)),
        ("linear_cross_entropy", "eager", lambda device: tuning_cases.linear_cross_entropy_step(device, 5, 7)),
    ],
)
def test_what_tune_times_is_checked_first(op, alternative, step, monkeypatch):
    for name, value in {"HIDDEN": 64, "PYRAMID": ((2, 3), (1, 2), (1, 1), (1, 1)), "PIXELS": 10}.items():
        monkeypatch.setattr(tuning_cases, name, value)
    run = step(torch.device("cpu"))
    assert tuning.agree(run, op, alternative, "triton")
    wrong = iter(range(2))
    assert not tuning.agree(lambda: (torch.full((3,), next(wrong)),), op, alternative, "triton")


def test_what_runs_in_graphs_alone_is_timed_there_alone(monkeypatch):
    monkeypatch.setattr(dispatch, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(tuning, "source", lambda device: "a test")
    monkeypatch.setattr(tuning, "agree", lambda *_: True)
    timed = []
    monkeypatch.setattr(tuning, "_interleaved", lambda *_, captured, repeats: timed.append(captured) or (2.0, 1.0))
    (group,) = (one for one in tuning_cases.GROUPS if one.graphs_only)
    cases = tuple(replace(case, make=lambda *_, gradients: None) for case in group.cases)
    (found,) = tuning.tune_group(replace(group, cases=cases), torch.device("cuda"), lambda text: None)
    assert timed == [True] * len(cases)
    assert (found.eager_minimum, found.captured_minimum) == (NEVER, 0)


def test_launches_overlap_where_that_gains_and_changes_no_bit(monkeypatch):
    monkeypatch.setattr(dispatch, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(tuning, "source", lambda device: "a test")
    groups = [next(g for g in EVERYTHING if g.op == op and g.gradients) for op in ("attention", "encoder_layer")]

    def tune(times, results=((1.0,), (1.0,)), steady=(True, True)):
        """times: of the first and the second group, one by one and overlapping. steady: whether replays give the same, likewise."""
        left = iter([torch.tensor(one) for one in results * 2])
        clock = {(i, j): times[i][j] for i in range(2) for j in range(2)}
        made = []

        def replayed(group, case, device, overlapping):
            made.append((groups.index(group), int(overlapping)))
            return made[-1], [next(left)], steady[overlapping]

        monkeypatch.setattr(tuning, "_replayed", replayed)
        monkeypatch.setattr(tuning, "_milliseconds", lambda replay, repeats: clock[replay])
        lines = []
        (found,) = tuning.tune_overlap(groups, torch.device("cuda"), lines.append)
        assert len(lines) == 2
        return found

    assert tune([(1.0, 0.8), (1.0, 1.02)]).captured_minimum == 0
    assert tune([(1.0, 1.01), (1.0, 1.0)]).captured_minimum == NEVER
    assert tune([(1.0, 0.5), (1.0, 1.1)]).captured_minimum == NEVER
    assert tune([(1.0, 0.5), (1.0, 0.5)], ((1.0,), (1.0000001,))).captured_minimum == NEVER
    atomics = (False, False)
    assert tune([(1.0, 0.5), (1.0, 0.5)], ((1.0,), (1.0000001,)), atomics).captured_minimum == 0
    assert tune([(1.0, 0.5), (1.0, 0.5)], ((1.0,), (1.1,)), atomics).captured_minimum == NEVER
    assert tune([(1.0, 0.5), (1.0, 0.5)], steady=(True, False)).captured_minimum == NEVER
    monkeypatch.setattr(dispatch, "architecture", lambda device: "sm_89")
    assert tuning.tune_overlap(groups, torch.device("cuda")) == []


def test_results_that_are_compared_hold_no_graph_of_autograds(monkeypatch):
    monkeypatch.setattr(tuning, "_captured", lambda step, calls, first: step() and (lambda: None))
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: nullcontext())
    x = torch.ones(4, requires_grad=True)
    case = tuning_groups.Case("four numbers", 4, lambda device, gradients: lambda: (x * 2).split(2))
    group = tuning_groups.Group("layer_norm", (case,), kernel="eager")
    _, found, steady = tuning._replayed(group, case, torch.device("cpu"), overlapping=True)
    assert steady
    assert [(t.tolist(), t.requires_grad) for t in found] == [([2.0, 2.0], False)] * 2


def test_launches_overlap_on_the_very_architecture_where_they_were_measured_to_be_faster(cache, monkeypatch):
    forgotten = []
    monkeypatch.setattr(launch, "forget_programs", lambda: forgotten.append(True))
    device = torch.device("cuda", 0)
    for architecture, minimum, overlapped in (("sm_100", 0, False), ("sm_90", NEVER, False), ("sm_90", 0, True)):
        regimes.save([Regime(regimes.OVERLAP, architecture, minimum, minimum, "a test")])
        monkeypatch.setattr(dispatch, "architecture", lambda device: "sm_90")
        assert launch.overlapped(device) is overlapped
    assert len(forgotten) == 3  # programs know how they are launched


def test_what_the_user_measured_of_overlapping_launches_outranks_what_is_shipped(cache, monkeypatch):
    monkeypatch.setattr(dispatch, "architecture", lambda device: "sm_90")
    for own, shipped in ((NEVER, 0), (0, NEVER)):
        monkeypatch.setattr(regimes, "SHIPPED", (Regime(regimes.OVERLAP, "sm_90", shipped, shipped, "a test"),))
        regimes.save([Regime(regimes.OVERLAP, "sm_90", own, own, "a test")])
        assert launch.overlapped(torch.device("cuda", 0)) is (own == 0)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="cases are of sizes for a GPU")
@pytest.mark.parametrize("group", EVERYTHING, ids=lambda group: group.regime)
def test_on_a_gpu_all_that_is_measured_is_right(group):
    """Which compiles it, too: `make gpu` runs this in many processes, and then measures in one."""
    for case in group.cases:
        step = (case.checked or case.make)(DEVICE, gradients=group.gradients)
        for ours in group.ours:
            assert tuning.agree(step, group.op, case.other, ours, group.tolerance), f"{group.ours[ours]} {case.text}"
