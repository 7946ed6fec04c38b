"""What the command line says while nothing is wrong with the user's data: at the start, on the way, and what to do next."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

pytest.importorskip("accelerate")

from detr_fast.cli import app, main
from detr_fast.cli.presets import preset
from detr_fast.cli.progress import ProgressReporter, duration, speed
from detr_fast.cli.terminal import lasting_output
from detr_fast.data.scenes import generate_scenes
from detr_fast.engine import trainer
from detr_fast.engine.errors import Interrupted
from detr_fast.engine.trained import load_trained_model
from detr_fast.models import convert

SMALL = ["--model", "small", "--image-size", "32", "--batch-size", "4", "--workers", "0", "--device", "cpu"]


def status(*args: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(a) for a in args])
    return int(ended.value.code or 0)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate_scenes(tmp_path_factory.mktemp("with spaces") / "my scenes", train=8, val=2, size=40)


@pytest.fixture(scope="module")
def trained(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("with spaces") / "my run"
    assert status("train", "--data", scenes, "--run", folder, *SMALL, "--epochs", "1") == 0
    return folder


def test_training_says_at_its_start_what_is_trained_and_on_what(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status("train", "--data", scenes, "--run", tmp_path / "run", *SMALL, "--epochs", "1") == 0
    first, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith("conv DETR, ")
    assert (
        "M parameters, on cpu: 8 training images, 2 for validation, 6 classes; 1 epoch of 2 steps of 4 images" in first
    )


def test_a_resnet_without_a_gpu_comes_with_a_warning_of_what_it_takes(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise Interrupted(signal.SIGINT)

    monkeypatch.setattr(trainer.Trainer, "_train_epoch", interrupted)
    full = ["train", "--run", tmp_path / "run", "--model", "resnet18", "--device", "cpu", "--data"]
    assert status(*full, tmp_path / "nowhere") == 2
    assert "note" not in capsys.readouterr().out  # first things first: the data are not there
    assert status(*full, scenes) == 130
    printed = capsys.readouterr().out
    assert "note no GPU: a step of resnet18 at 800 pixels takes a CPU many seconds; --model" in printed
    assert "note no weights given: the backbone trains from scratch" in printed


def test_lines_without_a_terminal_come_by_time_and_say_how_long_it_takes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 100.0
    monkeypatch.setattr("detr_fast.cli.progress.time.monotonic", lambda: now)
    reporter = ProgressReporter(Console(width=120))
    reporter.start(50, 250)
    for step in range(51, 61):  # 15 s a step, of which every tenth reads the loss
        now += 15.0
        reporter.step(step, {"loss": 1.5, "images_per_second": 0.1333} if step % 10 == 0 else None)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "step 52/250  50 min left"
    assert lines[-1] == "step 60/250  loss 1.500  0.13 img/s  48 min left"
    assert len(lines) == 5


def test_speeds_and_times_are_in_the_digits_that_one_reads() -> None:
    assert [speed(v) for v in (0.0611, 3.14, 9.6, 127.6)] == ["0.061 img/s", "3.1 img/s", "10 img/s", "128 img/s"]
    assert [duration(s) for s in (40, 99.4, 300, 7800, 900_000)] == ["40 s", "99 s", "5 min", "2 h 10 min", "10 days"]


def test_defaults_in_the_help_of_train_are_those_of_the_recipes() -> None:
    from typer.main import get_command

    recipes = {name: preset(name, "", "") for name in ("resnet50", "small")}
    settings = {
        name: {
            **asdict(config),
            "image_size": config.transforms.eval_size,
            "queries": config.model.num_queries,
        }
        for name, config in recipes.items()
    }
    checked = 0
    for option in get_command(app).commands["train"].params:  # type: ignore[attr-defined]
        default = re.search(r"\(([^() ]*(?:; small: [^() ]*)?)\)\.$", option.help or "")
        if default is None:
            continue
        full, _, small = default[1].partition("; small: ")
        assert full == str(settings["resnet50"][option.name]), option.name
        assert (small or full) == str(settings["small"][option.name]), option.name
        checked += 1
    assert checked == 12


def test_a_command_that_is_advised_can_be_pasted_where_paths_have_spaces(
    scenes: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status("train", "--data", scenes, "--run", trained, *SMALL) == 2
    error = capsys.readouterr().err
    assert f"go on with 'detr-fast train --resume {shlex.quote(str(trained))}', replace it with --overwrite" in error


def test_brackets_in_names_are_printed_as_they_are(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are no markup, which would vanish from a path that is to be pasted, or end in a traceback."""
    data, run = (
        tmp_path / "[v2] $_$ set",
        tmp_path / "[/b] run",
    )  # "$_$" is no formula either, which it would be to matplotlib
    shutil.copytree(scenes, data)
    (data / "instances_val.json").unlink()
    raw = json.loads((data / "instances_train.json").read_text())
    raw["categories"][0]["name"] = "[/x] [bold]cell $^$"
    (data / "instances_train.json").write_text(json.dumps(raw))
    assert status("train", "--data", data, "--run", run, *SMALL, "--epochs", "1") == 0
    printed = capsys.readouterr().out
    assert f"note {data} has no validation split" in printed
    assert f"in {run}: checkpoint.pt" in printed
    assert status("evaluate", run, "--split", "train", "--device", "cpu") == 0
    printed = capsys.readouterr().out
    assert f"{run}/checkpoint.pt on {data}, train: 8 images" in printed
    assert "\n[/x] [bold]cell $^$ " in printed


