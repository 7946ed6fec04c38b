"""What benchmarks record, and the page that is made of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from benchmarks import figures, report, tables, timing
from benchmarks.timing import Claim, NotInstalled, compare
from tests.stub_cuda import stubs

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Cases are recorded in a folder, with the host's clock for the GPU's; the value reads them."""
    monkeypatch.setenv("DETR_FAST_RESULTS", str(tmp_path))
    monkeypatch.delenv("DETR_FAST_DEADLINE", raising=False)
    for name, value in stubs().items():
        monkeypatch.setattr(torch.cuda, name, value, raising=False)
    for name, value in {"DEVICE": torch.device("cpu"), "FLUSHED": 16, "ROUNDS": (4, 5), "SECONDS": 1e-3}.items():
        monkeypatch.setattr(timing, name, value)
    return lambda: report.measurements(tmp_path)


def one():
    return [torch.ones(3, dtype=torch.float64)]


def wrong():
    return [torch.full((3,), 1.5, dtype=torch.float64)]


def absent():
    raise NotInstalled("somelib is not installed")


def refusing():
    raise RuntimeError("no kernel for this\nand more")


def test_right_peers_are_timed_in_turn_and_a_peer_that_refuses_is_recorded_with_its_reason(results):
    calls = []

    def named(name):
        return lambda: calls.append(name) or one()

    peers = {"auto": named("auto"), "flash": named("flash"), "liger": absent, "cudnn": refusing, "flex": wrong}
    compare("case", peers, eager=one, truth=one, claims=[Claim("faster", ("flash", "liger"), 0.0)], moves=8)
    (entry,) = results()
    assert {"wall", "graph", "gpu", "MiB", "spread", "rounds"} <= set(entry["peers"]["auto"])
    assert entry["peers"]["liger"] == {"absent": "somelib is not installed"}
    assert entry["peers"]["cudnn"] == {"refused": "RuntimeError: no kernel for this and more"}
    assert "flex is wrong" in entry["peers"]["flex"]["refused"]
    eagerly, in_a_graph = entry["claims"]
    assert (eagerly["how"], in_a_graph["how"]) == ("launched eagerly", "in a CUDA graph")
    for judged, kind in ((eagerly, "wall"), (in_a_graph, "graph")):
        assert judged["measured"] == pytest.approx(entry["peers"]["flash"][kind] / entry["peers"]["auto"][kind])
    repeated = "".join("a" if name == "auto" else "f" for name in calls)
    assert repeated.count("af") + repeated.count("fa") >= 8  # not all of one, then all of the other


@pytest.mark.parametrize("call", [wrong, refusing])
def test_ours_is_not_timed_where_it_is_wrong_or_fails_and_the_others_are(results, call):
    with pytest.raises(AssertionError, match="triton failed; triton: "):
        compare("case", {"triton": call, "auto": one}, eager=one, truth=one, claims=[Claim("c", ("triton",), 1.0)])
    (entry,) = results()
    assert set(entry["peers"]["triton"]) == {"failed"}
    assert "wall" in entry["peers"]["auto"]
    assert entry["claims"][0]["measured"] is None


