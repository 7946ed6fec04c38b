"""The pictures that are made of what `make gpu` has measured."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from benchmarks import figures, report, tables

SVG = "{http://www.w3.org/2000/svg}"


def case(name, in_graphs=True, **peers):
    """peers: their (wall, graph) ms; None for what could not be captured."""
    times = {n: {"wall": w} | ({} if g is None else {"graph": g}) for n, (w, g) in peers.items()}
    return {"case": name, "moves": 0, "in_graphs": in_graphs, "peers": times, "claims": []}


CASES = [
    case(
        "attention (2, 100, 1000, 8, 32) bf16, padding, forward", auto=(2.0, 1.0), triton=(1.0, 0.5), cudnn=(1.0, 2.0)
    ),
    case("attention (8, 100, 1000, 8, 32) bf16, padding, forward", auto=(2.0, 1.0), cudnn=(1.0, 8.0), flex=(9.0, 8.5)),
    case("packed attention (20, 20) hd 32 bf16, forward and backward", triton=(1.0, 1.0), padded=(3.0, None)),
    case("DETR-R50 training step, 4 x 800", in_graphs=False, auto=(20.0, None), huggingface=(60.0, None)),
    case("nothing to compare with (3)", auto=(1.0, 1.0), copy=(0.1, 0.1)),
]


def test_ours_is_held_against_the_fastest_alternative_in_each_way_of_launching():
    found = [{way: figures.speedup(entry, way) for way in figures.WAYS} for entry in CASES]
    assert found[0] == {"wall": figures.Speedup(0.5, "cudnn"), "graph": figures.Speedup(2.0, "cudnn")}
    assert found[2] == {"wall": figures.Speedup(3.0, "padded"), "graph": None}
    assert found[3] == {"wall": None, "graph": figures.Speedup(3.0, "huggingface")}  # ours is a graph
    assert found[4] == {"wall": None, "graph": None}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("attention (4, 1000, 1000, 8, 32) bf16, padding, forward", "attention, heads of 32, padding, inference"),
        ("attention (4, 1000, 1000, 4, 64) bf16, plain, forward and backward", "attention, larger heads, plain"),
        ("attention (2, 9, 9) hd 32 with weights averaged, bf16, forward", "attention that returns its weights"),
        ("layer_norm (800, 256) bf16, forward and backward", "layer_norm"),
        ("encoder layer (4, 1050, padded) d 256 hidden 2048 dropout 0.1 bf16", "encoder layer"),
        ("matcher and criterion 6 x 8 x 20 x 100, forward", "matcher and criterion"),
        ("DETR's focal losses, 6 x 4 x 100 x 92 fp32, forward and backward", "DETR's focal losses"),
    ],
)
def test_cases_of_one_kind_differ_in_size_alone(name, kind):
    assert tables.kind(name) == kind


def circles(svg, color):
    """Where the axis's marks and the points of one way of launching are, without the legend's."""
    tree = ET.fromstring(svg)
    points = [float(c.get("cx")) for c in tree.iter(f"{SVG}circle") if c.get("fill") == color][1:]
    (one,) = (float(t.get("x")) for t in tree.iter(f"{SVG}text") if t.text == "1×")
    return one, points, [t.text for t in tree.iter(f"{SVG}text") if t.text]


def test_a_kind_shows_the_mean_of_its_cases_right_of_the_line_where_ours_is_faster():
    svg = figures.picture(figures.rows_of_kinds(CASES), "title & more")
    one, in_graphs, texts = circles(svg, figures.WAYS["graph"][1])
    assert len(in_graphs) == 2
    assert all(at > one for at in in_graphs)
    assert "4.00× cudnn" in texts  # of 2 and 8
    assert "title & more" in texts
    one, eagerly, _ = circles(svg, figures.WAYS["wall"][1])
    assert [at > one for at in eagerly] == [False, True]


def test_cases_stand_below_their_kinds_and_all_of_them_lie_in_the_picture():
    rows = figures.rows_of_cases(CASES)
    assert [row.ways is None for row in rows] == [True, False, False, True, False, True, False]
    assert [row.label for row in rows][:3] == [
        "attention, heads of 32, padding, inference",
        "(2, 100, 1000, 8, 32)",
        "(8, 100, 1000, 8, 32)",
    ]
    height = float(re.search(r'height="(\d+)"', figures.picture(rows, "")).group(1))
    ends = [float(t.get("y")) for t in ET.fromstring(figures.picture(rows, "")).iter(f"{SVG}text")]
    assert max(ends) < height


def test_a_folder_gets_both_pictures_and_one_without_measurements_none(tmp_path):
    assert figures.write(tmp_path) == []
    lines = [*CASES, {"machine": {"GPU": "NVIDIA H200", "torch": "2.11"}}]
    (tmp_path / "measurements.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert [path.name for path in figures.write(tmp_path)] == ["speedups.svg", "cases.svg"]
    assert "NVIDIA H200, torch 2.11: how many times" in (tmp_path / "speedups.svg").read_text()
    assert report.measurements(tmp_path)


@pytest.mark.parametrize("script", ["report", "figures"])
@pytest.mark.parametrize("given", [[], ["here"], ["here", "there"]])
def test_a_folder_without_measurements_keeps_its_page(script, given, tmp_path):
    (tmp_path / "here").mkdir()
    page = tmp_path / "here" / "summary.md"
    page.write_text("precious")
    path = Path(figures.__file__).with_name(f"{script}.py")
    ended = subprocess.run([sys.executable, path, *given], cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr == (
        f"got {' '.join(given) or 'nothing'}, expected one folder that 'make gpu' has written measurements.jsonl to; give that\n"
    )
    assert page.read_text() == "precious"
    assert len(list((tmp_path / "here").iterdir())) == 1