def test_output_outlives_its_terminal() -> None:
    master, terminal = os.openpty()
    with open(terminal, "w") as stream, contextlib.redirect_stdout(stream), lasting_output():
        print("read", flush=True)
        assert os.read(master, 10) == b"read\r\n"
        os.close(master)  # as an ssh session that ends does
        with pytest.raises(OSError, match="Input/output error"):
            os.write(terminal, b"lost")
        print("lost", flush=True)
        print("lost, too")


def test_ctrl_c_is_answered_at_once() -> None:
    code = (
        "import os, signal\n"
        "from detr_fast.engine.signals import StopSignals\n"
        "with StopSignals('after this step') as signals:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stderr.startswith("\nstopping after this step\n")
    assert run.stderr.count("stopping") == 1
    assert run.stderr.rstrip().endswith("KeyboardInterrupt")
    code = code.replace("SIGTERM", "SIGINT").rsplit("    os.kill", 1)[0]
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stderr.startswith("\nstopping after this step; Ctrl-C again stops at once, without saving\n")
    assert run.returncode == -signal.SIGINT


def test_a_signal_in_the_middle_of_writing_leaves_nothing_half_written(tmp_path: Path) -> None:
    code = (
        "import os, signal\n"
        "from detr_fast import cli\n"
        "from detr_fast.engine.run_folder import atomic_write\n"
        "stop = lambda *_: os.kill(os.getpid(), signal.SIGTERM)\n"
        f"cli.app = lambda *_, **__: atomic_write({str(tmp_path / 'photo.png')!r}, stop)\n"
        "cli.main([])\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (128 + signal.SIGTERM, "")
    assert list(tmp_path.iterdir()) == []


def test_predict_names_what_it_cannot_read_in_a_folder_and_goes_on(
    scenes: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "some photos"
    photos.mkdir()
    good = (scenes / "images").glob("*")
    for name in ("a.png", "c.png"):
        (photos / name).write_bytes(next(good).read_bytes())
    (photos / "b.png").write_bytes((photos / "a.png").read_bytes()[:200])
    out = tmp_path / "out"
    assert status("predict", trained, photos, "--out", out, "--batch-size", "1", "--device", "cpu") == 1
    printed = capsys.readouterr()
    assert printed.out.startswith("2 images: ")
    assert printed.err.startswith(f"Warning: {photos / 'b.png'}: cannot be decoded")
    assert printed.err.endswith("; left out\n")
    assert printed.err.count("\n") == 1
    assert sorted(p.name for p in out.iterdir()) == ["a.png", "c.png", "predictions.json"]


def test_predict_turns_pictures_as_cameras_meant_them(trained: Path, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", (50, 30)).save(tmp_path / "phone.jpg", exif=exif)
    assert status("predict", trained, tmp_path / "phone.jpg", "--out", tmp_path / "out", "--device", "cpu") == 0
    assert Image.open(tmp_path / "out" / "phone.png").size == (30, 50)


def test_predict_never_draws_over_the_photos_themselves(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "here").symlink_to(tmp_path / "photos")
    Image.new("RGB", (50, 30)).save(tmp_path / "photos" / "a.png")
    before = (tmp_path / "photos" / "a.png").read_bytes()
    call = ("predict", trained, tmp_path / "photos" / "a.png", "--out", tmp_path / "here", "--device", "cpu")
    assert status(*call) == 2
    assert "give another --out, or --no-pictures" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "photos").iterdir()] == ["a.png"]
    assert status(*call, "--no-pictures") == 0
    assert (tmp_path / "photos" / "a.png").read_bytes() == before


def test_a_run_folder_is_a_place_to_take_weights_from(trained: Path, tmp_path: Path) -> None:
    assert status("convert-weights", trained, tmp_path / "w.safetensors") == 0
    best, written = (convert.read_weights(path).state for path in (trained / "best.pt", tmp_path / "w.safetensors"))
    assert best.keys() == written.keys()
    sizes = [load_trained_model(path).config.transforms.eval_size for path in (trained, tmp_path / "w.safetensors")]
    assert sizes == [32, 32]
    assert all(written[name].equal(best[name]) for name in best)


def test_weights_on_a_hub_are_said_not_to_be_fetched(scenes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (
        ["evaluate", "facebook/detr-resnet-50"],
        ["train", "--data", scenes, "--run", "never", *SMALL, "--weights", "https://example.org/detr.pth"],
    ):
        assert status(*command) == 2
        assert "addresses and names of a hub are not downloaded" in capsys.readouterr().err
    assert not os.path.exists("never")


def test_the_doctor_says_where_its_page_is(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status("doctor", scenes, "--page", tmp_path / "page.png") == 0
    assert capsys.readouterr().err == f"drew {tmp_path / 'page.png'}\n"
    assert status("doctor", scenes, "--page", tmp_path / "page") == 0
    assert (tmp_path / "page").read_bytes()[:4] == b"\x89PNG"
    assert status("doctor", scenes, "--page", tmp_path) == 2
    assert f"{tmp_path}: cannot be written (Is a directory)" in capsys.readouterr().err


def test_an_exported_detector_finds_what_the_model_finds_with_pytorch_alone(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from torchvision.transforms.v2.functional import normalize

    from detr_fast.data.transforms import IMAGENET_MEAN, IMAGENET_STD
    from detr_fast.engine.trained import load_trained_model
    from detr_fast.models.postprocess import PostProcess

    path = tmp_path / "detector.pt2"
    assert status("export", trained, path) == 0
    assert capsys.readouterr().out.startswith(f"wrote {path} (")
    assert status("export", trained, path) == 2
    assert "is there already" in capsys.readouterr().err
    extra = {"detr_fast.json": ""}
    program = torch.export.load(path, extra_files=extra)
    assert not [n for n in program.graph.nodes if n.op == "call_function" and "detr_fast" in str(n.target)]

    known = load_trained_model(trained)
    assert json.loads(extra["detr_fast.json"])["names"] == list(known.names)
    images, mask = torch.rand(1, 3, 64, 96), torch.zeros(1, 64, 96, dtype=torch.bool)
    mask[:, 40:] = True
    images = images.masked_fill(mask[:, None], 0.7)  # what stands in the padding is nobody's business
    with torch.no_grad():
        scores, labels, boxes = program.module()(images, mask)
        unpadded = normalize(images[0, :, :40], list(IMAGENET_MEAN), list(IMAGENET_STD))
        padded = torch.nn.functional.pad(unpadded, (0, 0, 0, 24))[None]
        (found,) = PostProcess()(known.model((padded, mask)), torch.tensor([[40, 96]]))
    torch.testing.assert_close(scores[0], found["scores"])
    assert torch.equal(labels[0], found["labels"])
    torch.testing.assert_close(boxes[0] * torch.tensor([96, 40, 96, 40]), found["boxes"], rtol=1e-4, atol=1e-3)