@pytest.mark.parametrize(
    "calls", [1, 4, 15, 16, 17], ids=["warm-up", "measured-for-rounds", "wall", "gpu", "next-round"]
)
@pytest.mark.parametrize(
    "error", [RuntimeError("no plan for this\nand more"), torch.OutOfMemoryError("80 GiB")], ids=["error", "memory"]
)
def test_a_peer_that_fails_in_a_later_call_is_out_with_its_reason_and_the_others_are_timed(
    results, calls, error, monkeypatch
):
    """The first is the checked one; then come four that warm up, ten for a graph (below), then rounds of two."""
    monkeypatch.setattr(timing, "_wall", lambda call, repeats: 1.0 * len(call()))

    def tiring(left):
        def call():
            left.append(0)
            if len(left) > calls:
                raise error
            return one()

        return call

    over = Claim("faster", ("flash", "eager"), 0.0)
    compare("theirs", {"flash": tiring([]), "auto": one, "eager": one}, eager=one, truth=one, claims=[over])
    peers = results()[0]["peers"]
    assert peers["flash"] == {
        "refused": timing.in_short(error) if type(error) is RuntimeError else timing.first_line(error)
    }
    assert peers["auto"]["rounds"] >= 4
    assert results()[0]["claims"][0]["measured"] == pytest.approx(peers["eager"]["wall"] / peers["auto"]["wall"])

    if not isinstance(error, torch.OutOfMemoryError):
        with pytest.raises(AssertionError, match="auto failed; auto: RuntimeError: no plan"):
            compare("ours", {"auto": tiring([]), "eager": one}, claims=[over])
        ours = results()[1]
        assert ours["peers"]["auto"] == {"failed": "RuntimeError: no plan for this and more"}
        assert "wall" in ours["peers"]["eager"]
        assert ours["claims"][0]["measured"] is None


def waiting(calls):
    """A call that looks at a value on the host: refused where it would be captured."""

    def call():
        calls.append(0)
        if torch.cuda.get_sync_debug_mode():
            raise RuntimeError("called a synchronizing CUDA operation")
        return one()

    return call


@pytest.fixture
def sync_debug_mode(results, monkeypatch):
    modes = ["default"]
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1] != "default")
    return modes


def test_a_peer_that_waits_for_the_host_keeps_its_other_times_and_the_reason_is_told(results, sync_debug_mode):
    claim = Claim("faster", ("original", "eager"), 0.0)
    compare("case", {"original": waiting([]), "eager": waiting([]), "auto": one}, eager=one, truth=one, claims=[claim])
    (entry,) = results()
    for name in ("original", "eager"):
        assert entry["peers"][name]["uncaptured"] == "RuntimeError: called a synchronizing CUDA operation"
        assert {"wall", "gpu"} <= set(entry["peers"][name])
        assert "graph" not in entry["peers"][name]
    assert "graph" in entry["peers"]["auto"]
    assert [one["measured"] is None for one in entry["claims"]] == [False, True]
    assert sync_debug_mode[-1] == "default"
    page = report.page([entry])
    for name in ("eager", "original"):
        assert (
            f"- Can't be captured in a CUDA graph: {name}, 1 case (RuntimeError: called a synchronizing CUDA operation)"
            in page
        )


def test_ours_must_be_captured(results, sync_debug_mode):
    with pytest.raises(AssertionError, match="triton failed; triton: RuntimeError: called a synchronizing"):
        compare("case", {"triton": waiting([]), "auto": one}, eager=one, truth=one)
    (entry,) = results()
    assert {"wall", "gpu", "uncaptured"} <= set(entry["peers"]["triton"])
    assert "1. let triton be captured in case: RuntimeError: called a synchronizing CUDA operation" in report.page(
        [entry]
    )


def test_what_is_a_graph_itself_is_captured_in_none(results, sync_debug_mode):
    claim = Claim("faster", ("eager",), 1.0)
    compare("a graph", {"auto": waiting([])}, is_graph=True, claims=[claim])
    compare("not to be captured", {"auto": waiting([])}, in_graphs=False, claims=[claim])
    for entry, how in zip(results(), (report.IS_GRAPH, "launched eagerly"), strict=True):
        assert set(entry["peers"]["auto"]) >= {"wall", "gpu"}
        assert not set(entry["peers"]["auto"]) & {"graph", "uncaptured"}
        assert [one["how"] for one in entry["claims"]] == [how]


