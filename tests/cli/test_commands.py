from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate")

from detr_fast.cli import COMMANDS, main
from detr_fast.cli.errors import explain_error
from detr_fast.data.scenes import generate_scenes

SMALL = ["--model", "small", "--image-size", "32", "--batch-size", "4", "--workers", "0", "--device", "cpu"]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate_scenes(tmp_path_factory.mktemp("tiny") / "scenes", train=8, val=2, size=40)


@pytest.fixture(scope="module")
def trained(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert status("train", "--data", scenes, "--run", folder, *SMALL, "--epochs", "1") == 0
    return folder


def status(*args: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(a) for a in args])
    return int(ended.value.code or 0)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert status(command, "--help") == 0
    assert "Usage: detr-fast" in capsys.readouterr().out


def test_help_answers_without_importing_torch() -> None:
    code = "import sys; from detr_fast.cli import app; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_the_terminal_has_no_letters_for_ends_no_command(scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert status("doctor", str(scenes)) == 0
    terminal.flush()
    assert b"?" in terminal.buffer.getvalue()  # type: ignore[attr-defined]


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    from detr_fast import __version__

    assert status("--version") == 0
    assert capsys.readouterr().out == f"detr-fast {__version__}\n"


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["train", "--data", "nowhere"], "nowhere: does not exist"),
        (["train"], "give either --data DIR"),
        (["train", "--resume", "nowhere"], "no checkpoint nowhere"),
        (["train", "--data", "x", "--model", "vgg"], "the model is 'vgg', expected one of small"),
        (["train", "--data", "x", "--lr", "-1"], "lr is -1.0, expected a number over 0"),
        (["train", "--data", "x", "--lr", "inf"], "lr is inf, expected a number over 0"),
        (["train", "--data", "x", "--lr-backbone", "nan"], "lr_backbone is nan, expected at least 0"),
        (["train", "--data", "x", "--queries", "0"], "--queries is 0, expected at least 1"),
        (["train", "--data", "x", "--seed", str(2**32)], "seed is 4294967296, expected less than 2**32"),
        (["train", "--resume", "x", "--lr", "1"], "--lr cannot change in mid-run"),
        (["train", "--resume", "x", "--focal"], "--focal cannot change in mid-run"),
        (
            ["train", "--resume", "x", "--model", "resnet50", "--image-size", "96", "--epochs", "2", "--vertical-flip"],
            "--model, --image-size, --vertical-flip cannot change in mid-run",
        ),
        (["train", "--data", "x", "--color-jitter", "-1"], "color_jitter is -1.0, expected 0 (off) or a strength"),
        (["evaluate", "nowhere"], "no checkpoint nowhere"),
        (["predict", "nowhere", "none.png"], "none.png does not exist"),
        (["explain", "resnet5"], "published weights or one of small, resnet18, resnet34, resnet50, resnet101"),
        (["explain", "--device", "tpu"], "expected auto, cpu or cuda"),
        (["doctor", "nowhere"], "nowhere: does not exist"),
        (["convert-weights", "nowhere", "x"], "nowhere"),
    ],
)
def test_a_users_error_is_one_line_and_status_2(
    args: list[str],
    expected: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert status(*args) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.startswith("Error: ")
    assert error.count("\n") == 1


def test_the_demo_trains_evaluates_and_says_how_much_longer_it_could(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from detr_fast.engine import demo

    monkeypatch.setattr(demo, "scene_counts", lambda quick: (16, 2) if quick else (64, 2))
    run = tmp_path / "demo"
    assert status("demo", "--quick", "--out", run, "--device", "cpu") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "AP, AP50" in printed
    assert "plain torch.nn layers" in printed
    assert printed.endswith("This was the short look, of 5 steps; without --quick it takes 40.")
    assert all((run / name).is_file() for name in ("checkpoint.pt", "curves.png", "predictions.png"))


@pytest.mark.parametrize("focal", [False, True])
def test_training_by_focal_loss_is_an_option(focal: bool, scenes: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from detr_fast.engine import trainer
    from detr_fast.models import build_criterion

    class Started(SystemExit):
        pass

    def start(config: Any, **_: Any) -> None:
        criterion = build_criterion(config.model)
        assert (config.model.focal, criterion.focal, criterion.matcher.focal) == (focal,) * 3
        raise Started(7)

    monkeypatch.setattr(trainer, "train", start)
    assert status("train", "--data", scenes, "--run", tmp_path / "run", *["--focal"] * focal) == 7


def test_flips_can_be_chosen_as_left_and_right_may_differ_in_meaning(tmp_path: Path, monkeypatch: Any) -> None:
    from detr_fast.engine import trainer

    flips = []

    def start(config: Any, **_: Any) -> None:
        flips.append((config.transforms.horizontal_flip, config.transforms.vertical_flip))
        raise SystemExit(7)

    monkeypatch.setattr(trainer, "train", start)
    for options in ([], ["--no-horizontal-flip"], ["--vertical-flip"]):
        assert status("train", "--data", tmp_path, "--run", tmp_path / "run", *options) == 7
    assert flips == [(0.5, 0.0), (0.0, 0.0), (0.5, 0.5)]


def test_a_trained_model_is_evaluated(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status("evaluate", trained, "--json", "--device", "cpu") == 0
    figures = json.loads(capsys.readouterr().out)
    assert 0 <= figures["AP"] <= figures["AP50"] <= 1
    assert "AP/ring" in figures
    assert status("evaluate", trained, "--json", "--device", "cpu", "--workers", "0") == 0
    assert json.loads(capsys.readouterr().out) == figures
    assert status("evaluate", trained, "--split", "train", "--device", "cpu") == 0
    printed = capsys.readouterr().out
    assert "ring" in printed
    assert "recall" in printed


def test_predict_writes_json_and_pictures(trained: Path, scenes: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert status("predict", trained, scenes / "images", "--out", out, "--threshold", "0", "--device", "cpu") == 0
    content = json.loads((out / "predictions.json").read_text())
    assert len(content["images"]) == 10
    assert all((out / image["picture"]).is_file() for image in content["images"])


def test_published_weights_are_evaluated_and_predicted_with_as_they_are(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    from detr_fast.models.build import ModelConfig, build_model

    sizes = {"num_queries": 4, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "feedforward": 16}
    model = build_model(ModelConfig(backbone="conv", num_classes=91, backbone_width=4, backbone_stride=32, **sizes))  # type: ignore[arg-type]
    weights = tmp_path / "detr.pth"
    torch.save({"model": model.state_dict()}, weights)
    assert status("evaluate", weights, "--device", "cpu") == 2
    assert "detr.pth does not say what it was trained on; give a COCO-format folder: --data" in capsys.readouterr().err
    assert status("evaluate", weights, "--data", scenes, "--json", "--device", "cpu") == 0
    assert "AP/ring" in json.loads(capsys.readouterr().out)
    out = tmp_path / "out"
    options = ("--out", out, "--threshold", "0", "--no-pictures", "--device", "cpu")
    assert status("predict", weights, scenes / "images", *options) == 0
    found = [d for image in json.loads((out / "predictions.json").read_text())["images"] for d in image["detections"]]
    assert len(found) == 10 * 4
    from detr_fast.engine.trained import COCO_NAMES

    assert all(d["name"] == COCO_NAMES[d["category_id"]] for d in found)


def test_published_weights_are_fine_tuned_as_the_model_that_they_are_of(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    from detr_fast.models.build import ModelConfig, build_model

    sizes = {"num_queries": 4, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "feedforward": 16}
    config = ModelConfig(backbone="conv", num_classes=91, backbone_width=4, backbone_stride=32, **sizes)  # type: ignore[arg-type]
    torch.save({"model": build_model(config).state_dict()}, tmp_path / "detr.pth")
    options = ["--image-size", "32", "--batch-size", "4", "--workers", "0", "--device", "cpu", "--epochs", "1"]
    start = ["train", "--data", scenes, "--weights", tmp_path / "detr.pth", *options]
    assert status(*start, "--run", tmp_path / "run") == 0
    trained = json.loads((tmp_path / "run" / "config.json").read_text())["model"]
    assert {name: trained[name] for name in sizes} == sizes
    assert "left out the class head" in capsys.readouterr().out
    assert status(*start, "--run", tmp_path / "other", "--queries", "5") == 2
    assert "query_embed (1 tensor: (4, 16), not (5, 16))" in capsys.readouterr().err


def test_explain_lists_ops_and_reasons(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status("explain", trained, "--json", "--device", "cpu") == 0
    records = json.loads(capsys.readouterr().out)
    assert {record["op"] for record in records} >= {"layer_norm"}
    assert status("explain", "small", "--training", "--device", "cpu") == 0
    assert "layer_norm" in capsys.readouterr().out


def test_weights_convert_to_safetensors(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status("convert-weights", trained / "checkpoint.pt", tmp_path / "w.safetensors") == 0
    assert "6 classes" in capsys.readouterr().out


@pytest.mark.parametrize(("signum", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")])
def test_a_signal_to_all_processes_keeps_a_checkpoint_from_which_resume_goes_on(
    scenes: Path, tmp_path: Path, signum: int, name: str
) -> None:
    run = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "detr_fast",
        "train",
        "--data",
        str(scenes),
        "--run",
        str(run),
        *SMALL,
        "--epochs",
        "1000",
    ]
    command[command.index("--workers") + 1] = "1"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 90
        while not (run / "checkpoint.pt").exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        os.killpg(process.pid, signum)  # as terminals and schedulers do: the whole group, workers too
        _, error = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 128 + signum, error
    assert error.startswith("\nstopping after this step")
    assert error.count("\n") == 3
    assert error.splitlines()[2].startswith(f"stopped by {name}: step ")
    steps = int(error.split("step ")[1].split(" of ")[0])
    assert status("train", "--resume", run, "--epochs", steps // 2 + 1) == 0


def test_a_missing_package_is_named_with_a_command_that_installs_it_from_a_clone():
    line, code = explain_error(ModuleNotFoundError("No module named 'scipy.optimize'", name="scipy.optimize"))
    assert "scipy.optimize is not installed" in line
    assert "in a clone of detr-fast: pip install '.[train]'" in line  # on PyPI there is none
    assert code == 2


def test_ctrl_c_while_the_command_line_is_imported_ends_it_without_a_traceback(tmp_path):
    (tmp_path / "typer.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), str(Path(__file__).parents[2])))}
    # A process that is started in the background ignores Ctrl-C, and so do those that it starts.
    listening = "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    command = [sys.executable, "-c", listening + "runpy.run_module('detr_fast', run_name='__main__')", "--help"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "")
