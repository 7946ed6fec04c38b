"""What benchmarks record, and the page that is made of it."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import report, timing
from benchmarks.timing import Claim, NotInstalled, compare
from tests.stub_cuda import stubs


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
    assert {"wall", "gpu", "MiB", "spread", "rounds"} <= set(entry["peers"]["auto"])
    assert entry["peers"]["liger"] == {"absent": "somelib is not installed"}
    assert entry["peers"]["cudnn"] == {"refused": "RuntimeError: no kernel for this"}
    assert "flex is wrong" in entry["peers"]["flex"]["refused"]
    measured = entry["claims"][0]["measured"]
    assert measured == pytest.approx(entry["peers"]["flash"]["wall"] / entry["peers"]["auto"]["wall"])
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


@pytest.mark.parametrize("calls", [1, 4, 5, 6, 7], ids=["warm-up", "measured-for-rounds", "wall", "gpu", "next-round"])
@pytest.mark.parametrize(
    "error", [RuntimeError("no plan for this\nand more"), torch.OutOfMemoryError("80 GiB")], ids=["error", "memory"]
)
def test_a_peer_that_fails_in_a_later_call_is_out_with_its_reason_and_the_others_are_timed(
    results, calls, error, monkeypatch
):
    """The first is the checked one; then come four that warm up, then rounds of two."""
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
    assert peers["flash"] == {"refused": timing.first_line(error)}
    assert peers["auto"]["rounds"] >= 4
    assert results()[0]["claims"][0]["measured"] == pytest.approx(peers["eager"]["wall"] / peers["auto"]["wall"])

    if not isinstance(error, torch.OutOfMemoryError):
        with pytest.raises(AssertionError, match="auto failed; auto: RuntimeError: no plan"):
            compare("ours", {"auto": tiring([]), "eager": one}, claims=[over])
        ours = results()[1]
        assert ours["peers"]["auto"] == {"failed": "RuntimeError: no plan for this"}
        assert "wall" in ours["peers"]["eager"]
        assert ours["claims"][0]["measured"] is None


def test_what_is_checked_may_be_another_call_than_what_is_timed(results):
    compare("case", {"auto": wrong}, eager=one, truth=one, checks={"auto": one})
    assert "wall" in results()[0]["peers"]["auto"]


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
    peers = {name: {"wall": wall, "gpu": wall / 2, "MiB": 1.0} for name, wall in walls.items()}
    claim = {"claim": "c", "wanted": wanted, "measured": measured, "gpu": measured}
    return {"case": case, "moves": 0, "peers": peers, "claims": [claim]}


def test_the_page_says_which_claims_hold_and_what_to_change_next():
    entries = [
        entry("fast", 2.0, 3.0, auto=1.0, eager=3.0),
        entry("slow", 2.0, 0.5, auto=2.0, eager=1.0),
        entry("slower than a library", 2.0, None, auto=3.0, liger=2.0, copy=1.0),
        {"case": "broken", "moves": 0, "peers": {"triton": {"failed": "why"}, "apex": {"absent": ""}}, "claims": []},
        {"ceilings": {"copy, GB/s": 3000.123}},
    ]
    page = report.page(entries, ["tests"])
    assert "- ceilings: copy, GB/s 3000" in page
    assert "| c | ≥ 2 × | 1 of 3 | 0.50 × | 0.50 × | slow |" in page
    steps = page[page.index("What to change next:") + 1 :][:4]
    assert steps == [
        "1. mend tests: its output is in log.txt",
        "2. mend triton in broken: why",
        "3. slow: auto takes 2.00 × eager (a wrong choice: detr_fast/ops/regimes.py)",
        "4. slower than a library: auto takes 1.50 × liger (kernels/configs.py, then the kernel)",
    ]
    assert "Not installed, so not measured: apex." in page
    assert any(line.startswith("| fast | auto 1.0000, eager 3.0000 | auto 0.5000, eager 1.5000 |") for line in page)


def test_lines_that_were_cut_off_are_left_out_and_the_later_of_two_counts(tmp_path):
    lines = [json.dumps({"case": "a", "n": 1}), json.dumps({"case": "a", "n": 2}), '{"case": "b", "n"']
    lines[1:1] = [json.dumps({"ceilings": n}) for n in (1, 2)]
    (tmp_path / "measurements.jsonl").write_text("\n".join(lines))
    assert report.measurements(tmp_path) == [{"case": "a", "n": 2}, {"ceilings": 2}]
    assert report.measurements(tmp_path / "nowhere") == []