def test_a_graph_holds_several_calls_and_is_replayed_so_often_that_they_count(results, monkeypatch):
    calls = []
    graph = timing.Graph(lambda: calls.append(0), 8)
    assert len(calls) == 2 + 8  # two warm up
    monkeypatch.setattr(timing.torch.cuda, "Event", FixedEvent)
    assert graph.time() == pytest.approx(FixedEvent.elapsed / 8)
    assert graph.replays == round(1.0 / FixedEvent.elapsed)
    assert graph.time() == pytest.approx(FixedEvent.elapsed / 10 / 8)
    assert len(calls) == 10


class FixedEvent:
    """All that is timed takes 0.1 ms."""

    elapsed = 0.1

    def __init__(self, enable_timing):
        self.record = lambda: None

    def elapsed_time(self, end):
        return self.elapsed


def test_what_is_checked_may_be_another_call_than_what_is_timed(results):
    compare("case", {"auto": wrong}, eager=one, truth=one, checks={"auto": one})
    assert "wall" in results()[0]["peers"]["auto"]


def test_a_library_that_is_less_accurate_than_ours_may_be_is_timed_and_its_error_told(results):
    def coarse():
        return [one()[0] * 1.03]

    compare("case", {"liger": coarse, "auto": one}, eager=one, truth=one)
    (entry,) = results()
    assert "wall" in entry["peers"]["liger"]
    assert "relative error 3.00e-02" in entry["peers"]["liger"]["coarse"]
    assert "coarse" not in entry["peers"]["auto"]
    with pytest.raises(AssertionError, match="triton is wrong"):
        compare("case", {"triton": coarse}, eager=one, truth=one)


def test_of_what_auto_takes_it_is_told_which_way_the_host_goes_and_what_a_call_takes_without_c(results, monkeypatch):
    ways = {"in C++": "C++", "from Python": "Python", "PyTorch's": None}
    for name, way in ways.items():
        monkeypatch.setattr(timing.host, "way", lambda call, way=way: way)
        compare(name, {"auto": one, "triton": one}, eager=one, truth=one)
    told = {entry["case"]: entry["peers"]["auto"] for entry in results()}
    assert {name: peer.get("host") for name, peer in told.items()} == ways
    assert {name: "wall from Python" in peer for name, peer in told.items()} == {
        name: w == "C++" for name, w in ways.items()
    }
    assert all("host" not in entry["peers"]["triton"] for entry in results())


def test_backward_is_timed_on_the_calling_thread_and_with_the_hand_over_to_autograds_apart(results, monkeypatch):
    woken = []
    monkeypatch.setattr(timing, "_wall", lambda *_: woken.append(torch.autograd.is_multithreading_enabled()) or 1.0)
    compare("an op", {"auto": one, "eager": one})
    rounds = results()[0]["peers"]["auto"]["rounds"]
    assert woken == [False] * 2 * rounds + [True] * timing.ROUNDS[0]
    woken.clear()
    compare("a whole training step", {"auto": one, "eager": one}, is_graph=True)
    assert set(woken) == {True}
    assert ["wall, woken" in entry["peers"]["auto"] for entry in results()] == [True, False]


def test_checks_alone_time_and_record_nothing(results, monkeypatch):
    monkeypatch.setattr(timing, "CHECK_ONLY", True)
    compare("case", {"auto": one}, eager=one, truth=one)
    assert results() == []
    with pytest.raises(AssertionError, match="auto is wrong"):
        compare("case", {"auto": wrong}, eager=one, truth=one)


def test_after_the_deadline_nothing_is_begun(results, monkeypatch):
    monkeypatch.setenv("DETR_FAST_DEADLINE", "1")
    with pytest.raises(pytest.skip.Exception, match="out of time"):
        compare("case", {"auto": refusing})


def test_a_call_that_runs_out_of_memory_is_told_apart(results, monkeypatch):
    def large():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB")

    compare("case", {"auto": large, "eager": one})
    assert "OutOfMemoryError: CUDA out of memory" in results()[0]["peers"]["auto"]["refused"]
    monkeypatch.setattr(timing, "CHECK_ONLY", True)  # where other processes hold the memory
    with pytest.raises(pytest.skip.Exception, match="out of memory"):
        compare("case", {"auto": large})


