from __future__ import annotations

import xml.etree.ElementTree
from types import SimpleNamespace

import torch

from benchmarks import step_profile


def test_the_gpu_is_busy_while_at_least_one_kernel_runs():
    spans = [("a<b>", 0.0, 2.0), ("c", 3.0, 4.0), ("c", 3.5, 5.0)]
    assert step_profile.busy_time(spans) == (4.0, 5.0)
    assert step_profile.busy_time([]) == (0.0, 0.0)


def test_the_picture_has_a_box_for_each_kernel_a_row_for_each_kind_and_ours_in_a_color_of_their_own():
    spans = [("void a<b>", 0.0, 2e3), ("linear_kernel", 3e3, 4e3), ("linear_kernel", 3.5e3, 5e3)]
    drawn = xml.etree.ElementTree.fromstring(step_profile.picture(spans, steps=2))
    texts = [child.text for child in drawn if child.tag.endswith("text")]
    assert texts[0].startswith(
        "2 captured training steps one after the other: 5.00 ms, in 80.0 % of which a kernel runs."
    )
    assert texts[-2:] == ["1.250  linear_kernel", "1.000  a<b>"]  # of two steps
    assert "4 ms" in texts
    boxes = [child for child in drawn if child.tag.endswith("rect") and float(child.get("y", 0)) >= step_profile.TOP]
    color = {ours: step_profile.COLORS[ours] for ours in (True, False)}
    assert [(box.get("fill"), float(box.get("y"))) for box in boxes] == [
        (color[False], step_profile.TOP + step_profile.ROW),
        (color[True], step_profile.TOP),
        (color[True], step_profile.TOP),
    ]


def test_names_of_stretches_of_time_are_no_kernels():
    def event(name, device, annotation):
        span = SimpleNamespace(start=1.0, end=2.0)
        return SimpleNamespace(name=name, device_type=device, is_user_annotation=annotation, time_range=span)

    cuda, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    events = [
        event("kernel", cuda, False),
        event("Optimizer.step#AdamW.step", cuda, True),
        event("aten::mm", cpu, False),
    ]
    assert step_profile.kernels_of(SimpleNamespace(events=lambda: events)) == [("kernel", 1.0, 2.0)]


def test_a_fact_that_cannot_be_had_keeps_no_other_from_being_told(tmp_path, monkeypatch, capsys):
    def fails(*_):
        raise RuntimeError("no clocks here\nand more")

    monkeypatch.setenv("DETR_FAST_RESULTS", "")  # put back afterwards
    for name, value in {"make_pair": lambda: None, "machine": fails, "ceilings": lambda: {"copy": 1.0}}.items():
        monkeypatch.setattr(step_profile, name, value)
    for name in ("parts", "launches"):
        monkeypatch.setattr(step_profile, name, lambda *_: {"ms": 1.0})
    assert step_profile.main(tmp_path) == 1  # the captured step needs a pair
    told = capsys.readouterr().out.splitlines()
    assert "FAILED machine: RuntimeError: no clocks here" in told
    assert "ceilings: ok" in told
    assert sum(line.endswith(": ok") for line in told) == len(told) - 2
    assert '{"ceilings": {"copy": 1.0}}' in (tmp_path / "measurements.jsonl").read_text()