def entry(case, wanted, measured, **walls):
    peers = {name: {"wall": wall, "graph": wall / 4, "gpu": wall / 2, "MiB": 1.0} for name, wall in walls.items()}
    ways = (("launched eagerly", measured), ("in a CUDA graph", measured and 2 * measured))
    claims = [{"claim": "c", "wanted": wanted, "how": how, "measured": factor} for how, factor in ways]
    return {"case": case, "moves": 0, "peers": peers, "claims": claims}


def test_the_page_says_which_claims_hold_and_what_to_change_next():
    entries = [
        entry("fast", 2.0, 3.0, auto=1.0, eager=3.0),
        entry("slow", 2.0, 0.5, auto=2.0, eager=1.0),
        entry("slower than a library", 2.0, None, auto=3.0, liger=2.0, copy=1.0),
        {"case": "broken", "moves": 0, "peers": {"triton": {"failed": "why"}, "apex": {"absent": ""}}, "claims": []},
        entry("step", 0.5, 3.0, eager=8.0, auto=4.0) | {"images": 4},
        {"ceilings": {"copy, GB/s": 3000.123}},
    ]
    page = report.page(entries, ["tests"])
    assert "- ceilings: copy, GB/s 3000" in page
    assert (
        "| c | ≥ 2 × | ✗ 1 of 3, 1 unknown; 1.00 × | ✗ 1 of 3, 1 unknown; 0.50 × |  | slow, launched eagerly: 0.50 × |"
        in page
    )
    assert "| c | ≥ 0.5 × | ✓ 1 of 1; 6.00 × | ✓ 1 of 1; 3.00 × |  |  |" in page
    steps = page[page.index("## What to change next") + 2 :][:6]
    assert steps == [
        "1. mend tests: its output is in log.txt",
        "2. mend triton in broken: why",
        "3. slow, in a CUDA graph: auto takes 2.00 × eager (a wrong choice: detr_fast/ops/regimes.py)",
        "4. slower than a library, in a CUDA graph: auto takes 1.50 × liger (kernels/configs.py, then the kernel)",
        "5. slow, launched eagerly: auto takes 2.00 × eager (a wrong choice: detr_fast/ops/regimes.py)",
        "6. slower than a library, launched eagerly: auto takes 1.50 × liger (kernels/configs.py, then the kernel)",
    ]
    assert any("Not installed, so not measured: apex, 1 case" in line for line in page)


def test_what_is_wanted_is_not_rounded_to():
    entries = [entry("nearly", 1.0, 0.998, auto=1.0, eager=0.998)]
    assert any("✗ 0 of 1; 0.9980 ×" in line for line in report.page(entries))


def test_times_of_one_kind_stand_together_the_fastest_in_bold_and_a_copy_never():
    entries = [
        entry("layer_norm (8, 16) bf16, forward", 1.0, 1.0, eager=0.5, auto=1.0, copy=0.1) | {"moves": 4_000_000},
        entry("other (1)", 1.0, 1.0, auto=1.0),
        entry("layer_norm (9, 16) bf16, forward", 1.0, 1.0, auto=12.3456, liger=40.0),
    ]
    entries[2]["peers"]["auto"] |= {"host": "C++", "wall from Python": 24.0}
    page = report.page(entries)
    start = page.index("### layer_norm, inference")
    assert page[start + 2 :][:10] == [
        "| case | timed | auto | copy | eager | liger |",
        "|---|---|---|---|---|---|",
        "| (8, 16) | in a CUDA graph | 0.250 | 0.0250 | **0.125** |  |",
        "| (8, 16) | launched eagerly | 1.00 | 0.100 | **0.500** |  |",
        "| (8, 16) | the GPU alone (8 GB/s) | 0.500 | 0.0500 | **0.250** |  |",
        "| (8, 16) | MiB | 1 | 1 | 1 |  |",
        "| (9, 16) | in a CUDA graph | **3.09** |  |  | 10.0 |",
        "| (9, 16) | launched eagerly | **12.3** (C++; from Python 24.0) |  |  | 40.0 |",
        "| (9, 16) | the GPU alone | **6.17** |  |  | 20.0 |",
        "| (9, 16) | MiB | 1 |  |  | 1 |",
    ]


def test_the_page_begins_with_the_training_step_and_says_which_way_the_host_went():
    step = entry("DETR-R50 training step, 4 × 800", 2.0, 4.0, auto=10.0, huggingface=40.0) | {"images": 4}
    step |= {"in_graphs": False, "is_graph": True}
    fast, slow = (entry(name, 1.0, 1.0, auto=2.0, eager=eager) for name, eager in (("a (1)", 8.0), ("b (1)", 1.0)))
    fast["case"] += ", forward and backward"
    fast["peers"]["auto"] |= {"host": "C++", "wall from Python": 3.0, "wall, woken": 2.25}
    slow["peers"]["auto"] |= {"host": "Python", "wall, woken": 9.0}
    page = report.page([fast, step, slow, {tables.PEAKS: {"auto, GiB": 1.5}}])
    assert page[1] == "**A training step of DETR-R50 takes 10.0 ms: 4.0 × as fast as Hugging Face's launched eagerly.**"
    assert (
        "Launched eagerly, `auto` is at least as fast as the fastest alternative (within 5 %) in 1 of 2 cases; in the mean 1.41 × as fast."
        in page
    )
    assert "| detr-fast, as it is run: a CUDA graph | 10.0 | 400 | 1.50 |" in page
    assert "| Hugging Face's, eager | 40.0 | 100 |  |" in page
    assert "The host's part of `auto`, launched eagerly: C++ in 1 cases, Python in 1 cases." in page
    assert "Without C++ the same calls take 1.50 × as long (median; 1.50 to 1.50)." in page
    assert "- Python: b (1)" in page
    woken = "Backward ran on the calling thread; where it wakes autograd's own, a call takes 0.250 ms more (median)."
    assert woken in page


def test_a_section_that_ran_before_keeps_its_line_where_others_run_later(tmp_path):
    report.keep_section(tmp_path, "tune", ["ok, 90 s."])
    report.keep_section(tmp_path, "tests", ["FAILED (1), 9 s.", "FAILED test_x"])
    report.keep_section(tmp_path, "tests", ["ok, 8 s."])
    page = report.write(tmp_path, "a GPU").read_text().splitlines()
    assert page[0] == "# a GPU"
    assert page[page.index("## The run") + 2 :] == ["- tune: ok, 90 s.", "- tests: ok, 8 s."]


@pytest.mark.parametrize("folder", sorted(path.parent for path in RESULTS.glob("*/measurements.jsonl")), ids=str)
def test_published_pages_are_what_their_measurements_give(folder, tmp_path):
    shutil.copytree(folder, tmp_path / folder.name)
    for path in (report.write(tmp_path / folder.name), *figures.write(tmp_path / folder.name)):
        assert path.read_text() == (folder / path.name).read_text(), f"python benchmarks/report.py {folder}"


def test_lines_that_were_cut_off_are_left_out_and_the_later_of_two_counts(tmp_path):
    lines = [json.dumps({"case": "a", "n": 1}), json.dumps({"case": "a", "n": 2}), '{"case": "b", "n"']
    lines[1:1] = [json.dumps({"ceilings": n}) for n in (1, 2)]
    (tmp_path / "measurements.jsonl").write_text("\n".join(lines))
    assert report.measurements(tmp_path) == [{"case": "a", "n": 2}, {"ceilings": 2}]
    assert report.measurements(tmp_path / "nowhere") == []
